"""Names that a layer of one's own may not take by chance: methods that training calls, and attributes that hold a network's state.

In: a class derived from `Module`, or an attribute that is about to be set. Out: an error where either takes such a name; training
would call the author's method in place of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from types import FrameType

from ..errors import UsageError
from ..graph.trace import located
from ..registry import nearest
from ..train.state import OWN

_PACKAGE = __name__.partition(".")[0]


def closed_names(cls: type, module: type, inherited: frozenset[str], overrides: Collection[str]) -> frozenset[str]:
    """The closed names of `cls`: those that only a class which names them in `overrides` may define.

    module: `Module`; inherited: the closed names of the bases. A class of the package adds its own methods.
    Raises: `UsageError` for a closed name that `cls`, or a class that is mixed into it, defines.
    """
    if isinstance(overrides, str):
        raise UsageError(f'{cls.__name__}: overrides="{overrides}" is to be a list of names: overrides=["{overrides}"]')
    for name in overrides:
        if name not in inherited - OWN:
            raise UsageError(
                f'{cls.__name__}: overrides=["{name}"] names no method of {_owner(cls)} that would have to be named.'
                f"{nearest(name, inherited - OWN)}"
            )
    closed = inherited.difference(overrides)
    for holder, name in _taken(cls, module, closed):
        by = "" if holder is cls else f", by way of {holder.__name__},"
        meant = "" if name in OWN else f" If it shall replace that one, say so: class {cls.__name__}(..., overrides=[{name!r}])"
        raise UsageError(
            f'{cls.__name__}{by} defines "{name}", which {_owner(cls)} needs for itself: give it another name.{meant}'
        )
    return closed.union(methods(cls)) if _is_ours(cls.__module__) else closed


def freed(cls: type, free: Collection[str]) -> Collection[str]:
    """The names that a class of the package leaves to those derived from it.

    Raises: `UsageError` for another class: its own methods are not closed anyway.
    """
    if free and not _is_ours(cls.__module__):
        raise UsageError(f"{cls.__name__}: free= is for layers of {_PACKAGE} itself; name what shall be replaced in overrides=")
    return free


def methods(cls: type) -> Iterator[str]:
    """The methods and properties that a class defines; those that Python itself calls apart."""
    return (n for n, v in vars(cls).items() if hasattr(v, "__get__") and not n.startswith("__"))


def check_attribute(cls: type, name: str) -> None:
    """Refuse an attribute with a closed name, which a layer's author sets. The package keeps state of its own under some of them.

    Raises: `UsageError`.
    """
    frame: FrameType | None = sys._getframe(2)  # whoever called `__setattr__`, be it by way of a layer's own
    while frame is not None and frame.f_code.co_name == "__setattr__":
        frame = frame.f_back
    if frame is None or not _is_ours(frame.f_globals.get("__name__", "")):
        raise UsageError(located(
            f'{cls.__name__} sets the attribute "{name}", which would hide what {_owner(cls)} has under this name and needs for '
            "itself: give it another name"
        ))  # fmt: skip


def _taken(cls: type, module: type, closed: Collection[str]) -> Iterator[tuple[type, str]]:
    """The closed names that are found in `cls`, or in a class that is no layer, before they are found where they belong."""
    found: set[str] = set()
    for holder in cls.__mro__[:-1]:
        names = [n for n in vars(holder) if n in closed and n not in found]
        found.update(names)
        if holder is cls or not (issubclass(holder, module) or issubclass(module, holder)):
            yield from ((holder, n) for n in names)


def _owner(cls: type) -> str:
    """The nearest class of the package that users know, from which `cls` comes."""
    return next(b.__name__ for b in cls.__mro__ if b is not cls and _is_ours(b.__module__) and not b.__name__.startswith("_"))


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE
