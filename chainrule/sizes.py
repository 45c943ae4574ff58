"""Amounts of memory as users say them.

In: a number of bytes, or text such as "64MB". Out: bytes.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np

from .errors import UsageError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:_[0-9]+)*)?(?:(?<=[0-9])|\.[0-9]+)"  # a comma stands before thousands, never for a point


def bytes_of(memory: Any) -> int:
    """The bytes of a budget: a whole number, or a number and a unit (kB, MB, GB of 1,000; KiB, MiB, GiB of 1,024).

    Raises: `UsageError` for anything else, and for less than one byte.

    >>> bytes_of("64MB"), bytes_of("1.5 GiB"), bytes_of(1000)
    (64000000, 1610612736, 1000)
    """
    if isinstance(memory, str):
        found = re.fullmatch(rf"\s*({NUMBER})\s*([a-zA-Z]*)\s*", memory)
        if found is not None and found[2].upper() in UNITS:
            return _at_least_one(round(Fraction(re.sub("[,_]", "", found[1])) * UNITS[found[2].upper()]), memory)
    elif isinstance(memory, (int, np.integer)) and not isinstance(memory, bool):
        return _at_least_one(int(memory), memory)
    raise UsageError(f'memory is a number of bytes, or text such as "64MB" or "1.5GiB", not {memory!r}')


def _at_least_one(size: int, memory: Any) -> int:
    if size < 1:
        raise UsageError(f"memory={memory!r} is no amount of memory: give at least a byte")
    return size


def said(size: float) -> str:
    """Bytes in words.

    >>> said(13_900_000), said(512)
    ('13.9 MB', '512 B')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"
