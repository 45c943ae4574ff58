"""What `cr.explain` prints of networks is true: equations give the gradients, and updates are those of the optimizers."""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from equations import NAMESPACE, Reader
from markup import check_html, check_latex

import chainrule as cr
from chainrule import nn, optim
from chainrule.explain import explain

RANDOM = np.random.default_rng(1)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape)


NETWORKS: dict[str, tuple[Callable[[], Any], Any, Any, str]] = {
    "textbook": (
        lambda: nn.Sequential(nn.Dense(3, "sigmoid"), nn.Dense(1)), normal(4, 2), np.array([0, 1, 1, 0]), "binary_cross_entropy",
    ),
    "deep": (
        lambda: nn.Sequential(nn.Dense(3, "relu"), nn.Dropout(0.2), nn.BatchNorm(), nn.Dense(4)),
        normal(6, 2),
        np.array([0, 1, 2, 3, 0, 1]),
        "cross_entropy",
    ),
    "residual": (
        lambda: nn.Sequential(
            nn.Embedding(5, 3), nn.Flatten(), nn.Residual(nn.Sequential(nn.Dense(6, "gelu"), nn.Dense(6))), nn.LayerNorm(),
            nn.Activation("tanh"), nn.Reshape(2, 3), nn.Flatten(), nn.Dense(1),
        ),
        RANDOM.integers(0, 5, (4, 2)),
        normal(4),
        "mse",
    ),
    "images": (
        lambda: nn.Sequential(
            nn.Conv2D(4, 3, 2, "same", "tanh", groups=2), nn.BatchNorm(), nn.MaxPool2D(3, 1, 1), nn.Dropout2D(0.2),
            nn.Residual(nn.Conv2D(4, 2), nn.AvgPool2D(2, 1)), nn.Flatten(), nn.Dense(1),
        ),
        normal(3, 6, 5, 2),
        normal(3),
        "mse",
    ),
    "time": (
        lambda: nn.Sequential(
            nn.Conv1D(3, 2, padding="causal", dilation=2, activation="softplus"), nn.MaxPool1D(2), nn.AvgPool1D(2, padding="same"),
            nn.GlobalAvgPool(), nn.Dense(3),
        ),
        normal(4, 7, 2),
        np.array([0, 1, 2, 0]),
        "cross_entropy",
    ),
    "functions": (
        lambda: nn.Sequential(nn.Dense(4, "silu"), lambda x: x * np.cos(x), nn.Dense(2, "softplus")), normal(5, 3), normal(5, 2), "huber",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("training", [True, False])
def test_the_equations_of_a_network_give_its_gradients(name: str, training: bool) -> None:
    make, x, y, loss = NETWORKS[name]
    net = make()
    net.fit(x, y, loss=loss, epochs=0, seed=1, dtype="float64")
    kept = explain(net, x, y, loss=loss, training=training, seed=3, numbers=True)
    plain = explain(net, x, y, loss=loss, training=training, seed=3)
    reader = Reader(plain.text, kept.values, kept.values)
    symbols = {n.about: n.var.name for n in plain.document.names}
    gradients = net.gradients(x, y, loss=loss, training=training, seed=3)
    np.testing.assert_allclose(reader["L"], kept.values["L"], rtol=1e-9)
    for parameter, want in gradients.items():
        for found in (reader[f"∂L/∂{symbols[parameter]}"], kept.values[f"∂L/∂{symbols[parameter]}"]):
            np.testing.assert_allclose(found, want, rtol=1e-7, atol=1e-10, err_msg=f"{parameter}\n{plain.text}")
    check_latex(kept.latex)
    check_html(kept.html)


def test_a_convolution_has_one_z_and_one_a() -> None:
    net = nn.Sequential(nn.Conv2D(4, 3, activation="tanh", groups=2), nn.GlobalAvgPool(), nn.Dense(1))
    lines = [line.split("  (")[0].strip() for line in explain(net, normal(2, 4, 5, 2), normal(2), loss="mse").text.splitlines()]
    at = lines.index("Layer 0: Conv2D(4, 3, activation='tanh', groups=2)")
    assert lines[at + 2 : at + 4] == [
        'z0 = reshape(einsum("ijklmno,nomlp->ijklp", v1, reshape(W0, (3, 3, 1, 2, 2))), (2, 2, 3, 4)) + b0',
        "a0 = tanh(z0)",
    ]


def test_the_textbook_network_reads_like_the_textbook() -> None:
    make, x, y, loss = NETWORKS["textbook"]
    assert (
        explain(make(), x, y, loss=loss, optimizer=cr.SGD(0.5)).text
        == """\
Sequential: 4 parameters to train, loss binary_cross_entropy

Names
  W0   (2, 3)       0.weight
  b0   (3,)         0.bias
  W1   (3, 1)       1.weight
  b1   (1,)         1.bias
  x    (4, 2)       input
  y    (4, 1)       target
  n    = 4          rows, or the sum of their weights

Forward pass
  Layer 0: Dense(3, 'sigmoid')
    z0 = x @ W0 + b0                   (4, 3)
    a0 = σ(z0)                         (4, 3)
  Layer 1: Dense(1)
    z1 = a0 @ W1 + b1                  (4, 1)
  Loss
    L = sum(logistic_loss(z1, y)) / n  number

Backward pass
  Layer 1: Dense(1)
    δ1 = (σ(z1) - y) / n              (4, 1)  ∂L/∂z1
    ∂L/∂W1 = a0.T @ δ1                (3, 1)
    ∂L/∂b1 = sum(δ1, axis=0)          (1,)
  Layer 0: Dense(3, 'sigmoid')
    δ0 = (δ1 @ W1.T) * a0 * (1 - a0)  (4, 3)  ∂L/∂z0
    ∂L/∂W0 = x.T @ δ0                 (2, 3)
    ∂L/∂b0 = sum(δ0, axis=0)          (3,)

Update: SGD
  η = 0.5 (learning_rate)
  W0 ← W0 - η * ∂L/∂W0  (2, 3)
  b0 ← b0 - η * ∂L/∂b0  (3,)
  W1 ← W1 - η * ∂L/∂W1  (3, 1)
  b1 ← b1 - η * ∂L/∂b1  (1,)

Where
  σ(x) = 1 / (1 + exp(-x))
  logistic_loss(scores, target) = log1p(exp(scores)) - target * scores"""
    )


def test_layers_cannot_break_out() -> None:
    class Evil(nn.Module):
        def __call__(self, x: Any) -> Any:
            return x * self.parameter("π_ö", (1,), "ones")

        def __repr__(self) -> str:
            return "<img src=x onerror=alert(1)>\\end{align*}\n  L = 0"

    e = explain(nn.Sequential(Evil(), nn.Dense(1)), normal(3, 2), normal(3), loss="mse", optimizer="sgd")
    check_latex(e.latex)
    check_html(e.html)
    assert e.text.count("\n  L = 0") == 0


def test_a_large_network_is_explained_within_a_second() -> None:
    net = nn.Sequential(nn.Dense(256, "relu"), nn.Dense(128, "relu"), nn.Dense(10))
    x, y = normal(128, 784), RANDOM.integers(0, 10, 128)
    net.fit(x, y, loss="cross_entropy", epochs=0)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        e = explain(net, x, y, loss="cross_entropy", optimizer="adam")
        assert all((e.text, e.latex, e.html))
        times.append(time.perf_counter() - start)
    assert min(times) < 1


# ---- updates -----------------------------------------------------------------------------------------------------------------

OPTIMIZERS = [o(**options) for o in optim.optimizers.values() if not o.driver for options in o.examples]
OPTIMIZERS += [
    cr.SGD(0.1, momentum=0.9, clip_norm=0.5, l1=0.01, l2=0.1, weight_decay=0.2),
    cr.Adam(0.1, clip_value=0.02, l2=0.1),
    cr.AdamW(0.1),
    cr.Lion(0.1, clip_norm=0.1),
    cr.SGD(cr.schedules.exponential(0.1, 0.5)),
]


def updated(text: str, values: dict[str, np.ndarray], parameters: Sequence[str]) -> dict[str, np.ndarray]:
    """The parameters after two steps of the printed rule, with the same gradient in both."""
    block = next(b for b in text.split("\n\n") if b.startswith("Update: "))
    space = {**NAMESPACE, **{f"d_{p}": values[f"∂L/∂{p}"] for p in parameters}, **{p: values[p] for p in parameters}}
    lines = block.splitlines()[1:]
    for symbol, value in re.findall(
        r"(\S+) = ([-\d.e]+)", "\n".join(li for li in lines if "(" in li and " = " in li and "←" not in li)
    ):
        space.setdefault(unicodedata.normalize("NFKC", symbol), float(value))
    starts = dict(re.findall(r"(\S+) = ([-\d.e]+)", next((li for li in lines if "before the first step" in li), "")))
    groups: list[tuple[str, list[str]]] = []
    for line in lines:
        if re.match(r"  (Once|For every)", line):
            groups.append((line, []))
        elif "←" in line or re.match(r" +k\d+ = ", line):
            if not groups:
                groups.append(("", []))
            groups[-1][1].append(re.split(r"\s{2,}", line.strip())[0])
    own: dict[str, dict[str, Any]] = {p: {} for p in parameters}
    for k, v in starts.items():
        space[unicodedata.normalize("NFKC", k)] = float(v)

    def run(equations: Sequence[str], names: dict[str, Any]) -> None:
        for equation in equations:
            left, right = re.split(r" (?:←|=) ", equation, maxsplit=1)
            code = unicodedata.normalize("NFKC", right.replace("∂L/∂", "d_"))
            for slot in set(re.findall(r"\b[a-z]+_[Wb]\d\b", code)):  # slots of one parameter: m_W0
                names.setdefault(slot, float(starts.get(slot.split("_")[0], 0)))
            names[unicodedata.normalize("NFKC", left)] = eval(code, {**names, "__builtins__": {}})

    for _ in range(2):
        for heading, equations in groups:
            if not heading.startswith("  For every"):
                run(equations, space)
                continue
            for p in parameters:
                wide = values[p].ndim >= 2
                if ("two axes or more" in heading and not wide) or ("less than two" in heading and wide):
                    continue
                slots = {
                    unicodedata.normalize("NFKC", k): float(v) for k, v in starts.items() if "β" not in k and k not in SHARED
                }
                names = {**space, **slots, **own[p], "w": space[p], "g": space[f"d_{p}"]}
                run(equations, names)
                space[p] = names["w"]
                own[p] = {k: names[k] for k in slots}
    return {p: space[p] for p in parameters}


SHARED = ("decay_power", "mu_product", "sum_", "ramp")


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
def test_the_update_that_is_printed_is_the_update(optimizer: cr.Optimizer) -> None:
    make, x, y, loss = NETWORKS["textbook"]
    net = make()
    net.fit(x, y, loss=loss, epochs=0, seed=1, dtype="float64")
    e = explain(net, x, y, loss=loss, optimizer=optimizer, numbers=True)
    plain = explain(net, x, y, loss=loss, optimizer=optimizer)
    names = ["W0", "b0", "W1", "b1"]
    found = updated(plain.text, e.values, names)
    w = {n: e.values[n] for n in names}
    g = {n: e.values[f"∂L/∂{n}"] for n in names}
    slots = {n: optimizer.slots(v) for n, v in w.items()}
    shared: Any = optimizer.shared()
    h = {"learning_rate": float(optimizer.schedule(np.zeros(1), 1)[0]), **optimizer.hyper()}
    for step in range(2):
        w, slots, shared = optim.apply_update(optimizer, w, g, slots, shared, h)
        if step == 0:
            for name, value in e.document.after:
                np.testing.assert_allclose(value, w[name], rtol=1e-9)
    for n in names:
        np.testing.assert_allclose(found[n], w[n], rtol=1e-6, atol=1e-9, err_msg=plain.text)
    check_latex(e.latex)
    check_html(e.html)


def test_an_algorithm_that_asks_for_gradients_itself_is_named() -> None:
    make, x, y, loss = NETWORKS["textbook"]
    text = explain(make(), x, y, loss=loss, optimizer="lbfgs").text
    assert "Update: LBFGS\n  Newton's method" in text
