"""Forecasts: rows are split by time, nothing that is fitted sees the future, and rows out of order are refused in words."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainrule import series
from chainrule.cli import commands, main
from chainrule.data import Table
from chainrule.data.order import order_of
from chainrule.data.prepare import Preparation
from chainrule.data.windows import Window, spans
from chainrule.demo import DEMOS
from chainrule.errors import DataError, FileFormatError, UsageError
from chainrule.experiment import Outcome
from chainrule.report import FILES, course
from chainrule.runs import Run, predict, read_run
from chainrule.series import CELLS, SeriesRecipe, autoregression, baselines, train_series, understand_series
from chainrule.train.progress import Progress

RNG = np.random.default_rng(0)
ROWS = 240
DAYS = np.datetime64("2023-01-01") + np.arange(ROWS)
WARMTH = 10 + 8 * np.sin(np.arange(ROWS) / 9) + RNG.normal(0, 1, ROWS)
SITE = RNG.choice(["north", "south"], ROWS)
DEMAND = 100 - np.roll(WARMTH, 2) + RNG.normal(0, 0.5, ROWS)
RECIPE = SeriesRecipe(sequence=6, horizon=2, hidden=(4,), epochs=3)
QUICK = ("--epochs", "3", "--hidden", "4", "--quiet")


def table_of(**replaced: object) -> Table:
    columns: dict[str, object] = {"day": DAYS, "warmth": WARMTH, "site": SITE, "demand": DEMAND, **replaced}
    return Table.of({name: values for name, values in columns.items() if values is not None})


def learn(table: Table, recipe: SeriesRecipe = RECIPE, target: str = "demand") -> Outcome:
    recipe, notes = recipe.ordered(table)
    return train_series(table, understand_series(table, target, recipe, notes), recipe, verbose=False)


def csv_of(
    folder: Path, name: str = "demand.csv", columns: dict[str, Sequence[object]] | None = None, **replaced: object
) -> Path:
    given = columns or {"day": DAYS, "warmth": WARMTH.round(3), "site": SITE, "demand": DEMAND.round(3), **replaced}
    with open(folder / name, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([key for key, values in given.items() if values is not None])
        writer.writerows(zip(*(values for values in given.values() if values is not None), strict=True))
    return folder / name


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code if isinstance(caught.value.code, int) else 0


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# ---- windows -----------------------------------------------------------------------------------------------------------------


@given(st.integers(10, 300), st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.1, 0.4]))
def test_spans_keep_the_future_out(rows: int, length: int, horizon: int, validation: float, test: float) -> None:
    """When the first forecast of a span is made, every target of the spans before has happened; targets of a span are contiguous."""
    try:
        parts = spans(rows, Window(length, horizon), validation, test)
    except DataError:
        return
    groups = [part for part in (parts.training, parts.validation, parts.testing) if len(part)]
    assert len(groups) == (3 if validation else 2)
    for part in groups:
        assert (np.diff(part) == 1).all()
    for before, after in pairwise(groups):
        assert before[-1] + horizon == after[0], "the last target is the row at which the first forecast is made"
    assert groups[0][0] == length - 1
    assert groups[-1][-1] + horizon == rows - 1
    assert parts.known == parts.training[-1] + horizon + 1
    assert len(parts.testing) == min(max(1, round(test * rows)), rows - length - horizon + 1)


def test_a_window_and_its_target() -> None:
    features = np.arange(20.0).reshape(10, 2)
    window = Window(3, 2, change=4.0)
    ends = window.ends(8)
    x = window.cut(features, ends)
    assert ends.tolist() == [2, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(x[0], features[0:3])
    np.testing.assert_array_equal(x[-1], features[5:8])
    np.testing.assert_array_equal(window.targets(np.arange(10.0) ** 2, np.array([2, 7])), [(16 - 4) / 4, (81 - 49) / 4])
    np.testing.assert_array_equal(window.targets(np.arange(10), np.array([2, 7])), [4, 9])


@pytest.mark.parametrize(("length", "horizon"), [(0, 1), (1, 0), (2, -1), (True, 1), (1.5, 1)])
def test_windows_that_make_no_sense(length: int, horizon: int) -> None:
    with pytest.raises(UsageError, match="whole number of rows, 1 at least"):
        Window(length, horizon)


def test_tables_too_short_for_their_windows() -> None:
    with pytest.raises(DataError, match="need 12 rows, and there are 11"):
        spans(11, Window(10, 2), 0.1, 0.2)
    with pytest.raises(DataError, match="no window is left for training"):
        spans(12, Window(10, 2), 0.1, 0.2)


# ---- no leak -----------------------------------------------------------------------------------------------------------------


def test_the_future_changes_nothing_that_is_learnt() -> None:
    """Whatever the rows hold that training may not see: the same windows, the same weights, to the bit."""
    recipe = replace(RECIPE, validation=0.0)
    known = recipe.spans(ROWS).known
    assert known < ROWS - 40
    future = np.arange(ROWS) >= known
    other = table_of(
        warmth=np.where(future, np.nan, WARMTH),
        site=np.where(future, "somewhere else", SITE),
        demand=np.where(future, 1e6 * np.arange(ROWS), DEMAND),
    )
    first, second = learn(table_of(), recipe), learn(other, recipe)
    assert first.preparation == second.preparation
    assert {c.name: c for c in first.facts.columns} == {c.name: c for c in second.facts.columns}
    for name, value in first.network.parameters.items():
        np.testing.assert_array_equal(value, second.network.parameters[name])
    assert first.history == second.history
    assert first.scores != second.scores
    ends = recipe.spans(ROWS).training
    a, b = (outcome.preparation.inputs(table)[0][: len(ends)] for outcome, table in ((first, table_of()), (second, other)))
    np.testing.assert_array_equal(a, b)
    last = replace(recipe.spans(ROWS), known=known)
    assert last.training[-1] + recipe.horizon == known - 1, "the row before is the last that training sees"


def test_the_last_known_row_does_change_what_is_learnt() -> None:
    """The test above would pass too if the network learnt nothing."""
    recipe = replace(RECIPE, validation=0.0)
    changed = DEMAND.copy()
    changed[recipe.spans(ROWS).known - 1] += 1
    a, b = learn(table_of(), recipe), learn(table_of(demand=changed), recipe)
    assert any((value != b.network.parameters[name]).any() for name, value in a.network.parameters.items())


def test_validation_rows_decide_only_when_to_stop() -> None:
    """With validation the statistics are those of rows before it, and the best epoch may differ, not the windows."""
    parts = RECIPE.spans(ROWS)
    changed = np.where(np.arange(ROWS) >= parts.known, DEMAND[::-1] * 3, DEMAND)
    a, b = learn(table_of()), learn(table_of(demand=changed))
    assert a.preparation == b.preparation
    assert a.history["loss"] == b.history["loss"]
    assert a.history["validation_loss"] != b.history["validation_loss"]


# ---- the order of rows ---------------------------------------------------------------------------------------------------------


def days(*numbers: int) -> np.ndarray:
    return np.array(["2024-01-01"], "M8[D]") + np.array(numbers)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"day": days(3, 2, 1, 0)}, "turn the table round, oldest first"),
        ({"day": days(0, 1, 3, 2)}, r'the time "day" of row 4 .* is before that of the row above: sort the table by "day"'),
        ({"day": days(0, 1, 1, 2)}, "row 3 .* is that of the row above: keep one row for each time"),
        ({"day": days(0, 1, 2, 0, 1, 2), "shop": list("aaabbb")}, 'several series, one for each value of "shop"'),
        ({"day": days(0, 0, 1, 1, 2, 2), "shop": [7, 8, 7, 8, 7, 8]}, 'several series, one for each value of "shop"'),
        ({"day": days(*range(20), *range(21, 40))}, "in 1 place, first between rows 20 and 21: a step of 2 where 1 is usual"),
        ({"day": np.array(["2024-01-01", "NaT", "2024-01-03"], "M8[D]")}, 'time "day" is missing in 1 rows, first in row 2'),
    ],
)
def test_rows_out_of_order_are_refused(columns: dict[str, object], words: str) -> None:
    with pytest.raises(DataError, match=words):
        order_of(Table.of(columns))


def test_time_that_is_no_date() -> None:
    table = Table.of({"when": ["soon", "later"], "year": [2000, 2001], "picture": np.zeros((2, 2))})
    with pytest.raises(DataError, match=r'no date .* and no number in row 1: "soon"'):
        order_of(table, "when")
    with pytest.raises(DataError, match="one value a row"):
        order_of(table, "picture")
    with pytest.raises(DataError, match='Did you mean "year"'):
        order_of(table, "yaer")
    order = order_of(table, "year")
    assert (order.time, order.season) == ("year", None), "numbers have no calendar"


@pytest.mark.parametrize(
    ("start", "unit", "season"), [("2000-01", "M", 12), ("2000-01-01", "D", 7), ("2000-01-01T00", "h", 24), ("2000", "Y", None)]
)
def test_the_calendar_tells_the_season(start: str, unit: str, season: int | None) -> None:
    order = order_of(Table.of({"t": np.datetime64(start, unit) + np.arange(60)}))
    assert order.season == season
    assert order.notes == ("t: orders the rows",)


def test_working_days_are_no_gaps_but_a_lost_year_is() -> None:
    every = np.datetime64("2024-01-01") + np.arange(100)
    working = every[np.is_busday(every)]
    assert order_of(Table.of({"t": working})).season == 7
    lost = np.concatenate([working, working[-1] + 365 + np.arange(3)])
    with pytest.raises(DataError, match="leave something out"):
        order_of(Table.of({"t": lost}))
    assert "as told" in order_of(Table.of({"t": lost}), gaps=True).notes[1]


def test_without_dates_it_says_what_it_takes_for_granted() -> None:
    assert "taken to be in the order of time" in order_of(Table.of({"a": [3, 1, 2]})).notes[0]


# ---- learning and baselines ------------------------------------------------------------------------------------------------------


def test_least_squares_is_that_of_numpy() -> None:
    plain = RNG.normal(size=(80, 2))
    t = np.convolve(plain[:, 0], [0.2, 0.5, 0.3])[:80] + 5
    window = Window(4, 2)
    learn, judge = np.arange(3, 60), np.arange(62, 78)
    x, x_judge = (np.c_[window.cut(plain, ends).reshape(len(ends), -1), np.ones(len(ends))] for ends in (learn, judge))
    expected = x_judge @ np.linalg.lstsq(x, t[learn + 2], rcond=None)[0]
    np.testing.assert_allclose(autoregression(plain, t, window, learn, judge, 60), expected, rtol=1e-5)


def test_naive_baselines_see_only_what_is_known() -> None:
    t = np.arange(100.0) + 10 * (np.arange(100) % 7 == 0)
    table = Table.of({"t": t})
    recipe = SeriesRecipe(sequence=3, horizon=9, validation=0.2)
    facts = understand_series(table, "t", recipe, ())
    preparation = replace(Preparation.fit(table, facts), window=Window(3, 9))
    scores = baselines(preparation, table, recipe.spans(100), 7)
    judge = recipe.spans(100).testing
    assert scores["naive: as now"]["MAE"] == pytest.approx(np.abs(t[judge + 9] - t[judge]).mean())
    assert scores["seasonal naive: as 14 rows before"]["MAE"] == pytest.approx(14), (
        "the week before the last row is not known yet"
    )


@pytest.mark.parametrize(("target", "model"), [("demand", "autoregression"), ("site", "simple_models")])
def test_baselines_learn_from_the_past_only(monkeypatch: pytest.MonkeyPatch, target: str, model: str) -> None:
    """Changed targets of the scored forecasts change the scores of a baseline, not what it is fitted on."""
    given = []

    def spy(*arguments: object) -> object:
        given.append(arguments)
        return real(*arguments)

    real = getattr(series, model)
    monkeypatch.setattr(series, model, spy)
    learn(table_of(), target=target)
    parts = RECIPE.spans(ROWS)
    if model == "autoregression":
        _, _, window, fitted, judged, known = given[0]
        assert fitted[-1] + window.horizon == judged[0]
        assert known == parts.known
    else:
        assert len(given[0][1]) == len(given[0][2]) == len(parts.training) + len(parts.validation)


def test_a_series_that_leaves_its_past_can_be_followed() -> None:
    """The change is learnt, not the level: a level far beyond those of training is no harder."""
    t = 3.0 * np.arange(300) + RNG.normal(0, 0.1, 300)
    outcome = learn(Table.of({"t": t}), SeriesRecipe(sequence=5, horizon=4, hidden=(8,), epochs=40), "t")
    assert outcome.scores["this network"]["RMSE"] < 2
    assert outcome.scores["naive: as now"]["RMSE"] == pytest.approx(12, rel=0.01)


def test_classes_are_forecast_too() -> None:
    state = np.array(["dry", "wet"])[(np.arange(ROWS) // 3) % 2]
    outcome = learn(table_of(state=state, demand=None), SeriesRecipe(sequence=6, horizon=3, hidden=(8,), epochs=60), "state")
    assert outcome.scores["this network"]["accuracy"] == 1
    assert outcome.scores["naive: as now"] == {"accuracy": 0.0}
    assert {"linear model on the window", "always the most frequent"} < set(outcome.scores)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
def test_every_cell_and_stacks_and_none(cell: str) -> None:
    for hidden in ((4, 3), ()):
        outcome = learn(table_of(), replace(RECIPE, cell=cell, hidden=hidden, dropout=0.1, epochs=1))
        assert np.isfinite(outcome.scores["this network"]["RMSE"])


def test_the_logarithm_of_a_target() -> None:
    outcome = learn(table_of(), replace(RECIPE, log_target=True, epochs=20))
    assert outcome.scores["this network"]["RMSE"] < outcome.scores["naive: as now"]["RMSE"]


# ---- the command line ------------------------------------------------------------------------------------------------------------


def test_train_predict_explain_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = csv_of(tmp_path)
    assert call("train", data, "--target", "demand", "--sequence", 6, "--horizon", 2, "--epochs", 3, "--hidden", "4") == 0
    said = capsys.readouterr().out
    for words in (
        "demand.csv: 240 rows, 4 columns",
        "left out: it orders the rows",
        "note: day: orders the rows",
        "rows that training may see",
        "network: 4 → 4 → 1, gru, mse",
        "Scores on 48 held-out rows, forecast 2 before",
        "linear autoregression",
        "naive: as now",
        "seasonal naive: as 7 rows before",
    ):
        assert words in said
    run = tmp_path / "runs" / "demand"
    assert sorted(f.name for f in run.iterdir()) == sorted(FILES)
    settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    assert (settings["recipe"]["sequence"], settings["recipe"]["horizon"], settings["recipe"]["time"]) == (6, 2, "day")
    assert settings["windows"] == {"training": 165, "held out": 48}
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "Forecast and truth" in html
    assert "linear autoregression" in html
    assert call("predict", run, data) == 0
    said = capsys.readouterr().out
    assert "each forecast is for 2 rows after the one that it stands in, the last 2 for rows that are still to come" in said
    assert "235 predictions" in said
    with open("demand-predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["day", "warmth", "site", "demand", "prediction +2"]
    assert [row["prediction +2"] == "" for row in rows] == [True] * 5 + [False] * 235
    assert call("explain", run) == 0
    assert "for t = 0 … 5:" in capsys.readouterr().out
    assert call("explain", run, "--data", data, "--rows", 2, "--numbers") == 0
    assert "(2, 6, 4)" in capsys.readouterr().out
    assert call("check", run, "--data", data, "--rows", 4) == 0
    assert call("check", run) == 0


def test_a_forecast_depends_on_its_window_alone(tmp_path: Path) -> None:
    """The rows before it and after it may be others, or not be there."""
    csv_of(tmp_path)
    assert call("train", "demand.csv", "--target", "demand", "--sequence", 6, "--horizon", 2, "--out", "run", *QUICK) == 0
    run = read_run("run")
    assert isinstance(run, Run)
    whole = predict(run, table_of())[0]["prediction +2"]
    part = predict(run, table_of().take(np.arange(50, 58)))[0]["prediction +2"]
    assert np.isnan(part[:5]).all()
    np.testing.assert_allclose(part[5:], whole[55:58], rtol=1e-6)


def test_predictions_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = csv_of(tmp_path)
    assert call("train", data, "--target", "site", "--sequence", 3, "--out", "run", *QUICK) == 0
    capsys.readouterr()
    assert call("predict", "run", data, "--out", "-") == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert rows[0]["prediction +1"] == rows[0]["probability north +1"] == ""
    assert rows[5]["prediction +1"] in ("north", "south")


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    data = csv_of(tmp_path)
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert call("train", data, "--target", "demand", "--sequence", 6, "--out", out, "--seed", seed, *QUICK) == 0
    for name in ("history.csv", "preparation.json", "network.safetensors"):
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b
        assert (a == c) == (name == "preparation.json")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--sequence", "300"), "take a smaller --sequence"),
        (("--sequence", "0"), "--sequence"),
        (("--sequence", "5", "--horizon", "0"), "--horizon"),
        (("--sequence", "5", "--horizon", "-3"), "--horizon"),
        (("--horizon", "3"), "--horizon means nothing for a table without --sequence or --characters: leave it out"),
        (("--gaps",), "--gaps means nothing"),
        (("--sequence", "5", "--split-seed", "3"), "--split-seed means nothing with --sequence"),
        (("--sequence", "5", "--sample", "3"), "--sample means nothing with --sequence"),
        (("--sequence", "5", "--truncate", "2,4"), "--truncate means nothing with --sequence"),
        (("--memory", "1MB"), "--memory means nothing for a table without --sequence or --characters"),
        (("--sequence", "5", "--memory", "100"), "memory=100 bytes is too little: at least"),
        (("--sequence", "5", "--time", "dya"), 'Did you mean "day"'),
        (("--sequence", "5", "--cell", "gpu"), "--cell"),
        (("--sequence", "5", "--activation", "relu"), "--activation goes with --cell rnn"),
    ],
)
def test_mistakes_give_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], words: str
) -> None:
    csv_of(tmp_path)
    assert call("train", "demand.csv", "--target", "demand", *options) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
    assert [f.name for f in tmp_path.iterdir()] == ["demand.csv"]


def test_order_is_asked_for_when_predicting_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = csv_of(tmp_path)
    assert call("train", data, "--target", "demand", "--sequence", 6, "--out", "run", *QUICK) == 0
    backwards = csv_of(tmp_path, "back.csv", day=DAYS[::-1])
    assert call("predict", "run", backwards) == 2
    assert "turn the table round" in capsys.readouterr().err
    short = csv_of(tmp_path, "short.csv", {"day": DAYS[:5], "warmth": WARMTH[:5], "site": SITE[:5], "demand": DEMAND[:5]})
    assert call("predict", "run", short) == 2
    assert "short.csv has 5 rows, and a forecast of this network sees 6" in capsys.readouterr().err
    assert call("check", "run", "--data", short) == 2
    assert "too few for a window and its target" in capsys.readouterr().err
    holes = csv_of(tmp_path, "holes.csv", demand=["", *DEMAND[1:]])
    assert call("predict", "run", holes) == 2
    assert 'the target "demand" is missing in 1 rows' in capsys.readouterr().err


def test_gaps_in_features_are_filled_and_those_in_dates_need_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = csv_of(tmp_path, day=[*DAYS[:100], *(DAYS[100:] + 30)], warmth=["" if i % 9 == 0 else v for i, v in enumerate(WARMTH)])
    assert call("train", data, "--target", "demand", "--sequence", 6, *QUICK) == 2
    assert "first between rows 100 and 101: a step of 31 where 1 is usual. Fill in" in capsys.readouterr().err
    assert call("train", data, "--target", "demand", "--sequence", 6, "--gaps", *QUICK) == 0
    assert "warmth: 27 missing, filled in" in capsys.readouterr().out


def test_ctrl_c_saves_what_was_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Progress) -> None:
        if self._run.epochs == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "epoch", interrupt)
    data = csv_of(tmp_path)
    assert call("train", data, "--target", "demand", "--sequence", 6, "--out", "run", "--epochs", 50, "--hidden", 4) == 130
    assert "interrupted in epoch 4 of 50" in capsys.readouterr().out
    assert call("predict", "run", data) == 0
    (tmp_path / "t.txt").write_text("once upon a time " * 30, encoding="utf-8")
    assert call("train", "t.txt", "--characters", "--out", "text", "--epochs", 50, "--hidden", 4, "--sequence", 8) == 130
    assert "interrupted in epoch 4 of 50" in capsys.readouterr().out
    assert call("predict", "text", "--prompt", "o") == 0


def test_the_command_line_offers_all_cells_and_demos() -> None:
    def choices(command: str, option: str) -> list[str]:
        kind = next(p.type for p in commands.commands[command].params if p.name == option)
        assert isinstance(kind, click.Choice)
        return list(kind.choices)

    assert choices("train", "cell") == list(CELLS)
    assert choices("demo", "name") == [*DEMOS, "all"]


def test_forged_windows_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = csv_of(tmp_path)
    assert call("train", data, "--target", "demand", "--sequence", 6, "--out", "run", *QUICK) == 0
    file = tmp_path / "run" / "preparation.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["window"]["length"] == 6
    for forged in (7, [], {}, {"length": 2**40}, {"length": 0}, {"horizon": 0}, {"change": 0.0}, {"length": 2**30}):
        window = {**content["window"], **forged} if isinstance(forged, dict) and forged else forged
        file.write_text(json.dumps({**content, "window": window}), encoding="utf-8")
        assert call("predict", "run", data) == 2
        assert "Traceback" not in capsys.readouterr().err
    with pytest.raises(FileFormatError, match="makes no sense"):
        Window.restore({"length": -1, "horizon": 1, "change": 1.0})


def test_the_course_of_a_long_series_shows_its_end() -> None:
    drawing = course(np.arange(5000.0), np.arange(5000.0) + 1, 1, label="x")
    assert "The last 600 of 5,000." in drawing
    assert len(drawing) < 50_000
    assert re.findall(r">(\d+)<", drawing)[:3] == ["4600", "4800", "5000"], "rows keep their numbers"
    assert "logarithmic" not in course([1.0, 100.0], [1.0, 100.0], 1, label="x")
