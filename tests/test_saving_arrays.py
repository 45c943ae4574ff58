"""Arrays that layers were made with come back to the bit, from files of today and of version 1, or are refused when saving."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved
from same import assert_same, state
from saved import Noted, Scaled, parts, same_array, there_and_back

import chainrule as cr
from chainrule import nn

Array = np.ndarray
no_code_is_run = saved.no_code_is_run  # a fixture


def test_arguments_that_are_arrays_come_back(tmp_path: Path) -> None:
    """Means and deviations by channel, as NumPy computes them."""
    x = np.random.default_rng(0).integers(0, 256, (6, 4, 3, 2), dtype=np.uint8)
    mean, std = x.mean(axis=(0, 1, 2)) / 255, (x.std(axis=(0, 1, 2)) / 255).astype(np.float32)
    net = nn.Sequential(nn.Rescale(mean=mean, std=std), nn.Flatten(), Scaled(nn.Dense(2), np.arange(2)))
    net.fit(x, np.ones((6, 2)), epochs=1)
    again = there_and_back(net, tmp_path, [Scaled])
    assert (again[0].mean, again[0].std) == (net[0].mean, net[0].std)
    assert again[2].factor.dtype == np.arange(2).dtype
    np.testing.assert_array_equal(again.predict(x), net.predict(x))


STRANGE = np.array([0x00000000, 0x80000000, 0x00000001, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x3DCCCCCD], np.uint32)
TABLE = np.arange(24, dtype=np.float32).reshape(4, 6)
ARRAYS: dict[str, Array] = {
    "float32: zeros, subnormal, infinities, two NaN": STRANGE.view(np.float32),
    "float64: the same": np.array([0.0, -0.0, 5e-324, np.inf, -np.inf, np.nan, -np.nan, 0.1]),
    "float16": np.array([0.1, -0.0, np.nan], np.float16),
    "big-endian float32": STRANGE.astype(">u4").view(">f4"),
    "big-endian int64": np.array([1, -2, 2**62], ">i8"),
    "bool": np.array([[True, False], [False, True]]),
    **{f"{kind.__name__}": np.array([np.iinfo(kind).min, 0, np.iinfo(kind).max], kind)
       for kind in (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)},
    "no elements": np.zeros((0, 3), np.int32),
    "no elements, big-endian": np.zeros((2, 0), ">f8"),
    "no axes": np.array(-0.0),
    "Fortran order": np.asfortranarray(TABLE),
    "transposed": TABLE.T,
    "strided": TABLE[::2, 1::3],
    "backwards": TABLE[::-1, ::-1],
    "broadcast": np.broadcast_to(TABLE[0], (3, 6)),
    "unaligned": np.frombuffer(b"." + TABLE.tobytes(), np.float32, offset=1),
    "big-endian and strided": TABLE.astype(">f4")[1:, ::-2],
}  # fmt: skip


@pytest.mark.parametrize("array", list(ARRAYS.values()), ids=list(ARRAYS))
@pytest.mark.parametrize("is_built", [True, False], ids=["built", "not built"])
def test_arrays_come_back_to_the_bit(array: Array, is_built: bool, tmp_path: Path) -> None:
    net = nn.Sequential(Noted(array), nn.Dense(1))
    if is_built:
        net.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=0)
    notes = there_and_back(net, tmp_path, [Noted])[0].notes
    assert same_array(notes, np.array(array, order="C"))
    assert notes.flags.writeable
    assert notes.flags.aligned


def test_an_array_in_a_file_comes_back(tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", TABLE)
    net = nn.Sequential(Noted(np.load(tmp_path / "table.npy", mmap_mode="r")), nn.Dense(1))
    assert same_array(there_and_back(net, tmp_path, [Noted])[0].notes, TABLE)


def test_arrays_are_tensors_whatever_their_size(tmp_path: Path) -> None:
    """The description does not grow with them, and other programs can read them."""
    from safetensors.numpy import load_file

    headers = []
    for rows in (1, 1_000_000):
        table = np.random.default_rng(0).normal(size=(rows, 2))
        again = there_and_back(nn.Sequential(Noted({"tables": [table]}), nn.Dense(1)), tmp_path, [Noted])
        assert same_array(again[0].notes["tables"][0], table)
        headers.append(int.from_bytes((tmp_path / "net.safetensors").read_bytes()[:8], "little"))
        (only,) = load_file(tmp_path / "net.safetensors").values()
        assert same_array(only, table)
    assert headers[1] < headers[0] + 50


def test_an_array_that_is_given_twice_is_written_once(tmp_path: Path) -> None:
    """And is one array again, as layers that stand twice are; arrays that are only equal stay two."""
    table = TABLE.astype(">f4")
    net = nn.Sequential(Noted(table), Noted([table, table.copy()]), nn.Dense(1))
    again = there_and_back(net, tmp_path, [Noted])
    first, (second, third) = again[0].notes, again[1].notes
    assert first is second
    assert first is not third
    assert all(same_array(array, table) for array in (first, third))
    header, body = parts((tmp_path / "net.safetensors").read_bytes())
    assert sorted(name for name in header if name != "__metadata__") == ["argument/0", "argument/1"]
    assert len(body) == 2 * table.nbytes


class Halves(nn.Module):
    """A layer that writes into what it is made with."""

    def __init__(self, table: Array) -> None:
        table /= 2
        self.table = table

    def __call__(self, x: Any) -> Any:
        return x


def test_saving_writes_into_no_array_of_the_network(tmp_path: Path) -> None:
    net = nn.Sequential(Halves(np.ones(3)), nn.Dense(1))
    with pytest.raises(cr.UsageError, match="table"):
        net.save(tmp_path / "net.safetensors")
    assert net[0].table.tolist() == [0.5, 0.5, 0.5]


NO_TENSORS: dict[str, tuple[Any, str]] = {
    "complex": (np.ones(2, complex), "complex128"),
    "text": (np.array(["a"]), "<U1"),
    "objects": (np.array([None]), "object"),
    "times": (np.array(["2020-01-01"], "datetime64[D]"), "datetime64"),
    "records": (np.zeros(2, "i4,f4"), "i4"),
    "longer floats": (np.ones(2, np.longdouble), str(np.dtype(np.longdouble))),
    "masked": (np.ma.masked_array([1.0, 2.0], [True, False]), "MaskedArray"),
    "a matrix": (np.ones((2, 2)).view(np.matrix), "matrix"),
}


@pytest.mark.parametrize(
    ("array", "word"), [v for k, v in NO_TENSORS.items() if k != "longer floats" or np.dtype(np.longdouble).itemsize > 8]
)
def test_arrays_that_would_come_back_as_others_are_refused(array: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(cr.UsageError, match=rf"cannot hold .*{word}.* NumPy array of bool, integers or floats"):
        nn.Sequential(Noted(array), nn.Dense(1)).save(tmp_path / "net.safetensors")
    assert not os.listdir(tmp_path)


def test_a_description_that_no_file_can_hold(tmp_path: Path) -> None:
    with pytest.raises(cr.UsageError, match=r"too long for a file.* as arrays"):
        nn.Sequential(Noted("0" * 91_000_000), nn.Dense(1)).save(tmp_path / "net.safetensors")
    assert not os.listdir(tmp_path)


# --------------------------------------------------------------------------------------------------- files of earlier versions

VERSION_1 = Path(__file__).parent / "golden" / "network.1.safetensors"
NOTES_1 = {  # what stands in it
    "float32": np.array([[0.1, -0.0], [np.inf, 1e-45]], np.float32),
    "big-endian": np.array([1.5, -2.5], ">f8"),
    "half": np.array([0.1], np.float16),
    "bool": np.array([True, False]),
    "uint64": np.array(2**64 - 1, np.uint64),
    "int8": np.arange(-2, 4, dtype=np.int8).reshape(2, 3),
    "empty": np.zeros((0, 3), np.int32),
    "nan": np.array([np.nan, 1.0]),
    "nested": [(np.arange(2, dtype=np.int64), "a"), None],
}


def test_a_file_of_version_1_goes_on(tmp_path: Path) -> None:
    """Arrays stood in its description, as text. What was read is written as any other network."""
    header, _ = parts(VERSION_1.read_bytes())
    assert header["__metadata__"]["version"] == "1"
    assert not any(name.startswith("argument/") for name in header)
    x, t = np.arange(8.0).reshape(4, 2), np.ones((4, 1))
    net = cr.load(VERSION_1, layers=[Noted])
    again = there_and_back(net, tmp_path, [Noted])
    assert parts((tmp_path / "net.safetensors").read_bytes())[0]["__metadata__"]["version"] == "2"
    for each in (net, again):
        assert (each[0].mean, each[0].std) == ((0.25, 0.5), (1.0, 2.0))
        assert list(each[2].notes) == list(NOTES_1)
        for key, value in each[2].notes.items():
            assert key == "nested" or same_array(value, NOTES_1[key]), key
        (table, word), nothing = each[2].notes["nested"]
        assert same_array(table, np.arange(2, dtype=np.int64))
        assert (word, nothing) == ("a", None)
        given = [-0.3742467164993286, 1.2889742851257324, 1.2812591791152954, 1.2755993604660034]
        np.testing.assert_allclose(each.predict(x).ravel(), given, rtol=1e-5)
    assert_same(state(again), state(net))
    for each in (net, again):
        assert each.fit(x, t, epochs=1).steps == 1
    assert_same(state(again), state(net))
