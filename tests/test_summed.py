"""Sums over an array, added up by the kernel that makes it: which kernels are joined and which are not, values, bits, NaN."""

from __future__ import annotations

import ctypes
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
from chainrule.compiler.hope import hopeful, hopeful_terms
from chainrule.compiler.jit import compile_module
from chainrule.compiler.kernels import Buffer, Item, Kernel, Space, Store, Value, constant, elementwise, load, reduce
from chainrule.compiler.llvm import Layout, Module
from chainrule.compiler.lower import lower
from chainrule.compiler.phases import accesses
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


def changed(kernel: Kernel, **how: Any) -> Kernel:
    return replace(kernel, **how)


def moved() -> list[Kernel]:
    """The sum over rows from the second on, of which the last has been there before."""
    longer, r, u = Buffer("longer", (ROWS + 1, UNITS), F4), Axis("a", ROWS), Axis("b", UNITS)
    value = reduce("sum", load(longer, (of(r) + 1, of(u))), (r,))
    maker = makes()
    maker.stores[:] = [replace(s, buffer=longer) for s in maker.stores]
    return [maker, Kernel("k", (u,), (r,), [Store(Buffer("out", (UNITS,), F4), (of(u),), value)], u)]


def in_panels() -> Kernel:
    """The same columns by two axes."""
    r, p, u = Axis("a", ROWS), Axis("p", 2), Axis("b", UNITS // 2)
    place = of(p) * (UNITS // 2) + of(u)
    return Kernel(
        "k", (p, u), (r,), [Store(Buffer("out", (UNITS,), F4), (place,), reduce("sum", load(D, (of(r), place)), (r,)))], u
    )


def in_halves() -> list[Kernel]:
    """Columns of two halves, one of which has been made."""
    wide, r, p, u = Buffer("wide", (ROWS, 2 * UNITS), F4), Axis("a", ROWS), Axis("p", 2), Axis("b", UNITS)
    maker, place = makes(), of(p) * UNITS + of(u)
    maker.stores[:] = [replace(s, buffer=wide) for s in maker.stores]
    store = Store(Buffer("out", (2 * UNITS,), F4), (place,), reduce("sum", load(wide, (of(r), place)), (r,)))
    return [maker, Kernel("k", (p, u), (r,), [store], u)]


def of_a_diagonal() -> list[Kernel]:
    """What is made of the diagonal of a matrix of which all is summed."""
    cube, r, u = Buffer("x", (6, 6, UNITS), F4, "input"), Axis("r", 6), Axis("u", UNITS)
    maker = Kernel("m", (r, u), (), [Store(Buffer("l", (6, UNITS), F4), (of(r), of(u)), load(cube, (of(r), of(r), of(u))))], u)
    a, b, c = Axis("a", 6), Axis("b", 6), Axis("c", UNITS)
    value = reduce("sum", load(cube, (of(a), of(b), of(c))), (a,))
    return [maker, Kernel("k", (b, c), (a,), [Store(Buffer("out", (6, UNITS), F4), (of(b), of(c)), value)], c)]


def as_one_line() -> Kernel:
    r, u = Axis("a", ROWS), Axis("b", UNITS)
    value = reduce("sum", load(D, (of(r) * UNITS + of(u),), (ROWS * UNITS,)), (r,))
    return Kernel("k", (u,), (r,), [Store(Buffer("out", (UNITS,), F4), (of(u),), value)], u)


def wanted_before() -> list[Kernel]:
    """What is to be written over is still read by another one."""
    sums, u = total(), Axis("u", UNITS)
    old = load(sums.stores[0].buffer, (of(u),))
    return [makes(), Kernel("k", (u,), (), [Store(Buffer("o", (UNITS,), F4), (of(u),), old)], u), sums]


def of_first_rows() -> Kernel:
    """The sum over some of the rows."""
    r, u = Axis("a", ROWS - 1), Axis("b", UNITS)
    return Kernel(
        "k", (u,), (r,), [Store(Buffer("out", (UNITS,), F4), (of(u),), reduce("sum", load(D, (of(r), of(u))), (r,)))], u
    )


def looked_up(into: bool) -> Kernel:
    """d[i, u] = t[r, order[u]] (or d[i, order[u]] = t[r, u])."""
    order = Buffer("order", (UNITS,), np.dtype(np.int64), "input")
    r, u = axes = Axis("r", ROWS), Axis("u", UNITS)
    found = load(order, (of(u),))
    value = load(T, (of(r), of(u) if into else found))
    return Kernel("k", axes, (), [Store(D, (of(r), found if into else of(u)), value)], u)


def sequential(kernel: Kernel) -> Kernel:
    """One that adds up, in the order of its first axis."""
    return replace(kernel, sequential=1, unit=None, stores=[replace(s, mode="add") for s in kernel.stores])


def confined() -> Kernel:
    """A sum over those rows at which something stays inside its bounds."""
    kernel = total()
    (r,), (u,) = kernel.reduced, kernel.domain
    value = reduce("sum", load(D, (of(r), of(u))), (r,), [(of(r) * -1 + 3, 4)])
    return replace(kernel, stores=[replace(kernel.stores[0], value=value)])


def to_an_end() -> Kernel:
    """A sum over rows up to a number that is only known while running."""
    kernel, number = total(), Buffer("number", (), np.dtype(np.int64), "input")
    return replace(kernel, between={kernel.reduced[0]: (constant(0, np.dtype(np.int64)), load(number, ()))})


def over_nothing() -> list[Kernel]:
    """A sum over an axis of one place only."""
    a, b, one = Axis("a", ROWS), Axis("b", UNITS), Axis("c", 1)
    value = reduce("sum", load(D, (of(a), of(b))), (one,))
    return [makes(), Kernel("k", (a, b), (one,), [Store(E, (of(a), of(b)), value)], b)]


def reading(space: Space) -> list[Kernel]:
    """The sum of squares of what is left when a mean is taken away, which has just been stored."""
    mean, u, r = total(out="s", space=space), Axis("b", UNITS), Axis("a", ROWS)
    off = elementwise("subtract", F4, [load(D, (of(r), of(u))), load(mean.stores[0].buffer, (of(u),))])
    value = reduce("sum", elementwise("multiply", F4, [off, off]), (r,))
    return [makes(), mean, Kernel("k", (u,), (r,), [Store(Buffer("v", (UNITS,), F4), (of(u),), value)], u)]


REFUSED: dict[str, list[Kernel]] = {
    "another array": [makes(), total([N])],
    "the other axis": [makes(), total(along=0)],
    "one thread": [makes(), total(shared=False)],
    "units of its own": [changed(makes(), unit=None), changed(total(), unit=Axis("own", 2))],
    "other units": [makes(shared=0), total()],
    "written in between": [makes(), fills(T), total([D, T])],
    "expensive": [makes(op="power"), total()],
    "a result": [makes(Buffer("d", (ROWS, UNITS), F4, "result")), total([T])],
    "earlier": [fills(E), total([D])],
    "other places": moved(),
    "other axes": [makes(), in_panels()],
    "halves": in_halves(),
    "a diagonal": of_a_diagonal(),
    "seen as a line": [makes(), as_one_line()],
    "wanted before": wanted_before(),
    "along what lies innermost": [makes(shared=0), total(along=0)],
    "a maker that sums": [total([T], "e"), total([T])],
    "not all places": [makes(), of_first_rows()],
    "looked up": [looked_up(False), total([T])],
    "stored where it is looked up": [looked_up(True), total([T])],
    "a maker that adds up": [sequential(makes()), total(shared=False)],
    "a sum that adds up": [changed(makes(), unit=None), sequential(total())],
    "a late maker": [changed(makes(), late=True), total()],
    "a late sum": [makes(), changed(total(), late=True)],
    "rows in lanes": [changed(makes(), inner=makes().domain[0]), total()],
    "sums with rows in lanes": [makes(), changed(total(), inner=total().domain[0])],
    "some terms": [makes(), confined()],
    "terms up to an end": [makes(), to_an_end()],
    "a sum over nothing": over_nothing(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_stay_apart(name: str) -> None:
    assert summed(REFUSED[name], HOST) == REFUSED[name]


@pytest.mark.parametrize("space", ["scratch", "result", "state"])
def test_what_has_just_been_stored_is_not_read_there(space: Space) -> None:
    """It is known only when the sum is complete; and of state, the new value would be the old one."""
    made = summed(reading(space), HOST)
    assert names(made) == [["d", "s"], ["v"]] if space != "state" else [["d"], ["s"], ["v"]]
    if space != "state":
        verify(made)


def test_a_sum_of_what_is_the_same_everywhere() -> None:
    kernel = total()
    count = reduce("sum", constant(1, F4), kernel.reduced)
    kernel.stores[:] = [replace(s, value=elementwise("divide", F4, [s.value, count])) for s in kernel.stores]
    made = summed([makes(), kernel], HOST)
    assert len(made) == 1
    verify(made)


def test_sums_over_other_rows_stay_apart_from_those_that_have_been_joined() -> None:
    """Two sums over one array of three axes, each over another."""
    cube, sums = Buffer("cube", (4, 5, 32), F4), []
    a, b, c = axes = Axis("a", 4), Axis("b", 5), Axis("c", 32)
    source = load(Buffer("x", (4, 5, 32), F4, "input"), (of(a), of(b), of(c)))
    maker = Kernel("k", axes, (), [Store(cube, (of(a), of(b), of(c)), source)], c)
    for n, over in enumerate((0, 1)):
        x, y, z = other = Axis(f"x{n}", 4), Axis(f"y{n}", 5), Axis(f"z{n}", 32)
        free = (other[1 - over], z)
        result = Buffer(f"s{n}", tuple(i.extent for i in free), F4)
        value = reduce("sum", load(cube, (of(x), of(y), of(z))), (other[over],))
        sums.append(Kernel(f"k{n}", free, (other[over],), [Store(result, tuple(map(of, free)), value)], z))
    assert names(summed([maker, *sums], HOST)) == [["cube", "s0"], ["s1"]]


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
    with pytest.raises(GraphError, match="adds to what it stores inside of sums"):
        verify([fills(D), inside(lambda term, r: term, lambda r, u: (of(r), of(u)), "add")])
    some = inside(lambda term, r: term, lambda r, u: (of(r), of(u)))
    (term,) = some.stores[1].value.args
    some.stores[1] = replace(some.stores[1], value=reduce("sum", term, some.reduced, [(of(some.reduced[0]) * -1 + 3, 4)]))
    with pytest.raises(GraphError, match="does not store all terms of its sums"):
        verify([some])
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


def test_other_sums_need_not_be_looked_at() -> None:
    """Whole numbers that are counted, for instance."""
    kernel = strong()
    r, u = kernel.reduced[0], kernel.domain[0]
    whole = np.dtype(np.int32)
    counted = reduce("sum", elementwise("cast", whole, [load(N, (of(r), of(u)))]), (r,))
    kernel.stores.append(Store(Buffer("count", (UNITS,), whole), (of(u),), counted))
    products, spread = hopeful_terms(kernel)
    assert len(products) == 1
    assert counted not in spread
    assert kernel.stores[1].value in spread


def test_no_hope_where_what_is_stored_is_not_summed() -> None:
    """NaN would not show in a sum that chooses something else there; nor is what nobody sums looked at where tiles end."""
    kernel = strong()
    (r,), (u,), value = kernel.reduced, kernel.domain, kernel.stores[0].value
    positive = elementwise("less", np.dtype(bool), [constant(0, F4), load(N, (of(r), of(u)))])
    chosen = elementwise("where", F4, [positive, value, constant(0, F4)])
    kernel.stores[1] = replace(kernel.stores[1], value=reduce("sum", chosen, (r,)))
    assert hopeful_terms(kernel) == (frozenset(), frozenset())
    kernel.stores[1] = replace(kernel.stores[1], value=reduce("sum", load(N, (of(r), of(u))), (r,)))
    assert hopeful_terms(kernel) == (frozenset(), frozenset())
    assert hopeful(kernel) == frozenset()


def test_no_hope_for_what_is_the_same_for_all_terms() -> None:
    kernel = strong()
    (r,), (u,) = kernel.reduced, kernel.domain
    same = elementwise("strong_multiply", F4, [load(b, (of(u),)) for b in (Buffer("v", (UNITS,), F4), Buffer("w", (UNITS,), F4))])
    value = elementwise("multiply", F4, [same, load(T, (of(r), of(u)))])
    kernel.stores[:] = [replace(kernel.stores[0], value=value), replace(kernel.stores[1], value=reduce("sum", value, (r,)))]
    assert hopeful_terms(kernel) == (frozenset(), frozenset())


# ---- kernels that run --------------------------------------------------------------------------------------------------------


def computed(kernels: Sequence[Item], **given: Array) -> dict[str, Array]:
    """What kernels store, one after the other, all arrays being the caller's."""
    made = [k for k in kernels if isinstance(k, Kernel)]
    buffers = list(dict.fromkeys(a.buffer for k in made for a in accesses(k)))
    module = Module(Layout({b: n for n, b in enumerate(buffers)}, {}), HOST)
    lines: list[str] = []

    def line(text: str) -> str:
        lines.append(f"  %q{len(lines)} = {text}")
        return f"%q{len(lines) - 1}"

    known: dict[Any, str] = {}
    for k in made:
        module.add(lower(k, schedule(k, HOST), 1, HOST))
        callee = module.known[k.name]
        pointers = [f"ptr {module.pointer(b, line, known)}" for b in callee.buffers]
        lines.append(f"  call void @{callee.name}({', '.join(['ptr %table', 'i64 0', 'i64 1', *pointers])})")
    text = module.text("\n".join(["define void @all(ptr %table) {", *lines, "  ret void", "}"]))
    arrays = {b: np.array(given[b.name], b.dtype) if b.name in given else np.full(b.shape, -77, b.dtype) for b in buffers}
    table = np.array([arrays[b].ctypes.data for b in buffers], np.int64)
    loaded = compile_module(text, HOST)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(loaded.address("all"))(table.ctypes.data)
    return {b.name: a for b, a in arrays.items()}


NUMBERS = np.random.default_rng(0)


def test_whole_numbers_are_counted_beside() -> None:
    """In a kernel with hope for other sums."""
    whole, r, u = np.dtype(np.int32), Axis("a", ROWS), Axis("b", UNITS)
    value = reduce("sum", elementwise("cast", whole, [load(T, (of(r), of(u)))]), (r,))
    counts = Kernel("k_n", (u,), (r,), [Store(Buffer("count", (UNITS,), whole), (of(u),), value)], u)
    items = [makes(op="strong_multiply"), total(), counts]
    (made,) = summed(items, HOST)
    assert isinstance(made, Kernel)
    assert hopeful_terms(made)[0]
    t, g = NUMBERS.integers(-9, 9, (2, ROWS, UNITS))
    found = computed([made], t=t, g=g)
    np.testing.assert_array_equal(found["count"], np.sum(t, axis=0))
    np.testing.assert_array_equal(found["out"], np.sum(t * g, axis=0))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 9, 40])
@pytest.mark.parametrize("by_number", [False, True])
def test_what_is_made_again_is_made_as_it_truly_is(rows: int, by_number: bool) -> None:
    """0 times inf is 0, however many rows there are, and where no lanes can be used, since columns are looked up."""
    t, g, d = (Buffer(name, (rows, UNITS), F4, "scratch" if name == "d" else "input") for name in "tgd")
    order = Buffer("order", (UNITS,), np.dtype(np.int64), "input")
    (r, u), (x, y) = ((Axis(f"{name}0", rows), Axis(f"{name}1", UNITS)) for name in "rx")
    column = load(order, (of(u),)) if by_number else of(u)
    value = elementwise("strong_multiply", F4, [load(t, (of(r), column)), load(g, (of(r), of(u)))])
    maker = Kernel("k_d", (r, u), (), [Store(d, (of(r), of(u)), value)], u)
    sums = reduce("sum", load(d, (of(x), of(y))), (x,))
    reader = Kernel("k_out", (y,), (x,), [Store(Buffer("out", (UNITS,), F4), (of(y),), sums)], y)
    a, b = NUMBERS.integers(-9, 9, (2, rows, UNITS)).astype(F4)
    a[-1], b[-1, ::2] = 0, np.inf
    backwards = np.arange(UNITS)[::-1]
    made = summed([maker, reader], HOST)
    assert len(made) == (1 if rows > 1 else 2)
    found = computed(made, t=a, g=b, order=backwards)
    with np.errstate(invalid="ignore"):
        want = np.where(np.isinf(b), 0, (a[:, backwards] if by_number else a) * b)
    np.testing.assert_array_equal(found["d"], want)
    np.testing.assert_array_equal(found["out"], np.sum(want, axis=0))


# ---- networks ----------------------------------------------------------------------------------------------------------------

NETS: dict[str, Callable[[], tuple[nn.Module, ...]]] = {
    "tanh": lambda: (nn.Dense(256, "tanh"), nn.Dense(1)),
    "narrow": lambda: (nn.Dense(128, "tanh"), nn.Dense(1)),
    "relu": lambda: (nn.Dense(256, "relu"), nn.Dense(1)),
    "gelu, dropout": lambda: (nn.Dense(256, "gelu"), nn.Dropout(0.3), nn.Dense(1)),
    "norm before": lambda: (nn.BatchNorm(), nn.Dense(128, "relu"), nn.Dense(1)),
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
    for rows in ([*range(64)], [*range(40)], *([*range(n)] for n in range(4, 10))):
        made, want = (net.gradients(x[rows], y[rows], backend=b) for b in ("native", "reference"))
        assert wrong == "large" or not all(np.isfinite(v).all() for v in want.values())
        for parameter, value in want.items():
            np.testing.assert_allclose(made[parameter], value, rtol=1e-4, atol=1e-5, err_msg=parameter)
    assert joined
    assert all(hopeful_terms(k)[0] for k in joined)
