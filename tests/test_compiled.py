"""Texts of all stages, and what kernels cost: counted by hand, measured within reason, nothing changed in the network."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict

import numpy as np
import pytest

import chainrule as cr
from chainrule import nn
from chainrule.compiler import cost, jit, peak, pipeline
from chainrule.compiler.elementary import operations
from chainrule.compiler.target import LEVELS, narrowed
from chainrule.errors import NotBuiltError, UnknownNameError, UsageError
from chainrule.run import machines, native
from chainrule.train import compiled
from chainrule.train.compiled import STAGES


def fitted(net=None, *, x=None, y=None, loss="cross_entropy", epochs=2, batch_size=8, **options):
    r = np.random.default_rng(0)
    net = nn.Sequential(nn.Dense(16, "relu"), nn.Dense(3)) if net is None else net
    x = r.normal(size=(20, 5)).astype(np.float32) if x is None else x
    y = r.integers(0, 3, len(x)) if y is None else y
    net.fit(x, y, loss=loss, epochs=epochs, batch_size=batch_size, verbose=False, **options)
    return net


def items_of(net, entry="step", rows=None):
    return [i for phase in net.compiled._request(entry, rows).code(units=1).plan.phases for i in phase]


@pytest.fixture
def quick(monkeypatch):
    """Runs that are short: enough where times do not count."""
    monkeypatch.setattr(compiled, "RUN", 1e-4)
    monkeypatch.setattr(compiled, "RUNS", 2)


# ---- texts -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["step", "forward", "evaluate", "gradient"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_every_entry(stage, entry):
    text = fitted().compiled.text(stage, entry=entry)
    sign = {"graph": "contract(", "kernels": "kernel k", "loops": "function k", "llvm": "define i32 @entry", "assembly": "entry:"}
    assert sign[stage] in text


def test_the_step_is_that_of_the_last_fit():
    net = fitted()
    assert "float32[8, 16]" in net.compiled.text("graph")
    assert "slot/0.weight.v" in net.compiled.text("kernels")
    fitted(net, optimizer=cr.SGD(0.1), batch_size=5)
    assert "float32[5, 16]" in net.compiled.text("graph")
    assert "slot/" not in net.compiled.text("kernels")
    assert "float32[7, 16]" in net.compiled.text("graph", rows=7)
    fitted(net, batch_size=100)
    assert "float32[20, 16]" in net.compiled.text("graph")


def test_the_graph_names_layers_and_lines():
    assert re.search(r"test_compiled\.py:\d+, layer 0", fitted().compiled.text("graph"))


def test_machine_code_that_is_there_is_found_again():
    """With a short last batch, validation, and threads chosen by the user."""
    for options in ({}, {"validation": 0.3}, {"threads": 2}, {"metrics": ["accuracy"]}):
        net = fitted(**options)
        before = set(machines._machines)
        for stage in STAGES:
            net.compiled.text(stage)
        assert set(machines._machines) == before


def test_data_types_are_those_of_the_fit():
    assert "fptrunc" in fitted(x=np.random.default_rng(0).normal(size=(20, 5))).compiled.text("llvm")
    assert "fptrunc" not in fitted().compiled.text("llvm")
    assert "double" in fitted(nn.Dense(3), dtype="float64").compiled.text("llvm")


def test_code_that_only_the_disk_has(tmp_path, monkeypatch):
    monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path))
    monkeypatch.setattr(machines, "_machines", OrderedDict())
    net = fitted()
    text = net.compiled.text("llvm")
    monkeypatch.setattr(machines, "_machines", OrderedDict())
    assert net.compiled.text("llvm") == text


def test_after_a_fit_by_the_reference_backend():
    assert "define" in fitted(backend="reference").compiled.text("llvm")


# ---- errors ------------------------------------------------------------------------------------------------------------------


def test_before_a_fit():
    net = nn.Dense(3)
    for call in (lambda: net.compiled.text("graph"), net.compiled.cost):
        with pytest.raises(NotBuiltError, match="call fit first"):
            call()
    with pytest.raises(NotBuiltError, match="call fit first"):
        fitted(epochs=0).compiled.cost()
    net = fitted()
    net.reset()
    with pytest.raises(NotBuiltError, match="call fit first"):
        net.compiled.text("graph")


def test_a_copy_has_to_be_fitted_itself():
    with pytest.raises(NotBuiltError, match="call fit first"):
        copy.deepcopy(fitted()).compiled.text("graph")


@pytest.mark.parametrize(
    ("stage", "options", "problem"),
    [
        ("assembler", {}, 'no stage "assembler". Did you mean "assembly"?'),
        ("kernel", {}, 'Did you mean "kernels"?'),
        ("quite else", {}, "Known: graph, kernels, loops, llvm, assembly"),
        ("graph", {"entry": "foward"}, 'no entry "foward". Did you mean "forward"?'),
    ],
)
def test_misspelt(stage, options, problem):
    with pytest.raises(UnknownNameError, match=re.escape(problem)):
        fitted().compiled.text(stage, **options)


@pytest.mark.parametrize("rows", [0, -1, 1.5, True, "8"])
def test_rows_that_are_none(rows):
    with pytest.raises(UsageError, match="rows is a whole number"):
        fitted().compiled.text("graph", rows=rows)


def test_an_optimizer_without_steps(quick):
    net = fitted(optimizer=cr.LBFGS(), epochs=1)
    with pytest.raises(UsageError, match='entry="gradient"'):
        net.compiled.cost()
    assert net.compiled.cost(entry="gradient").batch == 20


# ---- cost --------------------------------------------------------------------------------------------------------------------


def test_operations_and_bytes_by_hand():
    """x W + b for 8 rows, 5 inputs, 16 outputs; rows are read at the numbers in the step's order."""
    net = fitted(nn.Dense(16), y=np.zeros((20, 16), np.float32), loss="mse")
    (product,) = items_of(net, "forward")
    assert cost.work(product) == cost.Work(8 * 16 * (2 * 5 + 1), 8 * 8 + 4 * (8 * 5 + 5 * 16 + 16), 4 * 8 * 16)
    assert cost.sizes(product) == "8x16 over 5"
    assert cost.layers(product) == ()
    assert cost.words(product) == "contract add -> scores"
    assert cost.touched([product]) == 8 * 8 + 4 * (8 * 5 + 5 * 16 + 16 + 8 * 16)


def test_rows_that_are_cast_are_copied_first():
    net = fitted(nn.Dense(16), x=np.ones((20, 5), np.float64), y=np.zeros((20, 16), np.float32), loss="mse")
    gather, product = items_of(net, "forward")
    assert cost.work(gather) == cost.Work(0, 8 * 8 + 8 * 5 * 8, 8 * 5 * 4)
    assert cost.work(product) == cost.Work(8 * 16 * (2 * 5 + 1), 4 * (8 * 5 + 5 * 16 + 16), 4 * 8 * 16)
    assert cost.words(gather) == "copy x"


def test_elementary_functions_count_as_the_operations_that_they_are():
    plain, curved = (
        cost.work(items_of(fitted(nn.Dense(16, activation), y=np.zeros((20, 16), np.float32), loss="mse"), "forward")[0])
        for activation in (None, "tanh")
    )
    assert curved.flops - plain.flops == 8 * 16 * operations("tanh", 32)
    assert 15 < operations("tanh", 32) < operations("tanh", 64) < 80
    assert [operations(name, 32) for name in ("sqrt", "maximum", "floor")] == [1, 1, 1]


def test_a_loop_counts_each_turn():
    net = fitted(nn.Sequential(nn.RNN(7), nn.Dense(3)), x=np.ones((6, 9, 4), np.float32), batch_size=6)
    (loop,) = [i for i in items_of(net, "forward") if isinstance(i, cost.Loop)]
    inner = [cost.work(k, frozenset({loop.axis})) for k in loop.items]
    assert cost.work(loop).flops == 9 * sum(w.flops for w in inner)
    assert cost.sizes(loop).startswith("9 times ")


def test_predicted_is_the_larger_of_two():
    product = items_of(fitted(), "forward")[0]
    done = cost.work(product)
    assert cost.seconds(product, 1e3, 1e9, 1e9) == done.flops / 1e3
    assert cost.seconds(product, 1e12, 1e3, 1e3) == pytest.approx((done.read + done.written) / 1e3)


def test_layers_of_forward_and_backward(quick):
    rows = fitted().compiled.cost().rows
    assert {"0", "1"} <= {name for row in rows for name in row.layers}
    writers = {name: row for row in rows for name in ("0.weight", "1.weight") if row.work.endswith(f"-> {name}")}
    assert writers["0.weight"].layers == ("0",)
    assert writers["1.weight"].layers == ("1",)


@pytest.mark.parametrize("entry", ["step", "forward", "evaluate", "gradient"])
def test_cost_changes_nothing(entry, quick):
    net = fitted(nn.Sequential(nn.Dense(8), nn.BatchNorm(), nn.Dropout(0.2), nn.Dense(3)))
    before = {n: v.copy() for n, v in {**net._state(), **net._slots}.items()}
    net.compiled.cost(entry=entry)
    after = {**net._state(), **net._slots}
    assert all(np.array_equal(before[n], after[n]) for n in before)
    assert net._counters["steps"] == 6


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float64"},
        {"optimizer": cr.SGD(0.1, momentum=0.9)},
        {"optimizer": cr.Adam(accumulate=2)},
        {"sample_weight": np.linspace(0, 1, 20)},
        {"loss": "mse", "y": np.ones((20, 3))},
        {"loss": "binary_cross_entropy", "net": nn.Dense(1), "y": np.arange(20) % 2},
        {"net": nn.Sequential(nn.Embedding(7, 4), nn.Dense(3)), "x": np.arange(20) % 7},
        {"batch_size": 1},
    ],
    ids=str,
)
def test_cost_of_other_steps(options, quick):
    made = fitted(**options).compiled.cost()
    assert made.total.flops == sum(row.flops for row in made.rows) > 0
    assert made.total.measured > 0


def test_every_kernel_is_timed():
    made = fitted(
        x=np.ones((512, 200), np.float32), batch_size=256, net=nn.Sequential(nn.Dense(200, "tanh"), nn.Dense(3))
    ).compiled.cost()
    assert made.batch == 256
    known = [row.measured for row in made.rows if row.measured is not None]
    if peak.counter() is not None:
        assert len(known) == len(made.rows)
        assert all(t >= 0 for t in known)  # how long, depends on what else the machine does; 0: less than reading the clock
        assert max(row.share or 0.0 for row in made.rows) > 0  # None where no time was left of reading the clock


def test_more_kernels_than_there_are_counters_for(monkeypatch):
    """Nothing is written behind the last counter."""
    for module in (pipeline, native):
        monkeypatch.setattr(module, "MOST_CLOCKS", 2)
    request = fitted().compiled._request("step", None)
    session = request._session(native.NativeBackend(guard=1984, timed=True))  # a guard of its own: no other test has this code
    session._report = memory = np.zeros(len(session._report) + 8, np.int64)[: len(session._report)]
    session._table[1] = memory.ctypes.data
    session.run(request._steps(5))
    assert len(session.cycles()) == 2
    assert len(items_of(request.network)) > 2
    assert not memory.base[len(memory) :].any()


def test_without_a_counter_of_cycles(monkeypatch, quick):
    monkeypatch.setattr(peak, "counter", lambda: None)
    made = fitted().compiled.cost()
    assert all(row.measured is None and row.share is None for row in made.rows)
    assert made.total.measured > 0
    assert " - " in str(made)


def test_the_table_is_aligned(quick):
    lines = str(fitted().compiled.cost()).splitlines()
    assert lines[0].startswith("step of 8 rows in float32, one thread")
    heading, table = lines[2], [line for line in lines[3:] if not line.startswith("--")]
    assert heading.split() == [*compiled.HEADING[:-1], "of", "peak"]
    assert table[-1].startswith("total")
    at = heading.index("predicted") + len("predicted")
    assert all(line[at - 1] == "s" and line[at] == " " for line in table)
    assert all(line.endswith(("%", "-")) and len(line) == len(heading) for line in table)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (999.6, "1 k"), (1500, "1.5 k"), (532_480, "532 k"), (2.25e11, "225 G"), (3e15, "3000 T")],
)
def test_numbers_with_units(value, text):
    assert compiled._si(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (3e-9, "3 ns"), (2.354e-6, "2.35 µs"), (0.012, "12 ms"), (1.5, "1.5 s")]
)
def test_times_with_units(seconds, text):
    assert compiled._time(seconds) == text


# ---- the processor -----------------------------------------------------------------------------------------------------------


def test_bandwidths():
    found = peak.bandwidths()
    assert found[-1].holds is None
    assert all(1e8 < b.rate < 1e13 for b in found)
    assert peak.bandwidth(1) == found[0].rate
    assert peak.bandwidth(1e15) == found[-1].rate


def test_the_peak_is_measured_once():
    assert peak.of_one_core() == peak.of_one_core()
    assert 1e8 < peak.of_one_core("float64") < 1e13


@pytest.mark.parametrize("level", LEVELS)
def test_loops_of_the_peak_for_every_processor(level):
    """Twelve multiply-adds on registers and nothing else between two jumps."""
    target = narrowed(level)
    for dtype in peak.NAMES:
        text = jit.assembly(peak.spin_ir(target, dtype), target)
        assert len(re.findall(r"vfn?m(?:add|sub)\w+p[sd]|fmla|\bmulp[sd]|fmul", text)) >= peak.CHAINS
    assert jit.assembly(peak.copy_ir(target), target)


def test_only_counters_that_may_be_read():
    assert peak.counts_cycles(narrowed("avx2"))
    assert peak.counts_cycles(narrowed("aarch64")) == ("cntvct" in jit.assembly(peak.CYCLES, narrowed("aarch64")).lower())


def test_gelu_keeps_one_number_for_the_way_back() -> None:
    """Beside its result its slope, not what that is made of."""
    net = nn.Sequential(nn.Dense(100, "gelu"), nn.Dense(3))
    net.fit(np.ones((48, 30), "f4"), np.ones((48, 3), "f4"), epochs=1, batch_size=48, threads=1)
    (forward,) = (k for k in net.compiled.text("kernels").split("kernel ") if "normal_cdf" in k)
    assert len(re.findall(r"^ +t\d+\[", forward, re.MULTILINE)) == 2
