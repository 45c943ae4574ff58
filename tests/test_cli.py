"""The command line end to end in temporary folders: what it writes, what it says, and that a mistake never shows a traceback."""

from __future__ import annotations

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from chainrule.cli import _run_folder, commands, main
from chainrule.experiment import Recipe
from chainrule.report import FILES
from chainrule.train.progress import Progress

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
        "houses.csv: 120 rows, 4 columns",
        "categorical",
        "target: price, regression, its numbers take",
        "network: 5 → 8 → 4 → 1, silu, mse",
        "8 epochs in",
        "linear model",
        "always the mean",
        "24 held-out rows",
        "run folder: runs/houses",
        "next: chainrule predict runs/houses NEW.csv",
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
    said = capsys.readouterr().out
    for words in ("z4 = a3 @ W4 + b4", "∂L/∂W4 = a3.T @ δ4", "Update: AdamW"):
        assert words in said
    for form, words in (("latex", r"\partial"), ("html", "<math")):
        assert call("explain", run, "--form", form) == 0
        assert words in capsys.readouterr().out
    assert call("explain", run, "--data", data, "--rows", "2", "--numbers") == 0
    assert "L = sum((z4 - y)**2) / n" in (said := capsys.readouterr().out)
    assert "[[" in said
    assert call("check", run) == 0
    assert "all derivatives agree with central differences" in capsys.readouterr().out
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


def test_regression_beats_the_mean_and_classes_beat_the_commonest(tmp_path: Path) -> None:
    data = houses(tmp_path)
    assert call("train", data, "--target", "price", "--out", "a", "--epochs", "60", "--hidden", "32", "--quiet") == 0
    scores = json.loads((tmp_path / "a" / "settings.json").read_text(encoding="utf-8"))["scores"]
    assert scores["this network"]["RMSE"] < 0.5 * scores["always the mean"]["RMSE"]
    assert scores["this network"]["R²"] > 0.8
    assert call("train", data, "--target", "town", "--out", "b", "--epochs", "60", "--hidden", "32", "--quiet") == 0
    scores = json.loads((tmp_path / "b" / "settings.json").read_text(encoding="utf-8"))["scores"]
    assert scores["this network"]["accuracy"] > scores["always the most frequent"]["accuracy"]


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
    assert sorted(f.name for f in (tmp_path / "runs" / "houses").iterdir()) == sorted(FILES)
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
        (["train", "houses.csv", "--target", "price", "--learning-rate", "nan"], "no finite number"),
        (["train", "houses.csv", "--target", "price", "--validation", "nan"], "no finite number"),
        (["train", "houses.csv", "--target", "price", "--seed", "-1"], "--seed"),
        (["train", "houses.csv", "--target", "price", "--split-seed", "-1"], "--split-seed"),
        (["train", "houses.csv", "--target", "price", "--weight-decay", "1e30"], "diverged in epoch 1"),
        (
            ["train", "houses.csv", "--target", "price", "--hidden", "99999999999"],
            'units, or its input fewer columns [layer "0"]',
        ),
        (["train", "houses.csv", "--target", "price", "--out", "houses.csv/run"], "cannot be made"),
        (["train", "houses.csv", "--target", "price", "--categorical", "price", "--task", "regression"], "names things, as told"),
        (["train", "."], "is a folder"),
        (["train"], "Missing argument"),
        (["predict", "nowhere", "houses.csv"], "no run folder"),
        (["explain", "."], "no whole run"),
        (["demo", "mnist"], "mnist"),
        (["tarin"], "tarin"),
    ],
)
def test_mistakes_give_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    houses(tmp_path)
    assert words in refused(capsys, *arguments)
    assert [f.name for f in tmp_path.iterdir()] == ["houses.csv"], "nothing is left behind"


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
    for damaged in (b"", whole[: len(whole) // 2], b"\xff" * 100, b"[" * 100_000, b"[]", b'{"__class__": "os.system"}'):
        if name == "settings.json" and damaged.startswith(b"{"):
            continue
        (tmp_path / "run" / name).write_bytes(damaged)
        refused(capsys, "predict", "run", data)
    (tmp_path / "run" / name).unlink()
    assert "no whole run" in refused(capsys, "predict", "run", data)


def test_runs_with_other_versions_of_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A network without arrays as arguments is the same in version 1, so older runs predict; later ones ask for an update."""
    data = houses(tmp_path)
    assert call("train", data, "--target", "price", "--out", "run", *QUICK) == 0
    assert call("predict", "run", data, "--out", "now.csv") == 0
    file = tmp_path / "run" / "network.safetensors"
    whole = file.read_bytes()
    assert whole.count(b'"version":"2"') == 1
    file.write_bytes(whole.replace(b'"version":"2"', b'"version":"1"'))
    assert call("predict", "run", data, "--out", "older.csv") == 0
    assert (tmp_path / "older.csv").read_bytes() == (tmp_path / "now.csv").read_bytes()
    file.write_bytes(whole.replace(b'"version":"2"', b'"version":"3"'))
    assert "update chainrule" in refused(capsys, "predict", "run", data, "--out", "later.csv")


@pytest.mark.parametrize("name", ["", *commands.commands])
def test_help_shows_an_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert call(*([name] if name else []), "--help") == 0
    assert "Example:  chainrule" in capsys.readouterr().out


def test_parts_of_two_runs_are_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = houses(tmp_path)
    for target in ("price", "town"):
        assert call("train", data, "--target", target, "--out", target, *QUICK) == 0
    (tmp_path / "price" / "network.safetensors").write_bytes((tmp_path / "town" / "network.safetensors").read_bytes())
    for command in (["predict", "price", data], ["explain", "price"], ["check", "price"]):
        assert "not of one run" in refused(capsys, *command)


def test_a_preparation_that_claims_billions_of_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = houses(tmp_path)
    assert call("train", data, "--target", "price", "--out", "run", *QUICK) == 0
    file = tmp_path / "run" / "preparation.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["columns"][0] = {"kind": "block", "name": "size", "shape": [2**30] * 8, "mean": 0.0, "scale": 1.0}
    file.write_text(json.dumps(content), encoding="utf-8")
    assert "not of one run" in refused(capsys, "predict", "run", data)
    content["columns"][0]["kind"] = ["block"]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert "unknown kind" in refused(capsys, "check", "run")


def test_ctrl_c_saves_what_was_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Progress) -> None:
        if self._run.epochs == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "epoch", interrupt)
    data = houses(tmp_path)
    assert call("train", data, "--target", "price", "--out", "run", "--epochs", "50", "--hidden", "8") == 130
    out, err = capsys.readouterr()
    assert "interrupted in epoch 4 of 50" in out
    assert err == "chainrule: interrupted; what had been learnt until then is saved in run\n"
    assert len(rows_of(tmp_path / "run" / "history.csv")) == 3
    assert json.loads((tmp_path / "run" / "settings.json").read_text(encoding="utf-8"))["interrupted"] is True
    assert call("predict", "run", data) == 0


@pytest.mark.parametrize(
    ("trouble", "status", "note"),
    [
        (KeyboardInterrupt(), 130, "interrupted before the baselines were fitted"),
        (MemoryError(), 0, "the baselines could not be fitted: there is not enough memory (MemoryError)"),
        (ValueError("a column is odd"), 0, "the baselines could not be fitted: a column is odd (ValueError)"),
        (AssertionError(), 0, "the baselines could not be fitted: no reason is given (AssertionError)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_happens_to_the_baselines_takes_nothing_away(
    trouble: BaseException, status: int, note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(*arguments: object) -> None:
        raise trouble

    monkeypatch.setattr("chainrule.experiment.baselines", stop)
    assert call("train", houses(tmp_path), "--target", "price", "--out", "run", *QUICK) == status
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == sorted(FILES)
    assert note in " ".join(capsys.readouterr().out.split())


def test_ctrl_c_before_anything_is_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("chainrule.cli.read_table", interrupt)
    assert call("train", houses(tmp_path), "--target", "price", *QUICK) == 130
    assert capsys.readouterr().err.strip() == "stopped"
    assert not (tmp_path / "runs").exists()


def test_a_run_that_diverges_keeps_its_last_good_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A decay of 2.2 a step makes the weights larger at each step until they overflow."""
    data = houses(tmp_path)
    options = ("--weight-decay", "1100", "--epochs", "300", "--patience", "300", "--hidden", "8", "--quiet")
    assert call("train", data, "--target", "price", "--out", "run", *options) == 2
    out, err = capsys.readouterr()
    assert "training diverged in epoch" in out
    assert err == "chainrule: training diverged; what had been learnt until then is saved in run\n"
    assert len(rows_of(tmp_path / "run" / "history.csv")) > 1
    assert call("predict", "run", data) == 0
    assert all(np.isfinite(float(row["prediction"])) for row in rows_of(tmp_path / "houses-predictions.csv"))


EVIL = ["<script>alert(1)</script>", "=cmd|calc", "two\nlines", "\x1b[31mred", "[bold]m[/bold]", "ünï ☃", "x" * 300, "\u202eevil"]


def test_names_from_data_steer_neither_terminal_nor_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ['=HYPERLINK("http://x")', "<img src=x onerror=alert(1)>", "\x1b]0;title\x07", "[red]y"]
    with open("evil.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*EVIL, "class"])
        for i in range(60):
            writer.writerow([*(round(float(v), 2) for v in RNG.normal(size=len(EVIL))), labels[i % 4]])
    assert call("train", "evil.csv", "--target", "class", "--out", "run", "--epochs", "2", "--hidden", "4") == 0
    out, err = capsys.readouterr()
    assert not {c for c in out + err if c < " " or c in "\x7f\u202e"} - {"\n"}
    for name in ("two\\nlines", "\\x1b[31mred", "[bold]m[/bold]", "\\u202eevil", "ünï ☃", "[red]y"):
        assert name in out
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert not any(text in html for text in ("<script", "<img", "\x1b", "\u202e"))
    assert call("predict", "run", "evil.csv") == 0
    assert "begins like a formula" in capsys.readouterr().out
    assert {row["prediction"] for row in rows_of(tmp_path / "evil-predictions.csv")} <= set(labels), "data stay as they are"
    assert "\x1b" not in refused(capsys, "train", "evil.csv", "--target", "\x1b[31mrad")


@pytest.mark.parametrize(
    ("name", "run"), [("..csv", "data"), ("...csv", "data"), (".csv", "data"), ("a b\n;c.csv", "a b_;c"), ("-x.csv.gz", "x")]
)
def test_run_folders_stay_where_they_belong(tmp_path: Path, name: str, run: str) -> None:
    file = houses(tmp_path)
    content = file.read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    file.unlink()
    assert call("train", tmp_path / name, "--target", "price", "--epochs", "1", "--hidden", "2", "--quiet") == 0
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([name, "runs"])
    assert [f.name for f in (tmp_path / "runs").iterdir()] == [run]


@pytest.mark.skipif(
    sys.platform == "win32", reason="folders cannot be locked there, so runs are not kept apart: cli._claimed says so"
)
def test_two_runs_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second that is told the same new folder is refused, and leaves the folder of the first, which is empty until it has learnt."""
    data = houses(tmp_path)
    with _run_folder(tmp_path / "run", data, overwrite=False) as folder:
        assert "another run is being written to" in refused(capsys, "train", data, "--target", "price", "--out", "run", *QUICK)
        assert folder.is_dir()
    assert not folder.exists(), "nothing got into it"
    assert call("train", data, "--target", "price", "--out", "run", *QUICK) == 0
    assert "holds a run already" in refused(capsys, "train", data, "--target", "price", "--out", "run", *QUICK)


def test_a_damaged_file_is_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not the option that would fit what it was."""
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(2000))[:20])
    message = refused(capsys, "train", "train-images-idx3-ubyte.gz", "--filters", "4")
    assert "train-images-idx3-ubyte.gz" in message
    assert "--filters" not in message
    assert "--filters means nothing" in refused(capsys, "train", houses(tmp_path), "--target", "price", "--filters", "4")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_are_replaced_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = houses(tmp_path)
    assert call("train", data, "--target", "price", "--out", "run", *QUICK) == 0
    (tmp_path / "precious").write_text("keep", encoding="utf-8")
    for name in FILES:
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).symlink_to(tmp_path / "precious")
    (tmp_path / "p.csv").symlink_to(tmp_path / "precious")
    assert call("train", data, "--target", "price", "--out", "run", "--overwrite", *QUICK) == 0
    assert "--overwrite" in refused(capsys, "predict", "run", data, "--out", "p.csv")
    assert call("predict", "run", data, "--out", "p.csv", "--overwrite") == 0
    assert (tmp_path / "precious").read_text(encoding="utf-8") == "keep"
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    assert "link to nowhere" in refused(capsys, "train", data, "--target", "price", "--out", "nowhere", *QUICK)


@pytest.mark.skipif(sys.platform == "win32", reason="these paths are not there")
def test_devices_and_pipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = houses(tmp_path)
    assert "is a device" in refused(capsys, "train", "/dev/zero", "--target", "price")
    assert call("train", data, "--target", "price", "--out", "run", *QUICK) == 0
    assert call("predict", "run", data, "--out", "/dev/null") == 0
    assert Path("/dev/null").is_char_device()
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes(data.read_bytes()))
    writer.start()
    assert call("predict", "run", "pipe", "--out", "p.csv") == 0
    writer.join()
    assert len(rows_of(tmp_path / "p.csv")) == ROWS


def test_predictions_never_take_a_file_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = houses(tmp_path)
    assert call("train", data, "--target", "price", "--out", "run", *QUICK) == 0
    assert "no folder" in refused(capsys, "predict", "run", data, "--out", "nowhere/p.csv")
    assert "is a folder" in refused(capsys, "predict", "run", data, "--out", "run")
    before = rows_of(data)
    assert call("predict", "run", data, "--out", data, "--overwrite") == 0
    after = rows_of(data)
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in after] == before
    assert call("predict", "run", data, "--out", data, "--overwrite") == 0
    assert list(rows_of(data)[0])[-2:] == ["prediction", "prediction 2"]


def test_a_target_that_is_there_but_unknown_gives_no_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", houses(tmp_path), "--target", "town", "--out", "run", *QUICK) == 0
    new = houses(tmp_path, "new.csv", town=["Nirgends", *TOWN[1:]])
    assert call("predict", "run", new) == 0
    assert 'no scores: the target "town" is "Nirgends" in row 1' in capsys.readouterr().out


def test_tables_fit_eighty_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    data = houses(tmp_path, **{"a rather long name of a column": AGE % 7, "same": ["x"] * ROWS})
    assert call("train", data, "--target", "price", "--out", "run", "--epochs", "2", "--hidden", "8") == 0
    assert call("demo", "xor") == 0
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 80


def test_the_default_effort_follows_the_number_of_rows() -> None:
    recipe = Recipe()
    steps = {n: recipe.passes(n) * -(-n // recipe.batch(n)) for n in (100, 1_000, 10_000, 50_000, 1_000_000)}
    assert steps[100] == 100 * 7, "small tables are seen a hundred times"
    assert all(5_000 < steps[n] < 8_000 for n in (1_000, 10_000, 50_000)), steps
    assert steps[1_000_000] < 50_000, steps


def test_as_a_process(tmp_path: Path) -> None:
    """As a user starts it: the message alone on the error stream, and no colour codes in a pipe."""

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "chainrule.cli", *arguments], capture_output=True, text=True, check=False)

    wrong = start("train", "nothing.csv", "--target", "price")
    assert (wrong.returncode, wrong.stdout, wrong.stderr.count("\n")) == (2, "", 1)
    assert wrong.stderr.startswith("chainrule: there is no file")
    right = start("train", str(houses(tmp_path)), "--target", "price", "--epochs", "2")
    assert (right.returncode, right.stderr) == (0, "")
    assert "\x1b" not in right.stdout


def on_a_terminal(interrupt_at: bytes | None, *arguments: str) -> tuple[int, str]:
    """Exit code and what standard error shows, being a terminal; Ctrl-C once it shows `interrupt_at`."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    ours, theirs = pty.openpty()
    shown = b""
    # test runners ignore Ctrl-C, and what they start inherits that
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import chainrule.cli as c; c.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "80"},
    )
    deadline = threading.Timer(60, process.kill)
    deadline.start()
    try:
        os.close(theirs)
        with suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 1024):
                shown += piece
                if interrupt_at is not None and interrupt_at in shown:
                    process.send_signal(signal.SIGINT)
                    interrupt_at = None
        return process.wait(), shown.decode()
    finally:
        process.kill()
        deadline.cancel()
        os.close(ours)


def test_a_terminal_shows_progress(tmp_path: Path) -> None:
    arguments = ["train", str(houses(tmp_path)), "--target", "price", "--epochs", "30", "--hidden", "8"]
    code, shown = on_a_terminal(None, *arguments)
    assert code == 0
    for words in ("epoch 30/30", "loss", "validation", "/epoch"):
        assert words in shown


def test_ctrl_c_as_a_user_presses_it(tmp_path: Path) -> None:
    arguments = ["train", str(houses(tmp_path)), "--target", "price", "--epochs", "9999", "--patience", "9999"]
    code, shown = on_a_terminal(b"loss", *arguments)
    assert code == 130, shown[-200:]
    assert "Traceback" not in shown
    assert "interrupted; what had been learnt until then is saved in runs/houses" in shown
    assert sorted(f.name for f in (tmp_path / "runs" / "houses").iterdir()) == sorted(FILES)
