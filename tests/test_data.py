"""Files become tables, tables become numbers: what is understood, what is refused and in which words, and that nothing leaks."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainrule.data import Table, read_table
from chainrule.data.parse import parse_csv
from chainrule.data.prepare import CategoryColumn, NumberColumn, Preparation, Remarks, hold_out
from chainrule.data.table import absent, numbers
from chainrule.data.target import TargetCode
from chainrule.data.understand import understand
from chainrule.errors import DataError, FileFormatError, UsageError
from chainrule.examples import HOUSES_FILE


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def csv(text: str | bytes, **options: object) -> Table:
    return parse_csv("t.csv", text.encode() if isinstance(text, str) else text, **options)  # type: ignore[arg-type]


def lists(table: Table) -> dict[str, list[object]]:
    return {name: values.tolist() for name, values in table.columns.items()}


def refusal(text: str | bytes, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        csv(text, **options)
    return str(caught.value)


# -- CSV ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("a,b\n1,x\n2,y\n", ""),
        ("a;b\n1;x\n2;y\n", "separated by semicolon"),
        ("a\tb\n1\tx\n2\ty\n", "separated by tab"),
        ("a|b\n1|x\n2|y\n", "separated by bar"),
        ("a,b\r\n1,x\r\n2,y", ""),
        ("a,b\r1,x\r2,y\r", ""),
        ("\ufeffa,b\n1,x\n2,y\n", ""),
        ("a , b\n 1, x \n2,y\n\n\n", ""),
        ('"a","b"\n"1","x"\n2, "y"\n', ""),
        ("a,b\n1,x\n2,y\n".encode("utf-16"), "encoded as UTF-16"),
    ],
)
def test_forms_of_csv(text: str | bytes, note: str) -> None:
    table = csv(text)
    assert lists(table) == {"a": ["1", "2"], "b": ["x", "y"]}
    assert list(table.notes) == ([note] if note else [])


def test_latin_1_is_read_and_said() -> None:
    table = csv("Straße,n\nKöln,1\n".encode("latin-1"))
    assert lists(table) == {"Straße": ["Köln"], "n": ["1"]}
    assert "not UTF-8" in table.notes[0]


def test_quoted_fields_hold_anything() -> None:
    assert lists(csv('a,b\n"x, y","line\nbreak"\n"say ""hi""",2\n')) == {"a": ["x, y", 'say "hi"'], "b": ["line\nbreak", "2"]}


def test_decimal_commas_where_the_comma_is_free() -> None:
    table = csv("a;b\n1,5;1\n-2,25;2\n")
    assert lists(table) == {"a": ["1.5", "-2.25"], "b": ["1", "2"]}
    assert "a: decimal commas, read as points" in table.notes


def test_dates_become_days() -> None:
    table = csv("day,n\n1970-01-03,1\n,2\n1970-01-01 12:00,3\n")
    assert numbers(table.column("day"))[0].tolist()[::2] == [2.0, 0.5]
    assert absent(table.column("day")).tolist() == [False, True, False]
    assert csv("day\n2024-02-31\n2024-02-30\n").column("day").tolist() == ["2024-02-31", "2024-02-30"]


def test_a_header_of_numbers_is_data() -> None:
    table = csv("5.1,3.5,setosa\n4.9,3.0,setosa\n")
    assert list(table.columns) == ["column 1", "column 2", "column 3"]
    assert table.rows == 2
    assert "taken for data" in table.notes[0]
    assert list(csv("2019,2020\n1,2\n", header=True).columns) == ["2019", "2020"]


def test_which_strings_mean_missing() -> None:
    table = csv("a,n\n,1\nNA,1\nNaN,1\nnull,1\nN/A,1\nNone,1\n?,1\n")
    assert absent(table.column("a")).tolist() == [True] * 5 + [False] * 2
    assert absent(csv("a,n\n?,1\nx,2\n", missing=["?"]).column("a")).tolist() == [True, False]


def test_many_rows_go_through_in_chunks() -> None:
    rows = 120_001
    table = csv("a,b\n" + "".join(f"{i},t{i % 7}\n" for i in range(rows)))
    assert table.rows == rows
    assert numbers(table.column("a"))[0].sum() == rows * (rows - 1) / 2
    assert table.column("b")[-1] == f"t{(rows - 1) % 7}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["empty"]),
        ("\n\n", ["empty"]),
        ("a,b\n", ["no rows below its header"]),
        ("a,b\n1,2\n3\n4,5\n6\n7,8\n", ["2 rows do not have 2 fields", "row 2 (line 3 of the file) with 1", "quotation marks"]),
        ("a,b\n1,2\n3,4,5\n6,7\n", ["1 row does not have 2 fields", "row 2 (line 3 of the file) with 3"]),
        ("a,b\n1,2\n3,4\n5", ["row 3", "cut off"]),
        ('a,b\n1,2\n"3,4\n5,6\n', ["never closed"]),
        ("a,b,a\n1,2,3\n", ['"a" is the name of columns 1, 3']),
        ("a,a \n1,2\n", ['"a" is the name of columns 1, 2']),
        (b"\x00\x01\x02\x03garbage", ["not text"]),
        (bytes(range(256)) * 20, ["not text"]),
        (b"\xff\xfea", ["UTF-16"]),
    ],
)
def test_damaged_csv_is_refused_in_words(text: str | bytes, words: list[str]) -> None:
    message = refusal(text)
    assert message.startswith("t.csv")
    for word in words:
        assert word in message


@given(
    st.integers(1, 4).flatmap(
        lambda width: st.lists(
            st.lists(
                st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=6), min_size=width, max_size=width
            ),
            min_size=1,
            max_size=6,
        )
    )
)
def test_whatever_python_writes_is_read_back(rows: list[list[str]]) -> None:
    """Values survive but for the spaces around them, the words for missing, and what counts as a decimal comma or a date."""
    import csv as python_csv

    names = [f"name {i}" for i in range(len(rows[0]))]
    out = io.StringIO()
    writer = python_csv.writer(out, quoting=python_csv.QUOTE_ALL)
    writer.writerows([names, *rows])
    if all(not cell.strip() for row in rows for cell in row):
        return
    blank = [row for row in rows if len(row) > 1 or row[0].strip()]  # a blank line in a file of one column is no row
    table = csv(out.getvalue(), header=True)
    expected = {name: Table.of({name: [row[i] for row in blank]}).column(name).tolist() for i, name in enumerate(names)}
    for name in names:
        assert table.column(name).shape == (len(blank),)
        if "T" in table.column(name).dtype.kind and not table.notes:
            assert table.column(name).tolist() == expected[name]


@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(DataError):
        assert parse_csv("t.csv", data).rows > 0


# -- other formats --------------------------------------------------------------------------------------------------------------


def test_gzip_is_told_by_its_bytes(tmp_path: Path) -> None:
    packed = gzip.compress(b"a,b\n1,2\n")
    for name in ("t.csv.gz", "t.csv"):
        assert lists(read_table(write(tmp_path, name, packed))) == {"a": ["1"], "b": ["2"]}
    with pytest.raises(DataError, match="cut off or damaged"):
        read_table(write(tmp_path, "cut.csv.gz", packed[:-9]))


def test_parquet(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "n": [1, 2, None],
            "whole": [1, 2, 3],
            "x": [0.5, None, 2.5],
            "yes": [True, False, None],
            "word": ["a", None, " NA "],
            "day": [0, 1, None],
            "pair": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]],
            "odd": [{"k": 1}, {"k": 2}, {"k": 3}],
        },
        schema_overrides={"day": pl.Date, "pair": pl.Array(pl.Float32, 2)},
    )
    file = tmp_path / "t.csv"  # the bytes decide, not the name
    frame.write_parquet(file)
    table = read_table(file)
    assert np.isnan(numbers(table.column("n"))[0]).tolist() == [False, False, True]
    assert table.column("whole").dtype.kind == "i"
    assert numbers(table.column("yes"))[0].tolist()[:2] == [1.0, 0.0]
    assert table.column("word").tolist() == ["a", "", ""]
    assert numbers(table.column("day"))[0].tolist()[:2] == [0.0, 1.0]
    assert table.column("pair").shape == (3, 2)
    assert "odd" not in table.columns
    assert any("odd: left out" in note for note in table.notes)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_table(write(tmp_path, "cut.parquet", file.read_bytes()[:-40]))


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", np.array([[1.0, 2.0], [3.0, np.nan]]))
    assert list(read_table(tmp_path / "m.npy").columns) == ["0", "1"]
    np.save(tmp_path / "s.npy", np.array([(1.0, "a"), (2.0, "b")], dtype=[("x", "f8"), ("t", "U3")]))
    assert lists(read_table(tmp_path / "s.npy")) == {"x": [1.0, 2.0], "t": ["a", "b"]}
    np.save(tmp_path / "i.npy", np.zeros((4, 3, 3)))
    assert read_table(tmp_path / "i.npy").column("pixels").shape == (4, 3, 3)


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.eye(3), y=np.array(["a", "b", "a"]), images=np.zeros((3, 2, 2), np.uint8))
    table = read_table(tmp_path / "t.npz")
    assert list(table.columns) == ["x0", "x1", "x2", "y", "images"]
    assert table.column("y").tolist() == ["a", "b", "a"]
    np.savez(tmp_path / "u.npz", x=np.eye(3), y=np.zeros(4))
    with pytest.raises(DataError, match=r"x 3, y 4"):
        read_table(tmp_path / "u.npz")


def test_objects_in_numpy_files_are_never_unpickled(tmp_path: Path) -> None:
    for name in ("o.npy", "o.npz"):
        file = tmp_path / name
        array = np.array([{"a": 1}], dtype=object)
        np.save(file, array) if name == "o.npy" else np.savez(file, x=array)
        with pytest.raises(DataError, match="Python objects"):
            read_table(file)


def idx(array: np.ndarray, code: int = 8) -> bytes:
    head = bytes([0, 0, code, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def test_idx_pairs_images_with_labels(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    write(tmp_path, "train-images-idx3-ubyte.gz", gzip.compress(idx(images)))
    alone = read_table(tmp_path / "train-images-idx3-ubyte.gz")
    assert list(alone.columns) == ["pixels"]
    labels = write(tmp_path, "train-labels-idx1-ubyte", idx(np.array([7, 9], dtype=np.uint8)))
    table = read_table(tmp_path / "train-images-idx3-ubyte.gz")
    assert (table.column("pixels") == images).all()
    assert table.column("label").tolist() == [7, 9]
    assert "train-labels-idx1-ubyte" in table.notes[0]
    floats = write(tmp_path, "f", idx(np.array([[0.5, -1.0]], dtype=np.float32), 13))
    assert read_table(floats).column("pixels").tolist() == [[0.5, -1.0]]
    assert lists(read_table(labels)) == {"label": [7, 9]}
    three = write(tmp_path, "three", idx(np.array([1, 2, 3], dtype=np.uint8)))
    with pytest.raises(DataError, match="no pair"):
        read_table(tmp_path / "train-images-idx3-ubyte.gz", labels=three)
    with pytest.raises(DataError, match="go with IDX"):
        read_table(write(tmp_path, "t.csv", "a\n1\n"), labels=three)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("images-idx3-ubyte", idx(np.zeros((2, 3, 3), np.uint8))[:-1], "cut off or damaged: after its header 2 x 3 x 3"),
        ("images-idx3-ubyte", b"\0\0\x08\x03\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "cut off"),
        ("images-idx3-ubyte", b"\0\0\x08\x09", "no IDX file"),
        ("images-idx3-ubyte", b"hello", "not what its name says"),
        ("t.npz", b"PK\x03\x04 t.npy nothing", "cut off"),
        ("t.npy", b"\x93NUMPY\x01\x00", "cut off"),
        (
            "t.npy",
            b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(128) + b"\n",
            "cannot",
        ),
        ("t.parquet", b"a,b\n1,2\n", "not what its name says"),
        ("t.csv", b"\x89PNG\r\n\x1a\n", "PNG picture"),
        ("t.csv", b"PK\x03\x04[Content_Types].xml", "Excel"),
        ("t.csv", b"\x80\x04\x95abc", "pickle"),
        ("t.csv", b"", "is empty"),
    ],
)
def test_damaged_files_are_refused_in_words(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_table(write(tmp_path, name, content))


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", x=np.zeros(1000))
    for keep in (0.2, 0.5, 0.9):
        data = (tmp_path / "t.npz").read_bytes()
        with pytest.raises(DataError):
            read_table(write(tmp_path, "cut.npz", data[: int(keep * len(data))]))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(DataError, match="zip archive"):
        read_table(tmp_path / "other.zip")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, "houses.csv", "a\n1\n")
    with pytest.raises(DataError, match=r'no file .*Did you mean "houses.csv"'):
        read_table(tmp_path / "huoses.csv")
    with pytest.raises(DataError, match="folder"):
        read_table(tmp_path)


# -- what it means --------------------------------------------------------------------------------------------------------------


def houses() -> Table:
    return read_table(HOUSES_FILE)


def test_the_houses_are_understood() -> None:
    facts = understand(houses(), "TOTAL VALUE")
    assert (facts.rows, facts.task, len(facts.features)) == (5802, "regression", 13)
    kinds = {column.name: column.kind for column in facts.columns}
    assert kinds["REMODEL"] == "categorical"
    assert set(kinds.values()) == {"numeric", "categorical"}
    assert sum(column.missing for column in facts.columns) == 0
    assert int((houses().column("REMODEL") == "None").sum()) == 4346
    assert any(note.startswith("TAX is TOTAL VALUE in other units") for note in facts.notes)
    assert not understand(houses(), "TOTAL VALUE", drop=["TAX"]).notes


@pytest.mark.parametrize(
    ("target", "task", "classes"),
    [
        ([1.5, 2.5, 3.5] * 10, "regression", ()),
        (list(range(30)), "regression", ()),
        ([0, 1] * 15, "binary", (0, 1)),
        ([0.5, 1.5] * 15, "binary", (0.5, 1.5)),
        ([3, 1, 2] * 10, "multiclass", (1, 2, 3)),
        ([1, 2, 3], "regression", ()),  # whole numbers that hardly repeat
        (["no", "yes"] * 15, "binary", ("no", "yes")),
        (["c", "b", "a"] * 10, "multiclass", ("a", "b", "c")),
        (["1", "2", "3"] * 10, "multiclass", (1, 2, 3)),
        (["10", "9", "x"] * 10, "multiclass", ("10", "9", "x")),
    ],
)
def test_the_task(target: list[object], task: str, classes: tuple[object, ...]) -> None:
    facts = understand(Table.of({"x": np.linspace(0, 1, len(target)) ** 2, "y": target}), "y")
    assert (facts.task, facts.classes) == (task, classes)


def test_the_task_as_told() -> None:
    table = Table.of({"x": np.linspace(0, 1, 30) ** 2, "y": [1, 2, 3] * 10, "t": ["a", "b"] * 15})
    assert understand(table, "y", task="regression").task == "regression"
    assert understand(table, "y", categorical=["y"]).classes == ("1", "2", "3")
    assert understand(Table.of({"x": [1, 2, 4, 5], "y": [1, 2, 3, 1]}), "y", task="classification").task == "multiclass"
    with pytest.raises(DataError, match='holds text, first "a" in row 1'):
        understand(table, "t", task="regression")
    with pytest.raises(UsageError, match='Did you mean "regression"'):
        understand(table, "y", task="regresion")


def test_columns_that_are_not_learnt_from() -> None:
    n = 40
    table = Table.of(
        {
            "row": np.arange(n) + 100,
            "name": [f"person {i}" for i in range(n)],
            "same": ["x"] * n,
            "void": [""] * n,
            "gappy": ["x", ""] * (n // 2),
            "town": ["A", "B"] * (n // 2),
            "size": np.sqrt(np.arange(n)),
            "code": [10, 20, 30, 40] * (n // 4),
            "y": np.linspace(0, 1, n) ** 2,
        }
    )
    facts = understand(table, "y", categorical=["code"])
    kinds = {column.name: (column.kind, column.used) for column in facts.columns}
    assert kinds == {
        "row": ("identifier", False),
        "name": ("identifier", False),
        "same": ("constant", False),
        "void": ("empty", False),
        "gappy": ("categorical", True),
        "town": ("categorical", True),
        "size": ("numeric", True),
        "code": ("categorical", True),
    }
    kept = understand(table, "y", keep=["row"], drop=["town"])
    assert {c.name: c.used for c in kept.columns}["row"]
    assert not {c.name: c.used for c in kept.columns}["town"]


N = 30
GOOD = {"x": np.linspace(0, 1, N) ** 2, "y": np.linspace(0, 2, N) ** 2}


@pytest.mark.parametrize(
    ("columns", "target", "words"),
    [
        ({}, "z", ['no column "z"', "Columns: x, y"]),
        ({"price": [1.5] * N}, "prise", ['Did you mean "price"?']),
        ({"y": [1.0] * N}, "y", ["one value only (1)"]),
        ({"y": ["a"] * N}, "y", ["one class only"]),
        ({"y": ["a", ""] * 15}, "y", ["missing in 15 of 30 rows, first in row 2"]),
        ({"y": [f"w{i}" for i in range(N)]}, "y", ["30 classes in 30 rows"]),
        ({"y": [1.0, np.inf, np.nan] + [2.0] * 27}, "y", ["missing in 1 of"]),
        ({"y": [1.0, np.inf, -np.inf] + [2.0] * 27}, "y", ['"y" holds infinity in 2 rows, first in row 2']),
        ({"x": [1.0, 2.0, np.inf] + [2.0] * 27}, "y", ['"x" holds infinity in 1 row, first in row 3']),
        ({"x": ["1", "?", "2"] * 1 + ["3"] * 27}, "y", ['1 of 30 rows text, first "?" in row 2', '--missing "?"', '--drop "x"']),
        ({"x": ["s"] * N}, "y", ["no column to learn from", "one value in every row"]),
    ],
)
def test_what_cannot_be_learnt_from(columns: dict[str, list[object]], target: str, words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        understand(Table.of({**GOOD, **columns}), target)
    for word in words:
        assert word in str(caught.value)


# -- preparation ----------------------------------------------------------------------------------------------------------------


def prepared(columns: dict[str, object], target: list[object] | None = None, **options: object) -> tuple[Table, Preparation]:
    rows = len(next(iter(columns.values())))  # type: ignore[arg-type]
    table = Table.of({**columns, "y": target or (np.linspace(0, 1, rows) ** 2)})
    return table, Preparation.fit(table, understand(table, "y", **options))  # type: ignore[arg-type]


def test_numbers_are_scaled_by_the_training_rows_only() -> None:
    whole = houses()
    facts = understand(whole, "TOTAL VALUE", drop=["TAX"])
    rows = np.arange(4000)
    preparation = Preparation.fit(whole.take(rows), facts)
    other = Table.of({name: values.copy() for name, values in whole.columns.items()})
    other.column("LOT SQFT")[4000:] = "999999"
    other.column("TOTAL VALUE")[4000:] = "1"
    assert Preparation.fit(other.take(rows), facts) == preparation


def test_numbers_agree_with_scikit_learn() -> None:
    from sklearn.impute import SimpleImputer
    from sklearn.preprocessing import RobustScaler, StandardScaler

    x = np.random.default_rng(0).lognormal(size=50)
    x[[3, 7]] = np.nan
    column = NumberColumn.fit("x", x)
    filled = SimpleImputer(strategy="median").fit_transform(x[:, None])
    u = RobustScaler().fit(x[~np.isnan(x)][:, None]).transform(filled)[:, 0]
    remarks = Remarks()
    scaled, flag = column.apply(x, remarks)
    expected = StandardScaler().fit_transform((u / np.sqrt(1 + u**2 / 9))[:, None])[:, 0]
    np.testing.assert_allclose(scaled, expected, rtol=1e-5, atol=1e-6)
    assert np.flatnonzero(flag).tolist() == [3, 7]
    assert remarks.lines() == ["x: 2 missing, filled in"]


@pytest.mark.parametrize("values", [[5.0] * 30, [0.0] * 29 + [8.0], [np.nan] * 30, [1e300, -1e300] * 15, [1e-300, 2e-300] * 15])
def test_odd_columns_of_numbers_stay_finite(values: list[float]) -> None:
    column = NumberColumn.fit("x", np.array(values))
    for part in column.apply(np.array([*values, 1e308, -1e308, 0.0]), Remarks()):
        assert np.isfinite(part).all()


def test_categories_agree_with_scikit_learn() -> None:
    from sklearn.preprocessing import OneHotEncoder

    words = np.array(["a"] * 300 + ["b"] * 200 + ["c"] * 3 + ["d"] * 2)
    seen = np.concatenate([words, ["never"]])
    column = CategoryColumn.fit("t", Table.of({"t": words}).column("t"))
    assert (column.categories, column.rare) == (("a", "b"), ("c", "d"))
    encoder = OneHotEncoder(min_frequency=5, max_categories=50, handle_unknown="infrequent_if_exist", sparse_output=False)
    expected = encoder.fit(words.astype(object)[:, None]).transform(seen.astype(object)[:, None])
    remarks = Remarks()
    np.testing.assert_array_equal(np.stack(column.apply(Table.of({"t": seen}).column("t"), remarks), axis=1), expected)
    assert remarks.unseen == {"t": (1, "never", 506)}


def test_a_category_never_seen_is_all_zero_and_said() -> None:
    _, preparation = prepared({"t": ["a", "b"] * 10, "g": ["a", ""] * 10})
    assert preparation.features == ["t = a", "t = b", "g = a", "g missing"]
    x, remarks = preparation.apply(Table.of({"t": ["b", "c", "c", ""], "g": ["", "a", "a", "z"], "more": [0] * 4}))
    assert x.tolist() == [[0, 1, 1, 1], [0, 0, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    assert remarks.lines() == [
        "t: 1 missing, filled in",
        "g: 1 missing, filled in",
        't: 2 of a category never seen in training, first "c" in row 2; counted as unknown',
        'g: 1 of a category never seen in training, first "z" in row 4; counted as unknown',
    ]


def test_thousands_of_categories_become_fifty() -> None:
    words = [f"w{int(i)}" for i in np.random.default_rng(0).integers(0, 2000, 6000)]
    _, preparation = prepared({"t": words, "x": np.sqrt(np.arange(6000))})
    assert len(preparation.features) <= 51


def test_images_keep_one_scale(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 5)).astype(np.uint8)
    table, preparation = prepared({"pixels": images})
    x, _ = preparation.apply(table)
    assert x.shape == (20, 20)
    assert preparation.features[6] == "pixels[1, 1]"
    np.testing.assert_allclose([x.mean(), x.std()], [0, 1], atol=1e-5)
    with pytest.raises(DataError, match="numbers a row"):
        preparation.apply(Table.of({"pixels": images[:, :3]}))


def test_columns_that_do_not_fit_at_prediction() -> None:
    _, preparation = prepared({"size": np.sqrt(np.arange(30)), "town": ["a", "b"] * 15})
    with pytest.raises(DataError, match=r'no column "size"\. Did you mean "Size"'):
        preparation.apply(Table.of({"Size": [1.0], "town": ["a"]}))
    with pytest.raises(DataError, match=r'first "big" in row 2.*in training it held numbers'):
        preparation.apply(Table.of({"size": ["1", "big"], "town": ["a", "a"]}))
    with pytest.raises(DataError, match="infinity"):
        preparation.apply(Table.of({"size": ["inf"], "town": ["a"]}))


def test_text_of_numbers_and_numbers_are_the_same_category() -> None:
    _, preparation = prepared({"code": [1.0, 2.0] * 15}, categorical=["code"])
    for values in (["1"], [1], [1.0]):
        assert preparation.apply(Table.of({"code": values}))[0].tolist() == [[1.0, 0.0]]


def test_json_restores_exactly() -> None:
    table = houses()
    facts = understand(table, "TOTAL VALUE", drop=["TAX"])
    preparation = Preparation.fit(table, facts, missing=["?"], log_target=True)
    again = Preparation.from_json(preparation.to_json())
    assert again == preparation
    np.testing.assert_array_equal(again.apply(table)[0], preparation.apply(table)[0])
    assert again.apply(table)[0].shape == (5802, len(preparation.features))


def _changed(change: object) -> str:
    _, preparation = prepared({"x": np.sqrt(np.arange(30)), "t": ["a", "b"] * 15, "p": np.zeros((30, 2, 2), np.uint8)})
    data = json.loads(preparation.to_json())
    change(data)  # type: ignore[operator]
    return json.dumps(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format="other"),
        lambda d: d.update(columns=[]),
        lambda d: d.update(extra=1),
        lambda d: d.update(missing=[1]),
        lambda d: d["columns"].append(3),
        lambda d: d["columns"][0].update(kind="pickle"),
        lambda d: d["columns"][0].update(scale=0),
        lambda d: d["columns"][0].update(scale=float("nan")),
        lambda d: d["columns"][0].update(fill="x"),
        lambda d: d["columns"][0].pop("center"),
        lambda d: d["columns"][1].update(categories=[1]),
        lambda d: d["columns"][2].update(shape=[-1]),
        lambda d: d["target"].update(task="guess"),
        lambda d: d["target"].update(task="binary"),
        lambda d: d["target"].update(classes=[[]]),
    ],
)
def test_forged_preparations_are_refused(change: object) -> None:
    with pytest.raises(FileFormatError):
        Preparation.from_json(_changed(change))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "chainrule preparation 1"}'])
def test_cut_preparations_are_refused(text: str) -> None:
    with pytest.raises(FileFormatError):
        Preparation.from_json(text)


# -- target ---------------------------------------------------------------------------------------------------------------------


def test_target_of_numbers() -> None:
    t = np.random.default_rng(0).lognormal(size=100)
    for log in (False, True):
        code = TargetCode.fit("y", t, "regression", (), log=log)
        z = code.encode(t)
        np.testing.assert_allclose([z.mean(), z.std()], [0, 1], atol=1e-5)
        np.testing.assert_allclose(code.decode(z[:, None]), t, rtol=1e-5)
    with pytest.raises(DataError, match="row 2: it has no logarithm"):
        TargetCode.fit("y", np.array([1.0, 0.0]), "regression", (), log=True)


def test_target_of_classes() -> None:
    code = TargetCode.fit("y", np.array([0]), "multiclass", ("a", "b", "c"))
    y = Table.of({"y": ["c", "a", "b"]}).column("y")
    assert code.encode(y).tolist() == [2, 0, 1]
    assert code.decode(np.eye(3)[[2, 0, 1]]).tolist() == ["c", "a", "b"]
    assert (code.outputs, code.loss) == (3, "cross_entropy")
    with pytest.raises(DataError, match='"d" in row 2, a class that training did not have: a, b, c'):
        code.encode(Table.of({"y": ["a", "d"]}).column("y"))
    two = TargetCode.fit("y", np.array([0]), "binary", (3, 5))
    assert two.encode(np.array([5, 3, 5])).tolist() == [1, 0, 1]
    assert two.encode(Table.of({"y": ["5.0", "3"]}).column("y")).tolist() == [1, 0]
    assert two.decode(np.array([[0.2], [0.7]])).tolist() == [3, 5]
    assert two.decode(np.array([[0.8, 0.2], [0.3, 0.7]])).tolist() == [3, 5]


# -- held-out rows --------------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_even_disjoint_and_seeded() -> None:
    codes = np.array([0] * 80 + [1] * 20)
    training, testing = hold_out(codes, ("a", "b"), 0.2, seed=3)
    assert sorted([*training, *testing]) == list(range(100))
    assert codes[testing].tolist().count(1) == 4
    again = hold_out(codes, ("a", "b"), 0.2, seed=3)
    np.testing.assert_array_equal(again[0], training)
    assert hold_out(codes, ("a", "b"), 0.2, seed=4)[1].tolist() != testing.tolist()
    lonely = hold_out(np.array([0] * 9 + [1]), ("a", "b"), 0.2, seed=0)
    assert len(lonely[1]) == 2
    with pytest.raises(DataError, match="too few"):
        hold_out(np.zeros(4), (), 0.2, 0)
    with pytest.raises(DataError, match="between 0 and 1"):
        hold_out(np.zeros(40), (), 1.5, 0)


def test_tables_import_nothing_heavy() -> None:
    """Polars and scikit-learn take a second to import: only what needs them pays."""
    heavy = ["polars", "pandas", "sklearn", "scipy", "click", "rich"]
    probe = f"import sys, chainrule.data; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["t.csv.gz", "t.npz", "t.parquet"])
def test_what_unpacks_to_very_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("chainrule.data.read.UNPACKED", 100_000)
    rows = 4_000_000
    file = tmp_path / name
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(b"a,b\n" + b"0,0\n" * rows))
    elif name.endswith(".npz"):
        np.savez_compressed(file, a=np.zeros(rows))
    else:
        pl.DataFrame({"a": np.zeros(rows)}).write_parquet(file)
    assert 8 * rows > 200 * file.stat().st_size, "the sample is a bomb"
    with pytest.raises(DataError, match="would unpack to"):
        read_table(file)


def test_words_and_dates_in_numpy_files(tmp_path: Path) -> None:
    dates = np.array(["1970-01-02", "NaT"], dtype="datetime64[D]")
    np.savez(tmp_path / "t.npz", town=np.array([b"Aarhus", "Ærø".encode()]), day=dates)
    table = read_table(tmp_path / "t.npz")
    assert table.column("town").tolist() == ["Aarhus", "Ærø"]
    np.testing.assert_array_equal(table.column("day"), [1.0, np.nan])


def test_a_column_that_reading_left_out_says_why(tmp_path: Path) -> None:
    pl.DataFrame({"a": [1, 2], "lists": [[1], [2, 3]]}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"no column \"lists\" \(lists: left out, since List"):
        read_table(tmp_path / "t.parquet").column("lists")


def test_a_file_that_is_read_already(tmp_path: Path) -> None:
    assert read_table(tmp_path / "a pipe.csv", data=b"a,b\n1,2\n").rows == 1


@pytest.mark.parametrize(
    "values", [[1e308, -1e308] * 20, [5e-324, 0.0] * 20, [1e39, 1e39 + 1e24] * 20, [1e200, 1.0, 2.0, 3.0] * 10]
)
def test_numbers_beyond_measure_do_no_harm(values: list[float]) -> None:
    table = Table.of({"a": values, "b": [float(i % 7) for i in range(40)], "y": [float(i % 5) / 3 for i in range(40)]})
    preparation = Preparation.fit(table, understand(table, "y"))
    x, _ = preparation.apply(table)
    assert np.isfinite(x).all()
    assert np.abs(x).max() < 10
    assert np.isfinite(preparation.plain(table)).all()
    assert Preparation.from_json(preparation.to_json()) == preparation


def test_a_target_beyond_measure_is_refused_and_a_steady_one_is_not_blown_up() -> None:
    with pytest.raises(DataError, match=r"is 1e\+200 in row 3: take another unit"):
        TargetCode.fit("y", np.array([1.0, 2.0, 1e200]), "regression", ())
    steady = np.full(7, 1e39)
    code = TargetCode.fit("y", steady, "regression", ())
    assert np.abs(code.encode(steady)).max() < 1e-6
    np.testing.assert_allclose(code.decode(code.encode(steady)[:, None]), steady)


def test_more_classes_than_a_task_has() -> None:
    names = [f"n{i // 2}" for i in range(2400)]
    with pytest.raises(DataError, match="1,200 classes: 1,000 are the most"):
        understand(Table.of({"a": list(range(2400)), "y": names}), "y")


def test_tens_of_thousands_of_rare_words_take_no_time() -> None:
    column = Table.of({"w": [*(f"w{i // 2}" for i in range(40_000)), "new"]}).column("w")
    code = CategoryColumn.fit("w", column[:-1])
    remarks = Remarks()
    start = time.perf_counter()
    code.apply(column, remarks)
    assert time.perf_counter() - start < 10
    assert remarks.unseen["w"][:2] == (1, "new")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"format": "chainrule preparation 1", "missing": ["\\ud800"], "target": {}, "columns": []}',
        "[]",
        "1",
        "NaN",
    ],
)
def test_what_is_no_preparation(content: str) -> None:
    with pytest.raises(FileFormatError):
        Preparation.from_json(content)
