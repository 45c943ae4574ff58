"""How many threads a run takes, with a clock of its own."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

import numpy as np
import pytest

from chainrule.graph.trace import build, type_of
from chainrule.normalize import normalize
from chainrule.run import crew as crews
from chainrule.run.crew import Crew, Pace, Way, operations

WORK = 2e6  # operations of a step, enough for several threads


@pytest.fixture(autouse=True)
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "processors", lambda: 4)


def run(pace: Pace, steps: int, seconds: Callable[[Way, int], float], asked: int | None = None) -> list[tuple[Way, int]]:
    """The slices of one call."""
    crew, taken = Crew(asked), []
    while steps:
        way = crew.way(pace, steps)
        count = crew.steps(pace, way, steps)
        crew.took(pace, way, count, seconds(way, count))
        taken.append((way, count))
        steps -= count
    return taken


def cost(one: float, several: float, wake: float = 0.0) -> Callable[[Way, int], float]:
    return lambda way, count: count * (one if way.threads == 1 else several) + (wake if way.threads > 1 else 0.0)


def steps_by(slices: list[tuple[Way, int]], threads: int) -> int:
    return sum(count for way, count in slices if way.threads == threads)


@pytest.mark.parametrize(("one", "several", "best"), [(40e-6, 15e-6, 4), (15e-6, 40e-6, 1)])
def test_the_faster_way_is_taken_nearly_always(one: float, several: float, best: int) -> None:
    slices = run(Pace(WORK), 200_000, cost(one, several))
    assert steps_by(slices, best) > 0.95 * 200_000


def test_the_same_code_serves_both_ways() -> None:
    assert {way.units for way, _ in run(Pace(WORK), 50_000, cost(20e-6, 10e-6))} == {4}


def test_little_work_runs_on_one_thread() -> None:
    assert {way for way, _ in run(Pace(1000.0), 1_000_000, cost(1e-7, 1e-7))} == {Way(1, 1)}


def test_short_calls_run_on_one_thread_and_tell_nothing() -> None:
    pace = Pace(WORK)
    for _ in range(20):
        assert {way.threads for way, _ in run(pace, 1, cost(40e-6, 15e-6, wake=2e-3))} == {1}
    assert not pace.last


def test_a_bad_beginning_is_forgotten() -> None:
    """Threads that first woke slowly, because other programs were still at work, are judged anew."""
    pace = Pace(WORK)
    for _ in range(4):  # calls of a few steps that take milliseconds
        crew = Crew(None)
        crew.took(pace, Way(4, 4), 2, 4e-3)
    slices = [s for _ in range(40) for s in run(pace, 5000, cost(40e-6, 15e-6, wake=100e-6))]
    assert slices[-1][0].threads == 4
    assert steps_by(slices[len(slices) // 2 :], 4) > 0.9 * steps_by(slices[len(slices) // 2 :], 1)


def test_a_machine_that_becomes_busy_is_noticed() -> None:
    pace = Pace(WORK)
    run(pace, 100_000, cost(40e-6, 15e-6))
    slices = run(pace, 200_000, cost(40e-6, 90e-6))
    assert steps_by(slices, 1) > 0.8 * 200_000


def test_slow_steps_are_hardly_ever_tried_on_one_thread() -> None:
    """A step of a large network takes longer than a trial should."""
    pace = Pace(WORK)
    run(pace, 20, cost(0.12, 0.06))
    slices = run(pace, 200, cost(0.12, 0.06))
    assert 1 <= steps_by(slices, 1) <= 5


def test_a_machine_that_becomes_idle_is_noticed_soon() -> None:
    """While threads were no use: both ways took as long."""
    pace = Pace(WORK)
    run(pace, 20_000, cost(40e-6, 41e-6))
    slices = run(pace, 20_000, cost(40e-6, 20e-6))
    assert steps_by(slices, 1) < 0.2 * 20_000


def test_what_the_user_asked_for_is_taken() -> None:
    assert {way for way, _ in run(Pace(WORK), 10_000, cost(10e-6, 40e-6), asked=3)} == {Way(3, 3)}


class _Busy(dict[Way, float]):
    """Whenever something is put into it, another thread times a way that is new."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self.pace = pace

    def __setitem__(self, way: Way, seconds: float) -> None:
        super().__setitem__(way, seconds)
        self.pace.last[Way(len(self.pace.last) + 10, 1)] = deque([1.0])


def test_other_threads_may_time_ways_meanwhile() -> None:
    pace = Pace(WORK)
    pace.idle = _Busy(pace)
    for _ in range(4):
        Crew(None).took(pace, Way(4, 4), 100, 4e-3)
    assert pace.step(Way(4, 4)) == pytest.approx(4e-5)


def test_only_the_paces_used_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crews, "KEPT", 3)
    monkeypatch.setattr(crews, "_paces", OrderedDict())
    graphs = [build(lambda x: [x + x], [type_of(np.ones(n))]) for n in range(1, 5)]
    crew = Crew(None)
    first, second, *_ = [crew.pace([normalize(g)]) for g in graphs[:3]]
    assert crew.pace([normalize(graphs[0])]) is first
    crew.pace([normalize(graphs[3])])
    assert crew.pace([normalize(graphs[0])]) is first
    assert crew.pace([normalize(graphs[1])]) is not second


def test_the_most_threads_of_a_session_are_those_of_its_largest_step() -> None:
    small, large = (build(lambda a: [a @ a], [type_of(np.zeros((n, n), "f4"))]) for n in (4, 100))
    assert operations(large) == operations(large) == 2e6 + 1e4, "products, and a look at each number of the input"
    assert Crew(None).most([small]) == 1
    assert Crew(None).most([small, large]) == 4
    assert Crew(3).most([small]) == 3
    assert Crew(None).most([]) == 1
