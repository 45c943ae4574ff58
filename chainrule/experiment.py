"""From a table to a trained network with held-out scores beside its baselines, into a run folder.

In: a `Table`, its `Understanding`, a `Recipe`. Out: `Outcome`. Preparation, network and baselines see the training rows only; the
held-out rows are touched once, for the scores. A run that was interrupted or diverged is an outcome too, with what it had learnt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from . import nn
from .data.prepare import Preparation, hold_out
from .data.table import Table, Values, numbers
from .data.target import TargetCode
from .data.understand import Understanding
from .errors import DivergenceError
from .folders import write_run
from .optim import AdamW
from .report import Report, counted
from .schedules import cosine
from .train.history import Run as History
from .train.progress import duration

Scores = dict[str, float]
INTERRUPTED = "interrupted before the baselines were fitted"
STEPS = 6_000  # what a table of some thousand rows takes to be learnt well; larger tables get 20 epochs, whatever it takes


@dataclass(frozen=True)
class Recipe:
    """How a table is learnt: the defaults suit tables of a few hundred to some hundred thousand rows.

    Args:
        hidden: units of each hidden layer.
        activation: after each hidden layer.
        dropout: share of hidden units left out in each training step.
        learning_rate, weight_decay: of AdamW; the rate falls by half a cosine wave to 0 over all epochs.
        batch_size: rows a step; None takes about a hundredth of the rows, 16 to 512.
        epochs: passes over the training rows at most; None takes 20 to 100, as many as make about 6,000 steps.
        patience: epochs without a better validation loss before training stops; the best weights are kept.
        validation: share of the training rows that decide when to stop; 0 learns from all of them, for all epochs.
        test: share of all rows that are held out for the scores.
        seed: of the network: first weights, order of rows, dropout, validation rows.
        split_seed: of the choice of held-out rows, apart from `seed` so that seeds are compared on the same rows.
        log_target: learn the logarithm of a positive quantity, such as a price.
    """

    UNUSED: ClassVar[frozenset[str]] = frozenset()  # fields that say nothing, of kinds of recipes with more than these
    SETTING: ClassVar[str] = "for a table without --sequence or --characters"
    hidden: tuple[int, ...] = (128, 64)
    activation: str = "silu"
    dropout: float = 0.1
    learning_rate: float = 2e-3
    weight_decay: float = 0.3
    batch_size: int | None = None
    epochs: int | None = None
    patience: int = 30
    validation: float = 0.1
    test: float = 0.2
    seed: int = 0
    split_seed: int = 0
    log_target: bool = False

    def batch(self, rows: int) -> int:
        """Rows a step: `batch_size`, or the power of two next below a hundredth of the rows, from 16 to 512.

        >>> Recipe().batch(150), Recipe().batch(5_000), Recipe().batch(1_000_000)
        (16, 32, 512)
        """
        return self.batch_size or min(512, max(16, 2 ** int(np.log2(max(rows, 100) / 100))))

    def passes(self, rows: int) -> int:
        """Epochs at most: `epochs`, or 20 to 100, as many as make about 6,000 steps.

        >>> Recipe().passes(150), Recipe().passes(5_000), Recipe().passes(1_000_000)
        (100, 38, 20)
        """
        return self.epochs or min(100, max(20, STEPS // -(-rows // self.batch(rows))))

    @property
    def units(self) -> str:
        """What the hidden layers are made of, in words."""
        return self.activation

    @property
    def through_time(self) -> dict[str, Any]:
        """Options of `fit` on how gradients go back through time."""
        return {}

    def network(self, outputs: int) -> nn.Sequential:
        """The network that the recipe describes, not yet built."""
        layers: list[Any] = []
        for units in self.hidden:
            layers += [nn.Dense(units, self.activation), *([nn.Dropout(self.dropout)] if self.dropout else [])]
        return nn.Sequential(*layers, nn.Dense(outputs))


@dataclass(frozen=True)
class Outcome:
    """What an experiment gave. `scores`: model -> metric -> value on held-out rows, the network first.

    `stopped`: why training ended before its last epoch, or "". `interrupted`: by Ctrl-C. `failure`: how training diverged, or "";
    the history so far and the last good weights are kept then. `everything`: the scores are on the rows that were learnt from. For a
    table in the order of time, `rows` counts windows, `validated` those that decided when to stop, and true and predicted follow time.
    """

    facts: Understanding
    recipe: Recipe
    preparation: Preparation
    network: nn.Sequential
    history: dict[str, list[float]]
    best_epoch: int | None
    scores: dict[str, Scores]
    true: Values
    predicted: Values
    rows: tuple[int, int]
    seconds: float
    notes: list[str] = field(default_factory=list)
    interrupted: bool = False
    stopped: str = ""
    failure: str = ""
    everything: bool = False
    validated: int = 0

    @property
    def judged(self) -> str:
        """What the scores are on, in words."""
        if self.preparation.window is not None:
            return f"held-out rows, forecast {self.preparation.window.horizon:,} before"
        return "the rows that were learnt from" if self.everything else "held-out rows"


@dataclass(frozen=True)
class Material:
    """What a network learns from and is judged on.

    Args: x, y: training rows (or windows), encoded. validation: a share of them, or (x, y), or None for none. x_judge, true: the
    held-out ones, and their targets as the table has them. origin: for windows over a quantity, its encoded value at their ends.
    notes: what preparing had to do. baselines: fits simple models and scores them on the held-out rows.
    """

    preparation: Preparation
    x: Values
    y: Values
    validation: float | tuple[Values, Values] | None
    x_judge: Values
    true: Values
    origin: Values | None
    notes: list[str]
    baselines: Callable[[], dict[str, Scores]]


def train(
    table: Table,
    facts: Understanding,
    recipe: Recipe,
    *,
    missing: Iterable[str] = (),
    everything: bool = False,
    verbose: bool = True,
) -> Outcome:
    """Holds rows out, prepares, trains, scores.

    Args:
        everything: train and score on all rows: only for tables that are complete, such as XOR.
    Raises: `DataError` for data that cannot be learnt from; `DivergenceError` if that happens in the first epoch.
    """
    target = table.column(facts.target)
    if everything:
        training = testing = np.arange(table.rows)
    else:
        code = TargetCode(facts.target, facts.task, facts.classes)
        codes = code.encode(target) if facts.classes else np.zeros(table.rows)
        training, testing = hold_out(codes, facts.classes, recipe.test, recipe.split_seed)
    learn, judge = table.take(training), table.take(testing)
    preparation = Preparation.fit(learn, facts, missing=missing, log_target=recipe.log_target)
    (x, filled), (x_judge, met) = preparation.apply(learn), preparation.apply(judge)
    material = Material(
        preparation, x, preparation.target.encode(learn.column(facts.target)), None if everything else recipe.validation or None,
        x_judge, judge.column(facts.target), None,
        [f"training rows: {line}" for line in filled.lines()] + [f"held-out rows: {line}" for line in met.lines()],
        lambda: baselines(preparation, learn, judge),
    )  # fmt: skip
    return replace(learnt(facts, recipe, material, verbose), everything=everything)


def learnt(facts: Understanding, recipe: Recipe, material: Material, verbose: bool) -> Outcome:
    """Trains a network and scores it beside its baselines.

    Raises: `DivergenceError` if that happens in the first epoch.
    """
    preparation = material.preparation
    network = recipe.network(preparation.target.outputs)
    run, failure, seconds = fitted(network, material.x, material.y, recipe, preparation.target.loss, material.validation, verbose)
    answers, chances = predictions(network, preparation, material.x_judge, material.origin)
    scores = {"this network": score(preparation.target, material.true, answers, chances)}
    notes = [*material.notes, *ending(run, failure)]
    found, trouble = beside(material.baselines)
    scores |= found
    notes += trouble
    interrupted = run.interrupted or INTERRUPTED in trouble
    rows = (len(material.x), len(material.x_judge))
    return Outcome(
        facts, recipe, preparation, network, history_of(run), run.best_epoch, scores, material.true, answers, rows, seconds, notes,
        interrupted, run.stopped, failure, validated=len(material.validation[1]) if isinstance(material.validation, tuple) else 0,
    )  # fmt: skip


def beside(baselines: Callable[[], dict[str, Scores]]) -> tuple[dict[str, Scores], list[str]]:
    """What simple models reach, and notes on what went wrong: the network is trained by then, and nothing that happens to them shall take
    it away."""
    try:
        return baselines(), []
    except KeyboardInterrupt:
        return {}, [INTERRUPTED]
    except Exception as error:
        reason = str(error) or ("there is not enough memory" if isinstance(error, MemoryError) else "no reason is given")
        return {}, [f"the baselines could not be fitted: {reason} ({type(error).__name__})"]


def fitted(
    network: nn.Sequential,
    x: Values,
    y: Values,
    recipe: Recipe,
    loss: str,
    validation: float | tuple[Values, Values] | None,
    verbose: bool,
) -> tuple[History, str, float]:
    """(history, how training diverged or "", seconds) of a network that is trained by the recipe.

    Raises: `DivergenceError` if that happens in the first epoch.
    """
    failure = ""
    start = time.perf_counter()
    try:
        run = network.fit(
            x,
            y,
            loss=loss,
            optimizer=AdamW(cosine(recipe.learning_rate), weight_decay=recipe.weight_decay),
            epochs=recipe.passes(len(x)),
            batch_size=recipe.batch(len(x)),
            validation=validation,
            early_stopping=None if validation is None else recipe.patience,
            seed=recipe.seed,
            verbose=verbose,
            **recipe.through_time,
        )
    except DivergenceError as error:
        failure = str(error).partition(". The network keeps")[0]
        if not isinstance(error.run, History) or not error.run.loss:
            raise DivergenceError(f"{failure}: nothing was learnt; take a smaller learning rate", error.run) from None
        run = error.run
    return run, failure, time.perf_counter() - start


def ending(run: History, failure: str) -> list[str]:
    """Notes on a training that ended before its time."""
    notes = []
    if run.interrupted:
        kept = f"the weights of epoch {run.best_epoch}" if run.best_epoch else "the weights of that moment"
        notes.append(f"interrupted in epoch {len(run.loss) + 1} of {run.planned_epochs}; {kept} are kept")
    return [*notes, failure] if failure else notes


def history_of(run: History) -> dict[str, list[float]]:
    """Without times: the history of a seed is the same bytes on every machine that computes the same bits."""
    return {name: values for name, values in run.table().items() if name not in ("epoch", "seconds")}


def predictions(
    network: nn.Sequential, preparation: Preparation, x: Values, origin: Values | None = None
) -> tuple[Values, Values | None]:
    """(answers (rows,): quantities or labels, probabilities (rows, classes) or None); x and origin as `Preparation.inputs` gives them."""
    code, window = preparation.target, preparation.window
    if code.task == "regression":
        outputs = np.asarray(network.predict(x))
        if window is not None and origin is not None:
            outputs = outputs.reshape(-1).astype(np.float64) * window.change + origin
        return code.decode(outputs), None
    chances = np.asarray(network.predict_proba(x), dtype=np.float64)
    return code.decode(chances), chances


def score(code: TargetCode, true: Values, answers: Values, chances: Values | None) -> Scores:
    """Regression: RMSE, MAE, R². Classes: accuracy, log loss, and for two classes the area under the ROC curve."""
    from sklearn import metrics

    if chances is None:
        t = numbers(true)[0]
        with np.errstate(over="ignore", invalid="ignore"):  # the squares of 1e200 are infinite, and so is their mean
            error = answers - t
            spread = float(np.mean((t - t.mean()) ** 2))
            r2 = 1 - float(np.mean(error**2)) / spread if spread else float("nan")
            return {"RMSE": float(np.sqrt(np.mean(error**2))), "MAE": float(np.mean(np.abs(error))), "R²": r2}
    codes = code.encode(true)
    out = {"accuracy": float(np.mean(chances.argmax(axis=1) == codes))}
    if code.task == "binary" and len(np.unique(codes)) == 2:
        out["AUC"] = float(metrics.roc_auc_score(codes, chances[:, 1]))
    likelihood = np.clip(chances[np.arange(len(codes)), codes], 1e-15, 1)
    return {**out, "log loss": float(-np.mean(np.log(likelihood)))}


def baselines(preparation: Preparation, learn: Table, judge: Table) -> dict[str, Scores]:
    """A linear model on standardised columns, and the mean or most frequent class; same training and held-out rows."""
    code = preparation.target
    y = learn.column(code.name)
    y = numbers(y)[0] if code.task == "regression" else code.encode(y)
    return simple_models(code, preparation.plain(learn), y, preparation.plain(judge), judge.column(code.name))


def simple_models(code: TargetCode, x: Values, y: Values, x_judge: Values, true: Values) -> dict[str, Scores]:
    """The scores of a linear model and of one that looks at nothing. x, x_judge: plain numbers; y: quantities, or classes as codes."""
    import warnings

    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = code.task == "regression"
    out = {}
    steps = min(300, max(50, int(2e10 / (x.size * max(len(code.classes), 1)))))  # some seconds on images
    for name, model in (
        ("linear model", Ridge(alpha=1.0) if regression else LogisticRegression(max_iter=steps)),
        ("always the mean" if regression else "always the most frequent", DummyRegressor() if regression else DummyClassifier()),
    ):
        if not regression and len(np.unique(y)) == 1:
            model = DummyClassifier()  # the other classes have held-out rows only
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a baseline that has not quite converged is still a baseline
            fit = make_pipeline(StandardScaler(), model).fit(x, y)
        if regression:
            out[name] = score(code, true, np.asarray(fit.predict(x_judge), dtype=np.float64), None)
        else:
            chances = np.zeros((len(x_judge), len(code.classes)))
            chances[:, fit.classes_] = fit.predict_proba(x_judge)  # a class without training rows keeps probability 0
            out[name] = score(code, true, code.decode(chances), chances)
    return out


def write(folder: Path, outcome: Outcome) -> None:
    """The run folder: network, preparation, settings, history, report."""
    facts, code, window = outcome.facts, outcome.preparation.target, outcome.preparation.window
    about = {
        "data": facts.source,
        "target": facts.target,
        "task": facts.task,
        "recipe": asdict(outcome.recipe),
        "batch_size": outcome.recipe.batch(outcome.rows[0]),
        "planned_epochs": outcome.recipe.passes(outcome.rows[0]),
        "rows" if window is None else "windows": {"training": outcome.rows[0], "held out": outcome.rows[1]},
        "left_out": [column.name for column in facts.columns if not column.used],
    }
    report = Report(
        title=f"{facts.target} from {facts.source}",
        facts=summary(outcome),
        scores=outcome.scores,
        history=outcome.history,
        best_epoch=outcome.best_epoch,
        notes=[*facts.notes, *outcome.notes],
        true=numbers(outcome.true)[0]
        if code.task == "regression"
        else code.decode(np.eye(len(code.classes))[code.encode(outcome.true)]),
        predicted=outcome.predicted,
        classes=code.classes,
        target=facts.target,
        judged=outcome.judged,
        first_row=0 if window is None else facts.rows - len(outcome.true) + 1,
        columns=[(c.name, c.kind, c.missing, c.distinct, c.remark) for c in facts.columns],
    )
    write_run(folder, outcome, outcome.preparation.to_json(), about, report)


def summary(outcome: Outcome) -> list[tuple[str, str]]:
    """(name, value) pairs on data, network and training."""
    facts, recipe = outcome.facts, outcome.recipe
    blocks = [column for column in facts.features if column.kind == "block"]
    kinds: dict[str, int] = {}
    for column in facts.features:
        kinds[column.kind] = kinds.get(column.kind, 0) + 1
    epochs = len(outcome.history["loss"])
    widths = " → ".join(map(str, [len(outcome.preparation.features), *recipe.hidden, outcome.preparation.target.outputs]))
    kept = f", the weights of epoch {outcome.best_epoch} kept" if outcome.best_epoch else ""
    stopped = f" ({outcome.stopped})" if outcome.stopped else ""
    return [
        ("data", f"{facts.source}: {facts.rows:,} rows, {_shares(outcome)}"),
        ("target", f"{facts.target}: {facts.task}, {facts.reason}"),
        ("columns", ", ".join(f"{count} {kind}" for kind, count in kinds.items()) + "".join(f", {c.remark}" for c in blocks)),
        ("network", f"{widths}, {recipe.units}, {outcome.preparation.target.loss}"),
        ("training", f"{counted(epochs, 'epoch')} in {duration(outcome.seconds)}{stopped}{kept}; seed {recipe.seed}"),
    ]


def _shares(outcome: Outcome) -> str:
    """How many rows or windows were for what."""
    window, (training, held) = outcome.preparation.window, outcome.rows
    if window is None:
        return f"{training:,} to learn from, {'scored on the same rows' if outcome.everything else f'{held:,} held out'}"
    stop = f", {outcome.validated:,} to decide when to stop" if outcome.validated else ""
    return (
        f"windows of {window.length:,} with the target {window.horizon:,} later, in the order of time: {training:,} to learn from{stop}, "
        f"{held:,} held out"
    )
