"""Image classifiers from files to run folders: what they learn, what the report shows, and what is refused."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_cli import call, refused
from test_images import idx, save
from test_report import checked

import chainrule as cr
from chainrule import images as module
from chainrule import nn
from chainrule.data import Images, read_images
from chainrule.errors import DataError, DivergenceError
from chainrule.experiment import INTERRUPTED
from chainrule.images import (
    ImageOutcome,
    ImageRecipe,
    ImageRun,
    Seen,
    brightness,
    galleries,
    network,
    percent,
    predict_images,
    score,
    train_images,
)
from chainrule.pictures import Gallery, png, resized, signed, strip
from chainrule.runs import read_run

Array = np.ndarray
QUICK = ("--epochs", "6", "--hidden", "8", "--filters", "none", "--batch-size", "16", "--no-augment", "--quiet")


def bars(rows: int = 150, colour: bool = False, classes: int = 3, seed: int = 0) -> tuple[Array, Array]:
    """A bright bar at a height that says the class, in noise."""
    r = np.random.default_rng(seed)
    codes = r.integers(0, classes, rows)
    pixels = r.integers(0, 60, (rows, 9, 8, *((3,) if colour else ())), dtype=np.uint8)
    for picture, code in zip(pixels, codes, strict=True):
        picture[3 * code : 3 * code + 2] = 200
    return pixels, codes


def images(rows: int = 150, colour: bool = False, names: tuple[Any, ...] = ("low", "middle", "high")) -> Images:
    pixels, codes = bars(rows, colour)
    return Images(pixels, codes, names, tuple(f"{i}.png" for i in range(rows)), "bars")


def write_idx(folder: Path, rows: int = 150) -> Path:
    pixels, codes = bars(rows)
    file = folder / "bars-images-idx3-ubyte"
    file.write_bytes(idx(pixels))
    (folder / "bars-labels-idx1-ubyte").write_bytes(idx(codes.astype(np.uint8)))
    return file


def write_folder(folder: Path, rows: int = 90, colour: bool = False) -> Path:
    for i, (picture, code) in enumerate(zip(*bars(rows, colour), strict=True)):
        save(folder / "bars" / f"class{code}" / f"{i}.png", picture)
    return folder / "bars"


@pytest.fixture(scope="module")
def outcome() -> ImageOutcome:
    recipe = ImageRecipe(filters=(), hidden=(12, 6), epochs=3, batch_size=16, test=0.4, learning_rate=5e-4, augment=False)
    return train_images(images(), recipe, verbose=False)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ----------------------------------------------------------------------------------------------------------- the command line


def table_of(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def test_train_and_predict_idx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_idx(tmp_path)
    assert call("train", file, "--out", "run", *QUICK) == 0
    said = capsys.readouterr().out
    assert "this network" in said
    assert "linear model" in said
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["pictures"] == {"training": 120, "held out": 30}
    assert settings["scores"]["this network"]["accuracy"] > 0.9
    assert call("predict", "run", file, "--out", "p.csv") == 0
    assert "Scores on these 150 pictures" in capsys.readouterr().out
    rows = table_of(tmp_path / "p.csv")
    assert list(rows[0]) == ["picture", "prediction", "probability 0", "probability 1", "probability 2"]
    assert np.mean([int(r["prediction"]) for r in rows] == bars()[1]) > 0.9
    assert "there already" in refused(capsys, "predict", "run", file, "--out", "p.csv")


@pytest.mark.parametrize("colour", [False, True])
def test_train_and_predict_a_folder(tmp_path: Path, colour: bool, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path, colour=colour)
    assert call("train", folder, "--out", "run", *QUICK) == 0
    assert json.loads((tmp_path / "run" / "preparation.json").read_text())["classes"] == ["class0", "class1", "class2"]
    capsys.readouterr()
    big = Image.open(folder / "class1" / table_of_first(folder / "class1")).resize((40, 45), Image.Resampling.NEAREST)
    big.save(tmp_path / "big.png")
    assert call("predict", "run", "big.png", "--out", "-") == 0
    printed = capsys.readouterr()
    (row,) = csv.DictReader(io.StringIO(printed.out))
    assert (row["picture"], row["prediction"]) == ("big.png", "class1")
    assert "had another size than 9 x 8" in printed.err
    assert call("predict", "run", folder, "--out", "p.csv") == 0
    assert np.mean([r["picture"].split("/")[0] == r["prediction"] for r in table_of(tmp_path / "p.csv")]) > 0.9


def table_of_first(folder: Path) -> str:
    return sorted(f.name for f in folder.iterdir())[0]


def test_size_is_an_option(tmp_path: Path) -> None:
    assert call("train", write_folder(tmp_path), "--size", 5, 4, "--out", "run", *QUICK) == 0
    run = read_run("run")
    assert run.network._built["inputs"]["x"].shape == (5, 4)


def test_a_test_set_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All pictures are learnt from, and classes are numbered as the pictures that are learnt from have them."""
    file, pixels, codes = write_idx(tmp_path), *bars(40, seed=1)
    pixels, codes = pixels[codes > 0], codes[codes > 0]
    (tmp_path / "t10k-images").write_bytes(idx(pixels))
    (tmp_path / "t10k-labels").write_bytes(idx(codes.astype(np.uint8)))
    assert call("train", file, "--test", "t10k-images", "--out", "run", *QUICK) == 0
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["pictures"] == {"training": 150, "held out": len(codes)}
    assert settings["tested on"] == "t10k-images"
    p = read_run("run").network.predict(pixels).argmax(axis=1)
    assert settings["scores"]["this network"]["accuracy"] == np.mean(p == codes) > 0.9
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"150 to learn from, {len(codes)} of t10k-images to test on" in html
    assert "t10k-images: labels from t10k-labels" in html


def test_a_test_folder_is_brought_to_the_same_size(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    picture = Image.open(folder / "class1" / table_of_first(folder / "class1"))
    (tmp_path / "other" / "class1").mkdir(parents=True)
    picture.convert("RGB").resize((40, 45), Image.Resampling.NEAREST).save(tmp_path / "other" / "class1" / "big.png")
    assert call("train", folder, "--test", "other", "--out", "run", *QUICK) == 0
    scores = json.loads((tmp_path / "run" / "settings.json").read_text())["scores"]
    assert scores["this network"]["accuracy"] == 1


def test_explain_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_idx(tmp_path)
    assert call("train", file, "--out", "run", *QUICK) == 0
    capsys.readouterr()
    assert call("explain", "run") == 0
    assert "W3" in capsys.readouterr().out
    for further in ([], ["--data", file]):
        assert call("check", "run", "--rows", "4", *further) == 0
        assert "3.weight" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    file = write_idx(tmp_path)
    for name in ("a", "b"):
        assert call("train", file, "--out", name, *QUICK) == 0
    for part in ("network.safetensors", "history.csv", "preparation.json"):
        assert (tmp_path / "a" / part).read_bytes() == (tmp_path / "b" / part).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bars-images-idx3-ubyte", "--target", "label"], "--target means nothing for images"),
        (["bars-images-idx3-ubyte", "--sequence", "3"], "--sequence means nothing for images"),
        (["bars-images-idx3-ubyte", "--size", "5", "5"], "IDX is never resized"),
        (["table.csv", "--target", "b", "--size", "5", "5"], "--size means nothing for a table without"),
        (["bars-images-idx3-ubyte", "--test", "none.png"], 'there is no file "none.png"'),
        (["bars-images-idx3-ubyte", "--test", "alone"], "alone says of no picture what it shows"),
        (["bars-images-idx3-ubyte", "--test", "other"], "other has pictures of 5 x 5; 9 x 8 are needed"),
        (["bars-images-idx3-ubyte", "--test", "strange"], 'strange has the class "class9", which training did not have'),
        (["bars-images-idx3-ubyte", "--test", "1.5"], "1.5 is not in the range 0<x<1"),
        (["table.csv", "--target", "b", "--test", "other"], "--test is the share of rows to hold out"),
        (["table.csv", "--target", "b", "--filters", "none"], "--filters means nothing for a table without"),
        (["alone"], "says of no picture what it shows"),
        (["flat"], "says of no picture what it shows"),
        (["one"], "1 picture of 1 class: two classes and 5 pictures are needed at least"),
        (["broken"], "x/1.png is empty"),
    ],
)
def test_what_train_refuses(tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_idx(tmp_path)
    (tmp_path / "alone").write_bytes(idx(bars(20)[0]))
    (tmp_path / "table.csv").write_text("a,b\n" + "".join(f"{i},{i * i}\n" for i in range(30)))
    (tmp_path / "other").write_bytes(idx(np.zeros((3, 5, 5), np.uint8)))
    save(tmp_path / "strange" / "class9" / "1.png", bars(1)[0][0])
    save(tmp_path / "flat" / "1.png", bars(1)[0][0])
    save(tmp_path / "one" / "x" / "1.png", bars(1)[0][0])
    (tmp_path / "broken" / "x").mkdir(parents=True)
    (tmp_path / "broken" / "x" / "1.png").write_bytes(b"")
    assert words in refused(capsys, "train", *arguments, "--epochs", "1")
    assert not (tmp_path / "runs").exists(), "what was made for a run that never was is gone"


def test_a_run_does_not_lie_among_the_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run folder there would itself be taken for a class without pictures."""
    bars = write_folder(tmp_path)
    assert "would lie in" in refused(capsys, "train", bars, "--out", bars / "run", *QUICK)
    monkeypatch.chdir(bars)
    assert "name another place with --out" in refused(capsys, "train", ".", *QUICK)
    assert {f.name for f in bars.iterdir()} == {"class0", "class1", "class2"}
    assert call("train", ".", "--out", "../run", *QUICK) == 0


def test_what_predict_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_idx(tmp_path)
    assert call("train", file, "--out", "run", *QUICK) == 0
    (tmp_path / "other").write_bytes(idx(np.zeros((3, 5, 5), np.uint8)))
    (tmp_path / "colour").write_bytes(idx(np.zeros((3, 9, 8, 3), np.uint8)))
    for data, words in {
        "other": "other has pictures of 5 x 5; 9 x 8 are needed",
        "colour": "colour is in colour, and grey is needed",
        "none.png": "there is no file",
    }.items():
        assert words in refused(capsys, "predict", "run", data)
    assert "name a picture" in refused(capsys, "predict", "run")
    assert "are for tables" in refused(capsys, "predict", "run", file, "--missing", "?")
    save(tmp_path / "new" / "strange" / "1.png", bars(1)[0][0])
    assert call("predict", "run", "new", "--out", "p.csv") == 0
    assert 'no scores: new has the class "strange", which training did not have' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"format": "chainrule images 1", "size": [9, 8], "colour": false, "classes": [0, 1]}', "not of one run"),
        ('{"format": "chainrule images 1", "size": [9, 9], "colour": false, "classes": [0, 1, 2]}', "not of one run"),
        ('{"format": "chainrule images 1", "size": [9], "colour": false, "classes": [0, 1, 2]}', "describes no pictures"),
        ('{"format": "chainrule images 1", "size": [9, 1e9], "colour": false, "classes": [0, 1, 2]}', "describes no pictures"),
        ('{"format": "chainrule images 1", "size": [9, 8], "colour": 1, "classes": [0, 1, 2]}', '"colour" should be bool'),
        ('{"format": "chainrule images 1", "size": [9, 8], "colour": false, "classes": [0, 0, 2]}', "describes no pictures"),
        ('{"format": "chainrule images 1", "size": [9, 8], "colour": false, "classes": [0, [], 2]}', "describes no pictures"),
        ('{"format": "chainrule images 1", "size"', "no JSON"),
    ],
)
def test_a_forged_preparation_is_refused(
    tmp_path: Path, content: str, words: str, capsys: pytest.CaptureFixture[str], outcome: ImageOutcome
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    module.write_image_run(folder, outcome)
    (folder / "preparation.json").write_text(content)
    assert words in refused(capsys, "check", "run")


# ----------------------------------------------------------------------------------------------------------------- training


def test_held_out_pictures_are_not_learnt_from(outcome: ImageOutcome) -> None:
    assert (outcome.learn.rows, outcome.held.rows) == (90, 60)
    assert not set(outcome.learn.names) & set(outcome.held.names)
    rescale = outcome.network.layers[1]
    assert isinstance(rescale, nn.Rescale)
    assert (rescale.mean, rescale.std) == brightness(outcome.learn.pixels)
    p = outcome.network.predict_proba(outcome.held.pixels)
    np.testing.assert_allclose(outcome.chances, p)
    assert outcome.scores["this network"]["accuracy"] == np.mean(p.argmax(axis=1) == outcome.held.codes)
    assert outcome.scores["linear model"]["accuracy"] > outcome.scores["always the most frequent"]["accuracy"]


def test_after_an_interrupt_nothing_more_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def interrupted(net: nn.Sequential, *rest: Any) -> Any:
        run, failure, seconds = real(net, *rest)
        run.interrupted = True
        trained.append(net)
        return run, failure, seconds

    real = module.fitted
    monkeypatch.setattr(module, "fitted", interrupted)
    found = train_images(images(40), ImageRecipe(hidden=(4,), epochs=1), verbose=False)
    assert trained == [found.network]
    assert found.interrupted
    assert list(found.scores) == ["this network", "always the most frequent"]
    assert INTERRUPTED in found.notes


@pytest.mark.parametrize("error", [MemoryError(), DivergenceError("the loss is infinite")], ids=lambda e: type(e).__name__)
def test_what_goes_wrong_with_the_linear_model_takes_nothing_away(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[nn.Sequential] = []

    def broken(net: nn.Sequential, *rest: Any) -> Any:
        if trained:
            raise error
        trained.append(net)
        return real(net, *rest)

    real = module.fitted
    monkeypatch.setattr(module, "fitted", broken)
    found = train_images(images(40), ImageRecipe(hidden=(4,), epochs=1), verbose=False)
    assert trained == [found.network]
    assert not found.interrupted
    assert list(found.scores) == ["this network", "always the most frequent"]
    (note,) = [n for n in found.notes if "baselines" in n]
    assert type(error).__name__ in note
    assert str(error) in note


def test_classes_of_which_no_picture_is_held_out_are_remarked() -> None:
    whole = images(60)
    recipe = ImageRecipe(filters=(), hidden=(), epochs=1, augment=False)
    remark = "no picture of the {} held out: the scores say nothing about {}"
    for left, expected in (
        ((0, 1, 2), []),
        ((0, 2), [remark.format('class "middle" is', "it")]),
        ((2,), [remark.format('2 classes "low", "middle" is', "them")]),
    ):
        test = whole.take(np.flatnonzero(np.isin(whole.codes, left)))
        notes = train_images(whole, recipe, test, verbose=False).notes
        assert [note for note in notes if "held out" in note] == expected


def test_one_is_not_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1 epoch, 1 picture."""
    folder = write_folder(tmp_path, 30)
    save(tmp_path / "one" / "class0" / "1.png", bars(1)[0][0])
    assert call("train", folder, "--test", "one", "--epochs", "1", "--hidden", "none", "--filters", "none", "--out", "run") == 0
    said = capsys.readouterr().out
    for words in ("30 pictures of 3 classes", "1 epoch in", "Scores on 1 held-out picture"):
        assert words in said
    assert call("predict", "run", "one", "--out", "p.csv") == 0
    said += capsys.readouterr().out
    assert "Scores on this 1 picture" in said
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"\b1 (epochs|pictures|held-out pictures|classes|predictions)\b", said + html)


def test_pictures_stay_bytes(outcome: ImageOutcome) -> None:
    assert outcome.learn.pixels.dtype == outcome.held.pixels.dtype == np.uint8


@pytest.mark.parametrize("shape", [(50, 4, 3), (50, 4, 3, 3)])
def test_brightness_is_mean_and_deviation(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    axes = (0, 1, 2)
    mean, std = brightness(pixels)
    np.testing.assert_allclose(mean, (pixels / 255).mean(axis=axes))
    np.testing.assert_allclose(std, (pixels / 255).std(axis=axes))
    assert brightness(np.zeros((2, 3, 3), np.uint8)) == (0.0, 1.0)


def test_score() -> None:
    chances = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [1.0, 0.0, 0.0]])
    found = score(chances, np.array([0, 1, 1]))
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["log loss"] == pytest.approx(-np.mean(np.log([0.5, 0.2, 1e-15])))


def test_the_network_takes_grey_and_colour() -> None:
    for colour in (False, True):
        found = images(20, colour)
        net = network(ImageRecipe(hidden=(4,), augment=False), found.pixels, 3)
        net.fit(found.pixels, found.codes, loss="cross_entropy", epochs=0)
        assert net.predict(found.pixels).shape == (20, 3)
        np.testing.assert_allclose(cr.activations(net, found.pixels)["1"].mean(axis=(0, 1, 2)), 0, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "kernels", "last"),
    [
        ((28, 28), [5, 5], (4, 4)),  # LeNet-5
        ((64, 48), [5, 5], (13, 9)),
        ((17, 13), [5, 3], (3, 2)),  # 13 x 9 after the first convolution, and 6 x 4 after the first pooling
        ((12, 12), [5, 3], (2, 2)),
        ((11, 40), [3, 3], (2, 10)),
        ((3, 8), [3, 3], (1, 2)),
        ((1, 5), [3, 3], (1, 1)),
        ((1, 1), [3, 3], (1, 1)),
    ],
)
@pytest.mark.parametrize("channels", [(), (3,)])
def test_convolutions_follow_from_the_size(
    size: tuple[int, int], kernels: list[int], last: tuple[int, int], channels: tuple[int, ...]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, *size, *channels), dtype=np.uint8)
    net = network(ImageRecipe(hidden=(5,), filters=(2, 4)), pixels, 3)
    net.fit(pixels, np.arange(6) % 3, loss="cross_entropy", epochs=1)
    found = cr.activations(net, pixels)
    names = [str(i) for i, layer in enumerate(net) if isinstance(layer, nn.MaxPool2D)]
    assert found[names[-1]].shape == (6, *last, 4)
    assert [layer.size for layer in net if isinstance(layer, nn.Conv2D)] == [(k, k) for k in kernels]
    assert found[list(found)[-1]].shape == (6, 3)


def test_hidden_and_filters_are_the_layers(tmp_path: Path) -> None:
    def kinds(**options: Any) -> list[str]:
        net = network(ImageRecipe(augment=False, **options), np.zeros((3, 28, 28), np.uint8), 3)
        return [repr(layer) for layer in net if not isinstance(layer, (nn.Rescale, nn.Flatten, nn.Dropout))]

    convolved = [
        "Reshape(28, 28, 1)",
        *("Conv2D(8, 5, activation='relu')", "MaxPool2D((2, 2))", "Conv2D(16, 5, activation='relu')", "MaxPool2D((2, 2))"),
    ]
    assert kinds() == [*convolved, "Dense(128, 'relu')", "Dense(3)"]
    assert kinds(hidden=()) == [*convolved, "Dense(3)"]
    assert kinds(filters=()) == ["Dense(128, 'relu')", "Dense(3)"]
    assert kinds(filters=(), hidden=()) == ["Dense(3)"]
    assert (
        call("train", write_idx(tmp_path), "--out", "run", "--epochs", "1", "--filters", "2", "--hidden", "3,4", "--quiet") == 0
    )
    assert [layer.filters for layer in read_run("run").network if isinstance(layer, nn.Conv2D)] == [2]
    assert [layer.units for layer in read_run("run").network if isinstance(layer, nn.Dense)] == [3, 4, 3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, nn.Augment(2, False, rotate=10, scale=0.1)),
        ({"flip": True}, nn.Augment(2, True, rotate=10, scale=0.1)),
        ({"augment": False, "flip": True}, nn.Augment(flip=True)),
        ({"augment": False}, None),
    ],
)
def test_pictures_are_changed_at_random_as_the_recipe_says(options: dict[str, bool], expected: nn.Augment | None) -> None:
    net = network(ImageRecipe(**options), np.zeros((3, 28, 30), np.uint8), 3)
    found = [layer for layer in net if isinstance(layer, nn.Augment)]
    assert list(map(repr, found)) == ([repr(expected)] if expected else [])


def test_flags_reach_the_recipe(tmp_path: Path) -> None:
    assert call("train", write_idx(tmp_path), "--out", "run", "--epochs", "1", "--hidden", "none", "--flip", "--quiet") == 0
    assert "Augment(1, True, rotate=10, scale=0.1)" in repr(read_run("run").network)


# ----------------------------------------------------------------------------------------------------------------- pictures


def shown(gallery: Gallery) -> list[Array]:
    return [np.asarray(p.pixels) for p in gallery.pictures]


@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3), (1, 1)])
def test_png_is_what_pillow_reads(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    read = Image.open(io.BytesIO(png(pixels)))
    assert read.format == "PNG"
    assert np.array_equal(np.asarray(read), pixels)


def test_a_strip_of_grey_and_colour() -> None:
    grey, red = np.full((2, 2), 7, np.uint8), np.zeros((2, 1, 3), np.uint8)
    found = strip([grey, red])
    assert found.shape == (2, 4, 3)
    assert (found[:, :2] == 7).all()
    assert (found[:, 2] == 255).all()


def test_what_the_galleries_show(outcome: ImageOutcome) -> None:
    found = {gallery.heading: gallery for gallery in galleries(outcome)}
    assert list(found) == [
        "Samples", "The worst mistakes", "What the score hangs on", "The first layer's filters",
        "What layer 3, Dense 12, responds to", "What layer 5, Dense 6, responds to", "What layer 7, Dense 3, responds to",
    ]  # fmt: skip
    held, codes, predicted = outcome.held, outcome.codes, outcome.predicted

    samples = found["Samples"]
    assert [p.caption for p in samples.pictures] == [
        f"{name}: {np.sum(outcome.learn.codes == code)}" for code, name in enumerate(held.classes)
    ]
    assert np.array_equal(shown(samples)[0][:, :8], outcome.learn.pixels[outcome.learn.codes == 0][0])

    wrong = np.flatnonzero(codes != predicted)
    assert len(wrong), "the network of this test has to make mistakes"
    worst = wrong[outcome.chances[wrong, codes[wrong]].argmin()]
    first = found["The worst mistakes"].pictures[0]
    assert np.array_equal(first.pixels, held.pixels[worst])
    true, p = (f"{held.classes[c]} ({percent(outcome.chances[worst, c])})" for c in (codes[worst], predicted[worst]))
    assert first.caption == f"{true} → {p}, {held.names[worst]}"
    assert f"{len(wrong)} of 60" in found["The worst mistakes"].about

    best = np.flatnonzero((codes == 0) & (predicted == 0))
    best = best[outcome.chances[best, 0].argmax()]
    pair = shown(found["What the score hangs on"])[0]
    assert np.array_equal(pair[:, :8], np.repeat(held.pixels[best][..., None], 3, axis=2))
    assert np.array_equal(pair[:, 9:], signed(cr.saliency(outcome.network, held.pixels[best : best + 1], 0)[0]))

    weight = outcome.network.parameters["3.weight"]
    filters = found["The first layer's filters"]
    order = np.argsort(-np.abs(weight).max(axis=0))
    assert [p.caption for p in filters.pictures] == [f"unit {i}" for i in order]
    assert np.array_equal(shown(filters)[0], signed(weight[:, order[0]].reshape(9, 8)))

    excited = cr.activations(outcome.network, held.pixels)["3"]
    unit = excited.std(axis=0).argmax()
    row = found["What layer 3, Dense 12, responds to"].pictures[0]
    assert row.caption == f"unit {unit}: up to {excited[:, unit].max():.3g}"
    assert np.array_equal(row.pixels[:, :8], held.pixels[excited[:, unit].argmax()])
    assert [p.caption for p in found["What layer 7, Dense 3, responds to"].pictures] == [
        "class low",
        "class middle",
        "class high",
    ]


@pytest.mark.parametrize("block", [20, 3])
def test_what_layers_give_is_looked_at_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pictures are held out: a block at a time is in memory, and what is shown is the same."""
    recipe = ImageRecipe(filters=(4,), hidden=(5,), epochs=1, augment=False, test=0.9)
    found = train_images(images(), recipe, verbose=False)
    whole = galleries(found)
    calls: list[int] = []

    def counted(net: nn.Module, x: Any) -> dict[str, Any]:
        given = cr.activations(net, x)
        calls.append(sum(y.nbytes for y in given.values()))
        return given

    each = sum(y.nbytes for y in cr.activations(found.network, found.held.pixels[:1]).values())
    monkeypatch.setattr(module, "activations", counted)
    asked: list[int] = []

    def hanging(net: nn.Module, x: Any, label: Any) -> Any:
        asked.append(len(x))
        return cr.saliency(net, x, label)

    monkeypatch.setattr(module, "saliency", hanging)
    monkeypatch.setattr(module, "LOOK_BYTES", block * each)
    blocks = galleries(found)
    assert max(calls) == block * each
    assert max(asked) <= block
    assert sum(calls) >= (found.held.rows + 2) * each, "all of the pictures were looked at"
    assert [(g.heading, g.about, [p.caption for p in g.pictures]) for g in blocks] == [
        (g.heading, g.about, [p.caption for p in g.pictures]) for g in whole
    ]
    for a, b in zip(blocks, whole, strict=True):
        for p, q in zip(shown(a), shown(b), strict=True):
            np.testing.assert_allclose(p.astype(int), q.astype(int), atol=1)  # sums may be rounded otherwise in other blocks


@pytest.mark.parametrize("error", [MemoryError, ZeroDivisionError])
def test_a_network_is_safe_before_its_pictures_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: ImageOutcome, error: type[Exception]
) -> None:
    def failing(outcome: ImageOutcome) -> list[Gallery]:
        raise error

    monkeypatch.setattr(module, "galleries", failing)
    with pytest.raises(DataError if error is MemoryError else error) as raised:
        module.write_image_run(tmp_path, outcome)
    assert error is not MemoryError or "not enough memory for those" in str(raised.value)
    run = read_run(tmp_path)
    np.testing.assert_array_equal(run.network.predict(outcome.held.pixels), outcome.network.predict(outcome.held.pixels))
    assert run.settings["scores"] == outcome.scores
    assert "Which class was taken for which" in "".join(checked((tmp_path / "report.html").read_text(encoding="utf-8")).texts)


def test_filters_in_colour_and_of_kernels(outcome: ImageOutcome) -> None:
    from dataclasses import replace

    colour = images(60, colour=True)
    found = train_images(colour, ImageRecipe(filters=(), hidden=(5,), epochs=1), verbose=False)
    gallery = {g.heading: g for g in galleries(found)}["The first layer's filters"]
    assert shown(gallery)[0].shape == (9, 8, 3)
    assert gallery.unit == 9

    class Kernel(nn.Module):
        def __call__(self, x: Any) -> Any:
            weight = self.parameter("weight", (3, 2, 1, 4))
            return x.reshape(x.shape[0], -1)[:, :24] @ weight.reshape(24, 1) * np.ones((1, 3), x.dtype)

    net = nn.Sequential(Kernel())
    net.fit(outcome.held.pixels, outcome.held.codes, loss="cross_entropy", epochs=0)
    gallery = {g.heading: g for g in galleries(replace(outcome, network=net))}["The first layer's filters"]
    assert [s.shape for s in shown(gallery)] == [(3, 2, 3)] * 4


def test_the_galleries_of_a_convolutional_network() -> None:
    """Filters are kernels, and a picture excites a filter as much as the most excited place in it."""
    found = train_images(images(), ImageRecipe(filters=(4, 6), hidden=(5,), epochs=2, augment=False), verbose=False)
    shown_by = {g.heading: g for g in galleries(found)}
    first, second = (str(i) for i, layer in enumerate(found.network) if isinstance(layer, nn.Conv2D))
    headings = [h for h in shown_by if "responds to" in h]
    assert headings[:2] == [f"What layer {first}, Conv2D 4, responds to", f"What layer {second}, Conv2D 6, responds to"]
    assert len(headings) == 4
    weight = found.network.parameters[f"{first}.weight"]
    filters = shown_by["The first layer's filters"]
    strongest = np.abs(weight).reshape(-1, 4).max(axis=0).argmax()
    assert filters.pictures[0].caption == f"unit {strongest}"
    assert np.array_equal(shown(filters)[0], signed(weight[:, :, 0, strongest]))
    excited = cr.activations(found.network, found.held.pixels)[first].max(axis=(1, 2))
    unit = excited.std(axis=0).argmax()
    row = shown_by[headings[0]].pictures[0]
    assert row.caption == f"unit {unit}: up to {excited[:, unit].max():.3g}"
    best = excited[:, unit].argmax()
    assert np.array_equal(row.pixels[:9, :8], np.repeat(found.held.pixels[best][..., None], 3, axis=2))
    given = cr.activations(found.network, found.held.pixels)
    assert np.array_equal(row.pixels[9:, :8], signed(given[first][best, :, :, unit])), "as large as the picture already"
    below = np.asarray(shown_by[headings[1]].pictures[0].pixels)[9:, :8]
    assert (len(below), given[second].shape[1:3]) == (9, (4, 4))
    assert np.array_equal(below[0], below[1]), "two lines of the picture for each of the map"
    assert np.array_equal(below[:, 0], below[:, 1])
    assert "where in it the unit is excited" in shown_by[headings[1]].about
    assert "where in it" not in shown_by[headings[2]].about
    assert shown_by[headings[2]].about.startswith(
        "The held-out pictures that excite each unit most, the strongest first. The units are those that differ most from picture"
    )
    assert shown_by[headings[3]].about.startswith("The held-out pictures that excite each class most, the strongest first.")


def test_the_report_holds_all_of_its_pictures(tmp_path: Path) -> None:
    assert call("train", write_folder(tmp_path, colour=True), "--out", "run", *QUICK) == 0
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    checked(html)
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) >= 20
    for source in sources:
        head, data = source.split(",")
        assert head == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).load()
    for heading in ("Which class was taken for which", "The worst mistakes", "What layer 3, Dense 8, responds to"):
        assert heading in html
    assert not re.search(r"url\(|https?://|<script", html)


@pytest.mark.parametrize(
    ("before", "after"), [((5, 7), (5, 7)), ((300, 200), (64, 43)), ((9, 4), (3, 2)), ((3, 2), (9, 4)), ((4, 9), (8, 3))]
)
@pytest.mark.parametrize("channels", [(), (3,)])
def test_resized_is_the_mean_of_what_falls_together(
    before: tuple[int, int], after: tuple[int, int], channels: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (*before, *channels), dtype=np.uint8)
    rows, columns = ([i * n // m for i in range(m)] + [n] for n, m in zip(before, after, strict=True))
    expected = [
        [values[a : max(b, a + 1), c : max(d, c + 1)].mean(axis=(0, 1)) for c, d in pairwise(columns)] for a, b in pairwise(rows)
    ]
    assert np.array_equal(resized(values, after), np.rint(expected).astype(np.uint8))
    np.testing.assert_allclose(resized(values / 255, after), np.array(expected) / 255)


def test_the_report_of_large_pictures_is_small() -> None:
    """However large pictures are: none of them, of saliency, of filters or of where units are excited is shown larger than 64."""
    r = np.random.default_rng(0)
    sizes = {}
    for side in (64, 192):
        pixels = r.integers(0, 256, (40, side, side // 2, 3), dtype=np.uint8)
        data = Images(pixels, np.arange(40) % 3, ("a", "b", "c"), tuple(map(str, range(40))), "noise")
        for filters in ((2,), ()):
            recipe = ImageRecipe(filters=filters, hidden=(3,), epochs=1, augment=False, test=0.5)
            found = train_images(data, recipe, verbose=False)
            assert found.held.pixels.shape[1:] == (side, side // 2, 3), "data are left as they are"
            made = galleries(found)
            assert max(g.unit for g in made) == 64
            assert max(p.pixels.shape[0] for g in made for p in g.pictures) <= 128, "pictures, and maps below them"
            sizes[side, filters] = sum(len(png(p.pixels)) for g in made for p in g.pictures)
    for filters in ((2,), ()):
        assert sizes[192, filters] < 1.5 * sizes[64, filters]


def test_names_from_files_cannot_write_html(tmp_path: Path) -> None:
    evil = '<b>"x"&'
    for i, (picture, code) in enumerate(zip(*bars(30), strict=True)):
        save(tmp_path / "bars" / f"{evil}{code}" / f"{evil}{i}.png", picture)
    assert call("train", "bars", "--out", "run", "--epochs", "1", "--hidden", "none", "--quiet") == 0
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in html
    assert "b" not in checked(html).tags


def test_names_that_are_no_unicode(tmp_path: Path) -> None:
    """A folder of such a name, with a class of such a name: the run is read again, and classes are the same as in training."""
    data = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.rename(write_folder(tmp_path, 30), data)
    os.rename(os.path.join(data, b"class1"), os.path.join(data, b"th\xe9"))
    assert call("train", os.fsdecode(data), "--out", "run", *QUICK) == 0
    run = read_run("run")
    assert run.seen.classes == ("class0", "class2", "th\\udce9")
    assert run.settings["data"] == "caf\\udce9"
    assert call("predict", "run", os.fsdecode(data), "--out", "p.csv") == 0
    assert {r["prediction"] for r in table_of(tmp_path / "p.csv")} <= set(run.seen.classes)
    assert predict_images(run, read_images(os.fsdecode(data)))[2] is not None


def test_names_that_a_spreadsheet_would_compute_are_remarked(tmp_path: Path) -> None:
    pixels, codes = bars(40)
    names, files = ("=cmd|x", "middle", "high"), ("ok.png", "@evil.png", *(f"{i}.png" for i in range(38)))
    learnt = train_images(
        Images(pixels, codes, names, files, "bars"), ImageRecipe(filters=(), hidden=(4,), epochs=1), verbose=False
    )
    run = ImageRun(tmp_path, learnt.network, {}, Seen((9, 8), False, names))
    for known in (codes, None):
        remarks = predict_images(run, Images(pixels, known, names, files, "bars"))[1]
        assert [r.split(" begins like a formula")[0] for r in remarks] == ['the class "=cmd|x"', 'the picture "@evil.png"']


def test_seen_is_restored() -> None:
    for seen in (Seen((3, 4), True, ("a", "b")), Seen((1, 1), False, (3, 7))):
        assert Seen.from_json(seen.to_json()) == seen
