"""Parses comma-separated values: encoding, separator, header, decimal commas, dates, and every kind of damage.

In: the bytes of a file. Out: a `Table` of text columns. Rows are counted from 1, the first below the header; a message about the
form of the file also gives the line, since a quoted field may hold line breaks.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import DataError
from .table import DATES, Table, Values, absent, text

SEPARATORS = ",;\t|"
CHUNK = 50_000  # rows that are Python strings at one time: the rest already lies in compact arrays
DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d+)?)?)?")
DECIMAL_COMMA = re.compile(r"[+-]?\d*,?\d+")


def parse_csv(source: str, data: bytes, *, missing: Iterable[str] = (), header: bool | None = None) -> Table:
    """The table in a text file.

    Args:
        source: the name for messages.
        data: the file, unpacked.
        missing, header: as for `read_table`.
    Raises: `DataError` for what is no text, rows of different length, open quotes, names that repeat, no rows.

    >>> parse_csv("t.csv", b"a;b\\n1,5;x\\n;y\\n").columns["a"]
    array(['1.5', ''], dtype=StringDType())
    """
    names, rows, separator, notes = csv_rows(source, data, header=header)
    columns = _collect(source, rows, len(names), list(missing))
    table = dict(zip(names, columns, strict=True))
    for name, values in table.items():
        table[name] = _meant(name, values, separator, notes)
    return Table.of(table, source, notes)


def csv_rows(source: str, data: bytes, *, header: bool | None = None) -> tuple[list[str], Iterator[list[str]], str, list[str]]:
    """(column names, rows as the file has them, separator, notes); reading on raises `DataError` where the file is damaged."""
    content, notes = decoded(source, data)
    separator = _separator(content)
    if separator != ",":
        notes.append(f"separated by {dict(zip(SEPARATORS, ('comma', 'semicolon', 'tab', 'bar'), strict=True))[separator]}")
    rows = _rows(source, content, separator)
    head = next(rows, None)
    if head is None:
        raise DataError(f"{source} is empty: no header and no rows")
    if header is None:
        header = 2 * sum(_is_number(cell) for cell in head) < len(head)
        if not header:
            notes.append("the first row holds numbers, so it is taken for data: the columns are called column 1, column 2, ...")
    if header:
        return _names(source, head, notes), rows, separator, notes
    return [f"column {i}" for i in range(1, len(head) + 1)], itertools.chain([head], rows), separator, notes


def decoded(source: str, data: bytes, wanted: str = "CSV, Parquet, .npz, .npy or IDX") -> tuple[str, list[str]]:
    """UTF-8 with or without mark, UTF-16 with mark, else Windows-1252 or Latin-1, and a note on anything but UTF-8."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        try:
            return data.decode("utf-16"), ["encoded as UTF-16"]
        except UnicodeDecodeError:
            raise DataError(f"{source} begins like UTF-16 text but is damaged: save it as UTF-8") from None
    start = data[:65_536]
    if b"\0" in data or sum(byte < 32 and byte not in b"\t\n\r\f" for byte in start) > len(start) / 100:
        raise DataError(f"{source} is not text: its first bytes are {data[:4]!r}. Give {wanted}")
    for encoding in ("utf-8-sig", "cp1252", "latin-1"):
        try:
            content = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return content, [] if encoding == "utf-8-sig" else [f"not UTF-8: read as {encoding}; check letters with accents"]
    raise AssertionError("latin-1 decodes any bytes")


def _separator(content: str) -> str:
    """The one that cuts most of the first lines into as many fields as the header, and into the most; a comma if none does."""
    lines = content[:65_536].splitlines()[:20]
    if len(content) > 65_536 and len(lines) < 20:
        lines = lines[:-1] or lines
    best, most = ",", 1
    for separator in SEPARATORS:
        try:
            counts = [len(row) for row in csv.reader(lines, delimiter=separator) if row]
        except csv.Error:
            continue
        width = counts[0] if counts else 1  # of the header: "a;b" above "1,5;2,5" is not cut by commas
        if width > most and 2 * counts.count(width) > len(counts):
            best, most = separator, width
    return best


def _rows(source: str, content: str, separator: str) -> Iterator[list[str]]:
    """The rows that are not blank. The last one also says whether the file ends in the middle of a row."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    width, count, last, wrong, where = 0, 0, 0, 0, ""
    try:
        for row in reader:
            if not row or (len(row) == 1 and not row[0].strip()):
                continue
            width = width or len(row)
            if len(row) != width:
                wrong += 1
                where = where or f"row {count:,} (line {reader.line_num:,} of the file) with {len(row)}"
            elif not wrong:
                yield row
            count += 1
            last = len(row)
    except csv.Error as error:
        line = reader.line_num
        hint = (
            "a quotation mark is opened and never closed" if "end of data" in str(error) or "limit" in str(error) else str(error)
        )
        raise DataError(f"{source}: {hint}, near line {line:,} of the file. Write a quotation mark inside quotes twice") from None
    if wrong:
        cut = wrong == 1 and last < width and not content.endswith(("\n", "\r"))
        what = (
            "the file seems to be cut off at its end; copy it again"
            if cut
            else "put fields that hold the separator between quotation marks, or correct those rows"
        )
        raise DataError(
            f"{source}: {wrong:,} {'row does' if wrong == 1 else 'rows do'} not have {width} fields as the header has, "
            f"the first is {where} (row 1 is the first below the header): {what}"
        )


def _is_number(cell: str) -> bool:
    try:
        return bool(np.isfinite(float(cell)))
    except ValueError:
        return False


def _names(source: str, head: list[str], notes: list[str]) -> list[str]:
    """Column names without spaces around them; one without a name is called after its place."""
    names = [cell.strip() or f"column {i}" for i, cell in enumerate(head, start=1)]
    unnamed = [name for name, cell in zip(names, head, strict=True) if not cell.strip()]
    if unnamed:
        notes.append(f"without a name in the header: {', '.join(unnamed)}")
    twice = {name: [i for i, n in enumerate(names, start=1) if n == name] for name, k in Counter(names).items() if k > 1}
    if twice:
        said = "; ".join(f'"{name}" is the name of columns {", ".join(map(str, places))}' for name, places in twice.items())
        raise DataError(f"{source}: {said}. Give each column a name of its own in the header")
    return names


def _collect(source: str, rows: Iterator[list[str]], width: int, missing: list[str]) -> list[Values]:
    """The columns as text, gathered chunk by chunk."""
    pieces: list[list[Values]] = [[] for _ in range(width)]
    chunk: list[list[str]] = []

    def store() -> None:
        for piece, cells in zip(pieces, zip(*chunk, strict=True), strict=True):
            piece.append(text(cells, missing))

    for row in rows:
        chunk.append(row)
        if len(chunk) == CHUNK:
            store()
            chunk.clear()
    if chunk:
        store()
    if not pieces[0]:
        raise DataError(f"{source} has no rows below its header: nothing can be learnt from it")
    return [np.concatenate(piece) if len(piece) > 1 else piece[0] for piece in pieces]


def _meant(name: str, values: Values, separator: str, notes: list[str]) -> Values:
    """Decimal commas as points (only where a comma does not separate fields), ISO dates as days; else the text as it is."""
    there = values[~absent(values)]
    if not len(there):
        return values
    sample = str(there[0])
    if separator != "," and DECIMAL_COMMA.fullmatch(sample) and all(DECIMAL_COMMA.fullmatch(v) for v in there.tolist()):
        if np.any(np.strings.count(there, ",") > 0):
            notes.append(f"{name}: decimal commas, read as points")
            return np.strings.replace(values, ",", ".")
        return values
    if DATE.fullmatch(sample) and all(DATE.fullmatch(v) for v in there.tolist()):
        try:
            days = np.array(there.tolist(), dtype="datetime64[s]").astype(np.int64) / 86_400
        except ValueError:  # the 31st of February
            return values
        notes.append(f"{name}: {DATES}")
        out = np.full(len(values), np.nan)
        out[~absent(values)] = days
        return out
    return values
