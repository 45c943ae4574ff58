"""Text as numbers for a network that predicts the next character, and what simple counts make of the same text.

In: the bytes of a text file. Out: `Alphabet`, made from the part that is learnt from; windows of codes; bits per character.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError, FileFormatError
from .fields import fields_of, object_of
from .parse import decoded
from .read import file_bytes
from .table import Values

FORMAT = "chainrule characters 1"
MOST = 1_000  # characters with a code of their own: the most frequent ones
LARGEST = 256 << 20  # bytes: more than a machine without GPU learns in a week


def read_text(path: str | Path) -> tuple[str, list[str]]:
    """(the text of a file, with "\\n" at the ends of lines; notes on its encoding).

    Raises: `DataError` for a file that is not there, no text, empty, or larger than can be learnt.
    """
    path = Path(path)
    data = file_bytes(path)
    if len(data) > LARGEST:
        raise DataError(f"{path.name} has {len(data) >> 20:,} MiB of text, and {LARGEST >> 20:,} are the most: take a part of it")
    content, notes = decoded(path.name, data, "a text file")
    content = content.replace("\r\n", "\n").replace("\r", "\n")
    if not content.strip():
        raise DataError(f"{path.name} is empty: there is no text to learn from")
    return content, notes


@dataclass(frozen=True)
class Alphabet:
    """A code for each character: its place in `characters`; all others have the code len(characters).

    Args: characters: the most frequent ones first. length: how many of them a network reads at a time.

    >>> alphabet = Alphabet.of("banana", 4)
    >>> alphabet.characters, alphabet.encode("nab?").tolist(), alphabet.decode([1, 0])
    ('anb', [1, 0, 2, 3], 'na')
    """

    characters: str
    length: int

    @classmethod
    def of(cls, text: str, length: int) -> Alphabet:
        """The alphabet of a text."""
        points, counts = np.unique(_points(text), return_counts=True)
        order = np.argsort(-counts, kind="stable")[:MOST]
        return cls("".join(chr(p) for p in points[order]), length)

    @property
    def size(self) -> int:
        """How many codes there are."""
        return len(self.characters) + 1

    def encode(self, text: str) -> Values:
        """int32 (len(text),)."""
        own = _points(self.characters)
        order = np.argsort(own)
        points = _points(text)
        places = np.minimum(np.searchsorted(own[order], points), len(own) - 1)
        codes = order[places]
        return np.where(own[codes] == points, codes, len(own)).astype(np.int32)

    def decode(self, codes: Sequence[int]) -> str:
        """The characters of codes that have one."""
        return "".join(self.characters[code] for code in codes)

    def windows(self, codes: Values) -> tuple[Values, Values]:
        """(x, y), each (windows, length): y is the character after that of x. What does not fill a window is left out."""
        count = max(len(codes) - 1, 0) // self.length
        x, y = (codes[i : i + count * self.length].reshape(count, self.length) for i in (0, 1))
        return x, y

    def to_json(self) -> str:
        content = {"format": FORMAT, "length": self.length, "characters": self.characters}
        return json.dumps(content, indent=1, ensure_ascii=True)

    @classmethod
    def from_json(cls, content: str) -> Alphabet:
        """The alphabet that `to_json` wrote. Raises: `FileFormatError` for anything else."""
        parts = fields_of(
            object_of(content, "the alphabet", FORMAT), {"format": str, "length": int, "characters": str}, "the alphabet"
        )
        characters = parts["characters"]
        if not 0 < len(characters) <= MOST or len(set(characters)) != len(characters) or not 0 < parts["length"] < 2**20:
            raise FileFormatError("the alphabet has no characters, too many, or one of them twice, or its length makes no sense")
        return cls(characters, parts["length"])


def _points(text: str) -> Values:
    """The code points of a text: uint32 (len(text),)."""
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")


def counted_bits(codes: Values, size: int, x: Values, y: Values) -> dict[str, float]:
    """Bits per character of y by how often characters, and pairs of them, are in `codes`; x is the character before each of y.

    p(b) = (count(b) + 1) / (count + size); p(b | a) = (count(ab) + p(b)) / (count(a) + 1), so that pairs never seen are possible.
    Source of the second: MacKay & Peto, "A hierarchical Dirichlet language model", 1995, with one pseudo-count.

    >>> codes = np.array([0, 1, 0, 1, 0, 1, 0, 1, 0])
    >>> {name: round(bits, 2) for name, bits in counted_bits(codes, 2, codes[:-1], codes[1:]).items()}
    {'characters by frequency': 1.01, 'pairs by frequency': 0.15}
    """
    single = (np.bincount(codes, minlength=size) + 1) / (len(codes) + size)
    pairs = np.zeros((size, size))
    np.add.at(pairs, (codes[:-1], codes[1:]), 1)
    double = (pairs + single) / (pairs.sum(axis=1, keepdims=True) + 1)
    return {
        "characters by frequency": float(-np.mean(np.log2(single[y]))),
        "pairs by frequency": float(-np.mean(np.log2(double[x, y]))),
    }
