"""The report is one self-contained page of well-formed HTML, whatever its texts and numbers are."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chainrule.errors import UsageError
from chainrule.report import (
    Axis,
    Report,
    confusion,
    confusion_table,
    history_csv,
    line_chart,
    page,
    run_folder,
    scatter,
    write_report,
)

EVIL = '<script>alert("x")</script>&amp;\'"'
VOID = {"meta"}


class Checker(HTMLParser):
    """Fails on tags that do not close in order, and gathers texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def example(**changes: object) -> Report:
    parts = {
        "title": f"houses {EVIL}",
        "facts": [("rows", "5,802"), (EVIL, EVIL)],
        "scores": {"network": {"RMSE": 39.4, "R²": 0.84}, EVIL: {"RMSE": 43.0}},
        "history": {"loss": [1.0, 0.5, 0.25], "validation_loss": [1.1, 0.6, 0.4], "seconds": [0.1, 0.1, 0.1]},
        "best_epoch": 3,
        "notes": [EVIL],
        "true": [1.0, 2.0, 3.0],
        "predicted": [1.1, 1.9, 3.2],
        "target": EVIL,
    }
    return Report(**{**parts, **changes})  # type: ignore[arg-type]


def test_the_page_is_whole_and_escaped() -> None:
    html = page(example())
    checker = checked(html)
    assert "script" not in checker.tags
    assert {"h1", "table", "svg", "polyline", "circle"} <= set(checker.tags)
    assert EVIL in "".join(checker.texts)
    assert not re.search(r"""(src|href)=|url\(|https?://""", html), "nothing is fetched from elsewhere"


def test_classes_are_shown_as_a_matrix() -> None:
    html = page(example(true=["a", EVIL, "a"], predicted=["a", "a", "a"], classes=["a", EVIL]))
    texts = checked(html).texts
    assert "Which class was taken for which" in "".join(texts)
    assert "script" not in checked(html).tags


def test_confusion_counts() -> None:
    counts = confusion([1, 2, 2, 3], [1, 2, 3, 3], [1, 2, 3])
    assert counts.tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]
    labels = np.repeat(np.arange(50), np.arange(50))
    assert "30 largest of 50" in confusion_table(labels, labels, range(50))


def test_the_run_folder_is_written_and_read_back(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "runs" / "houses")
    write_report(folder, {"target": "TOTAL VALUE", "seed": 0, "name": "Größe"}, example())
    assert json.loads((folder / "settings.json").read_text(encoding="utf-8"))["name"] == "Größe"
    rows = list(csv.reader(io.StringIO((folder / "history.csv").read_text(encoding="utf-8"))))
    assert rows[0] == ["epoch", "loss", "validation_loss", "seconds"]
    assert rows[3] == ["3", "0.25", "0.4", "0.1"]
    checked((folder / "report.html").read_text(encoding="utf-8"))


def test_the_history_keeps_every_bit() -> None:
    values = np.random.default_rng(0).normal(size=20)
    rows = list(csv.DictReader(io.StringIO(history_csv({"loss": values}))))
    assert [float(row["loss"]) for row in rows] == values.tolist()


def test_a_run_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    write_report(folder, {}, example())
    with pytest.raises(UsageError, match="or say --overwrite"):
        run_folder(folder)
    assert run_folder(folder, overwrite=True) == folder
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="no run"):
            run_folder(tmp_path / "photos", overwrite=overwrite)
    with pytest.raises(UsageError, match="is a file"):
        run_folder(tmp_path / "photos" / "cat.png")
    with pytest.raises(UsageError, match="cannot be made"):
        run_folder(tmp_path / "photos" / "cat.png" / "run")


ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(ANY, min_size=1, max_size=8), st.lists(ANY, max_size=8))
def test_a_loss_curve_of_any_numbers_is_well_formed(loss: list[float], other: list[float]) -> None:
    svg = line_chart({"loss": loss, "b": other}, x_label="epoch", y_label="loss", mark=1)
    ElementTree.fromstring(svg)
    assert not re.search(r'="[^"]*\b(nan|inf)\b', svg.split(">", 1)[1])


@given(st.lists(st.tuples(ANY, ANY), max_size=8))
def test_a_scatter_of_any_numbers_is_well_formed(pairs: list[tuple[float, float]]) -> None:
    svg = scatter([a for a, _ in pairs], [b for _, b in pairs], x_label="true", y_label="predicted")
    ElementTree.fromstring(svg)
    finite = sum(math.isfinite(a) and math.isfinite(b) for a, b in pairs)
    assert svg.count("<circle") == finite


def test_a_scatter_of_many_points_is_thinned_and_says_so() -> None:
    values = np.arange(9000.0)
    svg = scatter(values, values, x_label="t", y_label="p")
    assert svg.count("<circle") == 1800
    assert "Every 5th of 9,000 rows" in svg


@given(st.floats(-1e12, 1e12), st.floats(1e-6, 1e12), st.booleans())
def test_ticks_are_round_few_and_within(low: float, width: float, log: bool) -> None:
    if log:
        low = abs(low) + 1e-9
    assume(width > 1e-9 * abs(low))
    axis = Axis(low, low + width, 0, 100, log)
    ticks = axis.ticks()
    assert len(ticks) <= 12
    assert all(-0.001 <= axis.at(tick) <= 100.001 for tick in ticks)
    assert ticks == sorted(ticks)
