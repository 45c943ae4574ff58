"""Tables of what was used last.

In: plain dicts. Out: `recall` and `keep`, by which a dict holds so many things at most, those that were used last. Several threads may
use them at once: each step is one operation of a dict, which threads cannot disturb. (`OrderedDict` does not stand that: where keys are
compared by Python code, its order and its contents come apart, and `popitem` fails from then on.)
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def recall(kept: dict[Any, T], key: Any) -> T | None:
    """What is kept under this key, None if nothing is. For a moment another thread does not find it.

    >>> table = {"a": 1, "b": 2}
    >>> recall(table, "a"), recall(table, "c"), list(table)
    (1, None, ['b', 'a'])
    """
    found = kept.get(key)
    if found is not None:
        kept.pop(key, None)
        kept[key] = found
    return found


def keep(kept: dict[Any, T], key: Any, thing: T, most: int) -> T:
    """Keep it under this key, and of all things only the `most` that were used last. Returns the thing.

    >>> table = {"a": 1, "b": 2}
    >>> keep(table, "c", 3, most=2), list(table)
    (3, ['b', 'c'])
    """
    kept[key] = thing
    while len(kept) > most:
        with suppress(RuntimeError, StopIteration):  # another thread has changed it just now
            kept.pop(next(iter(kept)), None)
    return thing
