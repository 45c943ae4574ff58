"""What a run leaves behind.

In: numbers, one set an epoch. Out: `Run`, which `fit` returns and hands to callbacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UsageError
from ..records import record


@dataclass
class Run:
    """The history of one `fit`, and the handle by which a callback ends it.

    loss, validation_loss, penalty, learning_rate, epoch_seconds: one number an epoch (validation_loss is empty without validation;
    penalty is what l1 and l2 add, reported apart; learning_rate that of the epoch's last step). metrics: "accuracy" ->
    one number an epoch over the training rows as they were seen; "validation_accuracy" likewise. seconds, steps, epochs: of this
    run. best_epoch: counted from 1, the epoch whose weights early stopping brought back. stopped: why the run ended early, or "".
    """

    seed: int
    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    penalty: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    best_epoch: int | None = None
    stopped: str = ""
    interrupted: bool = False
    planned_epochs: int = 0
    network: Any = field(default=None, repr=False)

    @property
    def epochs(self) -> int:
        """Whole epochs so far."""
        return len(self.loss)

    def stop(self, why: str = "stopped by a callback") -> None:
        """End the run after this epoch. For callbacks."""
        self.stopped = why

    def write(self, at: int, columns: Mapping[str, Sequence[float]], metrics: Mapping[str, Sequence[float]]) -> None:
        """The history from epoch `at` (from 0) on, for the training. Done again after an interrupt, it completes what is there."""
        for name, values in columns.items():
            getattr(self, name)[at:] = values
        for name, values in metrics.items():
            self.metrics.setdefault(name, [])[at:] = values

    def table(self) -> dict[str, list[float]]:
        """The history as columns of equal length, for a CSV file."""
        columns = {"epoch": [float(i + 1) for i in range(self.epochs)], "loss": self.loss}
        if self.validation_loss:
            columns["validation_loss"] = self.validation_loss
        columns |= self.metrics
        return columns | {"penalty": self.penalty, "learning_rate": self.learning_rate, "seconds": self.epoch_seconds}

    def __repr__(self) -> str:
        parts = [f"{self.epochs} epochs", f"{self.steps} steps", f"{self.seconds:.3g} s"]
        if self.loss:
            parts.append(f"loss {self.loss[-1]:.4g}")
        if self.validation_loss:
            parts.append(f"validation loss {self.validation_loss[-1]:.4g}")
        parts += [f"{k} {v[-1]:.4g}" for k, v in self.metrics.items() if v]
        if self.best_epoch:
            parts.append(f"best epoch {self.best_epoch}")
        return f"Run({', '.join(parts)}, seed {self.seed}{', ' + self.stopped if self.stopped else ''})"


Callback = Callable[[Run], Any]


@record(frozen=True)
class EarlyStopping:
    """End a run that no longer improves, and bring back the best weights.

    Args: patience: epochs without improvement that are tolerated; monitor: "validation_loss", "loss" or the name of a metric; with
    None the validation loss if there is validation, else the loss; min_delta: what counts as an improvement; restore_best.
    Source: Prechelt, "Early stopping - but when?", 1998 (the criterion UP with patience).

    >>> EarlyStopping(5).patience
    5
    """

    patience: int = 10
    monitor: str | None = None
    min_delta: float = 0.0
    restore_best: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.patience, bool) or not isinstance(self.patience, int) or self.patience < 1:
            raise UsageError(f"early stopping needs a patience of at least 1 epoch, not {self.patience!r}")
        if not self.min_delta >= 0:
            raise UsageError(f"early stopping needs min_delta of at least 0, not {self.min_delta!r}")


def early_stopping_of(option: Any) -> EarlyStopping | None:
    """None, a patience, True, or an `EarlyStopping`."""
    if option is None or option is False:
        return None
    if isinstance(option, EarlyStopping):
        return option
    return EarlyStopping() if option is True else EarlyStopping(option)
