"""Pictures within a page: arrays of bytes as PNG, numbers as colours, rows of pictures as one.

In: arrays. Out: bytes of PNG, arrays of bytes that can be shown, and `Gallery`, which a report puts on its page. Nothing here needs
another library or a file.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]

RISES, FALLS = (31, 95, 168), (194, 84, 27)  # what numbers above and below 0 become: blue and orange
SHOWN = 64  # pixels on the screen: a small picture is enlarged by a whole number until its longer side has about so many, and a
# larger one is made smaller, so that a page stays small


@dataclass(frozen=True)
class Picture:
    """Bytes (height, width) or (height, width, 3) and what to write below."""

    pixels: Pixels
    caption: str


@dataclass(frozen=True)
class Gallery:
    """Pictures with a heading, and a sentence on how to read them. unit: the height of one of the pictures that a picture is made of."""

    heading: str
    about: str
    pictures: Sequence[Picture]
    unit: int


def png(pixels: Pixels) -> bytes:
    """A picture as a PNG file. Source: W3C, "Portable Network Graphics (PNG) specification", sections 5, 11 and 12.

    Args: pixels: uint8, (height, width) in grey or (height, width, 3).

    >>> png(np.zeros((2, 3), np.uint8))[:4]
    b'\\x89PNG'
    """
    height, width = pixels.shape[:2]
    kind = 0 if pixels.ndim == 2 else 2
    lines = np.zeros((height, 1 + pixels[0].size), np.uint8)  # each line begins with its filter, of which 0 is none
    lines[:, 1:] = pixels.reshape(height, -1)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")


def data_uri(pixels: Pixels) -> str:
    """A picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"


def factor(unit: int) -> int:
    """How many times a picture of this height is enlarged.

    >>> factor(28), factor(5), factor(100)
    (2, 12, 1)
    """
    return max(1, SHOWN // unit)


def resized(values: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[Any]:
    """A picture, or numbers (height, width, ...), brought to a size: the mean of those that fall together, repeated where it is larger.

    >>> resized(np.array([[0, 200, 8, 8]], np.uint8), (2, 2)).tolist()
    [[100, 8], [100, 8]]
    """
    means, together = values.astype(np.float64), np.ones(())
    for axis, want in enumerate(size):
        edges = np.arange(want) * values.shape[axis] // want
        means = np.add.reduceat(means, edges, axis)  # which takes one where two edges are the same
        counts = np.maximum(np.diff(edges, append=values.shape[axis]), 1)
        together = together * np.expand_dims(counts, tuple(range(1, means.ndim - axis)))
    means /= together
    return (np.rint(means) if values.dtype.kind == "u" else means).astype(values.dtype)


def signed(values: npt.NDArray[np.floating]) -> Pixels:
    """Numbers (height, width) as colours: 0 is white, the largest one in size blue if it is above 0 and orange if below.

    >>> signed(np.array([[1.0, 0.0, -1.0]])).tolist()
    [[[31, 95, 168], [255, 255, 255], [194, 84, 27]]]
    """
    share = (values / (np.abs(values).max() or 1.0))[..., None]
    end = np.where(share > 0, np.array(RISES), np.array(FALLS))
    shades: Pixels = np.rint(255 + np.abs(share) * (end - 255.0)).astype(np.uint8)
    return shades


def centred(values: npt.NDArray[np.floating]) -> Pixels:
    """Numbers (height, width, 3) for red, green and blue: 0 is the middle of each.

    >>> centred(np.array([[[2.0, 0.0, -2.0]]])).tolist()
    [[[255, 128, 1]]]
    """
    shades: Pixels = np.rint(128 + values * (127 / (np.abs(values).max() or 1.0))).astype(np.uint8)
    return shades


def coloured(pixels: Pixels) -> Pixels:
    """The same picture with three channels."""
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def strip(pictures: Sequence[Pixels], gap: int = 1) -> Pixels:
    """Pictures of one size beside each other, with white lines between; in grey if all are.

    >>> strip([np.zeros((1, 2), np.uint8), np.ones((1, 1), np.uint8)]).tolist()
    [[0, 0, 255, 1]]
    """
    if any(p.ndim == 3 for p in pictures):
        pictures = [coloured(p) for p in pictures]
    line = np.full((pictures[0].shape[0], gap, *pictures[0].shape[2:]), 255, np.uint8)
    parts = [part for p in pictures for part in (line, p)][1:]
    return np.concatenate(parts, axis=1)
