"""Derives the coefficients in coefficients.py: minimax approximations by Remez exchange, in mpmath, and prints them.

Method: E. Remez (1934), as in Muller, Elementary Functions, 3rd ed., ch. 3. Where 0 is an end of the range the coefficients become machine
numbers one by one, lowest degree first, and those that remain are fitted again (a cheap stand-in for Brisebarre & Chevillard 2007).

Usage: python derive_polynomials.py [NAME ...]
"""

import sys

import numpy as np
from mpmath import mp, mpf

mp.prec = 400


def to_machine(x, bits):
    return mpf(float(np.float32(float(x)))) if bits == 24 else mpf(float(x))


def grid(lo, hi, n):
    return [(lo + hi) / 2 + (hi - lo) / 2 * -mp.cos(mp.pi * i / (n - 1)) for i in range(n)]


def remez(f, weight, lo, hi, powers, rounds=12, points=1200):
    """Coefficients c with max |weight * (f - sum c_i x^powers_i)| least, and that maximum."""
    k = len(powers)
    xs = grid(lo, hi, points)
    fs, ws = [f(x) for x in xs], [weight(x) for x in xs]
    ref = [round(i * (points - 1) / k) for i in range(k + 1)]
    c, worst = None, None
    for _ in range(rounds):
        A = mp.matrix(k + 1, k + 1)
        b = mp.matrix(k + 1, 1)
        for row, i in enumerate(ref):
            for j, p in enumerate(powers):
                A[row, j] = ws[i] * xs[i] ** p
            A[row, k] = (-1) ** row
            b[row] = ws[i] * fs[i]
        s = mp.lu_solve(A, b)
        c = [s[j] for j in range(k)]
        err = [w * (v - sum(a * x**p for a, p in zip(c, powers))) for x, v, w in zip(xs, fs, ws)]
        worst = max(abs(e) for e in err)
        if worst < abs(s[k]) * mpf("1.01"):
            break
        # one extremum for each run of one sign
        runs, start = [], 0
        for i in range(1, points + 1):
            if i == points or (err[i] > 0) != (err[start] > 0):
                runs.append(max(range(start, i), key=lambda q: abs(err[q])))
                start = i
        while len(runs) > k + 1:
            runs.pop(0 if abs(err[runs[0]]) < abs(err[runs[-1]]) else -1)
        if len(runs) < k + 1:
            break
        ref = runs
    return c, worst


def fit(name, f, weight, lo, hi, degree, bits, fixed=(), head=()):
    """Polynomial of `degree`; machine numbers one after the other. `head` gives the format of the first ones, if another."""
    done = list(fixed)
    lo, hi = mpf(lo), mpf(hi)
    exact = remez(f, weight, lo, hi, list(range(degree + 1)))[1]
    if lo < 0 < hi:  # the powers that remain all vanish inside the range: Remez would not settle; round at once
        done = [to_machine(c, bits) for c in remez(f, weight, lo, hi, list(range(degree + 1)))[0]]
    while len(done) <= degree:
        n = len(done)
        rest = lambda x: f(x) - sum(c * x**i for i, c in enumerate(done))
        c, _ = remez(rest, weight, lo, hi, list(range(n, degree + 1)), rounds=6, points=600)
        done.append(to_machine(c[0], bits))
    xs = grid(lo, hi, 3000)
    worst = max(abs(weight(x) * (f(x) - sum(c * x**i for i, c in enumerate(done)))) for x in xs)
    print(f"# {name}: degree {degree}, error 2^{float(mp.log(worst, 2)):.1f} (best 2^{float(mp.log(exact, 2)):.1f})")
    show(name, done, bits)


def show(name, values, bits):
    text = [str(np.float32(float(v))) if bits == 24 else repr(float(v)) for v in values]
    print(f"{name} = ({', '.join(text)})", flush=True)


def rational(name, f, weight, lo, hi, m, n, bits, points=300, rounds=150):
    """p/q with p0 = q0 = 1 in z = x^2, least weighted relative error: Loeb's linearised fits with Lawson's weights (1961)."""
    zs = [x * x for x in grid(mpf(lo), mpf(hi), points)]
    fs, ws = [f(z) for z in zs], [weight(z) for z in zs]
    k, best, lawson, q_old = m + n, None, [mpf(1)] * points, [mpf(1)] * points
    at = lambda c, z: mp.polyval(c[::-1], z)
    for _ in range(rounds):
        normal, right = mp.matrix(k, k), mp.matrix(k, 1)
        for z, v, w, l, q in zip(zs, fs, ws, lawson, q_old):
            row = [z ** (j + 1) for j in range(m)] + [-v * z ** (j + 1) for j in range(n)]
            factor = l * (w / (v * q)) ** 2
            for a in range(k):
                right[a] += factor * row[a] * (v - 1)
                for c in range(a, k):
                    normal[a, c] += factor * row[a] * row[c]
        for a in range(k):
            for c in range(a):
                normal[a, c] = normal[c, a]
        solution = mp.lu_solve(normal, right)
        p, q = [mpf(1)] + [solution[j] for j in range(m)], [mpf(1)] + [solution[m + j] for j in range(n)]
        q_old = [at(q, z) for z in zs]
        err = [abs(w * (at(p, z) / d / v - 1)) for z, v, w, d in zip(zs, fs, ws, q_old)]
        if best is None or max(err) < best[0]:
            best = max(err), p, q
        lawson = [l * e for l, e in zip(lawson, err)]
        total = sum(lawson)
        lawson = [l / total for l in lawson]
    worst, p, q = best
    p, q = [to_machine(v, bits) for v in p], [to_machine(v, bits) for v in q]
    rounded = max(abs(w * (at(p, z) / at(q, z) / v - 1)) for z, v, w in zip(zs, fs, ws))
    print(f"# {name}: {m}/{n}, error 2^{float(mp.log(worst, 2)):.1f}, rounded 2^{float(mp.log(rounded, 2)):.1f}")
    show(name + "_P", p, bits)
    show(name + "_Q", q, bits)


def series(g):
    """g(x), with a limit taken at x = 0."""
    return lambda x: g(x if x != 0 else mpf(2) ** -150)


one = mpf(1)
half_log2 = "0.34668"
exp_tail = series(lambda r: (mp.expm1(r) - r) / r**2)
exp_weight = series(lambda r: abs(r**2 / mp.expm1(r)))
log_tail = series(lambda f: (mp.log1p(f) - f + f**2 / 2) / f**3)
log_weight = series(lambda f: abs(f**3 / mp.log1p(f)))
# the tails in z = x^2; negative z never occurs
sin_tail = series(lambda z: (mp.sin(mp.sqrt(z)) / mp.sqrt(z) - 1) / z)
cos_tail = series(lambda z: (mp.cos(mp.sqrt(z)) - 1 + z / 2) / z**2)
atan_tail = series(lambda z: (mp.atan(mp.sqrt(z)) / mp.sqrt(z) - 1) / z)
asin_tail = series(lambda z: (mp.asin(mp.sqrt(z)) / mp.sqrt(z) - 1) / z)
tanh_tail = series(lambda z: (mp.tanh(mp.sqrt(z)) / mp.sqrt(z) - 1) / z)
erf_ratio = series(lambda z: mp.erf(mp.sqrt(z)) / mp.sqrt(z) - 1)
erfcx = lambda c: lambda t: mp.exp((t + c) ** 2) * mp.erfc(t + c)
# log m = 2s + 2s^3/3 + s^5 Q(s^2), s = (m - 1)/(m + 1)
atanh_tail = series(lambda z: (2 * mp.atanh(mp.sqrt(z)) / mp.sqrt(z) - 2 - 2 * z / 3) / z**2)
atanh_tail1 = series(lambda z: (2 * mp.atanh(mp.sqrt(z)) / mp.sqrt(z) - 2) / z)
SQUARE = "0.6169"  # (pi/4)^2
ATAN = "0.17165"  # tan(pi/8)^2
LOG = ("-0.29290", "0.41422")
SERIES = "0.029439"  # ((sqrt 2 - 1)/(sqrt 2 + 1))^2
ERF_MIDDLE = {24: "0.90625", 53: "1.0"}

JOBS = {}
for bits, E, L, S, C, A, I, P in ((24, 4, 7, 2, 2, 4, 4, 5), (53, 10, 18, 5, 5, 10, 11, 11)):
    t = "32" if bits == 24 else "64"
    JOBS["EXP" + t] = lambda b=bits, d=E, t=t: fit("EXP" + t, exp_tail, exp_weight, "-" + half_log2, half_log2, d, b)
    JOBS["LOG" + t] = lambda b=bits, d=L, t=t: fit("LOG" + t, log_tail, log_weight, *LOG, d, b)
    JOBS["SIN" + t] = lambda b=bits, d=S, t=t: fit("SIN" + t, sin_tail, lambda z: z, 0, SQUARE, d, b)
    JOBS["COS" + t] = lambda b=bits, d=C, t=t: fit("COS" + t, cos_tail, lambda z: z * z, 0, SQUARE, d, b)
    JOBS["ATAN" + t] = lambda b=bits, d=A, t=t: fit("ATAN" + t, atan_tail, lambda z: z, 0, ATAN, d, b)
    JOBS["ASIN" + t] = lambda b=bits, d=I, t=t: fit("ASIN" + t, asin_tail, lambda z: z, 0, "0.25", d, b)
    JOBS["ERF" + t] = lambda b=bits, d=P, t=t: fit("ERF" + t, erf_ratio, lambda z: one, 0, mpf(ERF_MIDDLE[b]) ** 2, d, b)
    JOBS["ERFC" + t] = lambda b=bits, d=(8 if bits == 24 else 20), t=t, hi=("3.93" if bits == 24 else "5.93"), c=mpf(2): fit(
        "ERFC" + t, erfcx(c), lambda x, c=c: mp.exp(-((x + c) ** 2)), mpf(ERF_MIDDLE[b]) - c, mpf(hi) - c, d, b
    )
CDF_MIDDLE = mpf("0.8")


def cdf_tail(t):
    """exp(a^2/2) (1 - Phi(a)) (a + 4) at t = 3/4 - 8 / (a + 4), Phi being the normal distribution function."""
    a = 8 / (mpf("0.75") - t) - 4
    return mp.exp(a * a / 2) * mp.erfc(a / mp.sqrt(2)) / 2 * (a + 4)


# (Phi(x) - 1/2) / x in z = x^2
cdf_ratio = series(lambda z: mp.erf(mp.sqrt(z / 2)) / mp.sqrt(z) / 2)
for bits, near, far, end in ((24, 4, 9, "15"), (53, 9, 21, "39.5")):
    t = "32" if bits == 24 else "64"
    JOBS["CDF" + t] = lambda b=bits, d=near, t=t: fit(
        "CDF" + t, lambda z: cdf_ratio(z) - mpf("0.5"), lambda z: one, 0, CDF_MIDDLE**2, d, b
    )
    JOBS["CDF_TAIL" + t] = lambda b=bits, d=far, t=t, e=mpf(end): fit(
        "CDF_TAIL" + t,
        lambda x: cdf_tail(x) - (mpf("1.25") - x) / 2,
        lambda x: 1 / cdf_tail(x),
        *(mpf("0.75") - 8 / (a + 4) for a in (CDF_MIDDLE, e)),
        d,
        b,
    )
JOBS["LOG64"] = lambda: fit("LOG64", atanh_tail1, lambda z: z, 0, SERIES, 6, 53)
JOBS["TANH64"] = lambda: fit("TANH64", tanh_tail, lambda z: z, 0, "0.3026", 9, 53)
# tanh x = 2t / (1 + t^2), t = tanh(x/2): an error of t counts less by sech x, until its square counts
JOBS["TANH32"] = lambda: [
    rational(
        "TANH32",
        series(lambda z: 2 * mp.tanh(mp.sqrt(z) / 2) / mp.sqrt(z)),
        lambda z: max(mp.sech(mp.sqrt(z)), mpf(2) ** -12),
        0,
        "9.02",
        m,
        n,
        24,
    )
    for m, n in ((2, 3),)
]
JOBS["POWER64"] = lambda: fit("POWER64", atanh_tail, lambda z: z**2, 0, SERIES, 7, 53)
JOBS["POWER32_LOG"] = lambda: fit("POWER32_LOG", atanh_tail1, lambda z: z, 0, SERIES, 4, 53)
JOBS["POWER32_EXP"] = lambda: fit("POWER32_EXP", exp_tail, exp_weight, "-" + half_log2, half_log2, 5, 53)


def parts(name, value, *bits):
    """value as a sum: machine numbers of so many bits (trailing zeros make their product with a small integer exact)."""
    out = []
    for n in bits:
        unit = mpf(2) ** (mp.floor(mp.log(abs(value), 2)) + 1 - n)
        part = unit * (mp.floor(value / unit) if n not in (24, 53) else mp.nint(value / unit))
        out.append(part)
        value -= part
    print(f"{name} = ({', '.join(repr(float(p)) for p in out)})")


def constants():
    mp.prec = 1400
    parts("LN2_32", mp.log(2), 15, 24)
    parts("LN2_64", mp.log(2), 42, 53)
    parts("HALF_PI_32_FMA", mp.pi / 2, 24, 24, 24)
    parts("HALF_PI_32", mp.pi / 2, 13, 13, 13, 24)
    parts("HALF_PI_64", mp.pi / 2, 39, 39, 53)
    parts("QUARTER_PI_32", mp.pi / 4, 22, 24)
    parts("QUARTER_PI_64", mp.pi / 4, 51, 53)
    parts("HALF_PI_SUM_32", mp.pi / 2, 24, 24)
    parts("HALF_PI_SUM_64", mp.pi / 2, 53, 53)
    parts("TWO_THIRDS_64", mpf(2) / 3, 53, 53)
    print(f"TWO_OVER_PI = 0x{int(mp.floor(2 / mp.pi * mpf(2) ** 1216)):X}  # 1216 bits")
    print(f"HALF_PI_128 = 0x{int(mp.floor(mp.pi / 2 * mpf(2) ** 127)):X}")


JOBS["CONSTANTS"] = constants

if __name__ == "__main__":
    for name in sys.argv[1:] or JOBS:
        JOBS[name]()
