"""What came out, as plain data.

In: measurements. Out: medians, ratios, floors. Times are seconds a training step, rates operations a second.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from .libraries import PEERS
from .rows import Row


@dataclass
class Measured:
    """A way of a library on a row: the time of a step in each round; the seconds that come before the first step; the greatest
    deviation of its losses from the others'."""

    library: str
    way: str
    peer: bool
    setup: float | None = None
    losses: list[float] = field(default_factory=list)
    deviation: float | None = None
    times: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.library} ({self.way})"

    @property
    def step(self) -> float:
        """The median."""
        return median(self.times)

    @property
    def spread(self) -> float:
        """Half the way from the fastest to the slowest round, as a share of the median: how far to trust it."""
        return (max(self.times) - min(self.times)) / 2 / self.step


@dataclass
class RowResult:
    """A row: all that was measured, and what could not be."""

    row: Row
    threads: int
    measured: list[Measured] = field(default_factory=list)
    peak_one: float | None = None
    peak_all: float | None = None
    agreed: bool | None = None  # None: nobody to compare with
    notes: list[str] = field(default_factory=list)
    not_offered: list[str] = field(default_factory=list)

    def best(self, library: str) -> Measured | None:
        """The fastest way of a library."""
        found = [m for m in self.measured if m.library == library and m.times]
        return min(found, key=lambda m: m.step, default=None)

    def missing(self) -> list[str]:
        """Peers without a time that did not say that they cannot do this: not installed, left out, failed."""
        return [x.name for x in PEERS if self.best(x.name) is None and x.name not in self.not_offered]

    @property
    def best_peer(self) -> Measured | None:
        """The fastest way of all peers."""
        return min((m for m in self.measured if m.peer and m.times), key=lambda m: m.step, default=None)

    @property
    def ours(self) -> Measured | None:
        """chainrule."""
        return next((m for m in self.measured if not m.peer and m.times), None)

    @property
    def ratio(self) -> float | None:
        """How many times faster than the best peer; None unless all losses agree."""
        if not self.agreed or self.ours is None or self.best_peer is None:
            return None
        return self.best_peer.step / self.ours.step

    @property
    def floor(self) -> float | None:
        """The time that the step's arithmetic takes at the measured peak of all threads."""
        return self.row.flops / self.peak_all if self.peak_all else None

    @property
    def shares(self) -> tuple[float, float] | None:
        """Our rate over the peak of one core, and over that of all threads."""
        if self.ours is None or self.peak_one is None or self.peak_all is None:
            return None
        rate = self.row.flops / self.ours.step
        return rate / self.peak_one, rate / self.peak_all

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        row, best, ours = self.row, self.best_peer, self.ours
        return {
            "name": row.name, "title": row.title, "batch": row.batch, "parameters": row.parameter_count, "flops": row.flops,
            "peak_one_core": self.peak_one, "peak_all_threads": self.peak_all, "floor": self.floor, "agreed": self.agreed,
            "best_peer": best and best.label, "best_peer_step": best and best.step, "ours_step": ours and ours.step,
            "ratio": self.ratio, "least": row.least, "aim": row.aim, "missing_peers": self.missing(),
            "share_of_peak": self.shares, "notes": self.notes,
            "measured": [{**asdict(m), "step": m.step if m.times else None} for m in self.measured],
        }  # fmt: skip


@dataclass
class Report:
    """Everything. machine: what it was measured on; rows; tables: further results, title -> rows of plain values with a heading."""

    machine: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    rows: list[RowResult] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        """Whether something is wrong rather than slow: losses that disagree, a library that died."""
        return any(r.agreed is False or any("failed" in n for n in r.notes) for r in self.rows) or any(
            t.failed for t in self.tables
        )

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "machine": self.machine, "versions": self.versions, "seconds": self.seconds, "interrupted": self.interrupted,
            "rows": [r.plain() for r in self.rows], "tables": [asdict(t) for t in self.tables],
        }  # fmt: skip


@dataclass
class Table:
    """Results that are no rows. cells: text for people; values: the same as numbers, for machines."""

    name: str
    title: str
    heading: tuple[str, ...]
    cells: list[tuple[str, ...]] = field(default_factory=list)
    values: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: bool = False
