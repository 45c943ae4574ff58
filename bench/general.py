"""Networks that nobody measured while the compiler was made: odd shapes, and layers written by hand.

In: a `Bench`. Out: two `Table`s. The compiler knows neither shapes nor layers by name, so both must come near the speed of what was
measured: of an odd shape, the operations a second of the measured network whose steps have about as many; of a layer written by hand,
the time of the built-in one. All of them are measured in the same rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from statistics import median

from .libraries import BY_HAND, FLOAT64, OURS
from .measure import LIMIT, Bench, Candidate
from .pool import Failure
from .results import Measured, Table
from .rows import ALL_ROWS, GENERAL, ROWS, WIDTHS, Row
from .tables import duration

PROMISED = 0.85  # of the speed of what was measured
MEASURED = (*(row for row in ROWS if len(row.input) == 1 and not row.has_dropout), *WIDTHS)
HAND_WRITTEN = (  # a row, and what in it is written by hand
    ("digits", "Dense, cross_entropy"),
    ("mnist", "Dense"),
    ("mnist", "cross_entropy"),
    ("mnist-norm", "BatchNorm"),
    ("mnist-norm", "Dropout"),
    ("mnist-norm", "Dense, BatchNorm, Dropout, cross_entropy"),
    ("lstm-32", "LSTM"),
    ("lstm-64", "LSTM"),
)


@dataclass(frozen=True)
class Speed:
    """A network's operations a step, and a second. Those in float64 count twice, since a vector holds half as many numbers."""

    row: Row
    operations: float
    step: float

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.operations / self.step


def measure(bench: Bench) -> tuple[Table, Table]:
    """Both tables."""
    shapes, hand = new_tables()
    wanted = {
        (row.name, _way(row)): shapes for row in (*MEASURED, *GENERAL)
    }  # a network and a way -> where its troubles are noted
    for name, what in HAND_WRITTEN:
        wanted.setdefault((name, "fit"), hand)
        wanted[name, f"{BY_HAND}{what}"] = hand
    ready = {key: c for key, table in wanted.items() if (c := _ready(bench, *key, table)) is not None}
    counts = {key: _operations(bench, *key, shapes) for key in ready if wanted[key] is shapes}
    bench.rounds(ready.values(), shapes.notes)
    bench.forget()
    speeds = {
        name: Speed(c.row, counts[name, way], c.result.step)
        for (name, way), c in ready.items()
        if counts.get((name, way)) and c.result.times
    }
    found, measured = ([speeds[row.name] for row in rows if row.name in speeds] for rows in (GENERAL, MEASURED))
    fill_shapes(shapes, found, measured)
    for name, what in HAND_WRITTEN:
        fill_hand(hand, ready.get((name, "fit")), ready.get((name, f"{BY_HAND}{what}")))
    shapes.failed, hand.failed = len(shapes.cells) < len(GENERAL), len(hand.cells) < len(HAND_WRITTEN)
    return shapes, hand


def _way(row: Row) -> str:
    return FLOAT64 if row.name == "float64" else "fit"


def _ready(bench: Bench, name: str, way: str, table: Table) -> Candidate | None:
    """chainrule's network, ready to be measured; None, and a note, if that fails."""
    bench.say(f"{name}: {way} gets ready")
    try:
        bench.process(OURS.name).ask("prepare", LIMIT, row=name, way=way)
    except Failure as failure:
        table.notes.append(f"{name} ({way}): {failure}")
        return None
    return Candidate(OURS.name, way, ALL_ROWS[name], Measured(OURS.name, f"{way}, {name}", False))


def _operations(bench: Bench, name: str, way: str, table: Table) -> float:
    """Of a step; 0, and a note, if they cannot be had."""
    bench.say(f"{name}: operations of {way}")
    try:
        counted = float(bench.process(OURS.name).ask("operations", LIMIT, row=name, way=way)["operations"])
    except Failure as failure:
        table.notes.append(f"{name} ({way}): {failure}")
        return 0.0
    return 2 * counted if way == FLOAT64 else counted


def fill_shapes(table: Table, found: list[Speed], measured: list[Speed]) -> None:
    """Each network beside the measured one whose steps have about as many operations."""
    if not measured:
        return
    for s in found:
        near = min(measured, key=lambda m: abs(log(m.operations / s.operations)))
        share = s.rate / near.rate
        table.cells.append((
            s.row.title, f"{s.operations / 1e6:.3g} M", duration(s.step), f"{s.rate / 1e9:.1f}",
            f"{near.row.title} ({near.operations / 1e6:.3g} M)", f"{near.rate / 1e9:.1f}", _judged(share),
        ))  # fmt: skip
        table.values.append({
            "row": s.row.name, "operations": s.operations, "step": s.step, "rate": s.rate, "near": near.row.name,
            "near_operations": near.operations, "near_rate": near.rate, "share": share,
        })  # fmt: skip


def fill_hand(table: Table, built_in: Candidate | None, own: Candidate | None) -> None:
    """What is written by hand beside what is built in, if both could be measured."""
    if built_in is None or own is None or not (built_in.result.times and own.result.times):
        return
    a, b = built_in.result, own.result
    share, what = median(x / y for x, y in zip(a.times, b.times, strict=True)), own.way.removeprefix(BY_HAND)
    table.cells.append((own.row.title, what, duration(a.step), duration(b.step), _judged(share)))
    table.values.append({"row": own.row.name, "by_hand": what, "built_in_step": a.step, "by_hand_step": b.step, "share": share})


def _judged(share: float) -> str:
    return f"{share:.2f}" if share >= PROMISED else f"{share:.2f} (too little)"


def new_tables() -> tuple[Table, Table]:
    """Empty."""
    first = (
        "network",
        "operations a step",
        "step",
        "GFLOP/s",
        "measured, of about the size",
        "its GFLOP/s",
        "speed (at least 0.85)",
    )
    second = ("network", "written by hand", "built in", "by hand", "speed (at least 0.85)")
    return (
        Table("general", "Networks that nobody measured: operations a second beside those of a measured one", first),
        Table("by-hand", "Layers and losses written by hand, in NumPy, beside the built-in ones", second),
    )
