"""Data to try things on: XOR, handwritten digits, tumours, houses, sunspots.

In: a name. Out: arrays (x, y); for the houses, which have categories, and the sunspots, which have dates, a `Table`. Digits and tumours
come with scikit-learn.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..data import Table, read_table

HOUSES_FILE = Path(__file__).parent / "WestRoxbury.csv.gz"
SUNSPOTS_FILE = Path(__file__).parent / "sunspots.txt.gz"


def xor() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Exclusive or: the smallest task that no single layer can learn (Minsky & Papert 1969).

    Returns: x (4, 2), y (4,), all 0 or 1.

    >>> x, y = xor()
    >>> y
    array([0., 1., 1., 0.], dtype=float32)
    """
    x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.float32)
    return x, np.array([0, 1, 1, 0], dtype=np.float32)


def digits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """1,797 handwritten digits of 8 x 8 pixels.

    Returns: x (1797, 64) with pixels 0 .. 1, y (1797,) with digits 0 .. 9.
    Source: Alpaydin & Kaynak 1998, Optical Recognition of Handwritten Digits; `sklearn.datasets.load_digits`.

    >>> x, y = digits()
    >>> x.shape, y[:4]
    ((1797, 64), array([0, 1, 2, 3]))
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x / 16).astype(np.float32), y.astype(np.int64)


def tumours() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """569 breast tumours, described by 30 numbers on the nuclei of their cells.

    Returns: x (569, 30) as measured, y (569,) with 1 for malignant.
    Source: Street, Wolberg & Mangasarian 1993; `sklearn.datasets.load_breast_cancer`, which has malignant as 0.

    >>> x, y = tumours()
    >>> x.shape, int(y.sum())
    ((569, 30), 212)
    """
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    return x.astype(np.float32), (1 - y).astype(np.int64)


def houses() -> Table:
    """5,802 houses; the target is "TOTAL VALUE" in thousands of dollars, and "TAX", a multiple of it, must be left out.

    Source: README.md beside this file.

    >>> table = houses()
    >>> table.rows, float(table.column("TOTAL VALUE")[0])
    (5802, 344.2)
    """
    return read_table(HOUSES_FILE)


def sunspots() -> Table:
    """2,820 monthly means of the relative number of sunspots, 1749 to 1983, with the first day of each month as "month".

    Source: Andrews & Herzberg 1985, "Data", from the Zürich observatory and, since 1960, that of Tokyo; README.md beside this file.

    >>> table = sunspots()
    >>> table.rows, table.dates, float(table.column("sunspots")[0])
    (2820, ('month',), 58.0)
    """
    with gzip.open(SUNSPOTS_FILE, "rt", encoding="ascii") as file:
        values = np.array(file.read().split(), dtype=np.float64)
    months = np.datetime64("1749-01", "M") + np.arange(len(values))
    return Table.of({"month": months, "sunspots": values}, "monthly counts")
