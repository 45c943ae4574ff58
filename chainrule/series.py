"""Forecasts: from a table in time order to a trained recurrent network with held-out scores beside its baselines.

In: a `Table`, a `SeriesRecipe`. Out: an `Outcome`, as for other tables. Rows are split by time, and nothing that is fitted sees the
future: neither what columns mean, nor their statistics, nor the network, nor the baselines (`Spans`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from . import nn
from .data.order import order_of
from .data.prepare import Preparation
from .data.table import Table, Values, numbers
from .data.understand import Understanding, understand
from .data.windows import Spans, Window, spans
from .errors import UsageError
from .experiment import Material, Outcome, Recipe, Scores, learnt, score, simple_models

CELLS = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
WIDEST = 4_000  # numbers that the linear autoregression reads at most: solving for more takes longer than the network


@dataclass(frozen=True)
class SeriesRecipe(Recipe):
    """How a table in time order is learnt. `Recipe` says what the other fields mean; validation and test are the last rows.

    Args:
        sequence: rows that a forecast sees.
        horizon: how many rows after these the target stands.
        cell: the recurrent layers, one for each of `hidden`: "gru", "lstm" or "rnn".
        season: rows after which a season repeats, for the seasonal baseline; None leaves it to the dates.
        time: the column that orders the rows; None takes the first column of dates, if there is one.
        gaps: allow times that leave something out.
        memory: bytes that are kept at most between forward and backward pass (see `fit`).
    """

    UNUSED: ClassVar[frozenset[str]] = frozenset({"split_seed"})
    SETTING: ClassVar[str] = "with --sequence"
    hidden: tuple[int, ...] = (32,)
    activation: str = "tanh"
    dropout: float = 0.0
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    sequence: int = 1
    horizon: int = 1
    cell: str = "gru"
    season: int | None = None
    time: str | None = None
    gaps: bool = False
    memory: int | None = None

    def __post_init__(self) -> None:
        if self.activation != "tanh" and self.cell != "rnn":
            raise UsageError(f"the activations of {self.cell} are its own: --activation goes with --cell rnn")

    @property
    def units(self) -> str:
        return self.cell if self.hidden else "linear"

    @property
    def through_time(self) -> dict[str, Any]:
        return {"memory": self.memory}

    def ordered(self, table: Table) -> tuple[SeriesRecipe, tuple[str, ...]]:
        """(this with time and season as the table has them, notes). Raises: `DataError` for rows that are not in order."""
        order = order_of(table, self.time, gaps=self.gaps)
        return replace(self, time=order.time, season=self.season or order.season), order.notes

    def spans(self, rows: int) -> Spans:
        """Which windows of a table are for what."""
        return spans(rows, Window(self.sequence, self.horizon), self.validation, self.test)

    def network(self, outputs: int) -> nn.Sequential:
        """The network that the recipe describes, not yet built; without hidden units a linear layer on the whole window."""
        layers: list[Any] = [] if self.hidden else [nn.Flatten()]
        for i, units in enumerate(self.hidden):
            options: dict[str, Any] = {"return_sequences": i < len(self.hidden) - 1}
            if self.cell == "rnn":
                options["activation"] = self.activation
            layers += [CELLS[self.cell](units, **options), *([nn.Dropout(self.dropout)] if self.dropout else [])]
        return nn.Sequential(*layers, nn.Dense(outputs))


def understand_series(
    table: Table,
    target: str,
    recipe: SeriesRecipe,
    notes: Iterable[str],
    *,
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    **options: Any,
) -> Understanding:
    """What the training rows tell of the columns; see `understand` for the options. `notes`: on the order of the rows.

    The column of time orders the rows and is not learnt from unless it is kept: a date never comes again.
    """
    drop, keep = tuple(drop), tuple(keep)
    known = recipe.spans(table.rows).known
    clock = [] if recipe.time is None or recipe.time in (target, *keep, *drop) else [recipe.time]
    facts = understand(table.take(np.arange(known)), target, drop=(*drop, *clock), keep=keep, past=True, **options)
    columns = [
        replace(c, remark="left out: it orders the rows (keep it with --keep)") if c.name in clock else c for c in facts.columns
    ]
    notes = (*facts.notes, *notes, f"columns are judged by the {known:,} rows that training may see")
    return replace(facts, rows=table.rows, columns=tuple(columns), notes=notes)


def train_series(
    table: Table, facts: Understanding, recipe: SeriesRecipe, *, missing: Iterable[str] = (), verbose: bool = True
) -> Outcome:
    """Splits by time, prepares, trains, scores.

    Raises: `DataError` for data that cannot be learnt from; `DivergenceError` if that happens in the first epoch.
    """
    parts = recipe.spans(table.rows)
    preparation = Preparation.fit(table.take(np.arange(parts.known)), facts, missing=missing, log_target=recipe.log_target)
    target = table.column(facts.target)
    encoded = preparation.target.encode(target)
    window = Window(recipe.sequence, recipe.horizon)
    quantity = facts.task == "regression"
    if quantity:
        usual = float(np.sqrt(np.mean(window.targets(encoded, parts.training).astype(np.float64) ** 2)))
        window = replace(window, change=usual if usual > 1e-12 else 1.0)
    preparation = replace(preparation, window=window)
    features, remarks = preparation.apply(table)

    def material(ends: Values) -> tuple[Values, Values]:
        return window.cut(features, ends), window.targets(encoded, ends)

    x, y = material(parts.training)
    judged = parts.testing
    return learnt(
        facts,
        recipe,
        Material(
            preparation, x, y, material(parts.validation) if len(parts.validation) else None, window.cut(features, judged),
            target[judged + window.horizon], encoded[judged] if quantity else None, remarks.lines(),
            lambda: baselines(preparation, table, parts, recipe.season),
        ),
        verbose,
    )  # fmt: skip


def baselines(preparation: Preparation, table: Table, parts: Spans, season: int | None) -> dict[str, Scores]:
    """A linear model on the same windows, fitted on all whose targets are known before the first scored forecast, and the last value."""
    window, code = preparation.window, preparation.target
    assert window is not None
    target = table.column(code.name)
    learn, judge = parts.before_test, parts.testing
    true, plain = target[judge + window.horizon], preparation.plain(table)
    if code.task != "regression":
        codes = code.encode(target)
        x, x_judge = (_flat(plain, window, ends) for ends in (learn, judge))
        linear, simplest = simple_models(code, x, codes[learn + window.horizon], x_judge, true).items()
        same = float(np.mean(codes[judge] == codes[judge + window.horizon]))
        return {"linear model on the window": linear[1], "naive: as now": {"accuracy": same}, simplest[0]: simplest[1]}
    t = numbers(target)[0]
    answers = {
        "linear autoregression": autoregression(plain, t, window, learn, judge, parts.known),
        "naive: as now": t[judge],
    }
    if season is not None:
        rows = season * -(-window.horizon // season)  # the last such time of the season that is known
        if judge[0] + window.horizon >= rows:
            answers[f"seasonal naive: as {rows:,} rows before"] = t[judge + window.horizon - rows]
    return {name: score(code, true, values, None) for name, values in answers.items()}


def autoregression(plain: Values, t: Values, window: Window, learn: Values, judge: Values, known: int) -> Values:
    """Least squares from all numbers of a window to the target: (len(judge),).

    The normal equations are gathered block by block, on standardised columns, with 1e-8 of their mean added to the diagonal.

    Args: plain (rows, features); t (rows,) the target; known: rows by which the columns are standardised.

    >>> t = np.arange(20.0) ** 2
    >>> window = Window(3, 1)
    >>> autoregression(t[:, None], t, window, np.arange(2, 15), np.array([18]), 16).round(1)
    array([361.])
    """
    mean, scale = plain[:known].mean(axis=0), plain[:known].std(axis=0)
    standard = (plain - mean) / np.where(scale > 0, scale, 1.0)
    level, spread = float(t[:known].mean()), float(t[:known].std()) or 1.0
    width = min(window.length * plain.shape[1], WIDEST) + 1
    gram, right = np.zeros((width, width)), np.zeros(width)
    for block in np.array_split(learn, -(-len(learn) * width // 2**22)):
        x = _with_one(_flat(standard, window, block))
        gram += x.T @ x
        right += x.T @ ((t[block + window.horizon] - level) / spread)
    gram[np.diag_indices(width)] += 1e-8 * np.trace(gram) / width
    weight = np.linalg.solve(gram, right)
    return np.asarray(_with_one(_flat(standard, window, judge)) @ weight * spread + level)


def _flat(features: Values, window: Window, ends: Values) -> Values:
    """Windows laid flat, the latest rows last; of very wide ones the latest numbers."""
    return window.cut(features, ends).reshape(len(ends), -1)[:, -WIDEST:]


def _with_one(x: Values) -> Values:
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)
