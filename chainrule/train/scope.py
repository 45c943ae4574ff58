"""What a layer can ask for while a network is traced.

In: the network's names and state. Out: a `Scope` that hands out parameters and statistics and collects new statistics. There is one
at a time; layers reach it through `Scope.current()`, so their `__call__` takes arrays only.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

import numpy as np

from ..errors import ShapeError, UsageError
from ..graph.node import Array
from ..graph.trace import Trace, Tracer, here, located
from ..program import Kind
from ..records import record
from ..run.batches import INITIALIZE, generator
from ..sizes import said
from .sequences import Times

TAP, KEPT = "tap/", "kept/"
ADDRESSABLE = 2**47  # bytes: all that a process can have on any processor that is known here
_current: ContextVar[Scope | None] = ContextVar("chainrule_scope", default=None)


@record(frozen=True)
class Window:
    """What layers know of windows of time: a state goes on to the next after `every` of its `back` steps; its sequences begin at place
    `begin`, traced, or have begun before it, if that is negative."""

    every: int
    back: int
    begin: Any


class Scope:
    """One tracing of a network.

    names: the dotted path of each layer, by identity. state: what to hand out under a full name. training: whether layers behave as
    in training. create: called for a name that `state` lacks, while building; otherwise such a name is an error. dtype: that of the
    network's numbers. times: which axis of a value is time, and how long sequences are. watched: collects the values that `tap` and
    `kept` are asked for. window: there if sequences are cut into windows. outputs: collects what each layer gives, by its path.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        state: Mapping[str, Any],
        *,
        training: bool,
        dtype: Any,
        frozen: Callable[[str], bool] = lambda path: False,
        create: Callable[[Any, str, str, Kind, tuple[int, ...], Any], Array] | None = None,
        times: Times | None = None,
        watched: dict[str, tuple[int, ...]] | None = None,
        window: Window | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        self.names = names
        self.state = state
        self.training = training
        self.frozen = frozen
        self.updates: dict[str, Any] = {}
        self.dtype = np.dtype(dtype)
        self.times = times
        self.held: dict[Any, Any] = {}  # what a layer's loop holds for its steps
        self.window = window
        self._create = create
        self._watched = watched
        self._goes_on: dict[str, int] = {}
        self._outputs, self._trace = outputs, Trace.current()

    @staticmethod
    def current() -> Scope | None:
        return _current.get()

    @contextmanager
    def active(self) -> Iterator[Scope]:
        token = _current.set(self)
        try:
            yield self
        finally:
            _current.reset(token)

    def path(self, layer: Any) -> str:
        """The layer's dotted name.

        Raises: `UsageError` for a layer that the network does not hold in an attribute: it could not be saved or named.
        """
        if id(layer) not in self.names:
            raise UsageError(located(
                f"{type(layer).__name__} is used inside a network that does not hold it: make it in __init__ and keep it in an "
                "attribute (or in a list or dict of layers there)"
            ))  # fmt: skip
        return self.names[id(layer)]

    def ask(self, layer: Any, name: str, kind: Kind, shape: tuple[int, ...], init: Any) -> Any:
        """The traced array of this name, made on the first use."""
        path = self.path(layer)
        full = f"{path}.{name}" if path else name
        if full in self.state:
            value = self.state[full]
            if np.shape(value) != shape:
                raise ShapeError(located(
                    f'"{full}" has shape {np.shape(value)}, but this input needs {shape}: a layer used twice must see inputs of one '
                    "width, and data must keep the width that the network was built with (net.reset() starts over)"
                ))  # fmt: skip
        elif self._create is not None:
            value = self._create(layer, path, name, kind, shape, init)
        else:
            raise UsageError(located(f'"{full}" appears only now: a layer must ask for the same parameters on every call'))
        if isinstance(value, Tracer):
            return value
        trace = here(full)
        return Tracer(trace.lift(value), trace)

    def gave(self, layer: Any, y: Any) -> None:
        """Take note of what a layer has given, if somebody wants to know. What it gives inside a loop or a derivative is no array of
        this trace; where it only hands on what a part of it gave, the part is named; a further call is "name (2)"."""
        if self._outputs is None or not isinstance(y, Tracer) or y.home is not self._trace:
            return
        path = self.path(layer)
        within = f"{path}." if path else ""
        if any(value is y and name.startswith(within) for name, value in self._outputs.items()):
            return
        calls = sum(name == path or name.startswith(f"{path} (") for name in self._outputs)
        self._outputs[f"{path} ({calls + 1})" if calls else path] = y

    def tap(self, layer: Any, name: str, shape: tuple[int, ...]) -> Any:
        """Zeros to be added to a value of this layer, by which the objective can be differentiated; None if nobody wants to."""
        full = tap_name(self.path(layer), name)
        if self._watched is not None:
            self._watched[full] = shape
        return self.state.get(full)

    def kept(self, layer: Any, name: str, like: Any) -> tuple[str, Any]:
        """What the window before left for this one, for as many rows as `like` has, and its full name, for `keep`. A layer that is
        called several times has one for each call."""
        path = self.path(layer)
        full = f"{KEPT}{path}.{name}" if path else f"{KEPT}{name}"
        self._goes_on[full] = call = self._goes_on.get(full, -1) + 1
        full = f"{full}/{call}" if call else full
        if self._watched is not None:
            self._watched[full] = like.shape
        value = self.state.get(full)
        if value is None:
            return full, np.zeros_like(like)
        rows = like.shape[0]
        return full, value if value.shape[0] == rows else value[:rows]

    def keep(self, full: str, value: Any) -> None:
        """Leave a value for the next window. Rows that a short batch lacks keep theirs."""
        kept, rows = self.state.get(full), value.shape[0]
        self.updates[full] = value if kept is None or kept.shape[0] == rows else np.concatenate([value, kept[rows:]])

    def update(self, layer: Any, name: str, value: Any) -> None:
        """The new value of a statistic; kept only in training, and not in a frozen layer."""
        path = self.path(layer)
        full = f"{path}.{name}" if path else name
        if layer._kinds.get(name) != "statistic":
            raise UsageError(
                located(f'update of "{full}", which is no statistic: declare it with self.statistic(name, shape) first')
            )
        kept = self.state[full]
        if np.shape(value) != np.shape(kept):
            raise ShapeError(
                located(f'update of "{full}", which has shape {np.shape(kept)}, by a value of shape {np.shape(value)}')
            )
        if self.training and not self.frozen(path):
            self.updates[full] = value if getattr(value, "dtype", None) == kept.dtype else np.asanyarray(value).astype(kept.dtype)


def tap_name(path: str, name: str) -> str:
    """The name in the state of what `tap` gives; no parameter's, for it is no word."""
    return f"{TAP}{path}.{name}" if path else f"{TAP}{name}"


def initial(init: Any, full_name: str, shape: tuple[int, ...], seed: int, dtype: Any) -> Array:
    """The first value of a parameter: a pure function of seed and name, so that it does not depend on other layers."""
    random = generator(seed, INITIALIZE, zlib.crc32(full_name.encode()))
    size = prod(shape) * 8  # initializers draw in double precision
    try:
        value = np.asarray(init(random, shape), dtype) if size < ADDRESSABLE else None
    except MemoryError:
        value = None
    if value is None:
        raise UsageError(located(
            f'"{full_name}" of shape {shape} takes {said(size)} while it is made, more memory than there is: give the layer fewer units, '
            "or its input fewer columns"
        ))  # fmt: skip
    if value.shape != shape:
        raise ShapeError(located(f'the initializer of "{full_name}" gave shape {value.shape}, not {shape}'))
    return value
