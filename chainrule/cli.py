"""The command line: train, predict, explain, check, demo.

In: arguments. Out: tables on the terminal, run folders and files; a mistake prints one message and exits with 2, no traceback.
Names that come from data are shown with their control characters escaped, so that no file can steer the terminal.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import shlex
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

try:
    import click
    from rich.console import Console
except ImportError as error:
    raise SystemExit(f"chainrule's command line needs {error.name}: pip install 'chainrule[cli]'") from None


from .data import Table, read_images, read_table
from .data.images import ENDINGS, holds_images
from .data.read import file_bytes, original_rows
from .data.understand import understand
from .errors import ChainruleError, GradientMismatch, UsageError
from .report import counted, plain, run_folder, short, write_text
from .sizes import bytes_of
from .terminal import SHOWN, say, show_facts, show_results, show_scores

if TYPE_CHECKING:
    from .demo import Result
    from .experiment import Outcome, Recipe
    from .images import ImageOutcome, ImageRun
    from .runs import Run
    from .text import TextOutcome, TextRun

F = TypeVar("F", bound=Callable[..., Any])
LONGEST = 2_000  # characters of a message: more come from data, such as a name of a megabyte
MISTAKE, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Exit codes: 0 done, 1 a demo or a check fell short, 2 a mistake in the call or the data, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no "≥" shows "?"
    try:
        code = commands.main(args=arguments, prog_name="chainrule", standalone_mode=False)
        sys.stdout.flush()  # a full disk or a closed pipe shows here, not after the end
    except click.ClickException as problem:
        where = problem.ctx.command_path if isinstance(problem, click.UsageError) and problem.ctx else "chainrule"
        _fail(f"{problem.format_message()}\nTry {where} --help")
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(INTERRUPTED)
    except ChainruleError as problem:
        _fail(str(problem))
    except BrokenPipeError:  # `chainrule explain RUN | head`
        sys.stderr.close()
        sys.exit(0)
    except OSError as problem:
        _fail(f"{problem.filename or 'output'}: {problem.strerror or problem}")
    except MemoryError:
        _fail("there is not enough memory for this: take fewer rows, fewer columns or a smaller network")
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    message = plain(message)
    click.echo(f"chainrule: {message[:LONGEST]}{' ...' if len(message) > LONGEST else ''}", err=True)
    sys.exit(MISTAKE)


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


class Amount(click.FloatRange):
    """A number within bounds; NaN, which no comparison refuses, and infinity are outside all of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


class Test(Amount):
    """A share, or the path of what to test on."""

    def __init__(self) -> None:
        super().__init__(0, 1, min_open=True, max_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            float(value)
        except ValueError:
            return Path(value)
        return super().convert(value, param, ctx)


def _widths(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    if value.strip().lower() in ("", "none", "0"):
        return ()
    try:
        widths = tuple(int(part) for part in value.split(","))
    except ValueError:
        widths = (0,)
    if min(widths) < 1:
        raise click.BadParameter(f'"{value}" is no list of layer sizes; write 64,32 or none')
    return widths


def _pair(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        every, back = map(int, value.split(","))
    except ValueError:
        raise click.BadParameter(f'"{value}" is no pair of numbers; write 16,32') from None
    return every, back


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    return None if value is None else bytes_of(value)


@commands.command(short_help="Trains a network on a table or on images.")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--target", metavar="COLUMN", help="The column to predict. Default: label, beside pixels.")
@click.option("--task", type=click.Choice(["regression", "classification"]), help="Default: decided by the target.")
@click.option("--drop", multiple=True, metavar="COLUMN", help="Leave a column out (repeat for more).")
@click.option("--keep", multiple=True, metavar="COLUMN", help="Learn from a column although it looks like an identifier.")
@click.option("--categorical", multiple=True, metavar="COLUMN", help="Its numbers are names of things.")
@click.option("--labels", type=click.Path(path_type=Path), help="For IDX images, the file of their labels.")
@click.option(
    "--size", type=click.IntRange(1, 1024), nargs=2, metavar="H W", help="Of images in a folder. Default: as most have, up to 64."
)
@reading_options
@click.option(
    "--sequence",
    type=click.IntRange(1),
    metavar="LENGTH",
    help="The rows are in the order of time: forecast from windows of LENGTH rows. Of a text: characters read at a time [64].",
)
@click.option("--horizon", type=click.IntRange(1), metavar="ROWS", help="With --sequence: how many rows ahead. Default: 1.")
@click.option("--time", metavar="COLUMN", help="With --sequence: the column that orders the rows. Default: the first of dates.")
@click.option("--gaps", is_flag=True, default=None, help="With --sequence: go on although dates leave something out.")
@click.option(
    "--season", type=click.IntRange(1), metavar="ROWS", help="With --sequence: of the seasonal baseline. Default: by the dates."
)
@click.option("--characters", is_flag=True, help="DATA is a text: learn to write on, character by character.")
@click.option("--cell", type=click.Choice(["gru", "lstm", "rnn"]), help="Of --sequence and --characters. Default: gru.")
@click.option("--sample", type=click.IntRange(0), metavar="N", help="Of --characters: samples of N characters. Default: 300.")
@click.option(
    "--temperature", type=Amount(0), multiple=True, help="Of --characters: a sample for each temperature. Default: 0.5 and 1."
)
@click.option(
    "--truncate",
    callback=_pair,
    metavar="K1,K2",
    help="Of --characters: an update every K1 characters of a window, whose gradient goes back K2. Default: one for each window.",
)
@click.option(
    "--memory",
    callback=_bytes,
    metavar="AMOUNT",
    help="Of --sequence and --characters: so much, such as 64MB, is kept at most between forward and backward pass.",
)
@click.option("--augment/--no-augment", default=None, help="Shift, turn and scale images a little at random. Default: yes.")
@click.option("--flip", is_flag=True, default=None, help="Mirror half of the images, left for right: not for letters.")
@click.option("--filters", callback=_widths, help="Of the convolutions over images; none for none. Default: 8,16.")
@click.option("--hidden", callback=_widths, help="Units of the hidden layers; none for none. Default: 128,64 [32; 128; 128].")
@click.option("--activation", help="After each hidden layer. Default: silu [tanh, of rnn; -; relu].")
@click.option("--dropout", type=Amount(0, 1, max_open=True), help="Default: 0.1 [0; 0].")
@click.option(
    "--learning-rate",
    type=Amount(0, min_open=True),
    help="At the start; it falls to 0 by half a cosine wave. Default: 0.002 [0.003; 0.004].",
)
@click.option("--weight-decay", type=Amount(0), help="Default: 0.3 [0.1; 0.01].")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    help="Rows a step. Default: by the number of rows, 16 to 512 [16 to 512; 8 to 32; 16 to 128].",
)
@click.option("--epochs", type=click.IntRange(1), help="At most. Default: by the number of rows, 20 to 100 [20 to 100; 2 to 60].")
@click.option("--patience", type=click.IntRange(1), help="Epochs without improvement before it stops. Default: 30 [30; 5].")
@click.option(
    "--validation",
    type=Amount(0, 1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the training rows that decides when to stop (the last, in time); 0 trains on all of them to the last epoch.",
)
@click.option(
    "--test",
    type=Test(),
    metavar="SHARE|IMAGES",
    help="Held-out share; the last rows, in time. Default: 0.2. Of images also a file or folder of those to test on.",
)
@click.option("--log-target", is_flag=True, default=None, help="Learn the logarithm of a positive quantity, such as a price.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of the network.")
@click.option("--split-seed", type=click.IntRange(0, 2**32 - 1), help="Of the choice of held-out rows. Default: 0.")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder. Default: runs/NAME, or the next that is free.")
@click.option("--overwrite", is_flag=True, help="Write into the run folder although it holds a run.")
@click.option("--quiet", is_flag=True, help="Only the scores.")
def train(data: Path, out: Path | None, overwrite: bool, quiet: bool, characters: bool, **options: Any) -> int:
    """Trains a network on DATA: a table in CSV, Parquet, .npz or .npy; with --sequence a table in the order of time, with
    --characters a text; images in an IDX file or a folder that has a folder of PNG and JPEG for each class. Defaults in brackets: those
    with --sequence; with --characters; of images, where they differ.

    \b
    Example:  chainrule train houses.csv --target PRICE --drop TAX
              chainrule train train-images-idx3-ubyte.gz --hidden 256,128 --filters 16,32
              chainrule train train-images-idx3-ubyte.gz --test t10k-images-idx3-ubyte.gz
              chainrule train flowers/ --size 32 32
              chainrule train demand.csv --target MW --sequence 48 --horizon 24
              chainrule train book.txt --characters
              chainrule train book.txt --characters --sequence 512 --truncate 32,64 --memory 16MB
    """
    console = Console()
    with _run_folder(out, data, overwrite) as folder:  # refused before training, not after
        if characters:
            return _train_text(console, data, folder, quiet, options)
        if holds_images(data):
            return _train_images(console, data, folder, quiet, options)
        return _train_table(console, data, folder, quiet, options)


def _train_table(console: Console, data: Path, folder: Path, quiet: bool, options: dict[str, Any]) -> int:
    from . import experiment, series

    in_time = options["sequence"] is not None
    missing = options["missing"]
    read = partial(read_table, data, labels=options["labels"], missing=missing, header=options["header"])
    try:
        recipe = _recipe(series.SeriesRecipe if in_time else experiment.Recipe, options, READING)
    except UsageError:
        read()  # a damaged file of pictures was taken for a table: then that is what is wrong
        raise
    table = read()
    target = _target(table, options["target"])
    columns = {name: options[name] for name in ("task", "drop", "keep", "categorical")}
    if isinstance(recipe, series.SeriesRecipe):
        recipe, notes = recipe.ordered(table)
        facts = series.understand_series(table, target, recipe, notes, **columns)
    else:
        facts = understand(table, target, **columns)
    if not quiet:
        show_facts(console, facts)
    if isinstance(recipe, series.SeriesRecipe):
        outcome = series.train_series(table, facts, recipe, missing=missing, verbose=not quiet)
    else:
        outcome = experiment.train(table, facts, recipe, missing=missing, verbose=not quiet)
    experiment.write(folder, outcome)
    title = f"Scores on {outcome.rows[1]:,} {outcome.judged}"
    return _show_outcome(console, outcome, experiment.summary(outcome)[3:], title, folder, quiet, "NEW.csv")


def _train_text(console: Console, data: Path, folder: Path, quiet: bool, options: dict[str, Any]) -> int:
    from . import text
    from .data.characters import read_text

    recipe = _recipe(text.TextRecipe, options, ())
    content, notes = read_text(data)
    if not quiet:
        say(console, f"{short(data.name)}: {len(content):,} characters, {len(set(content)):,} distinct")
    outcome = text.train_text(data.name, content, recipe, notes=notes, verbose=not quiet)
    text.write_text_run(folder, outcome)  # before the samples, which can be interrupted
    outcome = text.sampled(outcome)
    text.write_text_run(folder, outcome)
    title = f"Scores on the last {outcome.characters[1]:,} characters"
    code = _show_outcome(console, outcome, text.summary(outcome)[1:], title, folder, quiet, '--prompt "Once"')
    for heading, written in outcome.samples:
        say(console, f"\n{heading}:", "bold")
        say(console, written.expandtabs(4))
    return code


def _train_images(console: Console, data: Path, folder: Path, quiet: bool, options: dict[str, Any]) -> int:
    from . import images

    apart = options["test"] if isinstance(options["test"], Path) else None
    if apart is not None:
        options = {**options, "test": None}
    recipe = _recipe(images.ImageRecipe, options, ("labels", "size"))
    pictures = read_images(data, labels=options["labels"], size=options["size"])
    test = None if apart is None else read_images(apart, size=pictures.size, colour=pictures.colour)
    if not quiet:
        classes = counted(len(pictures.classes), "class", "classes")
        say(console, f"{short(pictures.source)}: {counted(pictures.rows, 'picture')} of {classes}")
    outcome = images.train_images(pictures, recipe, test, verbose=not quiet)
    images.write_image_run(folder, outcome)
    title = f"Scores on {counted(outcome.held.rows, 'held-out picture')}"
    return _show_outcome(console, outcome, images.summary(outcome)[1:], title, folder, quiet, "NEW.png")


def _show_outcome(
    console: Console,
    outcome: Outcome | TextOutcome | ImageOutcome,
    facts: Iterable[tuple[str, str]],
    title: str,
    folder: Path,
    quiet: bool,
    use: str,
) -> int:
    """What training came to and where it lies; the exit code."""
    if not quiet:
        for name, value in facts:
            say(console, f"{name}: {value}")
    for note in outcome.notes:
        say(console, f"note: {note}")
    show_scores(console, title, outcome.scores)
    say(console, f"run folder: {folder}, with report.html", path=True)
    if outcome.failure or outcome.interrupted:
        what = "training diverged" if outcome.failure else "interrupted"
        click.echo(f"chainrule: {what}; what had been learnt until then is saved in {plain(str(folder))}", err=True)
        return MISTAKE if outcome.failure else INTERRUPTED
    if not quiet:
        say(console, f"next: chainrule predict {shlex.quote(str(folder))} {use}", path=True)
    return 0


@contextmanager
def _run_folder(out: Path | None, data: Path, overwrite: bool) -> Iterator[Path]:
    """The folder for a run, made at once so that nothing is learnt in vain; what was made is removed again if nothing gets into it."""
    folder = _free(Path("runs") / _stem(data)) if out is None else out
    holds_pictures = data.is_dir() and any(f.is_dir() or f.suffix.lower() in ENDINGS for f in data.iterdir())
    if holds_pictures and folder.resolve().is_relative_to(data.resolve()):
        raise UsageError(
            f"the run folder {folder} would lie in {data}, where each folder is a class: name another place with --out"
        )
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, made)
        claim = _claimed(run_folder(folder, overwrite=overwrite))
        try:
            stack.enter_context(claim)
        except UsageError:
            stack.pop_all()  # what is there, empty until it has learnt, is the other run's
            raise
        stack.callback(_remove_empty, made)  # before anybody else may claim it
        yield run_folder(folder, overwrite=overwrite)  # another run may have ended there in between


def _remove_empty(folders: Sequence[Path]) -> None:
    """Each inside the next: up to the first in which there is something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Nobody else may claim the folder meanwhile: a lock of the operating system, which ends with the process. Windows has none for
    folders, nor has a folder that may be written to but not read: there two runs at once are not kept apart.

    Raises: `UsageError` if somebody else has claimed it.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"another run is being written to {folder}: name another folder") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


R = TypeVar("R", bound="Recipe")
READING = ("target", "task", "drop", "keep", "categorical", "labels", "header", "missing")


def _recipe(kind: type[R], options: Mapping[str, Any], further: Iterable[str]) -> R:
    """The recipe with the options that were given; the others keep its own defaults.

    Raises: `UsageError` for an option that was given and is neither a part of this recipe nor one of `further`.
    """
    known = {field.name for field in fields(kind)} - kind.UNUSED
    given = {
        name: value for name, value in options.items() if value is not None and (value != () or name in ("hidden", "filters"))
    }
    if isinstance(given.get("test"), Path):
        raise UsageError(
            f"--test is the share of rows to hold out, above 0 and below 1, not {given['test']}; only of images, a file too"
        )
    stray = [name for name in given if name not in known and name not in further]
    if stray:
        raise UsageError(f"--{stray[0].replace('_', '-')} means nothing {kind.SETTING}: leave it out")
    return kind(**{name: value for name, value in given.items() if name in known})


def _target(table: Table, name: str | None) -> str:
    if name is not None:
        return name
    if "pixels" in table.columns and "label" in table.columns:
        return "label"
    raise UsageError(
        f"say which column to predict with --target. {table.source} has: {', '.join(map(short, list(table.columns)[:SHOWN]))}"
    )


def _stem(data: Path) -> str:
    """A file's name without its endings, fit to name another file: "..csv" and the like become "data".

    >>> _stem(Path("x/houses.v2.csv.gz")), _stem(Path("...csv")), _stem(Path("a\\nb.csv"))
    ('houses.v2', 'data', 'a_b')
    """
    stem = data.name.removesuffix(".gz").rsplit(".", 1)[0].lstrip(".- ")[:100].rstrip(". ")
    return re.sub(r'[\x00-\x1f\x7f-\x9f\ud800-\udfff<>:"/\\|?*]', "_", stem) or "data"


def _free(folder: Path) -> Path:
    """`folder`, or folder-2, folder-3, ...: the first that is not there."""
    choice, i = folder, 1
    while choice.exists() or choice.is_symlink():
        i += 1
        choice = folder.with_name(f"{folder.name}-{i}")
    return choice


@commands.command(short_help="Adds predictions to the rows of a file, or writes a text on.")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path), required=False)
@click.option(
    "--out", type=click.Path(path_type=Path, allow_dash=True), help="The file to write. Default: NAME-predictions.csv; - prints."
)
@click.option("--overwrite", is_flag=True, help="Write the file although it is there.")
@reading_options
@click.option("--prompt", metavar="TEXT", help="Of a character model: the text that it writes on.")
@click.option(
    "--sample", type=click.IntRange(1), default=300, show_default=True, metavar="N", help="How many characters it writes."
)
@click.option("--temperature", type=Amount(0), default=0.7, show_default=True, help="0: always the likeliest; 1: as it learnt.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of what it writes.")
def predict(run: Path, data: Path | None, prompt: str | None, sample: int, temperature: float, seed: int, **options: Any) -> None:
    """Adds a prediction, and for classes their probabilities, to the rows of DATA, or to the names of its images; a character model
    writes a text on.

    \b
    Example:  chainrule predict runs/houses new.csv --out predicted.csv
              chainrule predict runs/flowers photo.jpg --out -
              chainrule predict runs/book --prompt "Once upon a time"
    """
    from .images import ImageRun
    from .runs import Run, read_run
    from .text import sample as written

    known = read_run(run)
    if isinstance(known, Run):
        data = _only_file(data, prompt, f"{run} is the run of a table: name the file of rows")
        return _write_predictions(partial(_of_rows, known), data, **options)
    if isinstance(known, ImageRun):
        data = _only_file(data, prompt, f"{run} is an image classifier: name a picture, a folder or an IDX file")
        return _write_predictions(partial(_of_images, known), data, **options)
    if prompt is None or data is not None:
        raise UsageError(f'{run} is a character model: give it a text to write on, --prompt "...", and no file')
    if strange := sorted(set(prompt) - set(known.alphabet.characters)):
        click.echo(f"chainrule: characters that the network has not learnt: {' '.join(map(short, strange))}", err=True)
    click.echo(plain((prompt + written(known.network, known.alphabet, prompt, sample, temperature, seed)).expandtabs(4)))


def _only_file(data: Path | None, prompt: str | None, what: str) -> Path:
    if data is None or prompt is not None:
        raise UsageError(f"{what} to predict, without --prompt")
    return data


def _write_predictions(
    made_by: Callable[..., _Predictions], data: Path, out: Path | None, overwrite: bool, **reading: Any
) -> None:
    """Writes the predictions for a file, and says what there is to say."""
    out = out or Path(f"{_stem(data)}-predictions.csv")
    printed = str(out) == "-"
    if not printed:
        _check_output(out, overwrite)
    made = made_by(data, **reading)
    _write_csv(None if printed else out, made.names, made.rows, made.columns)
    console = Console(stderr=printed)
    for line in made.remarks:
        say(console, f"note: {line}")
    if made.scores:
        these = "this" if made.what.startswith("1 ") else "these"
        show_scores(console, f"Scores on {these} {made.what}", {"this network": made.scores})
    if not printed:
        say(console, f"{counted(made.count, 'prediction')}: {out}", path=True)


@dataclass(frozen=True)
class _Predictions:
    """names, rows: the columns that were there; columns: those to add; what: the rows, in words; count: how many predictions."""

    names: list[str]
    rows: list[list[str]]
    columns: Mapping[str, Any]
    remarks: list[str]
    scores: Mapping[str, float] | None
    what: str
    count: int


def _of_rows(known: Run, data: Path, missing: tuple[str, ...], header: bool | None) -> _Predictions:
    from . import runs

    content = file_bytes(data)
    table = read_table(data, missing=(*known.preparation.missing, *missing), header=header, data=content)
    columns, remarks, scores = runs.predict(known, table)
    names, rows = original_rows(data, header=header, data=content) or _rows(table)
    window = known.preparation.window
    count = table.rows if window is None else table.rows - window.length + 1
    return _Predictions(names, rows, columns, remarks, scores, counted(table.rows, "row"), count)


def _of_images(known: ImageRun, data: Path, missing: tuple[str, ...], header: bool | None) -> _Predictions:
    from .images import predict_images

    if missing or header is not None:
        raise UsageError("--missing and --header are for tables: leave them out")
    pictures = read_images(data, size=known.seen.size, colour=known.seen.colour)
    columns, remarks, scores = predict_images(known, pictures)
    rows = [[name] for name in pictures.names]
    return _Predictions(["picture"], rows, columns, remarks, scores, counted(pictures.rows, "picture"), pictures.rows)


def _check_output(out: Path, overwrite: bool) -> None:
    """Refuses a file that is there, or cannot be, before anything is computed."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder: name a file with --out")
    if (out.exists() or out.is_symlink()) and not overwrite and not _is_stream(out):
        raise UsageError(f"{out} is there already: name another file with --out, or say --overwrite")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent} to write {out.name} into")
    if not os.access(out.parent, os.W_OK | os.X_OK) and not _is_stream(out):
        raise UsageError(f"the folder {out.parent} cannot be written to: name another place with --out")


def _is_stream(out: Path) -> bool:
    """Whether it is a pipe or a device, such as /dev/null, which cannot be replaced by a new file."""
    return out.exists() and not stat.S_ISREG(out.stat().st_mode)


def _rows(table: Table) -> tuple[list[str], list[list[str]]]:
    """The columns of a table that is no CSV, as text; blocks such as images are left out."""
    columns = {name: values for name, values in table.columns.items() if values.ndim == 1}
    if not columns:
        return ["row"], [[str(i)] for i in range(1, table.rows + 1)]
    return list(columns), [[str(v) for v in row] for row in zip(*(v.tolist() for v in columns.values()), strict=True)]


def _write_csv(out: Path | None, names: list[str], rows: list[list[str]], columns: Mapping[str, Any]) -> None:
    """The rows with new columns; one whose name is taken gets a number."""
    new = []
    for name in columns:
        choice, i = name, 1
        while choice in names or choice in new:
            i += 1
            choice = f"{name} {i}"
        new.append(choice)
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow([*names, *new])
    for row, added in zip(rows, zip(*(v.tolist() for v in columns.values()), strict=True), strict=True):
        writer.writerow([*row, *(_cell(v) for v in added)])
    if out is None:
        sys.stdout.write(content.getvalue())
    elif _is_stream(out):
        out.write_text(content.getvalue(), encoding="utf-8", newline="")
    else:
        write_text(out, content.getvalue())


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}" if value == value else ""
    return value


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
@click.option("--numbers", is_flag=True, help="Show the values of these rows too.")
@click.option("--form", type=click.Choice(["text", "latex", "html"]), default="text", show_default=True)
def explain(run: Path, data: Path | None, rows: int, numbers: bool, form: str) -> None:
    """Prints the equations of a network's forward pass, backward pass and update.

    \b
    Example:  chainrule explain runs/houses
              chainrule explain runs/houses --form html > houses.html
              chainrule explain runs/houses --data houses.csv --rows 2 --numbers
    """
    from .explain import explain as explained
    from .runs import read_run

    known = read_run(run)
    x, y = _sample(known, data, rows)
    click.echo(getattr(explained(known.network, x, y, numbers=numbers, optimizer=known.optimizer), form))


@commands.command(short_help="Compares a network's gradients with central differences.")
@click.argument("run", type=click.Path(path_type=Path))
@sample_options
def check(run: Path, data: Path | None, rows: int) -> int:
    """Compares the gradients of a network with central differences, in double precision.

    \b
    Example:  chainrule check runs/houses
              chainrule check runs/houses --data houses.csv --rows 32
    """
    from .runs import read_run

    known = read_run(run)
    x, y = _sample(known, data, rows)
    try:
        click.echo(str(known.network.check_gradients(x, y, loss=known.loss)))
    except GradientMismatch as found:
        click.echo(str(found))
        return 1
    return 0


def _sample(run: Run | TextRun | ImageRun, data: Path | None, rows: int) -> tuple[Any, Any]:
    """(x, y) of some rows of a file, or random ones."""
    from .images import ImageRun
    from .runs import Run

    if data is None:
        return run.sample(rows, None)
    if isinstance(run, ImageRun):
        return run.sample(rows, read_images(data, size=run.seen.size, colour=run.seen.colour))
    return run.sample(rows, read_table(data, missing=run.preparation.missing if isinstance(run, Run) else ()))


@commands.command(short_help="Trains networks on XOR, digits, tumours, houses, sunspots and images.")
@click.argument("name", type=click.Choice(["xor", "digits", "tumours", "houses", "series", "images", "all"]), default="all")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True, help="Folder for the run folders."
)
@click.option("--quiet", is_flag=True, help="Only the table of scores.")
def demo(name: str, out: Path, quiet: bool) -> int:
    """Trains networks on XOR, handwritten digits, tumours, houses, the series of sunspots and images of digits.

    \b
    Example:  chainrule demo digits
    """
    from .demo import DEMOS, run_demo

    console = Console()

    def announce(line: str) -> None:
        if not quiet:
            say(console, line, "bold")

    results: list[Result] = []
    stopped = False
    for one in DEMOS.values() if name == "all" else [DEMOS[name]]:
        try:
            results.append(run_demo(one, out, say=announce, verbose=not quiet))
        except KeyboardInterrupt:
            stopped = True
            break
    if results:
        show_results(console, results)
    if stopped:
        click.echo("chainrule: interrupted; the run folders of the networks trained until then are kept", err=True)
        return INTERRUPTED
    missed = [result.demo.name for result in results if not result.reached]
    if missed:
        say(console, f"not reached: {', '.join(missed)}", "bold red")
    return 1 if missed else 0


if __name__ == "__main__":
    main()
