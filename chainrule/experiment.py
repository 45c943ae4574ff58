"""From a table to a trained network with held-out scores beside its baselines, into a run folder, and back for predicting.

In: a `Table`, its `Understanding`, a `Recipe`. Out: `Outcome`. Preparation, network and baselines see the training rows only; the
held-out rows are touched once, for the scores. A run that was interrupted or diverged is an outcome too, with what it had learnt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from . import nn
from .data.prepare import Preparation, hold_out
from .data.table import Table, Values, numbers
from .data.target import TargetCode
from .data.understand import Understanding
from .errors import DataError, DivergenceError, FileFormatError, NotBuiltError, ShapeError, UsageError
from .nn.saving import load
from .optim import AdamW, Optimizer
from .report import Report, write_report, write_text
from .schedules import cosine
from .train.history import Run as History
from .train.progress import duration

Scores = dict[str, float]
STEPS = 6_000  # what a table of some thousand rows takes to be learnt well; larger tables get 20 epochs, whatever it takes
MAX_WIDTH = 1 << 24  # inputs of a network; a forged preparation may claim any number
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of one


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
    the history so far and the last good weights are kept then. `everything`: the scores are on the rows that were learnt from.
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
    code = preparation.target
    network = recipe.network(code.outputs)
    stops = not everything and recipe.validation > 0
    epochs = recipe.passes(len(x))
    failure = ""
    start = time.perf_counter()
    try:
        run = network.fit(
            x,
            code.encode(learn.column(facts.target)),
            loss=code.loss,
            optimizer=AdamW(cosine(recipe.learning_rate), weight_decay=recipe.weight_decay),
            epochs=epochs,
            batch_size=recipe.batch(len(x)),
            validation=recipe.validation if stops else None,
            early_stopping=recipe.patience if stops else None,
            seed=recipe.seed,
            verbose=verbose,
        )
    except DivergenceError as error:
        failure = str(error).partition(". The network keeps")[0]
        if not isinstance(error.run, History) or not error.run.loss:
            raise DivergenceError(f"{failure}: nothing was learnt; take a smaller learning rate", error.run) from None
        run = error.run
    seconds = time.perf_counter() - start
    answers, chances = predictions(network, code, x_judge)
    true = judge.column(facts.target)
    scores = {"this network": score(code, true, answers, chances)}
    interrupted = run.interrupted
    # without times: the history of a seed is the same bytes on every machine that computes the same bits
    history = {name: values for name, values in run.table().items() if name not in ("epoch", "seconds")}
    notes = [f"training rows: {line}" for line in filled.lines()] + [f"held-out rows: {line}" for line in met.lines()]
    if run.interrupted:
        kept = f"the weights of epoch {run.best_epoch}" if run.best_epoch else "the weights of that moment"
        notes.append(f"interrupted in epoch {len(run.loss) + 1} of {epochs}; {kept} are kept")
    if failure:
        notes.append(failure)
    try:
        scores |= baselines(preparation, learn, judge)
    except KeyboardInterrupt:
        interrupted = True
        notes.append("interrupted before the baselines were fitted")
    rows = (len(training), len(testing))
    return Outcome(
        facts, recipe, preparation, network, history, run.best_epoch, scores, true, answers, rows, seconds, notes, interrupted, run.stopped,
        failure, everything,
    )  # fmt: skip


def predictions(network: nn.Sequential, code: TargetCode, x: Values) -> tuple[Values, Values | None]:
    """(answers (rows,): quantities or labels, probabilities (rows, classes) or None)."""
    if code.task == "regression":
        return code.decode(np.asarray(network.predict(x))), None
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
    import warnings

    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    code = replace(preparation.target, log=False, mean=0.0, scale=1.0)
    regression = code.task == "regression"
    target, true = learn.column(code.name), judge.column(code.name)
    x, x_judge = preparation.plain(learn), preparation.plain(judge)
    y = numbers(target)[0] if regression else code.encode(target)
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
            fitted = make_pipeline(StandardScaler(), model).fit(x, y)
        if regression:
            out[name] = score(code, true, np.asarray(fitted.predict(x_judge), dtype=np.float64), None)
        else:
            chances = np.zeros((len(x_judge), len(code.classes)))
            chances[:, fitted.classes_] = fitted.predict_proba(x_judge)  # a class without training rows keeps probability 0
            out[name] = score(code, true, code.decode(chances), chances)
    return out


def write(folder: Path, outcome: Outcome) -> None:
    """The run folder: network, preparation, settings, history, report."""
    facts, code = outcome.facts, outcome.preparation.target
    outcome.network.save(folder / "network.safetensors")
    write_text(folder / "preparation.json", outcome.preparation.to_json() + "\n")
    settings = {
        "data": facts.source,
        "target": facts.target,
        "task": facts.task,
        "recipe": asdict(outcome.recipe),
        "batch_size": outcome.recipe.batch(outcome.rows[0]),
        "planned_epochs": outcome.recipe.passes(outcome.rows[0]),
        "rows": {"training": outcome.rows[0], "held out": outcome.rows[1]},
        "left_out": [column.name for column in facts.columns if not column.used],
        "epochs": len(outcome.history["loss"]),
        "best_epoch": outcome.best_epoch,
        "interrupted": outcome.interrupted,
        "failure": outcome.failure,
        "seconds": round(outcome.seconds, 3),
        "scores": outcome.scores,
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
        judged="the rows that were learnt from" if outcome.everything else "held-out rows",
        columns=[(c.name, c.kind, c.missing, c.distinct, c.remark) for c in facts.columns],
    )
    write_report(folder, settings, report)


def summary(outcome: Outcome) -> list[tuple[str, str]]:
    """(name, value) pairs on data, network and training."""
    facts, recipe = outcome.facts, outcome.recipe
    blocks = [column for column in facts.features if column.kind == "block"]
    kinds: dict[str, int] = {}
    for column in facts.features:
        kinds[column.kind] = kinds.get(column.kind, 0) + 1
    epochs = len(outcome.history["loss"])
    widths = [len(outcome.preparation.features), *recipe.hidden, outcome.preparation.target.outputs]
    kept = f", the weights of epoch {outcome.best_epoch} kept" if outcome.best_epoch else ""
    stopped = f" ({outcome.stopped})" if outcome.stopped else ""
    judged = "scored on the same rows" if outcome.everything else f"{outcome.rows[1]:,} held out"
    return [
        ("data", f"{facts.source}: {facts.rows:,} rows, {outcome.rows[0]:,} to learn from, {judged}"),
        ("target", f"{facts.target}: {facts.task}, {facts.reason}"),
        ("columns", ", ".join(f"{count} {kind}" for kind, count in kinds.items()) + "".join(f", {c.remark}" for c in blocks)),
        ("network", f"{' → '.join(map(str, widths))}, {recipe.activation}, {outcome.preparation.target.loss}"),
        ("training", f"{epochs} epochs in {duration(outcome.seconds)}{stopped}{kept}; seed {recipe.seed}"),
    ]


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    folder: Path
    network: nn.Sequential
    preparation: Preparation
    settings: Mapping[str, Any]

    @property
    def optimizer(self) -> Optimizer | None:
        """What the network was trained with."""
        return self.network._optimizer


def read_run(folder: str | Path) -> Run:
    """The network, preparation and settings of a run.

    Raises: `DataError` for a folder that is no run, `FileFormatError` for damaged files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f'there is no run folder "{folder}": chainrule train makes one and says where')
    texts = {}
    for name in ("preparation.json", "settings.json"):
        try:
            texts[name] = (folder / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            raise DataError(f"{folder} is no whole run: {name} cannot be read") from None
    if not (folder / "network.safetensors").is_file():
        raise DataError(f"{folder} is no whole run: network.safetensors is not there")
    try:
        settings = json.loads(texts["settings.json"])
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{folder / 'settings.json'} is no JSON, it may be cut off ({error})") from None
    if not isinstance(settings, dict):
        raise FileFormatError(f"{folder / 'settings.json'} holds no settings of a run")
    preparation = Preparation.from_json(texts["preparation.json"])
    network = load(folder / "network.safetensors")
    _check_pair(folder, network, preparation)
    return Run(folder, network, preparation, settings)


def _check_pair(folder: Path, network: Any, preparation: Preparation) -> None:
    """Raises: `FileFormatError` unless the network takes what the preparation gives, and gives what the target needs."""
    code, width = preparation.target, preparation.width
    try:
        if not isinstance(network, nn.Sequential) or width > MAX_WIDTH:
            raise ShapeError(f"a {type(network).__name__} is to take {width:,} inputs")
        given = predictions(network, code, np.zeros((1, width), dtype=np.float32))[1]
        shape = network.predict(np.zeros((1, width), dtype=np.float32)).shape if given is None else given.shape
        wanted = (1, len(code.classes) if code.classes else 1)
        if shape != wanted:
            raise ShapeError(f"it gives {shape}, not {wanted}")
    except (ShapeError, UsageError, NotBuiltError, IndexError) as error:
        raise FileFormatError(f"{folder}: network.safetensors and preparation.json are not of one run ({error})") from None


def predict(run: Run, table: Table) -> tuple[dict[str, Values], list[str], Scores | None]:
    """(new columns: the prediction and, for classes, a probability each; remarks; scores if the target is there)."""
    x, remarks = run.preparation.apply(table)
    lines = remarks.lines()
    code = run.preparation.target
    answers, chances = predictions(run.network, code, x)
    columns = {"prediction": answers}
    if chances is not None:
        columns |= {f"probability {label}": chances[:, i] for i, label in enumerate(code.classes)}
    formulas = [label for label in code.classes if isinstance(label, str) and label.startswith(FORMULA)]
    if formulas:
        lines.append(f'the class "{formulas[0]}" begins like a formula: a spreadsheet may compute it instead of showing it')
    scores = None
    if code.name in table.columns:
        try:
            scores = score(code, table.column(code.name), answers, chances)
        except DataError as error:  # a target that is empty or holds new classes: predicting does not need it
            lines.append(f"no scores: {error}")
    return columns, lines, scores
