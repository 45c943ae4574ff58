"""Epochs that are taken together: the same numbers as one by one, and as good as no Python between them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import together
from same import assert_same, state
from together import Neighbours, Projected, at_once, noisy, outcome
from training import Array, Leap, data

import chainrule as cr
from chainrule import nn
from chainrule.ops.random import key_of
from chainrule.optim import optimizers
from chainrule.run.backend import Steps, backends
from chainrule.run.batches import epoch_order, step_sizes
from chainrule.run.reference import ReferenceSession
from chainrule.schedules import Schedule, schedules
from chainrule.train import epochs as module
from chainrule.train.epochs import Behind, Data, Epochs, Orders, Pace, shuffled
from chainrule.train.objective import DIVISOR, RATE, SEED, STEP
from chainrule.train.progress import Progress

slowly, calls = together.slowly, together.calls  # fixtures


# ----------------------------------------------------------------------------------------------------------- the order of rows


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("rows", [1, 2, 5, 64, 700])
def test_orders_of_many_epochs_are_those_of_each(seed: int, rows: int) -> None:
    for first in (0, 3, 2**32 - 20):
        expected = [epoch_order(rows, shuffle=True, seed=seed, epoch=first + i) for i in range(20)]
        np.testing.assert_array_equal(shuffled(rows, seed, first, 20), expected)


def test_orders_where_the_number_of_an_epoch_needs_two_words() -> None:
    first = 2**32 - 4
    expected = [epoch_order(5, shuffle=True, seed=1, epoch=first + i) for i in range(20)]
    np.testing.assert_array_equal(shuffled(5, 1, first, 20), expected)


@pytest.mark.parametrize("shuffle", [False, True])
def test_orders_one_by_one_in_groups_and_again(shuffle: bool) -> None:
    orders = Orders(6, 6, shuffle=shuffle, seed=3)
    for first, epochs in ((0, 1), (1, 1), (2, 1), (3, 70), (73, 1), (5, 2), (0, 4), (4, 8), (200, 9), (209, 1)):
        expected = np.stack([epoch_order(6, shuffle=shuffle, seed=3, epoch=first + i) for i in range(epochs)])
        taken = orders.take(first, epochs, most=max(epochs, 50))
        np.testing.assert_array_equal(taken, expected if shuffle else expected[0])


# ------------------------------------------------------------------------------------------------------------- steps, by hand


def steps_by_hand(
    given: Data, batch: int, rule: cr.Optimizer, shuffle: bool, behind: Behind, planned: int
) -> dict[str, list[Any]]:
    """One epoch, step by step."""
    sizes = step_sizes(given.rows, batch)
    order = epoch_order(given.rows, shuffle=shuffle, seed=5, epoch=behind.epochs)
    edges = np.cumsum([0, *sizes])
    groups = -(-len(sizes) // rule.accumulate)
    made: dict[str, list[Any]] = {"entries": [], "sizes": list(sizes), "order": order.tolist(), DIVISOR: [], STEP: [], RATE: []}
    for i in range(len(sizes)):
        first = i - i % rule.accumulate
        last = min(first + rule.accumulate, len(sizes))
        made["entries"].append("step" if i == last - 1 else "accumulate")
        made[DIVISOR].append(given.total(order[edges[first] : edges[last]]))
        made[STEP].append((behind.steps + i) % 2**32)
        in_run, in_all = behind.of_run * groups + i // rule.accumulate, behind.updates + i // rule.accumulate
        tied = isinstance(rule.schedule, schedules["cosine"])
        made[RATE].append(float(rule.schedule(np.array([in_run if tied else in_all]), planned * groups)[0]))
    return made


def spelt_out(steps: Steps) -> dict[str, list[Any]]:
    """Steps one by one."""
    each = list(steps.each())
    made: dict[str, list[Any]] = {"entries": [e for e, *_ in each], "sizes": [s for _, s, *_ in each]}
    made["order"] = [int(r) for _, _, rows, _ in each for r in rows]
    return made | {k: [numbers[k].tolist() for *_, numbers in each] for k in steps.numbers}


READS = (DIVISOR, SEED, STEP, RATE, "hyper.momentum")


@pytest.mark.parametrize("rows", [1, 7, 24])
@pytest.mark.parametrize("batch", [1, 4, 6, 24])
@pytest.mark.parametrize("accumulate", [1, 2, 3, 50])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_steps_of_several_epochs_by_hand(rows: int, batch: int, accumulate: int, weighted: bool) -> None:
    x, t = data(rows)
    r = np.random.default_rng(0)
    given = Data({"x": x}, t, r.uniform(0, 3, rows) * (r.random(rows) > 0.6) if weighted else None)
    for rate in (0.1, cr.schedules.exponential(0.1, every=7), cr.schedules.cosine(0.1)):
        rule = cr.SGD(rate, accumulate=accumulate, momentum=0.9)
        epochs = Epochs(given, min(batch, rows), shuffle=True, seed=5, optimizer=rule, planned=9, keep=("loss",), reads=READS)
        behind = epochs.after(Behind(2**32 - 5, 11, 4, 0), 2)
        steps = epochs.take(behind, 3)
        parts = [steps_by_hand(given, min(batch, rows), rule, True, epochs.after(behind, i), 9) for i in range(3)]
        found = spelt_out(steps)
        for name in ("entries", "sizes", "order", DIVISOR, STEP, RATE):
            assert found[name] == [value for part in parts for value in part[name]], name
        assert steps.count == len(found["sizes"])
        assert found["hyper.momentum"] == [0.9] * steps.count
        assert found[SEED] == [key_of(5).tolist()] * steps.count
        later = epochs.take(epochs.after(behind, 3), 2)
        assert later.entries is steps.entries  # so a backend may keep what it made of them
        assert later.sizes is steps.sizes


def test_numbers_that_do_not_change_are_not_repeated() -> None:
    x, t = data(24)
    given = Data({"x": x}, t, None)
    for rule, batch, divisors, rates in (
        (cr.Adam(0.1), 6, 1, 1),
        (cr.Adam(0.1), 7, 4, 1),
        (cr.Adam(cr.schedules.exponential(0.1, every=7)), 6, 1, 20),
    ):
        epochs = Epochs(given, batch, shuffle=False, seed=5, optimizer=rule, planned=9, keep=(), reads=(DIVISOR, RATE))
        steps = epochs.take(Behind(0, 0, 0, 0), 5)
        assert {k: len(v) for k, v in steps.numbers.items()} == {
            **{f"hyper.{k}": 1 for k in rule.hyper()}, SEED: 1, DIVISOR: divisors, RATE: rates,
        }  # fmt: skip
        assert (steps.order.shape, steps.rounds, len(steps.sizes)) == ((24,), 5, 4)


def test_all_rows_at_once_have_no_order() -> None:
    """Where each row is taken by itself, and sums over all of them, as batch norm does."""
    x, t = data()
    nets = [noisy(), noisy()]
    for net, shuffle in zip(nets, (False, True), strict=True):
        net.fit(x, t, epochs=5, batch_size=20, shuffle=shuffle)
    assert_same(state(nets[0]), state(nets[1]))


class Blended(nn.Module):
    """Each row with some of the one before it in the batch."""

    def __init__(self) -> None:
        self.dense = nn.Dense(2)

    def __call__(self, x: Any) -> Any:
        return self.dense(0.75 * x + 0.25 * np.roll(x, 1, axis=0))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_all_rows_at_once_are_shuffled_where_a_layer_looks_at_others(backend: str) -> None:
    x, t = data()
    losses = {}
    for shuffle in (False, True):
        run = Blended().fit(x, t, epochs=5, batch_size=20, shuffle=shuffle, optimizer=cr.SGD(0.0), backend=backend)
        losses[shuffle] = len(set(run.loss))
    assert losses == {False: 1, True: 5}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_the_loss_of_each_epoch_by_hand(weighted: bool) -> None:
    """Σ over batches of loss · divisor / Σ of weights; a batch without weight counts nothing, whatever its loss."""
    x, t = data(300)
    r = np.random.default_rng(0)
    weight = np.where(np.arange(300) < 60, 0.0, r.uniform(0, 3, 300)) if weighted else None
    given = Data({"x": x}, t, weight)
    for shuffle in (False, True):
        epochs = Epochs(given, 7, shuffle=shuffle, seed=5, optimizer=cr.SGD(0.1), planned=9, keep=(), reads=READS)
        steps = epochs.take(Behind(0, 0, 0, 0), 4)
        count, sizes, order = steps.count, list(steps.sizes) * 4, np.array(spelt_out(steps)["order"])
        values = r.normal(size=count).astype(np.float32)
        history = epochs.history(steps, {"loss": values, "penalty": np.arange(count, dtype=np.float32)}, 3)
        edges = np.cumsum([0, *sizes])
        for e, found in enumerate(history["loss"]):
            places = range(e * count // 4, (e + 1) * count // 4)
            rows = [order[edges[i] : edges[i + 1]] for i in places]
            each = np.array([float(len(k)) if weight is None else float(np.sum(weight[k])) for k in rows])
            sums = np.array([float(values[i]) * given.total(k) for i, k in zip(places, rows, strict=True)])
            assert found == np.sum(np.where(each > 0, sums, 0.0)) / np.sum(each)
        assert history["penalty"] == [count // 4 * (e + 1) - 1 for e in range(3)]
        assert history["learning_rate"] == [0.1] * 3


# --------------------------------------------------------------------------------------------------- the same bits, however many

SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"optimizer": rule(0.01, **options)} for name, rule in optimizers.items() for options in rule.examples[-1:]},
    "accumulation": {"optimizer": cr.Adam(0.01, accumulate=3, clip_norm=1.0)},
    "penalties": {"optimizer": cr.Adam(0.01, l1=0.1, l2=0.1, weight_decay=0.1)},
    "in order": {"shuffle": False},
    "one step": {"batch_size": 20},
    "short last batch": {"batch_size": 6},
    "weights": {"sample_weight": np.linspace(0, 2.0, 20), "batch_size": 6, "optimizer": cr.SGD(0.1, accumulate=2)},
    "seed 7": {"seed": 7},
    "neighbours": {"optimizer": cr.SGD(Neighbours(0.1))},
    "float64": {"dtype": "float64"},
    **{f"schedule {name}": {"optimizer": cr.SGD(schedule(0.1), momentum=0.5)} for name, schedule in schedules.items()},
}


@pytest.mark.parametrize("options", list(SETTINGS.values()), ids=list(SETTINGS))
def test_the_same_bits_one_by_one_and_together(
    options: dict[str, Any], calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, t = data()
    results = []
    for numbers in ((1,), (2, 1, 3, 10), (100,)):
        calls.clear()
        at_once(monkeypatch, *numbers)
        net = noisy() if options.get("optimizer", cr.SGD()).name != "lbfgs" else nn.Dense(2)
        runs = [net.fit(x, t, epochs=e, **{"batch_size": 5, **options}) for e in (13, 2)]
        results.append((state(net), net._slots, [outcome(net, run) for run in runs], len(calls)))
    for weights, slots, histories, _ in results[1:]:
        assert_same(weights, results[0][0])
        assert_same(slots, results[0][1])
        assert histories == results[0][2]


@pytest.mark.parametrize("backend", list(backends))
@pytest.mark.parametrize("rule", [cr.Adam(0.01), cr.SGD(0.1, momentum=0.9, accumulate=3)], ids=["", "accumulated"])
def test_the_same_bits_on_every_backend(backend: str, rule: cr.Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = data()
    results = []
    for numbers in ((1,), (2, 1, 3, 100)):
        at_once(monkeypatch, *numbers)
        net = noisy()
        options: dict[str, Any] = {
            "batch_size": 6,
            "optimizer": rule,
            "sample_weight": np.linspace(0, 2.0, 20),
            "backend": backend,
        }
        runs = [net.fit(x, t, epochs=e, **options) for e in (40, 2)]
        with pytest.raises(cr.DivergenceError) as caught:
            net.fit(
                x,
                t,
                epochs=90,
                **{**options, "optimizer": replace(rule, learning_rate=Leap(0.01, at=net._counters["updates"] + 50))},
            )
        told = [outcome(net, run) for run in (*runs, caught.value.run)]
        results.append((state(net), net._slots, (str(caught.value), told)))
    assert_same(results[0][0], results[1][0])
    assert_same(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_epochs_are_taken_together_where_nobody_looks(calls: list[tuple[int, int]]) -> None:
    x, t = data()
    run = noisy().fit(x, t, epochs=40, batch_size=5)
    assert run.epochs == 40
    assert sum(steps for steps, _ in calls) == 160
    assert calls[0] == (4, 20)
    assert len(calls) < 10


LOOKS: dict[str, dict[str, Any]] = {
    "callback": {"callbacks": [lambda run: None]},
    "validation": {"validation": 0.2},
    "metric": {"metrics": ("mae", lambda prediction, target: 0.0)},
    "early stopping": {"early_stopping": 5},
    "plateau": {"optimizer": cr.SGD(cr.schedules.reduce_on_plateau(0.1))},
    "not lasting": {"optimizer": Projected(0.1)},
}


@pytest.mark.parametrize("options", list(LOOKS.values()), ids=list(LOOKS))
def test_epochs_are_taken_one_by_one_where_somebody_looks(options: dict[str, Any], calls: list[tuple[int, int]]) -> None:
    x, t = data()
    run = noisy().fit(x, t, epochs=5, batch_size=4, **options)
    assert run.epochs == 5
    assert [steps for steps, _ in calls] == [4 if "validation" in options else 5] * 5


# ---------------------------------------------------------------------------------------------------- how many, and their history


def test_metrics_that_are_sums_take_epochs_together(calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = data()
    kept: list[Any] = []
    run_of = ReferenceSession.run
    watched = lambda self, steps, pulse=None: kept.append(steps.keep) or run_of(self, steps, pulse)
    monkeypatch.setattr(ReferenceSession, "run", watched)
    results = []
    for numbers in ((1,), (2, 3, 100)):
        with monkeypatch.context() as patch:
            at_once(patch, *numbers)
            net = noisy()
            run = net.fit(x, t, epochs=9, batch_size=6, metrics=("r2", "mae"), sample_weight=np.arange(20) % 3)
        assert {len(column) for column in run.table().values()} == {9}
        results.append(run)
    assert results[0].metrics == results[1].metrics
    assert set(kept) == {("loss", "penalty", "metric.r2", "metric.mae")}
    assert len(kept) == 9 + 3
    monkeypatch.setattr("chainrule.train.fit.MOST_STEPS", 4 * 6 * 3)  # loss, penalty, and a number for each output and metric
    calls.clear()
    noisy().fit(x, t, epochs=40, batch_size=6, metrics=("r2", "mae"))
    assert max(steps for steps, _ in calls) == 4 * 6


def test_memory_is_bounded(calls: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainrule.train.fit.MOST_STEPS", 30)
    x, t = data()
    nn.Dense(2).fit(x, t, epochs=40, batch_size=5)
    assert max(steps for steps, _ in calls) == 28  # seven epochs of four
    calls.clear()
    monkeypatch.setattr("chainrule.train.fit.MOST_ROWS", 70)
    nn.Dense(2).fit(x, t, epochs=40, batch_size=5)
    assert max(rows for _, rows in calls) == 60
    calls.clear()
    monkeypatch.setattr("chainrule.train.fit.MOST_ROWS", 7)
    nn.Dense(2).fit(x, t, epochs=4, batch_size=5)
    assert {rows for _, rows in calls} == {20}


def test_pace() -> None:
    pace, taken = Pace(1000), []
    for seconds in (1e-6, 1e-6, 0.05, 0.2, 0.2, 0.7, 0.3, 0.05, 0.05):
        taken.append(pace.next(10**9))
        pace.took(taken[-1], seconds)
    assert taken == [1, 2, 4, 8, 8, 8, 4, 4, 8]
    assert pace.next(3) == 3
    pace.took(3, 1e-6)  # the end of a run says nothing of a whole call
    assert pace.next(10**9) == 16
    for _ in range(20):
        pace.took(pace.next(10**9), 0.0)
    assert pace.next(10**9) == 1000
    for _ in range(20):
        pace.took(pace.next(10**9), 9.0)
    assert pace.next(10**9) == 1
    assert Pace(0).next(5) == 1


def test_the_history_of_epochs_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch, 1, 6)
    x, t = data()
    run = noisy().fit(x, t, epochs=9, batch_size=5)
    assert {len(column) for column in run.table().values()} == {9}
    assert 0 < sum(run.epoch_seconds) <= run.seconds + 1e-6
    assert len(set(run.epoch_seconds)) == 3
    assert all(type(v) is float for v in [*run.loss, *run.penalty, *run.learning_rate, *run.epoch_seconds])


def test_a_metric_may_bear_the_name_of_a_column() -> None:
    def penalty(prediction: Array, target: Array) -> float:
        return 7.0

    x, t = data()
    run = nn.Dense(2).fit(x, t, epochs=3, metrics=(penalty,))
    assert run.metrics["penalty"] == [7.0] * 3
    assert run.penalty == [0.0] * 3


# --------------------------------------------------------------------------------------------------------------------- progress


class Terminal:
    """A stream that says it is a terminal, and keeps what is written."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.lines: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        self.lines += [text.strip()] if text.strip() else []

    def flush(self) -> None:
        pass


def test_the_progress_line_counts_epochs_within_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainrule.train.progress._REDRAW", 0.0)
    run, stream = cr.Run(0), Terminal()
    progress = Progress(run, 20, True, stream)  # type: ignore[arg-type]  # all that is asked of a stream
    run.write(0, {"loss": [0.5] * 5}, {})
    for done in (1, 10, 11, 100):
        progress.step(done, 10)
    assert [line.split()[1] for line in stream.lines] == ["6/20", "6/20", "7/20", "15/20"]
    run.write(5, {"loss": [0.25] * 15}, {})
    progress.epoch()
    assert stream.lines[-1].split()[1] == "20/20"


def test_progress_while_epochs_are_taken_together(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once(monkeypatch, 1, 5, 100)
    monkeypatch.setattr("chainrule.train.progress._REDRAW", 0.0)
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    x, t = data()
    nn.Dense(2).fit(x, t, epochs=12, batch_size=5)
    shown = [int(line.split()[1].split("/")[0]) for line in stream.lines]
    assert shown == sorted(shown)
    assert set(shown) == set(range(1, 13))


# ----------------------------------------------------------------------------------------- rates that hang on the length of a run


def test_whether_a_schedule_depends_on_the_length_of_the_run() -> None:
    """Found without an array of all steps, and for the package's own schedules without asking for all of them."""
    made: list[int] = []

    @dataclass(frozen=True)
    class Late(Schedule):
        """Falls before the end, but only just."""

        tied: bool = True

        def __call__(self, steps: Array, total: int) -> Array:
            made.append(len(steps))
            return np.where(steps >= total - 3, 0.0, self.learning_rate) if self.tied else np.full(len(steps), 0.1)

    assert not module._is_tied(Late(tied=False), 10_000, at_once=1000)
    assert (max(made), sum(made)) == (1000, 20_000)
    for total in (5, 50, 10_000):
        assert module._is_tied(Late(), total, at_once=1000)
    for total in (50, 5000, 10**9):
        for name, schedule in schedules.items():
            expected = name not in ("constant", "reduce_on_plateau")
            assert module._is_tied(schedule(), total, at_once=1000) == expected, (name, total)
        for part in (1e-8, 1e-3, 0.3, 0.999):
            every, longer = (max(1, round(part * n)) for n in (total, 2 * total))
            assert module._is_tied(schedules["step"](every=part), total, at_once=1000) == (every != longer and every < total)
        assert not module._is_tied(schedules["step"](every=5), total, at_once=1000)
        assert not module._is_tied(schedules["exponential"](every=5), total, at_once=1000)
