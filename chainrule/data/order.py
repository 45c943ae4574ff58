"""Whether the rows of a table stand in the order of time, one series with even steps; said exactly where they do not.

In: a `Table`. Out: `Order`, or a `DataError` that names the first row that is out of place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from .table import Table, Values, absent, first, is_text, numbers, strings

REGULAR, NEAR = 0.9, 0.2  # so many steps lie so near the commonest: then a longer one leaves something out. Months differ by 10 %
BREAK = 10  # elsewhere (working days), so many times the commonest step
SEASONS = ((7.0, 1.0, 0.01), (52.0, 7.0, 0.01), (12.0, 30.44, 0.1), (4.0, 91.3, 0.05), (24.0, 1 / 24, 0.01))  # rows, days, share


@dataclass(frozen=True)
class Order:
    """What the order of rows follows: the column of time, or None; `season`: rows after which calendars repeat, or None."""

    time: str | None
    season: int | None
    notes: tuple[str, ...]


def order_of(table: Table, time: str | None = None, *, gaps: bool = False) -> Order:
    """The order in time, checked.

    Args: time: the column of dates or times; None takes the first column of dates, if there is one. gaps: allow steps that leave
    something out.
    Raises: `DataError` for times that are missing, no numbers, go back, repeat, or leave something out.

    >>> order_of(Table.of({"day": np.array(["2024-01-01", "2024-01-02", "2024-01-03"], "M8[D]")}), "day").season
    7
    """
    if time is None and not table.dates:
        return Order(None, None, ("there is no column of dates: the rows are taken to be in the order of time, with even steps",))
    name = time or table.dates[0]
    values = table.column(name)
    if values.ndim > 1:
        raise DataError(f'the column of time "{name}" has shape {values.shape}: one value a row is needed')
    when, bad = numbers(values)
    if bad.any():
        raise DataError(
            f'the column of time "{name}" is no date (such as 2024-12-31) and no number in row {first(bad):,}: "{values[bad][0]}"'
        )
    if (gone := absent(values)).any():
        raise DataError(f'the column of time "{name}" is missing in {int(gone.sum()):,} rows, first in row {first(gone):,}')
    steps = np.diff(when)
    if (steps <= 0).any():
        raise DataError(_disorder(table, name, when, steps))
    notes = [f"{name}: orders the rows"]
    if (said := _uneven(name, steps)) and not gaps:
        raise DataError(f"{said}. Fill in what is missing, or say --gaps to take the rows as if they followed each other evenly")
    if said:
        notes.append(f"{said}; taken as if rows followed each other evenly, as told")
    season = _season(float(np.median(steps))) if name in table.dates and len(steps) else None
    return Order(name, season, tuple(notes))


def _disorder(table: Table, name: str, when: Values, steps: Values) -> str:
    """What is wrong with times that do not rise, in words."""
    back = steps < 0
    if back.all():
        return f'the rows run from the latest "{name}" to the earliest: turn the table round, oldest first'
    group = _series(table, name, when)
    if group is not None:
        return (
            f'the table seems to hold several series, one for each value of "{group}": only one series at a time can be learnt. Make a '
            f'table of one value of "{group}", with the others as columns of their own if they help'
        )
    at = int(np.argmax(steps <= 0))
    what = "is before that of the row above" if back[at] else "is that of the row above"
    do = (
        f'sort the table by "{name}"'
        if back.any()
        else "keep one row for each time: several series in one table cannot be learnt"
    )
    return f'the time "{name}" of row {at + 2:,} (row 1 is the first below the header) {what}: {do}, or name another column with --time'


def _series(table: Table, time: str, when: Values) -> str | None:
    """The column whose values each name a series with times that rise, if there is one."""
    for name, values in table.columns.items():
        if name == time or values.ndim > 1 or not (is_text(values) or values.dtype.kind in "iu"):
            continue
        codes = np.unique(strings(values), return_inverse=True)[1]
        order = np.argsort(codes, kind="stable")
        same = codes[order][1:] == codes[order][:-1]
        if 1 < codes.max() + 1 <= len(when) / 2 and same.any() and (np.diff(when[order])[same] > 0).all():
            return name
    return None


def _uneven(name: str, steps: Values) -> str:
    """A sentence on the first step that leaves something out, or ""."""
    if not len(steps):
        return ""
    usual = float(np.median(steps))
    regular = np.mean(np.abs(steps - usual) <= NEAR * usual) >= REGULAR
    wide = steps > (1.5 if regular else BREAK) * usual
    if not wide.any():
        return ""
    at, count = int(np.argmax(wide)), int(wide.sum())
    return (
        f'the times "{name}" leave something out in {count:,} {"place" if count == 1 else "places"}, first between rows {at + 1:,} and '
        f"{at + 2:,}: a step of {steps[at]:g} where {usual:g} is usual"
    )


def _season(step: float) -> int | None:
    """Rows after which the calendar repeats: weeks of days, years of weeks, months and quarters, days of hours."""
    return next((int(rows) for rows, days, near in SEASONS if abs(step - days) <= near * days), None)
