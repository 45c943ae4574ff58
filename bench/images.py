"""Whole data sets of images, learnt until the test pictures are told apart: `python -m bench.images [TASK ...]`.

In: names of tasks. Out: the accuracy on 10,000 test pictures for each seed, its mean, the time, and PyTorch's for the same network, data,
optimizer, batches and epochs, changed pictures included. Runs are long, so each result is written into a file at once (`--json`) and
the table is of all that the file holds. Nothing but this needs the data, which `datasets` fetches.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from .datasets import DATA_SETS, FILES, Unavailable, folder_of
from .libraries import Settings
from .pool import environment

BEGIN, END = "<!-- bench of whole data sets: begin -->", "<!-- bench of whole data sets: end -->"
OURS, PEER = "chainrule", "PyTorch"
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Task:
    """Pictures and how they are learnt. network: "lenet" or "dense"; reach: the least accuracy, the mean of seeds; shift, rotate, scale,
    flip: of `Augment`; dropout: of the dense hidden layers; learning_rate: of AdamW, falling to 0 by half a cosine wave."""

    name: str
    title: str
    data: str
    network: str
    reach: float
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float = 0.0
    dropout: float = 0.0
    shift: int = 0
    rotate: float = 0.0
    scale: float = 0.0
    flip: bool = False


TASKS = {
    task.name: task
    for task in (
        Task("lenet", "MNIST, LeNet-5, 10 epochs", "mnist", "lenet", 0.990, 10, 64, 2e-3),
        Task("dense", "MNIST, 784-800-10, 30 epochs", "mnist", "dense", 0.984, 30, 128, 1e-3, 0.01, 0.2, 1, 10, 0.1),
        Task("fashion", "Fashion-MNIST, LeNet-5, 20 epochs", "fashion", "lenet", 0.900, 20, 64, 2e-3, 0.01, 0.2, flip=True),
    )
}


@dataclass(frozen=True)
class Learnt:
    """What one seed of a task came to with a library. seconds: of training, compiling included."""

    task: Task
    library: str
    seed: int
    accuracy: float
    seconds: float
    threads: int


def pictures(folder: Path, ending: str) -> tuple[Array, Array, Array, Array]:
    """x, y to learn from; x, y to test on."""
    from chainrule.data import read_images

    found: list[Array] = []
    for name in FILES[::2]:
        images = read_images(folder / (name + ending))
        assert images.codes is not None
        found += [images.pixels, images.codes]
    return found[0], found[1], found[2], found[3]


def network(task: Task, x: Array) -> Any:
    """In chainrule."""
    from chainrule import nn

    layers: list[Any] = [nn.Rescale()]
    if task.shift or task.rotate or task.scale or task.flip:
        layers.append(nn.Augment(task.shift, task.flip, task.rotate, task.scale))
    layers.append(nn.Rescale(1.0, float(x.mean() / 255), float(x.std() / 255)))
    dropout = [nn.Dropout(task.dropout)] if task.dropout else []
    if task.network == "dense":
        return nn.Sequential(*layers, nn.Flatten(), nn.Dense(800, "relu"), *dropout, nn.Dense(10))
    layers.append(nn.Reshape(*x.shape[1:], 1))
    for filters, padding in ((6, "same"), (16, "valid")):
        layers += [nn.Conv2D(filters, 5, padding=padding, activation="relu"), nn.MaxPool2D(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Dense(120, "relu"), *dropout, nn.Dense(84, "relu"), *dropout, nn.Dense(10))


def learn(task: Task, seed: int, threads: int, folder: Path) -> Learnt:
    """With chainrule."""
    from chainrule.optim import AdamW
    from chainrule.schedules import cosine

    x, y, x_test, y_test = pictures(folder, DATA_SETS[task.data].ending)
    net = network(task, x)
    optimizer = AdamW(cosine(task.learning_rate), weight_decay=task.weight_decay)
    begun = time.perf_counter()
    net.fit(
        x, y, loss="cross_entropy", optimizer=optimizer, epochs=task.epochs, batch_size=task.batch, seed=seed, threads=threads,
        verbose=False,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    return Learnt(task, OURS, seed, float(np.mean(net.predict(x_test).argmax(axis=1) == y_test)), seconds, threads)


def learn_peer(task: Task, seed: int, threads: int, folder: Path) -> Learnt:
    """With PyTorch, in a process of its own.

    Raises: `Unavailable` if it fails, for example because it is not installed.
    """
    script = Path(__file__).parent / "whole" / "images_torch.py"
    files = [str(folder / (name + DATA_SETS[task.data].ending)) for name in FILES]
    wanted = json.dumps({**asdict(task), "seed": seed, "threads": threads, "files": files})
    command = [sys.executable, str(script), wanted]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(Settings(threads, False, "native")), check=False
    )
    if done.returncode:
        raise Unavailable(f"PyTorch failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:200]}")
    accuracy, seconds = map(float, done.stdout.split()[-2:])
    return Learnt(task, PEER, seed, accuracy, seconds, threads)


LIBRARIES: dict[str, Callable[[Task, int, int, Path], Learnt]] = {OURS: learn, PEER: learn_peer}


def merged(old: Sequence[dict[str, Any]], new: Learnt) -> list[dict[str, Any]]:
    """All results: a newer one of the same task, library and seed takes the older one's place, and those of a task that is learnt in
    another way by now are gone."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(new)))
    kept = [r for r in old if (r["library"], r["seed"]) != (new.library, new.seed) or r["task"]["name"] != new.task.name]
    kept = [r for r in kept if r["task"] == plain["task"] or r["task"]["name"] != new.task.name]
    return [*kept, plain]


def table(results: Sequence[dict[str, Any]]) -> str:
    """In Markdown: a line for each task. The mean accuracy of all seeds, and the shortest time, for all compute the same amount."""
    lines = [
        "| 10,000 test pictures | chainrule | at least | seeds | shortest time | PyTorch | seeds | shortest time |",
        f"|{' --- |' * 8}",
    ]
    for task in TASKS.values():
        cells = []
        for library in LIBRARIES:
            own = [r for r in results if r["task"]["name"] == task.name and r["library"] == library]
            if not own:
                cells.append(("-", "-", "-"))
                continue
            right = mean(r["accuracy"] for r in own)
            missed = " (too little)" if library == OURS and right < task.reach else ""
            cells.append((f"{100 * right:.2f} %{missed}", str(len(own)), f"{min(r['seconds'] for r in own):.0f} s"))
        ours, peer = cells
        if ours[0] != "-" or peer[0] != "-":
            lines.append(f"| {' | '.join((task.title, ours[0], f'{100 * task.reach:.1f} %', *ours[1:], *peer))} |")
    return "\n".join(lines) + "\n"


def write(file: Path, made: str) -> None:
    """The table, between the marks of a Markdown file.

    Raises: SystemExit for a file without marks.
    """
    old = file.read_text(encoding="utf-8")
    if BEGIN not in old or END not in old:
        raise SystemExit(f"bench.images: {file} has no lines {BEGIN} and {END} between which the table belongs")
    pattern = f"{re.escape(BEGIN)}.*?{re.escape(END)}"
    file.write_text(re.sub(pattern, lambda _: f"{BEGIN}\n{made}{END}", old, count=1, flags=re.DOTALL), encoding="utf-8")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.images", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)}; nothing: all")
    parser.add_argument("--seed", type=int, action="append", help="repeatable (0, 1 and 2)")
    parser.add_argument("--only", choices=list(LIBRARIES), help="leave out the other library")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="for both libraries (all cores)")
    parser.add_argument("--json", type=Path, default=Path("images.json"), metavar="FILE", help="of all results (images.json)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, between the marks")
    chosen = parser.parse_args(given)
    if wrong := [name for name in chosen.tasks if name not in TASKS]:
        parser.error(f'there is no task "{wrong[0]}"; there are {", ".join(TASKS)}')
    return chosen


def main(given: Sequence[str] | None = None) -> int:
    """Learn, print, write. Returns 0; 1 where data or a library is missing."""
    chosen = arguments(given)
    results = json.loads(chosen.json.read_text(encoding="utf-8")) if chosen.json.exists() else []
    for task in (TASKS[name] for name in chosen.tasks or TASKS):
        for seed in chosen.seed or (0, 1, 2):
            for library in [chosen.only] if chosen.only else LIBRARIES:
                try:
                    learnt = LIBRARIES[library](task, seed, chosen.threads, folder_of(DATA_SETS[task.data]))
                except Unavailable as error:
                    print(f"bench.images: {error}", file=sys.stderr)
                    return 1
                print(f"{task.name}, {library}, seed {seed}: {100 * learnt.accuracy:.2f} %, {learnt.seconds:.1f} s", flush=True)
                results = merged(results, learnt)
                chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results), end="")
    if chosen.markdown is not None:
        write(chosen.markdown, table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
