"""Networks in files: safetensors with a description in JSON. No pickle, no code.

In: a network. Out: a file with its layers and their arguments, parameters, statistics, optimizer state and counters, so that a
network that is loaded goes on as if it had never stopped. Reading makes only layers that are known by name, the built-in ones and
those given in `layers`.

All arrays are tensors of the file: "parameter/", "statistic/" and "slot/" before dotted names, and "argument/" before a number for
those that layers were made with, to which the description refers as {"tensor": [name, type, shape]}. In version 1 these stood in the
description, number by number: {"array": [type, shape, numbers]}.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import initializers, losses, optim
from ..errors import ChainruleError, FileFormatError, UsageError
from ..graph.node import Array, Type
from ..graph.trace import FUNCTIONS
from ..ops.activations import activations
from ..registry import Registry, nearest
from ..train.model import Model
from ..train.objective import initial_slots

FORMAT, VERSION = "chainrule network", 2
READABLE = ("1", "2")  # versions
LONGEST = 90_000_000  # characters of a description: safetensors reads headers of 100 MB, in which the table of arrays stands too
ARGUMENT = "argument/"

layers: Registry[type[Model]] = Registry("layer")


def save(net: Model, path: str | os.PathLike[str]) -> None:
    """Write a network; the file appears whole or not at all.

    Raises: `UsageError` for a part that no file can describe: a lambda or local function as activation or loss, layers that were
    changed after they were made, arrays of a type that files do not have.
    """
    from safetensors.numpy import save as to_bytes

    held: dict[int, tuple[str, Array]] = {}
    described = _describe(net, {}, held)
    arguments = {name: _as_in_file(value) for name, value in held.values()}
    own = {type(layer).__name__: type(layer) for layer in net._layers().values()}
    # Layers may write into what they are made with, so they get copies.
    again = _make(described, own, {}, _Arguments({name: value.copy() for name, value in arguments.items()}, {}))
    _check_described(net, again)
    built = net._built
    record: dict[str, Any] = {"network": described, "trainable": {p: layer.trainable for p, layer in net._layers().items()}}
    if built:
        record["built"] = {
            "dtype": str(built["dtype"]), "seed": built["seed"], "outputs": list(built["outputs"]), "keys": list(built["keys"]),
            "inputs": {n: [list(t.shape), str(t.dtype)] for n, t in built["inputs"].items()}, "names": built["names"],
        }  # fmt: skip
        record["counters"], record["schedule_state"] = dict(net._counters), dict(net._schedule_state)
        record["loss"] = _setting(losses.config, net._loss)
        record["optimizer"] = _setting(optim.config, net._optimizer)
    arrays = {
        f"{layer._kinds[name]}/{path}.{name}" if path else f"{layer._kinds[name]}/{name}": value
        for path, layer in net._layers().items()
        for name, value in layer._values.items()
    }
    arrays |= net._slots
    record["arrays"] = list(arrays)  # in this order; the file itself sorts them
    about = {"format": FORMAT, "version": str(VERSION), "record": json.dumps(record)}
    if len(json.dumps(about)) > LONGEST:
        raise UsageError(
            f"the arguments of the layers are too long for a file, which can describe them in {LONGEST:,} characters: "
            "give long lists of numbers as arrays"
        )
    write_whole(path, _in_order(to_bytes({n: _as_in_file(v) for n, v in arrays.items()} | arguments, about)))


def _as_in_file(value: Array) -> Array:
    """In the order of elements and bytes that safetensors has."""
    return np.asarray(value, value.dtype.newbyteorder("<"), order="C")


def _in_order(data: bytes) -> bytes:
    """The same file with its header sorted: safetensors writes it in another order each time, and the same network must be the
    same bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def _check_described(net: Model, again: Model) -> None:
    """The arguments that layers were made with must still describe them.

    Raises: `UsageError` that names the layer and what was changed.
    """
    before, now = (
        dict(zip(again._layers(), again.fingerprint(), strict=True)),
        dict(zip(net._layers(), net.fingerprint(), strict=True)),
    )
    if list(before) != list(now):
        raise UsageError(
            f"layers of this {type(net).__name__} were added or taken away after it was made ({', '.join(filter(None, now))}; "
            f"made with {', '.join(filter(None, before))}): make it with all its parts"
        )
    for path, (_, _, attributes) in now.items():
        made = dict(before[path][2])
        changed = [k for k, v in attributes if k != "trainable" and made.get(k) != v]
        if changed:
            raise UsageError(
                f'"{changed[0]}" of layer "{path}" is not what its arguments made it, so a file would lose it: give it to __init__'
            )


def _setting(config: Any, thing: Any) -> Any:
    """The loss or optimizer as plain values; a user's own function cannot be kept, and is asked for again."""
    if thing is None:
        return None
    try:
        settings = config(thing)
        json.dumps(settings)
    except (ChainruleError, TypeError, ValueError):
        return None
    return settings if settings.get("name") in losses.losses or settings.get("name") in optim.optimizers else None


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that it is there whole or, after a crash, as it was before."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str], layers: Iterable[type[Model]] = ()) -> Any:
    """Read a network that `net.save` wrote.

    Args: layers: the classes of your own layers that the network uses.
    Raises: `FileFormatError` for a file that is truncated, forged or of another kind, and for layers that are not known;
    `FileNotFoundError`. Nothing in the file is run.
    """
    layers = tuple(layers)
    for cls in layers:
        if not (isinstance(cls, type) and issubclass(cls, Model)):
            raise UsageError(f"layers= takes the classes of your own layers, subclasses of nn.Module, not {cls!r}")
    arrays, record = _read(Path(path))
    own = {cls.__name__: cls for cls in layers}
    try:
        arguments = _Arguments(arrays, {})
        net = _make(record["network"], own, {}, arguments)
        _check_names([*record["arrays"], *arguments.taken], arrays)
        _restore(net, record, arrays)
    except FileFormatError as error:
        raise FileFormatError(f"{path}: {error}") from None
    except (
        ChainruleError,
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        MemoryError,
    ) as error:
        raise FileFormatError(f"{path}: the description of the network does not fit together: {error}") from None
    return net


def _read(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="numpy") as file:
            about = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise FileFormatError(f"{path} is no readable safetensors file: {error}") from None
    if about.get("format") != FORMAT:
        raise FileFormatError(f"{path} is a safetensors file, but no network of chainrule; load_parameters takes bare arrays")
    if about.get("version") not in READABLE:
        raise FileFormatError(
            f"{path} has version {about.get('version')} of the format, and this chainrule reads {' and '.join(READABLE)}: "
            "update chainrule"
        )
    try:
        record = json.loads(about["record"])
    except (KeyError, ValueError, RecursionError):
        raise FileFormatError(f"{path}: its description is damaged") from None
    if not isinstance(record, dict) or "network" not in record:
        raise FileFormatError(f"{path}: its description is damaged")
    return arrays, record


def _check_names(named: list[str], arrays: Mapping[str, Array]) -> None:
    """The file holds what its description names, each array once."""
    if sorted(named) == sorted(arrays):
        return
    for name in named:
        if name not in arrays:
            raise FileFormatError(f'the description names an array "{name}", which the file does not hold')
    for name in arrays:
        if name not in named:
            raise FileFormatError(f'the file holds an array "{name}", which its description does not name')
    raise FileFormatError("the description names an array twice")


def _restore(net: Model, record: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """State and counters into a network that was just made."""
    parts = net._layers()
    for path, trainable in record["trainable"].items():
        parts[path].trainable = bool(trainable)
    if "built" not in record:
        return
    built = record["built"]
    dtype = np.dtype(built["dtype"])
    for name in record["arrays"]:
        value = arrays[name]
        kind, _, full = name.partition("/")
        if kind == "slot":
            net._slots[name] = value
            continue
        if kind not in ("parameter", "statistic") or value.dtype != dtype:
            raise FileFormatError(f'the array "{name}" of type {value.dtype} has no place in a network of {dtype}')
        if not np.all(np.isfinite(value)):
            raise FileFormatError(f'"{full}" holds values that are not finite')
        path, _, local = full.rpartition(".")
        parts[path]._values[local], parts[path]._kinds[local] = value, kind
    net._built = {
        "dtype": dtype, "seed": int(built["seed"]), "names": [str(n) for n in built["names"]],
        "outputs": tuple(built["outputs"]), "keys": tuple(built["keys"]),
        "inputs": {n: Type(tuple(int(k) for k in shape), np.dtype(kind)) for n, (shape, kind) in built["inputs"].items()},
    }  # fmt: skip
    net._counters = {k: int(record["counters"][k]) for k in ("steps", "updates", "epochs")}
    net._schedule_state = {str(k): float(v) for k, v in record["schedule_state"].items()}
    net._loss = losses.from_config(record["loss"]) if record["loss"] else None
    net._optimizer = optim.from_config(record["optimizer"]) if record["optimizer"] else None
    _check_slots(net)
    _check_whole(net)


def _check_slots(net: Model) -> None:
    """What the optimizer kept must be for these parameters; a frozen parameter has none, and one that was frozen may have some."""
    rule = net._optimizer
    if rule is None:
        return
    if getattr(rule, "driver", False):
        pairs = [net._slots.get(f"slot/{name}", np.empty((0, 0))) for name in ("s", "y")]
        if any(v.ndim != 2 or v.dtype != np.float64 or v.shape != pairs[0].shape for v in pairs):
            raise FileFormatError(f"what the optimizer {rule.name} kept does not fit together")
        return
    wanted = initial_slots(rule, net._arrays("parameter"), net._built["dtype"])
    for name, value in net._slots.items():
        if name not in wanted or (wanted[name].shape, wanted[name].dtype) != (value.shape, value.dtype):
            raise FileFormatError(
                f'"{name}", {value.dtype} {value.shape}, does not fit the optimizer {rule.name} of this network'
            )


def _check_whole(net: Model) -> None:
    """Trace the forward pass once: every parameter must be there, in the shape that the layers ask for. What the network does with
    its inputs is seen on the way, and need not stand in the file."""
    built = net._built
    seen = net._look(
        {n: Type((2, *t.shape), t.dtype) for n, t in built["inputs"].items()}, built["keys"], net._state(), built["dtype"]
    )
    if seen.outputs != built["outputs"]:
        raise FileFormatError(f"the network gives rows of shape {seen.outputs}, the file says {built['outputs']}")
    built.update(seen.kept())


# ---- layers as plain values --------------------------------------------------------------------------------------------------


def _describe(value: Any, seen: dict[int, int], held: dict[int, tuple[str, Array]]) -> Any:
    """A layer or an argument of one as JSON. A layer that stands twice is described once.

    seen: the numbers of layers, by identity; held: names in the file and arrays, by identity, so that an array that is given twice is
    written once, and is one again when it is read.
    """
    if isinstance(value, Model):
        if id(value) in seen:
            return {"same": seen[id(value)]}
        seen[id(value)] = len(seen)
        args, kwargs = value._config
        number = seen[id(value)]
        return {
            "layer": type(value).__name__,
            "number": number,
            "args": [_describe(a, seen, held) for a in args],
            "kwargs": {k: _describe(v, seen, held) for k, v in kwargs.items()},
        }
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_describe(v, seen, held) for v in value]}
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {"dict": {k: _describe(v, seen, held) for k, v in value.items()}}
    if isinstance(value, np.ndarray):
        if type(value) not in (np.ndarray, np.memmap) or not _is_plain(value.dtype):
            raise UsageError(
                f"a file cannot hold a {type(value).__name__} of type {value.dtype} as an argument of a layer: "
                "give a NumPy array of bool, integers or floats, of at most 64 bits each"
            )
        name, _ = held.setdefault(id(value), (f"{ARGUMENT}{len(held)}", value))
        return {"tensor": [name, value.dtype.str, list(value.shape)]}
    if isinstance(value, initializers.Initializer):
        return {"initializer": initializers.config(value)}
    for name, function in activations.items():
        if value is function:
            return {"activation": name}
    if isinstance(value, np.ufunc) and value in FUNCTIONS:
        return {"numpy": value.__name__}
    raise UsageError(
        f"a file cannot describe {value!r} as an argument of a layer: use an activation by name, "
        "or write a layer class that holds the function"
    )


def _is_plain(dtype: np.dtype[Any]) -> bool:
    """Whether it is a type of arguments that are arrays."""
    return dtype.kind in "biuf" and dtype.itemsize <= 8


@dataclass
class _Arguments:
    """The arrays of a file, and those of them that layers were made with so far, by name."""

    arrays: Mapping[str, Array]
    taken: dict[str, Array]

    def take(self, reference: Any) -> Array:
        """The array that a description refers to; the same one each time."""
        if not isinstance(reference, list) or len(reference) != 3 or not isinstance(reference[0], str):
            raise FileFormatError(f"an argument that is an array is [name, type, shape], not {reference!r:.100}")
        name, kind, shape = reference
        value = self.arrays.get(name)
        if value is None or not name.startswith(ARGUMENT):
            raise FileFormatError(f'a layer was made with the array "{name}", which the file does not hold as an argument')
        dtype = value.dtype
        if not _is_plain(dtype):
            raise FileFormatError(f'"{name}" is of type {dtype}, which no argument of a layer has')
        if kind not in (dtype.newbyteorder("<").str, dtype.newbyteorder(">").str) or shape != list(value.shape):
            said = f"{kind} {shape}"[:100]
            raise FileFormatError(f'"{name}" is {dtype.str} {list(value.shape)}, and its description says {said}')
        if dtype.kind == "b" and np.any(value.view(np.uint8) > 1):
            raise FileFormatError(f'"{name}" holds bytes that are neither true nor false')
        return self.taken.setdefault(name, value.astype(kind, copy=False))


def _make(described: Any, own: Mapping[str, type[Model]], made: dict[int, Any], arguments: _Arguments) -> Any:
    """What `_describe` described."""
    if not isinstance(described, dict):
        return described
    if "layer" in described:
        name = described["layer"]
        cls = own.get(name) or dict(layers).get(name)
        if cls is None:
            raise FileFormatError(
                f'the file holds a layer "{name}", which is not known.{nearest(str(name), layers)} If it is yours, pass layers=[{name}]'
            )
        args = [_make(a, own, made, arguments) for a in described["args"]]
        kwargs = {k: _make(v, own, made, arguments) for k, v in described["kwargs"].items()}
        layer = made[described["number"]] = cls(*args, **kwargs)
        return layer
    ((kind, value),) = described.items()
    if kind == "same":
        return made[value]
    if kind in ("list", "tuple"):
        items = [_make(v, own, made, arguments) for v in value]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return {k: _make(v, own, made, arguments) for k, v in value.items()}
    if kind == "tensor":
        return arguments.take(value)
    if kind == "array" and np.dtype(value[0]).kind in "biuf":
        dtype, shape, numbers = value  # version 1
        return np.array(numbers, dtype).reshape(shape)
    if kind == "initializer":
        return initializers.from_config(value)
    if kind == "activation":
        return activations[value]
    if kind == "numpy" and isinstance(getattr(np, value, None), np.ufunc):
        return getattr(np, value)
    raise FileFormatError(f'the description of the network holds "{kind}", which this version does not know')
