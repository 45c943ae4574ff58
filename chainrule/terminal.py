"""What the command line shows on a terminal: lines, and tables that are legible without colours, in any encoding, on 80 columns.

In: facts, scores, results of demos. Out: text on a console; names that come from data are escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from .data.understand import Understanding
from .report import plain, scored, short

if TYPE_CHECKING:
    from .demo import Result

SHOWN = 40  # columns that the table of what was understood lists


def say(console: Console, line: str, style: str = "", *, path: bool = False) -> None:
    """A line as it is: no markup, no colours guessed; broken between words on a terminal, unless it holds a `path` to copy."""
    console.print(Text(plain(line), style=style), soft_wrap=path or not console.is_terminal)


def show_results(console: Console, results: Sequence[Result]) -> None:
    """The scores of all demos beside their baselines, and where the runs lie."""
    grid = grid_of(
        "Scores on held-out rows, beside their baselines", "", "score", "network", "linear", "simplest", "goal", "seconds"
    )
    for result in results:
        metric = result.demo.metric
        network, *others = (scored(metric, value) for value in list(result.scores.values())[:3])
        over = f", {len(result.folders)} seeds" if len(result.folders) > 1 else ""
        goal = f"{'<=' if result.demo.smaller else '>='} {scored(metric, result.demo.reach)}"
        mark = Text(network, style="bold green" if result.reached else "bold red")
        grid.add_row(result.demo.name, metric + over, mark, *others, goal, f"{result.seconds:.1f}")
    console.print()
    console.print(grid)
    say(console, "linear: linear or logistic model; simplest: mean, commonest class, last value")
    if any(result.demo.everything for result in results):
        say(console, "xor is scored on the four rows that it learns: there are no others")
    say(console, "\nrun folders, each with the network, its history and a report.html:")
    for result in results:
        for folder in result.folders:
            say(console, f"  {folder}", path=True)


def grid_of(title: str, *columns: str, right: int = 2) -> Grid:
    """A table that is legible without colours and in any encoding; columns from the `right`th on hold numbers."""
    grid = Grid(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        grid.add_column(column, justify="right" if i >= right else "left", overflow="fold")
    return grid


def show_facts(console: Console, facts: Understanding) -> None:
    """What was understood, as a short table."""
    title = f"{short(facts.source)}: {facts.rows:,} rows, {len({facts.target, *(c.name for c in facts.columns)})} columns"
    grid = Grid(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column, justify in (("column", "left"), ("kind", "left"), ("missing", "right"), ("distinct", "right"), ("", "left")):
        grid.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]  # a literal each
    for facts_on in facts.columns[:SHOWN]:
        grid.add_row(
            Text(short(facts_on.name)),
            facts_on.kind,
            f"{facts_on.missing:,}" if facts_on.missing else "",
            f"{facts_on.distinct:,}" if facts_on.distinct else "",
            Text(short(facts_on.remark, 200)),
            style="" if facts_on.used else "dim",
        )
    if len(facts.columns) > SHOWN:
        grid.add_row(f"... {len(facts.columns) - SHOWN:,} more", "", "", "", "")
    console.print(grid)
    classes = f": {_listed(facts.classes)}" if facts.classes else ""
    say(console, f"target: {short(facts.target)}, {facts.task}, {short(facts.reason, 200)}{classes}")
    for note in facts.notes:
        say(console, f"note: {note}")


def _listed(labels: Iterable[object], most: int = 8) -> str:
    """The first few, each short."""
    words = [short(label, 30) for label in labels]
    return ", ".join(words[:most]) + (f", ... ({len(words)})" if len(words) > most else "")


def show_scores(console: Console, title: str, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Models beside each other, one metric a column."""
    metrics = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    grid = grid_of(title, "", *metrics, right=1)
    console.print()
    for i, (model, values) in enumerate(scores.items()):
        cells = [scored(m, values[m]) if m in values else "" for m in metrics]
        grid.add_row(model, *cells, style="bold" if i == 0 else "")
    console.print(grid)
