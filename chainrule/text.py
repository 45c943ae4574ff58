"""Character models: a recurrent network that learns to predict the next character of a text, and writes on by itself.

In: a text, a `TextRecipe`. Out: `TextOutcome`, a run folder, `TextRun`, samples. The last part of the text decides when to stop, and
the bits per character are those on it: nothing of it is learnt from, the alphabet included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from . import nn
from .data.characters import Alphabet, counted_bits
from .data.table import Values
from .errors import DataError, UsageError
from .experiment import Recipe, Scores, ending, fitted, history_of
from .folders import ReadRun, check_pair, write_run
from .report import Report, counted
from .series import CELLS
from .train.progress import duration

EFFORT = 10_000_000  # characters that are read, epochs together: about a minute on two cores
LOSS = "cross_entropy"
BITS = "bits per character"


@dataclass(frozen=True)
class TextRecipe(Recipe):
    """How a text is learnt. `Recipe` says what the other fields mean; validation is the last part of the text.

    Args:
        sequence: characters of a window; the network knows nothing of those before.
        cell: the recurrent layers, one for each of `hidden`: "gru", "lstm" or "rnn".
        embedding: numbers that stand for a character.
        sample: characters of each sample that the report shows.
        temperature: one sample is written with each.
        truncate: (k1, k2): along a window an update every k1 characters, whose gradient goes back k2; None: one from all of it.
        memory: bytes that are kept at most between forward and backward pass (see `fit`).
    """

    UNUSED: ClassVar[frozenset[str]] = frozenset({"activation", "test", "split_seed", "log_target"})
    SETTING: ClassVar[str] = "with --characters"
    hidden: tuple[int, ...] = (128,)
    dropout: float = 0.0
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    patience: int = 5
    sequence: int = 64
    cell: str = "gru"
    embedding: int = 32
    sample: int = 300
    temperature: tuple[float, ...] = (0.5, 1.0)
    truncate: tuple[int, int] | None = None
    memory: int | None = None

    @property
    def through_time(self) -> dict[str, Any]:
        return {"truncate": self.truncate, "memory": self.memory}

    def batch(self, rows: int) -> int:
        """Windows a step: `batch_size`, or a power of two from 8 to 32.

        >>> TextRecipe().batch(100), TextRecipe().batch(20_000)
        (8, 32)
        """
        return self.batch_size or min(32, max(8, 2 ** int(np.log2(max(rows, 50) / 50))))

    def passes(self, rows: int) -> int:
        """Epochs at most: `epochs`, or 2 to 60, as many as read ten million characters.

        >>> TextRecipe().passes(100), TextRecipe().passes(20_000), TextRecipe().passes(1_000_000)
        (60, 7, 2)
        """
        return self.epochs or min(60, max(2, EFFORT // (rows * self.sequence)))

    def network(self, outputs: int) -> nn.Sequential:
        """The network that the recipe describes, not yet built."""
        layers: list[Any] = [nn.Embedding(outputs, self.embedding)]
        for units in self.hidden:
            layers += [CELLS[self.cell](units, return_sequences=True), *([nn.Dropout(self.dropout)] if self.dropout else [])]
        return nn.Sequential(*layers, nn.Dense(outputs))


@dataclass(frozen=True)
class TextOutcome:
    """What training gave. `characters`: how many were learnt from and how many were held out. The rest as in `Outcome`."""

    source: str
    recipe: TextRecipe
    alphabet: Alphabet
    network: nn.Sequential
    history: dict[str, list[float]]
    best_epoch: int | None
    scores: dict[str, Scores]
    characters: tuple[int, int]
    seconds: float
    notes: list[str]
    interrupted: bool
    stopped: str
    failure: str
    samples: tuple[tuple[str, str], ...] = ()


def train_text(source: str, text: str, recipe: TextRecipe, *, notes: list[str], verbose: bool = True) -> TextOutcome:
    """Splits, encodes, trains, scores.

    Raises: `DataError` for a text that is too short or has one character only; `DivergenceError` if that happens in the first epoch.
    """
    if not recipe.hidden or not 0 < recipe.validation < 1:
        raise UsageError("a character model needs hidden units, and a part of the text between 0 and 1 for --validation")
    held = max(round(recipe.validation * len(text)), recipe.sequence + 1)
    learn, judge = text[: max(len(text) - held, 0)], text[-held:]
    if len(learn) < 2 * recipe.sequence + 1:
        raise DataError(
            f"{source} has {len(text):,} characters: with windows of {recipe.sequence} at least {3 * recipe.sequence + 2:,} are needed, "
            "two windows to learn from and one to stop by. Take a longer text or a smaller --sequence"
        )
    alphabet = Alphabet.of(learn, recipe.sequence)
    if len(alphabet.characters) == 1:
        raise DataError(f"{source} repeats one character, {alphabet.characters!r}: there is nothing to learn")
    codes, unseen = alphabet.encode(learn), alphabet.encode(judge)
    (x, y), (x_judge, y_judge) = alphabet.windows(codes), alphabet.windows(unseen)
    network = recipe.network(alphabet.size)
    run, failure, seconds = fitted(network, x, y, recipe, LOSS, (x_judge, y_judge), verbose)
    bits = network.evaluate(x_judge, y_judge)["loss"] / math.log(2)
    counted = counted_bits(codes, alphabet.size, x_judge, y_judge)
    scores = {name: {BITS: value} for name, value in {"this network": bits, **dict(reversed(counted.items()))}.items()}
    for name, part in (("training", codes), ("held-out", unseen)):
        if rare := int(np.sum(part == len(alphabet.characters))):
            notes = [
                *notes,
                f"{rare:,} {name} characters are none of the {len(alphabet.characters):,} that have a code: counted as one",
            ]
    return TextOutcome(
        source, recipe, alphabet, network, history_of(run), run.best_epoch, scores, (x.size, x_judge.size), seconds,
        [*notes, *ending(run, failure)], run.interrupted, run.stopped, failure,
    )  # fmt: skip


def sampled(outcome: TextOutcome) -> TextOutcome:
    """With the samples that its recipe asks for, (what it is, text) each."""
    recipe = outcome.recipe
    if not recipe.sample:
        return outcome
    samples = tuple(
        (
            f"Sample at temperature {t:g}",
            sample(outcome.network, outcome.alphabet, "", recipe.sample, t, recipe.seed).lstrip("\n"),
        )
        for t in recipe.temperature
    )
    return replace(outcome, samples=samples)


def sample(network: nn.Sequential, alphabet: Alphabet, prompt: str, count: int, temperature: float, seed: int) -> str:
    """`count` characters that follow `prompt`, each drawn from softmax(scores / temperature); temperature 0 takes the likeliest.

    Without a prompt the network begins as after the end of a line, or after the most frequent character of a text without lines. It
    reads the last `alphabet.length` characters each time, as in training. The same seed gives the same text.
    """
    start = prompt or ("\n" if "\n" in alphabet.characters else alphabet.characters[0])
    codes = alphabet.encode(start).tolist()
    draw = np.random.default_rng(seed)
    x = np.zeros((1, alphabet.length), dtype=np.int32)
    for _ in range(count):
        seen = min(len(codes), alphabet.length)
        x[0, :seen] = codes[-seen:]
        scores = network.predict(x, lengths=[seen])[0, seen - 1, :-1].astype(np.float64)  # the last is that of no character
        codes.append(_drawn(scores, temperature, float(draw.random())))
    return alphabet.decode(codes[len(start) :])


def _drawn(scores: Values, temperature: float, chance: float) -> int:
    """The code where the cumulated probabilities pass `chance`."""
    if temperature == 0:
        return int(scores.argmax())
    with np.errstate(over="ignore"):  # at a tiny temperature all but the likeliest get probability 0
        rising = np.cumsum(np.exp((scores - scores.max()) / temperature))
    return int(np.searchsorted(rising, chance * rising[-1], side="right"))


def summary(outcome: TextOutcome) -> list[tuple[str, str]]:
    """(name, value) pairs on text, network and training."""
    recipe, alphabet = outcome.recipe, outcome.alphabet
    epochs = len(outcome.history["loss"])
    kept = f", the weights of epoch {outcome.best_epoch} kept" if outcome.best_epoch else ""
    stopped = f" ({outcome.stopped})" if outcome.stopped else ""
    widths = " → ".join(map(str, [alphabet.size, recipe.embedding, *recipe.hidden, alphabet.size]))
    learnt, held = outcome.characters
    return [
        ("data", f"{outcome.source}: {learnt:,} characters to learn from, the last {held:,} to decide when to stop and to score"),
        ("alphabet", f"{len(alphabet.characters):,} characters and one for all others"),
        ("network", f"{widths}, {recipe.cell}, windows of {recipe.sequence} characters"),
        ("training", f"{counted(epochs, 'epoch')} in {duration(outcome.seconds)}{stopped}{kept}; seed {recipe.seed}"),
    ]


def write_text_run(folder: Path, outcome: TextOutcome) -> None:
    """The run folder: network, alphabet, settings, history, report."""
    about = {
        "data": outcome.source,
        "task": "characters",
        "recipe": asdict(outcome.recipe),
        "characters": {"training": outcome.characters[0], "held out": outcome.characters[1]},
    }
    report = Report(
        title=f"Characters of {outcome.source}",
        facts=summary(outcome),
        scores=outcome.scores,
        history=outcome.history,
        best_epoch=outcome.best_epoch,
        notes=outcome.notes,
        judged="the last part of the text",
        samples=outcome.samples,
    )
    write_run(folder, outcome, outcome.alphabet.to_json(), about, report)


@dataclass(frozen=True)
class TextRun(ReadRun):
    """The run folder of a character model, read."""

    alphabet: Alphabet

    @property
    def loss(self) -> str:
        return LOSS

    @classmethod
    def of(cls, folder: Path, network: Any, settings: Mapping[str, Any], alphabet: Alphabet) -> TextRun:
        """Raises: `FileFormatError` unless the network takes the codes of this alphabet and gives a score for each."""
        x = np.full((1, alphabet.length), alphabet.size - 1, dtype=np.int32)
        check_pair(folder, network, x, (1, alphabet.length, alphabet.size))
        return cls(folder, network, settings, alphabet)

    def sample(self, rows: int, table: object = None) -> tuple[Values, Values]:
        """(x, y) of random characters. Raises: `UsageError` for a table."""
        if table is not None:
            raise UsageError(f"{self.folder} is a character model: it is shown on characters of its own, without --data")
        draw = np.random.default_rng(0)
        x, y = draw.integers(0, self.alphabet.size, (2, rows, self.alphabet.length)).astype(np.int32)
        return x, y
