"""Schedules: the learning rate of each step.

In: the numbers of the steps and how many the run will have. Out: one learning rate for each, float64, computed on the host before
the steps run. A step is one update of the weights.

A schedule is one class: a frozen dataclass whose fields are its options, so it can be shared between runs, compared, and saved as
JSON. Lengths are given as a whole number of steps or as a fraction of the run between 0 and 1; with a fraction, and for the
schedules that end with the run, two runs of one epoch are not one run of two.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from .errors import UsageError
from .records import record
from .registry import Registry


@record(frozen=True)
class Schedule:
    """What every schedule offers.

    To add one, write a subclass, a frozen dataclass, with `__call__`; `schedules.declare("name")`, the class having that name,
    makes it known by name too.
    Args: learning_rate >= 0, the largest one of the run.
    """

    learning_rate: float = 1e-3
    steady: ClassVar[bool] = False  # whether it gives the same rate for all steps

    def __post_init__(self) -> None:
        self._number("learning_rate", "a finite number, 0 or more", lambda x: 0 <= x < math.inf)

    @property
    def name(self) -> str:
        """The name in the registry and in saved files, which is that of the class."""
        return type(self).__name__

    def __call__(self, steps: np.ndarray, total: int) -> np.ndarray:
        """Learning rates. Args: steps, numbers from 0 on, of any shape; total, the steps of the run. Returns: float64."""
        raise NotImplementedError(f"{type(self).__name__} has no __call__(steps, total)")

    def start(self) -> dict[str, float]:
        """The state at the start of a run; empty for schedules that depend on nothing but the step."""
        return {}

    def observe(self, value: float, state: Mapping[str, float]) -> dict[str, float]:
        """The state after an epoch that ended with `value`, where smaller is better. The learning rate is what `__call__` gives
        times `state["scale"]`, if there is one."""
        return dict(state)

    def _number(self, field: str, allowed: str, test: Callable[[float], bool]) -> None:
        """Refuse an option that is no number or fails the test; keep it as a plain float."""
        value: Any = getattr(self, field)
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not test(float(value)):
            raise UsageError(f"{self.name}({field}={value!r}): {field} must be {allowed}")
        object.__setattr__(self, field, float(value))

    def _length(self, field: str, least: int) -> None:
        """Refuse an option that is neither a number of steps nor a fraction of the run."""
        value: Any = getattr(self, field)
        if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least:
            object.__setattr__(self, field, int(value))
        elif isinstance(value, (float, np.floating)) and 0 < value < 1:
            object.__setattr__(self, field, float(value))
        else:
            allowed = f"a whole number of steps from {least} on, or a fraction of the run between 0 and 1"
            raise UsageError(f"{self.name}({field}={value!r}): {field} must be {allowed}")


schedules: Registry[type[Schedule]] = Registry("schedule")


def _steps(length: int | float, total: int) -> int:
    """A length in steps, whether given so or as a fraction of the run."""
    return length if isinstance(length, int) else max(1, round(length * total))


def _cosine(start: float, end: float, part: np.ndarray) -> np.ndarray:
    """Half a cosine wave from `start` (part 0) to `end` (part 1)."""
    return np.asarray(end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.clip(part, 0, 1))))


@schedules.declare("constant")
@record(frozen=True)
class constant(Schedule):
    """The same learning rate throughout.

    η_t = η

    >>> constant(0.1)(np.arange(3), 3)
    array([0.1, 0.1, 0.1])
    """

    steady: ClassVar[bool] = True

    def __call__(self, steps: np.ndarray, total: int) -> np.ndarray:
        return np.full(np.shape(steps), self.learning_rate)


@schedules.declare("step")
@record(frozen=True)
class step(Schedule):
    """A fall at regular intervals.

    η_t = η · factor^⌊t / every⌋
    Args: learning_rate; every: steps or fraction of the run; 0 < factor <= 1.
    Source: He et al. 2016 (residual networks), section 3.4, divides by ten twice in a run, as the defaults do.

    >>> step(1.0, every=2, factor=0.5)(np.arange(5), 5)
    array([1.  , 1.  , 0.5 , 0.5 , 0.25])
    """

    every: int | float = 1 / 3
    factor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._length("every", least=1)
        self._number("factor", "above 0 and at most 1", lambda x: 0 < x <= 1)

    def __call__(self, steps: np.ndarray, total: int) -> np.ndarray:
        return np.asarray(self.learning_rate * self.factor ** (np.asarray(steps) // _steps(self.every, total)))


@schedules.declare("exponential")
@record(frozen=True)
class exponential(Schedule):
    """A steady fall by the same factor over equal times.

    η_t = η · factor^(t / every)
    Args: learning_rate; every: steps or fraction of the run; 0 < factor <= 1.
    Source: Senior et al. 2013, exponential scheduling. Differs: falls at each step (PyTorch's ExponentialLR at each epoch).

    >>> exponential(1.0, every=2, factor=0.25)(np.arange(3), 3)
    array([1.  , 0.5 , 0.25])
    """

    every: int | float = 0.1
    factor: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._length("every", least=1)
        self._number("factor", "above 0 and at most 1", lambda x: 0 < x <= 1)

    def __call__(self, steps: np.ndarray, total: int) -> np.ndarray:
        return np.asarray(self.learning_rate * self.factor ** (np.asarray(steps) / _steps(self.every, total)))


@schedules.declare("cosine")
@record(frozen=True)
class cosine(Schedule):
    """Half a cosine wave from the learning rate to the final one over the whole run.

    η_t = final + ½ (η - final) (1 + cos(π t / T)), T the steps of the run
    Args: learning_rate; final, the rate after the last step.
    Source: Loshchilov & Hutter 2017, equation 5. Differs: no restarts.

    >>> cosine(1.0)(np.arange(4), 4).round(3)
    array([1.   , 0.854, 0.5  , 0.146])
    """

    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number("final", "a finite number, 0 or more", lambda x: 0 <= x < math.inf)

    def __call__(self, steps: np.ndarray, total: int) -> np.ndarray:
        return _cosine(self.learning_rate, self.final, np.asarray(steps) / max(total, 1))


@schedules.declare("warmup_cosine")
@record(frozen=True)
class warmup_cosine(Schedule):
    """A straight rise, then half a cosine wave to the end of the run.

    η_t = η (t + 1) / W for t < W, then final + ½ (η - final) (1 + cos(π (t - W) / (T - W)))
    Args: learning_rate, the peak; warmup W: steps or fraction of the run, 0 for none; final, the rate after the last step.
    Source: Goyal et al. 2017, section 2.2, for the rise; Loshchilov & Hutter 2017, equation 5, for the wave. Differs: the first
    step already has η / W, for one at rate 0 would be lost.

    >>> warmup_cosine(1.0, warmup=2)(np.arange(6), 6).round(3)
    array([0.5  , 1.   , 1.   , 0.854, 0.5  , 0.146])
    """

    warmup: int | float = 0.05
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._length("warmup", least=0)
        self._number("final", "a finite number, 0 or more", lambda x: 0 <= x < math.inf)

    def __call__(self, steps: np.ndarray, total: int) -> np.ndarray:
        rise = _steps(self.warmup, total)
        wave = _cosine(self.learning_rate, self.final, (np.asarray(steps) - rise) / max(total - rise, 1))
        return np.where(np.asarray(steps) < rise, self.learning_rate * (np.asarray(steps) + 1) / max(rise, 1), wave)


@schedules.declare("one_cycle")
@record(frozen=True)
class one_cycle(Schedule):
    """One rise to a large learning rate and one fall far below the first, for short runs.

    η_t: half a cosine wave from η / divide up to η at t = rise · T - 1, then another down to η / (divide · final_divide) at T - 1
    Args: learning_rate, the peak; 0 < rise < 1, the part of the run spent rising; divide >= 1; final_divide >= 1.
    Source: Smith & Topin 2019. Differs: two cosine waves, as in fastai and PyTorch (the paper: two equal straight lines and a
    tail), and momentum stays as it is.

    >>> one_cycle(1.0, rise=0.4)(np.arange(5), 5).round(3)
    array([0.04, 1.  , 0.75, 0.25, 0.  ])
    """

    rise: float = 0.3
    divide: float = 25.0
    final_divide: float = 1e4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number("rise", "between 0 and 1, both excluded", lambda x: 0 < x < 1)
        for field in ("divide", "final_divide"):
            self._number(field, "a finite number, 1 or more", lambda x: 1 <= x < math.inf)

    def __call__(self, steps: np.ndarray, total: int) -> np.ndarray:
        first = self.learning_rate / self.divide
        t, top = np.asarray(steps), self.rise * total - 1
        rising = _cosine(first, self.learning_rate, t / max(top, 1e-9))
        falling = _cosine(self.learning_rate, first / self.final_divide, (t - top) / max(total - 1 - top, 1e-9))
        return np.where(t <= top, rising, falling)


@schedules.declare("reduce_on_plateau")
@record(frozen=True)
class reduce_on_plateau(Schedule):
    """A fall whenever a watched value has not improved for some epochs.

    η_t = η · scale, not below minimum; scale ← scale · factor once the value has failed to get below best - threshold · |best|
    for more than `patience` epochs, and then the count starts anew
    Args: learning_rate; 0 < factor < 1; patience, epochs >= 0; threshold >= 0, relative; minimum, a learning rate.
    The schedule itself stays frozen: what it remembers is the dictionary that `start` gives and `observe` renews ("scale", "bad"
    and "best", all numbers), which is saved with the run. A value that is NaN counts as no improvement.
    Source: PyTorch's ReduceLROnPlateau, whose defaults these are. Differs: the threshold works for negative values too.

    >>> schedule = reduce_on_plateau(0.1, patience=0)
    >>> state = schedule.observe(2.0, schedule.observe(2.0, schedule.start()))
    >>> schedule(np.arange(2), 2) * state["scale"]
    array([0.01, 0.01])
    """

    steady: ClassVar[bool] = True
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    minimum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._number("factor", "between 0 and 1, both excluded", lambda x: 0 < x < 1)
        for field in ("threshold", "minimum"):
            self._number(field, "a finite number, 0 or more", lambda x: 0 <= x < math.inf)
        self._number("patience", "a whole number of epochs, 0 or more", lambda x: x >= 0 and x.is_integer())
        object.__setattr__(self, "patience", int(self.patience))

    def __call__(self, steps: np.ndarray, total: int) -> np.ndarray:
        return np.full(np.shape(steps), self.learning_rate)

    def start(self) -> dict[str, float]:
        """Nothing seen, full learning rate."""
        return {"scale": 1.0, "bad": 0.0}

    def observe(self, value: float, state: Mapping[str, float]) -> dict[str, float]:
        """The state after an epoch: a new best, one more bad epoch, or a smaller scale."""
        best = state.get("best", math.inf)
        if value < (best - self.threshold * abs(best) if math.isfinite(best) else best):
            return {"scale": state["scale"], "bad": 0.0, "best": float(value)}
        kept = {"best": best} if "best" in state else {}
        if state["bad"] + 1 <= self.patience:
            return {"scale": state["scale"], "bad": state["bad"] + 1.0, **kept}
        least = self.minimum / self.learning_rate if self.learning_rate else 0.0
        return {"scale": min(state["scale"], max(state["scale"] * self.factor, least)), "bad": 0.0, **kept}


# -------------------------------------------------------------------------------------------------------------- by name, by file


def resolve(thing: object) -> Schedule:
    """The schedule that a number (a constant rate), a name, an instance or a class stands for.

    Raises: `UnknownNameError` for a name that is not registered, `UsageError` for anything else.

    >>> resolve(0.01)
    constant(learning_rate=0.01)
    """
    if isinstance(thing, Schedule):
        return thing
    if isinstance(thing, str):
        return schedules[thing]()
    if isinstance(thing, type) and issubclass(thing, Schedule):
        return thing()
    if isinstance(thing, (float, np.number)) or (type(thing) is int and abs(thing) <= sys.float_info.max):
        return constant(float(thing))
    raise UsageError(f"a learning rate is a number, a Schedule or the name of one ({', '.join(schedules)}); not {thing!r}")


def config(schedule: Schedule) -> dict[str, Any]:
    """The schedule as plain values that JSON can hold.

    >>> config(cosine(0.1))
    {'name': 'cosine', 'learning_rate': 0.1, 'final': 0.0}
    """
    return {"name": schedule.name, **vars(schedule)}


def from_config(settings: Mapping[str, Any]) -> Schedule:
    """The schedule that `config` described. Raises: `UnknownNameError`; `UsageError` for options that it does not have."""
    return schedules.make(settings)  # type: ignore[no-any-return]  # classes of this registry
