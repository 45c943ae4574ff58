"""Ctrl-C in the time of a run.

In: nothing. Out: `Watch`, by which a run learns of a Ctrl-C that Python has dropped: where the signal happens to arrive inside a
finaliser, nobody catches the KeyboardInterrupt ("Exception ignored in ..."), and a run of many epochs would go on to its end.
"""

from __future__ import annotations

import signal
import threading
from contextlib import suppress
from types import FrameType
from typing import Any

_holding: list[Watch] = []  # who holds Ctrl-C back
_pressed: list[int] = []  # signals of which no run has heard; written in the main thread only


def _note(number: int, frame: FrameType | None) -> None:
    """What Python does by itself, and a note of it. Where the first Ctrl-C is held, only the note; a second one is not held."""
    _pressed.append(number)
    if not _holding or len(_pressed) > 1:
        raise KeyboardInterrupt


class Watch:
    """A context in which no Ctrl-C is lost. `look` raises KeyboardInterrupt if one was, `forget` takes it as heard. Between `hold` and
    `release` it comes with the next `look` only, so that it parts nothing that belongs together. On entry it is held.

    It works in the main thread, the only one in which Python handles signals, and leaves a handler of the program's own alone. Runs
    may lie inside each other, as in a callback: the first that looks hears of it.
    """

    def __enter__(self) -> Watch:
        handler = _handler()
        self._first = handler is signal.default_int_handler
        self._on = self._first or handler is _note
        if self._first:
            _pressed.clear()
            _holding.clear()
        self.hold()
        if self._first:
            with suppress(ValueError):  # the main thread of an interpreter inside another one
                signal.signal(signal.SIGINT, _note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._first and _handler() is _note:  # not if somebody has put another one in its place
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.release()

    def hold(self) -> None:
        """Raise nothing from now on, but in `look`."""
        if self._on:
            _holding.append(self)

    def release(self) -> None:
        """No longer hold anything."""
        _holding[:] = [w for w in _holding if w is not self]

    def look(self) -> None:
        """Raise KeyboardInterrupt if there was a Ctrl-C of which nobody has heard."""
        if self._on and _pressed:
            _pressed.clear()
            raise KeyboardInterrupt

    def forget(self) -> None:
        """Whoever caught the KeyboardInterrupt knows what to do."""
        if self._on:
            _pressed.clear()


def _handler() -> Any:
    """How SIGINT is handled; None in other threads."""
    return signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
