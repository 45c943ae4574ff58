"""Character models: what they learn from, what their bits are compared with, what they write, and what is refused."""

from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainrule import nn
from chainrule.cli import main
from chainrule.data import characters
from chainrule.data.characters import Alphabet, counted_bits, read_text
from chainrule.errors import DataError, FileFormatError, UsageError
from chainrule.report import FILES
from chainrule.runs import read_run
from chainrule.text import BITS, TextOutcome, TextRecipe, TextRun, sample, train_text

TEXT = "".join(f"The {animal} said: {word}!\n" for animal, word in [("cat", "miaow"), ("dog", "woof"), ("cow", "moo")] * 40)
RECIPE = TextRecipe(hidden=(24,), sequence=16, epochs=8, embedding=8, sample=40)
QUICK = ("--characters", "--epochs", "2", "--hidden", "8", "--sequence", "16", "--sample", "30", "--quiet")


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code if isinstance(caught.value.code, int) else 0


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def outcome() -> TextOutcome:
    return train_text("farm.txt", TEXT, replace(RECIPE, epochs=40), notes=[], verbose=False)


# ---- text as numbers -------------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_an_alphabet_gives_back_its_text(text: str) -> None:
    alphabet = Alphabet.of(text, 4)
    codes = alphabet.encode(text)
    assert alphabet.decode(codes.tolist()) == text
    assert codes.max() < alphabet.size - 1
    assert Alphabet.from_json(alphabet.to_json()) == alphabet
    counts = [text.count(c) for c in alphabet.characters]
    assert counts == sorted(counts, reverse=True)


def test_only_the_most_frequent_have_a_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(characters, "MOST", 2)
    assert Alphabet.of("aaabbc", 4).encode("abc\U0001f600").tolist() == [0, 1, 2, 2]


def test_windows_are_followed_by_their_next_characters() -> None:
    x, y = Alphabet("ab", 3).windows(np.arange(8, dtype=np.int32))
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert y.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert Alphabet("ab", 3).windows(np.arange(3))[0].shape == (0, 3)
    assert Alphabet("ab", 3).windows(np.arange(0))[0].shape == (0, 3)


def test_bits_of_counts_are_those_of_a_distribution() -> None:
    """Each model gives probabilities that sum to 1, unseen characters included."""
    codes = np.array([0, 1, 1, 2, 0, 1])
    one = [counted_bits(codes, 4, np.array([a]), np.array([b])) for a in range(4) for b in range(4)]
    for name in ("characters by frequency", "pairs by frequency"):
        chances = 2 ** -np.array([bits[name] for bits in one]).reshape(4, 4)
        np.testing.assert_allclose(chances.sum(axis=1), 1)
    assert 2 ** -one[0]["characters by frequency"] == pytest.approx(3 / 10)
    assert 2 ** -one[1]["pairs by frequency"] == pytest.approx((2 + 4 / 10) / 3), "1 follows 0 twice of two times"


# ---- learning --------------------------------------------------------------------------------------------------------------------


def test_a_network_knows_more_than_counts(outcome: TextOutcome) -> None:
    network, pairs, single = (values[BITS] for values in outcome.scores.values())
    assert list(outcome.scores) == ["this network", "pairs by frequency", "characters by frequency"]
    assert network < 0.7 * pairs < pairs < single
    codes = outcome.alphabet.encode(TEXT[-round(0.1 * len(TEXT)) :])
    x, y = outcome.alphabet.windows(codes)
    scores = outcome.network.predict(x).astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    likelihood = np.take_along_axis(scores, y[..., None], -1)[..., 0] - np.log(np.exp(scores).sum(axis=-1))
    assert network == pytest.approx(-likelihood.mean() / math.log(2), rel=1e-4)


def test_the_last_part_is_never_learnt_from() -> None:
    """Other characters there: the same alphabet, the same losses, the same weights where the number of epochs is fixed."""
    recipe = replace(RECIPE, epochs=2, patience=50)
    held = round(recipe.validation * len(TEXT))
    other = TEXT[:-held] + "zyx" * held
    a, b = (train_text("t", text[: len(TEXT)], recipe, notes=[], verbose=False) for text in (TEXT, other))
    assert a.alphabet == b.alphabet
    assert a.history["loss"] == b.history["loss"]
    assert a.scores != b.scores
    assert "held-out characters are none of the" in b.notes[0]


def test_what_it_writes(outcome: TextOutcome) -> None:
    network, alphabet = outcome.network, outcome.alphabet
    greedy = sample(network, alphabet, "The cat said: ", 6, 0, 0)
    assert greedy in ("miaow!", "woof!\n", "moo!\nT")
    assert sample(network, alphabet, "", 30, 1.0, 3) == sample(network, alphabet, "", 30, 1.0, 3)
    assert sample(network, alphabet, "", 30, 1.0, 3) != sample(network, alphabet, "", 30, 1.0, 4)
    assert sample(network, alphabet, "", 20, 1e-9, 5) == sample(network, alphabet, "", 20, 0, 6), "cold is greedy"
    assert len(sample(network, alphabet, "x" * 100, 12, 1.0, 0)) == 12, "a prompt longer than a window, of unknown characters"
    hot = sample(network, alphabet, "", 300, 100.0, 0)
    assert len(set(hot)) == len(alphabet.characters), "very hot: all characters alike"


def test_a_sample_is_as_likely_as_the_network_says(outcome: TextOutcome) -> None:
    """The first character after a prompt, over many seeds, comes as often as its probability."""
    network, alphabet = outcome.network, outcome.alphabet
    x = alphabet.encode("The ")[None]
    scores = network.predict(np.pad(x, ((0, 0), (0, alphabet.length - 4))), lengths=[4])[0, 3, :-1].astype(np.float64)
    chances = np.exp(scores / 2 - (scores / 2).max())
    chances /= chances.sum()
    drawn = alphabet.encode("".join(sample(network, alphabet, "The ", 1, 2.0, seed) for seed in range(200)))
    shares = np.bincount(drawn, minlength=len(chances)) / 200
    assert np.abs(shares - chances).max() < 0.12


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
def test_every_cell_and_stacks(cell: str) -> None:
    made = train_text("t", TEXT, replace(RECIPE, cell=cell, hidden=(6, 5), dropout=0.1, epochs=1), notes=[], verbose=False)
    assert np.isfinite(made.scores["this network"][BITS])


# ---- the command line --------------------------------------------------------------------------------------------------------------


def test_train_predict_explain_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "farm.txt").write_text(TEXT, encoding="utf-8")
    options = ("--epochs", 8, "--hidden", 24, "--sequence", 16, "--sample", 50, "--temperature", 0.3, "--temperature", 0.9)
    assert call("train", "farm.txt", "--characters", *options) == 0
    said = capsys.readouterr().out
    for words in (
        f"farm.txt: {len(TEXT):,} characters, {len(set(TEXT))} distinct",
        "bits per character",
        "pairs by frequency",
        "Sample at temperature 0.3:",
        "Sample at temperature 0.9:",
        'next: chainrule predict runs/farm --prompt "Once"',
    ):
        assert words in said
    run = tmp_path / "runs" / "farm"
    assert sorted(f.name for f in run.iterdir()) == sorted(FILES)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "<h2>Sample at temperature 0.3</h2><pre>" in html
    assert json.loads((run / "settings.json").read_text(encoding="utf-8"))["recipe"]["temperature"] == [0.3, 0.9]
    for seed, same in ((0, True), (1, False)):
        texts = []
        for second in (0, seed):
            assert call("predict", run, "--prompt", "The cow", "--sample", 40, "--temperature", 1.5, "--seed", second) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0].startswith("The cow")
        assert len(texts[0]) == len("The cow") + 40 + 1
        assert (texts[0] == texts[1]) == same
    assert call("explain", run, "--rows", 2) == 0
    assert "cross_entropy" in capsys.readouterr().out
    assert call("check", run, "--rows", 2) == 0


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "farm.txt").write_text(TEXT, encoding="utf-8")
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call("train", "farm.txt", "--out", out, "--seed", seed, *QUICK) == 0
    for name in ("history.csv", "preparation.json", "network.safetensors"):
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b
        assert (a == c) == (name == "preparation.json")


def test_any_script_and_any_encoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "春眠不覚暁 처처문제조 Ünïcødé \U0001f600\u202e\r\n" * 30 + "\x1b[31m red"
    for name, content in (
        ("a.txt", words.encode()),
        ("b.txt", words.encode("utf-16")),
        ("c.txt.gz", gzip.compress(words.encode())),
    ):
        (tmp_path / name).write_bytes(content)
        assert read_text(tmp_path / name)[0] == words.replace("\r\n", "\n")
        assert call("train", name, *QUICK) == 0
        out = capsys.readouterr().out
        assert not set(out) & set("\x1b\u202e\r"), "a text steers no terminal"
    assert "\x1b" not in (tmp_path / "runs" / "a" / "report.html").read_text(encoding="utf-8")
    assert call("predict", "runs/a", "--prompt", "春眠", "--sample", 20) == 0
    assert "春眠" in capsys.readouterr().out
    assert call("predict", "runs/a", "--prompt", "Q春", "--sample", 5) == 0
    assert "characters that the network has not learnt: Q" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b" \n\n ", "is empty"),
        (b"\x00\x01\x02" * 200, "is not text"),
        (bytes(range(256)) * 9, "is not text"),
        (b"short", "has 5 characters: with windows of 16 at least 50 are needed"),
        (b"a" * 500, "repeats one character, 'a'"),
    ],
)
def test_what_is_no_text_to_learn_from(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, words: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    assert call("train", "t.txt", *QUICK) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
    assert [f.name for f in tmp_path.iterdir()] == ["t.txt"]


def test_a_text_of_three_windows_is_enough(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abcab" * 10, encoding="utf-8")
    assert call("train", "t.txt", *QUICK) == 0


def weights(run: str) -> dict[str, np.ndarray]:
    """Of a run folder."""
    return dict(read_run(Path(run)).network.parameters)


def test_truncation_and_memory(tmp_path: Path) -> None:
    """A budget changes no bit; truncation does, and takes more updates."""
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    options = {"plain": (), "within": ("--memory", "1MB"), "cut": ("--truncate", "4,8")}
    for out, more in options.items():
        assert call("train", "t.txt", *QUICK, "--sequence", "24", "--out", out, *more) == 0
    plain, within, cut = (weights(out) for out in options)
    assert all(np.array_equal(w, plain[n]) for n, w in within.items())
    assert not any(np.array_equal(w, plain[n]) for n, w in cut.items())
    recipes = [json.loads((tmp_path / out / "settings.json").read_text(encoding="utf-8"))["recipe"] for out in options]
    assert [r["memory"] for r in recipes] == [None, 1_000_000, None]
    assert [r["truncate"] for r in recipes] == [None, None, [4, 8]]


def test_the_recipe_reaches_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def fit(self: nn.Sequential, *data: Any, **options: Any) -> Any:
        asked.update(options)
        raise UsageError("enough")

    monkeypatch.setattr(nn.Sequential, "fit", fit)
    with pytest.raises(UsageError, match="enough"):
        train_text("t", TEXT, replace(RECIPE, truncate=(2, 4), memory=12345), notes=[], verbose=False)
    assert (asked["truncate"], asked["memory"]) == ((2, 4), 12345)


def test_a_huge_text_is_refused_before_it_is_read_as_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("a b " * 100, encoding="utf-8")
    monkeypatch.setattr(characters, "LARGEST", 100)
    with pytest.raises(DataError, match="are the most: take a part of it"):
        read_text(tmp_path / "t.txt")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--horizon", "3"), "--horizon means nothing with --characters: leave it out"),
        (("--target", "x"), "--target means nothing with --characters"),
        (("--log-target",), "--log-target means nothing"),
        (("--drop", "x"), "--drop means nothing"),
        (("--validation", "0"), "a part of the text between 0 and 1"),
        (("--hidden", "none"), "needs hidden units"),
        (("--temperature", "-1"), "--temperature"),
        (("--truncate", "16"), '"16" is no pair of numbers; write 16,32'),
        (("--truncate", "32,16"), "truncate=(32, 16)"),
        (("--truncate", "0,4"), "whole numbers of at least 1"),
        (("--memory", "lots"), "memory is a number of bytes, or text such as"),
        (("--memory", "1kB"), "memory=1,000 bytes is too little: at least"),
    ],
)
def test_options_that_make_no_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    assert call("train", "t.txt", "--characters", *options) == 2
    assert words in capsys.readouterr().err


def test_runs_of_the_other_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    rows = "\n".join(f"{i % 7},{i % 5},{(i * i) % 11}" for i in range(60))
    (tmp_path / "t.csv").write_text(f"a,b,c\n{rows}\n", encoding="utf-8")
    assert call("train", "t.txt", "--out", "text", *QUICK) == 0
    assert call("train", "t.csv", "--target", "c", "--out", "table", "--epochs", "1", "--hidden", "4", "--quiet") == 0
    capsys.readouterr()
    for arguments, words in (
        (("predict", "text", "t.csv"), "is a character model: give it a text to write on"),
        (("predict", "text"), "is a character model"),
        (("predict", "table"), "name the file of rows to predict"),
        (("predict", "table", "t.csv", "--prompt", "x"), "without --prompt"),
        (("explain", "text", "--data", "t.csv"), "without --data"),
    ):
        assert call(*arguments) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "text" / "network.safetensors").write_bytes((tmp_path / "table" / "network.safetensors").read_bytes())
    assert call("predict", "text", "--prompt", "x") == 2
    assert "not of one run" in capsys.readouterr().err


def test_forged_alphabets_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT, encoding="utf-8")
    assert call("train", "t.txt", "--out", "run", *QUICK) == 0
    assert isinstance(read_run("run"), TextRun)
    file = tmp_path / "run" / "preparation.json"
    whole = file.read_text(encoding="utf-8")
    for forged in (
        {"characters": ""},
        {"characters": "aa"},
        {"characters": "abc"},
        {"characters": 7},
        {"length": 0},
        {"length": 2**40},
        {"more": 1},
    ):
        file.write_text(json.dumps({**json.loads(whole), **forged}), encoding="utf-8")
        with pytest.raises(FileFormatError):
            read_run("run")
    file.write_text(whole[: len(whole) // 2], encoding="utf-8")
    with pytest.raises(FileFormatError, match="cut off"):
        read_run("run")


def test_a_recipe_without_sense() -> None:
    with pytest.raises(UsageError, match="hidden units"):
        train_text("t", TEXT, replace(RECIPE, hidden=()), notes=[], verbose=False)
