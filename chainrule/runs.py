"""Run folders, read again: for predicting, explaining, checking.

In: a folder. Out: `Run`, `TextRun` for a character model or `ImageRun` for an image classifier; columns of predictions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import images, nn
from .data import characters
from .data.characters import Alphabet
from .data.fields import object_of
from .data.order import order_of
from .data.prepare import Preparation
from .data.table import Table, Values
from .errors import DataError, FileFormatError, NotBuiltError, ShapeError, UsageError
from .experiment import Scores, predictions, score
from .folders import ReadRun, formulas
from .images import ImageRun, Seen
from .nn.saving import load
from .text import TextRun

MAX_WIDTH = 1 << 24  # inputs of a network; a forged preparation may claim any number


@dataclass(frozen=True)
class Run(ReadRun):
    """The run folder of a network for a table, read."""

    preparation: Preparation

    @property
    def loss(self) -> str:
        return self.preparation.target.loss

    def sample(self, rows: int, table: Table | None) -> tuple[Values, Values]:
        """(x, y) of the first `rows` rows or windows of a table; random ones without a table."""
        code, window = self.preparation.target, self.preparation.window
        if table is not None:
            if window is None:
                table = table.take(np.arange(min(rows, table.rows)))
                return self.preparation.apply(table)[0], code.encode(table.column(code.name))
            table = table.take(np.arange(min(rows + window.length + window.horizon - 1, table.rows)))
            ends = window.ends(table.rows - window.horizon)
            if not len(ends):
                raise DataError(f"{table.source} has {table.rows:,} rows: too few for a window and its target")
            encoded = code.encode(table.column(code.name))
            return window.cut(self.preparation.apply(table)[0], ends), window.targets(encoded, ends)
        draw = np.random.default_rng(0)
        shape = (rows,) if window is None else (rows, window.length)
        x = draw.normal(size=(*shape, self.preparation.width)).astype(np.float32)
        y = draw.normal(size=rows).astype(np.float32) if code.task == "regression" else draw.integers(0, len(code.classes), rows)
        return x, y


def read_run(folder: str | Path) -> Run | TextRun | ImageRun:
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
    settings = object_of(texts["settings.json"], str(folder / "settings.json"))
    network = load(folder / "network.safetensors")
    if characters.FORMAT in texts["preparation.json"][:100]:
        return TextRun.of(folder, network, settings, Alphabet.from_json(texts["preparation.json"]))
    if images.FORMAT in texts["preparation.json"][:100]:
        return ImageRun.of(folder, network, settings, Seen.from_json(texts["preparation.json"]))
    preparation = Preparation.from_json(texts["preparation.json"])
    _check_pair(folder, network, preparation)
    return Run(folder, network, settings, preparation)


def _check_pair(folder: Path, network: Any, preparation: Preparation) -> None:
    """Raises: `FileFormatError` unless the network takes what the preparation gives, and gives what the target needs."""
    code, window, width = preparation.target, preparation.window, preparation.width
    width *= 1 if window is None else window.length
    try:
        if not isinstance(network, nn.Sequential) or width > MAX_WIDTH:
            raise ShapeError(f"a {type(network).__name__} is to take {width:,} inputs")
        x = np.zeros((1, width) if window is None else (1, window.length, preparation.width), dtype=np.float32)
        given = predictions(network, preparation, x)[1]
        shape = network.predict(x).shape if given is None else given.shape
        wanted = (1, len(code.classes) if code.classes else 1)
        if shape != wanted:
            raise ShapeError(f"it gives {shape}, not {wanted}")
    except (ShapeError, UsageError, NotBuiltError, IndexError) as error:
        raise FileFormatError(f"{folder}: network.safetensors and preparation.json are not of one run ({error})") from None


def predict(run: Run, table: Table) -> tuple[dict[str, Values], list[str], Scores | None]:
    """(new columns: the prediction and, for classes, a probability each; remarks; scores if the target is there).

    With a window, a forecast stands in the row at which it is made, and its name says for how many rows later it is; the first rows,
    before which the table has too few, have none.
    """
    code, window = run.preparation.target, run.preparation.window
    remarks = [] if window is None else _in_order(run, table)
    x, origin, prepared = run.preparation.inputs(table)
    lines = [*remarks, *prepared.lines()]
    answers, chances = predictions(run.network, run.preparation, x, origin)
    later = "" if window is None else f" +{window.horizon}"
    columns = {f"prediction{later}": answers}
    if chances is not None:
        columns |= {f"probability {label}{later}": chances[:, i] for i, label in enumerate(code.classes)}
    lines += formulas("class", code.classes)
    scores = None
    if code.name in table.columns:
        known = slice(None) if window is None else slice(0, max(len(answers) - window.horizon, 0))
        true = table.column(code.name)[table.rows - len(answers) + (0 if window is None else window.horizon) :]
        try:
            scores = score(code, true, answers[known], None if chances is None else chances[known]) if len(true) else None
        except DataError as error:  # a target that is empty or holds new classes: predicting does not need it
            lines.append(f"no scores: {error}")
    return {name: _from_the_end(values, table.rows) for name, values in columns.items()}, lines, scores


def _in_order(run: Run, table: Table) -> list[str]:
    """Remarks on forecasts. Raises: `DataError` for rows that are not in the order of time."""
    recipe, window = run.settings.get("recipe"), run.preparation.window
    assert window is not None
    time = recipe.get("time") if isinstance(recipe, dict) else None
    if isinstance(time, str) and time in table.columns:
        order_of(table, time, gaps=True)
    last = (
        f", the last {window.horizon:,} for rows that are still to come" if window.horizon > 1 else ", the last for the next row"
    )
    return [f"each forecast is for {window.horizon:,} rows after the one that it stands in{last}"]


def _from_the_end(values: Values, rows: int) -> Values:
    """A column whose last rows are these values; those before are empty: NaN, or no text."""
    if len(values) == rows:
        return values
    empty: Any = (
        np.full(rows - len(values), np.nan) if values.dtype.kind == "f" else np.full(rows - len(values), "", dtype=object)
    )
    return np.concatenate([empty, values])
