"""Weights of PyTorch's modules, for layers of this package.

In: a `state_dict()`. Out: arrays by the names and in the layout that they have here, for `load_parameters`. PyTorch is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from ..errors import DataError
from ..graph.node import Array

_SIDES = (("", "forward."), ("_reverse", "backward."))
_NORMALIZING = {"weight": "scale", "bias": "shift", "running_mean": "mean", "running_var": "variance"}


def torch_parameters(
    weights: Mapping[str, Any], *names: str, prefix: str = "", flattened: Sequence[int] | None = None
) -> dict[str, Array]:
    """PyTorch's weights of one module, under the names that they have here, for `load_parameters`.

    A Conv1d or Conv2d fills a Conv1D or Conv2D, a Linear a Dense, a BatchNorm or LayerNorm its namesake with its statistics. An RNN,
    LSTM or GRU fills as many layers as it has.

    Args: weights: the module's `state_dict()`, or that of a larger one; names: the full name of our layer, "0", "" for a network that
    is the layer; for an RNN, LSTM or GRU those for its layers 0, 1, ...; prefix: the module's name in a larger one, with a dot:
    "lstm."; flattened: for a Linear that reads flattened images, the shape (C, H, W) or (C, T) that they had there: here channels
    come last, so its weight gets another order.
    Weights are transposed: (F, C, H, W) to (H, W, C, F). The two biases of an RNN are added, except for a GRU, which has both. A module
    with two directions fills a `Bidirectional`. The table of an Embedding is the same here: give it to `load_parameters` as it is.
    Returns: full name -> array.
    Raises: `DataError` if weights are missing or of a kind that has no counterpart.

    >>> w = {"weight_ih_l0": np.ones((8, 3)), "weight_hh_l0": np.ones((8, 2)), "bias_ih_l0": np.ones(8), "bias_hh_l0": np.ones(8)}
    >>> {name: value.shape for name, value in torch_parameters(w, "0").items()}
    {'0.weight_input': (3, 8), '0.weight_hidden': (2, 8), '0.bias': (8,)}
    >>> w = {"conv.weight": np.ones((6, 1, 5, 5)), "conv.bias": np.ones(6)}
    >>> {name: value.shape for name, value in torch_parameters(w, "0", prefix="conv.").items()}
    {'0.weight': (5, 5, 1, 6), '0.bias': (6,)}
    """
    if f"{prefix}weight" in weights:
        if len(names) != 1:
            raise DataError(f'torch_parameters: "{prefix}weight" is that of one layer: name one of ours, not {len(names)}')
        path = f"{names[0]}." if names[0] else ""
        return {f"{path}{n}": v for n, v in _plain(weights, prefix, flattened).items()}
    if flattened is not None or f"{prefix}weight_ih_l0" not in weights:
        kinds = f'"{prefix}weight"' if flattened is not None else f'"{prefix}weight" and no "{prefix}weight_ih_l0"'
        raise DataError(f"torch_parameters: there is no {kinds} among {', '.join(weights)}")
    return _recurrent(weights, names, prefix)


def _plain(weights: Mapping[str, Any], prefix: str, flattened: Sequence[int] | None) -> dict[str, Array]:
    """A module with one weight."""
    weight = np.asarray(weights[f"{prefix}weight"])
    if flattened is not None:
        if weight.ndim != 2 or weight.shape[1] != prod(flattened):
            raise DataError(
                f'torch_parameters: "{prefix}weight" of shape {weight.shape} does not read images of shape {tuple(flattened)} that '
                f"were flattened: its second length would be {prod(flattened)}"
            )
        weight = weight.reshape(len(weight), *flattened)
    names = _NORMALIZING if weight.ndim == 1 else {"weight": "weight", "bias": "bias"}
    found = {ours: np.asarray(weights[prefix + n]) for n, ours in names.items() if prefix + n in weights}
    if weight.ndim > 1:
        turned = weight.transpose(*range(2, weight.ndim), 1, 0)
        found["weight"] = turned if flattened is None else turned.reshape(prod(flattened), len(weight))
    return found


def _recurrent(weights: Mapping[str, Any], names: Sequence[str], prefix: str) -> dict[str, Array]:
    """A module with loops over time."""
    made: dict[str, Array] = {}
    both = f"{prefix}weight_ih_l0_reverse" in weights
    for number, name in enumerate(names):
        for suffix, side in _SIDES if both else _SIDES[:1]:
            path = f"{name}." if name else ""
            made |= {f"{path}{side if both else ''}{n}": v for n, v in _of_torch(weights, f"_l{number}{suffix}", prefix).items()}
    used = len(names) if names else 0
    if f"{prefix}weight_ih_l{used}" in weights or any(n.startswith(f"{prefix}weight_hr_") for n in weights):
        odd = (
            "projections (proj_size)" if any("weight_hr_" in n for n in weights) else f"a layer {used}: name ours for each layer"
        )
        raise DataError(f"torch_parameters: these weights have {odd}")
    return made


def _of_torch(weights: Mapping[str, Any], ending: str, prefix: str) -> dict[str, Array]:
    """One layer in one direction."""
    found = {kind: weights.get(f"{prefix}{kind}{ending}") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    if found["weight_ih"] is None or found["weight_hh"] is None:
        raise DataError(
            f'torch_parameters: there is no "{prefix}weight_ih{ending}" and "{prefix}weight_hh{ending}" among {", ".join(weights)}'
        )
    w, u = np.asarray(found["weight_ih"]), np.asarray(found["weight_hh"])
    zeros = np.zeros(len(w), w.dtype)
    b, d = (zeros if found[kind] is None else np.asarray(found[kind]) for kind in ("bias_ih", "bias_hh"))
    biases = {"bias": b, "bias_hidden": d} if len(u) == 3 * u.shape[1] else {"bias": b + d}
    return {"weight_input": w.T, "weight_hidden": u.T, **biases}
