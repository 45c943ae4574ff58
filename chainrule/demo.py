"""Five networks that learn by backpropagation on real data, each with the score it must reach.

In: names of demos. Out: a run folder for each trained network, and `Result`s that stand beside their baselines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import examples
from .data.table import Table
from .data.understand import understand
from .experiment import Outcome, Recipe, train, write
from .report import run_folder
from .series import SeriesRecipe, train_series, understand_series


@dataclass(frozen=True)
class Demo:
    """A task. `about`: one line on it. `reach`: the least mean of `metric` over `seeds`, or the most if `smaller`."""

    name: str
    about: str
    table: Callable[[], Table]
    target: str
    recipe: Recipe
    metric: str
    reach: float
    smaller: bool = False
    drop: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    everything: bool = False


@dataclass(frozen=True)
class Result:
    """What a demo came to. `scores`: model -> `metric`, the mean over its seeds; the network first."""

    demo: Demo
    scores: dict[str, float]
    folders: list[Path]
    seconds: float

    @property
    def reached(self) -> bool:
        value = next(iter(self.scores.values()))
        return value <= self.demo.reach if self.demo.smaller else value >= self.demo.reach


def _xor() -> Table:
    x, y = examples.xor()
    return Table.of({"a": x[:, 0], "b": x[:, 1], "a xor b": y.astype(np.int64)}, "XOR")


def _digits() -> Table:
    x, y = examples.digits()
    return Table.of({"pixels": x.reshape(-1, 8, 8), "digit": y}, "handwritten digits")


def _tumours() -> Table:
    from sklearn.datasets import load_breast_cancer

    x, y = examples.tumours()
    names = [str(name) for name in load_breast_cancer().feature_names]
    columns = {name: x[:, i] for i, name in enumerate(names)}
    return Table.of({**columns, "diagnosis": np.where(y == 1, "malignant", "benign")}, "breast tumours")


DEMOS = {
    demo.name: demo
    for demo in (
        Demo(
            "xor",
            "exclusive or, all four rows",
            _xor,
            "a xor b",
            Recipe(hidden=(8,), activation="tanh", dropout=0.0, learning_rate=0.05, weight_decay=0.0, batch_size=4, epochs=300),
            "accuracy",
            1.0,
            everything=True,
        ),
        Demo(
            "digits",
            "handwritten digits, a quarter held out",
            _digits,
            "digit",
            Recipe(dropout=0.3, learning_rate=3e-3, weight_decay=0.1, batch_size=32, epochs=60, test=0.25),
            "accuracy",
            0.97,
        ),
        Demo(
            "tumours",
            "breast tumours, a quarter held out",
            _tumours,
            "diagnosis",
            Recipe(weight_decay=2.0, epochs=40, test=0.25),
            "AUC",
            0.985,
        ),
        Demo(
            "houses",
            "values in thousands of dollars, a fifth held out",
            examples.houses,
            "TOTAL VALUE",
            Recipe(learning_rate=3e-3, batch_size=64, epochs=40, log_target=True),
            "RMSE",
            40.0,
            smaller=True,
            drop=("TAX",),
            seeds=(0, 1, 2),
        ),
        Demo(
            "series",
            "sunspots a year ahead, from four years; the last fifth held out",
            examples.sunspots,
            "sunspots",
            SeriesRecipe(sequence=48, horizon=12, batch_size=32, epochs=30, season=132),
            "RMSE",
            31.0,
            smaller=True,
            seeds=(0, 1, 2),
        ),
    )
}


def run_demo(demo: Demo, out: Path, *, say: Callable[[str], None], verbose: bool = True) -> Result:
    """Trains a demo's networks, one a seed, into `out`/NAME or `out`/NAME-seed-SEED; an earlier demo's folders are overwritten.

    Raises: `KeyboardInterrupt` after Ctrl-C, once what was learnt is saved.
    """
    table, recipe = demo.table(), demo.recipe
    if isinstance(recipe, SeriesRecipe):
        recipe, notes = recipe.ordered(table)
        facts = understand_series(table, demo.target, recipe, notes, drop=demo.drop)
    else:
        facts = understand(table, demo.target, drop=demo.drop)
    outcomes: list[Outcome] = []
    folders = []
    for seed in demo.seeds:
        folder = run_folder(out / (demo.name if len(demo.seeds) == 1 else f"{demo.name}-seed-{seed}"), overwrite=True)
        say(f"{demo.name}: {demo.about}; {facts.rows:,} rows" + (f"; seed {seed}" if len(demo.seeds) > 1 else ""))
        if isinstance(recipe, SeriesRecipe):
            outcome = train_series(table, facts, replace(recipe, seed=seed), verbose=verbose)
        else:
            outcome = train(table, facts, replace(recipe, seed=seed), everything=demo.everything, verbose=verbose)
        write(folder, outcome)
        if outcome.interrupted:
            raise KeyboardInterrupt
        outcomes.append(outcome)
        folders.append(folder)
    models = outcomes[0].scores
    scores = {model: float(np.mean([outcome.scores[model][demo.metric] for outcome in outcomes])) for model in models}
    return Result(demo, scores, folders, sum(outcome.seconds for outcome in outcomes))
