"""Whether a program that was recorded before is still the right one.

In: a network and a `Task`. Out: a value that changes with everything the programs of the task depend on; or None where something has
a say that has no value of its own: a function or a class of the user, which may read whatever it likes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..graph.trace import user_line
from .objective import Task
from .state import OWN, Stateful
from .windows import Windows

_PACKAGE = __name__.partition(".")[0]
_MOST_BYTES = 4096  # of an array that is compared; a larger one would cost more than it saves


class _Unknown(Exception):
    """There is something of which nobody can say whether it is as it was."""


def recipe(network: Stateful, task: Task) -> tuple[Any, ...] | None:
    """What the programs of `task` depend on, the number of rows and the entries apart. The user's line counts too: it is named in
    messages."""
    layers = network._layers()
    paths = {id(layer): path for path, layer in layers.items()}
    types = tuple(tuple(t.items()) for t in (task.parameters, task.statistics, task.inputs))
    try:
        return (
            user_line(), types, tuple(task.trainable), task.dtype, task.target, task.weighted, task.steps, _windows(task.windows),
            network._built["keys"],
            tuple(_layer(path, layer, paths) for path, layer in layers.items()),
            _value(task.loss, paths), _value(task.optimizer, paths), tuple(m.name for m in task.metrics), task.memory,
        )  # fmt: skip
    except _Unknown:
        return None


def _windows(windows: Windows | None) -> Any:
    return windows and (windows.every, windows.back, windows.inputs, windows.rows, tuple(windows.kept.items()))


def _layer(path: str, layer: Any, paths: Mapping[int, str]) -> tuple[Any, ...]:
    kind = type(layer)
    if not _is_ours(kind):
        raise _Unknown
    return (path, kind, kind.__call__, layer.trainable, _attributes(layer, paths, OWN))


def _attributes(thing: Any, paths: Mapping[int, str], without: set[str]) -> tuple[Any, ...]:
    return tuple((name, _value(value, paths)) for name, value in sorted(vars(thing).items()) if name not in without)


def _value(value: Any, paths: Mapping[int, str]) -> Any:
    """Something that is equal exactly where the value is the same for a program. What it holds stays alive with it, so that no other
    object can take its place unnoticed."""
    kind = type(value)
    if value is None or kind in (bool, int, float, complex, str, bytes):
        return (kind, repr(value))  # -0.0 and 0.0 are two, NaN equals itself
    if kind in (list, tuple):
        return (kind, tuple(_value(v, paths) for v in value))
    if kind is dict:
        return (kind, tuple((_value(k, paths), _value(v, paths)) for k, v in value.items()))
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf" and value.nbytes <= _MOST_BYTES:
        return (kind, value.shape, value.dtype.str, value.tobytes())
    if kind in (np.ufunc, np.dtype) or (callable(value) and _is_ours(value)):
        return value
    if id(value) in paths:
        return ("layer", paths[id(value)])
    if _is_ours(kind) and hasattr(value, "__dataclass_fields__"):
        # The learning rate reaches a program as a number, whatever schedule it comes from.
        return (kind, _attributes(value, paths, {"learning_rate"}))
    raise _Unknown


def _is_ours(thing: Any) -> bool:
    """Whether a class or function is the package's own: found in one of its files under the name it bears."""
    module = getattr(thing, "__module__", None) or ""
    if module.partition(".")[0] != _PACKAGE:
        return False
    return getattr(sys.modules.get(module), getattr(thing, "__qualname__", ""), None) is thing
