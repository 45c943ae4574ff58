"""Tables of NumPy expressions, from which tests make functions: `np.sum(x); np.sum(x, axis=0)` is easier to read than lambdas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import chainrule as cr


def listed(table: str) -> list[str]:
    """The expressions of a table: lines, and within them what semicolons part."""
    return [text.strip() for text in table.replace("\n", ";").split(";") if text.strip()]


def function(expression: str, names: Sequence[str]) -> Callable[..., Any]:
    """The function of these arguments whose value the expression is."""
    made: Callable[..., Any] = eval(f"lambda {', '.join(names)}: {expression}", {"np": np, "cr": cr})
    return made
