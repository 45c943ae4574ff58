"""Image classifiers: from pictures with classes to a trained network beside its baselines, and what it has learnt as pictures.

In: `Images`, an `ImageRecipe`. Out: `ImageOutcome`, a run folder with a report, `ImageRun`. Pictures stay bytes from the file to the
network. The held-out ones are touched once training is over: for the scores, and for what the report shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from . import nn
from .data.fields import fields_of, object_of
from .data.images import Images, Size, reduced
from .data.prepare import hold_out
from .data.table import Values
from .errors import DataError, FileFormatError
from .experiment import INTERRUPTED, Recipe, Scores, beside, ending, fitted, history_of
from .features import activations, saliency
from .folders import ReadRun, check_pair, formulas, write_run
from .pictures import SHOWN, Gallery, Picture, Pixels, centred, coloured, resized, signed, strip
from .report import Report, counted, short, write_page
from .train.fit import EVALUATION_ROWS
from .train.progress import duration

FORMAT = "chainrule images 1"
LOSS = "cross_entropy"
STEPS = 12_000  # twice those of a table: pictures that are changed at random are learnt by heart later
SMALL = 12  # a picture with a side shorter than this is convolved with its border
FEWEST = 5  # pictures that can be split
CLASSES, EACH = 20, 10  # so many classes are shown, and so many pictures of each
MISTAKES, FILTERS, UNITS, EXCITING, LOOKED_AT = 24, 32, 8, 10, 2_000
LOOK_BYTES = 64 << 20  # of what layers give, held at once to see what they respond to


@dataclass(frozen=True)
class ImageRecipe(Recipe):
    """How pictures are learnt. `Recipe` says what the other fields mean.

    Args:
        hidden: units of each hidden layer behind the convolutions.
        filters: of each convolution; each makes the picture smaller by half. None at all leaves the hidden layers alone.
        augment: shift, turn and scale each picture a little at random, anew in each step.
        flip: mirror half of them too, left for right: for things that look alike both ways, so not for letters.
    """

    UNUSED: ClassVar[frozenset[str]] = frozenset({"log_target"})
    SETTING: ClassVar[str] = "for images"
    hidden: tuple[int, ...] = (128,)
    activation: str = "relu"
    filters: tuple[int, ...] = (8, 16)
    augment: bool = True
    flip: bool = False

    def batch(self, rows: int) -> int:
        """Pictures a step: `batch_size`, or a power of two from 16 to 128.

        >>> ImageRecipe().batch(500), ImageRecipe().batch(5_000), ImageRecipe().batch(60_000)
        (16, 32, 128)
        """
        return self.batch_size or min(128, super().batch(rows))

    def passes(self, rows: int) -> int:
        """Epochs at most: `epochs`, or 20 to 100, as many as make about 12,000 steps.

        >>> ImageRecipe().passes(500), ImageRecipe().passes(5_000), ImageRecipe().passes(60_000)
        (100, 76, 25)
        """
        return self.epochs or min(100, max(20, STEPS // -(-rows // self.batch(rows))))


def network(recipe: ImageRecipe, pixels: Pixels, classes: int) -> nn.Sequential:
    """The network for such pictures, not yet built. pixels: those that are learnt from, for their mean and deviation.

    Source: LeCun et al., "Gradient-based learning applied to document recognition", Proceedings of the IEEE 86, 1998, section II.B: of
    pictures of 28 x 28, the convolutions and poolings are those of its LeNet-5.
    """
    mean, std = brightness(pixels)
    layers: list[Any] = [nn.Rescale()]  # 0 is black, which comes in where a picture is shifted
    if recipe.augment or recipe.flip:
        shift = max(1, round(min(pixels.shape[1:3]) / 14))
        layers.append(nn.Augment(shift, recipe.flip, rotate=10, scale=0.1) if recipe.augment else nn.Augment(flip=True))
    layers.append(nn.Rescale(1.0, mean, std))
    height, width = pixels.shape[1:3]
    if recipe.filters and pixels.ndim == 3:
        layers.append(nn.Reshape(height, width, 1))
    for filters in recipe.filters:
        made, (height, width) = _convolution(filters, (height, width), recipe.activation)
        layers += made
    layers.append(nn.Flatten())
    for units in recipe.hidden:
        layers += [nn.Dense(units, recipe.activation), *([nn.Dropout(recipe.dropout)] if recipe.dropout else [])]
    return nn.Sequential(*layers, nn.Dense(classes))


def _convolution(filters: int, size: Size, activation: str) -> tuple[list[nn.Module], Size]:
    """A convolution and a pooling that halves both sides, and the size that is left. What is small keeps its border, for there is little
    else, and a side of one pixel stays one."""
    if min(size) < SMALL:
        layers, left = [nn.Conv2D(filters, 3, padding="same", activation=activation)], size
    else:
        layers, left = [nn.Conv2D(filters, 5, activation=activation)], (size[0] - 4, size[1] - 4)
    window = (min(2, left[0]), min(2, left[1]))
    return [*layers, nn.MaxPool2D(window)], (left[0] // window[0], left[1] // window[1])


def brightness(pixels: Pixels) -> tuple[Any, Any]:
    """Mean and deviation of bytes on the scale 0 .. 1: a number each, or three for colours. They are counted, not copied as numbers.

    >>> brightness(np.array([[[0, 255]]], np.uint8))
    (0.5, 0.5)
    """
    levels = np.arange(256) / 255
    found = []
    for channel in [pixels] if pixels.ndim == 3 else [pixels[..., c] for c in range(pixels.shape[-1])]:
        share = sum(np.bincount(part.reshape(-1), minlength=256) for part in channel) / channel.size
        mean = float(share @ levels)
        found.append((mean, float(np.sqrt(share @ (levels - mean) ** 2)) or 1.0))
    means, deviations = zip(*found, strict=True)
    return (means[0], deviations[0]) if pixels.ndim == 3 else (means, deviations)


@dataclass(frozen=True)
class ImageOutcome:
    """What training gave. learn, held: the pictures that were learnt from and those that were not; chances (held, classes). The rest as
    in `experiment.Outcome`."""

    recipe: ImageRecipe
    network: nn.Sequential
    learn: Images
    held: Images
    chances: Values
    history: dict[str, list[float]]
    best_epoch: int | None
    scores: dict[str, Scores]
    seconds: float
    notes: list[str]
    interrupted: bool
    stopped: str
    failure: str

    @property
    def predicted(self) -> Values:
        """The code of the likeliest class of each held-out picture."""
        return np.asarray(self.chances.argmax(axis=1))

    @property
    def codes(self) -> Values:
        """What the held-out pictures show."""
        assert self.held.codes is not None
        return self.held.codes


def train_images(images: Images, recipe: ImageRecipe, test: Images | None = None, *, verbose: bool = True) -> ImageOutcome:
    """Holds pictures out, trains, scores beside a linear model and the most frequent class.

    Args: test: the pictures to hold out, as large and as coloured as the others; without them, the recipe's share of the others.
    Raises: `DataError` for pictures without classes, of one class or too few, and for those to test on that show something else;
    `DivergenceError` if that happens in the first epoch.
    """
    if images.codes is None:
        raise DataError(
            f"{images.source} says of no picture what it shows: put pictures into a folder for each class, or name the file of labels "
            "of IDX images with --labels"
        )
    if len(images.classes) < 2 or images.rows < FEWEST:
        found = f"{counted(images.rows, 'picture')} of {counted(len(images.classes), 'class', 'classes')}"
        raise DataError(f"{images.source} has {found}: two classes and {FEWEST} pictures are needed at least")
    if test is None:
        training, testing = hold_out(images.codes, images.classes, recipe.test, recipe.split_seed)
        learn, held = images.take(training), images.take(testing)
    else:
        learn, held = images, replace(test, codes=codes_of(test, images.classes), classes=images.classes)
    assert learn.codes is not None
    assert held.codes is not None
    net = network(recipe, learn.pixels, len(images.classes))
    run, failure, seconds = fitted(net, learn.pixels, learn.codes, recipe, LOSS, recipe.validation or None, verbose)
    chances = np.asarray(net.predict_proba(held.pixels), np.float64)
    notes = [
        *images.notes,
        *(f"{held.source}: {note}" for note in held.notes if test is not None),
        *_unjudged(held),
        *ending(run, failure),
    ]
    shares = np.bincount(learn.codes, minlength=len(images.classes)) / learn.rows
    scores = {"this network": score(chances, held.codes)}
    trouble = [INTERRUPTED]
    if not run.interrupted:
        simple, trouble = beside(lambda: _linear(learn, held, recipe))
        scores |= simple
    notes += trouble
    scores["always the most frequent"] = score(np.broadcast_to(shares, chances.shape), held.codes)
    return ImageOutcome(
        recipe, net, learn, held, chances, history_of(run), run.best_epoch, scores, seconds, notes,
        INTERRUPTED in trouble, run.stopped, failure,
    )  # fmt: skip


def _linear(learn: Images, held: Images, recipe: ImageRecipe) -> dict[str, Scores]:
    """A linear model of the pixels, trained as the network was. Raises: `KeyboardInterrupt` if it is not trained to its end."""
    assert learn.codes is not None
    assert held.codes is not None
    net = network(replace(recipe, filters=(), hidden=(), augment=False, flip=False), learn.pixels, len(learn.classes))
    run, _, _ = fitted(net, learn.pixels, learn.codes, recipe, LOSS, recipe.validation or None, False)
    if run.interrupted:
        raise KeyboardInterrupt
    return {"linear model": score(np.asarray(net.predict_proba(held.pixels), np.float64), held.codes)}


def _unjudged(held: Images) -> list[str]:
    """A remark on the classes of which no picture is held out."""
    assert held.codes is not None
    there = set(held.codes.tolist())
    names = [f'"{short(name, 20)}"' for code, name in enumerate(held.classes) if code not in there]
    if not names:
        return []
    if len(names) == 1:
        return [f"no picture of the class {names[0]} is held out: the scores say nothing about it"]
    more = ", ..." if len(names) > CLASSES else ""
    which = f"{len(names):,} classes {', '.join(names[:CLASSES])}{more}"
    return [f"no picture of the {which} is held out: the scores say nothing about them"]


def score(chances: Values, codes: Values) -> Scores:
    """Accuracy and log loss of probabilities (rows, classes).

    >>> score(np.array([[0.5, 0.5], [0.25, 0.75]]), np.array([1, 1]))["accuracy"]
    0.5
    """
    likelihood = np.clip(chances[np.arange(len(codes)), codes], 1e-15, 1)
    return {"accuracy": float(np.mean(chances.argmax(axis=1) == codes)), "log loss": float(-np.mean(np.log(likelihood)))}


def summary(outcome: ImageOutcome) -> list[tuple[str, str]]:
    """(name, value) pairs on pictures, network and training."""
    recipe, learn = outcome.recipe, outcome.learn
    epochs = len(outcome.history["loss"])
    kept = f", the weights of epoch {outcome.best_epoch} kept" if outcome.best_epoch else ""
    stopped = f" ({outcome.stopped})" if outcome.stopped else ""
    named = ", ".join(short(name, 20) for name in learn.classes[:CLASSES]) + (", ..." if len(learn.classes) > CLASSES else "")
    kinds = " → ".join(map(_kind, outcome.network))
    weights = sum(v.size for v in outcome.network.parameters.values())
    apart = "held out" if outcome.held.source == learn.source else f"of {outcome.held.source} to test on"
    pictures = counted(learn.rows + outcome.held.rows, "picture")
    what = f"{pictures} of {learn.size[0]} x {learn.size[1]} in {'colour' if learn.colour else 'grey'}"
    return [
        ("data", f"{learn.source}: {what}, {learn.rows:,} to learn from, {outcome.held.rows:,} {apart}"),
        ("classes", f"{len(learn.classes)}: {named}"),
        ("network", f"{kinds}; {weights:,} weights, {recipe.activation}, {LOSS}"),
        ("training", f"{counted(epochs, 'epoch')} in {duration(outcome.seconds)}{stopped}{kept}; seed {recipe.seed}"),
    ]


def _kind(layer: nn.Module) -> str:
    units = getattr(layer, "units", None) or getattr(layer, "filters", None)
    return type(layer).__name__ + (f" {units}" if units else "")


def write_image_run(folder: Path, outcome: ImageOutcome) -> None:
    """The run folder: network, what it sees, settings, history, report; the report's pictures once all else is safe.

    Raises: `DataError` where the memory is too small for those.
    """
    about = {
        "data": outcome.learn.source,
        "tested on": outcome.held.source,
        "task": "images",
        "recipe": asdict(outcome.recipe),
        "batch_size": outcome.recipe.batch(outcome.learn.rows),
        "planned_epochs": outcome.recipe.passes(outcome.learn.rows),
        "pictures": {"training": outcome.learn.rows, "held out": outcome.held.rows},
    }
    classes = np.array(outcome.learn.classes, dtype=object)
    report = Report(
        title=f"Pictures of {outcome.learn.source}",
        facts=summary(outcome),
        scores=outcome.scores,
        history=outcome.history,
        best_epoch=outcome.best_epoch,
        notes=outcome.notes,
        true=classes[outcome.codes],
        predicted=classes[outcome.predicted],
        classes=outcome.learn.classes,
        target="class",
        judged="held-out pictures",
    )
    write_run(folder, outcome, Seen.of(outcome.learn).to_json(), about, report)
    try:
        write_page(folder, replace(report, galleries=galleries(outcome)))
    except MemoryError:
        saved = f"{folder} holds the network, its scores and a report without pictures"
        raise DataError(f"{saved}: there is not enough memory for those. Take smaller ones, or fewer filters") from None


# ---- what the report shows ---------------------------------------------------------------------------------------------------


def galleries(outcome: ImageOutcome) -> list[Gallery]:
    """Samples, mistakes, saliency, filters, and what units respond to."""
    found = [_samples(outcome.learn), _mistakes(outcome), _salient(outcome), _filters(outcome), *_responses(outcome)]
    return [gallery for gallery in found if gallery is not None]


def _small(values: Values) -> Values:
    """A picture, or a number for each of its pixels, no larger than it is shown: the page holds some hundreds of them."""
    return resized(values, reduced(values.shape[:2], SHOWN))


def _height(size: Sequence[int]) -> int:
    """Of a picture of this size as it is shown."""
    return reduced((size[0], size[1]), SHOWN)[0]


def _samples(learn: Images) -> Gallery:
    rows = []
    for code, name in enumerate(learn.classes[:CLASSES]):
        own = np.flatnonzero(learn.codes == code)
        if len(own):
            rows.append(Picture(strip([_small(p) for p in learn.pixels[own[:EACH]]]), f"{short(name, 40)}: {len(own):,}"))
    more = f" The first {CLASSES} of {len(learn.classes):,} classes." if len(learn.classes) > CLASSES else ""
    return Gallery("Samples", f"Some pictures of each class, and how many there are.{more}", rows, _height(learn.size))


def _mistakes(outcome: ImageOutcome) -> Gallery:
    """Those of which the network was surest, in the wrong."""
    held, codes, predicted = outcome.held, outcome.codes, outcome.predicted
    wrong = np.flatnonzero(predicted != codes)
    worst = wrong[np.argsort(outcome.chances[wrong, codes[wrong]], kind="stable")][:MISTAKES]
    shown = [Picture(_small(held.pixels[i]), f"{_judged(outcome, i)}, {short(held.names[i], 40)}") for i in worst.tolist()]
    count = f"{len(wrong):,} of {counted(held.rows, 'held-out picture')} {'was' if len(wrong) == 1 else 'were'}"
    about = (
        f"{count} taken for another class; these with the least probability of what they are: true class → predicted one, the "
        "probability of each, and the picture's name."
    )
    return Gallery(
        "The worst mistakes", about if len(wrong) else "There are none among the held-out pictures.", shown, _height(held.size)
    )


def _judged(outcome: ImageOutcome, i: int) -> str:
    """True class → predicted class, each with its probability."""

    def named(code: int) -> str:
        return f"{short(outcome.held.classes[code], 20)} ({percent(outcome.chances[i, code])})"

    return f"{named(outcome.codes[i])} → {named(outcome.predicted[i])}"


def percent(share: float) -> str:
    """A probability; of a small one, its first digit.

    >>> percent(0.934), percent(0.02), percent(0.00034)
    ('93 %', '2 %', '0.03 %')
    """
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1g} %"


def _salient(outcome: ImageOutcome) -> Gallery:
    """Of each class the picture that was recognised best, then some mistakes, each beside what the predicted class hangs on."""
    held, codes, predicted = outcome.held, outcome.codes, outcome.predicted
    sure = outcome.chances[np.arange(held.rows), codes]
    best = [np.flatnonzero((codes == c) & (predicted == c)) for c in range(min(len(held.classes), CLASSES))]
    chosen = [int(own[sure[own].argmax()]) for own in best if len(own)]
    wrong = np.flatnonzero(predicted != codes)
    chosen += wrong[np.argsort(sure[wrong], kind="stable")][:EACH].tolist()
    shown = []
    for rows in _blocks(outcome.network, held.pixels, chosen):
        maps = saliency(outcome.network, held.pixels[rows], predicted[rows])
        for i, m in zip(rows, maps if maps.ndim == 3 else maps.sum(axis=3), strict=True):
            shown.append(Picture(strip([coloured(_small(held.pixels[i])), signed(_small(m))]), _judged(outcome, i)))
    about = (
        "The picture of each class that was recognised best, then some mistakes. Beside each: the gradient of the predicted class's "
        "score by the pixels. Blue pixels raise the score when they get brighter, orange ones lower it."
    )
    return Gallery("What the score hangs on", about, shown, _height(held.size))


def _filters(outcome: ImageOutcome) -> Gallery | None:
    """The first layer's weights as pictures: as large as the images for a dense layer, as the kernel for a convolution; the largest."""
    weights = next((w for n, w in outcome.network.parameters.items() if n.endswith("weight")), None)
    shape = outcome.learn.pixels.shape[1:]
    if weights is not None and weights.ndim == 2 and weights.shape[0] == math.prod(shape):
        each = weights.T.reshape(-1, *shape)
    elif weights is not None and weights.ndim == 4:  # (height, width, channels, filters)
        each = np.moveaxis(weights, 3, 0)
    else:
        return None
    if each.ndim == 4 and each.shape[3] != 3:
        each = each[..., 0]  # of other numbers of channels, the first
    order = np.argsort(-np.abs(each).reshape(len(each), -1).max(axis=1), kind="stable")[:FILTERS]
    shown = [Picture((signed if each.ndim == 3 else centred)(_small(each[i])), f"unit {i}") for i in order.tolist()]
    about = "The weights by which each unit sums up the pixels"
    rule = "blue above 0, orange below" if each.ndim == 3 else "a colour above grey adds, one below takes away"
    return Gallery(
        "The first layer's filters",
        f"{about}: {rule}. The {counted(len(shown), 'unit')} with the largest weights.",
        shown,
        _height(each.shape[1:3]),
    )


def _responses(outcome: ImageOutcome) -> list[Gallery]:
    """For each layer with weights, the pictures that excite its units most."""
    network, held = outcome.network, outcome.held
    kept = _excitements(network, held.pixels)
    most: dict[str, dict[int, Values]] = {}
    for name, excited in kept.items():
        order = np.argsort(-excited.std(axis=0), kind="stable")[:UNITS]
        classes = range(min(excited.shape[1], CLASSES))
        units = classes if name == list(kept)[-1] else [int(u) for u in order if np.ptp(excited[:, u]) > 0]
        most[name] = {u: np.argsort(-excited[:, u], kind="stable")[:EXCITING] for u in units}
    maps = _maps(network, held.pixels, most)
    made = []
    for name, excited in kept.items():
        last, shown = name == list(kept)[-1], []
        for u, rows in most[name].items():
            below = [maps[name, u, row] for row in rows.tolist() if (name, u, row) in maps]
            caption = f"class {short(held.classes[u], 40)}" if last else f"unit {u}: up to {excited[:, u].max():.3g}"
            shown.append(Picture(_exciting([_small(held.pixels[row]) for row in rows], below), caption))
        dead = int(np.sum(np.ptp(excited, axis=0) == 0))
        give = "gives" if dead == 1 else "give"
        silent = f" {dead} of {excited.shape[1]} units {give} the same for all pictures." if dead else ""
        where = "; below each, where in it the unit is excited" if any(layer == name for layer, _, _ in maps) else ""
        which = "" if last else " The units are those that differ most from picture to picture."
        what = "class" if last else "unit"
        about = f"The held-out pictures that excite each {what} most, the strongest first{where}.{which}{silent}"
        kind = _kind(network._layers()[name])
        made.append(Gallery(f"What layer {name}, {kind}, responds to", about, shown, _height(held.size)))
    return made


def _blocks(network: nn.Sequential, pixels: Pixels, rows: Sequence[int]) -> Iterator[Sequence[int]]:
    """These rows, as many at a time as `LOOK_BYTES` hold what all layers give."""
    each = sum(y.nbytes for y in activations(network, pixels[:1]).values())
    block = max(1, min(EVALUATION_ROWS, LOOK_BYTES // max(1, each)))
    return (rows[start : start + block] for start in range(0, len(rows), block))


def _looks(network: nn.Sequential, pixels: Pixels, rows: Sequence[int]) -> Iterator[tuple[Sequence[int], dict[str, Values]]]:
    """(rows, layer -> what it gives for them) for block after block of these rows, of layers with weights."""
    for some in _blocks(network, pixels, rows):
        found = activations(network, pixels[some])
        yield some, {n: y for n, y in found.items() if f"{n}.weight" in network.parameters and y.ndim in (2, 4)}


def _excitements(network: nn.Sequential, pixels: Pixels) -> dict[str, Values]:
    """Layer -> (rows, units), how much each picture excites each unit; a filter is as excited as it is anywhere in the picture."""
    blocks: dict[str, list[Values]] = {}
    for _, found in _looks(network, pixels, range(min(len(pixels), LOOKED_AT))):
        for name, y in found.items():
            blocks.setdefault(name, []).append(y if y.ndim == 2 else y.max(axis=(1, 2)))
    return {name: np.concatenate(parts) for name, parts in blocks.items()}


def _maps(network: nn.Sequential, pixels: Pixels, most: Mapping[str, Mapping[int, Values]]) -> dict[tuple[str, int, int], Pixels]:
    """(layer, unit, row) -> what a filter gives at each place, as large as the picture is shown. most: the rows wanted of each unit.

    These few are looked at again: maps of all units, kept until it is known which are shown, would fill the memory."""
    maps, size = {}, reduced((pixels.shape[1], pixels.shape[2]), SHOWN)
    wanted = sorted({int(row) for units in most.values() for rows in units.values() for row in rows})
    for rows, found in _looks(network, pixels, wanted):
        for name, y in found.items():
            if y.ndim == 4:
                for unit, own in most[name].items():
                    for row in set(rows).intersection(own.tolist()):
                        maps[name, unit, row] = signed(resized(y[rows.index(row), :, :, unit], size))
    return maps


def _exciting(pictures: list[Pixels], maps: list[Pixels]) -> Pixels:
    """Pictures beside each other, and their maps, if there are any, below."""
    return np.concatenate([coloured(strip(pictures)), strip(maps)], axis=0) if maps else strip(pictures)


# ---- a run, read again -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a network sees and says: the size of its pictures, whether they are in colour, and its classes.

    >>> seen = Seen((28, 28), False, ("cat", "dog"))
    >>> Seen.from_json(seen.to_json()) == seen
    True
    """

    size: Size
    colour: bool
    classes: tuple[str | int, ...]

    @classmethod
    def of(cls, images: Images) -> Seen:
        return cls(images.size, images.colour, images.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture."""
        return (*self.size, 3) if self.colour else self.size

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)

    @classmethod
    def from_json(cls, content: str) -> Seen:
        """What `to_json` wrote. Raises: `FileFormatError` for anything else."""
        wanted = {"format": str, "size": list, "colour": bool, "classes": list}
        parts = fields_of(object_of(content, "the preparation", FORMAT), wanted, "the preparation")
        size, classes = tuple(parts["size"]), tuple(parts["classes"])
        whole = all(type(side) is int and 0 < side <= 1 << 14 for side in size)
        named = all(type(name) in (str, int) for name in classes) and len(set(classes)) == len(classes) > 1
        if len(size) != 2 or not whole or not named:
            raise FileFormatError(f"this describes no pictures with classes: {content[:100]!r}")
        return cls((size[0], size[1]), parts["colour"], classes)


@dataclass(frozen=True)
class ImageRun(ReadRun):
    """The run folder of an image classifier, read."""

    seen: Seen

    @property
    def loss(self) -> str:
        return LOSS

    @classmethod
    def of(cls, folder: Path, network: Any, settings: Mapping[str, Any], seen: Seen) -> ImageRun:
        """Raises: `FileFormatError` unless the network takes such pictures and gives a score for each class."""
        check_pair(folder, network, np.zeros((1, *seen.shape), np.uint8), (1, len(seen.classes)))
        return cls(folder, network, settings, seen)

    def sample(self, rows: int, images: Images | None) -> tuple[Values, Values]:
        """(x, y) of the first pictures; random ones without any. Raises: `DataError` for pictures without classes."""
        if images is not None:
            images = images.take(np.arange(min(rows, images.rows)))
            return images.pixels, codes_of(images, self.seen.classes)
        draw = np.random.default_rng(0)
        return draw.integers(0, 256, (rows, *self.seen.shape), dtype=np.uint8), draw.integers(0, len(self.seen.classes), rows)


def codes_of(images: Images, classes: Sequence[str | int]) -> Values:
    """What pictures show, as a network for these classes numbers them. Raises: `DataError` for a class that is not among them, or none."""
    if images.codes is None:
        raise DataError(f"{images.source} says of no picture what it shows")
    places = {name: code for code, name in enumerate(classes)}
    if unknown := [name for name in images.classes if name not in places]:
        known = ", ".join(short(name, 20) for name in classes[:CLASSES])
        raise DataError(f'{images.source} has the class "{short(unknown[0])}", which training did not have: {known}')
    return np.array([places[name] for name in images.classes], np.int64)[images.codes]


def predict_images(run: ImageRun, images: Images) -> tuple[dict[str, Values], list[str], Scores | None]:
    """(columns: the prediction and a probability for each class; remarks; scores if the pictures come with known classes)."""
    chances = np.asarray(run.network.predict_proba(images.pixels), np.float64)
    classes = run.seen.classes
    columns: dict[str, Values] = {"prediction": np.array(classes, dtype=object)[chances.argmax(axis=1)]}
    columns |= {f"probability {name}": chances[:, i] for i, name in enumerate(classes)}
    remarks = [*images.notes, *formulas("class", classes), *formulas("picture", images.names)]
    if images.codes is None:
        return columns, remarks, None
    try:
        return columns, remarks, score(chances, codes_of(images, classes))
    except DataError as error:
        return columns, [*remarks, f"no scores: {error}"], None
