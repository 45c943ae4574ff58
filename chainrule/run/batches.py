"""Which rows go into which step.

In: the number of rows, the batch size, the seed and the epoch. Out: an order and the sizes of the steps. A pure function, so a run
that goes on later takes the same batches.
"""

from __future__ import annotations

import numpy as np

from ..graph.node import Array

SHUFFLE, SPLIT, INITIALIZE = 1, 2, 3  # what a generator is for: streams of one seed that never meet


def generator(seed: int, purpose: int, number: int = 0) -> np.random.Generator:
    """NumPy's generator for one purpose of one seed."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose, number])))


def epoch_order(rows: int, *, shuffle: bool, seed: int, epoch: int) -> Array:
    """The order in which an epoch takes the rows."""
    return generator(seed, SHUFFLE, epoch).permutation(rows) if shuffle else np.arange(rows)


def step_sizes(rows: int, batch: int) -> list[int]:
    """Rows of each step: full batches, and a shorter last one where they do not divide.

    >>> step_sizes(10, 4)
    [4, 4, 2]
    """
    full, rest = divmod(rows, batch)
    return [batch] * full + ([rest] if rest else [])


def split_rows(rows: int, fraction: float, *, shuffle: bool, seed: int) -> tuple[Array, Array]:
    """Row numbers for training and for validation: random ones, or the last ones when nothing is to be shuffled."""
    held = min(max(round(rows * fraction), 1), rows - 1)
    if not shuffle:
        return np.arange(rows - held), np.arange(rows - held, rows)
    order = generator(seed, SPLIT).permutation(rows)
    return np.sort(order[held:]), np.sort(order[:held])
