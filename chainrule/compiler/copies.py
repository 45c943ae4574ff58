"""Copies of the state in another order of memory: one for each thread, or none.

In: kernels, and how many units rows are cut in. Out: the same, where small copies that all rows read are made during a step by each unit
of the rows for itself. Made once for all, half of such a copy (of two threads) would be read out of the other core's cache, which takes
several times as long as to make that half as well: what it is made of is there, since rows have just gone through it forward. All copies
of a unit lie together, away from those of the next: a core that reads ahead of its own would take lines from the other.

Copies that no cache keeps are not made at all where products read them: these turn what they need of the state itself, while they pack
it (`schedule.packs`). So it goes through memory once instead of three times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import Any, TypeGuard

import numpy as np

from .affine import Affine, Axis, of
from .fuse import Names
from .kernels import Buffer, Item, Kernel, Value, kernels_of, load, plain, rebuilt, reindexed, roots
from .memory import ALIGNMENT
from .phases import Access, accesses
from .schedule import APART, MOST_PRIVATE, block, cut, packs, schedule
from .target import Target

Dtype = np.dtype[Any]


def with_better_copies(items: Sequence[Item], target: Target, names: Names, threads: int) -> list[Item]:
    """The items, where copies (`Kernel.late`) are private while there is room for them, and follow what first reads the same state; and
    large ones are not made. Those of states that never change are made once; those that loops read count for little."""
    items = _without_large(items, target, threads)
    chosen = _chosen(items, target, threads) if threads > 1 else {}
    _lay_together(chosen, names)
    made: list[list[Item]] = [[]]  # each item, and the copies that follow it
    for item in items:
        if isinstance(item, Kernel) and item in chosen:
            state = {v.buffer for v in item.loads()}
            readers = (part for part in made[1:] if any(a.buffer in state and not a.write for a in accesses(part[0])))
            next(readers, made[0]).append(replace(item, late=False, unit=Axis(names("u"), chosen[item])))
        else:
            made.append([item])
    return [item for part in made for item in part]


# ---- none --------------------------------------------------------------------------------------------------------------------


def _without_large(items: Sequence[Item], target: Target, threads: int) -> list[Item]:
    """The items without copies that are larger than the second cache, if all that read one can turn what they need of it."""
    made = list(items)
    written = {a.buffer for i in items for a in accesses(i) if a.write}
    for copy in items:
        if not _is_copy(copy) or copy.stores[0].buffer.bytes <= target.level2:
            continue
        (store,) = copy.stores
        readers = [i for i in made if i is not copy and any(a.buffer is store.buffer for a in accesses(i))]
        turned = {i: _turning(i, copy) for i in readers}
        if store.value.buffer in written and all(k is not None and _can_turn(k, target, threads) for k in turned.values()):
            made = [turned.get(i) or i for i in made if i is not copy]
    return made


def _is_copy(item: Item) -> TypeGuard[Kernel]:
    """Whether it is nothing but a copy of state: what is computed of it, is computed once."""
    return isinstance(item, Kernel) and item.late and len(item.stores) == 1 and item.stores[0].value.op == "load"


def _turning(reader: Item, copy: Kernel) -> Kernel | None:
    """A kernel that reads what is copied in place of the copy; None if that cannot be said by an index."""
    if not isinstance(reader, Kernel):
        return None
    (store,) = copy.stores
    source, fits = store.value, True

    def loaded(v: Value) -> Value:
        nonlocal fits
        if v.buffer is not store.buffer:
            return v
        where = _solved(plain(store.index), v.index) if v.shape == store.view else None
        if where is None:
            fits = False
            return v
        assert source.buffer is not None, "it is a copy"
        new = load(source.buffer, [i.replaced(where) for i in plain(source.index)], source.shape)
        return replace(new, attrs={"turned": True})

    table = rebuilt(roots(reader.stores), {}, None, loaded)
    stores = [replace(s, index=reindexed(s.index, table, {}), value=table[s.value]) for s in reader.stores]
    return replace(reader, stores=stores) if fits else None


def _solved(written: Sequence[Affine], read: Sequence[Affine | Value]) -> dict[Axis, Affine] | None:
    """For which values of its axes an element is written that is read there; None if that is not as simple as it mostly is."""
    found: dict[Axis, Affine] = {}
    for to, at in zip(written, read, strict=True):
        axes = to.axes_in_order
        if not isinstance(at, Affine) or not 1 <= len(axes) <= 2:
            return None
        inner = min(axes, key=to.coefficient)
        both = at.divided(inner.extent)
        if to == of(inner):
            found[inner] = at
        elif len(axes) == 2 and to == of(max(axes, key=to.coefficient)) * inner.extent + of(inner) and both is not None:
            found[max(axes, key=to.coefficient)], found[inner] = both
        else:
            return None
    return found


def _can_turn(kernel: Kernel, target: Target, threads: int) -> bool:
    made = schedule(kernel, target)
    turned = [v for v in kernel.loads() if v.attrs.get("turned")]
    return block(kernel, made, target) == 0 and set(turned) <= set(packs(kernel, made, threads, target))


# ---- one for each thread -----------------------------------------------------------------------------------------------------


def _lay_together(chosen: Mapping[Kernel, int], names: Names) -> None:
    """Each unit has a row of one array for all its copies of a type."""
    rows: dict[tuple[Dtype, int], Buffer] = {}
    for kernel, count in chosen.items():
        copy = kernel.stores[0].buffer
        area = rows.setdefault((copy.dtype, count), Buffer(names("own"), (count, 0), copy.dtype))
        copy.part_of = area, area.shape[1]
        line = ALIGNMENT // copy.dtype.itemsize
        area.shape = count, area.shape[1] + ceil(copy.size / line) * line
    for area in rows.values():
        area.shape = area.shape[0], area.shape[1] + APART // area.dtype.itemsize


def _chosen(items: Sequence[Item], target: Target, threads: int) -> dict[Kernel, int]:
    """The kernels whose copies become private, and how many units make one each."""
    touched = [(i, a) for i in items for a in accesses(i)]
    written = {a.buffer for _, a in touched if a.write}
    room = target.level2 * MOST_PRIVATE
    found: dict[Kernel, int] = {}
    for item in items:
        if not _is_copy(item):
            continue
        made = item.stores[0].buffer
        counts = {_units(i, a, threads) for i, a in touched if a.buffer is made and not a.write}
        count = max(counts) if len(counts) == 1 else 0
        if count > 1 and made.bytes <= room and all(v.buffer in written for v in item.loads()):
            room -= made.bytes
            found[item] = count
    return found


def _units(reader: Item, access: Access, threads: int) -> int:
    """How many units a reader has, if each of them reads all of the copy; else 0."""
    if not isinstance(reader, Kernel) or reader.inner is not None or any(access.unit in i.axes for i in access.index):
        return 0
    return cut(reader, threads)[0]


def are_shared_alike(items: Sequence[Item], threads: int) -> bool:
    """Whether all that touch a private copy are cut into as many units as there are of it, as code takes them to be."""
    kernels = list(kernels_of(items))
    return all(cut(k, threads)[0] == a.buffer.part_of[0].shape[0] for k in kernels for a in accesses(k) if a.buffer.part_of)
