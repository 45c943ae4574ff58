"""Data to try things on: XOR, handwritten digits small and large, tumours, houses, sunspots.

In: a name. Out: arrays (x, y); for the houses, which have categories, and the sunspots, which have dates, a `Table`; for the large digits
`Images`. Small digits and tumours come with scikit-learn.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..data import Images, Table, read_images, read_table

HOUSES_FILE = Path(__file__).parent / "WestRoxbury.csv.gz"
MNIST_FILE = Path(__file__).parent / "mnist-images-idx3-ubyte.gz"
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


def mnist() -> Images:
    """5,000 handwritten digits of 28 x 28 pixels in grey, 500 of each, white on black, in the order of the digits.

    Source: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", Proceedings of the IEEE 86, 1998;
    README.md beside this file.

    >>> images = mnist()
    >>> images.pixels.shape, images.classes
    ((5000, 28, 28), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9))
    """
    return read_images(MNIST_FILE)


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
