"""What a backend is.

In: programs and graphs. Out: the contract that every backend keeps, so that one is as good as another but for speed. To add a
backend, write one file beside `reference.py` that registers an instance in `backends`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..graph.node import Array, Graph
from ..program import Program
from ..records import record
from ..registry import Registry


@record(frozen=True)
class Steps:
    """Many steps in one call, as so many rounds of the same steps: which rows each takes, and the numbers that go with it.

    entries: the entry that each step of a round runs. data: whole arrays, from which the rows of a step are gathered, cast to the
    input's type. order: row numbers, one step's after the other's; (rounds, rows), or (rows,) if all rounds have the same. sizes: the
    number of rows of each step of a round; there is a program for each size. numbers: for each input without rows that an entry
    reads, on the first axis one value for each step, or for each step of a round if all rounds have the same, or only one. keep:
    results to return.

    A session may keep what it made of entries, order, sizes and numbers: the same object again means the same values.
    """

    entries: Sequence[str]
    data: Mapping[str, Array]
    order: Array
    sizes: Sequence[int]
    numbers: Mapping[str, Array]
    keep: Sequence[str]
    rounds: int = 1

    @property
    def count(self) -> int:
        """The steps of all rounds."""
        return self.rounds * len(self.entries)

    def each(self) -> Iterator[tuple[str, int, Array, dict[str, Array]]]:
        """Entry, size, row numbers and other numbers of each step."""
        edges = np.cumsum([0, *self.sizes]).tolist()
        for i in range(self.count):
            turn, at = divmod(i, len(self.entries))
            order = self.order[turn] if self.order.ndim == 2 else self.order
            numbers = {k: v[i % len(v)] for k, v in self.numbers.items()}
            yield self.entries[at], self.sizes[at], order[edges[at] : edges[at + 1]], numbers


@record(frozen=True)
class Taken:
    """What came of a run: how many steps were taken, and their kept results: one entry a step, or for results with rows one a row, in
    the order of `Steps.order`. interrupted: Ctrl-C ended it after a whole step."""

    steps: int
    results: Mapping[str, Array]
    interrupted: bool = False


class Kept:
    """A state as it was at one moment, whatever the session that kept it has done since."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def arrays(self) -> dict[str, Array]:
        """The state in logical layout. Nobody writes to these arrays."""
        return dict(self._arrays)


class Session(ABC):
    """A state at work on a backend, in whatever layout suits it."""

    @abstractmethod
    def run(self, steps: Steps, pulse: Callable[[int], bool] | None = None) -> Taken:
        """Take all steps, or as many as there is time for.

        `pulse(done)` is called from time to time with the number of steps taken; False stops after the step at hand. Ctrl-C stops
        after the step at hand as well, and is reported, not raised, so that the caller always learns how many steps the state has
        behind it. `steps` may span several epochs: all that counts is order and sizes.
        Raises: `DataError` for an index outside its array; the state is then of no use.
        """

    @abstractmethod
    def call(self, rows: int, entry: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One entry of the program for `rows` rows; its writes are carried out."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """The state in logical layout, as arrays of its own."""

    @abstractmethod
    def keep(self) -> Kept | None:
        """The state as it is now, to be looked at later, if ever; None if not all its numbers are finite.

        It costs less than `state`: at most one copy, into memory that is used again when nobody holds an earlier one any more.
        """


class Function(ABC):
    """A graph as a function of arrays, one for each input. Results belong to the caller: none is a view of an argument or of another
    result, and all may be written to."""

    @abstractmethod
    def __call__(self, arrays: Sequence[Any]) -> list[Array]:
        """The results for these arrays, which are cast to the types of the inputs."""

    @abstractmethod
    def bound(self, last: Sequence[Any]) -> Function:
        """The same with fixed values of the last inputs. They are copied."""


class Backend(ABC):
    """A way to execute."""

    name: str

    @abstractmethod
    def session(self, programs: Mapping[int, Program], state: Mapping[str, Array], threads: int | None = None) -> Session:
        """Start with this state; `programs` holds one program for each number of rows, all over the same state. threads: how many may
        work on it, None for what is best; it changes no bits."""

    @abstractmethod
    def function(self, graph: Graph) -> Function:
        """A graph in normal form as a function of arrays, one for each input, captured ones included."""


def finite(arrays: Iterable[Array]) -> bool:
    """Whether all numbers are finite."""
    with np.errstate(all="ignore"):
        for array in arrays:
            flat = array.reshape(-1)
            # The sum of squares is the fastest test of a short array; where it overflows, a closer look decides.
            if (flat.size > 2048 or not math.isfinite(flat.dot(flat))) and not np.isfinite(flat).all():
                return False
    return True


backends: Registry[Backend] = Registry("backend")
