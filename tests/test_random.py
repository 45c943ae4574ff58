"""Random numbers: the bits of the published generator, their distribution, and that each place in a program has its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import chainrule as cr
from chainrule.errors import UsageError
from chainrule.graph.interpret import evaluate
from chainrule.graph.node import Graph
from chainrule.graph.trace import build, type_of
from chainrule.normalize import normalize
from chainrule.ops.random import fold_in, key_of, philox
from chainrule.program import differentiate

Array = np.ndarray
KEY = np.array([11, 22], np.uint32)
MANY = 40_000


def words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


# Random123 (Salmon, Moraes, Dror, Shaw, SC 2011), tests/kat_vectors: philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "bits"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_words(counter: str, key: str, bits: str) -> None:
    got = philox([np.array([w], np.uint64) for w in words(counter)], words(key))
    assert [int(g[0]) for g in got] == words(bits)


def recorded(function: Any, *args: Array) -> Graph:
    """A function as a network records it: with a key that is known when running."""
    at: dict[str, Any] = {}

    def record(key: Any, *xs: Any) -> list[Any]:
        at["key"] = key
        return list(function(*xs))

    return build(record, [type_of(KEY), *map(type_of, args)], key=lambda: at["key"])


def draw(function: Any, *args: Array) -> list[Any]:
    """What a network would draw."""
    return evaluate(recorded(function, *args), [KEY, *args])


def test_numbers_are_words_of_the_generator() -> None:
    """Element e of row r is word e % 4 of Philox(e // 4, r, counter, stream)."""
    u = cr.random.uniform((3, 6), seed=7)
    for row, element in np.ndindex(3, 6):
        bits = philox([np.array([w], np.uint64) for w in (element // 4, row, 0, 1)], [7, 0])[element % 4][0]
        assert u[row, element] == np.float32((int(bits) >> 8) * 2.0**-24)
    wide = cr.random.uniform((2, 3), seed=7, dtype=np.float64)
    for row, element in np.ndindex(2, 3):
        high, low = (int(philox([np.array([w], np.uint64) for w in (0, row, 0, s)], [7, 0])[element][0]) for s in (1, 2))
        assert wide[row, element] == ((high >> 5) * 2**26 + (low >> 6)) / 2**53


def test_a_row_does_not_depend_on_the_number_of_rows_nor_on_the_shape_of_a_row() -> None:
    for function in (cr.random.uniform, cr.random.normal, cr.random.bernoulli):
        whole = function((6, 4), seed=3)
        np.testing.assert_array_equal(function((2, 4), seed=3), whole[:2])
        np.testing.assert_array_equal(function((6, 2, 2), seed=3), whole.reshape(6, 2, 2))
        np.testing.assert_array_equal(function((6, 3), seed=3), whole[:, :3])
        np.testing.assert_array_equal(function((6,), seed=3), whole[:, 0])
        np.testing.assert_array_equal(function(6, seed=3), whole[:, 0])
        np.testing.assert_array_equal(function((), seed=3), whole[0, 0])
        assert function((0, 4), seed=3).shape == (0, 4)
        assert function((4, 0), seed=3).shape == (4, 0)


# ---- distributions -----------------------------------------------------------------------------------------------------------


def assert_moments(x: Array, mean: float, variance: float, kurtosis: float) -> None:
    """Mean and variance within 4 standard errors."""
    x = np.asarray(x, np.float64)
    assert abs(x.mean() - mean) < 4 * math.sqrt(variance / x.size)
    assert abs(x.var() - variance) < 4 * variance * math.sqrt((kurtosis - 1) / x.size)


def assert_distribution(x: Array, function: Any) -> None:
    """Kolmogorov and Smirnov's statistic below the bound for a probability of 0.0001."""
    x = np.sort(np.asarray(x, np.float64).ravel())
    steps = np.arange(1, x.size + 1) / x.size
    expected = np.array([function(v) for v in x])
    assert max(np.max(steps - expected), np.max(expected - steps + 1 / x.size)) < 2.23 / math.sqrt(x.size)


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distributions(seed: int, dtype: Any) -> None:
    u = cr.random.uniform((MANY // 8, 8), -1.0, 3.0, seed=seed, dtype=dtype)
    assert (u.dtype, u.shape) == (dtype, (MANY // 8, 8))
    assert u.min() >= -1
    assert u.max() < 3
    assert_moments(u, 1.0, 16 / 12, 1.8)
    assert_distribution(u, lambda v: (v + 1) / 4)
    z = cr.random.normal((MANY // 8, 8), 2.0, 0.5, seed=seed, dtype=dtype)
    assert z.dtype == dtype
    assert np.all(np.isfinite(z))
    assert_moments(z, 2.0, 0.25, 3.0)
    assert_distribution(z, lambda v: 0.5 * math.erfc((2 - v) / 0.5 / math.sqrt(2)))
    c = np.corrcoef(np.asarray(z[:, :7], float).ravel(), np.asarray(z[:, 1:], float).ravel())[0, 1]
    assert abs(c) < 4 / math.sqrt(MANY * 7 / 8)  # neighbours, the two of one transform among them
    assert abs(np.corrcoef(np.asarray(z[:-1], float).ravel(), np.asarray(z[1:], float).ravel())[0, 1]) < 4 / math.sqrt(MANY)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_bernoulli(p: float) -> None:
    b = cr.random.bernoulli((MANY,), p, seed=5)
    assert b.dtype == bool
    assert abs(b.mean() - p) <= 4 * math.sqrt(p * (1 - p) / MANY)
    runs = np.mean(b[1:] == b[:-1])
    assert abs(runs - (p * p + (1 - p) ** 2)) <= 5 * math.sqrt(p * (1 - p) / MANY)


def test_parameters_may_be_arrays_and_broadcast() -> None:
    p = np.array([0.0, 1.0, 0.5])
    b = cr.random.bernoulli((200, 3), p, seed=1)
    assert (b[:, 0].any(), b[:, 1].all(), 0 < b[:, 2].mean() < 1) == (False, True, True)
    z = cr.random.normal((2000, 2), np.array([0.0, 10.0]), np.array([1.0, 0.1]), seed=1)
    assert z.dtype == np.float32
    np.testing.assert_allclose(z.mean(0), [0, 10], atol=0.15)
    np.testing.assert_allclose(z.std(0), [1, 0.1], rtol=0.1)
    low = cr.random.uniform((5, 2), np.array([0.0, 5.0]), 6.0, seed=1)
    assert (low[:, 1] >= 5).all()


def test_the_largest_normal_number_is_finite() -> None:
    """1 - u is taken, which lies in (0, 1], so that the logarithm is finite for every word."""
    top = np.float32(1 - 2.0**-24)
    assert math.isfinite(math.sqrt(-2 * math.log1p(-float(top))))
    z = cr.random.normal((200_000,), seed=9)
    assert 4 < np.abs(z).max() < 6


# ---- seeds and streams -------------------------------------------------------------------------------------------------------


def test_seeds_keys_and_numbers_differ() -> None:
    draws = [cr.random.uniform(8, seed=s).tobytes() for s in (0, 1, 2, 2**32, 2**32 + 1, 2**64 - 1)]
    assert len(set(draws)) == len(draws)
    np.testing.assert_array_equal(cr.random.normal(8, seed=4), cr.random.normal(8, seed=4))
    folded = {np.asarray(fold_in(key_of(s), n)).tobytes() for s in range(20) for n in range(20)}
    assert len(folded) == 400
    assert key_of(2**33 + 5).tolist() == [5, 2]


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "0", True, None])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(UsageError, match="seed"):
        cr.random.uniform(3, seed=seed)


def test_no_key_and_wrong_types() -> None:
    with pytest.raises(UsageError, match="seed"):
        cr.grad(lambda x: x * cr.random.uniform())(1.0)
    with pytest.raises(UsageError, match="float32 or float64"):
        cr.random.uniform(3, seed=0, dtype=np.float16)


def test_each_use_in_the_program_text_has_a_stream_of_its_own() -> None:
    shape = (4, 4)
    uniform, normal, bernoulli, wide = cr.random.uniform, cr.random.normal, cr.random.bernoulli, np.float64
    uses = draw(lambda: [uniform(shape), uniform(shape), bernoulli(shape), normal(shape), uniform(shape, dtype=wide),
                         uniform(shape, dtype=wide), normal(shape)])  # fmt: skip
    numbers = [np.asarray(u, np.float32).tobytes() for u in uses]
    assert len(set(numbers)) == len(numbers)
    again = draw(lambda: [cr.random.uniform(shape), cr.random.uniform(shape)])
    np.testing.assert_array_equal(again[0], uses[0])
    np.testing.assert_array_equal(again[1], uses[1])
    types = (np.float32, np.float64)
    graph = recorded(lambda: [f(shape, dtype=t) for f in (cr.random.normal, cr.random.uniform) for t in types])
    streams = [n.attrs["stream"] for n in graph.nodes() if n.op == "random_bits"]
    assert len(streams) == len(set(streams)) == 2 + 4 + 1 + 2  # nobody reads another's words
    pairs = draw(lambda: [cr.random.normal((500,), dtype=np.float64) for _ in range(4)])
    c = np.corrcoef(pairs)
    assert np.max(np.abs(c - np.eye(4))) < 5 / math.sqrt(500)


def test_numbers_are_the_same_recorded_normalized_and_at_once() -> None:
    def f() -> Any:
        return [cr.random.normal((3, 5)), cr.random.uniform((2,), dtype=np.float64), cr.random.bernoulli((7,), 0.3)]

    graph = recorded(f)
    for a, b in zip(evaluate(graph, [KEY]), evaluate(normalize(graph), [KEY]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(cr.compile(lambda: cr.random.normal((3,), seed=8))(), cr.random.normal((3,), seed=8))
    seeded = cr.compile(lambda s: cr.random.uniform((64,), seed=s))
    assert not np.array_equal(seeded(np.uint32(1)), seeded(np.uint32(2)))


# ---- loops and derivatives ---------------------------------------------------------------------------------------------------


def scanned(length: int, reverse: bool = False) -> Any:
    return cr.scan(lambda h, x: (h, cr.random.uniform((4,)) + 0 * x), 0.0, np.zeros(length), reverse=reverse)[1]


def test_each_time_of_a_loop_draws_anew_and_two_loops_differ() -> None:
    one, two = draw(lambda: [scanned(6), scanned(6)])
    assert len({row.tobytes() for row in np.concatenate([one, two])}) == 12
    longer, backwards = draw(lambda: [scanned(9), scanned(6)])
    np.testing.assert_array_equal(longer[:6], one)  # a time draws the same however many follow
    np.testing.assert_array_equal(backwards, two)
    back = draw(lambda: [scanned(6, reverse=True)])[0]
    np.testing.assert_array_equal(back, one)  # and from whichever end the loop comes


def test_uses_inside_a_loop_body_and_nested_loops_differ() -> None:
    def inner() -> Any:
        def step(h: Any, x: Any) -> Any:
            a, b = cr.random.uniform((4,)), cr.random.uniform((4,))
            _, c = cr.scan(lambda k, y: (k, cr.random.uniform((4,)) + 0 * y), 0.0, np.zeros(3))
            return h, np.concatenate([a[None] + 0 * x, b[None], c])

        return cr.scan(step, 0.0, np.zeros(5))[1]

    rows = draw(lambda: [inner(), cr.random.uniform((4,))])
    flat = [r.tobytes() for r in np.concatenate([np.reshape(rows[0], (-1, 4)), rows[1][None]])]
    assert len(set(flat)) == len(flat) == 26


def test_the_backward_pass_sees_the_same_numbers() -> None:
    def loss(w: Any) -> Any:
        mask = cr.random.bernoulli((6,), 0.5)

        def step(h: Any, x: Any) -> Any:
            drop = cr.random.bernoulli((6,), 0.5)
            return h + np.where(drop, w * x, 0.0), drop

        h, drops = cr.scan(step, np.zeros(6), np.arange(1.0, 5.0))
        return np.sum(np.where(mask, h, 0.0)), {"mask": mask, "drops": drops}

    def both(w: Any) -> Any:
        value, extra, g = differentiate(loss, w)
        return value, extra["mask"], extra["drops"], g

    value, mask, drops, g = draw(both, np.ones(6))
    wanted = mask * (drops * np.arange(1.0, 5.0)[:, None]).sum(0)
    np.testing.assert_array_equal(g, wanted)
    assert value == wanted.sum()
    assert 0 < drops.sum() < drops.size


def test_derivatives_by_the_parameters_of_a_distribution() -> None:
    """The reparametrised gradient: z = μ + σ ε."""
    z = lambda m, s: cr.random.normal((50,), m, s, seed=2, dtype=np.float64)
    e = z(0.0, 1.0)
    gm, gs = cr.grad(lambda m, s: np.sum(z(m, s) ** 2), (0, 1))(0.3, 0.7)
    np.testing.assert_allclose(gm, np.sum(2 * (0.3 + 0.7 * e)), rtol=1e-12)
    np.testing.assert_allclose(gs, np.sum(2 * (0.3 + 0.7 * e) * e), rtol=1e-12)
    assert cr.grad(lambda p: np.sum(cr.random.bernoulli((50,), p, seed=2) * 1.0))(0.5) == 0
