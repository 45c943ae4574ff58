"""Columns into the numbers a network learns from, and predictions back into what the target means.

In: a `Table` and its `Understanding`. Out: `Preparation`, fitted by scikit-learn on the training rows only, which turns any
table of those columns into float32 (rows, features). It keeps plain numbers and strings, so that it is stored as JSON, is
restored exactly, needs no scikit-learn to be applied, and outlives its versions.

A number x becomes v = u / sqrt(1 + (u / 3)^2) with u = (x - median) / interquartile range, then (v - mean) / deviation: outliers
such as a year of 0 neither set the scale nor reach the network. Source: Holzmüller, Grinsztajn, Steinwart 2024, "Better by
default", section 3 (robust scaling and smooth clipping). Differs: standardised afterwards.

A category becomes one column for each value that training rows hold often enough, one for all rare ones together. A value never
seen in training counts as rare where training had rare ones, else all its columns are 0; either is reported. Gaps are filled by
the median or the most frequent category, and a column says where, if training rows had gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from ..errors import DataError, FileFormatError
from .fields import fields_of, object_of
from .table import Table, Values, absent, first, numbers, refuse_infinite, strings
from .target import LARGEST, TargetCode
from .understand import Understanding, stray
from .windows import Window

MAX_CATEGORIES = 50  # the most frequent ones; all others count as rare
RARE_ROWS, RARE_SHARE = 5, 0.01  # a category in fewer training rows than either counts as rare
FORMAT = "chainrule preparation 1"


@dataclass
class Remarks:
    """What applying a preparation had to do: column -> how many gaps were filled; -> (how many unseen, first one, its row)."""

    filled: dict[str, int] = field(default_factory=dict)
    unseen: dict[str, tuple[int, str, int]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One sentence for each column concerned."""
        return [f"{name}: {count:,} missing, filled in" for name, count in self.filled.items()] + [
            f'{name}: {count:,} of a category never seen in training, first "{word}" in row {row:,}; counted as unknown'
            for name, (count, word, row) in self.unseen.items()
        ]


@dataclass(frozen=True)
class NumberColumn:
    """(clipped((x - center) / scale) - mean) / deviation; `flag` adds a column that is 1 where the value was missing."""

    name: str
    fill: float
    center: float
    scale: float
    mean: float
    deviation: float
    flag: bool
    kind: ClassVar[str] = "numeric"

    @classmethod
    def fit(cls, name: str, values: Values) -> NumberColumn:
        from sklearn.impute import SimpleImputer
        from sklearn.preprocessing import RobustScaler, StandardScaler

        column = np.clip(numbers(values)[0], -LARGEST, LARGEST).reshape(-1, 1)
        gaps = np.isnan(column)
        if gaps.all():  # in the training rows; other rows may hold some
            return cls(name, 0.0, 0.0, 1.0, 0.0, 1.0, True)
        there = column[~gaps].reshape(-1, 1)
        fill = float(SimpleImputer(strategy="median").fit(column).statistics_[0])
        scaler = RobustScaler().fit(there)
        low, high = np.percentile(there, [25, 75])
        # most values equal: half the range; all equal: any scale will do, every value becomes 0
        scale = float(scaler.scale_[0]) if high > low else float(there.max() / 2 - there.min() / 2) or 1.0
        center = float(scaler.center_[0])
        standard = StandardScaler().fit(_clipped(np.where(gaps, fill, column), center, scale))
        return cls(name, fill, center, scale, float(standard.mean_[0]), float(standard.scale_[0]), bool(gaps.any()))

    @property
    def features(self) -> list[str]:
        return [self.name, *([f"{self.name} missing"] if self.flag else [])]

    def plain(self, values: Values, remarks: Remarks) -> list[Values]:
        """The numbers as they are, gaps filled, and the flag; each (rows,)."""
        if values.ndim > 1:
            raise DataError(f'column "{self.name}" has shape {values.shape}: in training it held one number a row')
        amounts, bad = numbers(values)
        if bad.any():
            raise DataError(f"{stray(self.name, values, bad)}: in training it held numbers")
        refuse_infinite(self.name, amounts)
        gaps = np.isnan(amounts)
        if gaps.any():
            remarks.filled[self.name] = int(gaps.sum())
        return [np.clip(np.where(gaps, self.fill, amounts), -LARGEST, LARGEST), *([gaps] if self.flag else [])]

    def apply(self, values: Values, remarks: Remarks) -> list[Values]:
        """float32 columns, each (rows,)."""
        amounts, *flag = self.plain(values, remarks)
        with np.errstate(over="ignore"):  # by the numbers of a forged preparation only; the network refuses infinity
            scaled = (_clipped(amounts, self.center, self.scale) - self.mean) / self.deviation
            return [part.astype(np.float32) for part in (scaled, *flag)]


def _clipped(x: Values, center: float, scale: float) -> Values:
    """u / sqrt(1 + (u / 3)^2) with u = (x - center) / scale, between -3 and 3 however large x is."""
    with np.errstate(over="ignore"):
        u = np.clip((x - center) / scale, -1e30, 1e30)
    return np.asarray(u / np.hypot(1.0, u / 3))


@dataclass(frozen=True)
class CategoryColumn:
    """One column of 0 and 1 for each of `categories`, one for all the `rare` ones if there are any; `flag` as for numbers."""

    name: str
    fill: str
    categories: tuple[str, ...]
    rare: tuple[str, ...]
    flag: bool
    kind: ClassVar[str] = "categorical"

    @classmethod
    def fit(cls, name: str, values: Values) -> CategoryColumn:
        from sklearn.impute import SimpleImputer
        from sklearn.preprocessing import OneHotEncoder

        column = strings(values)
        gaps = absent(column)
        if gaps.all():
            return cls(name, "", (), (), True)
        there = column[~gaps].astype(object).reshape(-1, 1)
        imputer = SimpleImputer(strategy="most_frequent").fit(there)
        least = max(1, min(RARE_ROWS, int(RARE_SHARE * len(there))))
        encoder = OneHotEncoder(min_frequency=least, max_categories=MAX_CATEGORIES, handle_unknown="infrequent_if_exist").fit(
            there
        )
        lumped = encoder.infrequent_categories_[0]
        rare = tuple(str(v) for v in lumped) if lumped is not None else ()
        categories = tuple(str(v) for v in encoder.categories_[0] if str(v) not in set(rare))
        return cls(name, str(imputer.statistics_[0]), categories, rare, bool(gaps.any()))

    @property
    def features(self) -> list[str]:
        names = [f"{self.name} = {category}" for category in self.categories]
        return names + [f"{self.name} rare"] * bool(self.rare) + [f"{self.name} missing"] * self.flag

    def apply(self, values: Values, remarks: Remarks) -> list[Values]:
        """float32 columns, each (rows,)."""
        if values.ndim > 1:
            raise DataError(f'column "{self.name}" has shape {values.shape}: in training it held one category a row')
        column = strings(values)
        gaps = absent(column)
        if gaps.any():
            remarks.filled[self.name] = int(gaps.sum())
            column = np.where(gaps, np.array(self.fill, dtype=column.dtype), column)
        hits = [column == category for category in self.categories]
        known = np.logical_or.reduce(hits) if hits else np.zeros(len(column), dtype=bool)
        rare = set(self.rare)
        unseen = ~known & (column != "") & np.fromiter((word not in rare for word in column.tolist()), bool, len(column))
        if unseen.any():
            remarks.unseen[self.name] = (int(unseen.sum()), str(column[unseen][0]), first(unseen))
        out = [hit.astype(np.float32) for hit in hits]
        if self.rare:
            out.append((~known).astype(np.float32))
        return [*out, gaps.astype(np.float32)] if self.flag else out


@dataclass(frozen=True)
class BlockColumn:
    """Images and the like, laid flat: (x - mean) / scale with one mean and scale for all, so that pixels keep their contrast."""

    name: str
    shape: tuple[int, ...]
    mean: float
    scale: float
    kind: ClassVar[str] = "block"

    @classmethod
    def fit(cls, name: str, values: Values) -> BlockColumn:
        mean, scale = (float(f(values, dtype=np.float64)) for f in (np.nanmean, np.nanstd))
        return cls(name, tuple(values.shape[1:]), mean, scale or 1.0)

    @property
    def features(self) -> list[str]:
        return [f"{self.name}{list(index)}" for index in np.ndindex(*self.shape)]

    def apply(self, values: Values, remarks: Remarks) -> list[Values]:
        """One float32 array (rows, values a row)."""
        if values.shape[1:] != self.shape:
            raise DataError(f'column "{self.name}" has {values.shape[1:]} numbers a row, in training it had {self.shape}')
        refuse_infinite(self.name, values)
        flat = (values.reshape(len(values), -1).astype(np.float32) - np.float32(self.mean)) / np.float32(self.scale)
        gaps = absent(values)
        if gaps.any():
            remarks.filled[self.name] = int(gaps.sum())
            np.nan_to_num(flat, copy=False)  # 0 is the mean
        return [flat]


AnyColumn = NumberColumn | CategoryColumn | BlockColumn
KINDS: dict[str, type[AnyColumn]] = {c.kind: c for c in (NumberColumn, CategoryColumn, BlockColumn)}


@dataclass(frozen=True)
class Preparation:
    """Everything between a table and a network.

    Args:
        columns: one for each feature column, fitted.
        target: how the target is encoded.
        missing: the further words for missing values that the file was read with.
        window: for tables in time order, which rows a forecast sees and how far it looks ahead.

    >>> from .understand import understand
    >>> table = Table.of({"size": [50, 70, 90], "town": ["A", "B", "A"], "price": [1.0, 2.0, 3.0]})
    >>> preparation = Preparation.fit(table, understand(table, "price"))
    >>> preparation.features
    ['size', 'town = A', 'town = B']
    >>> preparation.apply(Table.of({"town": ["A"], "size": [70]}))
    (array([[0., 1., 0.]], dtype=float32), Remarks(filled={}, unseen={}))
    >>> Preparation.from_json(preparation.to_json()) == preparation
    True
    """

    columns: tuple[AnyColumn, ...]
    target: TargetCode
    missing: tuple[str, ...] = ()
    window: Window | None = None

    @classmethod
    def fit(cls, table: Table, facts: Understanding, *, missing: Iterable[str] = (), log_target: bool = False) -> Preparation:
        """Fitted on `table`: give it the training rows only, and the facts on the whole table."""
        columns = tuple(KINDS[c.kind].fit(c.name, table.column(c.name)) for c in facts.features)
        target = TargetCode.fit(facts.target, table.column(facts.target), facts.task, facts.classes, log=log_target)
        return cls(columns, target, tuple(missing))

    @property
    def features(self) -> list[str]:
        """A name for each input of the network."""
        return [name for column in self.columns for name in column.features]

    @property
    def width(self) -> int:
        """How many inputs the network has: len(features), which for a forged file would be too many to list."""
        return sum(
            math.prod(column.shape) if isinstance(column, BlockColumn) else len(column.features) for column in self.columns
        )

    def apply(self, table: Table) -> tuple[Values, Remarks]:
        """(float32 (rows, features), what had to be filled in or was never seen).

        Raises: `DataError` for a column that is not there, or holds something else than in training.
        """
        remarks = Remarks()
        parts = [part for column in self.columns for part in column.apply(table.column(column.name), remarks)]
        x = np.concatenate([part.reshape(table.rows, -1) for part in parts], axis=1, dtype=np.float32)
        return x, remarks

    def inputs(self, table: Table) -> tuple[Values, Values | None, Remarks]:
        """(x as the network takes it, for windows over a quantity its encoded value at their ends, remarks).

        x is float32, (rows, features) or (windows, length, features). Raises: as `apply`; `DataError` for fewer rows than a window.
        """
        x, remarks = self.apply(table)
        if self.window is None:
            return x, None, remarks
        ends = self.window.ends(table.rows)
        if not len(ends):
            raise DataError(f"{table.source} has {table.rows:,} rows, and a forecast of this network sees {self.window.length:,}")
        past = self.target.encode(table.column(self.target.name))[ends] if self.target.task == "regression" else None
        return self.window.cut(x, ends), past, remarks

    def plain(self, table: Table) -> Values:
        """float64 (rows, features) as `apply`, but with the numbers neither scaled nor clipped: what a linear model is given."""
        remarks = Remarks()
        parts = []
        for column in self.columns:
            values = table.column(column.name)
            parts += column.plain(values, remarks) if isinstance(column, NumberColumn) else column.apply(values, remarks)
        return np.concatenate([part.reshape(table.rows, -1) for part in parts], axis=1, dtype=np.float64)

    def to_json(self) -> str:
        """As JSON; Python writes floats so that they are read back exactly."""
        columns = [{"kind": column.kind, **asdict(column)} for column in self.columns]
        content = {"format": FORMAT, "missing": self.missing, "target": asdict(self.target), "columns": columns}
        if self.window is not None:
            content["window"] = asdict(self.window)
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, content: str) -> Preparation:
        """The preparation that `to_json` wrote. Raises: `FileFormatError` for anything else."""
        data = object_of(content, "the preparation", FORMAT)
        window = data.pop("window", None)
        if window is not None and not isinstance(window, dict):
            raise FileFormatError(f"the window of the preparation should be an object, it is {str(window)[:60]!r}")
        parts = fields_of(data, {"format": str, "missing": list, "target": dict, "columns": list}, "the preparation")
        columns = tuple(_column_from(item) for item in parts["columns"])
        if not columns or not all(isinstance(word, str) for word in parts["missing"]):
            raise FileFormatError("the preparation has no columns, or its missing words are not text")
        return cls(
            columns,
            TargetCode.restore(parts["target"]),
            tuple(parts["missing"]),
            Window.restore(window) if window is not None else None,
        )


def _column_from(item: Any) -> AnyColumn:
    if not isinstance(item, dict) or not isinstance(item.get("kind"), str) or item["kind"] not in KINDS:
        raise FileFormatError(f"the preparation has a column of an unknown kind: {str(item)[:80]}")
    wanted: dict[str, dict[str, type]] = {
        "numeric": {"name": str, **dict.fromkeys(("fill", "center", "scale", "mean", "deviation"), float), "flag": bool},
        "categorical": {"name": str, "fill": str, "categories": list, "rare": list, "flag": bool},
        "block": {"name": str, "shape": list, "mean": float, "scale": float},
    }
    parts = fields_of(item, {"kind": str, **wanted[item["kind"]]}, "a column of the preparation")
    kind = KINDS[parts.pop("kind")]
    for key in ("categories", "rare", "shape"):
        if key in parts:
            inner = int if key == "shape" else str
            if not all(type(v) is inner for v in parts[key]) or (inner is int and not all(0 < v < 2**31 for v in parts[key])):
                raise FileFormatError(f'column "{parts["name"]}" of the preparation has a wrong "{key}"')
            parts[key] = tuple(parts[key])
    for key in ("scale", "deviation"):
        if not parts.get(key, 1.0) > 0:
            raise FileFormatError(
                f'column "{parts["name"]}" of the preparation has the {key} {parts[key]}, which is not positive'
            )
    return kind(**parts)


def hold_out(codes: Values, classes: Sequence[object], fraction: float, seed: int) -> tuple[Values, Values]:
    """(training rows, held-out rows), drawn by seed; each class gets its share where it has two rows or more.

    Args:
        codes: the encoded target, (rows,).
        classes: empty for regression.
        fraction: of the rows to hold out, between 0 and 1.
    """
    from sklearn.model_selection import train_test_split

    rows = len(codes)
    if rows < 5:
        raise DataError(f"{rows} rows are too few to learn from some and test on others: 5 are the least")
    if not 0 < fraction < 1:
        raise DataError(f"the share of rows to hold out is {fraction}: it must lie between 0 and 1")
    held = min(max(round(fraction * rows), 1), rows - 2)
    counts = np.bincount(codes.astype(np.int64), minlength=len(classes)) if classes else np.zeros(0, dtype=np.int64)
    even = bool(classes) and counts.min() >= 2 and held >= len(classes) and rows - held >= len(classes)
    training, testing = train_test_split(np.arange(rows), test_size=held, random_state=seed, stratify=codes if even else None)
    return np.asarray(training), np.asarray(testing)
