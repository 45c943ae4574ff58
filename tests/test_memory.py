"""Memory budgets: whatever of a loop is kept, gradients and trained networks have the bits of plain backpropagation through time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from native import WIDTHS, Server, assert_bits, backend_of
from test_compiler_graphs import graph_of

import chainrule as cr
from chainrule import nn
from chainrule.compiler.cost import copies_of_data, work
from chainrule.compiler.pipeline import Code
from chainrule.derive.checkpoint import least_advances
from chainrule.errors import UsageError
from chainrule.run.backend import backends
from chainrule.sizes import bytes_of
from chainrule.train.compiled import MemoryPlan

Array = np.ndarray
LARGE = 10**9  # a budget that any of these networks fits into with all that it keeps


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.stop()


# ---- networks ----------------------------------------------------------------------------------------------------------------


class Integrator(nn.Recurrent):
    """A cell with two states of different shape, one of which the other's gradient does not flow into."""

    def __init__(self, **options: Any) -> None:
        super().__init__(state=[3, (2, 2)], **options)

    def step(self, state: Any, x: Any) -> Any:
        h, m = state
        w = self.parameter("w", (x.shape[1], 3))
        v = self.parameter("v", (3, 3))
        outer = h[:, :2, None] * h[:, None, 1:]
        h = np.tanh(x @ w + h @ v + m[:, 0, :1])
        m = 0.75 * m + outer * cr.stop_gradient(np.max(m))
        return (h, m), h * 2.0 + np.sum(m, axis=(1, 2))[:, None]


def leaky(h: Any, x: Any) -> Any:
    h = np.where(h > 0.5, 0.25, 0.5) * h + np.sum(np.sin(x), axis=1)[:, None]
    return h, h


@dataclass(frozen=True)
class Case:
    """A network and the size of its data. The sums of a loop are gathered 512 rows at a time, so with 130 rows a chunk has 4 steps."""

    layers: Callable[[], Sequence[nn.Module]]
    rows: int = 130
    steps: int = 14
    each: bool = False  # whether each step has a loss
    options: dict[str, Any] = field(default_factory=dict)

    def net(self, dtype: str = "float32") -> nn.Sequential:
        made = nn.Sequential(*self.layers(), nn.Dense(1))
        x, y = self.data()
        made.fit(x, y, loss="mse", epochs=0, seed=3, dtype=dtype, batch_size=self.rows, **self.options)
        r = np.random.default_rng(5)  # zeros hide errors
        made.load_parameters({n: v + 0.1 * r.normal(size=v.shape) for n, v in made.parameters.items()})
        return made

    def data(self, rows: int | None = None) -> tuple[Array, Array]:
        r = np.random.default_rng([self.rows, self.steps])
        n = rows or self.rows
        return r.normal(size=(n, self.steps, 2)), r.normal(size=(n, self.steps, 1) if self.each else (n, 1))


def ragged(rows: int, steps: int) -> dict[str, Any]:
    """Lengths, 0 and all steps among them."""
    return {"lengths": np.r_[0, steps, 1, np.random.default_rng(1).integers(0, steps + 1, rows - 3)]}


S = {"return_sequences": True}
CASES = {
    "RNN": Case(lambda: [nn.RNN(3)]),
    "RNN relu, whole chunks": Case(lambda: [nn.RNN(2, "relu")], steps=16),
    "RNN, chunks of one step": Case(lambda: [nn.RNN(2)], rows=512, steps=7),
    "RNN, long, one row": Case(lambda: [nn.RNN(3)], rows=1, steps=1600),
    "RNN, one step": Case(lambda: [nn.RNN(3)], steps=1),
    "RNN, two steps": Case(lambda: [nn.RNN(3)], rows=300, steps=2),
    "RNN reversed": Case(lambda: [nn.RNN(3, reverse=True)]),
    "LSTM": Case(lambda: [nn.LSTM(3)]),
    "LSTM peephole": Case(lambda: [nn.LSTM(2, peephole=True)]),
    "LSTM layer_norm": Case(lambda: [nn.LSTM(2, layer_norm=True)]),
    "LSTM in panels": Case(lambda: [nn.LSTM(64)], rows=33, steps=60),
    "GRU": Case(lambda: [nn.GRU(3)]),
    "GRU reset before": Case(lambda: [nn.GRU(3, reset_after=False)]),
    "GRU learnt": Case(lambda: [nn.GRU(3, learn_initial=True)]),
    "LSTM learnt, each step": Case(lambda: [nn.LSTM(2, learn_initial=True, **S)], each=True),
    "both": Case(lambda: [nn.Bidirectional(nn.RNN(2))]),
    "both, LSTM, each step": Case(lambda: [nn.Bidirectional(nn.LSTM(2, **S))], each=True),
    "stack": Case(lambda: [nn.RNN(3, **S), nn.RNN(2)], steps=26),
    "stack, there and back": Case(lambda: [nn.RNN(3, **S), nn.RNN(2, reverse=True)]),
    "stack of both": Case(lambda: [nn.Bidirectional(nn.RNN(2, **S)), nn.Bidirectional(nn.GRU(2))]),
    "stack, each step": Case(lambda: [nn.GRU(2, **S), nn.LSTM(2, **S)], each=True),
    "dropout": Case(lambda: [nn.RNN(3, **S), nn.Dropout(0.3), nn.RNN(2)]),
    "variational dropout": Case(lambda: [nn.LSTM(3, dropout=0.3, recurrent_dropout=0.4)]),
    "ragged": Case(lambda: [nn.LSTM(3)], options=ragged(130, 14)),
    "ragged, each step": Case(lambda: [nn.Bidirectional(nn.GRU(2, **S))], each=True, options=ragged(130, 14)),
    "stateful": Case(lambda: [nn.LSTM(2, stateful=130)]),
    "a cell of two states": Case(lambda: [Integrator()]),
    "a cell of two states, each step": Case(lambda: [Integrator(**S)], each=True),
    "a function as cell": Case(lambda: [nn.Recurrent(leaky, state=2)]),
}
SLOW = [
    "LSTM",
    "LSTM learnt, each step",
    "GRU reset before",
    "both",
    "stack, each step",
    "stack of both",
    "GRU learnt",
    "dropout",
    "ragged",
    "stateful",
]  # others show it
USUAL = [
    "RNN",
    "RNN, long, one row",
    "RNN reversed",
    "LSTM in panels",
    "both",
    "stack",
]  # in usual code, and within a larger budget too
FEW = ["RNN", "LSTM peephole", "GRU", "stack", "variational dropout", "ragged", "stateful"]


def least_of(call: Callable[[int], Any], below: int = 1) -> int:
    """The least budget, by what is said about one that is too small."""
    with pytest.raises(
        cr.BudgetError, match=rf"memory={below:,} bytes is too little: at least [\d,]+ bytes .* Give that much"
    ) as refused:
        call(below)
    assert f"at least {refused.value.least:,} bytes" in str(refused.value)
    return refused.value.least


def gradients(case: Case, net: nn.Module, memory: Any = None, **options: Any) -> dict[str, Array]:
    x, y = case.data()
    found: dict[str, Array] = net.gradients(x, y, loss="mse", seed=7, memory=memory, **case.options, **options)
    return found


def assert_equal(got: dict[str, Array], want: dict[str, Array], label: Any) -> None:
    assert list(got) == list(want)
    assert_bits(list(got.values()), list(want.values()), label)


def step_within(memory: int, net: nn.Sequential, threads: int = 1) -> Code:
    """The kernels of a training step that keeps a budget; not made machine code."""
    request = net.compiled._request("step", None)
    session = request._session(request.backend)
    data = {n: a.dtype for n, a in request.fitted.data.items()}
    dtypes = [data.get(n) if request.program.inputs[n].rows is not None else None for n in request.entry.inputs]
    program = replace(request.program, memory=memory)
    return request.backend._compiled(program, request.entry, dtypes, session._slots, storage=session._storage, threads=threads)


@contextmanager
def native(backend: Any) -> Iterator[None]:
    """With another backend of this name: for other processors, or (level 0) with code that is made sooner and runs longer."""
    before, backends._things["native"] = backends._things["native"], backend
    try:
        yield
    finally:
        backends._things["native"] = before


# ---- gradients ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_gradients_within_any_budget_have_the_bits_of_plain_ones(name: str) -> None:
    case = CASES[name]
    with native(backends["native"] if name in USUAL else backend_of(level=0)):
        net = case.net()
        want = gradients(case, net)
        assert all(np.isfinite(g).all() for g in want.values())
        least = least_of(lambda m: gradients(case, net, m))
        for memory in (least, least * 3 // 2)[: 2 if name in USUAL else 1]:
            assert_equal(gradients(case, net, memory), want, f"{memory} bytes, of at least {least}")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_gradients_within_more_budgets(name: str) -> None:
    case = CASES[name]
    for dtype in ("float32", "float64"):
        net = case.net(dtype)
        want = gradients(case, net)
        within = partial(gradients, case, net)
        least = least_of(within)
        assert least_of(within, least - 1) == least
        for memory in (least, *np.linspace(least + 1, 3 * least, 8).astype(int), LARGE):
            assert_equal(gradients(case, net, memory), want, f"{memory} bytes, of at least {least}")


def test_a_byte_less_than_the_least_budget_is_refused() -> None:
    for name in ("RNN", "RNN, long, one row"):
        case = CASES[name]
        net = case.net()
        within = partial(gradients, case, net)
        least = least_of(within)
        assert least_of(within, least - 1) == least


@pytest.mark.parametrize("name", ["RNN", "LSTM"])
def test_gradients_in_double_precision(name: str) -> None:
    case = CASES[name]
    net = case.net("float64")
    want = gradients(case, net)
    least = least_of(lambda m: gradients(case, net, m))
    got = gradients(case, net, least)
    assert_equal(got, want, least)
    assert all(g.dtype == np.float64 for g in got.values())


@pytest.mark.parametrize("options", [{"training": False}, {"through_time": True}], ids=["evaluation", "through time"])
def test_gradients_in_other_ways(options: dict[str, Any]) -> None:
    case = CASES["dropout"]
    net = case.net()
    with native(backend_of(level=0)):
        least = least_of(lambda m: gradients(case, net, m, **options))
        assert_equal(gradients(case, net, least, **options), gradients(case, net, **options), options)


# ---- training ----------------------------------------------------------------------------------------------------------------


def trained(case: Case, memory: Any = None, threads: int | None = 1, epochs: int = 3, batches: int = 2) -> nn.Sequential:
    """A network after some epochs; the last batch of those with dropout is shorter than the others."""
    net = case.net()
    rows = case.rows * batches - (7 if "dropout" in repr(net) else 0)
    x, y = case.data(rows)
    options = {k: np.resize(v, rows) for k, v in case.options.items()}
    run = net.fit(
        x, y, loss="mse", optimizer=cr.Adam(0.01), epochs=epochs, batch_size=case.rows, seed=9, threads=threads, memory=memory,
        shuffle="stateful" not in repr(net), **options,
    )  # fmt: skip
    net.history = run.loss  # type: ignore[assignment]
    return net


def learnt(net: nn.Sequential) -> list[Array]:
    return [np.asarray(net.history), *net.parameters.values(), *net.statistics.values()]


@pytest.mark.parametrize("name", FEW)
def test_training_within_any_budget_gives_the_same_network(name: str) -> None:
    case = CASES[name]
    plain = trained(case)
    want = learnt(plain)
    least = least_of(lambda m: trained(case, m))
    net = trained(case, least)
    assert_bits(learnt(net), want, f"{least} bytes")
    plan = net.compiled.plan()
    assert plan.budget == least
    assert sum(loop.bytes for loop in plan.loops) <= least
    assert {loop.kind for loop in plan.loops} != {"all"}
    assert {loop.kind for loop in plain.compiled.plan().loops} == {"all"}
    assert plain.compiled.plan().budget is None


def test_all_kinds_of_plans_occur_and_their_counts_are_the_optimum() -> None:
    case = Case(lambda: [nn.RNN(16)], rows=130, steps=50)  # 13 chunks
    net = case.net()
    x, y = case.data()
    net.fit(x, y, loss="mse", epochs=1, batch_size=case.rows)
    least = least_of(lambda m: step_within(m, net))
    budgets = (*(least * np.array([1, 1.1, 1.3, 1.6, 2.5, 4])).astype(int), LARGE)
    plans = [plan for m in budgets for _, plan in step_within(int(m), net).plans]
    assert len(plans) == len(budgets)
    assert {p.kind for p in plans} == {"all", "segments", "recursive"}
    assert [p.advances for p in plans] == sorted((p.advances for p in plans), reverse=True), "more memory never means more work"
    state = 130 * 16 * 4
    without = {p.segment: p.bytes - p.states * state for p in plans}  # but for states: so much a step, and what any plan takes
    (taped,) = {(a - b) // (i - j) for i, a in without.items() for j, b in without.items() if i > j}
    fixed = without[4] - 4 * taped
    for plan in plans:
        units = -(-50 // plan.segment)
        assert plan.segment % 4 == 0 or plan.segment == 50, "segments are whole chunks"
        assert plan.advances == (plan.segment * least_advances(units, plan.states - 1) if units > 1 else 0)
        others = [
            (segment * least_advances(-(-50 // segment), slots), fixed + segment * taped + (slots + 1) * state)
            for segment in range(4, 50, 4)
            for slots in range(1, -(-50 // segment))
        ]
        assert not [o for o in others if o[0] < plan.advances and o[1] <= plan.bytes], "no plan of this size does with less work"


def test_a_plan_in_words() -> None:
    case = CASES["RNN, chunks of one step"]
    net = case.net()
    x, y = case.data()
    fit = lambda m: net.fit(x, y, loss="mse", epochs=1, batch_size=512, memory=m)
    fit(least_of(fit))
    plan = net.compiled.plan()
    assert isinstance(plan, MemoryPlan)
    (loop,) = plan.loops
    assert loop.layer == "0"
    assert str(loop).startswith('RNN "0" goes from the first step to the last and keeps ')
    assert f" keeps {loop.states} states and the inner values of {loop.segment} step ({loop.kind}); " in str(plan)
    assert f"{loop.extra} of 7 steps are computed again" in str(plan)


class Siamese(nn.Module):
    """One recurrent layer used twice, and a loop in the network's own code."""

    def __init__(self) -> None:
        self.reader = nn.GRU(3)

    def __call__(self, x: Any) -> Any:
        steps = np.swapaxes(x, 0, 1) * self.parameter("gain", (2,), "ones")
        mean, _ = cr.scan(lambda h, x: (np.tanh(0.5 * h + x), None), np.zeros((x.shape[0], 2), x.dtype), steps, reverse=True)
        return np.concatenate([self.reader(x), self.reader(-x), mean], axis=1)


def test_a_plan_says_which_loop_is_which() -> None:
    def words(net: nn.Module) -> list[str]:
        net.fit(np.ones((4, 30, 2)), np.ones((4, 8)), epochs=1)
        return [str(loop).partition(" and keeps ")[0] for loop in net.compiled.plan().loops]

    forward, backward = "goes from the first step to the last", "goes from the last step to the first"
    stack = nn.Sequential(nn.Bidirectional(nn.LSTM(3, True)), nn.GRU(2, True, reverse=True), nn.Bidirectional(nn.RNN(4)))
    assert words(stack) == [
        f'LSTM "0.forward" {forward}',
        f'LSTM "0.backward" {backward}',
        f'GRU "1" {backward}',
        f'RNN "2.forward" {forward}',
        f'RNN "2.backward" {backward}',
    ]
    assert sorted(words(Siamese())) == [
        f'GRU "reader", loop 1 of 2, {forward}',
        f'GRU "reader", loop 2 of 2, {forward}',
        f"Siamese, the network itself, {backward}",
    ]
    assert words(nn.Recurrent(nn.LSTM(8))) == [f"Recurrent, the network itself, {forward}"]


# ---- threads and widths ------------------------------------------------------------------------------------------------------


def thread_faults(name: str) -> None:
    case = CASES[name]
    want = learnt(trained(case))
    least = least_of(lambda m: trained(case, m))
    for threads in (2, 4):
        for memory in (least, least * 3 // 2)[: threads // 2]:
            assert_bits(learnt(trained(case, memory, threads)), want, f"{threads} threads, {memory} bytes")


@pytest.mark.parametrize("name", ["GRU", "stack", "LSTM in panels"])
def test_threads_change_no_bit(server: Server, name: str) -> None:
    server(thread_faults, name)


def width_faults(name: str, width: str) -> None:
    case = CASES[name]
    with native(backend_of(width, 1)):
        net = case.net()
        want = gradients(case, net)
        least = least_of(lambda m: gradients(case, net, m))
        assert_equal(gradients(case, net, least), want, f"{width}, {least} bytes")


@pytest.mark.parametrize("width", WIDTHS[1:])
@pytest.mark.parametrize("name", ["LSTM in panels", "GRU"])
def test_narrow_vectors(server: Server, name: str, width: str) -> None:
    server(width_faults, name, width)


# ---- what a budget is --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "size"),
    [("64MB", 64_000_000), ("1.5GiB", 3 * 2**29), ("1.5 GiB", 3 * 2**29), ("500kB", 500_000), ("2 kib", 2048), ("100", 100), ("7B", 7),
     ("1,000,000", 10**6), ("1_000", 1000), (".5KB", 500), (np.int64(12), 12), (1, 1), ("1TB", 10**12), ("1TiB", 2**40),
     ("12,345.5kB", 12_345_500), ("1" + "0" * 400, 10**400)],
)  # fmt: skip
def test_amounts_of_memory(said: Any, size: int) -> None:
    assert bytes_of(said) == size


NONSENSE = [
    0, -1, 1.5, True, "", "MB", "64 XB", "-5MB", "64MB extra", "0", "0.0001B", "1..5MB", None, [1], "1e6", float("nan"), ",", "_,MB", ",5",
    b"64MB", "٣MB", "1,5GB", "1,0000", "1__0", "5.", ".", "1.5.2",
]  # fmt: skip


@pytest.mark.parametrize("nonsense", NONSENSE, ids=repr)
def test_amounts_that_are_none(nonsense: Any) -> None:
    with pytest.raises(UsageError, match="memory"):
        bytes_of(nonsense)


@pytest.mark.parametrize("nonsense", ["lots", 0, 1.5])
def test_nonsense_is_refused_everywhere(nonsense: Any) -> None:
    case = Case(lambda: [nn.RNN(2)], rows=4, steps=3)
    net = case.net()
    x, y = case.data()
    before = net.parameters
    for use in (
        lambda: net.fit(x, y, epochs=1, memory=nonsense),
        lambda: net.gradients(x, y, memory=nonsense),
        lambda: cr.scan(lambda h, x: (h + x, None), 0.0, np.arange(3.0), memory=nonsense),
    ):
        with pytest.raises(UsageError, match=f"memory.*{re.escape(repr(nonsense))}"):
            use()
    assert_equal(net.parameters, before, "a refused fit changes nothing")


def test_only_machine_code_keeps_budgets() -> None:
    case = Case(lambda: [nn.RNN(2)], rows=4, steps=3)
    net = case.net()
    x, y = case.data()
    for use in (net.fit, net.gradients):
        with pytest.raises(UsageError, match='"native"; "reference" keeps what it needs, so leave it out'):
            use(x, y, backend="reference", memory="64MB")


def test_a_refused_fit_leaves_the_network_as_it_was_and_usable() -> None:
    case = CASES["RNN"]
    net, other = case.net(), case.net()
    x, y = case.data()
    least_of(lambda m: net.fit(x, y, loss="mse", epochs=1, memory=m, seed=1))
    assert_equal(net.parameters, other.parameters, "refused")
    fit = lambda n: n.fit(x, y, loss="mse", epochs=1, seed=1)
    fit(net), fit(other)
    assert_equal(net.parameters, other.parameters, "after another fit")


def test_a_network_without_loops_may_have_a_budget() -> None:
    r = np.random.default_rng(0)
    x, y = r.normal(size=(16, 3)), r.normal(size=(16, 1))
    nets = [nn.Sequential(nn.Dense(4, "tanh"), nn.Dense(1)) for _ in range(2)]
    for net, memory in zip(nets, (None, "1MB"), strict=True):
        net.fit(x, y, loss="mse", epochs=2, seed=1, memory=memory)
    assert_equal(nets[1].parameters, nets[0].parameters, "1 MB")
    assert nets[1].compiled.plan().loops == ()
    least = least_of(lambda m: nets[1].gradients(x, y, memory=m))
    assert_equal(nets[1].gradients(x, y, memory=least), nets[1].gradients(x, y), least)


def test_predictions_and_evaluation_know_nothing_of_budgets() -> None:
    case = CASES["LSTM peephole"]
    x, y = case.data()
    x_val, y_val = case.data(40)
    nets = [case.net(), case.net()]
    runs = []
    least = least_of(lambda m: nets[1].fit(x, y, loss="mse", epochs=1, batch_size=130, memory=m, seed=2))
    for net, memory in zip(nets, (None, least), strict=True):
        runs.append(net.fit(x, y, loss="mse", epochs=2, batch_size=130, memory=memory, seed=2, validation=(x_val, y_val)))
    assert runs[0].validation_loss == runs[1].validation_loss
    assert_bits([nets[1].predict(x)], [nets[0].predict(x)])
    assert nets[0].evaluate(x, y) == nets[1].evaluate(x, y)


@pytest.mark.parametrize("rule", [lambda: cr.SGD(0.1, accumulate=2), lambda: cr.optim.LBFGS()], ids=["accumulate", "LBFGS"])
def test_other_ways_to_take_steps(rule: Callable[[], Any]) -> None:
    case = CASES["RNN"]
    x, y = case.data(260)
    found = []
    fit = lambda net, m: net.fit(x, y, loss="mse", optimizer=rule(), epochs=2, batch_size=130, seed=4, memory=m)
    least = least_of(lambda m: fit(case.net(), m))
    for memory in (None, least):
        net = case.net()
        run = fit(net, memory)
        found.append([np.asarray(run.loss), *net.parameters.values()])
    assert_bits(found[1], found[0])


# ---- bytes -------------------------------------------------------------------------------------------------------------------


CELLS: list[Callable[..., nn.Recurrent]] = [nn.RNN, nn.LSTM, nn.GRU]


def random_case(seed: int) -> Case:
    """A stack of one or two recurrent layers, of any cells and sizes, in one direction or both."""
    r = np.random.default_rng(seed)
    rows, steps, depth = int(r.integers(1, 140)), int(r.integers(8, 60)), int(r.integers(1, 3))
    each = bool(r.integers(2))
    kinds = [(CELLS[r.integers(3)], int(r.choice([1, 3, 17, 64])), bool(r.integers(3) == 0)) for _ in range(depth)]

    def layers() -> Iterator[nn.Module]:
        for n, (cell, units, both) in enumerate(kinds):
            layer = cell(units, return_sequences=each or n < depth - 1)
            yield nn.Bidirectional(layer) if both else layer

    return Case(lambda: list(layers()), rows, steps, each, ragged(rows, steps) if rows > 3 and r.integers(3) == 0 else {})


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.slow) if n >= 2 else n for n in range(40)])
def test_the_least_budget_is_exact_and_each_is_kept(seed: int) -> None:
    """The named least is accepted, and is all that is used; a byte less is refused with the same least; more is never exceeded, and
    never means more work."""
    case = random_case(seed)
    net, (x, y) = case.net(), case.data()
    with native(backend_of(level=0)):
        net.fit(x, y, loss="mse", epochs=1, batch_size=case.rows, **case.options)
    plan = net.compiled.plan()
    assert plan.data >= x.size * 4, "a copy of the sequences, at least"
    least = least_of(lambda m: step_within(m, net))
    assert least <= plan.bytes - plan.data
    assert least_of(lambda m: step_within(m, net), least - 1) == least
    extra = []
    for memory, threads in zip((*(least * np.array([1, 1, 1.1, 1.5, 2.2])).astype(int), LARGE), (1, 3, 3, 1, 4, 1), strict=True):
        code = step_within(int(memory), net, threads)
        scratch = code.arena.bytes - sum(b.bytes for b in copies_of_data(i for items in code.plan.phases for i in items))
        assert scratch <= memory, (threads, scratch, memory)
        assert memory > least or threads > 1 or least - 64 * 8 < scratch, (
            "all of it is used, but for what lies between copies of data and others"
        )
        extra.append(sum(plan.advances * work(loop).flops / plan.steps for loop, plan in code.plans))
    assert extra[-1] == 0, "where all fits nothing is computed again"
    assert extra == sorted(extra, reverse=True), "more memory never means more work"


# ---- several loops -----------------------------------------------------------------------------------------------------------


def plans_within(net: nn.Sequential, *shares: float) -> list[list[Any]]:
    """The plans of all loops within some shares of what is kept without a budget."""
    plan = net.compiled.plan()
    return [[p for _, p in step_within(int(share * (plan.bytes - plan.data)), net).plans] for share in shares]


def test_two_loops_use_what_a_budget_leaves_over() -> None:
    """Both in segments of half their steps fit 52 %, with 2,048 extra steps; one of them whole, and the other so, 77 %."""
    net = nn.Sequential(nn.Bidirectional(nn.GRU(32)), nn.Dense(1))
    with native(backend_of(level=0)):
        net.fit(np.ones((16, 2000, 2)), np.ones((16, 1)), epochs=1, batch_size=16)
    plans = plans_within(net, 0.53, 0.55, 0.6, 0.65, 0.8, 0.95)
    extra = [sum(p.advances for p in ps) for ps in plans]
    assert extra == sorted(extra, reverse=True)
    assert extra[0] <= 2048
    assert extra[1] < 2000
    assert extra[-2:] == [1024, 1024]
    assert [sorted(p.kind for p in ps) for ps in plans[-2:]] == [["all", "segments"]] * 2


def test_a_small_loop_is_kept_where_that_costs_little() -> None:
    net = nn.Sequential(nn.LSTM(32, **S), nn.RNN(4), nn.Dense(1))
    with native(backend_of(level=0)):
        net.fit(np.ones((16, 500, 2)), np.ones((16, 1)), epochs=1, batch_size=16)
    for large, small in plans_within(net, 0.6, 0.95):
        assert (large.kind, small.kind) == ("segments", "all")


def test_a_loop_whose_tape_others_read_is_kept_first() -> None:
    """The states that the second layer reads lie in the first one's tape, if that is kept: without it they take as much again."""
    net = nn.Sequential(nn.RNN(8, **S), nn.GRU(8), nn.Dense(1))
    with native(backend_of(level=0)):
        net.fit(np.ones((16, 500, 2)), np.ones((16, 1)), epochs=1, batch_size=16)
    least = least_of(lambda m: step_within(m, net))
    first, second = (p for _, p in step_within(least, net).plans)
    assert (first.kind, second.kind) == ("all", "recursive")
    taken = least - second.bytes
    assert taken < 3 * 500 * 16 * 8 * 4, "the states and two gradients"


# layers, whether there is a loss at each step, and how many numbers each step and row adds to the least budget
GROWING = {
    "one output": (lambda: [nn.LSTM(32)], False, 0),
    "one output, a small layer": (lambda: [nn.LSTM(8)], False, 2),  # the inputs, with rows side by side
    "an output at each step": (lambda: [nn.LSTM(32, **S)], True, 3 * 32 + 1),
    "two layers, one output": (lambda: [nn.LSTM(32, **S), nn.LSTM(32)], False, 2 * 32),
    "three layers, one output": (lambda: [nn.GRU(32, **S), nn.LSTM(16, **S), nn.RNN(32)], False, 2 * (32 + 16)),
    "both directions, then one": (lambda: [nn.Bidirectional(nn.LSTM(32, **S)), nn.LSTM(32)], False, 3 * 64),
    "two layers, an output at each step": (lambda: [nn.LSTM(32, **S), nn.LSTM(32, **S)], True, 5 * 32 + 1),
}


@pytest.mark.parametrize("name", GROWING)
def test_how_the_least_budget_grows_with_time(name: str) -> None:
    layers, each, numbers = GROWING[name]
    least = []
    for steps in (2048, 4096):
        net = nn.Sequential(*layers(), nn.Dense(1))
        y = np.ones((16, steps, 1) if each else (16, 1))
        with native(backend_of(level=0)):
            net.fit(np.ones((16, steps, 2)), y, epochs=1, batch_size=16)
        least.append(least_of(partial(step_within, net=net)))
    assert least[1] - least[0] == pytest.approx(2048 * 16 * numbers * 4, rel=0.01, abs=64)


MEASURED = """
import sys
import numpy as np
from chainrule import nn

def most():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM:"))

def fit(steps, **options):
    net = nn.Sequential(nn.LSTM(64), nn.Dense(1))
    net.fit(np.ones((16, steps, 4), "f4"), np.ones((16, 1), "f4"), epochs=2, batch_size=16, threads=2, verbose=False, **options)

fit(300, memory="5MB")  # what compiling and Python take is there afterwards
before = most()
fit(4000, **eval(sys.argv[1]))
print(most() - before)
"""


def peak_of(cache: Path, **options: Any) -> int:
    """By how many bytes the most memory in use grows, of a fresh process that has to compile both networks."""
    cache.mkdir()
    own = {**os.environ, "CHAINRULE_CACHE": str(cache)}
    made = subprocess.run(
        [sys.executable, "-c", MEASURED, repr(options)], capture_output=True, text=True, check=True, timeout=300, env=own
    )
    return int(made.stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory a process has used")
def test_the_memory_in_use_stays_within_the_budget(tmp_path: Path) -> None:
    data = 2 * 16 * 4000 * 4 * 4  # the sequences, and the batch
    other = 8 * 2**20  # Python's own objects, and what the compiler takes more
    assert peak_of(tmp_path / "within", memory="20MB") <= 1.1 * 20e6 + data + other
    assert peak_of(tmp_path / "plain") >= 16 * 4000 * 64 * 4 * 5, "without a budget the gates and states of all steps are kept"


# ---- the time it takes to compile --------------------------------------------------------------------------------------------


def sizes_of_code(net: nn.Sequential) -> tuple[int, int, int]:
    kernels, loops, llvm = (net.compiled.text(stage).count("\n") for stage in ("kernels", "loops", "llvm"))
    return kernels, loops, llvm


@pytest.mark.parametrize("memory", [None, "300kB"])
def test_code_does_not_grow_with_time(memory: Any) -> None:
    sizes = []
    for steps in (1000, 10_000) if memory else (10, 10_000):
        net = nn.Sequential(nn.LSTM(4), nn.Dense(1))
        net.fit(np.ones((4, steps, 1)), np.ones((4, 1)), loss="mse", epochs=1, memory=memory)
        if memory:
            assert net.compiled.plan().loops[0].kind != "all"
        sizes.append(sizes_of_code(net))
    for short, long in zip(*sizes, strict=True):
        assert long <= 1.6 * short, sizes


# ---- cr.scan -----------------------------------------------------------------------------------------------------------------


def cell(w: Any, v: Any) -> Callable[[Any, Any], Any]:
    def step(state: Any, x: Any) -> Any:
        h, c = state
        c = 0.5 * c + cr.sigmoid(x @ w + h @ v)
        h = np.tanh(c) * cr.sigmoid(h + x @ w)
        return (h, c), h * c

    return step


def arrays(steps: int, rows: int = 130, dtype: str = "f4") -> list[Array]:
    r = np.random.default_rng(steps)
    return [r.normal(size=s).astype(dtype) for s in ((2, 3), (3, 3), (rows, 3), (rows, 3), (steps, rows, 2))]


def loss_of(memory: Any = None, reverse: bool = False) -> Callable[..., Any]:
    def loss(w: Any, v: Any, h: Any, c: Any, xs: Any) -> Any:
        (h, c), ys = cr.scan(cell(w, v), (h, c), xs, memory=memory, reverse=reverse)
        return np.sum(h * c) + np.mean(ys**2)

    return loss


EVERY = (0, 1, 2, 3, 4)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 13, 16])
def test_a_scan_within_a_budget(steps: int, reverse: bool) -> None:
    given = arrays(steps)
    want = cr.grad(loss_of(None, reverse), EVERY)(*given)
    gradient = lambda m: cr.grad(loss_of(m, reverse), EVERY)(*given)
    least = least_of(gradient)
    assert least_of(gradient, least - 1) == least
    for memory in (least, least * 3 // 2):
        assert_bits(gradient(memory), want, memory)


def test_a_scan_of_no_steps_within_a_budget() -> None:
    given = arrays(0)
    loss = lambda m: lambda *a: np.sum(cr.scan(cell(a[0], a[1]), (a[2], a[3]), a[4], memory=m)[0][0])
    assert_bits(cr.grad(loss("1MB"), EVERY)(*given), cr.grad(loss(None), EVERY)(*given))


def test_the_value_of_a_scan_is_that_without_a_budget() -> None:
    given = arrays(5)
    step = cell(given[0], given[1])
    plain, bounded = (cr.scan(step, (given[2], given[3]), given[4], memory=m) for m in (None, 1000))
    assert_bits([*bounded[0], bounded[1]], [*plain[0], plain[1]])


def test_second_derivatives_through_a_scan_within_a_budget() -> None:
    given = arrays(13, 40, "f8")
    w, rest = given[0], given[1:]
    f = lambda m: lambda w: loss_of(m)(w, *rest)
    direction = np.random.default_rng(2).normal(size=w.shape)
    least = least_of(lambda m: cr.hvp(f(m), w, direction))
    want = cr.hvp(f(None), w, direction)
    e = 1e-6
    by_hand = (cr.grad(f(None))(w + e * direction) - cr.grad(f(None))(w - e * direction)) / (2 * e)
    np.testing.assert_allclose(want, by_hand, rtol=1e-6, atol=1e-8)
    for memory in (least, "1GB"):
        assert_bits([cr.hvp(f(memory), w, direction)], [want], memory)


def test_a_layer_whose_own_loop_has_a_budget() -> None:
    class Decaying(nn.Module):
        def __init__(self, memory: Any) -> None:
            self.memory = memory

        def __call__(self, x: Any) -> Any:
            w = self.parameter("w", (2, 2))
            first = np.zeros((x.shape[0], 2), x.dtype)
            return cr.scan(lambda h, x: (np.tanh(h @ w + x), None), first, np.moveaxis(x, 1, 0), memory=self.memory)[0]

    r = np.random.default_rng(0)
    x, y = r.normal(size=(130, 14, 2)), r.normal(size=(130, 1))
    fit = lambda net, m=None: net.fit(x, y, loss="mse", epochs=2, batch_size=130, seed=3, memory=m)
    least = least_of(lambda m: fit(nn.Sequential(Decaying(m), nn.Dense(1))))
    nets = [nn.Sequential(Decaying(m), nn.Dense(1)) for m in (None, least, least + 3000)]
    for net in nets:
        fit(net)
        assert_equal(net.parameters, nets[0].parameters, net[0].memory)
    assert nets[1].compiled.plan().loops[0].kind == "recursive"


# ---- loops with a budget of their own that no plan can cut ---------------------------------------------------------------------


def nested(memory: Any) -> Callable[..., Any]:
    """A loop in each step of a loop: the inner one's gradient stands in the outer one's."""

    def loss(w: Any, xs: Any) -> Any:
        def outer(h: Any, x: Any) -> Any:
            inner = cr.scan(lambda g, _: (np.tanh(g @ w + x), None), h, None, length=9, memory=memory)[0]
            return inner, None

        return np.sum(cr.scan(outer, np.zeros_like(xs[0]), xs)[0])

    return loss


def test_a_loop_that_no_plan_can_cut_is_refused_if_it_keeps_more() -> None:
    r = np.random.default_rng(0)
    given = [r.normal(size=s).astype("f4") for s in ((3, 3), (4, 5, 3))]
    gradient = lambda m: cr.grad(nested(m), (0, 1))(*given)
    with pytest.raises(
        cr.BudgetError, match=r"stands in another, .* so nothing of it is computed again, and [\d,]+ bytes"
    ) as refused:
        gradient(100)
    least = refused.value.least
    assert least % (9 * 5 * 3 * 4) == 0, "arrays of 9 steps"
    with pytest.raises(cr.BudgetError):
        gradient(least - 1)
    assert_bits(gradient(least), gradient(None))


@pytest.mark.parametrize("f", [loss_of, nested], ids=["a loop", "nested loops"])
def test_without_a_backward_pass_any_budget_is_kept(f: Callable[..., Any]) -> None:
    """Nothing is kept for one: each step's inner values are gone when it is over."""
    given = arrays(13)
    given = given if f is loss_of else [given[1], given[4][:, :, [0, 1, 0]]]
    graphs = [graph_of(f(memory), given) for memory in (None, 1)]
    plain, within = [backend_of(None, 1).function(graph) for graph, _ in graphs]
    assert_bits(within(graphs[1][1]), plain(graphs[0][1]))
    assert within.machine.arena == plain.machine.arena
    assert within.machine.code.plans == []
