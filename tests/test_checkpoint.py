"""Plans of checkpoints against all that could be done instead: dynamic programming, and a run of each plan, action by action."""

from __future__ import annotations

import time
from functools import cache
from itertools import product

import numpy as np
import pytest

from chainrule.derive.checkpoint import BACKWARD, Checkpoints, choose, frontier, least_advances, plan, shares
from chainrule.errors import UsageError


@cache
def fewest(units: int, slots: int) -> int:
    """The fewest advances by trying every place for the first state that is kept."""
    if units == 1:
        return 0
    if slots == 1:
        return units * (units - 1) // 2
    return min(cut + fewest(units - cut, slots - 1) + fewest(cut, slots) for cut in range(1, units))


def carried_out(made: Checkpoints) -> int:
    """Carry out a plan as a machine would, and refuse all that is not allowed; returns the advances."""
    held = {0: 0}  # place -> the time of the state in it
    needed = made.steps  # all from here on has gone backward
    advances = 0
    actions = made.actions()
    assert actions.shape == (2 * made.units - 1, 4)
    for number, (begin, to, first, end) in enumerate(actions.tolist()):
        assert held[begin] == first < end
        assert 0 <= begin < made.states
        if to == BACKWARD:
            assert first == made.segment * ((needed - 1) // made.segment), "units begin at multiples of the segment"
            assert end == needed
            needed = first
            held = {p: t for p, t in held.items() if t < needed}  # what lies behind is of no use
        else:
            assert 0 <= to < made.states
            assert end % made.segment == 0
            assert end < needed
            if to == made.slots:  # the place without a slot: its unit goes backward at once
                assert actions[number + 1].tolist()[:3] == [to, BACKWARD, end]
            else:
                assert to not in held, "a state that is still needed is overwritten"
            held[to] = end
            advances += end - first
        assert len([p for p in held if p < made.slots]) <= made.slots
    assert needed == 0, "every step goes backward, once, from the last to the first"
    return advances


@pytest.mark.parametrize("slots", range(1, 12))
def test_the_formula_is_the_optimum(slots: int) -> None:
    for units in range(1, 61):
        assert least_advances(units, slots) == fewest(units, slots)


@pytest.mark.parametrize("slots", range(1, 10))
@pytest.mark.parametrize("segment", [1, 2, 3, 7])
def test_every_plan_does_what_it_says(slots: int, segment: int) -> None:
    for steps in [*range(1, 40), 97, 128, 300]:
        made = plan(steps, slots, segment)
        assert carried_out(made) == made.advances == made.segment * fewest_of(made)


def fewest_of(made: Checkpoints) -> int:
    return fewest(made.units, made.slots) if made.units <= 60 else least_advances(made.units, made.slots)


@pytest.mark.parametrize(
    ("steps", "slots", "advances"),
    [(1000, 50, 1948), (1000, 20, 2747), (1000, 10, 3636), (10_000, 141, 19_857), (10_000, 50, 28_622), (10_000, 10, 57_624)],
)
def test_counts_that_are_known(steps: int, slots: int, advances: int) -> None:
    made = plan(steps, slots)
    assert (made.advances, made.kind) == (advances, "recursive")
    assert carried_out(made) == advances


def test_slots_that_no_plan_can_use_are_left_out() -> None:
    assert plan(7, 100) == plan(7, 6)
    assert plan(1, 100).actions().tolist() == [[0, BACKWARD, 0, 1]]
    assert plan(10, 3, segment=100) == Checkpoints(10, 10, 1, 0)
    assert plan(10, 100, segment=4).actions()[-1].tolist() == [0, BACKWARD, 0, 4]


def smallest(steps: int, state: int, taped: int, chunk: int) -> int:
    return min(_bytes(plan(steps, 1, s), state, taped) for s in _all_segments(steps, chunk))


def _all_segments(steps: int, chunk: int) -> list[int]:
    return [*range(chunk, steps, chunk), steps]


def _bytes(made: Checkpoints, state: int, taped: int) -> int:
    return made.states * state + made.segment * taped


@pytest.mark.parametrize(("state", "taped", "chunk"), [(1, 1, 1), (3, 10, 1), (10, 3, 4), (16, 80, 8), (7, 100, 5)])
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 64, 77])
def test_the_chosen_plan_is_the_best_that_fits(steps: int, state: int, taped: int, chunk: int) -> None:
    every = [plan(steps, n, s) for s in _all_segments(steps, chunk) for n in range(1, steps + 1)]
    least = smallest(steps, state, taped, chunk)
    for budget in {least, least + 1, 2 * least, 3 * least, least + 10 * state, steps * taped, steps * taped + state}:
        if budget < least:
            continue
        made = choose(steps, budget, state=state, taped=taped, chunk=chunk)
        assert made.bytes == _bytes(made, state, taped) <= budget
        assert made.advances == min(p.advances for p in every if _bytes(p, state, taped) <= budget)
        assert made.segment % chunk == 0 or made.segment == steps
        assert carried_out(made) == made.advances


def test_all_is_kept_where_it_fits() -> None:
    made = choose(100, 100 * 5 + 2 + 7, state=2, taped=5, chunk=8, fixed=7)
    assert (made.kind, made.advances, made.bytes, made.states) == ("all", 0, 509, 1)
    assert choose(100, 100 * 5 + 2 + 6, state=2, taped=5, chunk=8, fixed=7).kind == "segments"


def test_a_budget_that_cannot_be_kept_names_the_least() -> None:
    least = 7 + 8 * 5 + 2 * 2
    with pytest.raises(UsageError, match=f"{least - 1} bytes.*1,000 steps: at least {least} are needed"):
        choose(1000, least - 1, state=2, taped=5, chunk=8, fixed=7)
    made = choose(1000, least, state=2, taped=5, chunk=8, fixed=7)
    assert (made.kind, made.slots, made.bytes) == ("recursive", 1, least)


def test_less_has_to_fit_where_all_is_kept() -> None:
    options = {"state": 2, "taped": 5, "chunk": 8, "fixed": 7}
    kept = choose(100, 509 - 30, **options, saved=30)
    assert (kept.kind, kept.bytes) == ("all", 509)
    assert choose(100, 509 - 31, **options, saved=30).kind == "segments"
    assert choose(100, 20, **options, saved=490).kind == "all", "which may be the least of all"
    with pytest.raises(UsageError, match="at least 19 are needed"):
        choose(100, 18, **options, saved=490)


# ---- several chains ----------------------------------------------------------------------------------------------------------

CHAINS = [  # steps, state, taped, chunk, fixed, saved, work of a step
    (30, 3, 10, 1, 5, 0, 1), (30, 3, 10, 1, 5, 0, 1), (17, 10, 3, 4, 0, 20, 9), (1, 4, 9, 1, 0, 0, 3), (24, 1, 40, 5, 2, 100, 2),
    (64, 16, 80, 8, 0, 0, 5), (9, 2, 2, 1, 0, 17, 1000),
]  # fmt: skip


def every_plan(steps: int, state: int, taped: int, chunk: int, fixed: int, saved: int, work: int) -> list[tuple[int, int]]:
    """Bytes and work of all plans, good and bad."""
    plans = {plan(steps, n, s) for s in _all_segments(steps, chunk) for n in range(1, steps + 1)}
    return [(fixed + _bytes(p, state, taped) - saved * (p.units == 1), p.advances * work) for p in plans]


def front_of(steps: int, state: int, taped: int, chunk: int, fixed: int, saved: int, work: int) -> tuple[np.ndarray, np.ndarray]:
    size, advances = frontier(steps, state=state, taped=taped, chunk=chunk, fixed=fixed, saved=saved)
    return size, work * advances


@pytest.mark.parametrize("chain", CHAINS)
def test_a_frontier_is_all_that_nothing_beats(chain: tuple[int, ...]) -> None:
    every = set(every_plan(*chain))
    best = sorted(p for p in every if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in every))
    assert list(zip(*(part.tolist() for part in front_of(*chain)), strict=True)) == best


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("first", range(len(CHAINS)))
def test_chains_share_a_budget_with_the_least_work_of_all_combinations(first: int, count: int) -> None:
    chains = [CHAINS[(first + n) % len(CHAINS)] for n in range(count)]
    fronts = [front_of(*c) for c in chains]
    pairs = [list(zip(*(part.tolist() for part in f), strict=True)) for f in fronts]
    every = sorted((sum(b for b, _ in ps), sum(w for _, w in ps)) for ps in product(*pairs))
    least, most = every[0][0], sum(p[-1][0] for p in pairs)
    before = None
    for budget in sorted({least, least + 1, *np.linspace(least, most + 5, 40).astype(int).tolist()}):
        found = shares(fronts, budget)
        assert sum(found) <= budget
        work = sum(dict(p)[b] for p, b in zip(pairs, found, strict=True))
        assert work == min(w for b, w in every if b <= budget)
        assert before is None or work <= before
        before = work
    assert before == 0


def test_long_chains_share_a_budget_at_once() -> None:
    began = time.perf_counter()
    fronts = [frontier(10_000, state=2048, taped=taped, chunk=16, saved=100) for taped in (10_000, 20_000, 700, 10_000)]
    found = shares(fronts, 40_000_000)
    assert time.perf_counter() - began < 0.5  # seconds; a hundredth of that where nothing else runs
    assert 39_000_000 < sum(found) <= 40_000_000
    assert shares(fronts, sum(int(size[0]) for size, _ in fronts)) == [int(size[0]) for size, _ in fronts]
    assert shares(fronts, sum(int(size[-1]) for size, _ in fronts)) == [int(size[-1]) for size, _ in fronts]


def test_of_many_numbers_of_slots_some_are_tried() -> None:
    """In the longest chains, and even there little is lost."""
    model = {"state": 1000, "taped": 10_000}
    size, advances = frontier(5000, **model)
    for budget in np.geomspace(size[0], size[-1], 50).astype(int):
        best = choose(5000, int(budget), **model).advances
        found = advances[np.searchsorted(size, budget, "right") - 1]
        assert best <= found <= 1.02 * best
        assert best or not found


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_numbers_below_one_are_refused(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(UsageError, match="at least one step"):
        plan(*wrong)
    with pytest.raises(UsageError, match="positive numbers"):
        choose(wrong[0], 100, state=wrong[1], taped=wrong[2])


def test_a_long_chain_is_planned_at_once() -> None:
    began = time.perf_counter()
    made = choose(10_000, 16_000_000, state=32_768, taped=100_000, chunk=4)
    chosen = time.perf_counter()
    actions = plan(10_000, 141).actions()
    ended = time.perf_counter()
    assert made.bytes <= 16_000_000
    assert len(actions) == 19_999
    assert np.count_nonzero(actions[:, 1] == BACKWARD) == 10_000
    assert chosen - began < 0.5  # seconds; a hundredth of that where nothing else runs
    assert ended - chosen < 2
