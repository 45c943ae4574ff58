"""What a run leaves to read: settings as JSON, the history as CSV, and one self-contained HTML page with scores and drawings.

In: plain data (numbers, texts, arrays). Out: text. Nothing here knows networks; every text that comes from data is escaped.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import UsageError
from .nn.saving import write_whole
from .pictures import Gallery, data_uri, factor

FILES = ("network.safetensors", "preparation.json", "settings.json", "history.csv", "report.html")
WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 76, 16, 16, 52  # margins of a drawing, wide enough for the labels
COLORS = ("#1f5fa8", "#c2541b", "#3b7d3b", "#7a4b9a")
MAX_POINTS = 2000  # a scatter of more would make a page of megabytes and show no more
HUGE = 1e150  # larger numbers are drawn at the end of the axis: their differences would overflow
MAX_COURSE = 600  # a series of more points than pixels shows no more
MAX_COLUMNS = 500
MAX_CLASSES = 30  # a larger confusion matrix fits no screen

Numbers = Sequence[float] | npt.NDArray[Any]


@dataclass(frozen=True)
class Report:
    """Everything the page shows.

    Args:
        title: its heading.
        facts: (name, value) pairs: data, task, network, time.
        scores: model -> metric -> value; the first model is the network, the others its baselines.
        history: column -> one value an epoch, such as "loss" and "validation_loss".
        best_epoch: the epoch, from 1, whose weights were kept; None marks none.
        notes: sentences on what was decided or left out.
        true, predicted: held-out targets and predictions: labels with `classes`, else numbers.
        classes: their labels, in the order of the matrix.
        target: the name of the target, for labels.
        judged: which rows the scores are on.
        columns: the table's columns: name, kind, missing, distinct, remark.
        first_row: where true and predicted are the last rows of a series, to be drawn over time, the row of the first; 0 elsewhere.
        samples: (heading, text) pairs that a network wrote.
        galleries: rows of pictures.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    scores: Mapping[str, Mapping[str, float]]
    history: Mapping[str, Numbers]
    best_epoch: int | None = None
    notes: Sequence[str] = ()
    true: Sequence[Any] | npt.NDArray[Any] = ()
    predicted: Sequence[Any] | npt.NDArray[Any] = ()
    classes: Sequence[Any] = ()
    target: str = "target"
    judged: str = "held-out rows"
    columns: Sequence[tuple[str, str, int, int, str]] = ()
    first_row: int = 0
    samples: Sequence[tuple[str, str]] = ()
    galleries: Sequence[Gallery] = ()


def run_folder(path: str | Path, *, overwrite: bool = False) -> Path:
    """The folder for a run, made if it is not there.

    Raises: `UsageError` if it holds a run and `overwrite` is not set, holds something else, is a file, or cannot be written to.
    Nothing is removed.
    """
    folder = Path(path)
    if folder.is_symlink() and not folder.exists():
        raise UsageError(f"{folder} is a link to nowhere: name another folder")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file: name a folder for the run")
    there = {f.name for f in folder.iterdir()} if folder.is_dir() else set()
    if there and not there & set(FILES):
        raise UsageError(f"{folder} holds files that are no run: name a new folder")
    if there and not overwrite:
        raise UsageError(f"{folder} holds a run already: name another folder, or say --overwrite")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {folder} cannot be made: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"the folder {folder} cannot be written to: name another one")
    return folder


def write_text(path: Path, content: str) -> None:
    """Writes a file whole or not at all, and never through a link. Names that are no Unicode (of files) are written escaped."""
    write_whole(path, content.encode("utf-8", errors="backslashreplace"))


def write_report(folder: Path, settings: Mapping[str, Any], report: Report) -> None:
    """Writes settings.json, history.csv and report.html into `folder`."""
    write_text(folder / "settings.json", json.dumps(_storable(settings), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(folder / "history.csv", history_csv(report.history))
    write_page(folder, report)


def write_page(folder: Path, report: Report) -> None:
    """Writes report.html into `folder`."""
    write_text(folder / "report.html", page(report))


def _storable(value: Any) -> Any:
    """Plain data with null for NaN and infinity, which JSON does not have, and with names of files that are no Unicode escaped."""
    if isinstance(value, Mapping):
        return {key: _storable(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_storable(v) for v in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def history_csv(history: Mapping[str, Numbers]) -> str:
    """One row an epoch, counted from 1; a column that ends early leaves its cells empty.

    >>> print(history_csv({"loss": [0.5, 0.25], "accuracy": [0.75]}), end="")
    epoch,loss,accuracy
    1,0.5,0.75
    2,0.25,
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["epoch", *history])
    for i in range(max((len(v) for v in history.values()), default=0)):
        writer.writerow([i + 1, *(repr(float(v[i])) if i < len(v) else "" for v in history.values())])
    return out.getvalue()


def plain(text: str) -> str:
    """The text with what could steer a terminal or turn the line around written as an escape; line breaks stay.

    >>> plain("a\\tb\\x1b[31m")
    'a\\\\tb\\\\x1b[31m'
    """
    return "".join(c if c == "\n" or not _steers(c) else c.encode("unicode_escape").decode() for c in text)


def _steers(character: str) -> bool:
    """Control characters, lone halves of a pair, line separators, and those that change the direction of writing."""
    turns = character in "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return turns or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def short(text: object, most: int = 60) -> str:
    """A name that stands in a line or a table: on one line and not endless.

    >>> short("a\\nb"), short("abcdef", 4)
    ('a\\\\nb', 'abc…')
    """
    line = plain(str(text)).replace("\n", "\\n")
    return line if len(line) <= most else line[: most - 1] + "…"


def counted(count: int, one: str, many: str = "") -> str:
    """So many of something. many: its plural, unless that is `one` with an s.

    >>> counted(1, "epoch"), counted(2000, "epoch"), counted(2, "class", "classes")
    ('1 epoch', '2,000 epochs', '2 classes')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _html(text: object, most: int = 300) -> str:
    """A text from data as HTML."""
    return escape(short(text, most))


def number(value: float) -> str:
    """Four significant digits, as people write them.

    >>> number(39.4567), number(0.98512), number(1234567.0), number(0.0000123)
    ('39.46', '0.9851', '1,234,567', '1.23e-05')
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.3g}"


def scored(metric: str, value: float) -> str:
    """A score as people write it: a share of right answers in percent, anything else as a number.

    >>> scored("accuracy", 0.98444), scored("R²", 0.83217), scored("RMSE", 39.4567)
    ('98.4 %', '0.832', '39.46')
    """
    if not math.isfinite(value):
        return "–"
    if metric == "accuracy":
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if metric == "R²" and abs(value) < 1000 else number(value)


def page(report: Report) -> str:
    """The whole HTML page."""
    parts = [f"<h1>{_html(report.title)}</h1>", _score_table(report.scores, report.judged), _fact_table(report.facts)]
    if report.notes:
        parts.append("<h2>Notes</h2><ul>" + "".join(f"<li>{_html(note)}</li>" for note in report.notes) + "</ul>")
    names = {"loss": "training rows", "validation_loss": "validation rows"}
    losses = {name: report.history[key] for key, name in names.items() if len(report.history.get(key, ()))}
    if losses:
        parts.append("<h2>Loss by epoch</h2>" + line_chart(losses, x_label="epoch", y_label="loss", mark=report.best_epoch))
    if len(report.true) and report.classes:
        parts.append(f"<h2>Which class was taken for which: the confusion matrix ({_html(report.judged)})</h2>")
        parts.append(confusion_table(report.true, report.predicted, report.classes))
    elif len(report.true):
        if report.first_row:
            parts.append(f"<h2>Forecast and truth ({_html(report.judged)})</h2>")
            parts.append(course(report.true, report.predicted, report.first_row, label=report.target))
        parts.append(f"<h2>Predicted and true ({_html(report.judged)})</h2>")
        parts.append(scatter(report.true, report.predicted, x_label=f"true {report.target}", y_label="predicted"))
    parts += [f"<h2>{_html(heading)}</h2><pre>{escape(plain(text.expandtabs(4)))}</pre>" for heading, text in report.samples]
    parts += map(_gallery, report.galleries)
    if report.columns:
        parts.append(_column_table(report.columns))
    parts.append(FOOT)
    return f"{HEAD.format(title=_html(report.title))}{''.join(part + chr(10) for part in parts)}</body>\n</html>\n"


HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; }}
body {{ max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left; }}
td.n, th.n {{ text-align: right; font-variant-numeric: tabular-nums; }}
tr.own {{ font-weight: 600; }}
td, th, h1 {{ overflow-wrap: break-word; }} td.zero, footer {{ color: #8a8a8a; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .5rem .75rem; }}
.pictures {{ display: flex; flex-wrap: wrap; gap: .75rem; }} figure {{ margin: 0; max-width: 100%; }}
figure img {{ display: block; max-width: 100%; image-rendering: pixelated; border: 1px solid #ddd; }}
figcaption {{ font-size: .8rem; max-width: 12rem; overflow-wrap: anywhere; }}
.wide {{ overflow-x: auto; }} svg {{ max-width: 100%; height: auto; }} footer {{ margin-top: 2rem; font-size: .9rem; }}
</style>
</head>
<body>
"""


FOOT = (
    "<footer>Beside this page: network.safetensors (the network), preparation.json (how its inputs are made), settings.json, "
    "history.csv. More: chainrule predict, chainrule explain, chainrule check with the name of this folder.</footer>"
)


def _score_table(scores: Mapping[str, Mapping[str, float]], judged: str) -> str:
    metrics = list(dict.fromkeys(metric for values in scores.values() for metric in values))
    head = "".join(f'<th class="n">{_html(metric)}</th>' for metric in metrics)
    rows = []
    for i, (model, values) in enumerate(scores.items()):
        cells = "".join(f'<td class="n">{scored(m, values[m]) if m in values else "–"}</td>' for m in metrics)
        own = ' class="own"' if i == 0 else ""
        rows.append(f"<tr{own}><td>{_html(model)}</td>{cells}</tr>")
    return f"<h2>Scores on {_html(judged)}</h2><table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _fact_table(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><td>{_html(name)}</td><td>{_html(value)}</td></tr>" for name, value in facts)
    return f"<h2>What was learnt from</h2><table>{rows}</table>"


def _count(value: int) -> str:
    return f"{value:,}" if value else ""


def _column_table(columns: Sequence[tuple[str, str, int, int, str]]) -> str:
    rows = "".join(
        f'<tr><td>{_html(name, 60)}</td><td>{_html(kind)}</td><td class="n">{_count(missing)}</td><td class="n">{_count(distinct)}</td>'
        f"<td>{_html(remark)}</td></tr>"
        for name, kind, missing, distinct, remark in columns[:MAX_COLUMNS]
    )
    head = '<tr><th>column</th><th>kind</th><th class="n">missing</th><th class="n">distinct</th><th></th></tr>'
    more = f"<p>And {len(columns) - MAX_COLUMNS:,} more columns.</p>" if len(columns) > MAX_COLUMNS else ""
    return f'<h2>Columns</h2><div class="wide"><table>{head}{rows}</table></div>{more}'


def _gallery(gallery: Gallery) -> str:
    """Pictures with their captions, enlarged by a whole number; all is in the page itself."""
    times = factor(gallery.unit)
    figures = "".join(
        f'<figure><img src="{data_uri(p.pixels)}" width="{times * p.pixels.shape[1]}" alt="{_html(p.caption)}"/>'
        f"<figcaption>{_html(p.caption)}</figcaption></figure>"
        for p in gallery.pictures
    )
    return f'<h2>{_html(gallery.heading)}</h2><p>{_html(gallery.about)}</p><div class="pictures">{figures}</div>'


def confusion(true: Sequence[Any] | npt.NDArray[Any], predicted: Sequence[Any] | npt.NDArray[Any], classes: Sequence[Any]) -> Any:
    """Counts (classes, classes): row the true class, column the predicted one; other classes are not counted.

    >>> confusion(["a", "b", "b"], ["a", "a", "b"], ["a", "b"]).tolist()
    [[1, 0], [1, 1]]
    """
    place = {label: i for i, label in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for t, p in zip(true, predicted, strict=True):
        if t in place and p in place:
            counts[place[t], place[p]] += 1
    return counts


def confusion_table(
    true: Sequence[Any] | npt.NDArray[Any], predicted: Sequence[Any] | npt.NDArray[Any], classes: Sequence[Any]
) -> str:
    """The counts as an HTML table, shaded by the share of the row; only the largest classes if there are very many."""
    every = len(classes)
    if every > MAX_CLASSES:
        rows_of = Counter(list(true))
        largest = {label for label, _ in sorted(rows_of.items(), key=lambda item: -item[1])[:MAX_CLASSES]}
        classes = [label for label in classes if label in largest]
    counts = confusion(true, predicted, classes)
    shown = range(len(classes))
    head = "".join(f'<th class="n">{_html(label, 24)}</th>' for label in classes)
    rows = []
    for i in shown:
        total = max(int(counts[i].sum()), 1)
        cells = ""
        for j in shown:
            share = counts[i, j] / total
            color, strength = ("31, 95, 168", 0.45 * share) if i == j else ("194, 84, 27", bool(share) * (0.12 + 0.6 * share))
            shade = f"background: rgba({color}, {strength:.2f})"
            own = "n" if counts[i, j] else "n zero"
            cells += f'<td class="{own}" style="{shade}">{counts[i, j]:,}</td>'
        rows.append(f"<tr><th>{_html(classes[i], 24)}</th>{cells}</tr>")
    note = f"<p>The {len(classes)} largest of {every:,} classes.</p>" if len(classes) < every else ""
    return (
        f'<p>Rows: the true class. Columns: the predicted one.</p>{note}<div class="wide"><table><tr><th></th>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


@dataclass(frozen=True)
class Axis:
    """One axis of a drawing: the values `low` .. `high` lie between the pixels `start` and `end`. `whole`: ticks at integers only."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    @classmethod
    def over(cls, values: Numbers, start: float, end: float, *, log: bool = False) -> Axis:
        """An axis that holds all finite values; values that hardly differ get room around them."""
        v = np.asarray(values, dtype=np.float64)
        v = np.clip(v[np.isfinite(v)], -HUGE, HUGE)
        if log and len(v) and v.min() > 0:
            low = max(float(v.min()), 1 / HUGE)
            return cls(low, max(float(v.max()), low * 1.01), start, end, True)
        low, high = (float(v.min()), float(v.max())) if len(v) else (0.0, 1.0)
        size = max(abs(low), abs(high))
        room = 0.0 if high - low > max(1e-9 * size, 1 / HUGE) else (0.1 * size if size > 1 / HUGE else 1.0)
        return cls(low - room, high + room, start, end)

    def at(self, value: float) -> float:
        """The pixel of a value; one beyond the axis is drawn at its end."""
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (value - low) * (self.end - self.start) / (high - low)

    def ticks(self) -> list[float]:
        """Four to ten round values within the axis.

        >>> Axis(0.0, 97.0, 0, 1).ticks()
        [0.0, 20.0, 40.0, 60.0, 80.0]
        """
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(powers) <= 4 else (1,)
            found = [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
            return found[:: math.ceil(len(found) / 10)] if found else [self.low, self.high]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw)
        step = max(step, 1.0) if self.whole else step
        start = math.ceil(self.low / step)
        return [k * step for k in range(start, math.floor(self.high / step) + 1)]


def _frame(x: Axis, y: Axis, x_label: str, y_label: str) -> str:
    """Grid, ticks and labels."""
    out = []
    for value in x.ticks():
        at = x.at(value)
        out.append(f'<line x1="{at:.1f}" y1="{y.start:.1f}" x2="{at:.1f}" y2="{y.end:.1f}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{at:.1f}" y="{y.start + 18:.1f}" text-anchor="middle">{number(value)}</text>')
    for value in y.ticks():
        at = y.at(value)
        out.append(f'<line x1="{x.start:.1f}" y1="{at:.1f}" x2="{x.end:.1f}" y2="{at:.1f}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{x.start - 8:.1f}" y="{at + 4:.1f}" text-anchor="end">{number(value)}</text>')
    across, down = (x.start + x.end) / 2, (y.start + y.end) / 2
    out.append(f'<text x="{across:.1f}" y="{HEIGHT - 10}" text-anchor="middle">{_html(x_label)}</text>')
    turned = f'text-anchor="middle" transform="rotate(-90 16 {down:.1f})"'
    out.append(f'<text x="16" y="{down:.1f}" {turned}>{_html(y_label)}</text>')
    return "".join(out)


def _svg(content: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{_html(label)}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="#1c1c1c">{content}</svg>'
    )


def course(true: Numbers, predicted: Numbers, first_row: int, *, label: str) -> str:
    """A series from `first_row` on and its forecasts; the end of it, if it is long."""
    end = slice(-MAX_COURSE, None)
    start = first_row + max(len(true) - MAX_COURSE, 0)
    note = f"<p>The last {MAX_COURSE:,} of {len(true):,}.</p>" if len(true) > MAX_COURSE else ""
    lines = {f"true {label}": true[end], "forecast": predicted[end]}
    return note + line_chart(lines, x_label="row", y_label=label, log=False, thin=True, start=start)


def line_chart(
    series: Mapping[str, Numbers],
    *,
    x_label: str,
    y_label: str,
    mark: int | None = None,
    log: bool | None = None,
    thin: bool = False,
    start: int = 1,
) -> str:
    """One line for each series over start, start + 1, ...; the y axis is logarithmic if asked for, or by default if the values span more
    than a factor of 20.

    A value that is not finite leaves a gap. `mark` is the place of a dashed line, the best epoch. `thin`: for lines of many points.
    """
    every = np.concatenate([np.asarray(v, dtype=np.float64) for v in series.values()])
    finite = every[np.isfinite(every)]
    wide = bool(len(finite)) and finite.min() > 0 and finite.max() > 20 * finite.min()
    log = wide if log is None else log
    longest = max(len(v) for v in series.values())
    x = replace(Axis.over([start, start + max(longest, 2) - 1], LEFT, WIDTH - RIGHT), whole=True)
    y = Axis.over(every, HEIGHT - BOTTOM, TOP, log=log)
    out = [_frame(x, y, x_label, y_label + (" (logarithmic)" if log else ""))]
    if mark is not None:
        at = x.at(mark)
        side, anchor = (5, "start") if at < WIDTH / 2 else (-5, "end")
        out.append(f'<line x1="{at:.1f}" y1="{y.start}" x2="{at:.1f}" y2="{y.end}" stroke="#777" stroke-dasharray="4 4"/>')
        out.append(f'<text x="{at + side:.1f}" y="{TOP + 12}" fill="#555" text-anchor="{anchor}">best</text>')
    for i, (name, values) in enumerate(series.items()):
        color = COLORS[i % len(COLORS)]
        points = [(x.at(e), y.at(float(v)) if math.isfinite(v) else None) for e, v in enumerate(values, start)]
        for piece in _pieces(points):
            shape = " ".join(f"{a:.1f},{b:.1f}" for a, b in piece)
            out.append(f'<polyline points="{shape}" fill="none" stroke="{color}" stroke-width="{1.2 if thin else 2}"/>')
            if len(piece) == 1:
                out.append(f'<circle cx="{piece[0][0]:.1f}" cy="{piece[0][1]:.1f}" r="3" fill="{color}"/>')
        out.append(
            f'<text x="{WIDTH - RIGHT - 8}" y="{TOP + 18 * (i + 1)}" text-anchor="end" fill="{color}">{_html(name)}</text>'
        )
    return _svg("".join(out), f"{y_label} by {x_label}")


def _pieces(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Runs of points between gaps."""
    out: list[list[tuple[float, float]]] = [[]]
    for a, b in points:
        if b is None:
            out.append([])
        else:
            out[-1].append((a, b))
    return [piece for piece in out if piece]


def scatter(true: Numbers, predicted: Numbers, *, x_label: str, y_label: str) -> str:
    """Predicted over true, with the diagonal where both are equal; evenly thinned if there are very many points."""
    a, b = (np.asarray(v, dtype=np.float64) for v in (true, predicted))
    both = np.concatenate([a, b])
    x, y = Axis.over(both, LEFT, WIDTH - RIGHT), Axis.over(both, HEIGHT - BOTTOM, TOP)
    diagonal = f'<line x1="{x.start}" y1="{y.start}" x2="{x.end}" y2="{y.end}" stroke="#777" stroke-dasharray="4 4"/>'
    out = [_frame(x, y, x_label, y_label), diagonal, f'<g fill="{COLORS[0]}" fill-opacity="0.35">']
    finite = np.isfinite(a) & np.isfinite(b)
    every = max(1, math.ceil(finite.sum() / MAX_POINTS))
    for p, q in zip(a[finite][::every], b[finite][::every], strict=True):
        out.append(f'<circle cx="{x.at(float(p)):.1f}" cy="{y.at(float(q)):.1f}" r="2.5"/>')
    note = f"<p>Every {every}th of {len(a):,} rows.</p>" if every > 1 else ""
    return note + _svg("".join(out) + "</g>", f"{y_label} over {x_label}")
