"""Optimizers against their papers' equations written as loops over single weights, and what all of them share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from chainrule import optim, schedules
from chainrule.errors import UnknownNameError, UsageError
from chainrule.optim import LBFGS, SGD, Adam, AdamW, Optimizer, RAdam, Rprop, apply_update, penalty, resolve
from chainrule.optim import optimizers as registry

RULES = [(name, options) for name, rule in registry.items() if not rule.driver for options in rule.examples]
IDS = [f"{name}-{'-'.join(options) or 'default'}" for name, options in RULES]
RATE = 0.03
STEPS = 12


def sgd(g: list[float], w: float, o: SGD) -> float:
    m = 0.0
    for x in g:
        m = o.momentum * m + x
        w -= RATE * (x + o.momentum * m if o.nesterov else m)
    return w


def adagrad(g: list[float], w: float, o: Any) -> float:
    for t, x in enumerate(g, 1):
        w -= RATE * x / (math.sqrt(sum(y * y for y in g[:t])) + o.eps)
    return w


def adadelta(g: list[float], w: float, o: Any) -> float:
    squares = steps = 0.0
    for x in g:
        squares = o.rho * squares + (1 - o.rho) * x * x
        d = math.sqrt(steps + o.eps) / math.sqrt(squares + o.eps) * x
        steps = o.rho * steps + (1 - o.rho) * d * d
        w -= RATE * d
    return w


def rmsprop(g: list[float], w: float, o: Any) -> float:
    v = a = m = 0.0
    for x in g:
        v = o.rho * v + (1 - o.rho) * x * x
        a = o.rho * a + (1 - o.rho) * x
        m = o.momentum * m + x / (math.sqrt(v - a * a if o.centered else v) + o.eps)
        w -= RATE * m
    return w


def rprop(g: list[float], w: float, o: Any) -> float:
    size, last = RATE, 0.0
    for x in g:
        if x * last > 0:
            size = min(size * o.grow, o.largest)
        elif x * last < 0:
            size, x = max(size * o.shrink, o.smallest), 0.0
        w -= size * ((x > 0) - (x < 0))
        last = x
    return w


def moments(g: list[float], o: Any) -> Iterator[tuple[int, float, float, float]]:
    """(t, gₜ, mₜ, vₜ) as sums over all gradients so far."""
    for t in range(1, len(g) + 1):
        m = sum((1 - o.beta1) * o.beta1 ** (t - i) * g[i - 1] for i in range(1, t + 1))
        v = sum((1 - o.beta2) * o.beta2 ** (t - i) * g[i - 1] ** 2 for i in range(1, t + 1))
        yield t, g[t - 1], m, v


def adam(g: list[float], w: float, o: Any) -> float:
    for t, _, m, v in moments(g, o):
        step = m / (1 - o.beta1**t) / (math.sqrt(v / (1 - o.beta2**t)) + o.eps)
        w = w - RATE * step - RATE * o.weight_decay * w
    return w


def adamax(g: list[float], w: float, o: Any) -> float:
    for t, _, m, _ in moments(g, o):
        u = max(o.beta2 ** (t - i) * (abs(g[i - 1]) + o.eps) for i in range(1, t + 1))
        w -= RATE / (1 - o.beta1**t) * m / u
    return w


def nadam(g: list[float], w: float, o: Any) -> float:
    def mu(t: int) -> float:
        return o.beta1 * (1 - 0.5 * 0.96 ** (t * o.momentum_decay))

    for t, x, m, v in moments(g, o):
        product = math.prod(mu(i) for i in range(1, t + 1))
        mean = mu(t + 1) * m / (1 - product * mu(t + 1)) + (1 - mu(t)) * x / (1 - product)
        w -= RATE * mean / (math.sqrt(v / (1 - o.beta2**t)) + o.eps)
    return w


def rho_of(t: int, beta2: float) -> float:
    return 2 / (1 - beta2) - 1 - 2 * t * beta2**t / (1 - beta2**t)


def radam(g: list[float], w: float, o: Any) -> float:
    limit = 2 / (1 - o.beta2) - 1
    for t, _, m, v in moments(g, o):
        rho, step = rho_of(t, o.beta2), m / (1 - o.beta1**t)
        if rho > 5:
            r = math.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
            step *= r * math.sqrt(1 - o.beta2**t) / (math.sqrt(v) + o.eps)
        w -= RATE * step
    return w


def lion(g: list[float], w: float, o: Any) -> float:
    m = 0.0
    for x in g:
        w -= RATE * math.copysign(1, o.beta1 * m + (1 - o.beta1) * x)
        m = o.beta2 * m + (1 - o.beta2) * x
    return w


ORACLES: dict[str, Callable[[list[float], float, Any], float]] = {
    "sgd": sgd,
    "adagrad": adagrad,
    "adadelta": adadelta,
    "rmsprop": rmsprop,
    "rprop": rprop,
    "adam": adam,
    "adamw": adam,
    "adamax": adamax,
    "nadam": nadam,
    "radam": radam,
    "lion": lion,
}


def scalars(values: dict[str, float], dtype: Any) -> dict[str, Any]:
    return {name: np.asarray(value, dtype)[()] for name, value in values.items()}


def run(
    optimizer: Optimizer, parameters: dict[str, np.ndarray], gradients: list[dict[str, np.ndarray]]
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Steps with read-only arrays, so that writing into an old value raises."""
    dtype = next(iter(parameters.values())).dtype
    h = scalars({"learning_rate": optimizer.schedule(np.zeros(1), 1)[0], **optimizer.hyper()}, dtype)
    slots, shared = {name: optimizer.slots(w) for name, w in parameters.items()}, scalars(optimizer.shared(), dtype)
    for g in gradients:
        for array in [*parameters.values(), *g.values(), *(a for kept in slots.values() for a in kept.values())]:
            array.flags.writeable = False
        parameters, slots, shared = apply_update(optimizer, parameters, g, slots, shared, h)
    return parameters, slots, shared


def problem(dtype: Any = np.float64, steps: int = STEPS) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """A weight and a bias with gradients of all sizes, some of them 0 at first."""
    rng = np.random.default_rng(0)
    shapes = {"weight": (3, 2), "bias": (4,)}
    parameters = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    size = {name: 10.0 ** rng.uniform(-4, 2, size=shape) for name, shape in shapes.items()}
    gradients = [{n: (size[n] * rng.normal(0.3, 1, shape)).astype(dtype) for n, shape in shapes.items()} for _ in range(steps)]
    return parameters, gradients


@pytest.mark.parametrize(("name", "options"), RULES, ids=IDS)
def test_every_rule_follows_its_equation(name: str, options: dict[str, Any]) -> None:
    optimizer = registry[name](RATE, **options)
    parameters, gradients = problem()
    new, _, _ = run(optimizer, parameters, gradients)
    plain = registry[name](RATE, **{**options, "weight_decay": 0.0})  # biases do not decay
    for key, o in (("weight", optimizer), ("bias", plain)):
        for place in np.ndindex(parameters[key].shape):
            expected = ORACLES[name]([float(g[key][place]) for g in gradients], float(parameters[key][place]), o)
            assert new[key][place] == pytest.approx(expected, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize(("name", "options"), RULES, ids=IDS)
def test_every_rule_keeps_the_contract(name: str, options: dict[str, Any]) -> None:
    optimizer = registry[name](RATE, clip_norm=3, clip_value=2, l1=0.1, l2=0.1, **{"weight_decay": 0.1, **options})
    results = []
    for dtype in (np.float32, np.float64):
        new, slots, shared = run(optimizer, *problem(dtype))
        for key, shape in (("weight", (3, 2)), ("bias", (4,))):
            assert (new[key].shape, new[key].dtype) == (shape, dtype)
            assert set(slots[key]) == set(optimizer.slots(new[key]))
            for array in (*slots[key].values(), *optimizer.slots(new[key]).values()):
                assert (array.shape, array.dtype) == (shape, dtype)
        assert set(shared) == set(optimizer.shared())
        assert all(np.asarray(value).dtype == dtype and np.ndim(value) == 0 for value in shared.values())
        results.append(new)
    np.testing.assert_allclose(results[0]["weight"], results[1]["weight"], rtol=2e-4, atol=2e-5)
    assert set(optimizer.hyper()) >= {"clip_norm", "clip_value", "l1", "l2", "weight_decay"}
    assert all(type(value) is float for value in optimizer.hyper().values())


@pytest.mark.parametrize("name", registry)
def test_every_optimizer_can_be_saved(name: str) -> None:
    for options in registry[name].examples:
        for rate in (0.5, schedules.warmup_cosine(0.5, warmup=10)):
            if registry[name].driver and rate != 0.5:
                continue
            optimizer = registry[name](rate, l2=0.1, **options)
            assert optim.from_config(json.loads(json.dumps(optim.config(optimizer)))) == optimizer
            assert optimizer.schedule == schedules.resolve(rate)
    assert registry[name]().name == name
    text = registry[name].__doc__
    assert text
    assert ">>>" in text


@pytest.mark.parametrize(("name", "options"), RULES, ids=IDS)
def test_a_gradient_of_zero_moves_nothing_and_nan_shows(name: str, options: dict[str, Any]) -> None:
    optimizer = registry[name](RATE, **{**options, "weight_decay": 0.0})
    parameters, _ = problem()
    new, _, _ = run(optimizer, parameters, [{key: np.zeros_like(w) for key, w in parameters.items()}] * 3)
    for key, w in parameters.items():
        np.testing.assert_array_equal(new[key], w)
    new, _, _ = run(optimizer, parameters, [{key: np.full_like(w, math.nan) for key, w in parameters.items()}])
    assert all(np.isnan(w).all() for w in new.values())


def test_l2_and_l1_are_the_gradient_of_the_penalty() -> None:
    optimizer = SGD(1.0, l1=0.3, l2=0.7)
    parameters, _ = problem()
    zero = {name: np.zeros_like(w) for name, w in parameters.items()}
    new, _, _ = run(optimizer, parameters, [zero])
    np.testing.assert_array_equal(new["bias"], parameters["bias"])
    h = optimizer.hyper()
    assert penalty(optimizer, parameters, h) == pytest.approx(
        0.3 * np.abs(parameters["weight"]).sum() + 0.35 * (parameters["weight"] ** 2).sum()
    )
    for place in np.ndindex(3, 2):
        step = np.zeros((3, 2))
        step[place] = 1e-6
        up, down = (penalty(optimizer, {**parameters, "weight": parameters["weight"] + d}, h) for d in (step, -step))
        assert parameters["weight"][place] - new["weight"][place] == pytest.approx((up - down) / 2e-6, rel=1e-7)
    assert penalty(SGD(), parameters, {}) == 0.0


def test_clipping_by_value_then_by_norm_after_penalties() -> None:
    parameters = {"a": np.array([[1.0, -2.0]]), "b": np.array([3.0])}
    g = {"a": np.array([[-4.0, 0.5]]), "b": np.array([0.2])}
    new, _, _ = run(SGD(1.0, l2=0.5, clip_value=1.0, clip_norm=0.9), parameters, [g])
    a = [max(-1, min(1, -4 + 0.5 * 1)), max(-1, min(1, 0.5 - 0.5 * 2))]
    norm = math.sqrt(a[0] ** 2 + a[1] ** 2 + 0.2**2)
    np.testing.assert_allclose(new["a"], [[1 - a[0] * 0.9 / norm, -2 - a[1] * 0.9 / norm]], rtol=1e-14)
    np.testing.assert_allclose(new["b"], [3 - 0.2 * 0.9 / norm], rtol=1e-14)


def test_a_norm_below_the_limit_changes_no_bit() -> None:
    parameters, gradients = problem(np.float32)
    plain, _, _ = run(Adam(RATE), parameters, gradients)
    clipped, _, _ = run(Adam(RATE, clip_norm=1e6, clip_value=1e6), parameters, gradients)
    for name in parameters:
        np.testing.assert_array_equal(plain[name], clipped[name])


def test_weight_decay_reads_the_old_weight_and_spares_biases() -> None:
    parameters, (g,) = problem(steps=1)
    decayed, _, _ = run(SGD(0.1, weight_decay=0.5), parameters, [g])
    np.testing.assert_allclose(decayed["weight"], parameters["weight"] * 0.95 - 0.1 * g["weight"], rtol=1e-13)
    np.testing.assert_array_equal(decayed["bias"], parameters["bias"] - 0.1 * g["bias"])


def test_adamw_is_adam_with_decay() -> None:
    parameters, gradients = problem()
    w, _, _ = run(AdamW(RATE), parameters, gradients)
    same, _, _ = run(Adam(RATE, weight_decay=0.01), parameters, gradients)
    np.testing.assert_array_equal(w["weight"], same["weight"])


def test_adam_does_not_care_about_the_gradients_scale() -> None:
    parameters, gradients = problem()
    scaled = [{name: 1024 * g for name, g in step.items()} for step in gradients]
    one, two = run(Adam(RATE, eps=1e-300), parameters, gradients)[0], run(Adam(RATE, eps=1e-300), parameters, scaled)[0]
    np.testing.assert_allclose(one["weight"], two["weight"], rtol=1e-12)


@pytest.mark.parametrize("beta2", [0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_radam_knows_when_to_trust(beta2: float, dtype: Any) -> None:
    """The recurrence agrees with the closed form in float64 at every step, and float32 takes the same branch."""
    optimizer = RAdam(beta2=beta2)
    shared, h = scalars(optimizer.shared(), dtype), scalars(optimizer.hyper(), dtype)
    for t in range(1, 2000):
        shared = optimizer.advance(shared, h)
        rho, exact = 2 * shared["ramp"] / shared["sum"] - 1, rho_of(t, beta2)
        assert rho == pytest.approx(exact, rel=3e-3 if dtype == np.float32 else 1e-8)
        assert (rho > 5) == (exact > 5)


def test_rprop_sees_signs_of_tiny_gradients() -> None:
    """The product of two float32 gradients of 1e-30 is 0; their signs still agree."""
    g = {"w": np.full((1, 1), 1e-30, np.float32)}
    new, slots, _ = run(Rprop(0.1), {"w": np.zeros((1, 1), np.float32)}, [g, g])
    assert slots["w"]["size"] == np.float32(0.1) * np.float32(1.2)
    assert new["w"] == pytest.approx(-0.22)


def test_every_rule_lowers_a_quadratic() -> None:
    for name, options in RULES:
        optimizer = registry[name](**options)
        w = {"w": np.array([[2.0, -1.5]])}
        h = {"learning_rate": optimizer.schedule.learning_rate, **optimizer.hyper()}
        slots, shared = {"w": optimizer.slots(w["w"])}, optimizer.shared()
        for _ in range(50):
            w, slots, shared = apply_update(optimizer, w, {"w": w["w"] * [1.0, 10.0]}, slots, shared, h)
        assert np.sum(w["w"] ** 2 * [1.0, 10.0]) < 4 + 22.5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adam", {"learning_rate": -1}, r"Adam\(learning_rate=-1\): learning_rate must be a finite number, 0 or more, or a"),
        ("adam", {"learning_rate": math.nan}, r"learning_rate must be a finite number"),
        ("adam", {"learning_rate": None}, r"learning_rate must be a finite number"),
        ("adam", {"beta1": 1.0}, r"Adam\(beta1=1.0\): beta1 must be a number at least 0 and less than 1"),
        ("adam", {"beta2": math.nan}, r"beta2 must be a number at least 0"),
        ("adam", {"eps": 0}, r"eps must be a number above 0"),
        ("adam", {"clip_norm": 0}, r"clip_norm must be a number above 0, or None"),
        ("adam", {"clip_value": "1"}, r"clip_value must be a number above 0, or None"),
        ("adam", {"l1": -1}, r"l1 must be a number 0 or more"),
        ("adam", {"l2": None}, r"l2 must be a number 0 or more"),
        ("adam", {"weight_decay": math.inf}, r"weight_decay must be"),
        ("adam", {"accumulate": 0}, r"accumulate must be a whole number, 1 or more"),
        ("adam", {"accumulate": 1.5}, r"accumulate must be a whole number"),
        ("sgd", {"momentum": True}, r"momentum must be a number"),
        ("sgd", {"nesterov": True}, r"nesterov must be False where momentum is 0"),
        ("radam", {"beta2": 0.5}, r"beta2 must be above 0.6"),
        ("rprop", {"grow": 1.0}, r"grow must be a number above 1"),
        ("rprop", {"smallest": 100}, r"smallest must be at most largest"),
        ("lbfgs", {"learning_rate": schedules.cosine()}, r"learning_rate must be a number above 0: the line search"),
        ("lbfgs", {"clip_norm": 1.0}, r"clip_norm must be None: this method needs the true gradient"),
        ("lbfgs", {"weight_decay": 0.1}, r"weight_decay must be 0.0"),
        ("lbfgs", {"accumulate": 2}, r"accumulate must be 1"),
        ("lbfgs", {"history": 0}, r"history must be a whole number, 1 or more"),
    ],
)
def test_bad_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        registry[name](**options)


def test_resolve() -> None:
    assert resolve("adam") == resolve("Adam") == resolve(Adam) == Adam(schedules.constant(1e-3))
    assert resolve(SGD(0.1)) == SGD(0.1)
    with pytest.raises(UnknownNameError, match='Did you mean "rmsprop"'):
        resolve("rms_prop")
    with pytest.raises(UsageError, match="an optimizer is a name"):
        resolve(0.1)
    with pytest.raises(UsageError, match="does not take these options"):
        optim.from_config({"name": "adam", "betas": [0.9, 0.999]})


def test_hyper_says_what_the_program_needs() -> None:
    assert SGD(0.1).hyper() == {}
    assert set(SGD(0.1, momentum=0.5, l2=0.1).hyper()) == {"momentum", "l2"}
    assert set(Adam(0.1, beta1=0).hyper()) == {"beta1", "beta2", "eps"}
    assert LBFGS(l2=0.5).hyper() == {"l2": 0.5}


# ------------------------------------------------------------------------------------------------------------------------ LBFGS


def rosenbrock(w: np.ndarray) -> tuple[float, np.ndarray]:
    a, b = w[:-1], w[1:]
    gradient = np.zeros_like(w)
    gradient[:-1] += -400 * a * (b - a * a) - 2 * (1 - a)
    gradient[1:] += 200 * (b - a * a)
    return float(np.sum(100 * (b - a * a) ** 2 + (1 - a) ** 2)), gradient


def minimise(
    optimizer: LBFGS, evaluate: Callable[[np.ndarray], tuple[float, np.ndarray]], w: np.ndarray, limit: int = 2000
) -> tuple[np.ndarray, list[float], dict[str, Any]]:
    """Iterate to convergence; the values never rise, and are those of the weights."""
    values, state = [evaluate(w)[0]], dict[str, Any]()
    for _ in range(limit):
        w, value, state = optimizer.iterate(evaluate, w, state)
        assert value <= values[-1]
        values.append(value)
        if state["converged"]:
            break
    assert value == evaluate(w)[0]
    np.testing.assert_array_equal(state["gradient"], evaluate(w)[1])
    return w, values, state


@pytest.mark.parametrize("n", [2, 10])
def test_lbfgs_on_rosenbrock(n: int) -> None:
    w, values, state = minimise(LBFGS(change_tolerance=0.0), rosenbrock, np.tile([-1.2, 1.0], n // 2))
    assert state["converged"]
    assert len(values) <= 120
    assert state["evaluations"] <= 150
    np.testing.assert_allclose(w, 1.0, atol=1e-6)


def test_lbfgs_on_an_ill_conditioned_quadratic() -> None:
    scales = np.logspace(0, 4, 20)
    optimizer = LBFGS(change_tolerance=0.0)
    w, values, state = minimise(optimizer, lambda w: (0.5 * float(w @ (scales * w)), scales * w), np.ones(20))
    assert state["converged"]
    np.testing.assert_allclose(w, 0.0, atol=1e-7)
    assert len(values) < 700  # as many as other implementations with ten pairs


def test_lbfgs_solves_a_quadratic_in_as_many_steps_as_dimensions() -> None:
    """With exact line searches it is the conjugate gradient method; with these it needs a few more."""
    scales = np.array([1.0, 3.0, 10.0])
    _, values, _ = minimise(LBFGS(), lambda w: (0.5 * float(w @ (scales * w)), scales * w), np.ones(3))
    assert len(values) <= 15


@pytest.mark.parametrize("rate", [1.0, 1000.0])
def test_lbfgs_steps_back_from_nan_and_infinity(rate: float) -> None:
    def barrier(w: np.ndarray) -> tuple[float, np.ndarray]:
        if np.any(w <= 0):
            return (math.nan if w[0] <= 0 else math.inf), np.full(w.shape, math.nan)
        return float(np.sum(w - np.log(w))), 1 - 1 / w

    w, _, state = minimise(LBFGS(rate), barrier, np.array([0.01, 5.0, 300.0]))
    assert state["converged"]
    np.testing.assert_allclose(w, 1.0, atol=1e-4)


def test_lbfgs_meets_the_strong_wolfe_conditions() -> None:
    w, state = np.array([-1.2, 1.0]), dict[str, Any]()
    _, gradient = rosenbrock(w)
    value = rosenbrock(w)[0]
    for _ in range(20):
        new, new_value, state = LBFGS().iterate(rosenbrock, w, state)
        step = new - w
        assert new_value <= value + 1e-4 * step @ gradient
        assert abs(state["gradient"] @ step) <= 0.9 * abs(gradient @ step)
        w, value, gradient = new, new_value, state["gradient"]


def test_lbfgs_two_loops_are_the_dense_update() -> None:
    """H from the pairs by the BFGS formula (Nocedal & Wright 2006, equation 6.17), started from the scaled identity."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5, 5))
    s = rng.normal(size=(3, 5))
    y = s @ (a @ a.T + np.eye(5))
    h = np.eye(5) * (s[-1] @ y[-1]) / (y[-1] @ y[-1])
    for move, turn in zip(s, y, strict=True):
        v = np.eye(5) - np.outer(turn, move) / (turn @ move)
        h = v.T @ h @ v + np.outer(move, move) / (turn @ move)
    g = rng.normal(size=5)
    np.testing.assert_allclose(optim._two_loops(g, s, y), -h @ g, rtol=1e-10)


def test_lbfgs_goes_on_from_a_saved_state(tmp_path: Any) -> None:
    optimizer, w, state = LBFGS(history=3), np.array([-1.2, 1.0]), dict[str, Any]()
    for _ in range(6):
        w, _, state = optimizer.iterate(rosenbrock, w, state)
    assert state["s"].shape == state["y"].shape == (3, 2)
    np.savez(tmp_path / "state.npz", **state)
    with np.load(tmp_path / "state.npz") as file:
        loaded = {name: file[name] if file[name].ndim else file[name].item() for name in file.files}
    fresh = optimizer.renew(state)  # as at the start of another fit on the same data
    assert set(fresh) == {"s", "y", "evaluations"}
    ends = []
    for start in (state, loaded, fresh):
        end = w
        for _ in range(5):
            end, _, start = optimizer.iterate(rosenbrock, end, start)
        ends.append(end)
    np.testing.assert_array_equal(ends[0], ends[1])
    np.testing.assert_array_equal(ends[0], ends[2])


def test_lbfgs_stays_where_there_is_nothing_to_gain() -> None:
    w = np.ones(2)
    same, value, state = LBFGS().iterate(rosenbrock, w, {})
    assert (same is w, value, state["converged"]) == (True, 0.0, True)

    same, value, state = LBFGS().iterate(lambda w: (math.nan, w), w, {})
    assert same is w
    assert math.isnan(value)
    assert not state["converged"]

    # A gradient that points the wrong way: no lower point exists along it.
    same, value, state = LBFGS().iterate(lambda w: (float(w @ w), -2 * w), w, {})
    assert (same is w, value, state["converged"]) == (True, 2.0, True)


def test_lbfgs_drops_pairs_that_mislead() -> None:
    """Pairs of another objective: where they find no lower point, the next iteration goes down the gradient."""
    state = {"s": np.array([[1.0, 0.0], [0.0, 1.0]]), "y": np.array([[1e-9, 0.0], [0.0, 1e9]])}
    w, values = np.array([3.0, 4.0]), [25.0]
    for _ in range(60):
        w, value, state = LBFGS().iterate(lambda w: (float(w @ w), 2 * w), w, state)
        assert value <= values[-1]
        values.append(value)
    assert value < 1e-8


def test_lbfgs_with_the_rounding_of_float32() -> None:
    def rough(w: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = rosenbrock(w.astype(np.float32))
        return float(np.float32(value)), gradient.astype(np.float64)

    w, _, state = minimise(LBFGS(), rough, np.tile([-1.2, 1.0], 3))
    assert state["converged"]
    np.testing.assert_allclose(w, 1.0, atol=0.05)
