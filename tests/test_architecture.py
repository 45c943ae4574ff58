"""Imports point downward only: a file imports from layers above it in this list, or from files above it in its own layer.

Every import counts, wherever it stands: in a function, under TYPE_CHECKING, through importlib or __import__.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "chainrule"

# Top to bottom as data flows. A name is a file without its ending or a folder; a folder whose files have an order of their own
# stands with them ("graph/node graph/tree"). A folder named as a whole may use any order inside, but no circle.
# "graph/" is the folder's own __init__, which re-exports and so stands after its files.
LAYERS: tuple[tuple[str, str], ...] = (
    ("0 foundation", "errors registry records recent sizes"),
    ("1 graph", "graph/node graph/tree graph/rows graph/trace graph/verify graph/text graph/interpret graph/"),
    ("2 ops", "ops/*"),
    ("3 derive", "derive/backward derive/checkpoint derive/"),
    ("4 program", "normalize program"),
    (
        "5 compiler",
        (
            "compiler/coefficients compiler/builder compiler/reduction compiler/exponential compiler/gates compiler/power "
            "compiler/trigonometric compiler/elementary compiler/code compiler/operators compiler/target compiler/affine "
            "compiler/views compiler/branches compiler/simplify compiler/regions compiler/kernels compiler/verify "
            "compiler/fold compiler/former compiler/fuse compiler/scans compiler/schedule compiler/layout compiler/flatten compiler/phases "
            "compiler/panels compiler/gather compiler/carry compiler/replay compiler/ragged compiler/share compiler/lanes "
            "compiler/apart compiler/gaps compiler/siblings compiler/summed compiler/absorb compiler/pooling compiler/alike "
            "compiler/memory compiler/copies compiler/races compiler/loops compiler/hope compiler/values compiler/sums compiler/lower "
            "compiler/driver compiler/llvm compiler/jit compiler/cost compiler/pipeline compiler/peak compiler/"
        ),
    ),
    (
        "6 run",
        (
            "run/batches run/backend run/interrupt run/reference run/threads run/crew run/machines run/pieces run/rounds run/function "
            "run/native run/xla run/"
        ),
    ),
    ("7 transforms", "transforms gradcheck"),
    (
        "8 train",
        (
            "initializers losses metrics schedules optim health train/sequences train/data train/windows train/scope train/history "
            "train/objective train/progress train/epochs train/fit train/fullbatch train/state train/recipe train/compiled "
            "train/model train/ "
            "nn/saving nn/names nn/module nn/layers nn/convolution nn/images nn/recurrent nn/from_torch nn/"
        ),
    ),
    (
        "9 user",
        (
            "explain/* explain sklearn features data/table data/parse data/read data/understand data/fields data/target data/windows "
            "data/order data/prepare data/characters data/images data/ examples/ pictures report folders experiment series text images "
            "runs demo terminal cli"
        ),
    ),
    ("10 package", "__init__ __main__"),
)


def module_of(file: Path, package: Path) -> str:
    """graph/node.py -> "graph/node", graph/__init__.py -> "graph/", __init__.py -> "__init__"."""
    name = file.relative_to(package).with_suffix("").as_posix()
    return name.removesuffix("__init__") if name != "__init__" else name


def order(layers: tuple[tuple[str, str], ...]) -> dict[str, int]:
    """Each entry of `layers` -> its place from the top."""
    return {entry: place for place, entry in enumerate(entry for _, names in layers for entry in names.split())}


def place_of(module: str, places: dict[str, int]) -> int | None:
    """The place of a module, or of the folder that is listed as a whole."""
    if module in places:
        return places[module]
    return places.get(module.split("/")[0] + "/*") if "/" in module else None


def imported(file: Path, package: Path) -> Iterator[tuple[str, int]]:
    """(module, line) of everything inside the package that a file imports, hidden imports included."""
    known = {module_of(f, package) for f in package.rglob("*.py")}
    own = file.relative_to(package).parent.parts

    def resolve(dotted: tuple[str, ...]) -> str | None:
        """("graph", "node", "Node") -> "graph/node": the longest part that is a file or folder; () is the package itself."""
        for end in range(len(dotted), 0, -1):
            path = "/".join(dotted[:end])
            if path in known:
                return path
            if path + "/" in known:
                return path + "/"
        return "__init__"

    def absolute(name: str) -> tuple[str, ...] | None:
        """The part of a dotted name below the package; a leading dot per level means relative to this file's folder."""
        level = len(name) - len(name.lstrip("."))
        parts = tuple(p for p in name.lstrip(".").split(".") if p)
        if level:
            return own[: len(own) - (level - 1)] + parts
        return parts[1:] if parts[:1] == (package.name,) else None

    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [f"{base}{'' if base.endswith('.') else '.'}{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__", "find_spec", "resolve_name", "run_module"):
                text = node.args[0] if node.args else None
                if not (isinstance(text, ast.Constant) and isinstance(text.value, str)):
                    yield "(an import whose name is not a plain string)", node.lineno
                    continue
                names = [text.value]
        for name in names:
            below = absolute(name)
            if below is not None and (module := resolve(below)) is not None:
                yield module, node.lineno


def breaches(package: Path, layers: tuple[tuple[str, str], ...] = LAYERS) -> list[str]:
    """What is wrong with the imports of `package`, one line each."""
    places = order(layers)
    found: list[str] = []
    edges: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        module = module_of(file, package)
        here = place_of(module, places)
        if here is None:
            found.append(f"{module} belongs to no layer: add it to LAYERS where its data flows")
            continue
        for other, line in imported(file, package):
            there = place_of(other, places)
            whole = here == there and module != other  # two files of a folder listed as a whole
            if there is None or there > here or (here == there and not whole):
                found.append(f"{module} line {line} imports {other}, which does not stand above it")
            edges.setdefault(module, set()).add(other)
    return found + [f"circle: {' -> '.join(circle)}" for circle in circles(edges)]


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Every circle that a depth-first walk closes."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(edges.get(module, ())):
                walk(other, [*path, module])
            done.add(module)

    for start in sorted(edges):
        walk(start, [])
    return found


def test_imports_point_downward() -> None:
    found = breaches(PACKAGE)
    assert not found, "\n".join(found)


def test_no_layer_lists_a_name_twice() -> None:
    entries = [entry for _, names in LAYERS for entry in names.split()]
    assert len(entries) == len(set(entries))


FORGED = {
    "plain": "from .train import fit",
    "dotted": "import pkg.train",
    "aliased": "from pkg import train as t",
    "in a function": "def f():\n    from . import train",
    "only for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .train import fit",
    "importlib": "import importlib\nimportlib.import_module('.train', 'pkg')",
    "importlib, absolute": "from importlib import import_module as i, import_module\nimport_module('pkg.train')",
    "__import__": "t = __import__('pkg.train')",
    "computed": "import importlib\nimportlib.import_module('.tra' + 'in', 'pkg')",
    "through the package": "import pkg",
    "from the package": "from . import fit",
}


@pytest.mark.parametrize("source", FORGED.values(), ids=FORGED.keys())
def test_an_upward_import_is_caught(tmp_path: Path, source: str) -> None:
    package = forge(tmp_path, {"low": source, "train": "def fit(): ...", "__init__": ""})
    assert len(breaches(package, (("0", "low"), ("1", "train"), ("2", "__init__")))) == 1


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    files = {
        "low": "import numpy.typing\nfrom importlib import metadata",
        "folder/__init__": "from .a import x",
        "folder/a": "from ..low import y",
        "folder/b": "from . import a\nfrom .. import low",
        "top": "from .folder import x\nfrom .folder.a import x\nimport pkg.low",
        "__init__": "from .top import x",
    }
    assert breaches(forge(tmp_path, files), (("0", "low"), ("1", "folder/*"), ("2", "top"), ("3", "__init__"))) == []


def test_a_circle_inside_a_folder_is_caught(tmp_path: Path) -> None:
    package = forge(
        tmp_path, {"folder/a": "from .b import x", "folder/b": "def f():\n    from .a import y", "folder/__init__": ""}
    )
    assert breaches(package, (("0", "folder/*"),)) == ["circle: folder/a -> folder/b -> folder/a"]


def test_a_file_without_a_layer_is_caught(tmp_path: Path) -> None:
    assert breaches(forge(tmp_path, {"stray": ""}), (("0", "low"),)) == [
        "stray belongs to no layer: add it to LAYERS where its data flows"
    ]


def forge(folder: Path, files: dict[str, str]) -> Path:
    """A package `pkg` of these sources."""
    package = folder / "pkg"
    for name, source in files.items():
        file = package / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return package


def test_no_module_hides_a_public_function() -> None:
    """Importing a submodule sets an attribute of the package: a folder must not take the name of a function."""
    code = (
        "import importlib, pkgutil, chainrule as cr\n"
        "public = {n: v for n, v in vars(cr).items() if callable(v)}\n"
        "for m in pkgutil.walk_packages(cr.__path__, 'chainrule.'):\n"
        "    m.name == 'chainrule.__main__' or importlib.import_module(m.name)\n"
        "hidden = [n for n, v in public.items() if getattr(cr, n) is not v]\n"
        "assert not hidden, hidden\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
