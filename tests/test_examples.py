"""The example data is what its README says."""

from __future__ import annotations

import numpy as np
import pytest

from chainrule import examples
from chainrule.data.table import numbers


def test_xor() -> None:
    x, y = examples.xor()
    np.testing.assert_array_equal(y, x[:, 0] != x[:, 1])


def test_digits() -> None:
    x, y = examples.digits()
    assert x.shape == (1797, 64)
    assert (x.min(), x.max()) == (0, 1)
    assert x.dtype == np.float32
    assert np.bincount(y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_tumours() -> None:
    x, y = examples.tumours()
    assert x.shape == (569, 30)
    assert np.bincount(y).tolist() == [357, 212]
    assert x[y == 1, 0].mean() > x[y == 0, 0].mean(), "malignant ones are larger"


def test_houses() -> None:
    table = examples.houses()
    value, tax = (numbers(table.column(name))[0] for name in ("TOTAL VALUE", "TAX"))
    assert (table.rows, len(table.columns)) == (5802, 14)
    assert round(value.mean(), 1) == 392.7
    assert round(value.std(ddof=1), 1) == 99.2
    assert np.corrcoef(value, tax)[0, 1] > 0.9999999
    assert (table.column("REMODEL") == "None").sum() == 4346
    assert not any(name != name.strip() for name in table.columns)
    assert numbers(table.column("YR BUILT"))[0].min() == 0


def test_mnist() -> None:
    images = examples.mnist()
    assert (images.rows, images.size, images.colour) == (5000, (28, 28), False)
    assert images.codes is not None
    assert np.bincount(images.codes).tolist() == [500] * 10
    assert len(np.unique(images.pixels.reshape(5000, -1), axis=0)) == 5000
    assert images.pixels.mean() == pytest.approx(33.3, abs=0.5)  # that of all of MNIST


def test_sunspots() -> None:
    table = examples.sunspots()
    values = table.column("sunspots")
    assert table.rows == 2820
    assert (values[0], values[-1], values.max()) == (58.0, 33.4, 253.8)
    assert round(values.mean(), 2) == 51.27
    months = table.column("month").astype("M8[D]")
    assert (str(months[0]), str(months[-1])) == ("1749-01-01", "1983-12-01")
    assert str(months[values.argmax()]) == "1957-10-01", "the highest of all cycles so far"


def test_the_licences_travel_with_the_data() -> None:
    for name, licence in (("WestRoxbury", "MIT License"), ("sunspots", "MIT License"), ("mnist", "New BSD License")):
        assert licence in (examples.HOUSES_FILE.parent / f"{name}.LICENSE").read_text(encoding="utf-8")
