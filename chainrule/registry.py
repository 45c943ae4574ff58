"""Named things: operators, layers, losses, optimizers, schedules, initializers, metrics.

In: declarations. Out: a mapping from name to thing that answers a misspelt name with the nearest one and lets other packages
add their own through entry points of the group `chainrule.<kind>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from .errors import ChainruleError, UnknownNameError, UsageError

T = TypeVar("T")
D = TypeVar("D")


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean "x"?' when some known name is close to `name`, else ''.

    >>> nearest("adma", ["adamax", "adam", "sgd"])
    ' Did you mean "adam"?'
    """
    import difflib  # here, since it is for errors only

    lowered = {k.lower(): k for k in known}
    swapped = [k for k in lowered if sorted(k) == sorted(str(name).lower())]  # letters in another order: the commonest slip
    close = swapped or difflib.get_close_matches(str(name).lower(), list(lowered), n=1, cutoff=0.6)
    return f' Did you mean "{lowered[close[0]]}"?' if close else ""


class Registry(Mapping[str, T]):
    """A mapping from name to thing. `kind` is the word for one of them: "loss", "layer"."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}
        self._outside_loaded = False

    def add(self, name: str, thing: D) -> D:
        """Register `thing` under `name` and return it.

        Raises: `ChainruleError` if the name is taken: one name means one thing.
        """
        if name in self._things:
            raise ChainruleError(f'{self.kind} "{name}" is registered twice; choose another name')
        self._things[name] = thing  # type: ignore[assignment]  # D is T; a separate variable keeps the caller's exact type
        return thing

    def declare(self, name: str) -> Callable[[D], D]:
        """`add` as a decorator."""
        return lambda thing: self.add(name, thing)

    def make(self, settings: Mapping[str, Any]) -> Any:
        """The thing that `{"name": ..., option: value, ...}` describes, for registries of classes.

        Raises: `UnknownNameError`; `UsageError` for options that it does not have.
        """
        options = dict(settings)
        name = str(options.pop("name", None))
        make: Any = self[name]
        try:
            return make(**options)
        except TypeError as error:
            raise UsageError(f'the {self.kind} "{name}" does not take these options: {options!r}') from error

    def __getitem__(self, name: str) -> T:
        thing = self._things.get(name)
        if thing is not None:
            return thing
        self._load_outside()
        if name not in self._things:
            raise UnknownNameError(
                f'there is no {self.kind} called "{name}".{nearest(name, self._things)} Known: {", ".join(sorted(self._things))}'
            )
        return self._things[name]

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)

    def _load_outside(self) -> None:
        """Let installed packages add theirs, once, and only when a name was not found here: importing them costs time."""
        if self._outside_loaded:
            return
        self._outside_loaded = True
        from importlib.metadata import entry_points  # here, for it takes as long to import as half of this package

        for point in entry_points(group=f"chainrule.{self.kind}"):
            if point.name not in self._things:
                self.add(point.name, point.load())
