"""Networks that nobody measured while the compiler was made: odd shapes, and layers written by hand.

In: a `Bench`. Out: three `Table`s. The compiler knows neither shapes nor layers by name, so both must come near the speed of what was
measured: of an odd shape, the operations a second of the measured network whose steps have about as many; of a layer written by hand,
the time of the built-in one. All of them are measured in the same rounds. Shapes are compared on one thread, where the speed is that of
the code, and with all, where it also hangs on how much the threads of a step have to tell each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from statistics import median

from .libraries import BY_HAND, FLOAT64, FLOAT64_ALONE, ONE_THREAD, OURS
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


Key = tuple[str, str]  # a network and a way


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


def measure(bench: Bench) -> tuple[Table, Table, Table]:
    """All tables."""
    alone, together, hand = new_tables()
    shapes = {True: alone, False: together}
    wanted = {  # a network and a way -> where its troubles are noted
        (row.name, _way(row, one)): table for one, table in shapes.items() for row in (*MEASURED, *GENERAL)
    }
    for name, what in HAND_WRITTEN:
        wanted.setdefault((name, "fit"), hand)
        wanted[name, f"{BY_HAND}{what}"] = hand
    ready = {key: c for key, table in wanted.items() if (c := _ready(bench, *key, table)) is not None}
    counts = {key: _operations(bench, *key, table) for key in ready if (table := wanted[key]) is not hand}
    bench.rounds(ready.values(), together.notes)
    bench.forget()
    for one, table in shapes.items():
        found, measured = ([s for r in rows if (s := _speed(r, _way(r, one), ready, counts))] for rows in (GENERAL, MEASURED))
        fill_shapes(table, found, measured)
        table.failed = len(table.cells) < len(GENERAL)
    for name, what in HAND_WRITTEN:
        fill_hand(hand, ready.get((name, "fit")), ready.get((name, f"{BY_HAND}{what}")))
    hand.failed = len(hand.cells) < len(HAND_WRITTEN)
    return alone, together, hand


def _speed(row: Row, way: str, ready: dict[Key, Candidate], counts: dict[Key, float]) -> Speed | None:
    """Of a network that could be measured."""
    made, operations = ready.get((row.name, way)), counts.get((row.name, way))
    return Speed(row, operations, made.result.step) if made is not None and operations and made.result.times else None


def _way(row: Row, alone: bool) -> str:
    if row.name == "float64":
        return FLOAT64_ALONE if alone else FLOAT64
    return ONE_THREAD if alone else "fit"


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
    return 2 * counted if way in (FLOAT64, FLOAT64_ALONE) else counted


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


def new_tables() -> tuple[Table, Table, Table]:
    """Empty: shapes on one thread, shapes with all threads, layers written by hand."""
    first = (
        "network",
        "operations a step",
        "step",
        "GFLOP/s",
        "measured, of about the size",
        "its GFLOP/s",
        "speed (at least 0.85)",
    )
    title = "Networks that nobody measured: operations a second beside those of a measured one"
    second = ("network", "written by hand", "built in", "by hand", "speed (at least 0.85)")
    return (
        Table("general-alone", f"{title}, on one thread", first),
        Table("general", f"{title}, with all threads", first),
        Table("by-hand", "Layers and losses written by hand, in NumPy, beside the built-in ones", second),
    )
