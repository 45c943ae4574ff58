"""Networks that nobody measured while the compiler was made: odd shapes, and layers written by hand.

In: a `Bench`. Out: three `Table`s. The compiler knows neither shapes nor layers by name, so both must come near the speed of what was
measured: of an odd shape, the operations a second of the measured network whose steps have about as many; of a layer written by hand,
the time of the built-in one. In each round the two of a pair are measured one right after the other, and their ratio is taken: a machine
that is slower or gives fewer cores for some seconds does so for both. Shapes are compared on one thread, where the speed is that of the
code, and with all, where it also hangs on how much the threads of a step have to tell each other.
"""

from __future__ import annotations

from collections.abc import Iterator
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
class Pair:
    """Two that are compared: what was measured, or is built in, and what must come near it. operations: of a step of each; those in
    float64 count twice, since a vector holds half as many numbers; 1 where only times count."""

    known: Candidate
    other: Candidate
    operations: tuple[float, float] = (1.0, 1.0)

    @property
    def measured(self) -> bool:
        """Whether both could be."""
        return bool(self.known.result.times and self.other.result.times)

    @property
    def rates(self) -> tuple[float, float]:
        """Operations a second of each."""
        known, other = self.operations
        return known / self.known.result.step, other / self.other.result.step

    @property
    def share(self) -> float:
        """The speed of the other one, that of the known one being 1: the median over all rounds."""
        known, other = self.operations
        times = zip(self.known.result.times, self.other.result.times, strict=True)
        return median(other / known * before / after for before, after in times)


def measure(bench: Bench) -> tuple[Table, Table, Table]:
    """All tables."""
    alone, together, hand = new_tables()
    shapes = {True: alone, False: together}
    wanted = {  # a network and a way -> where its troubles are noted
        (row.name, _way(row, one)): table for one, table in shapes.items() for row in (*MEASURED, *GENERAL)
    }
    counted = list(wanted)
    for name, what in HAND_WRITTEN:
        wanted.setdefault((name, "fit"), hand)
        wanted[name, f"{BY_HAND}{what}"] = hand
    ready = {key for key, table in wanted.items() if _is_ready(bench, *key, table)}
    counts = {key: n for key in counted if key in ready and (n := _operations(bench, *key, wanted[key]))}
    pairs = {id(table): [*_pairs(one, counts)] for one, table in shapes.items()}
    by_hand = [((name, "fit"), (name, f"{BY_HAND}{what}")) for name, what in HAND_WRITTEN]
    pairs[id(hand)] = [Pair(_candidate(*a), _candidate(*b)) for a, b in by_hand if {a, b} <= ready]
    bench.rounds([c for made in pairs.values() for pair in made for c in (pair.known, pair.other)], together.notes, abreast=2)
    bench.forget()
    for table, fill, count in ((alone, fill_shape, GENERAL), (together, fill_shape, GENERAL), (hand, fill_hand, HAND_WRITTEN)):
        for pair in pairs[id(table)]:
            if pair.measured:
                fill(table, pair)
        table.failed = len(table.cells) < len(count)
    return alone, together, hand


def _pairs(one: bool, counts: dict[Key, float]) -> Iterator[Pair]:
    """Each odd network behind the measured one whose steps have about as many operations."""
    known = {key: counts[key] for row in MEASURED if (key := (row.name, _way(row, one))) in counts}
    for row in GENERAL:
        key = (row.name, _way(row, one))
        if key in counts and known:
            near = nearest(known, counts[key])
            yield Pair(_candidate(*near), _candidate(*key), (known[near], counts[key]))


def nearest(known: dict[Key, float], operations: float) -> Key:
    """The one whose steps have about as many."""
    return min(known, key=lambda key: abs(log(known[key] / operations)))


def _way(row: Row, alone: bool) -> str:
    if row.name == "float64":
        return FLOAT64_ALONE if alone else FLOAT64
    return ONE_THREAD if alone else "fit"


def _is_ready(bench: Bench, name: str, way: str, table: Table) -> bool:
    """Whether chainrule's network can be measured; else there is a note."""
    bench.say(f"{name}: {way} gets ready")
    try:
        bench.process(OURS.name).ask("prepare", LIMIT, row=name, way=way)
    except Failure as failure:
        table.notes.append(f"{name} ({way}): {failure}")
        return False
    return True


def _candidate(name: str, way: str) -> Candidate:
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


def fill_shape(table: Table, pair: Pair) -> None:
    """A network beside the measured one."""
    near, row, step, share = pair.known.row, pair.other.row, pair.other.result.step, pair.share
    (near_operations, operations), (near_rate, rate) = pair.operations, pair.rates
    table.cells.append((
        row.title, f"{operations / 1e6:.3g} M", duration(step), f"{rate / 1e9:.1f}",
        f"{near.title} ({near_operations / 1e6:.3g} M)", f"{near_rate / 1e9:.1f}", _judged(share),
    ))  # fmt: skip
    table.values.append({
        "row": row.name, "operations": operations, "step": step, "rate": rate, "near": near.name,
        "near_operations": near_operations, "near_rate": near_rate, "share": share,
    })  # fmt: skip


def fill_hand(table: Table, pair: Pair) -> None:
    """What is written by hand beside what is built in."""
    a, b, share, what = pair.known.result, pair.other.result, pair.share, pair.other.way.removeprefix(BY_HAND)
    table.cells.append((pair.other.row.title, what, duration(a.step), duration(b.step), _judged(share)))
    table.values.append({
        "row": pair.other.row.name, "by_hand": what, "built_in_step": a.step, "by_hand_step": b.step, "share": share,
    })  # fmt: skip


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
