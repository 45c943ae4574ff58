"""Random recurrent networks: truncated against windows written as loops, stateful layers against one long sequence, several inputs
against the reference backend; the same bits on one, two and three threads."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import recurrent_oracle as oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from native import Threaded, assert_bits, registered
from same import assert_same, state
from test_truncate import Case, Definition, close, leaky

import chainrule as cr
from chainrule import nn

Array = np.ndarray
few = settings(max_examples=max(settings().max_examples // 8, 1))
SEQUENCES: dict[str, tuple[Any, Any, int]] = {  # a layer of so many units, its cell as a loop, how many arrays its state has
    "RNN": (lambda n, **o: nn.RNN(n, return_sequences=True, **o), oracle.rnn, 1),
    "LSTM": (lambda n, **o: nn.LSTM(n, True, **o), oracle.lstm, 2),
    "peephole": (lambda n, **o: nn.LSTM(n, True, peephole=True, **o), partial(oracle.lstm, peephole=True), 2),
    "GRU": (lambda n, **o: nn.GRU(n, True, **o), oracle.gru, 1),
    "GRU, reset before": (lambda n, **o: nn.GRU(n, True, reset_after=False, **o), partial(oracle.gru, reset_after=False), 1),
}


@st.composite
def stacks(draw: st.DrawFn) -> list[tuple[str, int, bool]]:
    """One or two layers: a cell, its units, whether its first state is learnt."""
    layer = st.tuples(st.sampled_from(list(SEQUENCES)), st.sampled_from([1, 2, 5, 8]), st.booleans())
    return draw(st.lists(layer, min_size=1, max_size=2))


def cases(stack: list[tuple[str, int, bool]]) -> Case:
    layers = [partial(SEQUENCES[kind][0], units, learn_initial=learnt) for kind, units, learnt in stack]
    return Case(
        lambda: [make() for make in layers], [(SEQUENCES[kind][1], [units] * SEQUENCES[kind][2]) for kind, units, _ in stack]
    )


def learnt_on(threads: int, make: Any, *data: Any, **options: Any) -> tuple[nn.Module, list[Array]]:
    """A network that was trained on so many threads, and all that it has learnt."""
    net = make()
    with registered(Threaded(threads)) as native:
        run = net.fit(*data, backend=native, verbose=False, **options)
    return net, [np.asarray(run.loss), *state(net).values()]


def assert_threads_and_backends_agree(make: Any, *data: Any, **options: Any) -> None:
    """The same bits on 1, 2 and 3 threads; the numbers of the reference backend."""
    net, one = learnt_on(1, make, *data, **options)
    for threads in (2, 3):
        assert_bits(learnt_on(threads, make, *data, **options)[1], one, f"{threads} threads")
    other = make()
    run = other.fit(*data, backend="reference", verbose=False, **options)
    np.testing.assert_allclose(one[0], run.loss, rtol=1e-8)
    close(net.parameters, other.parameters, 1e-8)


# ---- truncated ---------------------------------------------------------------------------------------------------------------


@few
@given(stacks(), st.integers(1, 9), st.integers(0, 7), st.integers(1, 13), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_windows_are_those_that_loops_take(
    stack: list[tuple[str, int, bool]], every: int, further: int, steps: int, rows: int, ragged: bool, seed: int
) -> None:
    r = np.random.default_rng(seed)
    x, y = r.normal(size=(rows, steps, 3)), r.normal(size=(rows, steps, 2))
    n = r.integers(0, steps + 1, rows) if ragged else np.full(rows, steps)
    n[r.integers(rows)] = steps
    lengths: dict[str, Any] = {"lengths": n} if ragged else {}
    case, pair, w = cases(stack), (every, every + further), r.uniform(0.5, 2, rows)
    net, definition = case.built(x, y), Definition(case.cells, *pair)
    start = dict(net.parameters)
    close(net.gradients(x, y, truncate=pair, **lengths), definition.gradients(start, x, y, n, np.ones(rows)), 1e-9)
    batch = int(r.integers(1, rows + 1))
    options = {
        "truncate": pair,
        "optimizer": cr.SGD(0.05),
        "batch_size": batch,
        "epochs": 2,
        "shuffle": False,
        "sample_weight": w,
    }
    run = net.fit(x, y, **lengths, **options)
    wanted, losses = definition.fit(start, x, y, n, w, rate=0.05, batch=batch, epochs=2)
    close(net.parameters, wanted, 1e-8)
    np.testing.assert_allclose(run.loss, losses, rtol=1e-8)
    assert_threads_and_backends_agree(lambda: case.built(x, y), x, y, **lengths, **options)


# ---- stateful ----------------------------------------------------------------------------------------------------------------


@few
@given(stacks(), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_a_stateful_stack_takes_batches_and_epochs_as_one_sequence(
    stack: list[tuple[str, int, bool]], steps: int, windows: int, rows: int, epochs: int, seed: int
) -> None:
    """With a learning rate of 0 the losses are those of one sequence, in which the windows follow each other and epochs repeat them;
    with another the network learns what one of windows does that are cut from that sequence."""
    r = np.random.default_rng(seed)
    x, y = r.normal(size=(rows, windows * steps, 3)), r.normal(size=(rows, windows * steps, 2))
    parts = [np.concatenate([a[:, t : t + steps] for t in range(0, windows * steps, steps)]) for a in (x, y)]
    long_x, long_y = (np.tile(a, (1, epochs, 1)) for a in (x, y))
    plain = [(kind, units, False) for kind, units, _ in stack]
    stateful = lambda: nn.Sequential(*(SEQUENCES[k][0](u, stateful=rows) for k, u, _ in plain), nn.Dense(2))
    whole = cases(plain).built(x, y)

    def begun() -> nn.Module:
        net = stateful()
        net.fit(*parts, epochs=0, batch_size=rows, dtype="float64", loss="mse")
        net.load_parameters(whole.parameters)
        return net

    options: dict[str, Any] = {"epochs": epochs, "batch_size": rows, "shuffle": False}
    still = begun()
    run = still.fit(*parts, optimizer=cr.SGD(0.0), **options)
    errors = np.mean((whole.predict(long_x) - long_y) ** 2, axis=(0, 2)).reshape(epochs, -1).mean(axis=1)
    np.testing.assert_allclose(run.loss, errors, rtol=1e-10)
    learning = begun()
    learning.fit(*parts, optimizer=cr.SGD(0.1), **options)
    whole.fit(long_x, long_y, optimizer=cr.SGD(0.1), truncate=(steps, steps), batch_size=rows, epochs=1)
    close(learning.parameters, whole.parameters, 1e-9)
    assert_threads_and_backends_agree(begun, *parts, optimizer=cr.SGD(0.1), **options)


# ---- several inputs ----------------------------------------------------------------------------------------------------------


class Joined(nn.Module):
    """Two sequences, each through layers of its own, and a vector; the second may begin with what the first ended with."""

    def __init__(self, first: nn.Module, second: nn.Module, follows: bool) -> None:
        self.first, self.second, self.follows = first, second, follows
        self.start, self.head = nn.Dense(5, "tanh"), nn.Dense(2)

    def __call__(self, a: Any, b: Any, c: Any) -> Any:
        read = self.first(a)
        begin = self.start(np.concatenate([read, c], axis=1))
        again = self.second(b, begin) if self.follows else self.second(b)
        return self.head(np.concatenate([read, again, c], axis=1))


def reader(kind: str, units: int, both: bool) -> nn.Module:
    layer = {
        "RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU, "peephole": partial(nn.LSTM, peephole=True),
        "leaky": lambda units: nn.Recurrent(leaky, state=3),
    }[kind](units)  # fmt: skip
    return nn.Bidirectional(layer) if both else layer


@few
@given(st.data())
def test_several_sequences_of_different_lengths(data: st.DataObject) -> None:
    kind, units, both = data.draw(
        st.tuples(st.sampled_from(["RNN", "LSTM", "GRU", "peephole", "leaky"]), st.integers(1, 9), st.booleans())
    )
    rows, follows, seed = data.draw(st.integers(1, 35)), data.draw(st.booleans()), data.draw(st.integers(0, 99))
    times = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    r = np.random.default_rng(seed)
    x = {"a": r.normal(size=(rows, times[0], 3)), "b": r.normal(size=(rows, times[1], 2)), "c": r.normal(size=(rows, 4))}
    options: dict[str, Any] = {"epochs": 2, "batch_size": 16, "optimizer": cr.SGD(0.1), "dtype": "float64", "loss": "mse"}
    which = data.draw(st.sampled_from(["none", "a", "b", "both"]))
    lengths = {n: r.integers(0, t + 1, rows) for n, t in zip("ab", times, strict=True) if which in (n, "both")}
    if lengths:
        options["lengths"] = lengths

    def make() -> nn.Module:
        return Joined(reader(kind, units, both), nn.GRU(5) if follows else nn.LSTM(units), follows)

    y = r.normal(size=(rows, 2))
    assert_threads_and_backends_agree(make, x, y, **options)
    net = make()
    net.fit(x, y, **{**options, "epochs": 0})
    rough = {n: a.copy() for n, a in x.items()}
    for name, n in lengths.items():
        rough[name][np.arange(x[name].shape[1]) >= n[:, None]] = 1e6
    given_lengths = {"lengths": lengths} if lengths else {}
    assert_same(net.gradients(x, y, **given_lengths), net.gradients(rough, y, **given_lengths))
    if lengths:  # each row by itself, as long as it is
        out = net.predict(x, lengths=lengths)
        for i in range(min(rows, 5)):
            ends = {n: int(k[i]) for n, k in lengths.items()}
            if min(ends.values()) > 0:
                one = {n: a[i : i + 1, : ends[n]] if n in ends else a[i : i + 1] for n, a in x.items()}
                np.testing.assert_allclose(out[i], net.predict(one)[0], rtol=1e-9, atol=1e-12)
