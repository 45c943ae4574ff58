"""Rounds of measurements.

In: rows. Out: a `RowResult` for each. All libraries stand ready at once, each in its process; a round takes each way once for a set
time, in an order that rotates, and measures the peak of the processor; medians are taken over the rounds. So whatever drifts (clock
rates, other work on the machine) drifts for all. Where the machine gave fewer cores than it has, before a measurement or after it, or
cores that lie far from each other, it is taken again, whoever it is of, up to eight times: virtual machines are given one core for two, or
two that share no cache, for seconds at a time, and who was measured then would be chance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from statistics import median
from typing import NamedTuple

from . import peak
from .libraries import LIBRARIES, Library, Settings
from .pool import Failure, NotOffered, Process
from .results import Measured, RowResult
from .rows import CHECKED_STEPS, Row

FIRST_TOLERANCE = 1e-5  # for the loss of the first step, which no optimizer has touched; see `Row.tolerance` for the others
PAUSE = 0.02  # seconds before a measurement: threads of the library before may go on spinning for as long
LONGEST = 0.25  # and at the most
LIMIT = 300.0  # seconds that a library may take to get ready
ALL = 0.8  # of the highest rate of multiply-adds so far: less means that cores are missing
FAR = 2.5  # times as long as the threads of all cores took to meet when that took least: more means that cores lie apart
RETAKEN = 8  # so often a measurement is taken again, at most


@dataclass
class Candidate:
    """Something to be measured in rounds."""

    library: str
    way: str
    row: Row
    result: Measured
    steps: int = 1


class Look(NamedTuple):
    """What all cores were like at a moment: the rate of multiply-adds on them, and how long their threads took to meet. Where that
    cannot be measured, or there is one core only: as good as can be."""

    rate: float
    meeting: float


@dataclass
class Cores:
    """Whether the machine gives all the cores that it has, near each other. Of more than five, one may be missing unnoticed."""

    threads: int
    highest: float = 0.0
    shortest: float = inf

    def look(self) -> Look:
        """How they are, when nothing else runs."""
        found = self._look(PAUSE)
        return found if self.all_there(found) else self._look(LONGEST)

    def _look(self, pause: float) -> Look:
        time.sleep(pause)
        rate, meeting = (peak.measure(self.threads, 0.005, 2), peak.meeting(self.threads)) if self.threads > 1 else (None, None)
        found = Look(inf if rate is None else rate, 0.0 if meeting is None else meeting)
        self.highest = max(self.highest, rate or 0.0)
        if meeting is not None and found.rate >= ALL * self.highest:  # two threads of one core meet in no time
            self.shortest = min(self.shortest, meeting)
        return found

    def all_there(self, *looks: Look) -> bool:
        """Told by the highest rate and the shortest meeting so far."""
        return all(x.rate >= ALL * self.highest and x.meeting <= FAR * self.shortest for x in looks)

    def fewer(self) -> None:
        """It has not given them for so long that it has no better ones now."""
        self.highest, self.shortest = 0.0, inf


@dataclass
class Bench:
    """The processes of the libraries, and how long to measure. `say` is told what is being done. retaken: how many measurements of each
    library were taken again for lack of cores near each other; short: how many stand although they were missing each time."""

    settings: Settings
    libraries: Sequence[Library]
    repeats: int
    seconds: float
    say: Callable[[str], None]
    versions: dict[str, str] = field(default_factory=dict)
    retaken: dict[str, int] = field(default_factory=dict)
    short: int = 0
    _processes: dict[str, Process] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cores = Cores(self.settings.threads)

    def process(self, name: str) -> Process:
        """The process of a library, started when first asked for, and again when it has died."""
        running = self._processes.get(name)
        if running is not None and running.process.poll() is None:
            return running
        if running is not None:
            running.end()
        made = self._processes[name] = Process(LIBRARIES[name], self.settings)
        try:
            self.versions[name] = made.start()
        except Failure as failure:
            made.end()
            raise Failure(f"could not be started: {failure}") from None
        return made

    def close(self) -> None:
        """End all processes."""
        for process in self._processes.values():
            process.end()

    def forget(self) -> None:
        """Let the processes drop the networks they hold."""
        for process in self._processes.values():
            try:
                process.ask("forget", 60)
            except Failure:
                process.end()

    # ---- a row ---------------------------------------------------------------------------------------------------------------

    def row(self, row: Row, result: RowResult) -> None:
        """Fill `result`, bit by bit, so that an interrupt leaves what is there."""
        if row.steps < CHECKED_STEPS:
            raise ValueError(f"row {row.name}: {row.steps} batches of data, but losses are checked over {CHECKED_STEPS} steps")
        ready = []
        for library in self.libraries:
            if not library.installed:
                result.notes.append(f"{library.name}: not installed")
                continue
            for way in library.ways_of(row):
                candidate = Candidate(library.name, way, row, Measured(library.name, way, library.peer))
                if self._prepare(candidate, result):
                    ready.append(candidate)
        result.agreed = check_agreement([c.result for c in ready], row.tolerance, result.notes)
        if result.agreed is False:
            self.say(f"{row.name}: losses disagree, so nothing is measured")
        else:
            self.rounds(ready, result.notes, result)
        self.forget()

    def _prepare(self, candidate: Candidate, result: RowResult) -> bool:
        """Make the network and take its first losses; whether that worked."""
        row, measured = candidate.row, candidate.result
        self.say(f"{row.name}: {measured.label} gets ready")
        try:
            process = self.process(candidate.library)
            answer = process.ask("losses", LIMIT, row=row.name, way=candidate.way, steps=CHECKED_STEPS)
            again = process.ask("prepare", LIMIT, row=row.name, way=candidate.way)
        except NotOffered as reason:
            result.notes.append(f"{measured.label}: {reason}")
            result.not_offered.append(candidate.library)
            return False
        except Failure as failure:
            result.notes.append(f"{measured.label} failed: {failure}")
            return False
        measured.losses = list(answer["losses"])
        measured.setup = answer["seconds"] if again["seconds"] is None else again["seconds"]
        result.measured.append(measured)
        return True

    # ---- rounds --------------------------------------------------------------------------------------------------------------

    def rounds(
        self, candidates: Iterable[Candidate], notes: list[str], result: RowResult | None = None, abreast: int = 1
    ) -> None:
        """Measure them all against each other, always so many one right after the other. One that fails is left out from there on, and
        noted."""
        ready = [c for c in candidates if self._try(c, notes, self._calibrate)]
        for i in range(self.repeats):
            if result is not None:
                self._peaks(result)
            turn = i * abreast % max(len(ready), 1)
            self.say(f"{ready[0].row.name if ready else 'nothing'}: round {i + 1} of {self.repeats}")
            for candidate in ready[turn:] + ready[:turn]:
                if not self._try(candidate, notes, self._measure):
                    ready = [c for c in ready if c is not candidate]
                    candidate.result.times.clear()

    def _try(self, candidate: Candidate, notes: list[str], what: Callable[[Candidate], None]) -> bool:
        try:
            what(candidate)
        except Failure as failure:
            notes.append(f"{candidate.result.label} failed: {failure}")
            return False
        return True

    def _train(self, candidate: Candidate, steps: int) -> tuple[float, int]:
        time.sleep(PAUSE)
        process = self._processes[candidate.library]  # if it has died: a new one would not have the network
        answer = process.ask("train", 60 + 20 * self.seconds, row=candidate.row.name, way=candidate.way, steps=steps)
        return answer["seconds"], answer["steps"]

    def _calibrate(self, candidate: Candidate) -> None:
        """How many steps fill the time of a measurement; this warms up, too."""
        steps = 1
        while True:
            seconds, taken = self._train(candidate, steps)
            if seconds > self.seconds / 4:
                candidate.steps = max(ceil(self.seconds * taken / seconds), 1)
                return
            steps = ceil(taken * min(10.0, 0.5 * self.seconds / max(seconds, 1e-6)))

    def _measure(self, candidate: Candidate) -> None:
        after, times = self._cores.look(), list[float]()
        while len(times) <= RETAKEN:
            before = after
            seconds, taken = self._train(candidate, candidate.steps)
            times.append(seconds / taken)
            after = self._cores.look()
            if self._cores.all_there(before, after):
                break
        else:
            self.short += 1
            self._cores.fewer()
        self.retaken[candidate.library] = self.retaken.get(candidate.library, 0) + len(times) - 1
        candidate.result.times.append(times[-1])

    def _peaks(self, result: RowResult) -> None:
        """The highest rate over all rounds: what else ran on the machine can only have lowered it."""
        one, several = peak.measure(1), peak.measure(self.settings.threads)
        if one is not None and several is not None:
            result.peak_one = max(result.peak_one or 0.0, one)
            result.peak_all = max(result.peak_all or 0.0, several)


def check_agreement(measured: Sequence[Measured], tolerance: float, notes: list[str]) -> bool | None:
    """Whether all losses of the first steps agree, each with the median over all ways of all libraries, relative to 1 + |loss|.

    Sets each one's `deviation`. Returns None where fewer than two libraries can be compared.
    """
    if not measured:
        return None
    agreed = True
    middle = [median(values) for values in zip(*(m.losses for m in measured), strict=True)]
    for m in measured:
        off = [abs(a - b) / (1 + abs(b)) for a, b in zip(m.losses, middle, strict=True)]
        m.deviation = max(off) if all(d == d for d in off) else float("inf")  # NaN agrees with nothing
        for at, (d, value) in enumerate(zip(off, m.losses, strict=True)):
            if not d <= (tolerance if at else FIRST_TOLERANCE):
                notes.append(
                    f"{m.label}: loss {value:.7g} in step {at + 1} where {middle[at]:.7g} is the median of all; no ratio is given"
                )
                agreed = False
                break
    return agreed if len({m.library for m in measured}) > 1 else None
