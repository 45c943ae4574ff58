"""Reads images with their classes: IDX files (MNIST's format) and folders of PNG and JPEG, one folder a class.

In: a path. Out: `Images`, bytes as they are shown, all of one size, grey or in colour. What had to be changed to make them alike is
said in the notes. PNG and JPEG are decoded by Pillow, which is imported when it is needed. No file is trusted: one that is cut off,
no picture, or would unpack to very much is refused with its name, before it fills the memory. The one damage that passes is that of
the data of a JPEG which still has its end: JPEG has no checksums, libjpeg warns of what it notices and goes on, and Pillow keeps these
warnings to itself.
"""

from __future__ import annotations

import contextlib
import gzip
import stat
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .read import GZIP, IDX_DTYPES, file_bytes, idx_array, idx_labels
from .table import Values

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".png", ".jpg", ".jpeg")
FORMATS = ("PNG", "JPEG")
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
MOST_PIXELS = 50_000_000  # of one picture: more than cameras take, and less than fills a memory
LARGEST_FILE = 256 << 20
MOST_BYTES = 4 << 30  # of all pictures of a folder together
LONGEST_SIDE = 64  # of pictures in a folder, unless another size is asked for: a small network has no use for more
GREYS = ("1", "L", "LA", "I", "I;16", "I;16L", "I;16B")
SIDE = 16_384  # a side may be asked for so long

Size = tuple[int, int]


@dataclass(frozen=True)
class Images:
    """Pictures and what they show.

    Attributes:
        pixels: uint8, (rows, height, width) in grey, (rows, height, width, 3) in colour; 0 is black.
        codes: (rows,), the place in `classes` of what each shows; None where nobody says.
        classes: the names of folders, or the numbers of a file of labels, in order.
        names: what to call each picture: its file, or its number in an IDX file.
        source: the name of the file or folder. notes: what reading had to decide, one sentence each.
    """

    pixels: Values
    codes: Values | None
    classes: tuple[str | int, ...]
    names: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return len(self.pixels)

    @property
    def size(self) -> Size:
        """(height, width)."""
        return self.pixels.shape[1], self.pixels.shape[2]

    @property
    def colour(self) -> bool:
        return self.pixels.ndim == 4

    def take(self, rows: Values) -> Images:
        """These pictures, by number."""
        codes = None if self.codes is None else self.codes[rows]
        return replace(self, pixels=self.pixels[rows], codes=codes, names=tuple(self.names[i] for i in rows.tolist()))


def holds_images(path: str | Path) -> bool:
    """Whether `read_images` is for this: a folder, a picture, or an IDX file of bytes with at least three axes, also gzipped.

    Raises: `DataError` for a file that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return True
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    if start.startswith(SIGNATURES):
        return True
    if start.startswith(GZIP):
        with contextlib.suppress(OSError, EOFError, zlib.error), gzip.open(path) as unpacked:
            start = unpacked.read(4)
    return start[:3] == b"\0\0\x08" and start[3:4] >= b"\3"


def read_images(
    path: str | Path, *, labels: str | Path | None = None, size: Size | None = None, colour: bool | None = None
) -> Images:
    """The pictures in an IDX file, in a folder, or in one PNG or JPEG file.

    An IDX file of bytes has the axes (rows, height, width) or (rows, height, width, 3). Of a folder, the folders in it are the classes
    and the PNG and JPEG files in these are the pictures; a folder with pictures of its own has no classes. Classes are in the order of
    their names, or of their numbers if all names are whole numbers.

    Sizes: pictures from files are brought to one size: the one asked for, or the one that most have, made smaller in proportion where a
    side is longer than 64. A picture of another size is scaled, with its proportions, until it fits inside, and stands in the middle of
    black. Colours: all are grey if all files are, else all have three channels. What is transparent lies on white. Numbers of 16 bits
    lose the lower eight. Pictures in IDX files are never changed.

    Damage: a file that is cut off is refused, and so is a damaged PNG, which has checksums. A JPEG of which some bytes in the middle are
    wrong may be read as the wrong picture.

    Args: labels: for an IDX file, that of its labels; without it, `...-images-idx3-ubyte` brings `...-labels-idx1-ubyte`, gzipped or not.
    size: (height, width) to bring pictures to. colour: whether they are to have three channels or one.
    Raises: `DataError` that names the file and says what is wrong with it.

    >>> read_images("no-such-folder")
    Traceback (most recent call last):
    chainrule.errors.DataError: there is no file "no-such-folder"...
    """
    path = Path(path)
    if size is not None and (len(size) != 2 or not all(1 <= side <= SIDE for side in size)):
        raise DataError(f"a size of pictures is (height, width), each from 1 to {SIDE:,}, not {size}")
    if labels is not None and path.is_dir():
        raise DataError(f"{path} is a folder, whose pictures are labelled by the folders that they lie in: leave the labels out")
    if path.is_dir():
        return _folder(path, size, colour)
    data = file_bytes(path)
    if not data:
        raise DataError(f"{path} is empty: it holds no picture")
    if data[:2] == b"\0\0" and data[2:3] and data[2] in IDX_DTYPES:
        return _idx(path, data, None if labels is None else Path(labels), size, colour)
    if labels is not None:
        raise DataError(f"labels in a file of their own go with IDX images, and {path} is none: leave them out")
    if not data.startswith(SIGNATURES):
        raise DataError(f"{path} is neither a PNG or JPEG picture nor an IDX file: its first bytes are {data[:4]!r}")
    return _pictures(path.name, [(path, None)], (), size, colour, [])


def _idx(path: Path, data: bytes, labels: Path | None, size: Size | None, colour: bool | None) -> Images:
    pixels = idx_array(str(path), data)
    if pixels.ndim == 4 and pixels.shape[3] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or pixels.ndim < 3 or (pixels.ndim == 4 and pixels.shape[3] != 3) or pixels.ndim > 4:
        raise DataError(
            f"{path} holds {pixels.dtype} of shape {pixels.shape}: pictures are uint8, (rows, height, width) or "
            "(rows, height, width, 3)"
        )
    if not pixels.size:
        raise DataError(f"{path} has no pictures: its shape is {pixels.shape}")
    if size is not None and pixels.shape[1:3] != size:
        raise DataError(f"{path} has pictures of {_by(pixels.shape[1:3])}; {_by(size)} are needed, and IDX is never resized")
    if colour is not None and colour != (pixels.ndim == 4):
        raise DataError(f"{path} is {'in colour' if pixels.ndim == 4 else 'grey'}, and {_tone(colour)} is needed")
    found = idx_labels(path, len(pixels), labels)
    names = tuple(str(i) for i in range(1, len(pixels) + 1))
    if found is None:
        return Images(pixels, None, (), names, path.name)
    classes, codes = np.unique(found[0], return_inverse=True)
    if classes.dtype.kind == "f":
        raise DataError(f"{found[1]} holds {classes.dtype}: labels are whole numbers")
    return Images(pixels, codes, tuple(classes.tolist()), names, path.name, (f"labels from {found[1].name}",))


def _folder(path: Path, size: Size | None, colour: bool | None) -> Images:
    """The pictures of a folder, by class if it has folders with pictures."""
    own, others, folders = _listed(path)
    source = path.resolve().name or str(path)
    inside = {folder.name: _listed(folder) for folder in folders}
    classes = tuple(name for name, (pictures, _, _) in inside.items() if pictures)
    if all(name.isascii() and name.isdecimal() for name in classes):
        classes = tuple(sorted(classes, key=int))
    if not own and not classes:
        if deeper := [f for f in folders if any(_listed(below)[0] for below in inside[f.name][2])]:
            raise DataError(f"{path} has the folders of classes one level further down: {_call(deeper)}")
        idx = next((f.name for f in others if "idx3" in f.name), None)
        hint = f"name a file in it, such as {idx}" if idx else f"they are told by their endings ({', '.join(ENDINGS)})"
        raise DataError(f"{path} is a folder without PNG or JPEG pictures: {hint}")
    if own and classes:
        raise DataError(f"{path} holds both pictures ({own[0].name}) and folders ({classes[0]}): put all into folders by class")
    if classes and len(classes) < len(inside):
        empty = next(name for name in inside if name not in classes)
        raise DataError(f"{path / empty} holds no PNG or JPEG: each folder in {path} is taken for a class")
    files: list[tuple[Path, int | None]] = [(file, None) for file in own]
    files += [(file, code) for code, name in enumerate(classes) for file in inside[name][0]]
    strange = len(others) + sum(len(inside[name][1]) for name in classes)
    notes = [f"{strange:,} {'file that is' if strange == 1 else 'files that are'} neither PNG nor JPEG left out"] * bool(strange)
    below = sum(len(inside[name][2]) for name in classes)
    notes += [f"{below:,} {'folder' if below == 1 else 'folders'} within those of the classes left out"] * bool(below)
    return _pictures(source, files, tuple(map(_text, classes)), size, colour, notes)


def _call(folders: list[Path]) -> str:
    """How to learn from folders of which each has classes: from the one for training, tested on another, if there is one."""
    learn = next((f for f in folders if f.name.lower().startswith("train")), folders[0])
    others = [f for f in folders if f != learn]
    test = next((f for f in others if f.name.lower().startswith("test")), others[0] if others else None)
    return f"chainrule train {quote(str(learn))}" + (f" --test {quote(str(test))}" if test else "")


def _text(name: str) -> str:
    """A name of the file system as text: of one that is no Unicode, the odd bytes are written as escapes, for no file can hold them."""
    return name.encode("utf-8", "backslashreplace").decode()


def _listed(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """(pictures, other files, folders) in a folder, by name; what begins with a dot is not looked at."""
    try:
        inside = sorted((f for f in folder.iterdir() if not f.name.startswith(".")), key=lambda f: f.name)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}") from None
    folders = [f for f in inside if f.is_dir()]
    pictures = [f for f in inside if f not in set(folders) and f.suffix.lower() in ENDINGS]
    return pictures, [f for f in inside if f not in {*folders, *pictures}], folders


def _pictures(
    source: str,
    files: list[tuple[Path, int | None]],
    classes: tuple[str, ...],
    size: Size | None,
    colour: bool | None,
    notes: list[str],
) -> Images:
    """Files of pictures, brought to one size and to as many channels. Heads are looked at first, so nothing large is decoded in vain."""
    heads = []
    for file, _ in files:
        with _opened(file) as image:
            heads.append((_size(image), image.mode not in GREYS))
    sizes, coloured = Counter(head[0] for head in heads), sum(head[1] for head in heads)
    wanted = size or reduced(sizes.most_common(1)[0][0])
    colour = coloured > 0 if colour is None else colour
    height, width = wanted
    total = len(files) * height * width * (3 if colour else 1)
    if total > MOST_BYTES:
        raise DataError(f"{source}: {len(files):,} pictures of {_by(wanted)} take {total / 1e9:.1f} GB: ask for a smaller size")
    pixels = np.zeros((len(files), height, width, *((3,) if colour else ())), np.uint8)
    for i, (file, _) in enumerate(files):
        with _opened(file) as image:
            _decode(image, pixels[i])
    other = len(files) - sizes[wanted]
    if other:
        few = f"{other:,} of {len(files):,} pictures had another size than {_by(wanted)}"
        notes.append(f"{few}: scaled with their proportions until they fit inside, on black")
    mixed = coloured if not colour else len(files) - coloured
    if mixed:
        notes.append(f"{mixed:,} of {len(files):,} pictures {'were grey' if colour else 'had colours'}: all are {_tone(colour)}")
    codes = np.array([code for _, code in files], np.int64) if classes else None
    names = tuple(f"{file.parent.name}/{file.name}" if classes else file.name for file, _ in files)
    return Images(pixels, codes, classes, names, source, tuple(notes))


def _by(size: Any) -> str:
    return f"{size[0]} x {size[1]}"


def _tone(colour: bool) -> str:
    return "colour" if colour else "grey"


def reduced(size: Size, longest: int = LONGEST_SIDE) -> Size:
    """No side longer than this, in proportion.

    >>> reduced((300, 400)), reduced((28, 28))
    ((48, 64), (28, 28))
    """
    factor = min(1.0, longest / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _pillow() -> Any:
    """Pillow's `Image` and `ImageOps`."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise DataError("PNG and JPEG pictures are read by Pillow: pip install 'chainrule[images]'") from None
    return Image, ImageOps


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Image]:
    """A picture of which the head has been read. Whatever fails while it is used is an error that names the file."""
    reader, _ = _pillow()
    name = str(file)
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):
            raise DataError(f"{name} is no regular file: remove it")  # before a pipe is opened, which would wait for its writer
        with file.open("rb") as opened:
            start = opened.read(8)
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or error}") from None
    if not about.st_size:
        raise DataError(f"{name} is empty: remove it, or copy it again")
    if not start.startswith(SIGNATURES):
        raise DataError(f"{name} is neither PNG nor JPEG, whatever its ending says: its first bytes are {start[:4]!r}")
    if about.st_size > LARGEST_FILE:
        raise DataError(f"{name} has {about.st_size >> 20:,} MiB, and {LARGEST_FILE >> 20} are the most for a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, which is looked at here, and of odd but harmless parts
            with reader.open(file, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise DataError(_bomb(name, f"{image.width:,} x {image.height:,} pixels"))
                yield image
    except (DataError, MemoryError):
        raise
    except reader.DecompressionBombError:
        raise DataError(_bomb(name, "very many pixels")) from None
    except Exception as error:  # Pillow's decoders each raise their own kinds on damaged files
        said = " ".join(str(error).split())[:120]
        raise DataError(f"{name} is cut off or damaged ({said}): remove it, or copy it again") from None


def _bomb(name: str, size: str) -> str:
    return f"{name} would unpack to {size}, and {MOST_PIXELS // 10**6} million are the most: if you trust it, make it smaller"


def _size(image: Image) -> Size:
    """(height, width) as it is to be shown: cameras write lying pictures and say that they are to be turned."""
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def _decode(image: Image, into: Values) -> None:
    """Writes a picture into an array of bytes, scaled to fit."""
    reader, ops = _pillow()
    shown = ops.exif_transpose(image)
    if shown.mode.startswith("I"):  # 16 bits; Pillow would cut off what is larger than 255
        deep = np.asarray(shown).astype(np.uint32)
        grey = np.where(deep == shown.info.get("transparency", -1), 255, deep >> 8)
        shown = reader.fromarray(grey.astype(np.uint8))
    if "A" in shown.getbands() or "transparency" in shown.info:
        shown = reader.alpha_composite(reader.new("RGBA", shown.size, "white"), shown.convert("RGBA"))
    shown = shown.convert("RGB" if into.ndim == 3 else "L")
    height, width = into.shape[:2]
    factor = min(height / shown.height, width / shown.width)
    if shown.size != (width, height):
        fit = (max(1, min(width, round(shown.width * factor))), max(1, min(height, round(shown.height * factor))))
        shown = shown.resize(fit, reader.Resampling.BILINEAR)
    top, left = (height - shown.height) // 2, (width - shown.width) // 2
    into[top : top + shown.height, left : left + shown.width] = np.asarray(shown)
