"""elementary.py against mpmath and NumPy: errors in ulp, special values, equal bits at every width, every level of the processor."""

import ctypes
import re
import runpy
from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.special
from elementary_harness import ARITY, LEVELS, PRODUCTS, assembly, compiled, text
from mpmath import mp

import chainrule as cr
from chainrule.compiler.coefficients import FLOAT32, FLOAT64
from chainrule.compiler.elementary import FUNCTIONS

# The tests' own arithmetic goes to the ends of the range, where NumPy warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
mp.prec = 140
BOUND = {32: 4.0, 64: 2.0}
LOGISTIC = lambda x: 1 / (1 + mp.exp(-x))
TANH_SOFTPLUS = lambda x: (n := mp.exp(x) * (mp.exp(x) + 2)) / (n + 2)
EXACT = {
    "exp": mp.exp, "expm1": mp.expm1, "log": mp.log, "log1p": mp.log1p, "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "tanh": mp.tanh,
    "logistic": LOGISTIC, "tanh_softplus": TANH_SOFTPLUS, "erf": mp.erf, "normal_cdf": mp.ncdf, "arctan": mp.atan, "arcsin": mp.asin,
    "arccos": mp.acos, "arccosh": mp.acosh, "power": mp.power,
    "silu": lambda x: x * LOGISTIC(x), "mish": lambda x: x * TANH_SOFTPLUS(x), "gelu": lambda x: x * mp.ncdf(x),
}  # fmt: skip
SCIPYS = {
    "erf": scipy.special.erf,
    "normal_cdf": scipy.special.ndtr,
    "logistic": scipy.special.expit,
    "tanh_softplus": lambda x: np.tanh(np.logaddexp(x.dtype.type(0), x)),
}
SCIPYS |= {name: lambda x, gate=SCIPYS[gate]: x * gate(x) for name, gate in PRODUCTS.items()}
CHEAP = {"sqrt": np.sqrt, "floor": np.floor, "abs": np.abs, "maximum": np.maximum, "minimum": np.minimum}
DTYPE = {32: np.float32, 64: np.float64}
INT = {32: np.uint32, 64: np.uint64}
WIDEST = {32: 16, 64: 8}
NATIVE = ["host", "avx2", "avx", "sse2"]


def around(values, bits, reach=2):
    """The values and their neighbours."""
    x = np.asarray(values, DTYPE[bits])
    out = [x]
    for direction in (-np.inf, np.inf):
        y = x
        for _ in range(reach):
            y = np.nextafter(y, DTYPE[bits](direction))
            out.append(y)
    return np.concatenate(out)


def special(bits):
    f = np.finfo(DTYPE[bits])
    values = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        1,
        -1,
        0.5,
        -0.5,
        2,
        f.tiny,
        -f.tiny,
        f.smallest_subnormal,
        -f.smallest_subnormal,
    ]
    values += [f.tiny / 4, -f.tiny / 4, f.max, -f.max, f.eps, -f.eps, f.eps / 4, -f.eps / 4]
    return np.array(values, DTYPE[bits])


def thresholds(bits):
    """Where a branch, a clamp or a reduction changes, and the ends of range."""
    log2 = np.log(2)
    t = [
        0.5,
        0.55,
        0.90625,
        1.0,
        3.93,
        5.93,
        9.02,
        20,
        0.4142135,
        2.4142135,
        0.70710678,
        1.41421356,
        -0.29289322,
        0.41421356,
        3000,
        25000,
        50000,
    ]
    t += [
        88.72283,
        709.782712893384,
        -87.33654,
        -103.97208,
        -708.3964185322641,
        -745.1332191019412,
        -17.3287,
        -36.7368,
        18,
        38,
        89,
        104,
        710,
    ]
    t += [(k + 0.5) * log2 for k in range(-4, 5)] + [k * log2 for k in range(-4, 5)] + [k * np.pi / 4 for k in range(1, 60)]
    t += [
        1.5707963267948966e22,
        6381956970095103.0 * 2.0**797,
        2.0**13,
        2.0**28,
        1e15,
        2.0**60,
        2.0**100,
    ]  # the hardest float64 for pi/2 among them
    with np.errstate(over="ignore"):
        t = np.array(t).astype(DTYPE[bits])
    t = t[np.isfinite(t)]
    return around(np.concatenate([t, -t]), bits)


def scattered(bits, n, rng):
    """All exponents, and the usual range."""
    anywhere = rng.integers(0, 2**bits, n, dtype=np.uint64).astype(INT[bits]).view(DTYPE[bits])
    usual = [rng.normal(size=n) * s for s in (0.3, 3, 40)] + [1 + rng.normal(size=n) * 1e-3, np.exp(rng.uniform(-30, 1, n))]
    usual += [rng.uniform(-745, 710, n) * (1 if bits == 64 else 0.125), np.arange(n) * (np.pi / 2)]
    usual += [rng.uniform(-110, -85, n) if bits == 32 else rng.uniform(-755, -700, n), rng.uniform(-40, -0.5, n)]
    return np.concatenate([anywhere, *[u.astype(DTYPE[bits]) for u in usual]])


def arguments(name, bits, n, seed=0):
    rng = np.random.default_rng(seed)
    x = np.concatenate([special(bits), thresholds(bits), scattered(bits, n, rng)])
    if name != "power":
        return (x,)
    grid = np.concatenate([special(bits), DTYPE[bits]([3, -3, 2.5, -2.5, 1e30, -1e30, 0.9, -0.9, 7, 8, 1e5 + 1])])
    a, b = (v.ravel() for v in np.meshgrid(grid, grid))
    with np.errstate(all="ignore"):
        limited = (rng.uniform(-745, 710, len(x)) * (1 if bits == 64 else 0.13) / np.log(np.abs(x.astype(np.float64)))).astype(
            DTYPE[bits]
        )
    whole = rng.integers(-40, 40, len(x)).astype(DTYPE[bits])
    return np.concatenate([a, np.abs(x), x]), np.concatenate([b, limited, whole])


def error(name, bits, got, args):
    """In ulp of the exact result; NaN, infinities and the sign of zero must agree outright."""
    d = DTYPE[bits]
    with np.errstate(all="ignore"):
        like = SCIPYS.get(name, getattr(np, name, None))(*args)
    mantissa, least = (23, -126) if bits == 32 else (52, -1022)
    top = mpmath.mpf(2) ** (128 if bits == 32 else 1024)
    worst, where = 0.0, None
    for i, values in enumerate(zip(*args, strict=True)):
        g, ref = got[i], like[i]
        if any(np.isnan(v) or np.isinf(v) or v == 0 for v in values) or np.isnan(ref) or name == "floor":
            assert (np.isnan(g) and np.isnan(ref)) or (
                abs(g - ref) <= 4 * np.spacing(abs(ref)) if np.isfinite(ref) else g == ref
            ), (values, g, ref)
            assert np.isnan(g) or np.signbit(g) == np.signbit(ref), (values, g, ref)
            continue
        if name in ("log", "log1p") and np.isinf(ref):
            assert g == ref
            continue
        assert not np.isnan(g), (values, g)
        if name == "power" and abs(float(values[1]) * np.log(abs(float(values[0])))) > 1e4:
            assert g == ref, (values, g, ref)
            continue
        if (name in ("exp", "expm1") and abs(values[0]) > 1000) or (name in ("tanh", "erf") and abs(values[0]) > 40):
            assert g == (np.copysign(1, values[0]) if name in ("tanh", "erf") else ref)
            continue
        if name in ("normal_cdf", "gelu") and abs(values[0]) > 40:
            assert g == (values[0] > 0) * (values[0] if name == "gelu" else 1)
            assert np.signbit(g) == (name == "gelu" and values[0] < 0)
            continue
        if name in PRODUCTS and abs(values[0]) > 1000:
            assert g == max(values[0], 0)
            assert np.signbit(g) == (values[0] < 0)
            continue
        exact = EXACT[name](*[mpmath.mpf(float(v)) for v in values])
        if exact == 0:
            assert g == 0
            continue
        unit = mpmath.ldexp(1, max(int(mpmath.frexp(exact)[1]) - 1, least) - mantissa)
        value = top * (1 if g > 0 else -1) if np.isinf(g) else mpmath.mpf(float(g))
        limit = max(min(exact, top), -top)
        e = float(abs(value - limit) / unit)
        assert g == 0 or np.sign(g) == mpmath.sign(exact)
        if e > worst:
            worst, where = e, values
        assert g.dtype == d
    return worst, where


@pytest.mark.parametrize("level", ["host", "sse2"])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", EXACT)
def test_error_against_mpmath(name, bits, level):
    args = arguments(name, bits, 250)
    worst, where = error(name, bits, compiled(name, bits, WIDEST[bits] if level == "host" else 4, level)(*args), args)
    assert worst <= BOUND[bits], where


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_gates_in_compiled_functions(name, bits):
    """Compiled graphs find x times its gate, on either side and beside the gate itself."""
    ends = {"gelu": (-15.0, -39.5), "silu": (-110.0, -755.0), "mish": (-110.0, -755.0)}[name]  # gates are denormal before
    x = np.linspace(ends[bits == 64], 3, 2000).astype(DTYPE[bits])
    expected = compiled(name, bits, 4)(x)
    np.testing.assert_array_equal(cr.compile(lambda x: getattr(cr, name)(x))(x), expected)
    if name == "silu":
        for product in (lambda x: cr.sigmoid(x) * x, lambda x: x * cr.sigmoid(x)):
            got, alone = cr.compile(lambda x, product=product: (product(x), cr.sigmoid(x)))(x)
            np.testing.assert_array_equal(got, expected)
            np.testing.assert_array_equal(alone, compiled("logistic", bits, 4)(x))


SOFTPLUS = lambda x: mp.log1p(mp.exp(x)) if x < 90 else x
LAMBDA, ALPHA = mpmath.mpf(1.0507009873554805), mpmath.mpf(1.6732632423543772)
# Functions that are put together from others, and what they are.
COMPOSED = {
    np.exp2: (lambda x: mp.power(2, x),), np.log2: (lambda x: mp.log(x) / mp.log(2),), np.log10: (mp.log10,), np.square: (lambda x: x * x,),
    np.sinh: (mp.sinh,), np.cosh: (mp.cosh,), np.arcsinh: (mp.asinh,), np.arctanh: (mp.atanh,), np.reciprocal: (lambda x: 1 / x,),
    np.cbrt: (lambda x: mp.sign(x) * mp.cbrt(abs(x)),), np.deg2rad: (lambda x: x * mp.pi / 180,), np.rad2deg: (lambda x: x * 180 / mp.pi,),
    cr.gelu: (lambda x: x * mp.ncdf(x),), cr.sigmoid: (LOGISTIC,), cr.softplus: (SOFTPLUS,),
    cr.silu: (lambda x: x * LOGISTIC(x),), cr.mish: (lambda x: x * mp.tanh(SOFTPLUS(x)),),
    cr.softsign: (lambda x: x / (1 + abs(x)),), cr.elu: (lambda x: x if x > 0 else mp.expm1(x),),
    cr.selu: (lambda x: LAMBDA * (x if x > 0 else ALPHA * mp.expm1(x)),),
    cr.leaky_relu: (lambda x: x if x > 0 else x * mpmath.mpf(0.01),),
}  # fmt: skip


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("function", COMPOSED, ids=lambda f: f.__name__)
def test_error_of_composed_functions(function, bits):
    (exact,) = COMPOSED[function]
    d = DTYPE[bits]
    mantissa, least, bias = (23, -126, 127) if bits == 32 else (52, -1022, 1023)
    x = np.concatenate([special(bits), scattered(bits, 300, np.random.default_rng(2)), np.linspace(-39, 12, 500).astype(d)])
    vanishing = np.linspace(-110, -85, 300) if bits == 32 else np.linspace(-755, -700, 300)  # denormal gates, denormal results
    x = np.concatenate([x, vanishing.astype(d)])
    x = x[np.isfinite(x) & (x != 0) & (np.abs(x) < 3000)]
    got = cr.compile(lambda x: function(x))(x)
    assert got.dtype == d
    for value, y in zip(x, got, strict=True):
        wanted = exact(mpmath.mpf(float(value)))
        if isinstance(wanted, mpmath.mpc) or mpmath.isnan(wanted):
            assert np.isnan(y), value
        elif mpmath.isinf(wanted) or abs(wanted) >= mpmath.mpf(2) ** (bias + 1):
            assert y == np.copysign(np.inf, float(mpmath.sign(wanted))), value
        else:
            unit = mpmath.ldexp(1, max(int(mpmath.frexp(wanted)[1]) - 1, least) - mantissa)
            assert abs(mpmath.mpf(float(y)) - wanted) <= BOUND[bits] * unit, (value, y)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", CHEAP)
def test_cheap_functions_are_numpys(name, bits):
    x = np.concatenate([special(bits), thresholds(bits), scattered(bits, 500, np.random.default_rng(1))])
    args = (x,) if name not in ARITY else tuple(v.ravel() for v in np.meshgrid(x[:300], x[:300]))
    with np.errstate(all="ignore"):
        expected = CHEAP[name](*args)
    for level in NATIVE:
        got = compiled(name, bits, 4, level)(*args)
        np.testing.assert_array_equal(got, expected)
        if name in ("floor", "abs"):
            np.testing.assert_array_equal(np.signbit(got), np.signbit(expected))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", [*FUNCTIONS, *PRODUCTS])
def test_bits_do_not_depend_on_width_or_level(name, bits):
    """With FMA: host at each width and AVX2; without: AVX and SSE2, all the same within the two groups. Neighbours change nothing."""
    args = arguments("power" if name in ARITY else name, bits, 300, seed=3)
    order = np.random.default_rng(5).permutation(len(args[0]))
    for group in (("host", "avx2"), ("avx", "sse2")):
        expected = compiled(name, bits, 1, group[0])(*args).view(INT[bits])
        expected[np.isnan(expected.view(DTYPE[bits]))] = 0  # NaN has many patterns
        for level in group:
            for width in (1, 2, 4, 8, 16):
                f = compiled(name, bits, width, level)
                for o in (slice(None), order):
                    got = f(*[a[o] for a in args])
                    bits_of = np.where(np.isnan(got), 0, got.view(INT[bits]))
                    assert (bits_of == expected[o]).all(), (level, width)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", [*FUNCTIONS, *PRODUCTS])
def test_flushed_denormals_are_sane(name, bits):
    """FTZ and DAZ: a denormal argument gives what 0 of its sign gives, or what it gives itself; nothing else changes."""
    import llvmlite.binding as llvm
    from elementary_harness import machine

    ir = "declare void @llvm.x86.sse.ldmxcsr(ptr)\ndefine void @set(ptr %p) {\n call void @llvm.x86.sse.ldmxcsr(ptr %p)\n ret void\n}"
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(ir), machine())
    engine.finalize_object()
    load = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("set"))
    x = special(bits)
    args = (x,) if name not in ARITY else tuple(v.ravel() for v in np.meshgrid(x, x))
    tiny = np.finfo(DTYPE[bits]).tiny
    flush = lambda v: np.where(np.abs(v) < tiny, np.copysign(DTYPE[bits](0), v), v)
    f = compiled(name, bits, 4)
    plain, zeroed = f(*args), f(*[flush(a) for a in args])
    padded = [np.resize(a, -(-len(a) // 4) * 4).copy() for a in args]
    out = np.empty_like(padded[0])
    pointers = [a.ctypes.data for a in padded]
    on, off = ctypes.c_uint32(0x9FC0), ctypes.c_uint32(0x1F80)
    load(ctypes.addressof(on))
    f.raw(*pointers, out.ctypes.data, len(out))
    load(ctypes.addressof(off))
    out = out[: len(plain)]
    same = lambda a, b: (a == b) | (np.isnan(a) & np.isnan(b)) | (np.abs(a - b) <= 4 * np.spacing(np.abs(b)))
    with np.errstate(invalid="ignore"):
        assert (same(flush(out), flush(plain)) | same(flush(out), flush(zeroed))).all()


@pytest.mark.parametrize("features", ["+neon"])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_aarch64_assembly(name, bits, features):
    listing = assembly(text(name, bits, 4 if bits == 32 else 2), triple="aarch64-unknown-linux-gnu", features=features)
    assert "ret" in listing
    assert not [line for line in listing.splitlines() if "\tbl\t" in line and "chainrule" not in line]  # no library calls


@pytest.mark.parametrize("level", NATIVE)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_library_calls(name, level):
    for bits in (32, 64):
        listing = assembly(text(name, bits, 4, *LEVELS[level][1:]), level=level)
        symbols = re.findall(r"call\w*\s+([\w.]+)|movabsq\s+\$([A-Za-z_]\w*)", listing)
        assert all("chainrule" in "".join(s) for s in symbols)


# ---- every float32 -----------------------------------------------------------------------------------------------------------

PARTS, CHUNK = 8, 2**18  # a chunk's arrays stay in a core's cache


def ulps(got, exact):
    """How far float32 results are from float64 values, in ulp of these; NaN and signs must agree outright."""
    with np.errstate(invalid="ignore"):
        wrong = (np.isnan(got) != np.isnan(exact)) | (np.signbit(got) != np.signbit(exact)) & ~np.isnan(exact)
        assert not wrong.any(), (got[wrong][:4], exact[wrong][:4])
        top = 2.0**128  # an infinity stands for the number where it begins
        size = np.minimum(np.abs(exact), top)
        binade = (size.view(np.uint64) & np.uint64(0x7FF << 52)).view(np.float64)
        found = np.abs(np.minimum(np.abs(got.astype(np.float64)), top) - size) / np.maximum(binade, 2.0**-126) * 2.0**23
    return np.where(np.isnan(found), 0.0, found)


def farthest(name, functions, chunks):
    """For each function the largest error, and where; chunks: tuples of arguments. The reference is NumPy's or SciPy's float64."""
    reference = SCIPYS.get(name, getattr(np, name, None))
    worst = [(0.0, None)] * len(functions)
    for args in chunks:
        with np.errstate(all="ignore"):
            exact = reference(*[a.astype(np.float64) for a in args])
        for k, f in enumerate(functions):
            off = ulps(f(*args), exact)
            at = int(np.argmax(off))
            worst[k] = max(worst[k], (float(off[at]), tuple(float(a[at]) for a in args)), key=lambda w: w[0])
    return worst


def all_numbers(part):
    """One of PARTS of all 2^32 patterns of bits."""
    size = 2**32 // PARTS
    for start in range(part * size, (part + 1) * size, CHUNK):
        yield (np.arange(start, start + CHUNK, dtype=np.uint32).view(np.float32),)


def random_pairs(part, chunks=64):
    """For power: any positive number, and an exponent with which the result is mostly a number."""
    rng = np.random.default_rng(part)
    for _ in range(chunks):
        x = np.abs(rng.integers(0, 0x7F800000, CHUNK, dtype=np.uint32).view(np.float32))
        with np.errstate(all="ignore"):
            y = (rng.uniform(-105, 90, CHUNK) / np.log(x.astype(np.float64))).astype(np.float32)
        yield x, y


@pytest.mark.parametrize("level", ["host", "sse2"])
def test_tanh_where_its_errors_are_largest(level):
    """Every 16th float32 from 1/8 to 1/2, and the place where a simpler formula was off by 4.17 without FMA."""
    x = np.arange(np.float32(0.125).view(np.uint32), np.float32(0.5).view(np.uint32), 16, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, np.array([0.25387799739837646], np.float32)])
    assert farthest("tanh", [compiled("tanh", 32, 16, level)], [(x[: len(x) // 16 * 16],), (x[-16:],)])[0][0] <= BOUND[32]


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", EXACT)
def test_every_float32(name, part, record_property):
    """All 2^32 arguments, with FMA and without; of power many. About half a minute each."""
    chunks = random_pairs(part) if name == "power" else all_numbers(part)
    functions = [compiled(name, 32, 16, level) for level in ("host", "sse2")]
    worst = farthest(name, functions, chunks)
    record_property("worst", worst)
    assert max(off for off, _ in worst) <= BOUND[32], worst


# ---- tables ------------------------------------------------------------------------------------------------------------------

TOOL = Path(__file__).parent.parent / "tools" / "derive_polynomials.py"
TABLES = {"EXP": "exp", "LOG": "log", "SIN": "sin", "COS": "cos", "ATAN": "arctan", "ERF": "erf", "ERFC": "erfc",
          "ASIN": "arcsin", "CDF": "cdf", "CDF_TAIL": "cdf_tail"}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", TABLES)
def test_tables_are_what_the_tool_derives(name, bits, capsys):
    precision = mp.prec
    try:
        runpy.run_path(str(TOOL))["JOBS"][f"{name}{bits}"]()
    finally:
        mp.prec = precision
    found = dict(re.findall(r"(?m)^(\w+) = \((.*)\)$", capsys.readouterr().out))
    derived = [DTYPE[bits](c) for c in found[f"{name}{bits}"].split(", ")]
    assert derived == [DTYPE[bits](c) for c in {32: FLOAT32, 64: FLOAT64}[bits][TABLES[name]]]
