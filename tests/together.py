"""Epochs that are taken together, in tests: how many, on which backend, and what they leave behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from training import Array

import chainrule as cr
from chainrule import nn
from chainrule.run.reference import ReferenceSession
from chainrule.schedules import Schedule
from chainrule.train.epochs import Pace


def noisy() -> nn.Sequential:
    """Everything that could depend on order, step or chance."""
    return nn.Sequential(nn.Dense(6, "tanh"), nn.BatchNorm(), nn.Dropout(0.3), nn.Dense(2))


@dataclass(frozen=True)
class Neighbours(Schedule):
    """A user's schedule that looks at all the steps it is asked for together."""

    def __call__(self, steps: Array, total: int) -> Array:
        return np.full(np.shape(steps), self.learning_rate / (1 + steps[0] % 5))


class Projected(cr.SGD):
    """A user's rule that brings weights back from infinity."""

    def update(self, w: Any, g: Any, slots: Any, shared: Any, h: Any) -> Any:
        return np.minimum(w - h["learning_rate"] * g, 1.0), {}


@pytest.fixture(autouse=True)
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, where a test does not say otherwise, is on the backend that is in Python and reports each step."""
    monkeypatch.setitem(nn.Module.fit.__kwdefaults__, "backend", "reference")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(steps, rows) of each call of the reference backend that trains."""
    seen: list[tuple[int, int]] = []
    run = ReferenceSession.run

    def counted(self: ReferenceSession, steps: Any, pulse: Any = None) -> Any:
        if steps.entries[0] != "evaluate":
            seen.append((steps.count, steps.rounds * sum(steps.sizes)))
        return run(self, steps, pulse)

    monkeypatch.setattr(ReferenceSession, "run", counted)
    return seen


def at_once(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Take so many epochs in the first call, so many in the second ...; the last number holds on."""

    def init(self: Pace, most: int) -> None:
        self._most, self._numbers = max(1, most), list(numbers)  # type: ignore[attr-defined]  # of this stand-in alone

    def following(self: Pace, left: int) -> int:
        numbers = self._numbers  # type: ignore[attr-defined]  # of this stand-in alone
        return min(numbers.pop(0) if len(numbers) > 1 else numbers[0], left, self._most)

    monkeypatch.setattr(Pace, "__init__", init)
    monkeypatch.setattr(Pace, "next", following)
    monkeypatch.setattr(Pace, "took", lambda *_: None)


def outcome(net: nn.Module, run: cr.Run) -> tuple[Any, ...]:
    """All that a run leaves behind but for times."""
    return (run.loss, run.penalty, run.learning_rate, run.steps, run.epochs, run.stopped, net._counters, net._schedule_state)
