"""Recurrent layers as plain loops over one sequence at a time, for the package `autograd` to differentiate.

It knows nothing of batches, masks or padding: a sequence is as long as it is. Gates are written out one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import autograd.numpy as np

Named = Mapping[str, Any]


def sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "tanh": np.tanh,
    "relu": lambda z: np.where(z > 0, z, 0.0),
    "softsign": lambda z: z / (1 + np.abs(z)),
}


def part(w: Any, gate: int, gates: int) -> Any:
    """What belongs to one of the gates, which lie side by side on the last axis."""
    n = w.shape[-1] // gates
    return w[..., gate * n : (gate + 1) * n]


def rnn(p: Named, state: Any, x: Any, activation: str = "tanh") -> tuple[Any, Any]:
    h = ACTIVATIONS[activation](np.dot(x, p["weight_input"]) + np.dot(state[0], p["weight_hidden"]) + p["bias"])
    return [h], h


def normed(z: Any) -> Any:
    return (z - np.mean(z)) / np.sqrt(np.mean((z - np.mean(z)) ** 2) + 1e-5)


def lstm(p: Named, state: Any, x: Any, peephole: bool = False, layer_norm: bool = False) -> tuple[Any, Any]:
    h, c = state
    of_x, of_h = np.dot(x, p["weight_input"]), np.dot(h, p["weight_hidden"])
    if layer_norm:
        of_x, of_h = normed(of_x) * p["scale_input"], normed(of_h) * p["scale_hidden"]
    i, f, g, o = (part(of_x, k, 4) + part(of_h, k, 4) + part(p["bias"], k, 4) for k in range(4))
    if peephole:
        i, f = i + part(p["weight_peephole"], 0, 3) * c, f + part(p["weight_peephole"], 1, 3) * c
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    if peephole:
        o = o + part(p["weight_peephole"], 2, 3) * c
    shown = normed(c) * p["scale_cell"] + p["shift_cell"] if layer_norm else c
    h = sigmoid(o) * np.tanh(shown)
    return [h, c], h


def gru(p: Named, state: Any, x: Any, reset_after: bool = True) -> tuple[Any, Any]:
    h = state[0]
    wr, wz, wn = (part(p["weight_input"], k, 3) for k in range(3))
    ur, uz, un = (part(p["weight_hidden"], k, 3) for k in range(3))
    br, bz, bn = (part(p["bias"], k, 3) for k in range(3))
    dr, dz, dn = (part(p["bias_hidden"], k, 3) if reset_after else 0.0 for k in range(3))
    r = sigmoid(np.dot(x, wr) + br + np.dot(h, ur) + dr)
    z = sigmoid(np.dot(x, wz) + bz + np.dot(h, uz) + dz)
    n = np.tanh(np.dot(x, wn) + bn + (r * (np.dot(h, un) + dn) if reset_after else np.dot(r * h, un)))
    return [z * h + (1 - z) * n], z * h + (1 - z) * n


STEPS: dict[str, tuple[Callable[..., tuple[Any, Any]], int]] = {"RNN": (rnn, 1), "LSTM": (lstm, 2), "GRU": (gru, 1)}
STATES = ("hidden", "cell")


def outputs(kind: str, p: Named, x: Any, units: int, reverse: bool = False, **options: Any) -> tuple[list[Any], Any]:
    """The outputs of all steps of one sequence (T, I), each at its time, and the last output taken."""
    step, count = STEPS[kind]
    state = [p.get(f"initial_{name}", np.zeros(units)) for name in STATES[:count]]
    made: list[Any] = [None] * len(x)
    last = state[0]
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        state, made[t] = step(p, state, x[t], **options)
        last = made[t]
    return made, last


def inner(p: Named, prefix: str) -> dict[str, Any]:
    return {n.removeprefix(f"{prefix}."): v for n, v in p.items() if n.startswith(f"{prefix}.")}


def layer(
    kind: str, p: Named, x: Sequence[Any], units: int, sequences: bool = False, *, steps: int | None = None, both: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    """The output of a layer for sequences (T_i, I): (B, H), or with `sequences` (B, steps, H), 0 beyond each end. both: in both
    directions, side by side."""
    if both:
        halves = [
            layer(kind, inner(p, side), x, units, sequences, steps=steps, reverse=side == "backward", **options)
            for side in ("forward", "backward")
        ]
        return np.concatenate(halves, axis=-1)
    rows = []
    for sequence in x:
        made, last = outputs(kind, p, sequence, units, **options)
        beyond = [np.zeros(units)] * ((steps or len(sequence)) - len(sequence))
        rows.append(np.stack([*made, *beyond]) if sequences else last)
    return np.stack(rows)
