"""Pictures from files: what is read, what is brought to one size, and that every damaged file is refused by its name."""

from __future__ import annotations

import builtins
import gzip
import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from chainrule.data import images as module
from chainrule.data import read_images
from chainrule.data.images import holds_images
from chainrule.errors import DataError

Array = np.ndarray
RNG = np.random.default_rng(0)


def idx(array: Array, code: int = 8) -> bytes:
    head = bytes([0, 0, code, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def picture(shape: tuple[int, ...] = (8, 8)) -> Array:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: Array, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


# --------------------------------------------------------------------------------------------------------------------- IDX


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("labels_packed", [False, True])
def test_idx_brings_its_labels(tmp_path: Path, packed: bool, labels_packed: bool) -> None:
    pixels, labels = picture((5, 4, 3)), np.array([7, 2, 7, 9, 2], np.uint8)
    ending = ".gz" if packed else ""
    file = tmp_path / f"train-images-idx3-ubyte{ending}"
    file.write_bytes(gzip.compress(idx(pixels)) if packed else idx(pixels))
    assert read_images(file).codes is None
    beside = tmp_path / f"train-labels-idx1-ubyte{'.gz' if labels_packed else ''}"
    beside.write_bytes(gzip.compress(idx(labels)) if labels_packed else idx(labels))
    read = read_images(file)
    assert read.pixels.dtype == np.uint8
    assert np.array_equal(read.pixels, pixels)
    assert read.classes == (2, 7, 9)
    assert read.codes is not None
    assert read.codes.tolist() == [1, 0, 1, 2, 0]
    assert (read.size, read.colour, read.rows) == ((4, 3), False, 5)
    assert read.notes == (f"labels from {beside.name}",)
    assert holds_images(file)
    assert not holds_images(beside)


def test_idx_with_labels_that_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(idx(picture((3, 4, 4, 3))))
    (tmp_path / "b").write_bytes(idx(np.array([1, 0, 1], np.int32), 12))
    read = read_images(tmp_path / "a", labels=tmp_path / "b")
    assert read.colour
    assert read.classes == (0, 1)
    assert read.take(np.array([2, 0])).names == ("3", "1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.idx is empty"),
        (b"hello", "a.idx is neither a PNG or JPEG picture nor an IDX file"),
        (idx(np.zeros((2, 3, 3), np.uint8))[:-1], "a.idx is cut off or damaged: after its header 2 x 3 x 3"),
        (idx(np.zeros((2, 3, 3), np.uint8)) + b"x", "a.idx is cut off or damaged"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "a.idx is cut off or damaged"),
        (b"\0\0\x08\x04" + b"\xff" * 8 + bytes(4) + b"\xff" * 4, "a.idx is damaged: its header promises 4294967295 x"),
        (b"\0\0\x08\x03\0\0", "a.idx is cut off or damaged: its header of 3 axes takes 16 bytes, and it has 6"),
        (b"\0\0\x08\x00", "a.idx is no IDX file"),
        (idx(np.zeros((0, 3, 3), np.uint8)), "a.idx has no pictures"),
        (idx(np.zeros((2, 0, 3), np.uint8)), "a.idx has no pictures"),
        (idx(np.zeros((2, 3), np.uint8)), "a.idx holds uint8 of shape"),
        (idx(np.zeros((2, 3, 3, 2), np.uint8)), r"a.idx holds uint8 of shape \(2, 3, 3, 2\)"),
        (idx(np.zeros((2, 3, 3), np.float32), 13), "a.idx holds float32"),
        (gzip.compress(idx(np.zeros((2, 3, 3), np.uint8)), mtime=0)[:-9], "a.idx is gzipped but cut off"),
    ],
)
def test_damaged_idx(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path / "a.idx")


def test_labels_of_other_images_and_other_sizes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(idx(picture((3, 4, 4))))
    (tmp_path / "b").write_bytes(idx(np.array([1, 0], np.uint8)))
    with pytest.raises(DataError, match=r"/b has shape .*/a has 3 images"):
        read_images(tmp_path / "a", labels=tmp_path / "b")
    with pytest.raises(DataError, match="a has pictures of 4 x 4; 5 x 4 are needed"):
        read_images(tmp_path / "a", size=(5, 4))
    with pytest.raises(DataError, match="a is grey, and colour is needed"):
        read_images(tmp_path / "a", colour=True)
    with pytest.raises(DataError, match="a size of pictures"):
        read_images(tmp_path / "a", size=(0, 4))
    with pytest.raises(DataError, match="labels in a file of their own"):
        read_images(save(tmp_path / "p.png", picture()), labels=tmp_path / "b")


# ----------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_of_classes(tmp_path: Path) -> None:
    pixels = {(c, n): picture((6, 5)) for c in ("cat", "dog") for n in ("1.png", "2.PNG")}
    for (c, n), p in pixels.items():
        save(tmp_path / "pets" / c / n, p)
    (tmp_path / "pets" / "cat" / ".hidden").write_text("x")
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("x")
    read = read_images(tmp_path / "pets")
    assert read.classes == ("cat", "dog")
    assert read.codes is not None
    assert read.codes.tolist() == [0, 0, 1, 1]
    assert read.names == ("cat/1.png", "cat/2.PNG", "dog/1.png", "dog/2.PNG")
    assert np.array_equal(read.pixels, np.array(list(pixels.values())))
    assert read.notes == ("1 file that is neither PNG nor JPEG left out",)
    alone = read_images(tmp_path / "pets" / "dog")
    assert alone.codes is None
    assert np.array_equal(alone.pixels, read.pixels[2:])
    one = read_images(tmp_path / "pets" / "dog" / "1.png")
    assert np.array_equal(one.pixels, read.pixels[2:3])


def test_folders_within_classes_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/more/2.png", "dog/1.png"):
        save(tmp_path / name, picture())
    read = read_images(tmp_path)
    assert read.names == ("cat/1.png", "dog/1.png")
    assert read.notes == ("1 folder within those of the classes left out",)


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (("10", "2", "1", "02"), ("1", "02", "2", "10")),
        (("10", "2", "a"), ("10", "2", "a")),
        (("10", "2", "-1"), ("-1", "10", "2")),
        (("²", "10", "2"), ("10", "2", "²")),
    ],
)
def test_classes_that_are_numbers_are_in_their_order(tmp_path: Path, names: tuple[str, ...], classes: tuple[str, ...]) -> None:
    for name in names:
        save(tmp_path / name / f"of {name}.png", picture())
    read = read_images(tmp_path)
    assert read.classes == classes
    assert read.codes is not None
    assert [read.classes[code] for code in read.codes] == [name.split("/")[0] for name in read.names] == list(classes)


def test_sizes_are_brought_to_the_one_that_most_have(tmp_path: Path) -> None:
    wide = np.full((4, 8), 200, np.uint8)
    for i in range(3):
        save(tmp_path / "a" / f"{i}.png", picture((8, 8)))
    save(tmp_path / "b" / "wide.png", wide)
    read = read_images(tmp_path)
    assert read.size == (8, 8)
    assert (
        "1 of 4 pictures had another size than 8 x 8: scaled with their proportions until they fit inside, on black" in read.notes
    )
    expected = np.zeros((8, 8), np.uint8)
    expected[2:6] = 200
    assert np.array_equal(read.pixels[3], expected)
    doubled = read_images(tmp_path, size=(16, 16))
    assert (doubled.pixels[3, 4:12] == 200).all()
    assert (doubled.pixels[3, :4] == 0).all()


def test_large_pictures_are_made_smaller(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png", np.full((300, 600), 90, np.uint8))
    read = read_images(tmp_path)
    assert read.size == (32, 64)
    assert (read.pixels == 90).all()
    assert len(read.notes) == 1


def test_grey_and_colour(tmp_path: Path) -> None:
    grey, red = np.full((4, 4), 100, np.uint8), np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    save(tmp_path / "a" / "grey.png", grey)
    save(tmp_path / "b" / "red.png", red)
    read = read_images(tmp_path)
    assert read.colour
    assert (read.pixels[0] == 100).all()
    assert np.array_equal(read.pixels[1], red)
    assert read.notes == ("1 of 2 pictures were grey: all are colour",)
    forced = read_images(tmp_path, colour=False)
    assert not forced.colour
    assert (forced.pixels[1] == 76).all()  # the luminance of red, ITU-R 601
    assert forced.notes == ("1 of 2 pictures had colours: all are grey",)


def test_kinds_of_png_and_jpeg(tmp_path: Path) -> None:
    deep = (np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096 + 255).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read_images(tmp_path / "deep.png").pixels[0], (deep >> 8).astype(np.uint8))
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[:2, :, 3] = 255
    save(tmp_path / "clear.png", clear)
    seen = read_images(tmp_path / "clear.png").pixels[0]
    assert (seen[:2] == 0).all()
    assert (seen[2:] == 255).all()
    Image.fromarray(picture((4, 4, 3))).quantize(4).save(tmp_path / "palette.png")
    assert read_images(tmp_path / "palette.png").colour
    Image.fromarray(np.eye(4) > 0).save(tmp_path / "bits.png")
    assert np.array_equal(read_images(tmp_path / "bits.png").pixels[0], np.eye(4, dtype=np.uint8) * 255)
    Image.fromarray(np.full((8, 8, 3), 77, np.uint8)).convert("CMYK").save(tmp_path / "print.jpg")
    assert np.abs(read_images(tmp_path / "print.jpg").pixels.astype(int) - 77).max() <= 3


@pytest.mark.parametrize("clear", [5 * 4096 + 255, 0])
def test_the_transparent_grey_of_16_bits_lies_on_white(tmp_path: Path, clear: int) -> None:
    """All 16 bits tell the transparent one: what only its upper eight are alike stays."""
    deep = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096
    deep[:2] += 255
    deep[3, :2] = clear, clear ^ 1
    Image.fromarray(deep).save(tmp_path / "deep.png", transparency=clear)
    expected = np.where(deep == clear, 255, deep >> 8)
    assert expected[3].tolist()[:2] == [255, clear >> 8]
    assert np.array_equal(read_images(tmp_path / "deep.png").pixels[0], expected)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(deep).save(tmp_path / "turned.png", transparency=clear, exif=turned)
    assert np.array_equal(read_images(tmp_path / "turned.png").pixels[0], np.rot90(expected, -1))


def test_a_photo_that_is_to_be_turned(tmp_path: Path) -> None:
    lying = np.zeros((8, 16), np.uint8)
    lying[:, :8] = 250
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown after a quarter turn clockwise
    save(tmp_path / "photo.jpg", lying, exif=turned, quality=95)
    read = read_images(tmp_path / "photo.jpg")
    assert read.size == (16, 8)
    assert read.notes == ()
    assert read.pixels[0, 0].min() > 200
    assert read.pixels[0, -1].max() < 50


@pytest.mark.parametrize("orientation", [0, *range(1, 11)])
def test_pictures_that_are_to_be_turned_have_the_size_that_they_are_shown_with(tmp_path: Path, orientation: int) -> None:
    turned = Image.Exif()
    turned[0x0112] = orientation  # 5 to 8 lie on their side; what is not known is shown as it is
    save(tmp_path / "photo.jpg", np.full((8, 16), 250, np.uint8), exif=turned)
    read = read_images(tmp_path / "photo.jpg")
    assert read.size == ((16, 8) if orientation in range(5, 9) else (8, 16))
    assert read.pixels.min() > 200, "nothing is black that was not"


# --------------------------------------------------------------------------------------------------------------- bad files


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG of some hundred bytes that says it has very many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "c/bad.png is empty"),
        (b"GIF89a and more", "c/bad.png is neither PNG nor JPEG, whatever its ending says"),
        (b"<html>404</html>", "c/bad.png is neither PNG nor JPEG"),
        (PNG + b"nothing that follows", "c/bad.png is cut off or damaged"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "c/bad.png is cut off or damaged"),
        (bomb(40, 40), "c/bad.png is cut off or damaged"),
        (bomb(10_000, 9_000), "c/bad.png would unpack to 10,000 x 9,000 pixels, and 50 million are the most"),
        (bomb(60_000, 60_000), "c/bad.png would unpack to very many pixels"),
        (bomb(2**31 - 1, 2**31 - 1), "c/bad.png would unpack to very many pixels"),
        (bomb(0, 5), "c/bad.png is cut off or damaged"),
    ],
)
def test_a_bad_file_in_a_folder_is_refused_by_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    save(tmp_path / "c" / "good.png", picture())
    (tmp_path / "c" / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_images(tmp_path)


def test_a_bad_file_is_named_by_its_whole_path(tmp_path: Path) -> None:
    """The folders to train and to test on have classes of the same names."""
    save(tmp_path / "held" / "c" / "good.png", picture())
    bad = tmp_path / "held" / "c" / "bad.png"
    bad.write_bytes(PNG + b"nothing that follows")
    with pytest.raises(DataError, match=re.escape(f"{bad} is cut off or damaged")):
        read_images(tmp_path / "held")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_named_like_a_picture_is_not_waited_for(tmp_path: Path) -> None:
    save(tmp_path / "c" / "good.png", picture())
    pipe = tmp_path / "c" / "bad.png"
    os.mkfifo(pipe)
    writer = os.open(pipe, os.O_RDWR)
    try:
        os.write(writer, bytes(8))  # so that the test fails, and does not wait, where the pipe is read
        with pytest.raises(DataError, match=r"c/bad\.png is no regular file"):
            read_images(tmp_path)
    finally:
        os.close(writer)


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_every_way_to_cut_a_picture_off_is_refused_or_read(tmp_path: Path, ending: str) -> None:
    """None may crash, and none may pass for whole before its last bytes. Of damaged bytes, a PNG is read right or not at all."""
    whole = save(tmp_path / f"whole.{ending}", picture((9, 9, 3))).read_bytes()
    file = tmp_path / f"cut.{ending}"
    for end in range(0, len(whole) - 40, 7):
        file.write_bytes(whole[:end])
        with pytest.raises(DataError, match=f"cut.{ending}"):
            read_images(file)
    good, refused = read_images(tmp_path / f"whole.{ending}").pixels, list[str]()
    r = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(whole)
        for at in r.integers(0, len(whole), 3):
            broken[at] ^= int(r.integers(1, 256))
        file.write_bytes(bytes(broken))
        try:
            read = read_images(file).pixels
        except DataError as error:
            refused.append(str(error))
        else:
            assert read.dtype == np.uint8
            assert ending == "jpg" or np.array_equal(read, good), "PNG has checksums, JPEG has none"
    assert len(refused) >= 10
    assert all(said.startswith(str(file)) for said in refused)


def test_a_file_that_is_too_large_and_a_set_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a" / "1.png", picture())
    with monkeypatch.context() as m:
        m.setattr(module, "LARGEST_FILE", 10)
        with pytest.raises(DataError, match=r"a/1.png has 0 MiB"):
            read_images(tmp_path)
    with pytest.raises(DataError, match=r"pictures of 16384 x 16384 take .* ask for a smaller size"):
        monkeypatch.setattr(module, "MOST_BYTES", 1 << 20)
        read_images(tmp_path, size=(16384, 16384))


def test_what_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder without PNG or JPEG pictures: they are told by their endings"):
        read_images(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(picture((2, 3, 3))))
    with pytest.raises(DataError, match="name a file in it, such as train-images-idx3-ubyte"):
        read_images(tmp_path)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "full" / "1.png", picture())
    with pytest.raises(DataError, match=f"{tmp_path.name}/empty holds no PNG or JPEG: each folder"):
        read_images(tmp_path)
    save(tmp_path / "2.png", picture())
    with pytest.raises(DataError, match=r"holds both pictures \(2.png\) and folders \(full\)"):
        read_images(tmp_path)
    with pytest.raises(DataError, match="leave the labels out"):
        read_images(tmp_path, labels=tmp_path / "2.png")


@pytest.mark.parametrize(
    ("folders", "call"),
    [
        (("train", "test"), "{0}/train --test {0}/test"),
        (("Testing", "Training", "extra"), "{0}/Training --test {0}/Testing"),
        (("a", "b"), "{0}/a --test {0}/b"),
        (("all",), "{0}/all"),
    ],
)
def test_folders_of_classes_within_a_folder_are_noticed(tmp_path: Path, folders: tuple[str, ...], call: str) -> None:
    for name in folders:
        for kind in ("cat", "dog"):
            save(tmp_path / name / kind / "1.png", picture())
    (tmp_path / "aside").mkdir()
    with pytest.raises(DataError) as raised:
        read_images(tmp_path)
    ending = f"one level further down: chainrule train {call.format(tmp_path)}"
    assert str(raised.value) == f"{tmp_path} has the folders of classes {ending}"


def test_errors_name_the_path_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sets to train and to test on have files of the same names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held").mkdir()
    held = Path("held")
    pixels, whole = np.zeros((2, 3, 3), np.uint8), gzip.compress(idx(np.zeros((2, 3, 3), np.uint8)), mtime=0)
    contents = {
        "empty": b"",
        "text": b"hello",
        "cut": idx(pixels)[:-1],
        "gz": whole[:-9],
        "flat": idx(pixels[0]),
        "none": idx(pixels[:0]),
    }
    for name, content in contents.items():
        (held / name).write_bytes(content)
        with pytest.raises(DataError, match=f"^held/{name} "):
            read_images(held / name)
    (held / "good").write_bytes(idx(pixels))
    (held / "deep").write_bytes(idx(np.zeros(2, np.float32), 13))
    for options in ({"size": (5, 4)}, {"colour": True}, {"labels": held / "cut"}, {"labels": held / "deep"}):
        with pytest.raises(DataError, match=r"^held/(good|cut|deep) "):
            read_images(held / "good", **options)
    with pytest.raises(DataError, match="but held/good has 2 images"):
        read_images(held / "good", labels=held / "flat")
    save(held / "one.png", picture())
    with pytest.raises(DataError, match=r"held/one\.png is none"):
        read_images(held / "one.png", labels=held / "good")
    save(held / "set" / "a" / "1.png", picture())
    (held / "set" / "b").mkdir()
    with pytest.raises(DataError, match=r"^held/set/b holds no PNG or JPEG: each folder in held/set is taken"):
        read_images(held / "set")


def test_without_pillow_the_message_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(tmp_path / "1.png", picture())
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'chainrule\[images\]'"):
        read_images(file)
    (tmp_path / "i").write_bytes(idx(picture((2, 3, 3))))
    assert read_images(tmp_path / "i").rows == 2


def test_what_holds_images(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("a,b\n1,2\n")
    numbers = tmp_path / "n"
    numbers.write_bytes(idx(np.zeros((2, 3, 3), np.float32), 13))
    broken = tmp_path / "b.gz"
    broken.write_bytes(b"\x1f\x8b\x08broken")
    assert not any(map(holds_images, (table, numbers, broken, tmp_path / "none")))
    assert holds_images(tmp_path)
    assert holds_images(save(tmp_path / "p.jpg", picture()))
