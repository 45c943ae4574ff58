"""compiler/code.py and operators.py: each elementwise core form against its NumPy definition, memory with guard bytes, lanes, random bits.

All functions of one level of the processor are compiled in one module.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import llvmlite.binding as llvm
import numpy as np
import pytest
from elementary_harness import LEVELS, assembly, machine

import chainrule.ops  # noqa: F401
from chainrule.compiler import operators
from chainrule.compiler.code import Block, Reg, constant_value
from chainrule.graph.node import DTYPES, OPS, Type
from chainrule.ops.random import philox

WIDTHS = (1, 4, 16)
# In ulp of float32 and of float64; NumPy's power is up to 1 off itself, and float64's erf and normal_cdf are defined to 1e-15.
BOUND = dict.fromkeys(
    ["exp", "expm1", "log", "log1p", "sin", "cos", "tan", "tanh", "arctan", "arcsin", "arccos", "arccosh"], (4, 2)
) | {
    **dict.fromkeys(["logistic", "tanh_softplus"], (4, 4)),
    "power": (4, 2),
    "erf": (4, 6),
    "normal_cdf": (4, 8),
}
FORMS = [name for name in OPS if OPS[name].elementwise]
GUARD = 0xA5


# ---- compiling ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    fma: bool = True
    rounding: bool = True
    vector_bytes: int = 64


def features(level: str) -> Features:
    return Features(LEVELS[level][1], LEVELS[level][2], {"host": 64, "avx2": 32, "avx": 32, "sse2": 16}[level])


class Module:
    """Functions (ptr, ptr, ...) -> nothing, straight-line or a loop, compiled together."""

    def __init__(self, target: Features) -> None:
        self.target, self.functions = target, []
        self.declarations: set[str] = set()
        self.helpers: dict[str, str] = {}

    def add(self, arity: int, write: Callable[..., None]) -> str:
        """write(block, pointers) fills the function."""
        block = Block(self.target)
        write(block, *[f"%p{i}" for i in range(arity)])
        return self._function(arity, "entry:\n" + "\n".join(block.lines), block)

    def loop(self, dtypes, width: int, write: Callable[..., Reg], result) -> str:
        """A function over arrays: result[i] = write(block, arguments[i]...); it takes their pointers, the result's, one for n."""
        block = Block(self.target)
        block.label = "loop"
        places = [block.line(f"getelementptr i8, ptr %p{k}, i64 {b}") for k, b in self._offsets(block, [*dtypes, result])]
        args = [block.load(p, d, width) for p, d in zip(places, dtypes, strict=False)]
        y = write(block, *args)
        assert (y.dtype, y.width) == (result, width)
        block.store(places[-1], y)
        body = "\n".join(block.lines)
        n = f"%p{len(dtypes) + 1}"
        return self._function(
            len(dtypes) + 2,
            f"entry:\n  %n = load i64, ptr {n}\n  br label %loop\nloop:\n  %i = phi i64 [ 0, %entry ], [ %j, %{block.label} ]\n{body}\n"
            f"  %j = add i64 %i, {width}\n  %more = icmp ult i64 %j, %n\n  br i1 %more, label %loop, label %end\nend:",
            block,
        )

    @staticmethod
    def _offsets(block, dtypes):
        return [(k, block.line(f"mul i64 %i, {d.itemsize}")) for k, d in enumerate(dtypes)]

    def _function(self, arity: int, body: str, block: Block) -> str:
        name = f"f{len(self.functions)}"
        self.declarations |= block.declarations
        for key, helper in block.helpers.items():
            assert self.helpers.setdefault(key, helper) == helper
        head = f"define void @{name}({', '.join(f'ptr %p{i}' for i in range(arity))}) {{\n"
        self.functions.append(head + body + "\n  ret void\n}")
        return name

    def text(self) -> str:
        return "\n".join([*sorted(self.declarations), *self.helpers.values(), *self.functions])

    def compile(self, level: str) -> Callable[..., None]:
        """call(name, *arrays)"""
        module = llvm.parse_assembly(self.text())
        module.verify()
        self.engine = llvm.create_mcjit_compiler(module, machine(level))
        self.engine.finalize_object()

        def call(name, *arrays):
            pointers = [a.ctypes.data for a in arrays]
            function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(arrays))
            function(self.engine.get_function_address(name))(*pointers)

        return call


# ---- arguments ---------------------------------------------------------------------------------------------------------------


def edges(dtype) -> np.ndarray:
    """Where a form may go wrong."""
    if dtype.kind == "b":
        return np.array([False, True])
    if dtype.kind == "f":
        f = np.finfo(dtype)
        sizes = [0.0, np.inf, np.nan, 1, 0.5, 2, 3, 2.5, 7, 1e5 + 1, f.tiny, f.smallest_subnormal, f.tiny / 4, f.max, f.eps]
        return np.array([s * v for v in sizes for s in (1, -1)], dtype)
    info = np.iinfo(dtype)
    bits = info.bits
    values = [0, 1, 2, 3, 5, 7, 8, bits - 1, bits, bits + 1, info.max, info.max - 1, info.max // 2, info.max // 3]
    if dtype.kind == "i":
        values += [*[-v for v in values], info.min, info.min // 2]
    return np.array([v for v in values if info.min <= v <= info.max], dtype)


def scattered(dtype, n: int, rng) -> np.ndarray:
    if dtype.kind == "f":
        anywhere = rng.integers(0, 256, n * dtype.itemsize, dtype=np.uint8).view(dtype)
        return np.concatenate([anywhere, rng.normal(size=n).astype(dtype), (rng.normal(size=n) * 30).astype(dtype)])
    if dtype.kind == "b":
        return rng.integers(0, 2, n).astype(bool)
    return np.concatenate(
        [rng.integers(0, 256, n * dtype.itemsize, dtype=np.uint8).view(dtype), rng.integers(0, 90, n).astype(dtype)]
    )


def arguments(name: str, dtypes) -> list[np.ndarray]:
    """Edge values with one another and random ones, as many as a multiple of every width; and the form's own examples."""
    rng = np.random.default_rng(7)
    grid = [g.ravel() for g in np.meshgrid(*[edges(d) for d in dtypes])]
    random = [scattered(d, 48, rng) for d in dtypes]
    length = max(len(r) for r in random)
    columns = [[g, np.resize(r, length)] for g, r in zip(grid, random, strict=True)]
    for example, _ in OPS[name].examples(rng):
        if all(value.dtype == dtype for value, dtype in zip(example, dtypes, strict=True)):
            for column, value in zip(columns, example, strict=True):
                column.append(np.ravel(value))
    joined = [np.concatenate(c) for c in columns]
    return [np.concatenate([c, np.resize(c, -len(c) % max(WIDTHS))]) for c in joined]


@dataclass(frozen=True)
class Case:
    name: str
    dtypes: tuple[np.dtype, ...]
    result: np.dtype
    attrs: tuple[tuple[str, object], ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {' '.join(map(str, self.dtypes))} -> {self.result}"


def cases() -> list[Case]:
    """Every form at every combination of types that its `infer` takes and for which NumPy's result has the type it says."""
    found = []
    for name in FORMS:
        op = OPS[name]
        arity = max(len(example) for example, _ in op.examples(np.random.default_rng(0)))
        all_attrs = [(("dtype", d),) for d in DTYPES] if name == "cast" else [()]
        candidates = [(np.dtype(bool), d, d) for d in DTYPES] if name == "where" else [(d,) * arity for d in DTYPES]
        for dtypes, attrs in product(candidates, all_attrs):
            try:
                inferred = op.infer(*[Type((), d) for d in dtypes], **dict(attrs))
                with np.errstate(all="ignore"):
                    given = op.value(*[np.ones(1, d) for d in dtypes], **dict(attrs))
            except TypeError:  # also DtypeError
                continue
            if given.dtype == inferred.dtype:
                found.append(Case(name, dtypes, inferred.dtype, attrs))
    return found


CASES = cases()


def in_range(case: Case, args) -> np.ndarray:
    """Where the definition promises a value: floats cast to integers must fit."""
    if case.name != "cast" or case.dtypes[0].kind != "f" or case.result.kind not in "iu":
        return np.ones(np.shape(args[0]), bool)
    info, whole = np.iinfo(case.result), np.trunc(args[0].astype(np.float64))
    return (whole >= float(info.min)) & (whole < 2.0 ** (info.bits - (case.result.kind == "i")))


def ordered(x: np.ndarray) -> np.ndarray:
    """Floats as integers in their order, neighbours one apart."""
    integers = {4: np.int32, 8: np.int64}[x.itemsize]
    bits = x.view(integers).astype(np.int64)
    return np.where(bits < 0, -(bits & np.iinfo(integers).max), bits)


def agree(case: Case, got, expected, args, label) -> None:
    keep = in_range(case, args)
    got, expected, args = got[keep], expected[keep], [a[keep] for a in args]
    if case.result.kind != "f":
        wrong = got != expected
    else:
        nan = np.isnan(expected)
        assert (np.isnan(got) == nan).all(), (str(case), label, [a[np.isnan(got) != nan][:3] for a in args])
        bound = BOUND.get(case.name, (0, 0))[case.result.itemsize // 4 - 1]
        wrong = ~nan & (np.abs(ordered(got) - ordered(expected)) > bound)
        if case.name in ("maximum", "minimum"):  # NumPy promises no sign of zero
            wrong &= got != expected
        else:
            wrong |= ~nan & (np.signbit(got) != np.signbit(expected))
    assert not wrong.any(), (str(case), label, [a[wrong][:3] for a in args], got[wrong][:3], expected[wrong][:3])


# ---- core forms --------------------------------------------------------------------------------------------------------------


def form_of(case: Case) -> Callable[..., Reg]:
    return lambda b, *args: operators.elementwise(b, case.name, dict(case.attrs), case.result, *args)


def form_module(level: str, widths=WIDTHS) -> tuple[Module, dict]:
    module = Module(features(level))
    return module, {(c, width): module.loop(c.dtypes, width, form_of(c), c.result) for c, width in product(CASES, widths)}


def run(call, name, args, dtype):
    out = np.empty(len(args[0]), dtype)
    call(name, *args, out, np.array(len(out)))
    return out


def bits(x: np.ndarray) -> np.ndarray:
    """Without NaN's payload."""
    return np.where(np.isnan(x), 0, x.view({4: np.int32, 8: np.int64}[x.itemsize])) if x.dtype.kind == "f" else x


def test_every_elementwise_form_is_there():
    assert {c.name for c in CASES} == set(FORMS)


@pytest.mark.parametrize(("level", "widths"), [("host", WIDTHS), ("avx2", (16,)), ("sse2", WIDTHS)])
def test_forms_are_numpys_at_every_width(level, widths):
    module, names = form_module(level, widths)
    call = module.compile(level)
    for case in CASES:
        args = arguments(case.name, case.dtypes)
        with np.errstate(all="ignore"):
            expected = OPS[case.name].value(*args, **dict(case.attrs))
        results = [run(call, names[case, width], args, case.result) for width in widths]
        agree(case, results[0], expected, args, level)
        for other in results[1:]:
            assert (bits(other) == bits(results[0])).all(), (str(case), level)


def test_the_comparison_sees_small_errors():
    case = Case("add", (np.dtype("f4"),) * 2, np.dtype("f4"))
    x = np.array([1, -0.0, np.nan, 3], "f4")
    agree(case, x, x.copy(), [x, x], "")
    for i, wrong in enumerate((np.nextafter(np.float32(1), np.float32(2)), 0.0, 1.0, np.nan)):
        y = x.copy()
        y[i] = wrong
        with pytest.raises(AssertionError):
            agree(case, y, x, [x, x], "")


FOLDED = ("power", "strong_multiply", "strong_divide", "maximum", "minimum", "right_shift", "remainder")
CONSTANTS = (0, 0.0, -0.0, 1, 2, 3, -1, 0.5, -0.5, 7, 31, 32, np.inf, -np.inf, np.nan, 1e-40)
FOLDED_TYPES = [np.dtype(t) for t in ("f4", "f8", "i4", "u1")]


def fits(value, dtype) -> bool:
    return dtype.kind == "f" or (isinstance(value, int) and np.iinfo(dtype).min <= value <= np.iinfo(dtype).max)


def folded_cases() -> list[tuple[Case, int, object]]:
    """(case, which of the arguments is a constant, the constant)"""
    binary = [c for c in CASES if c.name in FOLDED and c.result in FOLDED_TYPES]
    every = [(c, k, v) for c, k, v in product(binary, (0, 1), CONSTANTS) if fits(v, c.result)]
    return [
        (c, k, v) for c, k, v in every if c.name != "power" or (k == 1 and v in (0, 1, 2, 3, -1, 0.5, -0.5, np.inf))
    ]  # long code


@pytest.mark.parametrize("level", ["host", "sse2"])
def test_a_constant_argument_changes_no_result(level):
    module, names = Module(features(level)), []
    for case, k, value in folded_cases():

        def write(b, x, case=case, k=k, value=value):
            c = b.const(value, case.dtypes[0], x.width)
            return operators.elementwise(b, case.name, {}, case.result, *((c, x) if k == 0 else (x, c)))

        names.append([module.loop(case.dtypes[:1], width, write, case.result) for width in (1, 4)])
    call = module.compile(level)
    for (case, k, value), (scalar, vector) in zip(folded_cases(), names, strict=True):
        dtype = case.dtypes[0]
        x = np.concatenate([edges(dtype), scattered(dtype, 32, np.random.default_rng(3))])
        x = np.resize(x, -(-len(x) // 4) * 4)
        with np.errstate(all="ignore"):
            c = np.full(len(x), value, dtype)
            args = [c, x] if k == 0 else [x, c]
            expected = OPS[case.name].value(*args)
        got = run(call, scalar, [x], case.result)
        agree(case, got, expected, args, (level, k, value))
        assert (bits(run(call, vector, [x], case.result)) == bits(got)).all(), (str(case), k, value)


def test_a_square_by_strong_multiply():
    module, f8 = Module(features("host")), np.dtype("f8")
    name = module.loop([f8], 1, lambda b, x: operators.elementwise(b, "strong_multiply", {}, f8, x, x), f8)
    x = edges(f8)
    with np.errstate(all="ignore"):
        expected = OPS["strong_multiply"].value(x, x)
    np.testing.assert_array_equal(run(module.compile("host"), name, [x], f8), expected)


def test_types_that_numpy_does_not_compute_in_are_refused():
    block, mask, whole = Block(Features()), Reg("true", np.dtype(bool), 1), Reg("1", np.dtype("i4"), 1)
    refused = [("subtract", mask), ("negative", mask), ("right_shift", mask), ("sum", mask), ("divide", whole), ("exp", whole)]
    for op, argument in refused:
        args = [argument] * 2
        with pytest.raises(ValueError, match=op):
            operators.elementwise(block, op, {}, bool, *args)


# ---- constants and lanes -----------------------------------------------------------------------------------------------------


def test_constants_are_exact():
    module = Module(Features())
    values = [(d, v) for d in DTYPES for v in edges(d)]
    values += [(np.dtype("f4"), np.uint32(0xFFC12345).view("f4")), (np.dtype("f8"), np.uint64(0x7FF8000000012345).view("f8"))]
    constant = lambda dtype, value, width: lambda b, p: b.store(p, b.const(value, dtype, width))
    names = [module.add(1, constant(*v, width)) for v, width in product(values, (1, 4))]
    call = module.compile("host")
    for i, (dtype, value) in enumerate(values):
        for name, width in ((names[2 * i], 1), (names[2 * i + 1], 4)):
            out = np.zeros(width, dtype)
            call(name, out)
            assert out.tobytes() == np.full(width, value).tobytes(), (dtype, value)
            reg = Block(Features()).const(value, dtype, width)
            assert bits(np.array([constant_value(reg)], dtype)) == bits(np.array([value], dtype))


def test_splat_iota_extract_and_text():
    f4, module = np.dtype("f4"), Module(Features())
    assert str(Reg("%v12", f4, 16)) == "<16 x float> %v12"
    assert [Reg("%a", d, 4).type for d in DTYPES[:5]] == ["<4 x i1>", "<4 x i8>", "<4 x i16>", "<4 x i32>", "<4 x i64>"]
    assert constant_value(Block(Features()).iota(f4, 4)) is None
    block = Block(Features())
    three = block.splat(block.const(3, f4), 8)
    assert (three.width, constant_value(three), block.lines) == (8, 3, [])
    assert block.splat(three, 8) is three
    with pytest.raises(ValueError, match="8 lanes"):
        block.splat(three, 4)

    def write(b, source, out):
        x = b.splat(b.load(source, f4), 4)
        b.store(out, operators.elementwise(b, "add", {}, f4, x, b.iota(f4, 4)))
        b.store(b.at(out, f4, 4), b.extract(b.iota(f4, 4), 3))

    name, out = module.add(2, write), np.zeros(5, f4)
    module.compile("host")(name, np.array([10], f4), out)
    assert out.tolist() == [10, 11, 12, 13, 3]


TRANSPOSED = [(np.dtype(t), n) for t in ("f4", "f8", "i1", "u2", "bool") for n in (1, 2, 4, 8, 16) if (t, n) != ("f8", 16)]


@pytest.mark.parametrize("level", ["host", "sse2"])
def test_transpose(level):
    module, names = Module(features(level)), {}
    for dtype, n in TRANSPOSED:

        def write(b, source, out, dtype=dtype, n=n):
            rows = b.transpose([b.load(b.at(source, dtype, i * n), dtype, n) for i in range(n)])
            for i, row in enumerate(rows):
                b.store(b.at(out, dtype, i * n), row)

        names[dtype, n] = module.add(2, write)
    call = module.compile(level)
    for dtype, n in TRANSPOSED:
        x = (np.arange(n * n) % 251 if dtype.kind != "b" else np.random.default_rng(n).integers(0, 2, n * n)).astype(dtype)
        out = np.empty((n, n), dtype)
        call(names[dtype, n], x, out)
        np.testing.assert_array_equal(out, x.reshape(n, n).T)


REDUCED = [(how, d, w) for how in ("sum", "max", "min") for d in DTYPES for w in (1, 2, 8, 32)]


def test_lanes_reduce_and_neutral():
    module, names = Module(features("host")), []
    for how, dtype, width in REDUCED:

        def write(b, source, out, how=how, dtype=dtype, width=width):
            x = b.load(source, dtype, width)
            b.store(out, operators.lanes_reduce(b, how, operators.combine(b, how, x, operators.neutral(b, how, dtype, width))))

        names.append(module.add(2, write))
    call = module.compile("host")
    ufunc = {"sum": np.add, "max": np.maximum, "min": np.minimum}
    for (how, dtype, width), name in zip(REDUCED, names, strict=True):
        x = np.resize(edges(dtype) if dtype.kind != "f" else np.random.default_rng(1).normal(size=32).astype(dtype), width)
        for poisoned in (False, True) if dtype.kind == "f" else (False,):
            if poisoned:
                x[width // 3] = np.nan
            expected = x.copy()
            while len(expected) > 1:
                expected = ufunc[how](*np.split(expected, 2))
            out = np.empty(1, dtype)
            call(name, x, out)
            np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("level", ["host", "sse2"])
def test_fma(level):
    module, names = Module(features(level)), {}
    for dtype in DTYPES:
        names[dtype] = module.loop([dtype] * 3, 4, lambda b, *args: operators.fma(b, *args), dtype)
    call = module.compile(level)
    for dtype in DTYPES:
        x = np.resize(scattered(dtype, 40, np.random.default_rng(2)), 120)
        a, b, c = x, x[::-1].copy(), np.roll(x, 1)
        with np.errstate(all="ignore"):
            twice = a * b + c
            once = twice if dtype != np.dtype("f4") else (a.astype("f8") * b + c).astype("f4")
        got = run(call, names[dtype], [a, b, c], dtype)
        if dtype.kind != "f" or level == "sse2":
            np.testing.assert_array_equal(got, twice)
        elif dtype == np.dtype("f4"):  # float64 holds the product exactly; the sum is rounded twice, which rarely shows
            assert (bits(got) == bits(once)).mean() > 0.98
            assert (bits(got) != bits(twice)).any()


# ---- memory ------------------------------------------------------------------------------------------------------------------

ACCESSES = [
    (np.dtype(t), width, lanes, stride)
    for t in ("bool", "i1", "u2", "i4", "u8", "f4", "f8")
    for width, lanes in ((1, 1), (1, 0), (4, 4), (4, 3), (4, 0), (4, 1), (8, 5), (16, 16), (16, 13), (16, 8))
    for stride in (1, 2, -1, -3, 0)
]


def addresses(lanes: int, stride: int) -> list[int]:
    """Places of the lanes, lane 0 at 50."""
    return [50 + i * stride for i in range(lanes)]


@pytest.fixture(scope="module", params=["host", "avx2", "sse2"])
def memory(request):
    module, names = Module(features(request.param)), []
    load = lambda d, w, **kw: lambda b, p, out: b.store(out, b.load(p, d, w, **kw))
    store = lambda d, w, **kw: lambda b, p, source: b.store(p, b.load(source, d, w), **kw)
    for dtype, width, lanes, stride in ACCESSES:
        names.append([module.add(2, how(dtype, width, lanes=lanes, stride=stride)) for how in (load, store)])
    return module.compile(request.param), names


def test_loads_and_stores_by_lanes_and_strides(memory):
    call, names = memory
    for (dtype, width, lanes, stride), (load, store) in zip(ACCESSES, names, strict=True):
        label, places = (dtype, width, lanes, stride), addresses(lanes, stride)
        field = np.random.default_rng(0).integers(0, 2 if dtype.kind == "b" else 100, 100).astype(dtype)
        expected, out = np.zeros(width, dtype), np.empty(width, dtype)
        expected[:lanes] = field[places]
        call(load, field[50:], out)
        assert (out == expected).all(), label

        guarded = np.full(100 * dtype.itemsize, GUARD, np.uint8).view(dtype)
        source = np.arange(1, width + 1).astype(dtype)
        expected = guarded.copy()
        for place, value in zip(places, source, strict=False):
            expected[place] = value
        call(store, guarded[50:], source)
        assert guarded.tobytes() == expected.tobytes(), label


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="needs pages that cannot be read")
def test_loads_and_stores_do_not_touch_the_next_page(memory):
    """The last element lies at the end of a page, the next page is forbidden; with a negative stride the page before is."""
    import mmap

    call, names = memory
    page = mmap.PAGESIZE
    area = mmap.mmap(-1, 3 * page)
    space = np.frombuffer(area, np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for outer in (0, 2 * page):
        assert protect(space.ctypes.data + outer, page, 0) == 0
    for (dtype, width, lanes, stride), (load, store) in zip(ACCESSES, names, strict=True):
        offsets = [i * stride for i in range(lanes)] or [0]
        count = page // dtype.itemsize
        middle = space[page : 2 * page].view(dtype)
        middle[:] = 1
        for first in (-min(offsets), count - 1 - max(offsets)):
            out = np.zeros(width, dtype)
            call(load, middle[first:], out)
            assert out.tolist() == [1] * lanes + [0] * (width - lanes)
            call(store, middle[first:], np.ones(width, dtype))
    assert protect(space.ctypes.data, 3 * page, 3) == 0


# ---- random bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["host", "sse2"])
def test_philox(level):
    module, u4, rng = Module(features(level)), np.dtype("u4"), np.random.default_rng(0)
    counters, key = rng.integers(0, 2**32, (4, 48), dtype=np.uint32), np.array([0xFFFFFFFF, 12345], u4)
    names = {}
    for width in WIDTHS:

        def write(b, counter, key, out, width=width):
            keys = [b.splat(b.load(b.at(key, u4, i), u4), width) for i in range(2)]
            for start in range(0, 48, width):
                words = operators.philox(b, *[b.load(b.at(counter, u4, 48 * i + start), u4, width) for i in range(4)], *keys)
                for i, word in enumerate(words):
                    b.store(b.at(out, u4, 48 * i + start), word)

        names[width] = module.add(3, write)
    call = module.compile(level)
    expected = np.array(philox(counters.astype(np.uint64), key.tolist()))
    for width in WIDTHS:
        out = np.empty((4, 48), u4)
        call(names[width], counters, key, out)
        np.testing.assert_array_equal(out, expected)


# ---- targets -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
def test_every_form_is_legal_for_aarch64(width):
    module = Module(Features(True, True, 16))
    for case in CASES:
        if case.name not in BOUND:  # those are tested in test_elementary.py
            module.loop(case.dtypes, width, form_of(case), case.result)
    listing = assembly(module.text(), triple="aarch64-unknown-linux-gnu", features="+neon")
    assert {c for c in re.findall(r"\tbl\t(\S+)", listing) if "chainrule" not in c} == set()


@pytest.mark.parametrize("level", ["avx", "sse2"])
def test_no_library_calls(level):
    module, _ = form_module(level, (8,))
    symbols = re.findall(r"call\w*\s+([\w.]+)|movabsq\s+\$([A-Za-z_]\w*)", assembly(module.text(), level=level))
    assert all("chainrule" in "".join(s) for s in symbols), symbols
