"""Run folders: what all of them have in common, whatever a network was trained on.

In: what training gave, or a folder's files. Out: network.safetensors, preparation.json, settings.json, history.csv and report.html; the
network and the settings, read again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import nn
from .errors import DataError, FileFormatError, NotBuiltError, ShapeError, UsageError
from .graph.node import Array
from .optim import Optimizer
from .report import Report, write_report, write_text

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of one


class Trained(Protocol):
    """What is known after training of any kind."""

    @property
    def network(self) -> nn.Sequential: ...
    @property
    def history(self) -> Mapping[str, Sequence[float]]: ...
    @property
    def best_epoch(self) -> int | None: ...
    @property
    def interrupted(self) -> bool: ...
    @property
    def failure(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def scores(self) -> Any: ...


def write_run(folder: Path, outcome: Trained, preparation: str, about: Mapping[str, Any], report: Report) -> None:
    """All files of a run folder. preparation: how data become numbers, as JSON; about: the settings that only such a run has."""
    outcome.network.save(folder / "network.safetensors")
    write_text(folder / "preparation.json", preparation + "\n")
    settings = {
        **about,
        "epochs": len(outcome.history["loss"]),
        "best_epoch": outcome.best_epoch,
        "interrupted": outcome.interrupted,
        "failure": outcome.failure,
        "seconds": round(outcome.seconds, 3),
        "scores": outcome.scores,
    }
    write_report(folder, settings, report)


@dataclass(frozen=True)
class ReadRun:
    """The run folder of any network, read."""

    folder: Path
    network: nn.Sequential
    settings: Mapping[str, Any]

    @property
    def optimizer(self) -> Optimizer | None:
        """What the network was trained with."""
        return self.network._optimizer


def formulas(what: str, names: Iterable[object]) -> list[str]:
    """A remark on the first of these names that a spreadsheet would compute; names stay as they are.

    >>> formulas("class", ["cat", "=1+1"])
    ['the class "=1+1" begins like a formula: a spreadsheet may compute it instead of showing it']
    """
    found = [name for name in names if isinstance(name, str) and name.startswith(FORMULA)][:1]
    return [f'the {what} "{name}" begins like a formula: a spreadsheet may compute it instead of showing it' for name in found]


def check_pair(folder: Path, network: Any, x: Array, shape: tuple[int, ...]) -> None:
    """Raises: `FileFormatError` unless the network is a Sequential that gives scores of this shape for x."""
    try:
        if not isinstance(network, nn.Sequential):
            raise ShapeError(f"it is a {type(network).__name__}")
        given = np.shape(network.predict(x))
        if given != shape:
            raise ShapeError(f"it gives {given}, not {shape}")
    except (DataError, ShapeError, UsageError, NotBuiltError, IndexError) as error:
        raise FileFormatError(f"{folder}: network.safetensors and preparation.json are not of one run ({error})") from None
