"""How soon something runs: what importing loads, what a second process need not compile again, what calls keep from call to call."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chainrule as cr
import chainrule.run.native
from chainrule import nn, optim
from chainrule.compiler import jit
from chainrule.graph.trace import build, type_of
from chainrule.normalize import graph_key, normalize
from chainrule.run import machines
from chainrule.run.backend import Steps, backends
from chainrule.run.native import NativeBackend

ROOT = Path(__file__).parent.parent

WORK = """
import sys
import numpy as np
import chainrule as cr
from chainrule import nn, optim
from chainrule.compiler import jit
rate, seed = float(sys.argv[1]), int(sys.argv[2])
if "known" in sys.argv:  # everything has to come from the disk
    def never(*rest): raise AssertionError("compiled again")
    jit._object = never
    sys.modules["chainrule.compiler.pipeline"] = None
r = np.random.default_rng(0)
x, y = r.normal(size=(40, 6)).astype("f4"), r.integers(0, 3, 40)
net = nn.Sequential(nn.Dense(7, "relu"), nn.Dropout(0.2), nn.BatchNorm(), nn.Dense(3))
run = net.fit(x, y, loss="cross_entropy", optimizer=optim.Adam(rate), seed=seed, epochs=3, batch_size=16, threads=2, verbose=False)
table = r.normal(size=(6, 2))
fast = cr.compile(lambda a, i: np.tanh(a @ table)[i])
loop = cr.grad(lambda a: np.sum(cr.scan(lambda h, now: (np.tanh(h + now), None), np.zeros(6), a)[0]))
print(repr(run.loss), repr(net.predict(x).tolist()), repr(fast(x[:4].astype("f8"), 2).tolist()), repr(loop(x[:5]).tolist()))
"""


def python(code: str, *args: str, cache: Path | str = "0", package: Path = ROOT, **environment: str) -> str:
    settings = {**os.environ, "CHAINRULE_CACHE": str(cache), "PYTHONPATH": str(package), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], env=settings, capture_output=True, text=True, timeout=120, check=False, cwd=package
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder: Path) -> int:
    return len(list(folder.iterdir()))


# ---- importing ---------------------------------------------------------------------------------------------------------------


def test_importing_is_light() -> None:
    heavy = ("llvmlite", "polars", "sklearn", "scipy", "rich", "click", "threadpoolctl", "chainrule.compiler.pipeline",
             "chainrule.explain.assemble", "chainrule.explain.page", "difflib", "numpy.typing")  # fmt: skip
    code = f"import sys, chainrule, chainrule.run.native; print([m for m in {heavy} if m in sys.modules])"
    assert python(code).strip() == "[]"


# ---- a second process --------------------------------------------------------------------------------------------------------


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """Neither passes nor LLVM run, and the results are the same; nor do they for another learning rate or seed."""
    first = python(WORK, "0.01", "1", cache=tmp_path, PYTHONHASHSEED="1")
    made = files(tmp_path)
    assert made > 4
    assert python(WORK, "0.01", "1", "known", cache=tmp_path, PYTHONHASHSEED="2") == first
    assert python(WORK, "0.02", "7", "known", cache=tmp_path) != first
    assert files(tmp_path) == made
    assert python(WORK, "0.01", "1", cache="0") == first


def test_another_compiler_uses_nothing_of_this_one(tmp_path: Path) -> None:
    package, cache = tmp_path / "package", tmp_path / "cache"
    shutil.copytree(ROOT / "chainrule", package / "chainrule", ignore=shutil.ignore_patterns("__pycache__"))
    code = "import numpy as np, chainrule as cr; print(cr.compile(lambda x: x * 2)(np.arange(3.0)))"
    for folder in (package, package):
        python(code, cache=cache, package=folder)
    assert files(cache) == 1
    for changed, expected in (("compiler/lower.py", 2), ("ops/reduce.py", 3), ("normalize.py", 4), ("cli.py", 4)):
        with open(package / "chainrule" / changed, "a", encoding="utf-8") as file:
            file.write("# another version\n")
        python(code, cache=cache, package=package)
        assert files(cache) == expected


def test_all_that_the_compiler_is_made_of_counts() -> None:
    """But for what holds no knowledge of programs."""
    code = f"""
import sys, types
sys.modules["chainrule"] = alone = types.ModuleType("chainrule")  # without what its __init__.py imports
alone.__path__ = [{str(ROOT / "chainrule")!r}]
import chainrule.compiler.pipeline
print(*(m for m in sys.modules if m.startswith("chainrule.")))
"""
    loaded = {Path(ROOT, *m.split(".")) for m in python(code).split()}
    counted = {p.with_suffix("") for files in jit.SOURCES for p in (ROOT / "chainrule").glob(files)}
    assert {p.name for p in loaded - counted if p.with_suffix(".py").exists()} == {"errors", "registry", "records"}


def test_sources_that_changed_after_they_were_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_imported", 0.0)
    assert jit._sources.__wrapped__() is None
    monkeypatch.setattr(jit, "_sources", lambda: None)
    assert jit.program_key(("a",)) is None
    backend = NativeBackend(guard=64)
    f = backend.function(normalize(build(lambda x: [x * 3.5], [type_of(np.ones(3))])))
    assert f([np.ones(3)])[0].tolist() == [3.5] * 3


def test_what_is_told_of_a_program() -> None:
    values: list[Any] = [
        (), ((),), ("a", "b"), ("a,b",), ("a", ("b",)), ("'a'", "b"), 1, 1.0, True, "1", b"1", None, 0.0, -0.0, float("nan"), 2**70,
        np.dtype("f4"), np.dtype("f8"), np.dtype(">f4"), "dtype <f4",
    ]  # fmt: skip
    digests = [jit.told(v) for v in values]
    assert None not in digests
    assert len(set(digests)) == len(values)
    unknown: list[Any] = [len, object(), frozenset("ab"), [1], np.float64(1.0), np.ones(2), np.dtype([("a", "f4")])]
    for value in unknown:
        assert jit.told((value,)) is None


def test_every_example_of_an_operator_can_be_told(subtests_of_ops: list[tuple[str, Any]]) -> None:
    for name, key in subtests_of_ops:
        assert jit.told(key) is not None, name


@pytest.fixture
def subtests_of_ops() -> list[tuple[str, Any]]:
    from chainrule.graph.node import OPS
    from chainrule.graph.trace import apply

    found = []
    for name, op in OPS.items():
        for args, attrs in op.examples(np.random.default_rng(0)):
            types = [type_of(np.asarray(a)) for a in args]
            try:
                graph = normalize(build(lambda *x, n=name, a=attrs: [apply(n, *x, **a)], types))
            except Exception:  # forms with several results, which other tests make
                continue
            found.append((name, graph_key(graph)))
    assert len(found) > 50
    return found


def test_stages_can_be_shown_where_code_came_from_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path))
    graph = normalize(build(lambda x: [np.cumsum(np.tanh(x)) * 1.25], [type_of(np.ones(9))]))
    texts = []
    for _ in range(2):
        monkeypatch.setattr(machines, "_machines", type(machines._machines)())
        machine = NativeBackend().function(graph).machine
        assert machine.arena == machine.code.arena.bytes
        texts.append(machine.code.text)
    assert files(tmp_path) == 1
    assert texts[0] == texts[1]


@pytest.mark.parametrize("before", [True, False])
def test_the_collector_rests_during_the_passes_only(monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    seen = []

    def passes(*rest: Any, **named: Any) -> Any:
        seen.append(gc.isenabled())
        raise RuntimeError("ends here")

    monkeypatch.setattr("chainrule.compiler.pipeline.compile_graph", passes)
    backend = NativeBackend(guard=72)
    graph = normalize(build(lambda x: [x * 4.5], [type_of(np.ones(3))]))
    try:
        if not before:
            gc.disable()
        with pytest.raises(RuntimeError, match="ends here"):
            backend.function(graph)
        assert gc.isenabled() is before
    finally:
        gc.enable()
    assert seen == [False]


def test_a_deep_network_takes_seconds() -> None:
    """Sixty layers; what grows with the square of their number would take minutes."""
    code = """
import numpy as np
from chainrule import nn
net = nn.Sequential(*[nn.Dense(16, "tanh") for _ in range(60)], nn.Dense(1))
net.fit(np.ones((32, 16), "f4"), np.ones(32), epochs=1, verbose=False)
"""
    begun = time.perf_counter()
    python(code)
    assert time.perf_counter() - begun < 30


# ---- calls -------------------------------------------------------------------------------------------------------------------


def test_calls_of_compiled_functions_see_every_kind_of_array() -> None:
    f = cr.compile(lambda a, b: (a * 2 + b, np.sum(a)))
    base = np.arange(12.0).reshape(3, 4)
    frozen = base.copy()
    frozen.flags.writeable = False
    wide = np.repeat(base, 2, axis=1)[:, ::2]
    moved = np.empty(12 * 8 + 1, np.uint8)[1:].view(np.float64).reshape(3, 4)
    moved[...] = base
    for a in (base, frozen, np.asfortranarray(base), wide, moved, base):
        for b in (1.5, np.float64(1.5), np.array(1.5)):
            for _ in range(2):
                y, total = f(a, b)
                assert y.tolist() == (base * 2 + 1.5).tolist()
                assert isinstance(total, np.float64)
                assert y.flags.owndata
                y[...] = np.nan
    assert f(a=base, b=1.5)[0].tolist() == f(base, 1.5)[0].tolist()
    assert f(base.astype("f4"), 0.5)[0].dtype == np.float32
    assert f(base, 1)[0].tolist() == (base * 2 + 1).tolist()


def test_compiled_functions_keep_no_array_of_the_caller() -> None:
    outside = np.ones(4)
    f = cr.compile(lambda a: a + outside)
    first = f(np.zeros(4))
    outside[:] = 9
    assert f(np.zeros(4)).tolist() == [1.0] * 4
    first[:] = 5
    assert f(np.zeros(4)).tolist() == [1.0] * 4


def test_a_call_after_one_with_a_bad_index() -> None:
    f = cr.compile(lambda a, i: cr.lookup(a, i))
    table = np.arange(6.0).reshape(3, 2)
    for _ in range(3):
        with pytest.raises(cr.DataError):
            f(table, np.array([0, 3]))
        assert f(table, np.array([2, 0])).tolist() == [[4.0, 5.0], [0.0, 1.0]]


def test_calls_from_several_threads() -> None:
    f = cr.compile(lambda a: np.cumsum(np.tanh(a) @ np.ones((50, 50)))[-1] + np.sum(a))
    inputs = [np.random.default_rng(n).normal(size=(40, 50)) for n in range(4)]
    plain = [f(x) for x in inputs]
    wrong: list[int] = []

    def work(n: int) -> None:
        wrong.extend(n for _ in range(200) if f(inputs[n]) != plain[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


# ---- runs of a session -------------------------------------------------------------------------------------------------------


def session_and_steps(backend: str, count: int) -> tuple[Any, Steps]:
    from chainrule.train.fit import Training

    kept: list[Any] = []

    class Stop(Exception):
        pass

    def prepare(self: Any, state: Any) -> None:
        kept[:] = [self, dict(state)]
        raise Stop

    x, y = np.random.default_rng(1).normal(size=(24, 5)).astype("f4"), np.zeros((24, 2))
    net = nn.Dense(2)
    net.fit(x, y, epochs=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Training, "prepare", prepare)
        net.fit(x, y, epochs=1, batch_size=8, optimizer=optim.Adam(0.01), backend=backend, verbose=False)
    training, state = kept
    program = training.program(8, ("step",))
    values: dict[str, Any] = {"divisor": 8.0, "seed": np.zeros(2, np.uint32), "step": 0, "learning_rate": 0.01}
    values |= {f"hyper.{k}": v for k, v in optim.Adam(0.01).hyper().items()}
    numbers = {
        k: np.broadcast_to(np.asarray(values[k]), (count, *np.shape(values[k])))
        for k in program.entries["step"].inputs
        if program.inputs[k].rows is None
    }
    order = np.arange(8 * count) % 24
    steps = Steps(["step"] * count, training.data.arrays(), order, [8] * count, numbers, ("loss",))
    return backends[backend].session({8: program}, state), steps


@pytest.mark.parametrize("count", [1, 3, 200])
def test_runs_with_the_same_lists(count: int) -> None:
    native, steps = session_and_steps("native", count)
    plain, same = session_and_steps("reference", count)
    for rate in (0.01, 0.02, 0.0):
        given = {**steps.numbers, "learning_rate": np.full(count, rate)}
        order = np.roll(steps.order, int(rate * 100))
        results = [
            s.run(Steps(t.entries, t.data, order, t.sizes, given, t.keep)).results["loss"]
            for s, t in ((native, steps), (plain, same))
        ]
        assert np.allclose(*results, rtol=1e-4)
    for n in range(10):
        native.run(Steps(["step"] * (100 + n), steps.data, np.zeros(800 + 8 * n, np.int64), [8] * (100 + n),
                         {k: np.repeat(v[:1], 100 + n, 0) for k, v in steps.numbers.items()}, ()))  # fmt: skip
    assert len(native._layouts) <= chainrule.run.native.KEPT_LAYOUTS


def test_rows_out_of_range_and_other_data() -> None:
    native, steps = session_and_steps("native", 2)
    native.run(steps)
    for bad in (-1, 24):
        order = steps.order.copy()
        order[3] = bad
        with pytest.raises(cr.DataError, match=f"row {bad} of 24"):
            native.run(Steps(steps.entries, steps.data, order, steps.sizes, steps.numbers, ("loss",)))
    other = {k: v.astype("f8") for k, v in steps.data.items()}  # the same numbers, for which the code is another
    fresh = session_and_steps("native", 2)[0]
    fresh.run(steps)
    wide = Steps(steps.entries, other, steps.order, steps.sizes, steps.numbers, ("loss",))
    assert native.run(wide).results["loss"].tolist() == fresh.run(steps).results["loss"].tolist()


@pytest.mark.parametrize("keep", [(), ("loss",), ("scores",), ("penalty",), ("loss", "penalty", "scores")])
def test_results_that_nobody_asked_for_disturb_no_others(keep: tuple[str, ...]) -> None:
    """The loss is read off the scores in memory, whether they are kept or not."""
    found = []
    for backend in ("native", "reference"):
        session, steps = session_and_steps(backend, 3)
        taken = session.run(Steps(steps.entries, steps.data, steps.order, steps.sizes, steps.numbers, keep))
        found.append({**taken.results, **session.state()})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert np.allclose(value, found[1][name], rtol=1e-4, atol=1e-6), name
