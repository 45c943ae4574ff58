"""Files of networks: what is written comes back, and no truncated or forged file does anything but raise `FileFormatError`."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from same import assert_same, state

import chainrule as cr
from chainrule import nn
from chainrule.losses import losses
from chainrule.optim import optimizers
from chainrule.schedules import schedules

Array = np.ndarray


def data(rows: int = 12, inputs: int = 4, outputs: int = 2) -> tuple[Array, Array]:
    r = np.random.default_rng(0)
    return r.normal(size=(rows, inputs)), r.normal(size=(rows, outputs))


class Scaled(nn.Module):
    """A layer of a user."""

    def __init__(self, layer: nn.Module, factor: float = 2.0, *, names: tuple[str, ...] = ()) -> None:
        self.layer, self.factor, self.names = layer, factor, names

    def __call__(self, x: Any) -> Any:
        return self.factor * self.layer(x) * self.parameter("gain", (1,), "ones")


class Branches(nn.Module):
    """Two named inputs."""

    def __init__(self) -> None:
        self.a, self.b = nn.Dense(2), nn.Dense(2)

    def __call__(self, left: Any, right: Any) -> Any:
        return self.a(left) * self.b(right)


def there_and_back(net: nn.Module, folder: Path, layers: Any = ()) -> nn.Module:
    path = folder / "net.safetensors"
    net.save(path)
    return cr.load(path, layers=layers)


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


class Noted(nn.Module):
    """A layer with an array that it only keeps."""

    def __init__(self, notes: Any) -> None:
        self.notes = notes

    def __call__(self, x: Any) -> Any:
        return x


def same_array(a: Any, b: Any) -> bool:
    """The same bits in the same order, of the same type, byte order included."""
    return type(a) is type(b) is np.ndarray and (a.shape, a.dtype.str, a.tobytes()) == (b.shape, b.dtype.str, b.tobytes())


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


# ------------------------------------------------------------------------------------------------------------- there and back

EXAMPLES = [(name, example) for name, layer in nn.layers.items() for example in layer.examples]


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[f"{n}-{k}" for k, (n, _) in enumerate(EXAMPLES)])
def test_every_registered_layer(name: str, example: Mapping[str, Any], tmp_path: Path) -> None:
    r = np.random.default_rng(0)
    x = r.integers(0, example["below"], example["input"]) if "below" in example else r.normal(size=example["input"])
    layer = nn.layers[name](*copy.deepcopy(example["args"]))
    net = nn.Sequential(layer, nn.Flatten(), nn.Dense(2))
    t = r.normal(size=(len(x), 2))
    net.fit(x, t, epochs=2, batch_size=2, optimizer=cr.Adam(0.01)) if len(x) % 2 == 0 else net.fit(x, t, epochs=2)
    again = there_and_back(net, tmp_path)
    assert repr(again) == repr(net)
    assert again.summary() == net.summary()
    assert_same(state(again), state(net))
    np.testing.assert_array_equal(again.predict(x), net.predict(x))
    assert_same(again.gradients(x, t, seed=3), net.gradients(x, t, seed=3))
    for each in (net, again):
        each.fit(x, t, epochs=1)
    assert_same(state(again), state(net))
    assert again.evaluate(x, t) == net.evaluate(x, t)


OPTIMIZERS = [(name, options) for name, rule in optimizers.items() for options in rule.examples]


@pytest.mark.parametrize(("name", "options"), OPTIMIZERS, ids=[f"{n}-{'-'.join(o)}" for n, o in OPTIMIZERS])
def test_every_optimizer_goes_on(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(3, "tanh"), nn.Dense(2))
    net.fit(x, t, epochs=3, batch_size=5, optimizer=optimizers[name](**options))
    again = there_and_back(net, tmp_path)
    runs = [each.fit(x, t, epochs=2, batch_size=5) for each in (net, again)]
    assert_same(state(again), state(net))
    assert runs[0].loss == runs[1].loss


@pytest.mark.parametrize("name", list(schedules))
def test_every_schedule_goes_on(name: str, tmp_path: Path) -> None:
    x, t = data()
    net = nn.Dense(2)
    net.fit(x, t, epochs=3, batch_size=5, optimizer=cr.SGD(schedules[name](0.1), accumulate=2, clip_norm=1.0, l2=0.1))
    again = there_and_back(net, tmp_path)
    runs = [each.fit(x, t, epochs=2, batch_size=5) for each in (net, again)]
    assert runs[0].learning_rate == runs[1].learning_rate
    assert_same(state(again), state(net))


LOSSES = [(name, number) for name, loss in losses.items() for number in range(len(loss.examples))]


@pytest.mark.parametrize(("name", "number"), LOSSES, ids=[f"{n}-{k}" for n, k in LOSSES])
def test_every_loss_is_remembered(name: str, number: int, tmp_path: Path) -> None:
    example = losses[name].examples[number]
    loss = losses[name](**example.options)
    x = np.arange(float(len(example.scores)))[:, None]
    net = nn.Sequential(nn.Dense(int(np.prod(example.scores.shape[1:]))), nn.Reshape(*example.scores.shape[1:]))
    net.fit(x, example.target, loss=loss, epochs=1)
    again = there_and_back(net, tmp_path)
    assert again.evaluate(x, example.target) == net.evaluate(x, example.target)
    if loss.is_classification and loss.link != "identity":
        np.testing.assert_array_equal(again.predict_proba(x), net.predict_proba(x))


def test_sharing_freezing_precision_and_names(tmp_path: Path) -> None:
    x, t = data()
    layer = nn.Dense(4, "tanh")
    net = nn.Sequential(layer, nn.Sequential(layer, nn.BatchNorm(momentum=0.2)), nn.Dense(2))
    net[1].trainable = False
    net.fit(x, t, epochs=2, dtype="float64")
    again = there_and_back(net, tmp_path)
    assert again[0] is again[1][0]
    assert [again[k].trainable for k in range(3)] == [True, False, True]
    assert list(again.gradients(x, t)) == list(net.gradients(x, t))
    assert {value.dtype for value in state(again).values()} == {np.dtype("float64")}
    assert repr(again) == repr(net)
    np.testing.assert_array_equal(again.predict(x), net.predict(x))


def test_a_network_that_is_not_built(tmp_path: Path) -> None:
    x, t = data()
    net = nn.Sequential(nn.Dense(3, "relu"), nn.Dropout(0.2), nn.Dense(2))
    again = there_and_back(net, tmp_path)
    assert not again.built
    for each in (net, again):
        each.fit(x, t, epochs=2)
    assert_same(state(again), state(net))


def test_an_attribute_that_was_changed_is_not_lost_silently(tmp_path: Path) -> None:
    """A file holds the arguments that made a layer; where they no longer tell the truth, saving says so."""
    net = nn.Sequential(nn.Dropout(0.1), Scaled(nn.Dense(2), 0.5))
    net[0].rate = 0.9
    with pytest.raises(cr.UsageError, match=r"Dropout|rate"):
        net.save(tmp_path / "net.safetensors")
    net[0].rate = 0.1
    net[1].factor = 3.0
    with pytest.raises(cr.UsageError, match=r"Scaled|factor"):
        net.save(tmp_path / "net.safetensors")
    net[1].factor = 0.5
    net.save(tmp_path / "net.safetensors")


def test_layers_of_a_user(tmp_path: Path) -> None:
    x, t = data()
    net = nn.Sequential(Scaled(nn.Dense(3), 0.5, names=("a", "b")), Scaled(layer=nn.Dense(2)))
    net.fit(x, t, epochs=2)
    again = there_and_back(net, tmp_path, layers=[Scaled])
    assert isinstance(again[0], Scaled)
    assert (again[0].factor, tuple(again[0].names), again[1].factor) == (0.5, ("a", "b"), 2.0)
    assert list(again.parameters) == ["0.gain", "0.layer.weight", "0.layer.bias", "1.gain", "1.layer.weight", "1.layer.bias"]
    assert_same(state(again), state(net))
    np.testing.assert_array_equal(again.predict(x), net.predict(x))


def test_a_layer_of_a_user_must_be_named_when_loading(tmp_path: Path) -> None:
    net = nn.Sequential(Scaled(nn.Dense(3)))
    net.save(tmp_path / "net.safetensors")
    with pytest.raises(cr.FileFormatError, match=r"Scaled.*layers="):
        cr.load(tmp_path / "net.safetensors")


def test_several_inputs(tmp_path: Path) -> None:
    x, t = data()
    net = Branches()
    net.fit({"right": x, "left": x[:, :3]}, t, epochs=1)
    again = there_and_back(net, tmp_path, layers=[Branches])
    given = {"left": x[:, :3], "right": x}
    np.testing.assert_array_equal(again.predict(given), net.predict(given))
    with pytest.raises(cr.ShapeError, match="left"):
        again.predict(x)


def test_functions_known_by_name(tmp_path: Path) -> None:
    x, t = data()
    net = nn.Sequential(
        nn.Dense(3, "gelu", init="orthogonal"), nn.Activation("mish"), nn.Dense(2, init=cr.initializers.normal(0.3))
    )
    net.fit(x, t, epochs=1)
    again = there_and_back(net, tmp_path)
    np.testing.assert_array_equal(again.predict(x), net.predict(x))
    for each in (net, again):
        each.reset()
        each.fit(x, t, epochs=1, seed=4)
    assert_same(state(again), state(net))


NO_FILE: dict[str, Callable[[], nn.Module]] = {
    "lambda": lambda: nn.Dense(2, lambda z: z**3),
    "function of a user": lambda: nn.Sequential(nn.Dense(2), there_and_back),
    "initializer": lambda: nn.Dense(2, init=lambda generator, shape: np.ones(shape)),
    "object": lambda: Scaled(nn.Dense(2), names=object()),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("make", list(NO_FILE.values()), ids=list(NO_FILE))
def test_what_no_file_can_describe_is_refused_and_an_old_file_stays(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    nn.Dense(1).save(path)
    before = path.read_bytes()
    with pytest.raises(cr.UsageError):
        make().save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["net.safetensors"]


def test_a_loss_of_a_user_does_not_keep_the_weights_from_being_saved(tmp_path: Path) -> None:
    x, t = data()
    net = nn.Dense(2)
    net.fit(x, t, loss=lambda s, t: (s - t) ** 4, epochs=1)
    again = there_and_back(net, tmp_path)
    np.testing.assert_array_equal(again.predict(x), net.predict(x))
    with pytest.raises(cr.UsageError, match="loss"):
        again.evaluate(x, t)
    assert again.evaluate(x, t, loss="mse") == net.evaluate(x, t, loss="mse")


# ------------------------------------------------------------------------------------------------------------ how it is written


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    x, t = data()
    net = nn.Sequential(nn.Dense(3), nn.BatchNorm(), nn.Dense(2))
    net.fit(x, t, epochs=1)
    net.save(tmp_path / "net.safetensors")
    arrays = load_file(tmp_path / "net.safetensors")
    for name, value in state(net).items():
        assert any(key.endswith(name) and np.array_equal(array, value) for key, array in arrays.items()), name


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    """Who reads the old file while a new one is written sees all of the old one."""
    path = tmp_path / "net.safetensors"
    nn.Dense(1).save(path)
    before = path.read_bytes()
    with path.open("rb") as reader:
        first = reader.read(10)
        built(tmp_path, path)
        assert first + reader.read() == before
    assert path.read_bytes() != before
    assert os.listdir(tmp_path) == ["net.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.safetensors"
    nn.Dense(1).save(path)
    before = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            try:
                nn.Dense(5).save(path)
            except OSError:
                assert path.read_bytes() == before
                assert os.listdir(tmp_path) == ["net.safetensors"]
            else:
                assert name == "fsync"  # not every writer asks for it


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        nn.Dense(1).save(tmp_path / "nowhere" / "net.safetensors")
    with pytest.raises(FileNotFoundError):
        cr.load(tmp_path / "net.safetensors")


def test_text_paths(tmp_path: Path) -> None:
    path = str(tmp_path / "a net")
    nn.Dense(3).save(path)
    assert repr(cr.load(path)) == "Dense(3)"


# ---------------------------------------------------------------------------------------------------------- files that are wrong


def built(folder: Path, path: Path | None = None) -> Path:
    """A file with everything in it: nested and shared layers, arrays as arguments, statistics, slots, a schedule's state, several
    epochs."""
    _, t = data()
    shared = nn.Dense(3, "tanh")
    net = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Dense(3), shared, nn.Residual(shared), nn.BatchNorm(), nn.Dropout(0.1),
                        nn.Reshape(3), nn.Dense(2), nn.Rescale(1.0, np.array([0.1, 0.2]), np.array([1, 2], ">f4")))  # fmt: skip
    words = np.arange(24).reshape(12, 2) % 9
    plateau = cr.schedules.reduce_on_plateau(0.1, patience=0)
    net.fit(words, t, epochs=2, batch_size=6, loss=cr.losses.huber(2.0), optimizer=cr.RMSprop(plateau, momentum=0.5))
    path = path or folder / "whole.safetensors"
    net.save(path)
    return path


def parts(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file: 8 bytes of length, JSON, arrays."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return built(tmp_path_factory.mktemp("saved")).read_bytes()


@pytest.fixture(autouse=True)
def no_code_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a file made us run {args}")

    for place, name in ((os, "system"), (os, "popen"), (pickle, "loads"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(place, name, run)


def refused(path: Path, raw: bytes, **options: Any) -> str:
    path.write_bytes(raw)
    with pytest.raises(cr.FileFormatError) as caught:
        cr.load(path, **options)
    assert path.name in str(caught.value)
    return str(caught.value)


def harmless(path: Path, raw: bytes) -> bool:
    """Loading raises `FileFormatError` or gives a network that can be used or refuses with an error of ours; in no time."""
    path.write_bytes(raw)
    started = time.perf_counter()
    try:
        net = cr.load(path)
    except cr.FileFormatError:
        return False
    finally:
        assert time.perf_counter() - started < 5
    assert isinstance(net, nn.Module)
    return True


def test_truncated_at_every_kind_of_place(whole: bytes, tmp_path: Path) -> None:
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    edges = [0, 1, 7, 8, 9, 10, header // 2, header - 1, header, header + 1, len(whole) - 4, len(whole) - 1]
    for place in [*edges, *range(11, len(whole), 97)]:
        refused(tmp_path / "cut.safetensors", whole[:place])


def test_lengthened(whole: bytes, tmp_path: Path) -> None:
    for more in (b"\0", b"\0" * 4, whole):
        refused(tmp_path / "long.safetensors", whole + more)


def test_bytes_that_changed_on_the_way(whole: bytes, tmp_path: Path) -> None:
    """Any flipped byte of the header gives an error of ours or a network, nothing else."""
    r = np.random.default_rng(0)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    outcomes = set()
    for place in r.integers(0, header, 300):
        raw = bytearray(whole)
        raw[place] ^= int(r.integers(1, 256))
        outcomes.add(harmless(tmp_path / "flipped.safetensors", bytes(raw)))
    assert False in outcomes


OTHER_FILES: dict[str, bytes] = {
    "empty": b"",
    "text": b"weights: 1 2 3\n" * 100,
    "zeros": b"\0" * 1000,
    "ones": b"\xff" * 1000,
    "a pickle": b"\x80\x04cos\nsystem\n(S'echo hacked'\ntR.",
    "a zip": b"PK\x03\x04" + b"\0" * 200,
    "an npy": b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "a header longer than the file": struct.pack("<Q", 2**63) + b"{}",
    "a header of 2^40 bytes": struct.pack("<Q", 2**40) + b"{}",
    "no JSON": joined(b"{not json}", b""),
    "JSON that is a list": joined([1, 2], b""),
    "JSON that is null": joined(None, b""),
    "bad UTF-8": joined(b'{"\xff\xfe": 1}', b""),
    "deep JSON": joined(b"[" * 200_000, b""),
    "deep JSON in the metadata": joined(b'{"__metadata__": {"record": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", b""),
    "no metadata": joined({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
    "metadata of another program": joined({"__metadata__": {"format": "pt"}}, b""),
}


@pytest.mark.parametrize("raw", list(OTHER_FILES.values()), ids=list(OTHER_FILES))
def test_files_of_another_kind(raw: bytes, tmp_path: Path) -> None:
    refused(tmp_path / "other.safetensors", raw)


def test_a_folder_is_no_network(tmp_path: Path) -> None:
    with pytest.raises((cr.FileFormatError, IsADirectoryError, PermissionError)):
        cr.load(tmp_path)


# ---- forged headers: every value in the header and in the description of the network, replaced by something hostile


Path_ = tuple[Any, ...]


def places(tree: Any, here: Path_ = ()) -> Iterator[Path_]:
    """The paths to all values in a JSON tree."""
    if here:
        yield here
    if isinstance(tree, dict):
        for key in tree:
            yield from places(tree[key], (*here, key))
    elif isinstance(tree, list):
        for at in range(len(tree)):
            yield from places(tree[at], (*here, at))


def replaced(tree: Any, at: Path_, value: Any) -> Any:
    tree = copy.deepcopy(tree)
    node = tree
    for key in at[:-1]:
        node = node[key]
    if value is REMOVED:
        del node[at[-1]]
    else:
        node[at[-1]] = value
    return tree


REMOVED = object()
HOSTILE: list[Any] = [
    REMOVED, None, True, -1, 0, 10**12, 10**400, 1e308, float("nan"), "", "os.system", "__class__", "float64", "0", [], [[]], {},
    [10**12, 10**12], {"layer": "os.system", "args": ["echo hacked"], "kwargs": {}}, {"layer": "Dense", "number": 0, "args": [10**12]},
]  # fmt: skip


def description(header: dict[str, Any]) -> tuple[str, Any]:
    """The key in the metadata that holds the network's description as JSON, and the description."""
    for key, text in header["__metadata__"].items():
        if text.startswith(("{", "[")):
            return key, json.loads(text)
    raise AssertionError("the metadata holds no description")


def forge(whole: bytes, change: Callable[[Any], Any]) -> bytes:
    """The file with another description of the network."""
    header, body = parts(whole)
    key, tree = description(header)
    changed = change(tree)
    header["__metadata__"][key] = changed if isinstance(changed, str) else json.dumps(changed)
    return joined(header, body)


def test_a_forged_description_is_harmless(whole: bytes, tmp_path: Path) -> None:
    _, tree = description(parts(whole)[0])
    every = list(places(tree))
    assert len(every) > 100
    r = np.random.default_rng(0)
    refusals = 0
    for number, at in enumerate(every):
        for value in [HOSTILE[number % len(HOSTILE)], *(HOSTILE[k] for k in r.integers(0, len(HOSTILE), 4))]:
            raw = forge(whole, lambda tree, at=at, value=value: replaced(tree, at, value))
            refusals += not harmless(tmp_path / "forged.safetensors", raw)
    assert refusals > 3 * len(every)


def test_a_forged_table_of_arrays_is_harmless(whole: bytes, tmp_path: Path) -> None:
    header, body = parts(whole)
    r = np.random.default_rng(1)
    refusals, tries = 0, 0
    for at in places(header):
        for value in (HOSTILE[k] for k in r.integers(0, len(HOSTILE), 3)):
            tries += 1
            refusals += not harmless(tmp_path / "forged.safetensors", joined(replaced(header, at, value), body))
    assert refusals > 0.9 * tries


def test_what_loads_after_a_forgery_can_be_used_or_refuses(whole: bytes, tmp_path: Path) -> None:
    """Sizes, dtypes and inputs that contradict each other must not reach the arithmetic."""
    _, tree = description(parts(whole)[0])
    words = np.arange(24).reshape(12, 2) % 9
    r = np.random.default_rng(2)
    every = [at for at in places(tree) if at[0] in ("built", "counters", "loss", "optimizer", "schedule_state", "network")]
    for k in r.permutation(len(every))[:60]:
        raw = forge(whole, lambda tree, at=every[k]: replaced(tree, at, HOSTILE[int(r.integers(0, len(HOSTILE)))]))
        path = tmp_path / "forged.safetensors"
        path.write_bytes(raw)
        try:
            net = cr.load(path)
        except cr.FileFormatError:
            continue
        for use in (net.predict, lambda x, net=net: net.fit(x, np.zeros((12, 2)), epochs=1), lambda x, net=net: repr(net)):
            with contextlib.suppress(cr.ChainruleError), np.errstate(all="ignore"):  # 1e308 as a learning rate may overflow
                use(words)


LAYER_NAMES = [
    "os.system",
    "builtins.eval",
    "__import__",
    "Module",
    "object",
    "Denss",
    "",
    "dense",
    "Sequential.__init__",
    "../Dense",
    "\0",
]


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_an_unknown_layer_is_refused_by_name(name: str, whole: bytes, tmp_path: Path) -> None:
    raw = forge(whole, lambda tree: json.dumps(tree).replace('"Residual"', json.dumps(name)))
    said = refused(tmp_path / "forged.safetensors", raw)
    if name.isprintable():
        assert name in said


def test_a_layer_that_is_no_layer_cannot_be_allowed(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    nn.Dense(1).save(path)
    for wrong in ([os.system], [object], ["Dense"], [nn.Dense(1)]):
        with pytest.raises(cr.UsageError, match="layer"):
            cr.load(path, layers=wrong)  # type: ignore[arg-type]


def test_missing_and_surplus_arrays(whole: bytes, tmp_path: Path) -> None:
    header, body = parts(whole)
    names = [name for name in header if name != "__metadata__"]
    for name in names:
        short, at = {}, 0
        blocks = b""
        for other in names:
            begin, end = header[other]["data_offsets"]
            if other != name:
                short[other] = {**header[other], "data_offsets": [at, at + end - begin]}
                blocks += body[begin:end]
                at += end - begin
        refused(tmp_path / "short.safetensors", joined({"__metadata__": header["__metadata__"], **short}, blocks))
    more = {**header, "parameter/9.weight": {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}}
    refused(tmp_path / "more.safetensors", joined(more, body + b"\0" * 4))


def test_other_shapes_with_the_same_number_of_elements(whole: bytes, tmp_path: Path) -> None:
    header, body = parts(whole)
    tried = 0
    for name, entry in header.items():
        if name != "__metadata__" and len(entry["shape"]) == 2 and entry["shape"][0] != entry["shape"][1]:
            for shape in (entry["shape"][::-1], [entry["shape"][0] * entry["shape"][1]], [*entry["shape"], 1]):
                tried += 1
                said = refused(tmp_path / "turned.safetensors", joined({**header, name: {**entry, "shape": shape}}, body))
                assert re.search(r"shape|\(\d+, \d+\)", said), said
    assert tried >= 6


def test_other_types_of_the_same_size(whole: bytes, tmp_path: Path) -> None:
    header, body = parts(whole)
    for name, entry in header.items():
        if name != "__metadata__":
            for dtype in ("I32", "U32"):
                refused(tmp_path / "typed.safetensors", joined({**header, name: {**entry, "dtype": dtype}}, body))


def test_forged_pairs_of_lbfgs(tmp_path: Path) -> None:
    x, t = data()
    net = nn.Dense(2)
    net.fit(x, t, epochs=3, optimizer="lbfgs")
    path = tmp_path / "net.safetensors"
    net.save(path)
    header, body = parts(path.read_bytes())
    for name in ("slot/s", "slot/y"):
        rows, columns = header[name]["shape"]
        for shape, dtype in (([rows * columns], "F64"), ([columns, rows], "F64"), ([rows, columns], "I64")):
            forged = {**header, name: {**header[name], "shape": shape, "dtype": dtype}}
            refused(tmp_path / "forged.safetensors", joined(forged, body))


def test_weights_that_are_not_finite_are_refused(whole: bytes, tmp_path: Path) -> None:
    header, body = parts(whole)
    for name in ("parameter/2.weight", "statistic/5.variance"):
        (key,) = [k for k in header if k == name]
        begin = header[key]["data_offsets"][0]
        for bits in (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"):  # NaN, infinity
            said = refused(
                tmp_path / "nan.safetensors", whole[: len(whole) - len(body)] + body[:begin] + bits + body[begin + 4 :]
            )
            assert name.partition("/")[2] in said


def test_deep_and_long_descriptions(whole: bytes, tmp_path: Path) -> None:
    _, tree = description(parts(whole)[0])
    text = json.dumps({**tree, "network": "HERE"})

    def nested(depth: int) -> str:
        outer = "".join(f'{{"layer": "Residual", "number": {number}, "args": [' for number in range(depth, 1, -1))
        dense = '{"layer": "Dense", "number": 1, "args": [3], "kwargs": {}}'
        return text.replace('"HERE"', outer + dense + '], "kwargs": {}}' * (depth - 1))

    limit = sys.getrecursionlimit()
    for depth in (5, limit // 4, limit, 20 * limit):
        refused(tmp_path / "deep.safetensors", forge(whole, lambda tree, depth=depth: nested(depth)))
    refused(tmp_path / "deep.safetensors", forge(whole, lambda tree: "[" * 100_000))
    refused(tmp_path / "deep.safetensors", forge(whole, lambda tree: '{"a":' * 50_000 + "1" + "}" * 50_000))
    refused(
        tmp_path / "digits.safetensors",
        forge(whole, lambda tree: json.dumps(tree).replace('"args": [9, 2]', f'"args": [{"9" * 5000}, 2]')),
    )


def test_a_file_of_a_later_version(whole: bytes, tmp_path: Path) -> None:
    header, body = parts(whole)
    key = next(k for k, v in header["__metadata__"].items() if v.isdigit())
    header["__metadata__"][key] = str(int(header["__metadata__"][key]) + 1)
    said = refused(tmp_path / "later.safetensors", joined(header, body))
    assert "version 3 of the format, and this chainrule reads 1 and 2: update chainrule" in said


WRONG_REFERENCES: dict[str, tuple[Any, str]] = {
    "no such array": (["argument/2", "<f8", [2]], '"argument/2", which the file does not hold'),
    "another name": (["mean", "<f8", [2]], '"mean", which the file does not hold'),
    "a parameter": (["parameter/2.bias", "<f4", [3]], '"parameter/2.bias", which the file does not hold as an argument'),
    "a slot": (["slot/2.bias.m", "<f4", [3]], '"slot/2.bias.m", which the file does not hold as an argument'),
    "another type": (["argument/0", "<f4", [2]], '"argument/0" is <f8 [2], and its description says <f4 [2]'),
    "no type": (["argument/0", None, [2]], "its description says None"),
    "a type with parts": (["argument/0", "f8,f8", [2]], "its description says f8,f8"),
    "another shape": (["argument/0", "<f8", [2, 1]], r"its description says <f8 [2, 1]"),
    "a huge shape": (["argument/0", "<f8", [10**12, 10**12]], "its description says <f8 [1000000000000, 1000000000000]"),
    "no shape": (["argument/0", "<f8", 2], "its description says <f8 2"),
    "only a name": ("argument/0", "[name, type, shape], not 'argument/0'"),
    "numbers": ([0.1, 0.2, 0.3], "[name, type, shape], not [0.1, 0.2, 0.3]"),
    "a layer": ({"layer": "Dense", "number": 7, "args": [2], "kwargs": {}}, "[name, type, shape], not {'layer'"),
    "a name that is a list": ([["argument/0"], "<f8", [2]], "[name, type, shape], not [["),
    "too much": (["argument/0", "<f8", [2], [0.1, 0.2]], "[name, type, shape], not ["),
    "the other array": (["argument/1", "<f4", [2]], 'the file holds an array "argument/0", which its description does not name'),
}  # fmt: skip


@pytest.mark.parametrize(("reference", "words"), list(WRONG_REFERENCES.values()), ids=list(WRONG_REFERENCES))
def test_wrong_references_to_arrays(reference: Any, words: str, whole: bytes, tmp_path: Path) -> None:
    text = json.dumps({"tensor": ["argument/0", "<f8", [2]]})
    raw = forge(whole, lambda tree: json.dumps(tree).replace(text, json.dumps({"tensor": reference})))
    assert words in refused(tmp_path / "forged.safetensors", raw)


def test_a_reference_where_no_array_can_stand(whole: bytes, tmp_path: Path) -> None:
    text = json.dumps({"tensor": ["argument/0", "<f8", [2]]})
    said = refused(tmp_path / "a.safetensors", forge(whole, lambda tree: json.dumps(tree).replace("[9, 2]", f"[{text}, 2]")))
    assert "does not fit together" in said
    said = refused(
        tmp_path / "b.safetensors", forge(whole, lambda tree: json.dumps(tree).replace(text, '{"same": "argument/0"}'))
    )
    assert "does not fit together" in said


def test_arrays_that_no_layer_was_made_with(whole: bytes, tmp_path: Path) -> None:
    """Neither a built network nor one that is not may have them, be they named beside the state or not."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    nn.Dense(1).save(tmp_path / "net.safetensors")
    bare, _ = parts((tmp_path / "net.safetensors").read_bytes())
    said = refused(tmp_path / "more.safetensors", joined({**bare, "argument/0": entry}, b"\0" * 4))
    assert 'an array "argument/0", which its description does not name' in said
    twice = forge(whole, lambda tree: {**tree, "arrays": [*tree["arrays"], "argument/0"]})
    assert "names an array twice" in refused(tmp_path / "twice.safetensors", twice)
    header, body = parts(whole)
    entry["data_offsets"] = [len(body), len(body) + 4]
    named = forge(joined({**header, "argument/2": entry}, body + b"\0" * 4),
                  lambda tree: {**tree, "arrays": [*tree["arrays"], "argument/2"]})  # fmt: skip
    assert '"argument/2" of type float32 has no place' in refused(tmp_path / "named.safetensors", named)


def test_other_types_of_arguments(tmp_path: Path) -> None:
    """Bytes that are no truth values, and types that arguments do not have though safetensors does."""
    nn.Sequential(Noted(np.array([True, False])), nn.Dense(1)).save(tmp_path / "net.safetensors")
    header, body = parts((tmp_path / "net.safetensors").read_bytes())
    assert same_array(cr.load(tmp_path / "net.safetensors", layers=[Noted])[0].notes, np.array([True, False]))
    said = refused(tmp_path / "bytes.safetensors", joined(header, b"\1\2" + body[2:]), layers=[Noted])
    assert '"argument/0" holds bytes that are neither true nor false' in said
    for dtype, kind in (("C64", "<c8"), ("BF16", "<V2")):
        size = int(kind[-1])
        entry = {"dtype": dtype, "shape": [1], "data_offsets": [0, size]}
        raw = forge(
            joined({**header, "argument/0": entry}, b"\0" * size),
            lambda tree, kind=kind: json.dumps(tree).replace('"|b1", [2]', f'"{kind}", [1]'),
        )
        said = refused(tmp_path / "typed.safetensors", raw, layers=[Noted])
        assert re.search(r"is of type (complex64|bfloat16), which no argument of a layer has|no readable safetensors file", said)


def test_the_whole_file_itself_loads(whole: bytes, tmp_path: Path) -> None:
    """The forgeries above are refused for what was changed, not for how the file was put together."""
    assert harmless(tmp_path / "same.safetensors", whole)
    assert harmless(tmp_path / "same.safetensors", joined(*parts(whole)))
    assert harmless(tmp_path / "same.safetensors", forge(whole, lambda tree: tree))
