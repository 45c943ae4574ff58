"""Reads a table from a file: CSV and its kin, NumPy's .npz and .npy, IDX images (MNIST's format), all also gzipped, and Parquet.

In: a path. Out: a `Table` and, in its notes, what had to be decided. The format is told by the first bytes and only then by the
name, so a Parquet file called .csv is read and a picture called .csv is refused. Nothing in a file is executed, and a small file
that claims or unpacks to gigabytes is refused before it fills the memory.

CSV is parsed by Python's own csv module: it is as fast as training needs (ten million fields a second), and it knows the line of
every mistake, where table libraries fill a cut-off row with gaps. Parquet needs Polars.
"""

from __future__ import annotations

import gzip
import io
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..registry import nearest
from .parse import csv_rows, parse_csv
from .table import DATES, Table, Values, text

GZIP, PARQUET, NPY, ZIP = b"\x1f\x8b", b"PAR1", b"\x93NUMPY", b"PK\x03\x04"
UNPACKED, RATIO = 1 << 30, 200  # a packed file may become so many bytes, or so many times its size; tables rarely reach 50 times
# what else people hand over; the first bytes -> what to do
FOREIGN = {
    b"\xd0\xcf\x11\xe0": "an old Excel workbook: save the sheet as CSV",
    b"\x89PNG": "a PNG picture: give a table of numbers, .npz or IDX",
    b"\xff\xd8\xff": "a JPEG picture: give a table of numbers, .npz or IDX",
    b"%PDF": "a PDF document: export the table as CSV",
    b"SQLite format 3": "an SQLite database: export the table as CSV",
    b"\x89HDF": "an HDF5 file: save the table as CSV, Parquet or .npz",
    b"BZh": "compressed with bzip2: unpack it, or use gzip",
    b"\xfd7zXZ": "compressed with xz: unpack it, or use gzip",
    b"(\xb5/\xfd": "compressed with zstd: unpack it, or use gzip",
    b"\x80\x04\x95": "a pickle, which could run code when read: save the table as CSV, Parquet or .npz",
    b"\x80\x05\x95": "a pickle, which could run code when read: save the table as CSV, Parquet or .npz",
}
IDX_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def read_table(
    path: str | Path,
    *,
    labels: str | Path | None = None,
    missing: Iterable[str] = (),
    header: bool | None = None,
    data: bytes | None = None,
) -> Table:
    """The table in a file.

    Args:
        path: a CSV (separated by comma, semicolon, tab or bar), .npy, .npz or IDX file, each also gzipped, or Parquet.
        labels: for IDX images, the file of their labels; without it, `...-images-idx3-ubyte` brings `...-labels-idx1-ubyte`.
        missing: further strings that stand for a missing value in text, beside `MISSING`, such as "?".
        header: whether the first row of a CSV holds the names; None: it does unless half of it are numbers.
        data: what `file_bytes` gave, if the file has been read already: a pipe can be read once only.
    Returns: the table, with notes on what was decided.
    Raises: `DataError` that says what is wrong, where, and what to do.

    >>> read_table("hosues.csv")
    Traceback (most recent call last):
    chainrule.errors.DataError: there is no file "hosues.csv"...
    """
    path = Path(path)
    data = file_bytes(path) if data is None else data
    name = path.name.lower().removesuffix(".gz")
    if not data:
        raise DataError(f"{path.name} is empty: no header and no rows")
    if data.startswith(PARQUET):
        table = _parquet(path.name, data, missing)
    elif data.startswith(NPY):
        table = _npy(path.name, data)
    elif data.startswith(ZIP) and (name.endswith(".npz") or b".npy" in data[:64]):
        table = _npz(path.name, data)
    elif data[:2] == b"\0\0" and data[2:3] and data[2] in IDX_DTYPES:
        table = _idx_pair(path, data, None if labels is None else Path(labels))
    elif (foreign := next((what for magic, what in FOREIGN.items() if data.startswith(magic)), None)) is not None:
        raise DataError(f"{path.name} is {foreign}")
    elif data.startswith(ZIP):
        raise DataError(f"{path.name} is a zip archive or an Excel workbook: save the sheet as CSV, or unpack it")
    elif name.endswith((".parquet", ".pq", ".npz", ".npy", "-ubyte")):
        raise DataError(
            f"{path.name} is not what its name says: its first bytes are {data[:4]!r}. Perhaps it was cut off or is no copy"
        )
    else:
        table = parse_csv(path.name, data, missing=missing, header=header)
    if labels is not None and "pixels" not in table.columns:
        raise DataError(
            f"labels in a file of their own go with IDX images, and {path.name} is none: name its target column instead"
        )
    if not table.columns or table.rows == 0:
        raise DataError(f"{path.name} has no rows{' below its header' if table.columns else ''}: nothing can be learnt from it")
    return table


def original_rows(
    path: str | Path, *, header: bool | None = None, data: bytes | None = None
) -> tuple[list[str], list[list[str]]] | None:
    """(names, rows) of a CSV file as it writes them, one row for each row of `read_table`; None for other formats."""
    path = Path(path)
    data = file_bytes(path) if data is None else data
    if data.startswith((PARQUET, NPY, ZIP, b"\0\0")):
        return None
    names, rows, _, _ = csv_rows(path.name, data, header=header)
    return names, list(rows)


def file_bytes(path: str | Path) -> bytes:
    """The bytes of a file or pipe, unzipped if gzipped.

    Raises: `DataError` for what is not there, cannot be read, is a folder or a device, is damaged, or unpacks to very much more.
    """
    path = Path(path)
    try:
        kind = path.stat().st_mode
        if stat.S_ISCHR(kind) or stat.S_ISBLK(kind) or stat.S_ISSOCK(kind):
            raise DataError(f"{path} is a device or a socket, not a file")
        data = path.read_bytes()
    except FileNotFoundError:
        there = [f.name for f in path.parent.iterdir() if f.is_file()] if path.parent.is_dir() else []
        raise DataError(f'there is no file "{path}".{nearest(path.name, there)}') from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder: name one file in it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if not data.startswith(GZIP):
        return data
    most = _most(data)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is gzipped but cut off or damaged ({error}): copy it again") from None
    if len(unpacked) > most:
        raise DataError(f"{path} {_too_much(data, None)}")
    return unpacked


def _most(data: bytes) -> int:
    """How many bytes a packed file may become."""
    return max(UNPACKED, RATIO * len(data))


def _too_much(data: bytes, size: int | None) -> str:
    size_said = f"more than {_most(data) // 10**6:,} million" if size is None else f"{size // 10**6:,} million"
    return f"has {len(data):,} bytes and would unpack to {size_said}: if you trust it, unpack it yourself or make smaller files"


def _parquet(source: str, data: bytes, missing: Iterable[str]) -> Table:
    """Numbers, truth values, text, categories, dates and fixed-size arrays; other columns are left out, and said so."""
    try:
        import polars as pl
    except ImportError:
        raise DataError(f"{source} is a Parquet file, which Polars reads: pip install 'chainrule[tables]'") from None
    try:
        width = len(pl.read_parquet_schema(io.BytesIO(data)))
        size = 8 * width * int(pl.scan_parquet(io.BytesIO(data)).select(pl.len()).collect().item())
        frame = pl.read_parquet(io.BytesIO(data)) if size <= _most(data) else pl.DataFrame()
    except BaseException as error:  # Polars raises a dozen kinds on damaged files, and panics that are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise DataError(f"{source} cannot be read as Parquet ({_short(error)}): it may be cut off; copy it again") from None
    if size > _most(data):
        raise DataError(f"{source} {_too_much(data, size)}")
    columns: dict[str, Any] = {}
    notes = []
    for series in frame:
        kind, name = series.dtype, series.name.strip()
        if name in columns:
            raise DataError(f'{source}: two columns are called "{name}"; rename one')
        if kind == pl.Boolean or kind.is_numeric():
            whole = kind.is_integer() and series.null_count() == 0 and "128" not in str(kind)
            columns[name] = series.to_numpy() if whole else series.cast(pl.Float64).to_numpy()
        elif kind in (pl.String, pl.Categorical, pl.Enum):
            columns[name] = text(series.cast(pl.String).fill_null("").to_list(), missing)
        elif kind == pl.Date or kind == pl.Datetime:
            columns[name] = series.cast(pl.Datetime("us")).to_physical().cast(pl.Float64).to_numpy() / 86_400e6
            notes.append(f"{name}: {DATES}")
        elif isinstance(kind, pl.Array) and kind.inner.is_numeric() and series.null_count() == 0:
            columns[name] = series.to_numpy()
        else:
            notes.append(f"{name}: left out, since {kind} is neither number, text nor date")
    return Table.of(columns, source, notes)


def _npy(source: str, data: bytes) -> Table:
    """One array: a structured one has named columns; (rows, k) has columns 0 .. k-1; more axes are one block `pixels`."""
    array = _array(source, data)
    if array.dtype.names:
        return Table.of({name: array[name] for name in array.dtype.names}, source)
    return Table.of(_columns("", array), source)


def _npz(source: str, data: bytes) -> Table:
    """Each array of (rows,) is a column, (rows, k) gives name0 .. name(k-1), more axes are one block."""
    arrays: dict[str, Values] = {}
    try:
        size = sum(member.file_size for member in zipfile.ZipFile(io.BytesIO(data)).infolist())
        if size <= _most(data):
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {name: np.asarray(archive[name]) for name in archive.files}
    except Exception as error:  # zip, zlib and NumPy's own header parser each raise their own kinds on damaged files
        raise DataError(f"{source} cannot be read ({_short(error)}): it may be cut off, or hold Python objects") from None
    if size > _most(data):
        raise DataError(f"{source} {_too_much(data, size)}")
    columns: dict[str, Values] = {}
    for name, array in arrays.items():
        if array.ndim == 0:
            raise DataError(f'{source}: "{name}" is a single value; each array needs one value for each row')
        for column, values in _columns(name, array).items():
            if column in columns:
                raise DataError(f'{source}: two arrays give a column "{column}"; rename one')
            columns[column] = values
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        raise DataError(
            f"{source}: the arrays have different numbers of rows ({said}): save those that belong together in one file"
        )
    return Table.of(columns, source)


def _array(source: str, data: bytes) -> Values:
    try:
        array: Values = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # as above
        raise DataError(f"{source} cannot be read ({_short(error)}): it may be cut off, or hold Python objects") from None
    if array.ndim == 0:
        raise DataError(f"{source} holds a single value: an array of (rows, columns) is needed")
    return array


def _columns(name: str, array: Values) -> dict[str, Values]:
    if array.ndim == 1:
        return {name or "0": array}
    # bytes and whole small numbers in a matrix are pictures laid flat: they keep one common scale, as images with more axes do
    if array.ndim > 2 or array.dtype == np.uint8:
        return {name or "pixels": array}
    return {f"{name}{i}": array[:, i] for i in range(array.shape[1])}


def _idx_pair(path: Path, data: bytes, labels: Path | None) -> Table:
    """Images (rows, height, width) as the block `pixels`, and the column `label` from the file beside them."""
    array = idx_array(str(path), data)
    if array.ndim == 1:
        return Table.of({"label": array}, path.name)
    beside = idx_labels(path, len(array), labels)
    if beside is None:
        return Table.of({"pixels": array}, path.name)
    return Table.of({"pixels": array, "label": beside[0]}, path.name, [f"labels from {beside[1].name}, as column label"])


def idx_labels(path: Path, rows: int, labels: Path | None) -> tuple[Values, Path] | None:
    """(labels of the images in `path`, their file): the one given, or the one beside that is named alike; None without one.

    Raises: `DataError` for labels of other images.
    """
    if labels is None:
        beside = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
        choices = [beside, beside.with_name(beside.name.removesuffix(".gz")), beside.with_name(beside.name + ".gz")]
        labels = next((f for f in choices if f != path and f.is_file()), None)
    if labels is None:
        return None
    column = idx_array(str(labels), file_bytes(labels))
    if column.ndim != 1 or len(column) != rows:
        raise DataError(f"{labels} has shape {column.shape}, but {path} has {rows:,} images: they are no pair")
    return column, labels


def idx_array(source: str, data: bytes) -> Values:
    """IDX: two zero bytes, a type code, the number of axes, big-endian lengths, then the values row by row.

    Raises: `DataError` for anything else.
    """
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in IDX_DTYPES or not 1 <= data[3] <= 8:
        raise DataError(f"{source} is no IDX file: its first bytes are {data[:4]!r}")
    dtype, axes = np.dtype(IDX_DTYPES[data[2]]), data[3]
    start = 4 + 4 * axes
    if len(data) < start:
        raise DataError(f"{source} is cut off or damaged: its header of {axes} axes takes {start} bytes, and it has {len(data)}")
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes))
    size = dtype.itemsize
    for length in shape:
        size *= length
    if len(data) - start != size:
        promised = " x ".join(map(str, shape))
        raise DataError(
            f"{source} is cut off or damaged: after its header {promised} values should follow, {size:,} bytes, "
            f"and {len(data) - start:,} do"
        )
    try:
        array: Values = np.frombuffer(data, dtype, offset=start).reshape(shape)
    except ValueError:  # no values, but lengths whose product no array can have
        raise DataError(f"{source} is damaged: its header promises {' x '.join(map(str, shape))} values") from None
    return array.astype(dtype.newbyteorder("="))


def _short(error: BaseException) -> str:
    """The first line of another library's message."""
    return re.sub(r"\s+", " ", str(error).strip().split("\n")[0])[:120] or type(error).__name__
