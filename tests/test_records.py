"""`record` makes what `dataclass` makes."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from typing import Any

import pytest

from chainrule import Adam, Optimizer
from chainrule.records import record


def declared(how: Any) -> Any:
    @how(frozen=True)
    class Point:
        x: int
        y: list[float] = field(default_factory=list, compare=False)
        hidden: str = field(default="h", repr=False)

        def __post_init__(self) -> None:
            object.__setattr__(self, "x", int(self.x))

    return Point


def test_a_record_is_a_dataclass() -> None:
    made, plain = declared(record), declared(dataclass)
    a, b = made(1, [2.0]), plain(1, [2.0])
    assert repr(a) == repr(b)
    assert hash(a) == hash(b)
    assert [f.name for f in fields(a)] == [f.name for f in fields(b)]
    assert made.__match_args__ == plain.__match_args__
    assert a == made(1.0, [3.0]) == replace(a, y=[])
    assert a != made(2)
    assert a != made(1, hidden="other")
    assert a != b
    assert a != (1, "h")
    for name in ("x", "new"):
        with pytest.raises(FrozenInstanceError):
            setattr(a, name, 5)
    with pytest.raises(FrozenInstanceError):
        del a.x
    a.y.append(a)
    b.y.append(b)
    assert repr(a) == repr(b)


def test_a_method_of_the_class_stays() -> None:
    @record(frozen=True)
    class Named:
        name: str

        def __repr__(self) -> str:
            return self.name

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 7

    assert (repr(Named("n")), Named("n") == 3, hash(Named("n"))) == ("n", True, 7)


def test_options_of_users_and_ours_mix() -> None:
    @dataclass(frozen=True)
    class Mine(Adam):
        more: float = 1.0

    class Bare(Adam):
        pass

    assert Mine(0.1) == Mine(0.1)
    assert Mine(0.1) != Mine(0.1, more=2.0)
    assert Bare(0.1) != Adam(0.1)
    assert "more=1.0" in repr(Mine())
    assert isinstance(Mine(), Optimizer)
    for one in (Adam(0.1, clip_norm=1.0), Adam()):
        assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
        assert hash(copy.copy(one)) == hash(one)
