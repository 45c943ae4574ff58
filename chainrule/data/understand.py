"""What the columns of a table mean and which task the target sets, decided by rules that are said and can be overruled.

In: a `Table` and the target's name. Out: `Understanding`, plain facts that the command line prints. Nothing is fitted here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import DataError, UsageError
from ..registry import nearest
from .table import Table, Values, absent, first, numbers, refuse_infinite, strings

Task = Literal["regression", "binary", "multiclass"]
Kind = Literal["numeric", "categorical", "block", "constant", "empty", "identifier"]
Label = str | int | float

MAX_INTEGER_CLASSES = 20  # a target of more distinct whole numbers is a quantity
MAX_CLASSES = 1_000
MIN_ROWS_A_CLASS = 5  # and so is one whose numbers hardly repeat
STRAY_SHARE = 0.1  # text in at most this share of a column of numbers is taken for mistakes, not for categories
OWN_SHARE = 0.5  # text with more distinct values than this share of its rows names rows (identifiers, free text)
FEW_ROWS = 20  # below, shares mean little: nothing is taken for an identifier or for a mistake
TWIN = 0.99999  # a feature that correlates so with the target is the target in other units


@dataclass(frozen=True)
class ColumnFacts:
    """One column: what it is, how many values are missing, how many are distinct (0 for blocks), whether it is learnt from."""

    name: str
    kind: Kind
    missing: int
    distinct: int
    used: bool
    remark: str = ""


@dataclass(frozen=True)
class Understanding:
    """What was understood of a table. `features` are the columns learnt from; `classes` is empty for regression."""

    source: str
    rows: int
    columns: tuple[ColumnFacts, ...]
    target: str
    task: Task
    reason: str
    classes: tuple[Label, ...]
    notes: tuple[str, ...]

    @property
    def features(self) -> tuple[ColumnFacts, ...]:
        return tuple(column for column in self.columns if column.used)


def understand(
    table: Table,
    target: str,
    *,
    task: str | None = None,
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    categorical: Iterable[str] = (),
    past: bool = False,
) -> Understanding:
    """Decides what each column is and which task the target sets.

    Args:
        table: what `read_table` gave.
        target: the column to predict.
        task: "regression" or "classification"; None decides by the target: text and two values are classes, so are a few whole
            numbers that repeat, anything else is a quantity.
        drop: columns to leave out.
        keep: columns to learn from although they look like identifiers.
        categorical: columns of numbers that are names of things (postal codes).
        past: the target's own column is learnt from too, since only earlier rows of it are.
    Raises: `DataError` for a target that is not there, has gaps, infinities or one class only, and for numbers mixed with text.

    >>> facts = understand(Table.of({"rooms": [3, 4, 5], "town": ["A", "B", "A"], "price": [1.5, 2.5, 2.0]}), "price")
    >>> facts.task, [(c.name, c.kind) for c in facts.features]
    ('regression', [('rooms', 'numeric'), ('town', 'categorical')])
    """
    drop, keep, categorical = (tuple(names) for names in (drop, keep, categorical))
    for name in (target, *drop, *keep, *categorical):
        table.column(name)
    if target in drop:
        raise UsageError(f'"{target}" is both the target and left out: name one of them')
    decided, reason, classes = decide_task(target, table.column(target), task, as_names=target in categorical)
    columns = []
    for name, values in table.columns.items():
        if name == target and not past:
            continue
        facts = _column(name, values, name in categorical, name in drop, name in keep or name == target)
        columns.append(facts)
    if not any(column.used for column in columns):
        why = "; ".join(f"{column.name}: {column.remark}" for column in columns) or "there is only the target"
        raise DataError(f"{table.source} has no column to learn from ({why})")
    notes = [*table.notes, *([] if past else _twins(table, target, decided, columns))]
    return Understanding(table.source, table.rows, tuple(columns), target, decided, reason, classes, tuple(notes))


def decide_task(name: str, values: Values, task: str | None, *, as_names: bool = False) -> tuple[Task, str, tuple[Label, ...]]:
    """(task, how that was decided, classes) for a target column."""
    if task not in (None, "regression", "classification"):
        raise UsageError(f'there is no task "{task}".{nearest(str(task), ["regression", "classification"])}')
    if values.ndim != 1:
        raise DataError(f'the target "{name}" has shape {values.shape}: one value a row is needed')
    gone = absent(values)
    if gone.any():
        count = int(gone.sum())
        raise DataError(
            f'the target "{name}" is missing in {count:,} of {len(gone):,} rows, first in row {first(gone):,} '
            "(row 1 is the first below the header): remove those rows, nothing can be learnt from them"
        )
    amounts, bad = numbers(values)
    if bad.any() or as_names:
        if not as_names and len(bad) >= FEW_ROWS and bad.mean() <= STRAY_SHARE:
            raise DataError(stray(name, values, bad))
        if task == "regression":
            why = f'holds text, first "{values[bad][0]}" in row {first(bad):,}' if bad.any() else "names things, as told"
            raise DataError(f'the target "{name}" {why}: a quantity needs numbers')
        labels: tuple[Label, ...] = tuple(str(v) for v in np.unique(strings(values)).tolist())
        return *_classes(name, labels, len(values)), labels
    refuse_infinite(name, amounts)
    distinct = np.unique(amounts)
    if len(distinct) == 1:
        raise DataError(
            f'the target "{name}" has one value only ({distinct[0]:g}) in all {len(amounts):,} rows: there is nothing to learn'
        )
    labels = tuple(int(v) if v == int(v) else v for v in distinct.tolist())
    if task == "regression":
        return "regression", "as told", ()
    if task == "classification":
        decided, _ = _classes(name, labels, len(values))
        return decided, f"as told, {len(labels)} classes", labels
    if len(labels) == 2:
        return "binary", f"it has two values, {labels[0]} and {labels[1]}", labels
    whole = all(isinstance(label, int) for label in labels)
    if whole and len(labels) <= MAX_INTEGER_CLASSES and len(amounts) >= MIN_ROWS_A_CLASS * len(labels):
        return "multiclass", f"it has {len(labels)} distinct whole numbers (task regression makes it a quantity)", labels
    return "regression", f"its numbers take {len(distinct):,} values", ()


def _classes(name: str, labels: tuple[Label, ...], rows: int) -> tuple[Task, str]:
    if len(labels) == 1:
        raise DataError(
            f'the target "{name}" has one class only, "{labels[0]}", in all {rows:,} rows: there is nothing to tell apart'
        )
    if rows >= FEW_ROWS and len(labels) > OWN_SHARE * rows:
        raise DataError(
            f'the target "{name}" has {len(labels):,} classes in {rows:,} rows: nearly every row is a class of its own'
        )
    if len(labels) > MAX_CLASSES:
        raise DataError(f'the target "{name}" has {len(labels):,} classes: {MAX_CLASSES:,} are the most that is taken for a task')
    return ("binary" if len(labels) == 2 else "multiclass"), f"it holds text, {len(labels)} classes"


def stray(name: str, values: Values, bad: Values) -> str:
    """The message about a column of numbers with some text in it."""
    count, word = int(bad.sum()), str(values[bad][0])
    return (
        f'column "{name}" holds numbers, but in {count:,} of {len(bad):,} rows text, first "{word}" in row {first(bad):,} '
        f'(row 1 is the first below the header): correct them, or say that "{word}" means missing (--missing "{word}"), '
        f'or that the column names things (--categorical "{name}"), or leave it out (--drop "{name}")'
    )


def _column(name: str, values: Values, as_names: bool, dropped: bool, kept: bool) -> ColumnFacts:
    """The facts on one feature."""
    missing = int(absent(values).sum())
    if values.ndim > 1:
        if not dropped:
            refuse_infinite(name, values)
        return ColumnFacts(name, "block", missing, 0, not dropped, "left out as told" if dropped else _shape(values))
    amounts, bad = numbers(values)
    named = as_names or bool(bad.any())
    distinct = len(np.unique(strings(values)[~absent(values)])) if named else len(np.unique(amounts[~np.isnan(amounts)]))
    kind: Kind = "categorical" if named else "numeric"

    def left_out(kind: Kind, why: str) -> ColumnFacts:
        return ColumnFacts(name, kind, missing, distinct, False, f"left out: {why}")

    if dropped:
        return ColumnFacts(name, kind, missing, distinct, False, "left out as told")
    if distinct == 0:
        return left_out("empty", "every value is missing")
    if distinct == 1 and not missing:
        return left_out("constant", "one value in every row")
    if named and not as_names and len(bad) - missing >= FEW_ROWS and bad.sum() <= STRAY_SHARE * (len(bad) - missing):
        raise DataError(stray(name, values, bad))
    if not named:
        refuse_infinite(name, amounts)
    if not kept and not as_names and _identifies(amounts, named, distinct, len(values) - missing):
        why = "nearly every row has a text of its own" if named else "it counts the rows"
        return left_out("identifier", f"{why} (keep it with --keep)")
    return ColumnFacts(name, kind, missing, distinct, True)


def _identifies(amounts: Values, named: bool, distinct: int, there: int) -> bool:
    """Whether a column names rows: text of which more than half is distinct, or whole numbers that go up by one."""
    if there < FEW_ROWS:
        return False
    if named:
        return distinct > OWN_SHARE * there
    with np.errstate(over="ignore"):
        return there == len(amounts) and bool(np.all(np.diff(amounts) == 1))


def _shape(values: Values) -> str:
    return f"{' x '.join(map(str, values.shape[1:]))} numbers a row"


def _twins(table: Table, target: str, task: Task, columns: list[ColumnFacts]) -> list[str]:
    """A note on each feature that is the target in other units: what is not known when predicting must not be learnt from."""
    if task != "regression":
        return []
    wanted = numbers(table.column(target))[0]
    found = []
    for column in columns:
        if not column.used or column.kind != "numeric":
            continue
        amounts = numbers(table.column(column.name))[0]
        there = ~np.isnan(amounts)
        with np.errstate(all="ignore"):  # a correlation of numbers such as 1e200 is NaN, and no twin
            varied = there.sum() > 2 and np.ptp(amounts[there]) > 0 and np.ptp(wanted[there]) > 0
            alike = float(np.corrcoef(amounts[there], wanted[there])[0, 1]) if varied else 0.0
            if abs(alike) > TWIN:
                found.append(
                    f"{column.name} is {target} in other units (correlation {alike:.8f}): unless it is known when predicting, "
                    f'leave it out (--drop "{column.name}")'
                )
    return found
