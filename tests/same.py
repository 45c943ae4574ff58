"""What a network has learnt, and whether two have learnt the same, bit for bit."""

from __future__ import annotations

import numpy as np

from chainrule import nn


def state(net: nn.Module) -> dict[str, np.ndarray]:
    """Parameters and statistics."""
    return {**net.parameters, **net.statistics}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """The same names in the same order, the same types, the same bits."""
    assert list(a) == list(b)
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        np.testing.assert_array_equal(value, b[name], err_msg=name)


def differ(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return any(not np.array_equal(value, b[name]) for name, value in a.items())
