"""Six networks that learn by backpropagation on real data, each with the score it must reach.

In: names of demos. Out: a run folder for each trained network, and `Result`s that stand beside their baselines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from . import examples
from .data.images import Images
from .data.table import Table
from .data.understand import understand
from .experiment import Outcome, Recipe, train, write
from .images import ImageOutcome, ImageRecipe, train_images, write_image_run
from .report import run_folder
from .series import SeriesRecipe, train_series, understand_series


@dataclass(frozen=True)
class Demo:
    """A task. `about`: one line on it. `reach`: the least mean of `metric` over `seeds`, or the most if `smaller`."""

    name: str
    about: str
    data: Callable[[], Table | Images]
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
        Demo(
            "images",
            "handwritten digits of 28 x 28 pixels, a fifth held out",
            examples.mnist,
            "digit",
            ImageRecipe(learning_rate=3e-3, batch_size=32, epochs=20, validation=0.0),
            "accuracy",
            0.97,
        ),
    )
}


def run_demo(demo: Demo, out: Path, *, say: Callable[[str], None], verbose: bool = True) -> Result:
    """Trains a demo's networks, one a seed, into `out`/NAME or `out`/NAME-seed-SEED; an earlier demo's folders are overwritten.

    Raises: `KeyboardInterrupt` after Ctrl-C, once what was learnt is saved.
    """
    data = demo.data()
    outcomes: list[Outcome | ImageOutcome] = []
    folders = []
    for seed in demo.seeds:
        folder = run_folder(out / (demo.name if len(demo.seeds) == 1 else f"{demo.name}-seed-{seed}"), overwrite=True)
        what = "pictures" if isinstance(data, Images) else "rows"
        say(f"{demo.name}: {demo.about}; {data.rows:,} {what}" + (f"; seed {seed}" if len(demo.seeds) > 1 else ""))
        outcome = _learnt(demo, data, seed, folder, verbose)
        if outcome.interrupted:
            raise KeyboardInterrupt
        outcomes.append(outcome)
        folders.append(folder)
    models = outcomes[0].scores
    scores = {model: float(np.mean([outcome.scores[model][demo.metric] for outcome in outcomes])) for model in models}
    return Result(demo, scores, folders, sum(outcome.seconds for outcome in outcomes))


def _learnt(demo: Demo, data: Table | Images, seed: int, folder: Path, verbose: bool) -> Outcome | ImageOutcome:
    """One network, trained and written."""
    recipe = replace(demo.recipe, seed=seed)
    if isinstance(data, Images):
        assert isinstance(recipe, ImageRecipe)
        shown = train_images(data, recipe, verbose=verbose)
        write_image_run(folder, shown)
        return shown
    if isinstance(recipe, SeriesRecipe):
        recipe, notes = recipe.ordered(data)
        facts = understand_series(data, demo.target, recipe, notes, drop=demo.drop)
        outcome = train_series(data, facts, recipe, verbose=verbose)
    else:
        facts = understand(data, demo.target, drop=demo.drop)
        outcome = train(data, facts, recipe, everything=demo.everything, verbose=verbose)
    write(folder, outcome)
    return outcome
