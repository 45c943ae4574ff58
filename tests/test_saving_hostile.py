"""No truncated, damaged or forged file does harm: it raises `FileFormatError`, or gives a network that can be used or refuses."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved
from networks import data
from saved import Noted, built, parts, same_array

import chainrule as cr
from chainrule import nn

no_code_is_run = saved.no_code_is_run  # a fixture


def joined(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return built(tmp_path_factory.mktemp("saved")).read_bytes()


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
    no_layers: list[Any] = [[os.system], [object], ["Dense"], [nn.Dense(1)]]
    for wrong in no_layers:
        with pytest.raises(cr.UsageError, match="layer"):
            cr.load(path, layers=wrong)


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
