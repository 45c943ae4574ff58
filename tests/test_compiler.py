"""The passes of the compiler one by one: texts of their stages, what the verifier refuses, what holds of every schedule (of
the order of kernels and their memory: test_phases.py). That the code computes the right numbers is shown in test_native.py.

Golden texts are in tests/golden. After a change that is meant: `RENEW_GOLDEN=1 python -m pytest tests/test_compiler.py -k golden`, and
read what `git diff tests/golden` says.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from math import ceil, prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native import Threaded, registered
from native_networks import Recurrent
from same import state

import chainrule as cr
import chainrule.run.native
from chainrule import nn
from chainrule.compiler import jit, pipeline
from chainrule.compiler.affine import Affine, Axis, affine, flat, of
from chainrule.compiler.fuse import Sink, fuse
from chainrule.compiler.kernels import Buffer, Kernel, Loop, Store, Value, constant, kernels_of, kernels_text, load, reduce
from chainrule.compiler.pipeline import Code, Given, compile_graph
from chainrule.compiler.schedule import Schedule, balanced, schedule, units
from chainrule.compiler.share import _classes
from chainrule.compiler.simplify import simplify
from chainrule.compiler.target import LEVELS, Target, host, narrowed
from chainrule.compiler.verify import verify
from chainrule.errors import GraphError
from chainrule.graph.node import Type
from chainrule.graph.text import graph_text
from chainrule.graph.trace import build, type_of
from chainrule.losses import losses
from chainrule.normalize import normalize
from chainrule.ops.loop import apply_iota
from chainrule.ops.window import windows
from chainrule.run.backend import backends
from chainrule.train.objective import initial_slots, make_program

Array = np.ndarray
GOLDEN = Path(__file__).parent / "golden"
F4 = np.dtype(np.float32)
KIB = 1024


def fixed(level: str) -> Target:
    """A processor of which nothing is taken from the host."""
    family = "aarch64" if level == "aarch64" else "x86_64"
    caches = {"level1": 32 * KIB, "level2": 512 * KIB, "level3": 8192 * KIB}
    return replace(narrowed(level), triple=f"{family}-unknown-linux-gnu", **caches)


AVX2 = fixed("avx2")


def compiled(
    f: Callable[..., Any], shapes: dict[str, tuple[int, ...]], outputs: Sequence[str], *, state: Sequence[str] = (),
    rows: Sequence[str] = (), whole: Sequence[str] = (), threads: int = 1, target: Target = AVX2, dtype: np.dtype[Any] = F4,
) -> Code:  # fmt: skip
    """A function of arrays of these shapes through all passes. rows: inputs of which a step takes some rows; whole: those that are whole
    numbers."""
    types = {n: Type(s, np.dtype(np.int32) if n in whole else dtype) for n, s in shapes.items()}
    graph = normalize(build(f, list(types.values())))
    given = {n: Buffer(n, t.shape, t.dtype, "state" if n in state else "input") for n, t in types.items()}
    results = [Buffer(n, o.shape, o.dtype, "result") for n, o in zip(outputs, graph.outputs, strict=True)]
    places = [given[n] if n in state else r for n, r in zip(outputs, results, strict=True)]
    slots = {n: i for i, n in enumerate(dict.fromkeys([pipeline.ORDER, *shapes, *outputs]), 2)}
    inputs = [Given(b, b.shape[0] if n in rows else 0) for n, b in given.items()]
    stub = "define internal void @barrier(ptr %state, i64 %threads) {\n  ret void\n}" if threads > 1 else ""
    return compile_graph(
        "entry", graph, inputs, places, [given[n] for n in state], slots, [0 if n in rows else None for n in shapes], target,
        threads=threads, barrier=stub,
    )  # fmt: skip


# ---- golden texts ------------------------------------------------------------------------------------------------------------


def dense(x: Any, w: Any, b: Any) -> Any:
    return [np.tanh(x @ w + b)]


def sgd(w: Any, b: Any, x: Any, y: Any, rate: Any) -> Any:
    def loss(w: Any, b: Any) -> Any:
        return np.mean((np.maximum(x @ w + b, 0) - y) ** 2)

    value, (dw, db) = cr.value_and_grad(loss, (0, 1))(w, b)
    return [value, w - rate * dw, b - rate * db]


def scanned(h: Any, w: Any, xs: Any) -> Any:
    return list(cr.scan(lambda h, x: (np.maximum(h @ w + x, 0), h), h, xs))


def convolution(w: Any, v: Any, x: Any, rate: Any) -> Any:
    def loss(w: Any, v: Any) -> Any:
        y = np.maximum(np.einsum("btck,kcf->btf", windows(x, [1], [2]), w), 0)
        y = np.einsum("btck,kcf->btf", windows(np.pad(y, ((0, 0), (1, 0), (0, 0))), [1], [2]), v)
        return np.mean(np.max(windows(y, [1], [2], [2]), axis=3) ** 2)

    value, (dw, dv) = cr.value_and_grad(loss, (0, 1))(w, v)
    return [value, w - rate * dw, v - rate * dv]


def ragged(w: Any, h: Any, x: Any, lengths: Any, rate: Any) -> Any:
    """h ← max(h w + x_t, 0) as long as t < lengths."""

    def loss(w: Any) -> Any:
        def step(h: Any, now: Any) -> Any:
            inside = np.less(now[1], lengths)[:, None]
            return np.where(inside, np.maximum(h @ w + now[0], 0), h), None

        return np.mean(cr.scan(step, h, (np.moveaxis(x, 1, 0), apply_iota(x.shape[1])))[0] ** 2)

    value, dw = cr.value_and_grad(loss)(w)
    return [value, w - rate * dw]


VARIANTS = {level: (fixed(level), F4) for level in LEVELS if level != "avx2"} | {"float64": (AVX2, np.dtype(np.float64))}


@cache
def example(name: str) -> Code:
    if name in VARIANTS:
        target, dtype = VARIANTS[name]
        return compiled(dense, {"x": (2, 3), "w": (3, 21), "b": (21,)}, ["out"], target=target, dtype=dtype)
    if name == "dense":
        return compiled(dense, {"x": (4, 3), "w": (3, 5), "b": (5,)}, ["out"])
    if name == "sgd":
        shapes = {"w": (3, 5), "b": (5,), "x": (4, 3), "y": (4, 5), "rate": ()}
        return compiled(sgd, shapes, ["loss", "w", "b"], state=["w", "b"], rows=["x", "y"], threads=2)
    if name == "convolution":
        shapes = {"w": (2, 1, 3), "v": (2, 3, 2), "x": (32, 5, 1), "rate": ()}
        return compiled(convolution, shapes, ["loss", "w", "v"], state=["w", "v"], rows=["x"], threads=2)
    if name == "ragged":
        shapes = {"w": (2, 2), "h": (3, 2), "x": (3, 8, 2), "lengths": (3,), "rate": ()}
        return compiled(ragged, shapes, ["loss", "w"], state=["w"], rows=["x", "lengths"], whole=["lengths"], threads=2)
    return compiled(scanned, {"h": (2, 3), "w": (3, 3), "xs": (6, 2, 3)}, ["last", "states"])


EXAMPLES = ("dense", "sgd", "scan", "ragged", "convolution")


STAGES = ("graph", "kernels", "schedules", "memory", "loops", "llvm")


def text_of(code: Code, stage: str) -> str:
    """A stage as text, without anything of this machine."""
    kernels = list(kernels_of(i for items in [code.plan.late, *code.plan.phases] for i in items))
    if stage == "graph":
        return graph_text(code.graph, sources=False)
    if stage == "schedules":
        return "\n".join(f"{k.name}: {schedule(k, AVX2)}, shared out {k.unit}, packed {[*k.packed.values()]}" for k in kernels)
    if stage == "memory":
        places = sorted((start, start + b.bytes, f"{b} {b.dtype}{list(b.shape)}") for b, start in code.arena.offsets.items())
        return "\n".join([*(f"{start}..{end} {what}" for start, end, what in places), f"{code.arena.bytes} bytes"])
    return code.text if stage == "llvm" else code.stage(stage)


@pytest.mark.parametrize(("name", "stage"), [*itertools.product(EXAMPLES, STAGES), *((v, "loops") for v in VARIANTS)])
def test_golden_texts(name: str, stage: str) -> None:
    code, file = example(name), GOLDEN / f"{name}.{stage}.txt"
    text = text_of(code, stage).rstrip("\n") + "\n"
    if os.environ.get("RENEW_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    known = file.read_text(encoding="utf-8") if file.exists() else ""
    if text != known:
        lines = difflib.unified_diff(known.splitlines(), text.splitlines(), f"tests/golden/{file.name}", "now", lineterm="", n=2)
        changed = "\n".join(itertools.islice(lines, 80))
        pytest.fail(
            f"{changed}\nIf this is meant: RENEW_GOLDEN=1 python -m pytest tests/test_compiler.py -k golden", pytrace=False
        )


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.skipif(host().family != "x86_64", reason="llvmlite may know the host's family only")
def test_llvm_accepts_the_golden_texts(name: str) -> None:
    assert "entry:" in jit.assembly(example(name).text, AVX2)


def test_the_text_of_a_program_is_always_the_same() -> None:
    """No name and no order comes from where objects lie in memory."""
    make = code_of.__wrapped__
    kept = [make("normed", 3) for _ in range(4)]
    assert len({c.text for c in kept}) == 1


# ---- long programs -----------------------------------------------------------------------------------------------------------


def lines(function: Callable[[], object]) -> int:
    """How many lines of Python run."""
    count, before = itertools.count(), sys.gettrace()

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            next(count)
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return next(count)


def sliced(x: Any) -> Any:
    """Each row by itself: its gradient is a sum of as many arrays that are 0 but for one row."""
    return sum(np.sum(x[i] * x[i]) for i in range(len(x)))


def looked_at(x: Any) -> Any:
    """Nothing but other places of the same array."""
    for i in range(len(x)):
        x = np.broadcast_to(np.swapaxes(x[i % 3 : i % 3 + 1], 0, 1)[: x.shape[0]], x.shape) if i % 2 else x[::-1, ::-1]
    return [x]


@pytest.mark.parametrize(
    "f", [lambda x: [cr.grad(sliced)(x)], looked_at], ids=["gradients of slices", "swaps, broadcasts and slices"]
)
def test_the_work_of_graph_passes_grows_with_the_length_of_a_program(f: Callable[..., Any]) -> None:
    def work(length: int) -> int:
        graph = normalize(build(f, [Type((length, length), F4)]))
        result = Buffer("out", graph.outputs[0].shape, F4, "result")
        sources = [partial(load, Buffer("x", (length, length), F4, "input"))]
        return lines(lambda: fuse(simplify(graph), sources, [[Sink(result)]], [None]))

    assert work(200) < 2.4 * work(100)


def test_the_work_of_sharing_out_axes_grows_with_the_number_of_kernels() -> None:
    def work(length: int) -> int:
        buffers = [Buffer(f"b{n}", (4, 5), F4) for n in range(length + 1)]
        kernels = [copied(a, b) for a, b in itertools.pairwise(buffers)]
        return lines(lambda: _classes(kernels, {a for k in kernels for a in k.domain}))

    assert work(400) < 2.4 * work(200)


def copied(source: Buffer, target: Buffer) -> Kernel:
    index = tuple(of(Axis("i", n)) for n in source.shape)
    return Kernel("k", tuple(a for i in index for a in i.axes), (), [Store(target, index, load(source, index))])


# ---- loops -------------------------------------------------------------------------------------------------------------------

SEEN: dict[str, Callable[[Any], Any]] = {"transposed": lambda w: w.T, "sliced": lambda w: w[1:], "flipped": lambda w: w[::-1]}
READ: dict[str, Callable[[Any, Any], Any]] = {
    "reshaped": lambda v, i: np.reshape(v, (-1,))[1:4],
    "looked up": lambda v, i: v[i][:3],
}


@pytest.mark.parametrize("read", READ.values(), ids=READ.keys())
@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN.keys())
def test_a_loop_reads_through_what_is_only_seen_otherwise(seen: Callable[..., Any], read: Callable[..., Any]) -> None:
    def f(w: Any, order: Any) -> Any:
        v = seen(w)
        return [cr.scan(lambda h, i: (h * 0.5 + read(v, i), None), np.zeros(3, np.float32), order)[0]]

    w, order = np.arange(20, dtype=np.float32).reshape(5, 4), np.array([0, 2, 1])
    graph = normalize(build(f, [type_of(w), type_of(order)]))
    got, want = (backends[b].function(graph)([w, order, *graph.captures])[0] for b in ("native", "reference"))
    np.testing.assert_allclose(got, want, rtol=1e-6)


# ---- the verifier ------------------------------------------------------------------------------------------------------------

I, J, R, S = Axis("i", 3), Axis("j", 3), Axis("r", 5), Axis("s", 2)
NUMBERS = Buffer("numbers", (4,), np.dtype(np.int64), "input")
A, B, C = Buffer("a", (4, 5), F4, "input"), Buffer("b", (5, 3), F4, "input"), Buffer("c", (4, 3), F4)


def product(**changed: Any) -> Kernel:
    """c[i, j] = Σ a[i, r] b[r, j], with some parts replaced."""
    left, right = changed.get("left", (of(I), of(R))), changed.get("right", (of(R), of(J)))
    term = Value("multiply", F4, (load(A, left), load(B, right)))
    term = replace(term, axes=frozenset[Axis]().union(*(a.axes for a in term.args)))
    value = changed.get("value", reduce("sum", term, changed.get("over", (R,))))
    places = changed.get("places", [(of(I), of(J))])
    stores = [Store(C, p, value, changed.get("mode", "set")) for p in places]
    return Kernel("k", changed.get("domain", (I, J)), changed.get("reduced", (R,)), stores)


def zeros(buffer: Buffer) -> Kernel:
    axes = tuple(Axis("z", n) for n in buffer.shape)
    return Kernel("zeros", axes, (), [Store(buffer, tuple(map(of, axes)), constant(0, buffer.dtype))])


def test_the_verifier_lets_a_product_pass() -> None:
    verify([product()])
    verify([zeros(C), product(places=[(of(I) + of(S), of(J))], domain=(I, J, S), mode="add")])
    nothing, some = Buffer("nothing", (0, 3), F4, "result"), (Axis("n", 0), J)
    verify([Kernel("k", some, (), [Store(nothing, tuple(map(of, some)), constant(1, F4))])])
    verify([Kernel("k", (J, some[0]), (), [Store(nothing, tuple(map(of, some)), constant(1, F4))])])
    empty = Buffer("empty", (3, 0), F4, "result")
    verify([Kernel("k", (J, some[0]), (), [Store(empty, (of(J), of(some[0])), constant(1, F4))])])
    verify([Loop("l", Axis("time", 2), False, [product()], [])])


BROKEN = {
    "an index above its buffer": (product(left=(of(I), of(R) + 1)), "reads a outside of it"),
    "an index below its buffer": (product(left=(of(I) + -1, of(R))), "reads a outside of it"),
    "a stride too long": (product(right=(of(R), of(J) * 2)), "reads b outside of it"),
    "too few indices": (product(left=(of(R),)), "reads a outside of it"),
    "a store outside": (product(places=[(of(I) + 2, of(J))]), "writes c outside of it"),
    "an axis from elsewhere": (product(left=(of(Axis("other", 4)), of(R))), "load depends on an axis from elsewhere"),
    "an equal axis from elsewhere": (product(right=(of(Axis("r", 5)), of(J))), "axis from elsewhere"),
    "a sum over other axes": (product(over=(R, Axis("s", 2))), "sums over other axes than its own"),
    "a sum over too few axes": (product(reduced=(R, Axis("s", 2))), "sums over other axes than its own"),
    "all rows written to the first": (product(places=[(Affine(), of(J))]), "writes elements of c twice"),
    "a store along an axis from elsewhere": (
        product(places=[(of(Axis("n", 4)), of(J))]),
        "writes c along an axis from elsewhere",
    ),
    "two axes along one dimension": (product(places=[(of(S) + of(I), of(J))], domain=(I, J, S)), "writes elements of c twice"),
    "a place that is looked up": (product(places=[(load(NUMBERS, (of(I),)), of(J))]), "writes elements of c twice"),
    "a longer view": (product(value=load(A, (of(I), of(J)), (4, 6))), "reads a as what it is not"),
    "a value of another type": (product(value=load(NUMBERS, (of(I),))), "writes c as what it is not"),
    "a load of another type": (product(value=replace(load(A, (of(I), of(J))), dtype=NUMBERS.dtype)), "reads a as what it is not"),
    "what is not summed": (product(value=load(A, (of(I), of(R)))), "stores what still has a reduced axis"),
}


@pytest.mark.parametrize(("kernel", "problem"), BROKEN.values(), ids=BROKEN.keys())
def test_the_verifier_refuses(kernel: Kernel, problem: str) -> None:
    with pytest.raises(GraphError, match=problem):
        verify([kernel])
    with pytest.raises(GraphError, match=problem):
        verify([Loop("l", Axis("time", 2), False, [kernel], [])])


def test_a_loops_axis_is_known_inside_it_only() -> None:
    time = Axis("time", 4)
    kernel = product(left=(of(time), of(R)))
    verify([Loop("l", time, False, [kernel], [])])
    with pytest.raises(GraphError, match="axis from elsewhere"):
        verify([kernel, Loop("l", time, False, [], [])])


# ---- affine sums -------------------------------------------------------------------------------------------------------------

AXES = tuple(Axis(name, extent) for name, extent in (("i", 1), ("j", 2), ("k", 3), ("l", 5)))
sums = st.builds(affine, st.integers(-9, 30), st.lists(st.tuples(st.sampled_from(AXES), st.integers(-8, 8)), max_size=5))


def points(axes: Sequence[Axis] = AXES) -> Iterator[dict[Axis, int]]:
    for values in itertools.product(*(range(a.extent) for a in axes)):
        yield dict(zip(axes, values, strict=True))


def at(a: Affine, point: dict[Axis, int]) -> int:
    return a.constant + sum(c * point[axis] for axis, c in a.terms)


@given(sums, sums, st.integers(-5, 5))
def test_affine_arithmetic(a: Affine, b: Affine, n: int) -> None:
    for p in points():
        assert at(a + b, p) == at(a, p) + at(b, p)
        assert at(a + n, p) == at(a, p) + n
        assert at(a * n, p) == at(a, p) * n
        assert at(a.without(AXES[2]), p) == at(a, p | {AXES[2]: 0})
    for made in (a, a + b, a * n):
        assert all(c for _, c in made.terms)
        assert len({axis for axis, _ in made.terms}) == len(made.terms)
        assert all(made.coefficient(axis) == dict(made.terms).get(axis, 0) for axis in AXES)
    values = [at(a, p) for p in points()]
    assert (a.smallest, a.largest) == (min(values), max(values))


@given(sums, st.dictionaries(st.sampled_from(AXES), sums))
def test_affine_axes_replaced_all_at_once(a: Affine, table: dict[Axis, Affine]) -> None:
    for p in points():
        assert at(a.replaced(table), p) == at(a, {axis: at(table.get(axis, of(axis)), p) for axis in AXES})


@given(sums, st.integers(1, 9))
def test_affine_quotient_and_remainder(a: Affine, by: int) -> None:
    found = a.divided(by)
    if found is None:
        rest = affine(a.constant % by, [(axis, c) for axis, c in a.terms if c % by])
        assert not all(0 <= at(rest, p) < by for p in points())
        return
    for p in points():
        assert (at(found[0], p), at(found[1], p)) == divmod(at(a, p), by)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_position_in_row_major_order(shape: list[int]) -> None:
    axes = tuple(Axis("i", n) for n in shape)
    position = flat([of(a) for a in axes], shape)
    assert [at(position, p) for p in points(axes)] == list(range(prod(shape)))


# ---- tiles and units ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 30))
def test_tiles_are_as_equal_as_can_be(extent: int, most: int) -> None:
    sizes, end = [], 0
    for start, count, size in balanced(extent, most):
        assert start == end
        assert count > 0
        sizes += [size] * count
        end += count * size
    assert sum(sizes) == end == extent
    assert len(sizes) == ceil(extent / most)
    assert most >= sizes[0] == max(sizes)
    assert sizes[-1] == min(sizes) >= max(sizes) - 1


@given(st.integers(0, 300), st.integers(1, 40))
def test_units_share_out_an_axis(extent: int, threads: int) -> None:
    total, length = units(extent, threads)
    assert total <= threads
    assert total * length >= extent
    assert (total - 1) * length < max(extent, 1)


# ---- programs for what follows -----------------------------------------------------------------------------------------------


NETS: dict[str, tuple[Callable[[], nn.Module], Any, bool]] = {  # network, optimizer, whether its inputs are words
    "plain": (lambda: nn.Sequential(nn.Dense(9, "tanh"), nn.Dense(6, "relu"), nn.Dense(2)), cr.SGD(0.1, momentum=0.9), False),
    "normed": (
        lambda: nn.Sequential(nn.Dense(7, "relu"), nn.BatchNorm(), nn.Dropout(0.3), nn.Dense(5), nn.LayerNorm(), nn.Dense(2)),
        cr.Adam(0.01, clip_norm=1.0),
        False,
    ),
    "words": (lambda: nn.Sequential(nn.Embedding(5, 3), Recurrent(4), nn.Dense(2)), cr.Adam(0.01), True),
}
ROWS = 7


@cache
def code_of(name: str, threads: int) -> Code:
    """A training step through all passes but LLVM, its work cut for so many threads."""
    make, rule, words = NETS[name]
    net, r = make(), np.random.default_rng(0)
    x = r.integers(0, 5, (ROWS, 3)) if words else r.normal(size=(ROWS, 6)).astype(np.float32)
    t = r.normal(size=(ROWS, 2)).astype(np.float32)
    net.fit(x, t, epochs=0, optimizer=rule)
    program = make_program(net._task(losses["mse"](), t, False, rule), ROWS, ("step",))
    start = {**state(net), **initial_slots(rule, net.parameters, np.float32)}
    backend = chainrule.run.native.NativeBackend(AVX2)
    session: Any = backend.session({ROWS: program}, start)
    entry = program.entries["step"]
    dtypes = tuple(program.inputs[i].type.dtype if program.inputs[i].rows is not None else None for i in entry.inputs)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(chainrule.run.native, "machine_code", lambda key, make, target, level: SimpleNamespace(code=make()))
        return backend.entry(program, entry, dtypes, session._slots, storage=session._storage, threads=threads).code


# ---- what is computed again ---------------------------------------------------------------------------------------------------


def test_what_follows_by_little_from_a_shared_value_is_computed_again() -> None:
    """Batch norm with relu: the normalised values are kept, but not what is made of them by a scale and a shift."""

    def f(x: Any, w: Any, scale: Any, v: Any) -> list[Any]:
        a = x @ w
        deviation = a - np.mean(a, axis=0)
        even = deviation / np.sqrt(np.mean(deviation * deviation, axis=0))
        z = even * scale
        back = np.where(z > 0, np.where(z <= 0, 0.0, z) @ v, 0.0)
        return [np.sum(back * even, axis=0)]

    code = compiled(f, {"x": (8, 4), "w": (4, 6), "scale": (6,), "v": (6, 6)}, ["out"])
    every = kernels_of([i for items in code.plan.phases for i in items])
    (kernel,) = (k for k in every if len(k.domain) == 2 and any(v.op == "divide" and len(v.axes) == 2 for v in k.values()))
    assert [s.value.op for s in kernel.stores] == ["divide", "where"]


# ---- schedules ---------------------------------------------------------------------------------------------------------------


def schedules_of(name: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The text and the schedule of each kernel that computes anything, wherever what it reads may lie: copies of the state are made by
    one thread, or by each for itself."""
    made: dict[str, str] = {}

    def recorded(kernel: Kernel, target: Target) -> Schedule:
        found = schedule(kernel, target)
        if any(s.value.op != "load" for s in kernel.stores):
            text = re.sub(r"= [\w/.]+\[.*\]", "= load", kernels_text([kernel]))
            made[kernel.name] = f"{text}\n{found} {found.inner_rows} {found.across}"
        return found

    monkeypatch.setattr(pipeline, "schedule", recorded)
    code = code_of.__wrapped__(name, threads)
    assert made.keys() <= {k.name for items in code.plan.phases for k in kernels_of(items)}
    return made


@pytest.mark.parametrize("name", NETS)
def test_nothing_that_settles_an_order_depends_on_the_number_of_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = schedules_of(name, 1, monkeypatch)
    for threads in range(2, 6):
        assert schedules_of(name, threads, monkeypatch) == one


def accumulators(kernel: Kernel, made: Schedule) -> int:
    """Registers that hold sums in the innermost loop."""
    total = 0
    for v in kernel.values():
        if v.op == "reduce":
            rows = made.rows if made.tile in v.axes else 1
            total += rows * (made.vectors if made.lanes in v.axes else 1) * made.chains
    return total


SIZES = st.sampled_from([1, 2, 3, 5, 8, 17, 64, 100, 257])


@pytest.mark.parametrize("level", LEVELS)
@given(SIZES, SIZES, SIZES, st.sampled_from(["plain", "left", "right"]))
def test_sums_of_products_fit_into_registers(level: str, m: int, k: int, n: int, turned: str) -> None:
    target = fixed(level)
    shapes = {"a": (k, m) if turned == "left" else (m, k), "b": (n, k) if turned == "right" else (k, n)}
    spec = {"plain": "mk,kn->mn", "left": "km,kn->mn", "right": "mk,nk->mn"}[turned]
    code = compiled(lambda a, b: [np.einsum(spec, a, b)], shapes, ["c"], target=target)
    for kernel in kernels_of([i for items in code.plan.phases for i in items]):
        made = schedule(kernel, target)
        assert made.width * 4 <= target.vector_bytes
        assert made.width & (made.width - 1) == 0
        assert accumulators(kernel, made) < target.registers
        assert made.unroll % made.chains == 0


@pytest.mark.parametrize(("length", "most"), [(1000, 12), (1024, 6), (2048, 6)])
def test_rows_of_a_tile_fit_into_a_set_of_the_cache(length: int, most: int) -> None:
    """Lines that lie a multiple of 4096 bytes apart share one set."""
    target = fixed("avx512")
    code = compiled(lambda a, b: [a @ b], {"a": (120, length), "b": (length, 16)}, ["c"], target=target)
    (kernel,) = kernels_of([i for items in code.plan.phases for i in items])
    assert schedule(kernel, target).rows == most


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", NETS)
def test_sums_of_programs_fit_into_registers(name: str, level: str) -> None:
    target = fixed(level)
    for kernel in kernels_of([i for items in code_of(name, 1).plan.phases for i in items]):
        assert accumulators(kernel, schedule(kernel, target)) < target.registers, kernel.name


# ---- the order of long sums --------------------------------------------------------------------------------------------------


def trained(threads: int, level2: int) -> list[bytes]:
    """Weights after steps with sums over 700 elements, for a processor with such a cache."""
    r = np.random.default_rng(0)
    x, t = r.normal(size=(192, 700)).astype(np.float32), r.normal(size=(192, 3)).astype(np.float32)
    net = nn.Sequential(nn.Dense(64, "tanh"), nn.Dense(3))
    with registered(Threaded(threads, target=replace(host(), level1=4 * KIB, level2=level2))) as name:
        net.fit(x, t, epochs=1, batch_size=96, seed=0, backend=name, optimizer=cr.SGD(0.01), verbose=False)
    return [v.tobytes() for v in net.parameters.values()]


def test_the_order_of_long_sums_does_not_depend_on_threads() -> None:
    assert trained(8, 16 * KIB) == trained(1, 16 * KIB)


def test_the_order_of_long_sums_does_not_depend_on_caches() -> None:
    assert trained(1, 16 * KIB) == trained(1, 8192 * KIB)


@pytest.mark.parametrize(("columns", "widths"), [(12, {8, 4}), (16, {8}), (13, {8}), (3, {4}), (9, {8, 4})])
def test_the_last_vector_is_half_as_wide_where_that_holds_the_rest(columns: int, widths: set[int]) -> None:
    code = compiled(dense, {"x": (4, 3), "w": (3, columns), "b": (columns,)}, ["out"])  # for AVX2
    assert {int(n) for n in re.findall(r"float32x(\d+) = (?:combine|fma)", code.stage("loops"))} == widths
