"""From what a user passes to the arrays that a program reads.

In: arrays, lists, tables; one input, a tuple of several or a dict of named ones. Out: a flat mapping from input name to array, with
one number of rows and all numbers finite; and how long the sequences in them are, if they differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np

from ..errors import DataError, ShapeError, UsageError
from ..graph.node import Array
from ..records import record
from .sequences import checked_lengths, cleared, is_ragged, lengths_name, measured_by, padded, stretched


@record(frozen=True)
class Inputs:
    """The network's inputs by name. `keys`: "" for one array, positions for a tuple, names for a dict. `lengths`: by the name of
    `lengths_name`, how many steps of each row count; inputs of the same lengths share them."""

    arrays: Mapping[str, Array]
    keys: tuple[Any, ...]
    lengths: Mapping[str, Array] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def all(self) -> dict[str, Array]:
        """Inputs and lengths: all that a program reads of a row."""
        return {**self.arrays, **self.lengths}

    def arguments(self, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the network's call."""
        if self.keys and isinstance(self.keys[0], str) and self.keys[0]:
            return (), {k: values[name_of(k)] for k in self.keys}
        return tuple(values[name_of(k)] for k in self.keys), {}


def name_of(key: Any) -> str:
    """ "x" for the only input, "x.0" or "x.name" for one of several."""
    return "x" if key == "" else f"x.{key}"


NOTHING = "there is nothing to learn from"


def inputs_of(x: Any, lengths: Any = None, mask: Any = None, *, empty: str | None = NOTHING) -> Inputs:
    """`x` as named arrays: a tuple or a dict holds several inputs, anything else is one. A list of sequences of different length
    becomes an array, padded. What lies beyond the end of a sequence is set to 0, whatever it was.

    Args: lengths, mask: of the sequences; for several inputs a dict or tuple like x, with None or nothing for those without. empty: why
    data without a number are refused; None: they are not.
    Raises: `DataError` for what is not numeric, empty or not finite, `ShapeError` for different numbers of rows.
    """
    if isinstance(x, Inputs):
        return x
    parts: dict[Any, Any] = dict(enumerate(x)) if isinstance(x, tuple) else dict(x) if isinstance(x, dict) else {"": x}
    if not parts:
        raise DataError("x holds no input: pass an array, a tuple of arrays, or a dict of named arrays")
    if any(
        not isinstance(k, (str, int)) or (isinstance(x, dict) and (not isinstance(k, str) or not k.isidentifier())) for k in parts
    ):
        raise DataError(f"the keys of x name the arguments of the network's call, so they must be words: {list(parts)}")
    lengths, masks = _by_input(lengths, parts, "lengths"), _by_input(mask, parts, "mask")
    arrays, measured = {}, {}
    for key, value in parts.items():
        name = name_of(key)
        arrays[name], found = _sequences(value, name, lengths.get(key), masks.get(key), empty)
        if found is not None:
            measured[name] = found
    advice = "; sequences of different length come as a list, for a tuple holds several inputs" if isinstance(x, tuple) else ""
    same_length(arrays, advice)
    return Inputs(arrays, tuple(parts), _grouped(measured))


def _by_input(given: Any, parts: Mapping[Any, Any], what: str) -> dict[Any, Any]:
    """Lengths or masks by the key of the input that they belong to."""
    if given is None or list(parts) == [""]:
        return {} if given is None else {"": given}
    if isinstance(given, tuple):
        given = dict(enumerate(given))
    if not isinstance(given, dict) or not set(given) <= set(parts):
        keys = ", ".join(map(repr, parts))
        raise UsageError(
            f"x holds several inputs, so {what} must say whose they are: {what}={{{next(iter(parts))!r}: ...}} of {keys}"
        )
    return given


def _sequences(value: Any, name: str, lengths: Any, mask: Any, empty: str | None) -> tuple[Array, Array | None]:
    """One input as an array, and the lengths of its rows."""
    if is_ragged(value):
        if lengths is not None or mask is not None:
            raise UsageError(f"{name} is a list of sequences, which says how long they are: leave lengths and mask out")
        array, found = padded(value, name)
        return numeric(array, name), found
    array = as_array(value, name)
    measured = checked_lengths(lengths, mask, array, name)
    return numeric(array if measured is None else cleared(array, measured), name, empty), measured


def _grouped(lengths: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs of equal lengths together."""
    groups: dict[bytes, list[str]] = {}
    for name, values in lengths.items():
        groups.setdefault(values.tobytes(), []).append(name)
    return {lengths_name(names): lengths[names[0]] for names in groups.values()}


def aligned(one: Inputs, other: Inputs, names: Sequence[str]) -> tuple[Inputs, Inputs]:
    """Two sets of rows in one form: the sequences of these names, and others with lengths, with as many steps in both, and with
    lengths in both or none."""
    names = list(dict.fromkeys([*names, *(n for i in (one, other) for lengths in i.lengths for n in measured_by(lengths))]))
    steps = {n: max(one.arrays[n].shape[1], other.arrays[n].shape[1]) for n in names}
    if set(one.lengths) == set(other.lengths) and all(i.arrays[n].shape[1] == k for i in (one, other) for n, k in steps.items()):
        return one, other
    measured = {n: np.concatenate([_measured(one, n), _measured(other, n)]) for n in names}
    both = _grouped(measured)

    def formed(inputs: Inputs, lengths: dict[str, Array]) -> Inputs:
        arrays = {n: stretched(a, steps[n]) if n in steps else a for n, a in inputs.arrays.items()}
        return Inputs(arrays, inputs.keys, lengths)

    return formed(one, {n: v[: one.rows] for n, v in both.items()}), formed(other, {n: v[one.rows :] for n, v in both.items()})


def begun(inputs: Inputs, names: Sequence[str]) -> Inputs:
    """The same, where sequences of these names have not a single step with one that does not count."""
    bare = [n for n in names if inputs.arrays[n].shape[1] == 0]
    if not bare:
        return inputs
    arrays = {n: stretched(a, 1) if n in bare else a for n, a in inputs.arrays.items()}
    measured = {n: v for name, v in inputs.lengths.items() for n in measured_by(name)}
    measured |= {n: np.zeros(inputs.rows, np.int64) for n in bare}
    return Inputs(arrays, inputs.keys, _grouped(measured))


def _measured(inputs: Inputs, name: str) -> Array:
    """How long the sequences of this input are."""
    found = next((v for n, v in inputs.lengths.items() if name in measured_by(n)), None)
    return np.full(inputs.rows, inputs.arrays[name].shape[1], np.int64) if found is None else found


def numeric(value: Any, name: str, empty: str | None = NOTHING) -> Array:
    """`value` as an array of numbers. empty: why it needs at least one; None: it may have none.

    Raises: `DataError` that says where the trouble is: text, ragged rows, NaN or infinity with column, count and first row.
    """
    array = as_array(value, name)
    if array.dtype == object:
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError):
            raise DataError(f"{name} holds {_first_odd(array)}, not numbers only; encode categories and text first") from None
    if array.dtype.kind not in "biuf":
        raise DataError(f"{name} holds {array.dtype} ({_first_odd(array)}), not numbers; encode categories and text first")
    if array.dtype in (np.float16, np.longdouble):
        array = array.astype(np.float32 if array.dtype == np.float16 else np.float64)
    if array.ndim == 0:
        raise DataError(f"{name} is a single number; the first axis of data is the samples")
    if array.size == 0 and empty is not None:
        raise DataError(f"{name} is empty (shape {array.shape}); {empty}")
    if array.dtype.kind == "f":
        finite(array, name)
    return array


def as_array(value: Any, name: str) -> Array:
    """`value` as an array of whatever kind.

    Raises: `DataError` for nothing at all, for ragged rows and for values that are masked.
    """
    if value is None:
        raise DataError(f"{name} is None; it must be an array of numbers")
    if isinstance(value, np.ndarray) and type(value) is not np.ndarray and isinstance(value, np.ma.MaskedArray):
        masked = np.ma.getmaskarray(value)
        refuse(value.data, masked, name, "masked", "fill them in (numpy.ma.filled) or drop such rows first")
    try:
        return np.asarray(value)
    except ValueError:
        raise DataError(f"{name}: its rows differ in length, so it is no array; pad them or pass arrays of one shape") from None


def finite(array: Array, name: str) -> None:
    """Refuse NaN and infinity."""
    with np.errstate(all="ignore"):
        total = np.sum(array)
    if not np.isfinite(total):  # one pass decides the common case; a sum that overflows is looked at closely
        refuse(array, ~np.isfinite(array), name, "NaN or infinite",
               "impute or drop such rows first (the command line imputes by itself)")  # fmt: skip


def check_index(array: Array, name: str, uses: Sequence[tuple[str, int | None, int | None]]) -> None:
    """Refuse what cannot be an index: numbers that are not whole, and places outside the tables that are read, as far as they are known.

    Args: uses: (layer, smallest, largest) for each table. An index is never clamped.
    """
    if array.dtype.kind == "f" and not (np.array_equal(array, np.floor(array)) and bool(np.all(np.abs(array) < 2.0**53))):
        raise DataError(f"{name} is used as an index by this network, so it must hold whole numbers")
    for layer, low, high in uses:
        if low is not None and high is not None:
            advice = f'correct the data, or make the table longer [layer "{layer}"]'
            refuse(array, (array < low) | (array > high), name, f"outside {low}..{high}", advice)


def fits_into(array: Array, dtype: np.dtype[Any], name: str) -> None:
    """Refuse float64 numbers that float32 cannot hold: they would become infinite."""
    if dtype == np.float32 and array.dtype == np.float64:
        advice = 'scale the data, or build the network with dtype="float64"'
        refuse(array, np.abs(array) > np.finfo(np.float32).max, name, "beyond float32", advice)


def weights_fit(weight: Array, dtype: np.dtype[Any]) -> None:
    """Refuse weights that this precision takes for infinite, or all of them for 0."""
    limits, largest, total = np.finfo(dtype), np.max(weight), np.sum(weight)
    if not limits.tiny <= largest <= total <= limits.max:
        raise DataError(
            f"the weights of rows (sample_weight, class_weight) go up to {largest:g} and add up to {total:g}, which {dtype} cannot "
            "hold; scale them, for only their ratios count"
        )


def refuse(array: Array, bad: Array, name: str, what: str, advice: str) -> None:
    """Raise `DataError` with count, first row and column of the values that are bad, if there are any."""
    total = int(np.count_nonzero(bad))
    if not total:
        return
    first = np.unravel_index(int(np.argmax(bad)), bad.shape)
    row = f", first in row {int(first[0])}" if array.ndim else ""
    column = f", column {first[1]}" if array.ndim == 2 else f", at {tuple(int(i) for i in first[1:])}" if array.ndim > 2 else ""
    many = "values that are" if total > 1 else "value that is"
    raise DataError(f"{name} holds {total} {many} {what}{row}{column} ({array[first]}); {advice}")


def _first_odd(array: Array) -> str:
    for value in array.reshape(-1)[:10000]:
        if not isinstance(value, (int, float, bool, np.number, np.bool_)):
            return f"{str(value)!r:.40}"
    return f"values of {array.dtype}"


def same_length(arrays: Mapping[str, Array], advice: str = "") -> None:
    """All arrays must have one number of rows."""
    lengths = {name: len(a) for name, a in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ShapeError(f"data of different length: {', '.join(f'{n} has {k} rows' for n, k in lengths.items())}{advice}")


def row_weights(rows: int, sample_weight: Any, class_weight: Any, target: Array, classes: bool) -> Array | None:
    """One weight for each row, or None where all are 1.

    class_weight: a mapping from class to weight, or "balanced": rows / (classes · rows of that class).
    """
    weight = None
    if sample_weight is not None:
        given = as_array(sample_weight, "sample_weight")
        if given.dtype.kind not in "biuf":
            raise DataError(f"sample_weight must hold numbers, not {given.dtype}")
        weight = given.astype(np.float64)
        if weight.shape != (rows,):
            raise ShapeError(f"sample_weight must hold one number for each of the {rows} rows, not shape {weight.shape}")
        if not np.all(np.isfinite(weight)) or np.any(weight < 0) or not np.any(weight > 0):
            raise DataError("sample_weight must hold finite numbers, none negative and not all 0")
    if class_weight is None:
        return weight
    labels = target.reshape(rows, -1)[:, 0] if target.ndim <= 2 and (target.ndim == 1 or target.shape[1] == 1) else None
    if not classes or labels is None:
        raise DataError("class_weight needs one class for each row as target")
    found, counts = np.unique(labels, return_counts=True)
    if isinstance(class_weight, str):
        if class_weight != "balanced":
            raise DataError(f'class_weight is a mapping from class to weight, or "balanced", not "{class_weight}"')
        table = {float(c): rows / (len(found) * n) for c, n in zip(found, counts, strict=True)}
    else:
        table = _class_weights(class_weight)
        missing = [c for c in found if float(c) not in table]
        if missing:
            raise DataError(
                f"class_weight says nothing of class {missing[0]:g}; the data holds {', '.join(f'{c:g}' for c in found)}"
            )
    each = np.array([table[float(c)] for c in labels])
    return each if weight is None else weight * each


def _class_weights(given: Any) -> dict[float, float]:
    try:
        table = {float(k): float(v) for k, v in dict(given).items()}
    except (TypeError, ValueError):
        raise DataError(f'class_weight is a mapping from class number to weight, or "balanced", not {given!r}') from None
    if any(not (np.isfinite(v) and v >= 0) for v in table.values()) or not any(table.values()):
        raise DataError(f"class_weight must give finite weights, none negative and not all 0, not {given!r}")
    return table
