"""recent.py: tables of what was used last, in many threads at once."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from chainrule.recent import keep, recall


@dataclass(frozen=True)
class Key:
    """Compared by Python code, in the midst of which other threads may run."""

    number: int


def test_what_was_used_last_is_kept() -> None:
    table: dict[Any, Any] = {}
    for i in range(4):
        assert keep(table, Key(i), str(i), most=3) == str(i)
    assert recall(table, Key(1)) == "1"
    assert recall(table, Key(0)) is None
    keep(table, Key(4), "4", most=3)
    assert list(table.values()) == ["3", "1", "4"]
    keep(table, Key(3), "other", most=3)
    assert (recall(table, Key(3)), len(table)) == ("other", 3)


@pytest.fixture
def hurried() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hurried")
def test_many_threads_at_once() -> None:
    table: dict[Any, Any] = {}
    wrong: list[Any] = []

    def work(seed: int) -> None:
        numbers = random.Random(seed)
        try:
            for _ in range(5000):
                number = numbers.randrange(8)
                if recall(table, Key(number)) not in (None, number):
                    wrong.append(number)
                keep(table, Key(number), number, most=3)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert all(not thread.is_alive() for thread in threads)
    assert len(table) <= 3
