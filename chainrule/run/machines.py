"""Machine code of one entry, made once in a process and kept on disk; and memory for it to work on.

In: a key that says what code computes, and how to make it. Out: `Machine`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from ..compiler import jit
from ..compiler.schedule import APART, Parts
from ..compiler.target import Target
from ..graph.node import Array, Graph
from ..normalize import graph_key
from ..recent import keep, recall

if TYPE_CHECKING:
    from ..compiler.pipeline import Code

ENTRY = "entry"  # what a module calls its function
KEPT_FUNCTIONS = 256
CHANGED = "an index lay outside its array and no longer does: something, such as another thread, changes the data meanwhile"


class Machine:
    """One entry as machine code. arena: bytes of scratch memory; parts: the slots of arrays in parts of threads, and these;
    anew: compiles it once more, with the texts of all stages."""

    def __init__(self, loaded: Any, arena: int, parts: Mapping[int, Parts], anew: Callable[[], Code]) -> None:
        self.loaded, self.arena, self.parts, self.anew = loaded, arena, parts, anew
        self.address, self.prepare = loaded.address(ENTRY), loaded.address(f"{ENTRY}_prepare")

    @cached_property
    def code(self) -> Code:
        """All stages, made when they are first asked for: the texts take more memory than the code."""
        return self.anew()


_machines: dict[Any, Machine] = {}
_identities: WeakKeyDictionary[Graph, Any] = WeakKeyDictionary()


def machine_code(key: Any, make: Callable[[], Code], target: Target, level: int) -> Machine:
    """The machine code for a key: made once in this process, and kept on the disk for the next."""
    known = recall(_machines, key)
    if known is not None:
        return known
    name = jit.program_key(key)
    found = jit.load(name, target, level=level) if name is not None else None
    if found is not None:
        loaded, meta = found
        arena, *numbers = map(int, meta.split())
        parts = {slot: Parts(*part) for slot, *part in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)}
    else:
        with _collector_paused():
            code = make()
        arena, parts = code.arena.bytes, code.parts
        numbers = [arena, *(n for slot, part in parts.items() for n in (slot, *part))]
        loaded = jit.compile_module(code.text, target, level=level, key=name, meta=" ".join(map(str, numbers)).encode())
    return keep(_machines, key, Machine(loaded, arena, parts, make), KEPT_FUNCTIONS)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """The passes make some ten thousand objects, all of which they keep; to look through them for garbage again and again takes a
    seventh of their time. Where threads overlap, the one that found the collector at work sets it to work again."""
    working = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if working:
            gc.enable()


def identity(graph: Graph) -> Any:
    """What is equal for graphs that compute the same. A digest, since the whole key is long and looked up for each session."""
    found = _identities.get(graph)
    if found is None:
        key = graph_key(graph)
        found = _identities[graph] = jit.told(key) or key
    return found


def bare(graph: Graph) -> Graph:
    """The graph without the arrays it took from outside: nobody shall keep them who does not need them."""
    return Graph(graph.inputs, graph.outputs, (), graph.name)


def aligned(size: int, dtype: Any = np.uint8, fill: int | None = None) -> Array:
    """An array of `size` elements that begins at a cache line, and memory of nobody behind it: threads write parts of such arrays, and a
    core that reads ahead of its own part would take lines from another."""
    dtype = np.dtype(dtype)
    memory = np.empty(size * dtype.itemsize + 64 + APART, np.uint8)
    if fill is not None:
        memory[:] = fill
    start = -memory.ctypes.data % 64
    made: Array = memory[start : start + size * dtype.itemsize].view(dtype)
    return made


def own(value: Any, dtype: Any) -> Array:
    """An aligned copy."""
    array = np.asarray(value, dtype)
    made: Array = aligned(array.size, dtype).reshape(array.shape)
    made[...] = array
    return made
