"""Classes that are their fields: `dataclasses.dataclass` with methods that are made once.

In: a class with annotated fields. Out: the same class as a dataclass. `dataclass` writes and compiles each method anew for each class,
and importing this package makes some seventy; so those that can be the same for all are: here they are.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

__all__ = ["record"]

if TYPE_CHECKING:
    from dataclasses import dataclass as record
else:

    def record(*, frozen):
        """`dataclass(frozen=True)`. Not for objects that are compared or looked up by the thousand: that takes a microsecond here."""

        def made(cls):
            for method in (__repr__, __eq__, __hash__):
                if method.__name__ not in vars(cls):
                    setattr(cls, method.__name__, method)
            return dataclass(cls, frozen=frozen, repr=False, eq=False)

        return made


@recursive_repr()
def __repr__(self: Any) -> str:
    shown = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr)
    return f"{type(self).__qualname__}({', '.join(shown)})"


def __eq__(self: Any, other: Any) -> Any:
    return _values(self) == _values(other) if type(other) is type(self) else NotImplemented


def __hash__(self: Any) -> int:
    return hash(_values(self))


def _values(thing: Any) -> tuple[Any, ...]:
    return tuple([getattr(thing, f.name) for f in fields(thing) if f.compare])
