"""The command line: train, predict, explain, check, demo.

In: arguments. Out: tables on the terminal, run folders and files; a mistake prints one message and exits with 2, no traceback.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

try:
    import click
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text
except ImportError as error:
    raise SystemExit(f"chainrule's command line needs {error.name}: pip install 'chainrule[cli]'") from None

import numpy as np

from .data import Table, read_table
from .data.read import original_rows
from .data.understand import Understanding, understand
from .errors import ChainruleError, GradientMismatch, UsageError
from .report import number, run_folder

if TYPE_CHECKING:
    from .experiment import Recipe, Run

F = TypeVar("F", bound=Callable[..., Any])
SHOWN = 40  # columns that the table of what was understood lists


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Exit codes: 0 done, 1 a demo or a check fell short, 2 a mistake in the call or the data, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no "≥" shows "?"
    try:
        code = commands.main(args=arguments, prog_name="chainrule", standalone_mode=False)
    except click.ClickException as problem:
        problem.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except ChainruleError as problem:
        click.echo(f"chainrule: {problem}", err=True)
        sys.exit(2)
    except BrokenPipeError:  # `chainrule explain RUN | head`
        sys.stderr.close()
        sys.exit(0)
    except OSError as problem:
        click.echo(f"chainrule: {problem.filename or ''}: {problem.strerror or problem}", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="chainrule")
def commands() -> None:
    """Trains neural networks by backpropagation, and shows every gradient.

    \b
    Example:  chainrule demo
              chainrule train houses.csv --target PRICE
    """


def reading_options(command: F) -> F:
    """The options on how a file is read."""
    for option in (
        click.option("--header/--no-header", default=None, help="Whether the first row of a CSV holds names. Default: it looks."),
        click.option("--missing", multiple=True, metavar="WORD", help='A further word that means missing, such as "?".'),
    ):
        command = option(command)
    return command


def _widths(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    if value.strip().lower() in ("", "none", "0"):
        return ()
    try:
        widths = tuple(int(part) for part in value.split(","))
    except ValueError:
        widths = (0,)
    if min(widths) < 1:
        raise click.BadParameter(f'"{value}" is no list of layer sizes; write 64,32 or none')
    return widths


@commands.command(short_help="Trains a network on a table or on images.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--target", metavar="COLUMN", help="The column to predict. Default: label, for IDX images.")
@click.option("--task", type=click.Choice(["regression", "classification"]), help="Default: decided by the target.")
@click.option("--drop", multiple=True, metavar="COLUMN", help="Leave a column out (repeat for more).")
@click.option("--keep", multiple=True, metavar="COLUMN", help="Learn from a column although it looks like an identifier.")
@click.option("--categorical", multiple=True, metavar="COLUMN", help="Its numbers are names of things.")
@click.option("--labels", type=click.Path(path_type=Path), help="For IDX images, the file of their labels.")
@reading_options
@click.option(
    "--hidden", default="128,64", show_default=True, callback=_widths, help="Units of the hidden layers; none for none."
)
@click.option("--activation", default="silu", show_default=True, help="After each hidden layer.")
@click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), default=1e-3, show_default=True)
@click.option("--weight-decay", type=click.FloatRange(0), default=0.1, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), help="Rows a step. Default: by the number of rows, 16 to 256.")
@click.option("--epochs", type=click.IntRange(1), default=100, show_default=True, help="At most.")
@click.option(
    "--patience", type=click.IntRange(1), default=20, show_default=True, help="Epochs without improvement before it stops."
)
@click.option("--validation", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.1, show_default=True)
@click.option(
    "--test", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.2, show_default=True, help="Held-out share."
)
@click.option("--log-target", is_flag=True, help="Learn the logarithm of a positive quantity, such as a price.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the network.")
@click.option("--split-seed", type=int, default=0, show_default=True, help="Of the choice of held-out rows.")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder. Default: runs/NAME, or the next that is free.")
@click.option("--overwrite", is_flag=True, help="Write into the run folder although it holds a run.")
@click.option("--quiet", is_flag=True, help="Only the scores.")
def train(data: Path, out: Path | None, overwrite: bool, quiet: bool, **options: Any) -> None:
    """Trains a network on DATA: CSV, Parquet, .npz, .npy or IDX images.

    \b
    Example:  chainrule train houses.csv --target PRICE --drop TAX
              chainrule train train-images-idx3-ubyte.gz --hidden 256,128
    """
    from . import experiment

    missing = options.pop("missing")
    if out is not None:
        run_folder(out, overwrite=overwrite)  # refuse before training, not after
    table = read_table(data, labels=options.pop("labels"), missing=missing, header=options.pop("header"))
    console = Console()
    facts = understand(
        table,
        _target(table, options.pop("target")),
        task=options.pop("task"),
        drop=options.pop("drop"),
        keep=options.pop("keep"),
        categorical=options.pop("categorical"),
    )
    if not quiet:
        _show_facts(console, facts)
    outcome = experiment.train(table, facts, _recipe(options), missing=missing, verbose=not quiet)
    folder = run_folder(out, overwrite=overwrite) if out is not None else run_folder(_free(Path("runs") / _stem(data)))
    experiment.write(folder, outcome)
    if not quiet:
        for name, value in experiment.summary(outcome)[3:]:
            console.print(f"{name}: {value}", highlight=False, markup=False)
    for note in outcome.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    _show_scores(console, f"Scores on {outcome.rows[1]:,} held-out rows", outcome.scores)
    console.print(f"run folder: {folder}", highlight=False, markup=False, soft_wrap=True)
    if not quiet:
        console.print(f"next: chainrule predict {folder} NEW.csv", highlight=False, markup=False, soft_wrap=True)


def _recipe(options: dict[str, Any]) -> Recipe:
    from .experiment import Recipe

    return Recipe(**{field.name: options[field.name] for field in fields(Recipe)})


def _target(table: Table, name: str | None) -> str:
    if name is not None:
        return name
    if "pixels" in table.columns and "label" in table.columns:
        return "label"
    raise UsageError(f"say which column to predict with --target. {table.source} has: {', '.join(list(table.columns)[:SHOWN])}")


def _stem(data: Path) -> str:
    return data.name.removesuffix(".gz").rsplit(".", 1)[0]


def _free(folder: Path) -> Path:
    """`folder`, or folder-2, folder-3, ...: the first that is not there."""
    choice, i = folder, 1
    while choice.exists():
        i += 1
        choice = folder.with_name(f"{folder.name}-{i}")
    return choice


@commands.command(short_help="Adds predictions to the rows of a file.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path, allow_dash=True), help="The file to write. Default: NAME-predictions.csv; - prints."
)
@click.option("--overwrite", is_flag=True, help="Write the file although it is there.")
@reading_options
def predict(run: Path, data: Path, out: Path | None, overwrite: bool, missing: tuple[str, ...], header: bool | None) -> None:
    """Adds a prediction, and for classes their probabilities, to the rows of DATA.

    \b
    Example:  chainrule predict runs/houses new.csv --out predicted.csv
    """
    from . import experiment

    out = out or Path(f"{_stem(data)}-predictions.csv")
    printed = str(out) == "-"
    if not printed and out.exists() and not overwrite:
        raise UsageError(f"{out} is there already: name another file with --out, or say --overwrite")
    known = experiment.read_run(run)
    table = read_table(data, missing=(*known.preparation.missing, *missing), header=header)
    columns, remarks, scores = experiment.predict(known, table)
    names, rows = original_rows(data, header=header) or _rows(table)
    _write_csv(None if printed else out, names, rows, columns)
    console = Console(stderr=printed)
    for line in remarks.lines():
        console.print(f"note: {line}", highlight=False, markup=False)
    if scores:
        _show_scores(console, f"Scores on these {table.rows:,} rows", {"this network": scores})
    if not printed:
        console.print(f"{table.rows:,} predictions: {out}", highlight=False, markup=False, soft_wrap=True)


def _rows(table: Table) -> tuple[list[str], list[list[str]]]:
    """The columns of a table that is no CSV, as text; blocks such as images are left out."""
    columns = {name: values for name, values in table.columns.items() if values.ndim == 1}
    if not columns:
        return ["row"], [[str(i)] for i in range(1, table.rows + 1)]
    return list(columns), [[str(v) for v in row] for row in zip(*(v.tolist() for v in columns.values()), strict=True)]


def _write_csv(out: Path | None, names: list[str], rows: list[list[str]], columns: dict[str, Any]) -> None:
    """The rows with new columns; one whose name is taken gets a number."""
    new = []
    for name in columns:
        choice, i = name, 1
        while choice in names or choice in new:
            i += 1
            choice = f"{name} {i}"
        new.append(choice)
    with nullcontext(sys.stdout) if out is None else open(out, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*names, *new])
        for row, added in zip(rows, zip(*(v.tolist() for v in columns.values()), strict=True), strict=True):
            writer.writerow([*row, *(f"{v:.6g}" if isinstance(v, float) else v for v in added)])


def sample_options(command: F) -> F:
    """The options on which rows a network is shown with."""
    for option in (
        click.option("--rows", type=click.IntRange(1), default=8, show_default=True, help="How many rows."),
        click.option("--data", type=click.Path(path_type=Path), help="Take the rows from a file. Default: random ones."),
    ):
        command = option(command)
    return command


@commands.command(short_help="Prints a network's forward pass, backward pass and update as equations.")
@click.argument("run", type=click.Path(path_type=Path))
@sample_options
@click.option("--form", type=click.Choice(["text", "latex", "html"]), default="text", show_default=True)
def explain(run: Path, data: Path | None, rows: int, form: str) -> None:
    """Prints the equations of a network's forward pass, backward pass and update.

    \b
    Example:  chainrule explain runs/houses
              chainrule explain runs/houses --form html > houses.html
    """
    from . import experiment
    from .explain import explain as explained

    known = experiment.read_run(run)
    x, y = _sample(known, data, rows)
    click.echo(getattr(explained(known.network, x, y), form))


@commands.command(short_help="Compares a network's gradients with central differences.")
@click.argument("run", type=click.Path(path_type=Path))
@sample_options
def check(run: Path, data: Path | None, rows: int) -> int:
    """Compares the gradients of a network with central differences, in double precision.

    \b
    Example:  chainrule check runs/houses
              chainrule check runs/houses --data houses.csv --rows 32
    """
    from . import experiment

    known = experiment.read_run(run)
    x, y = _sample(known, data, rows)
    try:
        click.echo(str(known.network.check_gradients(x, y, loss=known.preparation.target.loss)))
    except GradientMismatch as found:
        click.echo(str(found))
        return 1
    return 0


def _sample(run: Run, data: Path | None, rows: int) -> tuple[Any, Any]:
    """(x, y) of some rows of a file, or random ones."""
    code = run.preparation.target
    if data is not None:
        table = read_table(data, missing=run.preparation.missing)
        table = table.take(np.arange(min(rows, table.rows)))
        return run.preparation.apply(table)[0], code.encode(table.column(code.name))
    draw = np.random.default_rng(0)
    x = draw.normal(size=(rows, len(run.preparation.features))).astype(np.float32)
    y = draw.normal(size=rows).astype(np.float32) if code.task == "regression" else draw.integers(0, len(code.classes), rows)
    return x, y


@commands.command(short_help="Trains networks on XOR, digits, tumours and houses.")
@click.argument("name", type=click.Choice(["xor", "digits", "tumours", "houses", "all"]), default="all")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Folder for the run folders."
)
@click.option("--quiet", is_flag=True, help="Only the table of scores.")
def demo(name: str, out: Path, quiet: bool) -> int:
    """Trains networks on XOR, handwritten digits, tumours and houses.

    \b
    Example:  chainrule demo digits
    """
    from .demo import DEMOS, run_demo

    console = Console()

    def say(line: str) -> None:
        if not quiet:
            console.print(f"\n{line}", style="bold", highlight=False, markup=False)

    chosen = list(DEMOS.values()) if name == "all" else [DEMOS[name]]
    results = [run_demo(one, out, say=say, verbose=not quiet) for one in chosen]
    grid = Grid(
        "", "score", "network", "linear model", "simplest", "to reach", "seconds", title="Held-out scores beside their baselines"
    )
    for result in results:
        values = [number(v) for v in result.scores.values()]
        over = f", mean of {len(result.folders)}" if len(result.folders) > 1 else ""
        mark = Text(values[0], style="bold green" if result.reached else "bold red")
        sign = "≤" if result.demo.smaller else "≥"
        reach = f"{sign} {number(result.demo.reach)}"
        grid.add_row(result.demo.name, result.demo.metric + over, mark, *values[1:], reach, f"{result.seconds:.1f}")
    console.print()
    console.print(grid)
    console.print(
        "simplest: always the mean or the most frequent class; xor has no other rows than the four it learns", highlight=False
    )
    console.print("run folders, each with a report.html:", highlight=False)
    for result in results:
        for folder in result.folders:
            console.print(f"  {folder}", highlight=False, markup=False, soft_wrap=True)
    missed = [result.demo.name for result in results if not result.reached]
    if missed:
        console.print(f"not reached: {', '.join(missed)}", style="bold red")
    return 1 if missed else 0


def _show_facts(console: Console, facts: Understanding) -> None:
    """What was understood, as a short table."""
    console.print(
        f"{facts.source}: {facts.rows:,} rows, {len(facts.columns) + 1} columns", style="bold", highlight=False, markup=False
    )
    grid = Grid("column", "is", "missing", "distinct", "")
    for column in facts.columns[:SHOWN]:
        style = "" if column.used else "dim"
        distinct = f"{column.distinct:,}" if column.distinct else ""
        grid.add_row(
            Text(column.name),
            column.kind,
            f"{column.missing:,}" if column.missing else "",
            distinct,
            Text(column.remark),
            style=style,
        )
    classes = f" ({', '.join(map(str, facts.classes[:8]))}{', ...' if len(facts.classes) > 8 else ''})" if facts.classes else ""
    grid.add_section()
    grid.add_row(Text(facts.target), "target", "", "", Text(f"{facts.task}{classes}: {facts.reason}"))
    console.print(grid)
    if len(facts.columns) > SHOWN:
        console.print(f"... and {len(facts.columns) - SHOWN:,} more columns", highlight=False)
    for note in facts.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _show_scores(console: Console, title: str, scores: dict[str, dict[str, float]]) -> None:
    """Models beside each other, one metric a column."""
    metrics = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    grid = Grid("", *metrics, title=title)
    for i, (model, values) in enumerate(scores.items()):
        grid.add_row(model, *(number(values[m]) if m in values else "" for m in metrics), style="bold" if i == 0 else "")
    console.print(grid)


if __name__ == "__main__":
    main()
