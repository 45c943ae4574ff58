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


def by_length(order: Array, lengths: Array, batch: int) -> Array:
    """The rows of each step (the last axis of `order` has those of an epoch) with sequences together that end together, so that a loop
    over them may end with them, and so dealt out that threads which share the rows have about as much to do.

    >>> by_length(np.arange(16), np.arange(16), 16).reshape(4, 4)
    array([[15, 14, 13, 12],
           [ 3,  2,  1,  0],
           [11, 10,  9,  8],
           [ 7,  6,  5,  4]])
    """
    whole = order.shape[-1] // batch * batch
    parts = (order[..., :whole], batch), (order[..., whole:], order.shape[-1] - whole)
    return np.concatenate([_sorted(part, lengths, size) for part, size in parts if part.size], axis=-1)


def _sorted(order: Array, lengths: Array, batch: int) -> Array:
    from ..compiler.schedule import together  # loaded when something is compiled, and not before

    steps = order.reshape(-1, batch)
    steps = np.take_along_axis(steps, np.argsort(-lengths[steps].astype(np.int64), axis=-1, kind="stable"), axis=-1)
    size = together(batch)
    groups = np.arange(batch // size * size).reshape(-1, size)
    places = np.concatenate([groups[_dealt(list(range(len(groups))))].reshape(-1), np.arange(groups.size, batch)])
    return steps[:, places].reshape(order.shape)


def _dealt(groups: list[int]) -> list[int]:
    """In two halves that weigh the same, as nearly as their order tells, and each half again so."""
    if len(groups) < 3:
        return groups
    one, other = ([g for i, g in enumerate(groups) if (i % 4 in (0, 3)) == first] for first in (True, False))
    return _dealt(one) + _dealt(other)


def split_rows(rows: int, fraction: float, *, shuffle: bool, seed: int) -> tuple[Array, Array]:
    """Row numbers for training and for validation: random ones, or the last ones when nothing is to be shuffled."""
    held = min(max(round(rows * fraction), 1), rows - 1)
    if not shuffle:
        return np.arange(rows - held), np.arange(rows - held, rows)
    order = generator(seed, SPLIT).permutation(rows)
    return np.sort(order[held:]), np.sort(order[:held])
