"""The benchmark itself: that its networks are what they say, that it finds wrong losses, and that nothing brings it down."""

import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import chainrule as cr
from bench import __main__, compiling, general, growth, memory, overhead, peak, processes, tables
from bench.layers import (
    GRU,
    LSTM,
    RNN,
    Activation,
    BatchNorm,
    Bidirectional,
    Conv2D,
    Dense,
    Flatten,
    GlobalAvgPool,
    MaxPool2D,
    Residual,
    Sequential,
)
from bench.libraries import BY_HAND, FLOAT64, LIBRARIES, OURS, WITHIN, Settings, ours
from bench.measure import Bench, Candidate, Cores, check_agreement
from bench.pool import Failure, NotOffered, Process, environment
from bench.results import Measured, Report, RowResult
from bench.rows import ALL_ROWS, CHECKED_STEPS, GENERAL, ROWS, Row, convolution, dense, normalised, residual
from chainrule import nn

SETTINGS = Settings(1, False, "reference")
SMALL = ALL_ROWS["xor"]


def test_operations_are_counted_product_by_product():
    digits = ALL_ROWS["digits"]
    assert digits.flops == 32 * 2 * (3 * 128 * 10 + 2 * 64 * 128)  # the first layer needs no gradient by its input
    assert ALL_ROWS["mnist-norm"].flops == ALL_ROWS["mnist"].flops
    image = Row("image", "", (28, 28, 1), (Conv2D(6, 5, activation="relu"), MaxPool2D(2), Flatten(), Dense(10)), 1, 20)
    assert image.shapes() == [(28, 28, 1), (24, 24, 6), (12, 12, 6), (864,), (10,)]
    assert image.flops == 2 * 2 * 24 * 24 * 6 * 25 + 3 * 2 * 864 * 10
    strided = Row("strided", "", (9, 8, 3), (Conv2D(6, 3, 2, 1),), 1, 20)
    assert strided.shapes() == [(9, 8, 3), (5, 4, 6)]
    assert strided.flops == 2 * 2 * 5 * 4 * 6 * 27
    series = Row("series", "", (7, 3), (LSTM(5),), 1, 20)
    assert series.flops == 7 * (2 * 2 * 3 * 20 + 3 * 2 * 5 * 20)
    both = Row("both", "", (7, 3), (Bidirectional(GRU(5, True)), Dense(2)), 1, 20)
    assert both.shapes() == [(7, 3), (7, 10), (7, 2)]
    assert both.flops == 2 * 7 * (2 * 2 * 3 * 15 + 3 * 2 * 5 * 15) + 7 * 3 * 2 * 10 * 2


def test_sequences_of_different_length_count_by_their_steps():
    ragged = Row("ragged", "", (9, 3), (LSTM(5), Dense(1)), 4, 20, "mse", ragged=(2, 9))
    (x, y), lengths = ragged.data(), ragged.lengths()
    assert x.dtype == y.dtype == np.float32
    assert (lengths.min(), lengths.max()) == (2, 9)
    assert all(np.all(np.diff(batch) <= 0) for batch in np.split(lengths, 20))
    assert all(np.all(row[:n] != 0) and np.all(row[n:] == 0) for row, n in zip(x, lengths, strict=True))
    step = 2 * 2 * 3 * 20 + 3 * 2 * 5 * 20
    assert ragged.flops == pytest.approx(lengths.sum() / 20 * step + 4 * 3 * 2 * 5)
    for wrong, why in (({"ragged": (2, 9)}, "output a step"), ({"at_once": 3}, "3 at once")):
        with pytest.raises(ValueError, match=why):
            replace(both_outputs(), **wrong)


def both_outputs():
    return Row("both", "", (5, 2), (Bidirectional(GRU(3, True)), Dense(4)), 6, 20)


RECURRENT = (
    Row("one", "", (6, 2), (LSTM(4), Dense(1)), 5, 20, "mse", at_once=4),
    Row("simple", "", (6, 2), (RNN(4), Dense(3)), 5, 20),
    Row("gated", "", (6, 2), (GRU(4), Dense(2)), 5, 20, "mse"),
    Row("ragged", "", (9, 3), (LSTM(5), Dense(1)), 4, 20, "mse", ragged=(1, 9)),
    both_outputs(),
)
LOSSES = """
import importlib, json, pickle, sys
from bench.libraries import Settings
rows, module, way = pickle.load(sys.stdin.buffer)
adapter = importlib.import_module(f"bench.libraries.{module}")
print(json.dumps([adapter.prepare(row, way, Settings(1, False, "reference")).losses(20) for row in rows]))
"""


def losses_of(rows, module, way):
    """In a process of its own: libraries with threads do not like to be forked later."""
    done = subprocess.run(
        [sys.executable, "-c", LOSSES], input=pickle.dumps((rows, module, way)), capture_output=True, check=True, env=environment(SETTINGS)
    )  # fmt: skip
    return json.loads(done.stdout)


IMAGES = (
    Row("plain", "", (9, 8, 2), (Conv2D(3, 3, activation="relu"), MaxPool2D(2), Conv2D(4, 2, 2, 1), Flatten(), Dense(3)), 5, 20),
    Row("residual", "", (7, 6, 3), (*convolution(4), Activation("relu"), *residual(4), *residual(6, 2), GlobalAvgPool(), Dense(3)), 5, 20),
)  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "library", "ways", "rtol"),
    [
        (IMAGES, "torch", ("eager, NHWC", "eager, NCHW"), 5e-5),
        (IMAGES, "jax", ("jit", "scan, flat"), 5e-5),
        (RECURRENT, "torch", ("eager",), 2e-5),
        (RECURRENT, "jax", ("jit", "scan, flat"), 2e-5),
    ],
    ids=["images, torch", "images, jax", "recurrent, torch", "recurrent, jax"],
)
def test_networks_are_the_same_in_all_libraries(rows, library, ways, rtol):
    pytest.importorskip(library)
    wanted = [ours.prepare(row, "fit", SETTINGS).losses(CHECKED_STEPS) for row in rows]
    for way in ways:
        np.testing.assert_allclose(losses_of(rows, f"with_{library}", way), wanted, rtol=rtol, atol=1e-6)


def test_a_library_may_have_other_ways_for_images():
    torch, jax = LIBRARIES["PyTorch"], LIBRARIES["JAX"]
    assert torch.ways_of(SMALL) == ("eager", "compile")
    assert set(torch.ways_of(ALL_ROWS["lenet"])) == {"eager, NHWC", "eager, NCHW", "compile, NHWC", "compile, NCHW"}
    assert (jax.ways_of(SMALL), jax.ways_of(ALL_ROWS["lenet"])) == (jax.ways, ("jit", "scan"))
    assert OURS.ways_of(ALL_ROWS["lenet"]) == OURS.ways


def test_a_residual_network_counts_both_ways():
    row = ALL_ROWS["residual"]
    blocks = [(32, 32, 3), *[(32, 32, 16)] * 3, *[(32, 32, 16)] * 2, *[(16, 16, 32)] * 2, *[(8, 8, 64)] * 2, (64,), (10,)]
    assert row.shapes() == blocks
    narrow, wide, wider = (2 * n * n * c for n, c in ((32, 16), (16, 32), (8, 64)))
    first, others = narrow * 27, 2 * narrow * 144 + wide * (144 + 288 + 16) + wider * (288 + 576 + 32)
    assert row.flops == 64 * (2 * first + 3 * (others + 2 * 64 * 10))
    assert sum(isinstance(layer, Conv2D) for layer in leaves(row.network)) == 9
    assert {(layer.kernel, layer.stride) for layer in leaves(row.network) if isinstance(layer, Conv2D)} == {
        (3, 1),
        (3, 2),
        (1, 2),
    }
    assert sum(name.endswith("scale") for name in row.parameters()) == 9


def leaves(layer):
    """Layers that consist of no others."""
    parts = layer.layers if isinstance(layer, Sequential) else layer.parts.values() if isinstance(layer, Residual) else ()
    return [leaf for part in parts for leaf in leaves(part)] if parts else [layer]


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_parameters_are_those_of_chainrule(row):
    values = row.parameters()
    fit = ours.Fit(row, "reference", 1)
    (x,), y, net = fit.x, fit.y, fit.net
    assert {n: v.shape for n, v in net.parameters.items()} == {n: v.shape for n, v in values.items()}
    assert sum(v.size for v in values.values()) == row.parameter_count
    assert all(np.array_equal(values[n], v) for n, v in row.parameters().items())  # a pure function of the row
    assert all(np.array_equal(values[n], v) for n, v in net.parameters.items())
    assert len(x) == len(y) == row.batch * row.steps


def measured(name, losses):
    return Measured(name, "fit", name != OURS.name, losses=list(losses))


def test_losses_that_differ_are_found():
    losses = np.linspace(1, 0.5, CHECKED_STEPS)
    off = losses.copy()
    off[7] += 1e-3
    notes: list[str] = []
    assert check_agreement([measured("JAX", losses), measured("chainrule", losses + 1e-8)], 1e-4, notes) is True
    assert (
        check_agreement([measured("JAX", losses), measured("PyTorch", losses), measured("chainrule", off)], 1e-4, notes) is False
    )
    assert notes == ["chainrule (fit): loss 0.8167895 in step 8 where 0.8157895 is the median of all; no ratio is given"]
    assert check_agreement([measured("JAX", losses), measured("chainrule", losses * np.nan)], 1e-4, notes) is False
    assert check_agreement([measured("chainrule", losses)], 1e-4, notes) is None


def test_a_wrong_learning_rate_is_found():
    """2 % off: the tolerance is not too wide for the smallest network."""
    x, y = SMALL.data()

    def losses(rate):
        net = nn.Sequential(nn.Dense(8, "tanh"), nn.Dense(1))
        net.fit(x[:4], y[:4].astype(float), loss=SMALL.loss, epochs=0)
        net.load_parameters(SMALL.parameters())
        batches = [slice(4 * i, 4 * i + 4) for i in range(CHECKED_STEPS)]
        return [
            net.fit(x[b], y[b].astype(float), loss=SMALL.loss, optimizer=cr.Adam(rate), epochs=1, shuffle=False).loss[-1]
            for b in batches
        ]

    right = losses(1e-3)
    assert (
        check_agreement([measured("JAX", right), measured("PyTorch", right), measured("chainrule", losses(1.03e-3))], 1e-4, [])
        is False
    )


def test_no_ratio_without_agreement():
    result = RowResult(SMALL, 1, [measured("JAX", []), measured(OURS.name, [])], agreed=True)
    result.measured[0].times, result.measured[1].times = [4e-6, 5e-6, 6e-6], [1e-6, 1e-6, 2e-6]
    assert result.ratio == pytest.approx(5)
    result.agreed = False
    assert result.ratio is None
    report = Report({"processor": "p", "threads": 1, "cores": 1, "system": "s", "peak": "-", "repeats": 3}, rows=[result])
    assert report.failed
    assert "losses disagree" in tables.text(report)
    assert json.loads(json.dumps(report.plain(), default=str))["rows"][0]["ratio"] is None


def test_markdown_goes_between_the_marks(tmp_path):
    report = Report({"processor": "p", "threads": 1, "cores": 1, "system": "s", "peak": "-", "repeats": 3})
    file = tmp_path / "README.md"
    file.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.write(report, None, file)
    assert file.read_text().startswith(f"before\n{tables.BEGIN}\np, 1 of 1 cores")
    assert file.read_text().endswith(f"{tables.END}\nafter\n")
    assert "old" not in file.read_text()


def test_line_through_times():
    table = growth.new_tables(2)[2]
    growth.fit_line(table, "one thread", [(n, 1e-6 + 2e-9 * n) for n in (100, 1000, 10_000)])
    assert table.values[0] == pytest.approx(
        {"threads": "one thread", "constant": 1e-6, "per_parameter": 2e-9, "worst": 0, "r2": 1}, abs=1e-9
    )


def test_peak():
    rate = peak.measure(1)
    assert rate is not None
    assert 1e8 < rate < 1e12


def test_processes_may_keep_their_bytecode(monkeypatch):
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    made = environment(SETTINGS)
    assert "PYTHONDONTWRITEBYTECODE" not in made
    assert made["OMP_NUM_THREADS"] == "1"


def test_a_process_that_dies_is_reported_and_ended():
    process = Process(OURS, SETTINGS)
    try:
        assert process.start() == cr.__version__
        with pytest.raises(NotOffered, match="no backend nonsense"):
            other = Process(OURS, replace(SETTINGS, backend="nonsense"))
            try:
                other.start()
                other.ask("prepare", 60, row="xor", way="fit")
            finally:
                other.end()
        with pytest.raises(Failure, match="KeyError"):
            process.ask("prepare", 60, row="nonsense", way="fit")
        os.killpg(process.process.pid, signal.SIGSEGV)
        with pytest.raises(Failure, match="SIGSEGV"):
            process.ask("prepare", 60, row="xor", way="fit")
    finally:
        process.end()


def test_a_process_that_hangs_is_ended():
    process = Process(OURS, SETTINGS)
    os.killpg(process.process.pid, signal.SIGSTOP)
    with pytest.raises(Failure, match="no answer within"):
        process.start(limit=0.2)
    assert process.process.poll() is not None


def test_a_row_from_start_to_end():
    bench = Bench(SETTINGS, [LIBRARIES["scikit-learn"], OURS], repeats=2, seconds=0.02, say=lambda message: None)
    try:
        result = RowResult(SMALL, 1)
        bench.row(SMALL, result)
        norm = RowResult(ALL_ROWS["mnist-norm"], 1)
        bench.row(norm.row, norm)
    finally:
        bench.close()
    assert result.agreed is True
    assert result.notes == []
    assert result.ratio is not None
    assert [len(m.times) for m in result.measured] == [2, 2]
    assert norm.agreed is None
    assert norm.notes == ["scikit-learn (fit): its networks are dense layers with one activation"]
    assert norm.ratio is None
    assert norm.missing() == ["PyTorch", "JAX"]
    assert BatchNorm in {type(layer) for layer in norm.row.layers}


def test_compiling_is_what_the_first_time_takes_longer():
    table = compiling.new_table()
    compiling.fill(
        table,
        {"steps-10": [(0.5, 0.1), (0.7, 0.1), (0.6, 0.2)], "steps-1000": [(0.6, 0.2)] * 3, "steps-10000": [(0.9, 0.3)] * 3},
    )
    assert [v["compiling"] for v in table.values] == pytest.approx([0.4, 0.4, 0.6])
    assert [cells[-1] for cells in table.cells] == ["1.00", "1.00", "1.50 (not the same)"]


def test_compiling_begins_with_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path))  # of this test's process: not used, and not filled
    table = compiling.new_table()
    monkeypatch.setattr(compiling, "SHORT_AND_LONG", compiling.SHORT_AND_LONG[:1])
    compiling.compiling(table, replace(SETTINGS, backend="native"), 1, lambda message: None)
    assert (table.notes, table.failed, list(tmp_path.iterdir())) == ([], False, [])
    assert table.values[0]["compiling"] > 0.05  # a network that comes from a folder takes a tenth of that


def test_what_is_above_its_limit_is_marked():
    table = overhead.new_table()
    said = {"import": 0.2, "compiling": 0.4, "array": 4e-6, "gradient": 9e-6, "keyword": 5e-6, "nest": 11e-6}
    overhead.fill(table, [[said, {**said, "import": 0.3, "compiling": 0.05}], [said, {**said, "compiling": 0.09}]])
    assert [v["median"] for v in table.values] == pytest.approx([0.2, 0.4, 0.07, 4e-6, 9e-6, 5e-6, 11e-6])
    assert [v["times"] for v in table.values[:3]] == [[0.2, 0.3, 0.2, 0.2], [0.4, 0.4], [0.05, 0.09]]
    times = ["200 ms", "400 ms", "70.0 ms (too long)", "4.00 µs", "9.00 µs", "5.00 µs", "11.0 µs (too long)"]
    assert [cells[1] for cells in table.cells] == times
    assert [cells[2] for cells in table.cells] == ["250 ms", "500 ms", "60.0 ms", *["10.0 µs"] * 4]


def test_overhead_from_start_to_end(monkeypatch, tmp_path):
    monkeypatch.setenv("CHAINRULE_CACHE", str(tmp_path))  # of this test's process: not used, and not filled
    table = overhead.new_table()
    overhead.overhead(table, replace(SETTINGS, backend="native"), 1, lambda message: None)
    assert (table.notes, table.failed, list(tmp_path.iterdir())) == ([], False, [])
    cold, again = (table.values[i]["median"] for i in (1, 2))
    assert cold > 2 * again  # what comes from a folder takes a tenth of that
    assert all(1e-7 < v["median"] < 1e-3 for v in table.values[3:])
    assert tables.markdown(
        Report({"processor": "p", "threads": 1, "cores": 1, "system": "s", "peak": "-", "repeats": 1}, tables=[table])
    )


def test_a_script_that_fails_is_reported(monkeypatch):
    table = overhead.new_table()
    overhead.overhead(table, replace(SETTINGS, backend="nonsense"), 1, lambda message: None)
    assert table.failed
    assert "nonsense" in table.notes[0]
    assert table.cells == []
    monkeypatch.setattr(processes, "LIMIT", 0.01)
    with pytest.raises(RuntimeError, match="took longer"):
        overhead.once(SETTINGS)


def looking(monkeypatch, looks):
    """The cores are like that, one look after the other: the rate of multiply-adds, and how long a meeting takes, 1 if that is not said."""
    each = iter(x if isinstance(x, tuple) else (x, x and 1) for x in looks)
    meetings = []

    def measure(*_):
        rate, meeting = next(each)
        meetings.append(meeting)
        return rate

    monkeypatch.setattr(peak, "measure", measure)
    monkeypatch.setattr(peak, "meeting", lambda _: meetings.pop())
    monkeypatch.setattr("bench.measure.LONGEST", 0)


@pytest.mark.parametrize(
    ("looks", "taken", "short"),
    [
        ([10, 10], 1, 0),  # before and after
        ([10, 5, 10], 1, 0),  # threads were spinning still
        ([10, 5, 5, 9, 10], 3, 0),  # a core is missing at the end, then at the beginning
        ([5, 10, 10], 2, 0),  # at the very beginning, which shows later
        ([10, *[5] * 40], 9, 1),  # and for good: what is measured last stands
        ([10, (10, 3), (10, 3), 10, 10], 3, 0),  # cores lie apart
        ([(10, 2), (10, 4)], 1, 0),  # not so far
        ([(10, 3), 10, 10], 2, 0),  # at the very beginning, which shows later
        ([10, (5, 0.3), (5, 0.3), 10, 10], 3, 0),  # two threads of one core, which meet in no time
        ([10, *[(10, 3)] * 40], 9, 1),  # apart for good
        ([None, None], 1, 0),  # nothing to measure with
    ],
)
def test_without_all_cores_it_is_measured_again(monkeypatch, looks, taken, short):
    steps = []
    looking(monkeypatch, looks)
    monkeypatch.setattr(Bench, "_train", lambda self, candidate, n: (float(len(steps)), steps.append(n) or 1))
    bench = Bench(replace(SETTINGS, threads=2), [], 1, 0.1, lambda message: None)
    candidate = Candidate(OURS.name, "fit", SMALL, measured(OURS.name, []))
    bench._measure(candidate)
    assert len(steps) == taken
    assert candidate.result.times == [taken - 1]
    assert bench.retaken == {OURS.name: taken - 1}
    assert bench.short == short


def test_fewer_cores_for_good_are_all_there_are(monkeypatch):
    looking(monkeypatch, [10, 5, 5, 4.5, 3, 3])
    cores = Cores(2)
    assert not cores.all_there(cores.look(), cores.look())
    cores.fewer()
    assert cores.all_there(cores.look())
    assert not cores.all_there(cores.look())
    assert Cores(1).all_there(Cores(1).look())  # of one there are never fewer


def test_cores_that_are_far_from_each_other_for_good_are_as_near_as_they_get(monkeypatch):
    looking(monkeypatch, [10, (10, 4), (10, 4), (10, 4), (10, 4)])
    cores = Cores(2)
    assert not cores.all_there(cores.look(), cores.look())
    cores.fewer()
    assert cores.all_there(cores.look())


def test_threads_meet_in_less_than_a_millisecond():
    pytest.importorskip("llvmlite")
    for threads in (1, 2):
        assert 0 < peak.meeting(threads, 1) < 1e-3


def test_losses_need_data_to_be_compared():
    bench, row = Bench(SETTINGS, [], 1, 0.1, lambda message: None), replace(SMALL, steps=19)
    with pytest.raises(ValueError, match="over 20 steps"):
        bench.row(row, RowResult(row, 1))


def test_memory_and_time_are_judged():
    table = memory.new_table()
    plain, budget = measured(OURS.name, []), measured(OURS.name, [])
    plain.times, budget.times = [1.0, 1.1, 1.2], [1.5, 1.6, 1.7]
    memory.fill(table, [plain, budget], [980_000_000, 40_000_000])
    assert [cells[1:] for cells in table.cells] == [
        ("980.0 MB", "1.10 s", "1.00"), ("40.0 MB (too much)", "1.60 s", "1.45 (too much)")
    ]  # fmt: skip


def test_a_budget_from_start_to_end(monkeypatch):
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("only Linux tells how much memory was in use at most")
    monkeypatch.setattr(memory, "LONG", ALL_ROWS["steps-10000"])
    monkeypatch.setattr(memory, "WAYS", ("fit", f"{WITHIN}2MB"))
    table, bench = memory.new_table(), Bench(replace(SETTINGS, backend="native"), [OURS], 2, 0.05, lambda message: None)
    try:
        memory.memory(table, bench)
    finally:
        bench.close()
    assert (table.notes, table.failed) == ([], False)
    plain, budget = (v["bytes"] for v in table.values)
    assert plain > 20e6 > 5e6 > budget


# ---- networks that nobody measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GENERAL, ids=lambda r: r.name)
def test_networks_that_nobody_measured_are_built(row):
    fit = ours.prepare(row, FLOAT64 if row.name == "float64" else "fit", SETTINGS)
    values = row.parameters()
    assert {n: v.shape for n, v in fit.net.parameters.items()} == {n: v.shape for n, v in values.items()}
    assert {v.dtype for v in fit.net.parameters.values()} == {np.dtype("f8" if row.name == "float64" else "f4")}
    assert np.isfinite(fit.losses(1)).all()


def test_two_inputs_are_two():
    row = ALL_ROWS["two-inputs"]
    assert row.shapes() == [(64,), (96,), (10,)]
    assert row.flops == 64 * 2 * (2 * (40 * 64 + 24 * 32) + 3 * 96 * 10)
    fit = ours.prepare(row, "fit", SETTINGS)
    assert [part.shape[1] for part in fit.x] == [40, 24]
    w = fit.net.parameters
    x, at = row.data()[0][:5], 40
    hidden = np.concatenate([x[:, :at] @ w["0.first.weight"], x[:, at:] @ w["0.second.weight"]], 1)
    wanted = np.maximum(hidden, 0) @ w["1.weight"]
    np.testing.assert_allclose(fit.net.predict(tuple(part[:5] for part in fit.x)), wanted, rtol=1e-4, atol=1e-5)


BUILT_IN = (
    (Row("dense", "", (6,), dense([5, 3], "relu"), 8, 20), "Dense, cross_entropy"),
    (Row("norm", "", (6,), (*normalised(5), Dense(3)), 8, 20).comparable(), "Dense, BatchNorm, Dropout"),
    (Row("lstm", "", (6, 2), (LSTM(4), Dense(1)), 5, 20, "mse"), "LSTM"),
)


@pytest.mark.parametrize(("row", "what"), BUILT_IN, ids=lambda r: getattr(r, "name", None))
def test_what_is_written_by_hand_computes_the_same(row, what):
    wanted, own = ours.prepare(row, "fit", SETTINGS), ours.prepare(row, BY_HAND + what, SETTINGS)
    assert {type(layer).__module__ for layer in own.net if type(layer).__name__ in what} == {"bench.libraries.by_hand"}
    np.testing.assert_allclose(own.losses(20), wanted.losses(20), rtol=1e-4)


def test_dropout_by_hand_drops():
    row = Row("dropout", "", (6,), normalised(50), 8, 20, "mse")
    net = ours.Fit(row, "reference", 1, by_hand=["Dropout"]).net
    x, y = row.data()
    first, second = (net.gradients(x, y, seed=seed)["1.shift"] for seed in (0, 1))
    assert not np.array_equal(first, second)


def pair(known, other, times, operations=(1.0, 1.0)):
    """Two ways of rows that took these times."""
    made = [general.Candidate(OURS.name, way, ALL_ROWS[n], measured(OURS.name, [])) for n, way in (known, other)]
    for candidate, taken in zip(made, times, strict=True):
        candidate.result.times = taken
    return general.Pair(*made, operations)


def test_speeds_stand_beside_the_nearest_measured_one():
    known = {("digits", "fit"): 1e6, ("mnist", "fit"): 1e8}
    assert general.nearest(known, 2e6) == ("digits", "fit")
    assert general.nearest(known, 5e7) == ("mnist", "fit")


def test_the_two_of_a_pair_are_compared_round_by_round():
    """The machine was three times as slow in the second of three rounds, and disturbed one of the two in the last."""
    alone, _, hand = general.new_tables()
    both = pair(("digits", "fit"), ("gelu", "fit"), ([1e-5, 3e-5, 1e-5], [4e-5, 12e-5, 9e-5]), (1e6, 2e6))
    general.fill_shape(alone, both)
    assert (alone.values[0]["near"], alone.values[0]["share"]) == ("digits", pytest.approx(0.5))
    assert alone.cells[0][-1] == "0.50 (too little)"
    assert alone.cells[0][2:4] == ("90.0 µs", "22.2")
    general.fill_hand(hand, pair(("xor", "fit"), ("xor", f"{BY_HAND}Dense"), ([1e-6, 2e-6, 3e-6], [1e-6, 2e-6, 6e-6])))
    assert hand.cells[0][1:] == ("Dense", "2.00 µs", "2.00 µs", "1.00")
    assert both.measured
    both.other.result.times.clear()
    assert not both.measured


def test_general_from_start_to_end(monkeypatch):
    monkeypatch.setattr(general, "MEASURED", (SMALL,))
    monkeypatch.setattr(general, "GENERAL", tuple(ALL_ROWS[n] for n in ("tiny", "float64")))
    monkeypatch.setattr(general, "HAND_WRITTEN", (("xor", "Dense"), ("digits", "Dense")))
    bench = Bench(replace(SETTINGS, backend="native"), [OURS], repeats=2, seconds=0.01, say=lambda message: None)
    try:
        alone, shapes, hand = general.measure(bench)
    finally:
        bench.close()
    assert [(t.notes, t.failed) for t in (alone, shapes, hand)] == [([], False)] * 3
    assert [v["row"] for v in alone.values] == [v["row"] for v in shapes.values] == ["tiny", "float64"]
    assert [v["operations"] for v in alone.values] == [v["operations"] for v in shapes.values]
    assert {v["near"] for v in shapes.values} == {"xor"}
    tiny, double = (v["operations"] for v in shapes.values)
    assert tiny > ALL_ROWS["tiny"].flops  # biases, elementary functions and Adam count, too
    assert double > 2 * ALL_ROWS["float64"].flops
    assert [(v["row"], v["by_hand"]) for v in hand.values] == [("xor", "Dense"), ("digits", "Dense")]


def test_general_chooses_its_own_networks(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--general", "xor"])
    with pytest.raises(SystemExit):
        __main__.arguments()
    assert "chooses its own networks" in capsys.readouterr().err
