"""A line that shows how training goes.

In: a run. Out: one line on standard error, rewritten in place; nothing where that is no terminal. A finished epoch's line stays only
for the last epoch, so that long runs do not fill the screen.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import Any, TextIO

from .history import Run

_REDRAW = 0.1  # seconds between two pictures


class Progress:
    """Shows epochs, steps, losses, the time of an epoch and the time left."""

    def __init__(self, run: Run, epochs: int, wanted: bool, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._on = wanted and epochs > 0 and _is_terminal(self._stream)
        self._run, self._epochs = run, epochs
        self._start = self._drawn = time.perf_counter()

    def step(self, done: int, of: int) -> None:
        """So many steps after the last epoch that was reported, `of` steps being an epoch."""
        if self._on and (now := time.perf_counter()) - self._drawn >= _REDRAW:
            self._drawn = now
            self._draw(done / of if of else 0.0)

    def epoch(self) -> None:
        """After an epoch, or several."""
        if self._on and ((now := time.perf_counter()) - self._drawn >= _REDRAW or self._run.epochs == self._epochs):
            self._drawn = now
            self._draw(0.0)

    def close(self, note: str = "") -> None:
        if self._on:
            self._draw(0.0, note)
            self._stream.write("\n")
            self._stream.flush()

    def _draw(self, part: float, note: str = "") -> None:
        run, done = self._run, self._run.epochs
        share = min((done + part) / self._epochs, 1.0)
        elapsed = time.perf_counter() - self._start
        ended = bool(note) or done == self._epochs
        words = [f"epoch {min(done + math.ceil(part), self._epochs)}/{self._epochs}", ""]
        words.append(note or (duration(elapsed) if ended else f"{duration(elapsed * (1 / share - 1)) if share else '?'} left"))
        if run.loss:
            words.append(f"loss {run.loss[-1]:.4g}")
        if run.validation_loss:
            words.append(f"validation {run.validation_loss[-1]:.4g}")
        if run.epoch_seconds:
            words.append(f"{duration(run.epoch_seconds[-1])}/epoch")
        shown = [k for k in run.metrics if k.startswith("validation_")] or list(run.metrics)
        words += [f"{k.removeprefix('validation_')} {run.metrics[k][-1]:.4g}" for k in shown if run.metrics[k]]
        width = shutil.get_terminal_size().columns - 1
        words[1] = _bar(share, min(16, max(4, width - len("  ".join(words)))))  # the bar gives way first
        while len("  ".join(words)) > width and len(words) > 3:  # a narrow window shows fewer metrics, never half a number
            words.pop()
        line = "  ".join(words)[:width]
        self._stream.write("\r" + line.ljust(width))
        self._stream.flush()


def _bar(share: float, width: int) -> str:
    full = int(share * width + 0.5)
    return "━" * full + "─" * (width - full)


def _is_terminal(stream: Any) -> bool:
    try:
        if not stream.isatty():
            return False
        "━".encode(stream.encoding or "ascii")
    except (AttributeError, ValueError, UnicodeEncodeError, LookupError):
        return False
    return True


def duration(seconds: float) -> str:
    """A time that is easy to read.

    >>> duration(0.0123), duration(4.2), duration(75), duration(7300)
    ('12 ms', '4.2 s', '1:15', '2:01:40')
    """
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
