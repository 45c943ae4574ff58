"""The command line end to end in temporary folders: what it writes, what it says, and that a mistake never shows a traceback."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chainrule.cli import commands, main
from chainrule.report import FILES

RNG = np.random.default_rng(0)
ROWS = 120
SIZE, AGE = RNG.uniform(30, 200, ROWS), RNG.integers(0, 90, ROWS)
TOWN = RNG.choice(["Ahausen", "Beheim", "Cedorf"], ROWS)
PRICE = 3 * SIZE - AGE + 40 * (TOWN == "Beheim") + RNG.normal(0, 5, ROWS)
QUICK = ("--epochs", "8", "--hidden", "8", "--quiet")


def houses(folder: Path, name: str = "houses.csv", **replaced: object) -> Path:
    columns = {"size": SIZE.round(1), "age": AGE, "town": TOWN, "price": PRICE.round(2), **replaced}
    columns = {key: values for key, values in columns.items() if values is not None}
    with open(folder / name, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return folder / name


def call(*arguments: object) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code if isinstance(caught.value.code, int) else 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a call that must fail with 2."""
    assert call(*arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.strip()
    return message


def rows_of(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_train_predict_explain_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = houses(tmp_path)
    assert call("train", data, "--target", "price", "--epochs", "8", "--hidden", "8,4") == 0
    said = capsys.readouterr().out
    for words in (
        "120 rows, 4 columns",
        "categorical",
        "regression",
        "linear model",
        "always the mean",
        "24 held-out rows",
        "runs/houses",
    ):
        assert words in said
    run = tmp_path / "runs" / "houses"
    assert sorted(f.name for f in run.iterdir()) == sorted(FILES)
    settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    assert settings["recipe"]["hidden"] == [8, 4]
    assert set(settings["scores"]) == {"this network", "linear model", "always the mean"}
    history = rows_of(run / "history.csv")
    assert [row["epoch"] for row in history] == [str(i + 1) for i in range(len(history))]
    assert "price" in (run / "report.html").read_text(encoding="utf-8")

    new = houses(tmp_path, "new.csv", price=None)
    assert call("predict", run, new) == 0
    assert "120 predictions: new-predictions.csv" in capsys.readouterr().out
    predicted = rows_of(tmp_path / "new-predictions.csv")
    assert list(predicted[0]) == ["size", "age", "town", "prediction"]
    assert [row["town"] for row in predicted] == TOWN.tolist()
    assert all(np.isfinite(float(row["prediction"])) for row in predicted)

    assert call("explain", run) == 0
    assert capsys.readouterr().out.strip()
    for form in ("latex", "html"):
        assert call("explain", run, "--form", form) == 0
        assert capsys.readouterr().out.strip()
    assert call("check", run) == 0
    assert call("check", run, "--data", data, "--rows", "4") == 0


def test_classes_get_probabilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = houses(tmp_path)
    assert call("train", data, "--target", "town", "--out", "run", *QUICK) == 0
    assert "accuracy" in capsys.readouterr().out
    assert call("predict", "run", data, "--out", "-") == 0
    out, err = capsys.readouterr()
    predicted = list(csv.DictReader(out.splitlines()))
    names = [name for name in predicted[0] if name.startswith("probability ")]
    assert names == ["probability Ahausen", "probability Beheim", "probability Cedorf"]
    for row in predicted:
        chances = [float(row[name]) for name in names]
        assert sum(chances) == pytest.approx(1, abs=1e-4)
        assert row["prediction"] == names[int(np.argmax(chances))].removeprefix("probability ")
    assert "Scores on these 120 rows" in err, "the table that goes to a pipe stays a table"


def test_two_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = houses(tmp_path, old=np.where(AGE > 40, "yes", "no"), age=None)
    assert call("train", data, "--target", "old", "--out", "run", *QUICK) == 0
    assert "AUC" in capsys.readouterr().out
    assert call("predict", "run", data) == 0
    for row in rows_of(tmp_path / "houses-predictions.csv"):
        assert float(row["probability no"]) + float(row["probability yes"]) == pytest.approx(1, abs=1e-5)
        assert (row["prediction"] == "yes") == (float(row["probability yes"]) > 0.5)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    data = houses(tmp_path)
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call("train", data, "--target", "price", "--out", out, "--seed", seed, *QUICK) == 0
    for name in ("history.csv", "preparation.json", "network.safetensors"):
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b
        assert (a == c) == (name == "preparation.json")


def test_gaps_are_filled_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    age = [str(v) if i % 10 else "" for i, v in enumerate(AGE)]
    assert call("train", houses(tmp_path, age=age), "--target", "price", "--out", "run", *QUICK) == 0
    assert "age: " in (said := capsys.readouterr().out)
    assert "missing, filled in" in said
    new = houses(tmp_path, "new.csv", town=["Nirgends"] * 3 + [""] + TOWN[4:].tolist(), price=None)
    assert call("predict", "run", new) == 0
    said = capsys.readouterr().out
    assert 'town: 3 of a category never seen in training, first "Nirgends" in row 1' in said
    assert "town: 1 missing, filled in" in said


def test_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import polars as pl

    pl.read_csv(houses(tmp_path)).write_parquet("houses.parquet")
    np.savez("houses.npz", size=SIZE, age=AGE, town=TOWN, price=PRICE)
    for name in ("houses.parquet", "houses.npz"):
        assert call("train", name, "--target", "price", "--out", f"run-{name}", *QUICK) == 0
        assert call("predict", f"run-{name}", name, "--out", f"{name}.csv") == 0
        assert list(rows_of(tmp_path / f"{name}.csv")[0]) == ["size", "age", "town", "price", "prediction"]
    a, b = ((tmp_path / f"run-{name}" / "history.csv").read_text().splitlines()[1] for name in ("houses.parquet", "houses.npz"))
    assert float(a.split(",")[1]) == pytest.approx(float(b.split(",")[1]), rel=0.01)


def test_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = RNG.integers(0, 3, 90).astype(np.uint8)
    images = (RNG.integers(0, 60, (90, 4, 4)) + 60 * labels[:, None, None]).astype(np.uint8)
    head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in images.shape)
    (tmp_path / "t-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
    (tmp_path / "t-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (90).to_bytes(4, "big") + labels.tobytes())
    assert call("train", "t-images-idx3-ubyte.gz", "--out", "run", *QUICK) == 0
    assert call("predict", "run", "t-images-idx3-ubyte.gz", "--out", "p.csv") == 0
    assert {row["prediction"] for row in rows_of(tmp_path / "p.csv")} <= {"0", "1", "2"}


def test_runs_are_never_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = houses(tmp_path)
    for _ in range(2):
        assert call("train", data, "--target", "price", *QUICK) == 0
    assert sorted(f.name for f in (tmp_path / "runs").iterdir()) == ["houses", "houses-2"]
    assert "--overwrite" in refused(capsys, "train", data, "--target", "price", "--out", "runs/houses", *QUICK)
    assert call("train", data, "--target", "price", "--out", "runs/houses", "--overwrite", *QUICK) == 0
    assert call("predict", "runs/houses", data) == 0
    assert "--overwrite" in refused(capsys, "predict", "runs/houses", data)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "hauses.csv", "--target", "price"], 'Did you mean "houses.csv"'),
        (["train", "houses.csv"], "say which column to predict with --target. houses.csv has: size, age, town, price"),
        (["train", "houses.csv", "--target", "prise"], 'Did you mean "price"'),
        (["train", "houses.csv", "--target", "price", "--drop", "tonw"], 'Did you mean "town"'),
        (["train", "houses.csv", "--target", "price", "--activation", "rleu"], 'Did you mean "relu"'),
        (["train", "houses.csv", "--target", "town", "--task", "regression"], "needs numbers"),
        (["train", "houses.csv", "--target", "price", "--hidden", "8,x"], "no list of layer sizes"),
        (["train", "houses.csv", "--target", "price", "--epochs", "0"], "--epochs"),
        (["predict", "nowhere", "houses.csv"], "no run folder"),
        (["explain", "."], "no whole run"),
        (["demo", "mnist"], "mnist"),
        (["tarin"], "tarin"),
    ],
)
def test_mistakes_give_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    houses(tmp_path)
    assert words in refused(capsys, *arguments)


def test_a_column_that_is_gone_at_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", houses(tmp_path), "--target", "price", "--out", "run", *QUICK) == 0
    capsys.readouterr()
    assert 'no column "age"' in refused(capsys, "predict", "run", houses(tmp_path, "new.csv", age=None))
    assert not (tmp_path / "new-predictions.csv").exists()


@pytest.mark.parametrize("name", ["network.safetensors", "preparation.json", "settings.json"])
def test_damaged_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    data = houses(tmp_path)
    assert call("train", data, "--target", "price", "--out", "run", *QUICK) == 0
    whole = (tmp_path / "run" / name).read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\xff" * 100):
        (tmp_path / "run" / name).write_bytes(damaged)
        refused(capsys, "predict", "run", data)
    (tmp_path / "run" / name).unlink()
    assert "no whole run" in refused(capsys, "predict", "run", data)


@pytest.mark.parametrize("name", ["", *commands.commands])
def test_help_shows_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert call(*([name] if name else []), "--help") == 0
    assert "Example:  chainrule" in capsys.readouterr().out


def test_as_a_process(tmp_path: Path) -> None:
    """As a user starts it: the message alone on the error stream, and no colour codes in a pipe."""

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "chainrule.cli", *arguments], capture_output=True, text=True, check=False)

    wrong = start("train", "nothing.csv", "--target", "price")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("chainrule: there is no file")
    right = start("train", str(houses(tmp_path)), "--target", "price", "--epochs", "2")
    assert (right.returncode, right.stderr) == (0, "")
    assert "\x1b" not in right.stdout
