"""Sums over an array, added up by the kernel that makes it: which kernels are joined and which are not, values, bits, NaN."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from native import WIDTHS, Threaded, backend_of, registered
from same import assert_same, state

import chainrule as cr
from chainrule import nn
from chainrule.compiler import pipeline
from chainrule.compiler.affine import Affine, Axis, of
from chainrule.compiler.hope import hopeful_terms
from chainrule.compiler.kernels import Buffer, Item, Kernel, Space, Store, Value, elementwise, load, reduce
from chainrule.compiler.schedule import schedule
from chainrule.compiler.summed import summed
from chainrule.compiler.target import LEVELS, Target, host, narrowed
from chainrule.compiler.verify import verify
from chainrule.errors import GraphError
from chainrule.run import machines

Array = np.ndarray
F4 = np.dtype(np.float32)
ROWS, UNITS = 6, 32
T, G, N, M = (Buffer(name, (ROWS, UNITS), F4, "input") for name in "tgnm")
D, E = (Buffer(name, (ROWS, UNITS), F4) for name in "de")
HOST = host()

# ---- kernels -----------------------------------------------------------------------------------------------------------------


def makes(into: Buffer = D, op: str = "multiply", shared: int = 1, reads: Sequence[Buffer] = (T, G)) -> Kernel:
    """into = t · g, cut along columns."""
    r, u = axes = Axis("r", ROWS), Axis("u", UNITS)
    args = [load(b, (of(r), of(u))) for b in reads]
    return Kernel(f"k_{into}", axes, (), [Store(into, (of(r), of(u)), elementwise(op, F4, args))], axes[shared])


def total(
    reads: Sequence[Buffer] = (D,), out: str = "out", *, along: int = 1, shared: bool = True, space: Space = "scratch"
) -> Kernel:
    """The sum of the product of these arrays over rows, for each column; or (along 0) over columns, for each row."""
    axes = Axis("a", ROWS), Axis("b", UNITS)
    free, over = axes[along], axes[1 - along]
    value: Value | None = None
    for buffer in reads:
        one = load(buffer, (of(axes[0]), of(axes[1])))
        value = one if value is None else elementwise("multiply", F4, [value, one])
    assert value is not None
    result = Buffer(out, (free.extent,), F4, space)
    return Kernel(
        f"k_{out}", (free,), (over,), [Store(result, (of(free),), reduce("sum", value, (over,)))], free if shared else None
    )


def fills(out: Buffer, reads: Buffer = N) -> Kernel:
    r, u = Axis("x", ROWS), Axis("y", UNITS)
    return Kernel(f"k_{out}", (r, u), (), [Store(out, (of(r), of(u)), load(reads, (of(r), of(u))))], u)


def names(kernels: Sequence[Item]) -> list[list[str]]:
    return [[s.buffer.name for s in k.stores] for k in kernels if isinstance(k, Kernel)]


def test_who_makes_an_array_sums_it() -> None:
    """And what it is made of; in the place of the first of them, so that what comes next may read all of it."""
    made = summed([makes(), fills(E, D), total(out="a"), total([T, N], "b"), total([M], "c")], HOST)
    assert names(made) == [["d", "a", "b"], ["e"], ["c"]]
    verify(made)
    kernel = made[0]
    assert isinstance(kernel, Kernel)
    assert [s.buffer for s in kernel.inside()] == [D]
    assert [v.buffer for v in kernel.loads()] == [T, G, N]  # none of them twice, and D not at all
    assert kernel.reduced[0].extent == ROWS


@pytest.mark.parametrize(
    "items",
    [
        [makes(), total([N])],
        [makes(), total(along=0)],
        [makes(), total(shared=False)],
        [makes(shared=0), total()],
        [makes(), fills(T), total([D, T])],
        [makes(op="power"), total()],
        [makes(Buffer("d", (ROWS, UNITS), F4, "result")), total([T])],
        [fills(E), total([D])],
    ],
    ids=[
        "another array",
        "the other axis",
        "one thread",
        "other units",
        "written in between",
        "expensive",
        "a result",
        "earlier",
    ],
)
def test_others_stay_apart(items: list[Kernel]) -> None:
    assert summed(items, HOST) == items


def test_state_is_written_when_nobody_wants_the_old_one() -> None:
    reader, writer = fills(E), total(out="w", space="state")
    state = writer.stores[0].buffer
    assert names(summed([reader, makes(), writer], HOST)) == [["e"], ["d", "w"]]
    later = Kernel("k", (u := Axis("u", UNITS),), (), [Store(Buffer("o", (UNITS,), F4), (of(u),), load(state, (of(u),)))], u)
    items = [makes(), later, writer]
    assert summed(items, HOST) == items
    items = [makes(), writer, later]
    assert summed(items, HOST) == items
    later.late = True  # it reads the new one
    assert names(summed(items, HOST)) == [["d", "w"], ["o"]]


def test_state_is_read_only_where_it_is_written() -> None:
    state = Buffer("w", (UNITS,), F4, "state")
    for turned, fits in ((False, True), (True, False)):
        r, u = axes = Axis("r", ROWS), Axis("u", UNITS)
        old = load(state, (of(u) * -1 + (UNITS - 1) if turned else of(u),))
        product = elementwise("multiply", F4, [load(T, (of(r), of(u))), old])
        sums = total(space="state")
        sums.stores[:] = [replace(sums.stores[0], buffer=state)]
        made = summed([Kernel("k", axes, (), [Store(D, (of(r), of(u)), product)], u), sums], HOST)
        assert (len(made) == 1) is fits


def test_a_kernel_has_few_sums() -> None:
    made = summed([makes(), *(total([D, T][: 1 + n % 2] * (1 + n // 2), f"s{n}") for n in range(6))], HOST)
    assert names(made)[0] == ["d", "s0", "s1", "s2", "s3"]


def test_large_arrays_are_gone_through_in_their_order() -> None:
    items = [makes(), total()]
    assert len(summed(items, replace(HOST, level2=D.bytes))) == 1
    assert summed(items, replace(HOST, level2=D.bytes - 1)) == items


@pytest.mark.parametrize("level", LEVELS)
def test_lanes_go_along_what_is_stored(level: str) -> None:
    """Also where a sum over lanes would look cheaper."""
    (kernel,) = summed([makes(), total()], narrowed(level))
    assert isinstance(kernel, Kernel)
    made = schedule(kernel, narrowed(level))
    assert made.lanes in kernel.domain
    assert made.rows == 1


# ---- what the verifier says --------------------------------------------------------------------------------------------------


def inside(value: Callable[[Value, Axis], Value], index: Callable[[Axis, Axis], tuple[Affine, ...]], mode: Any = "set") -> Kernel:
    """d[index] = value(t · g) for each term of a sum of t · g, and the sum."""
    r, u = Axis("r", ROWS), Axis("u", UNITS)
    term = elementwise("multiply", F4, [load(T, (of(r), of(u))), load(G, (of(r), of(u)))])
    out = Buffer("out", (UNITS,), F4)
    stores = [Store(D, index(r, u), value(term, r), mode), Store(out, (of(u),), reduce("sum", term, (r,)))]
    return Kernel("k", (u,), (r,), stores, u)


def test_what_is_stored_for_each_term_is_a_term() -> None:
    verify([inside(lambda term, r: term, lambda r, u: (of(r), of(u)))])
    with pytest.raises(GraphError, match="stores sums inside of sums"):
        verify([inside(lambda term, r: reduce("sum", term, (r,)), lambda r, u: (of(r), of(u)))])
    with pytest.raises(GraphError, match="adds up what it stores inside of sums"):
        verify([fills(D), inside(lambda term, r: term, lambda r, u: (of(r), of(u)), "add")])
    with pytest.raises(GraphError, match="writes elements of d twice"):
        verify([inside(lambda term, r: term, lambda r, u: (of(r), Affine()))])
    with pytest.raises(GraphError, match="stores what still has a reduced axis"):
        verify([inside(lambda term, r: term, lambda r, u: (Affine(), of(u)))])


# ---- hope --------------------------------------------------------------------------------------------------------------------


def strong(op: str = "strong_multiply", of_sum: bool = True, chosen: bool = False) -> Kernel:
    """d = strong(t, g), summed or not."""
    r, u = Axis("r", ROWS), Axis("u", UNITS)
    t, g = (load(b, (of(r), of(u))) for b in (T, G))
    value = elementwise(op, F4, [t, g])
    if chosen:
        value = elementwise("where", F4, [elementwise("less", np.dtype(bool), [value, g]), t, g])
    total = reduce("sum" if of_sum else "max", value, (r,))
    stores = [Store(D, (of(r), of(u)), value), Store(Buffer("out", (UNITS,), F4), (of(u),), total)]
    return Kernel("k", (u,), (r,), stores, u)


@pytest.mark.parametrize(
    ("kernel", "hoped"),
    [(strong(), 1), (strong("strong_divide"), 1), (strong("multiply"), 0), (strong(of_sum=False), 0), (strong(chosen=True), 0)],
    ids=["product", "quotient", "plain", "largest", "chosen by it"],
)
def test_hope_for_terms_where_nan_shows_in_a_sum(kernel: Kernel, hoped: int) -> None:
    assert len(hopeful_terms(kernel)[0]) == hoped


def test_no_hope_where_what_is_stored_is_not_summed() -> None:
    kernel = strong()
    r, u = kernel.reduced[0], kernel.domain[0]
    kernel.stores[1] = replace(kernel.stores[1], value=reduce("sum", load(N, (of(r), of(u))), (r,)))
    assert hopeful_terms(kernel) == (frozenset(), frozenset())


# ---- networks ----------------------------------------------------------------------------------------------------------------

NETS: dict[str, Callable[[], tuple[nn.Module, ...]]] = {
    "tanh": lambda: (nn.Dense(256, "tanh"), nn.Dense(1)),
    "narrow": lambda: (nn.Dense(128, "tanh"), nn.Dense(1)),
    "relu": lambda: (nn.Dense(256, "relu"), nn.Dense(1)),
    "gelu, dropout": lambda: (nn.Dense(256, "gelu"), nn.Dropout(0.3), nn.Dense(1)),
    "norm": lambda: (nn.Dense(256), nn.BatchNorm(), nn.Activation("tanh"), nn.Dense(1)),
}


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> list[Kernel]:
    """The kernels that store terms of sums, of all that is compiled."""
    found: list[Kernel] = []

    def watched(items: Sequence[Item], target: Target) -> list[Item]:
        made = summed(items, target)
        found.extend(i for i in made if isinstance(i, Kernel) and i.inside())
        return made

    monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path))
    monkeypatch.setattr(machines, "_machines", OrderedDict())
    monkeypatch.setattr(pipeline, "summed", watched)
    return found


def data(rows: int) -> tuple[Array, Array]:
    r = np.random.default_rng(0)
    return r.normal(size=(rows, 20)).astype("f4"), r.normal(size=(rows, 1)).astype("f4")


def learnt(name: str, backend: str, batch: int) -> dict[str, Array]:
    net = nn.Sequential(*NETS[name]())
    net.fit(
        *data(3 * batch), loss="mse", optimizer=cr.SGD(0.01), epochs=1, batch_size=batch, seed=0, backend=backend, verbose=False
    )
    return state(net)


@pytest.mark.parametrize("batch", [2, 7, 64])
@pytest.mark.parametrize("name", NETS)
def test_networks_learn_the_same(name: str, batch: int, joined: list[Kernel]) -> None:
    """As NumPy has it, with the same bits for every number of threads."""
    states = []
    for threads in (1, 2, 3):
        with registered(Threaded(threads)) as backend:
            states.append(learnt(name, backend, batch))
    assert joined or batch < 64
    for other in states[1:]:
        assert_same(states[0], other)
    for parameter, value in learnt(name, "reference", batch).items():
        np.testing.assert_allclose(states[0][parameter], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", WIDTHS)
def test_long_batches_at_every_width(width: str, joined: list[Kernel]) -> None:
    """Whose sums are taken in parts."""
    with registered(backend_of(width)) as backend:
        made = learnt("narrow", backend, 1100)
    assert joined
    for parameter, value in learnt("narrow", "reference", 1100).items():
        np.testing.assert_allclose(made[parameter], value, rtol=1e-4, atol=1e-5)


WRONG: dict[str, Callable[[Any], Any]] = {  # of a large number: what is not finite
    "inf": lambda y: np.exp(y),
    "-inf": lambda y: -np.exp(y),
    "nan": lambda y: np.exp(y) - np.exp(y) + y,
    "large": lambda y: np.minimum(np.exp(y), 3e38),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_finite_is_where_it_is_in_numpy(wrong: str, joined: list[Kernel]) -> None:
    """The derivative of a saturated tanh is 0, and 0 times anything is 0 on the way back; so where some rows want steps as large as can
    be, sums are made again."""

    def loss(scores: Any, target: Any) -> Any:
        return np.mean(scores * WRONG[wrong](target))

    net, (x, y) = nn.Sequential(nn.Dense(256, "tanh"), nn.Dense(1)), data(64)
    net.fit(x, y, loss=loss, epochs=0)
    x[:40] *= 1e6
    y[[3, 50]] = 1000
    for rows in ([*range(64)], [*range(40)]):
        made, want = (net.gradients(x[rows], y[rows], backend=b) for b in ("native", "reference"))
        assert wrong == "large" or not all(np.isfinite(v).all() for v in want.values())
        for parameter, value in want.items():
            np.testing.assert_allclose(made[parameter], value, rtol=1e-4, atol=1e-5, err_msg=parameter)
    assert joined
    assert all(hopeful_terms(k)[0] for k in joined)
