"""The libraries that are compared.

In: nothing; no library is imported here. Out: `LIBRARIES`. The module of a library is imported only in that library's own process
and has one function,

    prepare(row: Row, way: str, settings: Settings) -> Trainee

which gives the network of the row with its initial weights, ready to be trained, or raises `Unsupported` with the reason why not.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

from ..rows import Row


@dataclass(frozen=True)
class Settings:
    """What holds for all libraries. threads: how many each may use; all_threads: whether these are all there are; backend: chainrule's."""

    threads: int
    all_threads: bool
    backend: str


class Trainee(Protocol):
    """A network in a library."""

    def losses(self, steps: int) -> list[float]:
        """Take the next steps from the initial weights; returns the loss of each, before its update. Never asked after `train`."""
        ...

    def train(self, steps: int) -> tuple[int, float]:
        """Take at least these steps, the fastest way. Returns how many were taken and measured, and their seconds: what a call costs
        once, however many steps it takes, may be left out."""
        ...


@runtime_checkable
class Counted(Trainee, Protocol):
    """One that knows what its steps compute."""

    def operations(self) -> float:
        """Floating-point operations of a step, as the compiler counts them: elementary functions and the optimizer, too."""
        ...


class Adapter(Protocol):
    """The module of a library."""

    def prepare(self, row: Row, way: str, settings: Settings, /) -> Trainee:
        """See above."""
        ...


class Unsupported(Exception):
    """The library cannot do this; the message is the reason."""


@dataclass(frozen=True)
class Library:
    """A library and its ways of training. needs: what must be importable; module: its adapter; whole: its script of a whole process;
    image_ways: its ways for networks of images, if they are others."""

    name: str
    needs: str
    module: str
    ways: tuple[str, ...]
    whole: str
    image_ways: tuple[str, ...] = ()
    peer: bool = True

    def ways_of(self, row: Row) -> tuple[str, ...]:
        """How it can train this network."""
        return self.image_ways if row.of_images and self.image_ways else self.ways

    @property
    def installed(self) -> bool:
        """Whether it can be measured here."""
        return find_spec(self.needs) is not None


OURS = Library("chainrule", "chainrule", "ours", ("fit",), "xor_ours", peer=False)
# Ways of chainrule's adapter that are measured against each other, not against peers.
ONE_THREAD, FORWARD, BOTH_PASSES = "fit on one thread", "forward pass", "forward and backward pass"
WITHIN = "fit in "  # followed by a budget of memory
FLOAT64, FLOAT64_ALONE = "float64", "float64 on one thread"
BY_HAND = "by hand: "  # BY_HAND is followed by names out of `libraries/by_hand.py`, with commas

TORCH = ("eager", "compile")
TORCH_IMAGES = tuple(f"{way}, {order}" for way in TORCH for order in ("NHWC", "NCHW"))  # the order of images in memory
PEERS: tuple[Library, ...] = (
    Library("PyTorch", "torch", "with_torch", TORCH, "xor_torch", TORCH_IMAGES),
    # In a scan JAX's convolutions take 4 to 30 times as long, and what one vector saves is nothing to them: one scan is enough.
    Library("JAX", "jax", "with_jax", ("jit", "scan", "scan, flat"), "xor_jax", ("jit", "scan")),
    Library("scikit-learn", "sklearn", "with_sklearn", ("fit",), "xor_sklearn"),
)
LIBRARIES: dict[str, Library] = {library.name: library for library in (*PEERS, OURS)}
