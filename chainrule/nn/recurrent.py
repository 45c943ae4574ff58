"""The layers of recurrent networks.

In: sequences, (batch, time, feature). Out: the output of the last step, or of each. Every one of them is a `Recurrent`, whose loop
calls `step(state, x) -> (state, output)`: that of a built-in layer, or your own. Where sequences differ in length, a step beyond a
sequence's end leaves its state as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from .. import initializers
from ..errors import ShapeError, UsageError
from ..graph import tree as trees
from ..graph.trace import located
from ..ops import random
from ..ops.activations import sigmoid
from ..ops.elementwise import convert
from ..ops.loop import apply_iota, scan
from ..ops.reduce import standardize
from ..train.scope import Scope, Window
from .layers import layer_of, rate_of
from .module import Module, activation_of, positive
from .saving import layers


@layers.declare("Recurrent")
class Recurrent(Module, free=["step"]):
    """A loop over time: (h_t, y_t) = step(h_{t-1}, x_t).

    A cell of your own is a subclass that defines `step`, which may use `self.parameter`, or a function or an object with a method
    `step`; a cell that is a `Module` is a part of the network. RNN, LSTM and GRU are such subclasses and nothing more.

    Args:
        cell: step(state, x) -> (state, output), in NumPy, on x (B, ...) and a state of arrays (B, ...); None in a subclass.
        state: what `step` takes and returns as state: n for one array (B, n), a tuple of numbers for one (B, *numbers), a list of
            these for a tuple of arrays; None takes the cell's attribute `state`.
        return_sequences: the outputs of all steps, (B, T, ...), not the last one.
        return_state: (outputs, state after the last step) instead of outputs, for a layer of your own that holds this one.
        reverse: from the last step to the first; outputs keep their place in time.
        dropout: the share of inputs that are set to 0 in training. recurrent_dropout: the same for what `step` reads of the state
            by `self.drop(h)`. The mask of a sequence is the same at all its steps.
        learn_initial: the first state is a parameter, which starts at 0, rather than 0.
        stateful: rows of a batch in training whose states go on from batch to batch, row by row (see below); 0: none.
    Shapes: x (B, T, ...), y (B, ...) or (B, T, ...). A second argument of the call is the first state, given: arrays (B, ...).
    Parameters: those of the cell; `initial_hidden` and so on, (n,), with learn_initial.

    Lengths: with `fit(..., lengths=n)` a sequence ends after n steps: its last output is that of step n - 1, with `reverse` it
    begins there, and outputs beyond are 0. A sequence of length 0 keeps its first state; its output is that state where the cell's
    output is its state, else 0.

    Stateful: with `stateful=16` row i of a training batch starts with the state that row i of the batch before ended with. No
    gradient flows from one batch to another. Use shuffle=False, and data in which row i of a batch continues row i of the one
    before. `reset_state()` begins anew. Differs: evaluation starts from the layer's first state and moves nothing (Keras: it goes on).

    Source: dropout: Gal & Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", NIPS 2016,
    the variant with tied weights (one mask for all gates). Backpropagation through time: Werbos, Proceedings of the IEEE 78, 1990.

    >>> import numpy as np
    >>> def leaky(h, x):
    ...     h = 0.5 * h + x
    ...     return h, h
    >>> net = Recurrent(leaky, state=1)
    >>> _ = net.fit(np.ones((2, 3, 1)), np.ones((2, 1)), epochs=0)
    >>> net.predict(np.ones((2, 3, 1))).tolist()
    [[1.75], [1.75]]
    """

    examples: tuple[dict[str, Any], ...] = ()  # below: its cell is one of those that follow
    state_names: tuple[str, ...] = ()  # of the arrays of the state, for parameters and reports; () for names that do for any

    def __init__(
        self,
        cell: Any = None,
        state: Any = None,
        *,
        return_sequences: bool = False,
        return_state: bool = False,
        reverse: bool = False,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        learn_initial: bool = False,
        stateful: int = 0,
    ) -> None:
        name = type(self).__name__
        self.cell = cell
        self.state = _state_of(name, cell, state)
        self.return_sequences, self.return_state = bool(return_sequences), bool(return_state)
        self.reverse, self.learn_initial = bool(reverse), bool(learn_initial)
        self.dropout = rate_of(dropout, f"{name}: dropout")
        self.recurrent_dropout = rate_of(recurrent_dropout, f"{name}: recurrent_dropout")
        self.stateful = positive(stateful, f"{name}: stateful, the rows of a batch,") if stateful else 0
        if self.stateful and (self.learn_initial or self.reverse):
            other = "learn_initial" if self.learn_initial else "reverse"
            raise UsageError(
                f"{name}: with stateful a sequence begins with the state of another, which leaves no sense to {other}"
            )

    def step(self, state: Any, x: Any) -> tuple[Any, Any]:
        """One step. Args: state, arrays (B, ...); x (B, ...). Returns: the next state, a nest like `state`, and the output (B, ...)."""
        step: Callable[[Any, Any], tuple[Any, Any]] = getattr(self.cell, "step", self.cell)
        return step(state, x)

    def __call__(self, x: Any, initial: Any = None) -> Any:
        if x.ndim < 2:
            raise ShapeError(located(f"{type(self).__name__} needs sequences, shape (B, T, ...); it got {x.shape}"))
        scope = _scope()
        lengths = scope.times.lengths_of(x) if scope.times is not None else None
        window = scope.window if scope.times is not None and scope.times.is_cut(x) else None
        first, structure = self._first(scope, x.shape[0], initial)
        goes_on: list[str] = []
        if window is not None:
            self._check_windows(window)
            first, goes_on = self._from_window_before(scope, window, first)
        loop = _Loop(self, scope, x, first, structure, lengths, window)
        last, y = loop.run()
        for name, value in zip(self._names(), last, strict=True):
            self._go_on(name, value)
        if scope.times is not None:
            scope.times.check_step(x, last[0])
            scope.times.ends(x, *last, *loop.passed, y)
            if self.return_sequences:
                scope.times.follows(y, x)
        for full, value in zip(goes_on, loop.passed, strict=False):
            scope.keep(full, value)
        return (y, trees.unflatten(structure, last)) if self.return_state else y

    def drop(self, h: Any) -> Any:
        """For `step`: what it shall read of the state `h` (B, ...), with recurrent dropout in training."""
        held = _scope().held.get(self)
        if held is None:
            return h
        scope_mask, met = held
        met.append(True)
        if scope_mask.shape != h.shape:
            raise ShapeError(located(f"drop takes the first array of the state, of shape {scope_mask.shape}, not {h.shape}"))
        return h * scope_mask

    def reset_state(self) -> None:
        """Let the next training batch of a stateful layer begin with states of 0."""
        for name in (f"state_{n}" for n in self._names()):
            if name in self._values:
                self._values[name] = np.zeros_like(self._values[name])

    # ---- the first state -----------------------------------------------------------------------------------------------------

    def _names(self) -> tuple[str, ...]:
        count = len(_shapes(self.state)[0])
        return self.state_names or (("hidden",) if count == 1 else tuple(f"hidden_{i}" for i in range(count)))

    def _first(self, scope: Scope, rows: int, initial: Any) -> tuple[list[Any], trees.Structure]:
        """The arrays of the first state, and their nest."""
        shapes, structure = _shapes(self.state)
        if initial is not None:
            given, nest = trees.flatten(initial)
            wanted = [(rows, *shape) for shape in shapes]
            if nest != structure or [np.shape(g) for g in given] != wanted:
                raise ShapeError(located(
                    f"{type(self).__name__}: the first state must be {trees.describe(structure)} of shapes {wanted}, not "
                    f"{trees.describe(nest)} of shapes {[np.shape(g) for g in given]}"
                ))  # fmt: skip
            if scope.times is not None:
                scope.times.check(dict(zip(self._names(), given, strict=True)))
            return [convert(g, scope.dtype) for g in given], structure
        pairs = zip(self._names(), shapes, strict=True)
        return [self._begin(scope, name, rows, shape) for name, shape in pairs], structure

    def _begin(self, scope: Scope, name: str, rows: int, shape: tuple[int, ...]) -> Any:
        if self.learn_initial:
            return np.broadcast_to(self.parameter(f"initial_{name}", shape, "zeros"), (rows, *shape))
        if self.stateful:
            kept = self.statistic(f"state_{name}", (self.stateful, *shape))
            if self.training:
                if rows > self.stateful:
                    raise ShapeError(located(
                        f"{type(self).__name__} keeps the states of {self.stateful} rows, but this batch has {rows}: make stateful "
                        "as large as batch_size"
                    ))  # fmt: skip
                return kept[:rows]
        return np.zeros((rows, *shape), scope.dtype)

    def _go_on(self, name: str, last: Any) -> None:
        """Keep the state of a training batch for the next one; rows that a short batch lacks keep theirs."""
        if self.stateful and self.training:
            kept = self.statistic(f"state_{name}", (self.stateful, *last.shape[1:]))
            rows = last.shape[0]
            self.update(f"state_{name}", last if rows == self.stateful else np.concatenate([last, kept[rows:]]))

    # ---- windows of time -----------------------------------------------------------------------------------------------------

    def _check_windows(self, window: Window) -> None:
        name = type(self).__name__
        if self.reverse:
            raise UsageError(located(
                f"truncate: this {name} goes from the last step to the first, as one half of Bidirectional does, so each of its steps "
                "needs the whole future, which a window of time does not hold"
            ))  # fmt: skip
        if self.return_state or not self.return_sequences:
            raise UsageError(located(
                f"truncate: this {name} gives what it has at the end of a sequence, so the windows before the last one would have nothing "
                "to learn from: let it return_sequences (and not return_state), with a target for each step"
            ))  # fmt: skip
        if self.stateful and window.back > window.every:
            raise UsageError(located(
                f"truncate=({window.every}, {window.back}): a stateful layer goes on from where the steps before ended, so it takes no "
                f"step twice; use truncate=({window.every}, {window.every})"
            ))  # fmt: skip

    def _from_window_before(self, scope: Scope, window: Window, first: list[Any]) -> tuple[list[Any], list[str]]:
        """The first state in a window, and the names under which it goes on: a sequence begins with that of the layer; that of a
        stateful one goes on anyway."""
        if self.stateful:
            return first, []
        kept = [scope.kept(self, name, h) for name, h in zip(self._names(), first, strict=True)]
        begins = np.greater_equal(window.begin, np.zeros((), np.int32))
        return [np.where(begins, h, k) for h, (_, k) in zip(first, kept, strict=True)], [full for full, _ in kept]


class _Loop:
    """One run of a layer over sequences, or over a window of them."""

    def __init__(
        self,
        layer: Recurrent,
        scope: Scope,
        x: Any,
        first: list[Any],
        structure: trees.Structure,
        lengths: Any,
        window: Window | None,
    ) -> None:
        self.layer, self.scope, self.first, self.structure, self.lengths = layer, scope, first, structure, lengths
        self.x, self.steps = x, x.shape[1]
        self.overlap = window if window is not None and window.back > window.every else None
        self.passed: list[Any] = []  # the state that goes on to the next window
        self.names = layer._names()
        pairs = zip(self.names, first, strict=True)
        taps = {n: scope.tap(layer, n, (self.steps, *h.shape)) for n, h in pairs}
        self.taps = {n: t for n, t in taps.items() if t is not None}
        self.input_mask = self._mask(layer.dropout, (x.shape[0], *x.shape[2:]), x.dtype)
        self.state_mask = self._mask(layer.recurrent_dropout, first[0].shape, scope.dtype)
        self.output_is_state = False  # known after the step has been recorded

    def _mask(self, rate: float, shape: tuple[int, ...], dtype: Any) -> Any:
        """The factors of dropout, drawn once for all steps."""
        if not rate or not self.layer.training:
            return None
        return np.where(random.bernoulli(shape, 1 - rate), np.asarray(1 / (1 - rate), dtype), np.asarray(0, dtype))

    def run(self) -> tuple[list[Any], Any]:
        """The state after the last step, and the outputs."""
        along = {"x": np.moveaxis(self.x, 1, 0), "taps": self.taps}
        if self.lengths is not None or self.overlap is not None:
            along["time"] = apply_iota(self.steps)
        met: list[bool] = []
        if self.state_mask is not None:
            self.scope.held[self.layer] = (self.state_mask, met)
        last, outputs = scan(self._step, self.first, along, reverse=self.layer.reverse)
        if self.state_mask is not None:
            del self.scope.held[self.layer]
            if not met:
                raise UsageError(located(
                    "recurrent_dropout changes what the step reads by self.drop(h), but this step does not call it: "
                    "write a subclass of nn.Recurrent whose step does"
                ))  # fmt: skip
        self.passed = last
        if self.overlap is not None:
            outputs, states = outputs
            self.passed = [s[self.overlap.every - 1] for s in states]
        if self.layer.return_sequences:
            return last, np.moveaxis(outputs, 0, 1)
        return last, last[0] if self.output_is_state else self._last(outputs)

    def _step(self, state: list[Any], along: Mapping[str, Any]) -> tuple[list[Any], Any]:
        x = along["x"] if self.input_mask is None else along["x"] * self.input_mask
        new, y = self._call(trees.unflatten(self.structure, state), x)
        self.output_is_state = y is new[0]
        new = [convert(n, h.dtype) for n, h in zip(new, state, strict=True)]
        new = [n + along["taps"][name] if name in along["taps"] else n for name, n in zip(self.names, new, strict=True)]
        if self.output_is_state:
            y = new[0]
        if self.lengths is not None:
            inside = np.less(along["time"], self.lengths)
            new = [np.where(_as_rows(inside, n), n, h) for n, h in zip(new, state, strict=True)]
            y = np.where(_as_rows(inside, y), y, np.zeros((), y.dtype))
        if self.overlap is not None:
            begun = np.greater_equal(along["time"], self.overlap.begin)
            new = [np.where(begun, n, h) for n, h in zip(new, state, strict=True)]
            return new, (y, new)
        return new, None if self.output_is_state and not self.layer.return_sequences else y

    def _call(self, state: Any, x: Any) -> tuple[list[Any], Any]:
        pair = self.layer.step(state, x)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise UsageError(located(f"the step of a recurrent layer returns a pair (state, output), not {pair!r}"))
        new, structure = trees.flatten(pair[0])
        before = trees.flatten(state)[0]
        if structure != self.structure or [np.shape(n) for n in new] != [h.shape for h in before]:
            raise ShapeError(located(
                f"the step must return a state like the one it takes, {trees.describe(self.structure)} of shapes "
                f"{[h.shape for h in before]}, not {trees.describe(structure)} of shapes {[np.shape(n) for n in new]}"
            ))  # fmt: skip
        y = pair[1]
        if np.shape(y)[:1] != before[0].shape[:1]:
            raise ShapeError(located(f"the step must return an output with the rows first, (B, ...), not {y!r}"))
        return new, y

    def _last(self, outputs: Any) -> Any:
        """The output of each sequence's last step."""
        if self.lengths is None or self.layer.reverse:
            return outputs[0 if self.layer.reverse else self.steps - 1]
        ends = np.equal(apply_iota(self.steps)[:, None] + np.uint32(1), self.lengths)
        ends = np.reshape(ends, (*ends.shape, *(1,) * (outputs.ndim - 2)))
        return np.sum(np.where(ends, outputs, np.zeros((), outputs.dtype)), axis=0)


def _as_rows(inside: Any, like: Any) -> Any:
    """A value for each row, to be spread over the other axes of `like`."""
    return np.reshape(inside, (*inside.shape, *(1,) * (like.ndim - 1)))


def _scope() -> Scope:
    scope = Scope.current()
    if scope is None:
        raise UsageError(located("a recurrent layer is called outside a forward pass"))
    return scope


def _state_of(name: str, cell: Any, state: Any) -> Any:
    """The state that was asked for, checked."""
    if isinstance(cell, type):
        raise UsageError(f"{name} got the class {cell.__name__}, not a cell: write {cell.__name__}(...)")
    if cell is not None and not callable(getattr(cell, "step", cell)):
        raise UsageError(f"{name} takes a function step(state, x) or an object with a method `step`, not {cell!r}")
    state = getattr(cell, "state", None) if state is None else state
    if state is None:
        raise UsageError(f"{name} needs the size of its state: state=16 for one array (B, 16), state=[16, 16] for two")
    if isinstance(state, list) and not state:
        raise UsageError(f"{name}: state=[] names no array; a recurrent layer has at least one")
    for entry in state if isinstance(state, list) else [state]:
        for size in entry if isinstance(entry, tuple) else (entry,):
            positive(size, f"{name}: state")
    return state


def _shapes(state: Any) -> tuple[list[tuple[int, ...]], trees.Structure]:
    """The shape of each array of a state, without the rows, and the nest that `step` takes."""
    shapes: list[tuple[int, ...]] = [
        tuple(s) if isinstance(s, tuple) else (int(s),) for s in (state if isinstance(state, list) else [state])
    ]
    nest: Any = tuple(range(len(shapes))) if isinstance(state, list) else 0
    return shapes, trees.flatten(nest)[1]


# ---- the cells that have names -----------------------------------------------------------------------------------------------


class _Gated(Recurrent):
    """What RNN, LSTM and GRU share: gates side by side in one matrix for the inputs and one for the state."""

    gates = 1

    def __init__(self, units: int, state: Any, init: Any, init_hidden: Any, options: Mapping[str, Any]) -> None:
        self.units = units
        self.init, self.init_hidden = initializers.resolve(init), initializers.resolve(init_hidden)
        super().__init__(state=state, **options)

    def of_input(self, x: Any) -> Any:
        """x Wx: (B, gates · units)."""
        if x.ndim != 2:
            raise ShapeError(located(
                f"{type(self).__name__} needs sequences of features, shape (B, T, I); one step of this has shape {x.shape}: "
                "give a series of numbers as x[..., None]"
            ))  # fmt: skip
        return x @ self.parameter(
            "weight_input", (x.shape[1], self.gates * self.units), initializers.PerPart(self.init, self.gates)
        )

    def of_hidden(self, h: Any) -> Any:
        """h Wh: (B, gates · units)."""
        return self.drop(h) @ self.hidden_weight()

    def hidden_weight(self) -> Any:
        return self.parameter(
            "weight_hidden", (self.units, self.gates * self.units), initializers.PerPart(self.init_hidden, self.gates)
        )

    def split(self, z: Any) -> Iterator[Any]:
        """The parts that belong to the gates."""
        return (z[..., k * self.units : (k + 1) * self.units] for k in range(self.gates))


@layers.declare("RNN")
class RNN(_Gated):
    """A simple recurrent layer.

    h_t = φ(x_t Wx + h_{t-1} Wh + b), y_t = h_t

    Args: units H; activation φ, by name or any function; init: of Wx; init_hidden: of Wh. "identity" there, with "relu", is the IRNN
    (Le et al. 2015), which keeps what it has seen; their inputs start from normal(0.001). Further options: see `Recurrent`.
    Shapes: x (B, T, I), weight_input (I, H), weight_hidden (H, H), bias (H,), y (B, H) or (B, T, H).
    Source: Elman, "Finding structure in time", Cognitive Science 14, 1990; Le, Jaitly, Hinton, "A simple way to initialize
    recurrent networks of rectified linear units", 2015. Differs: PyTorch has a second bias, added to the first.

    >>> RNN(64, "relu", init_hidden="identity")
    RNN(64, 'relu', init_hidden='identity')
    """

    examples = ({"args": (3,), "input": (4, 5, 2)}, {"args": (2, "softsign"), "input": (3, 2, 4)})

    def __init__(
        self, units: int, activation: Any = "tanh", init: Any = "glorot_uniform", init_hidden: Any = "orthogonal", **options: Any
    ) -> None:
        self.activation = activation_of(activation)
        super().__init__(positive(units, "RNN: units"), units, init, init_hidden, options)

    def step(self, state: Any, x: Any) -> tuple[Any, Any]:
        h = self.activation(self.of_input(x) + self.of_hidden(state) + self.parameter("bias", (self.units,), "zeros"))
        return h, h


Recurrent.examples = ({"args": (RNN(2),), "input": (3, 4, 2)},)


@layers.declare("LSTM")
class LSTM(_Gated):
    """Long short-term memory.

    [i f g o] = x_t Wx + h_{t-1} Wh + b
    c_t = σ(f) c_{t-1} + σ(i) tanh(g)
    h_t = σ(o) tanh(c_t), y_t = h_t

    Args:
        units H; return_sequences, and further options: see `Recurrent`. The state is (h, c).
        peephole: the gates see the cell: i + wᵢ c_{t-1}, f + w_f c_{t-1}, o + w_o c_t, elementwise.
        layer_norm: [i f g o] = LN(x_t Wx) + LN(h_{t-1} Wh) + b, and h_t = σ(o) tanh(LN(c_t)), with LN(z) = scale (z - μ) / √(σ² + 1e-5),
            over all four gates together, and a shift for the cell (b is that of the gates).
        forget_bias: what the bias of f starts with. init: of Wx; init_hidden: of Wh; both for each gate by itself.
    Shapes: x (B, T, I), weight_input (I, 4 H), weight_hidden (H, 4 H), bias (4 H,), weight_peephole (3 H,) for i, f, o;
    scale_input, scale_hidden (4 H,), scale_cell, shift_cell (H,). y (B, H) or (B, T, H).
    Source: Hochreiter & Schmidhuber, Neural Computation 9, 1997; forget gates: Gers et al., Neural Computation 12, 2000; their bias:
    Jozefowicz et al., ICML 2015; peepholes: Gers & Schmidhuber, IJCNN 2000; layer_norm: Ba et al. 2016, equations 20 to 22.
    Differs: PyTorch has a second bias, added to the first, and no forget_bias.

    >>> LSTM(32, True)
    LSTM(32, True)
    """

    examples = ({"args": (3,), "input": (4, 5, 2)}, {"args": (2, True), "input": (3, 4, 3)})
    gates = 4
    state_names = ("hidden", "cell")

    def __init__(
        self,
        units: int,
        return_sequences: bool = False,
        *,
        peephole: bool = False,
        layer_norm: bool = False,
        forget_bias: float = 1.0,
        init: Any = "glorot_uniform",
        init_hidden: Any = "orthogonal",
        **options: Any,
    ) -> None:
        self.peephole, self.layer_norm = bool(peephole), bool(layer_norm)
        self.forget_bias = initializers.constant(forget_bias)
        units = positive(units, "LSTM: units")
        super().__init__(units, [units, units], init, init_hidden, {"return_sequences": return_sequences, **options})

    def step(self, state: Any, x: Any) -> tuple[Any, Any]:
        h, c = state
        z = self._normalized("input", self.of_input(x)) + self._normalized("hidden", self.of_hidden(h))
        i, f, g, o = self.split(z + self.parameter("bias", (4 * self.units,), self._first_bias))
        c = sigmoid(self._seeing(1, f, c)) * c + sigmoid(self._seeing(0, i, c)) * np.tanh(g)
        shown = self._normalized("cell", c)
        if self.layer_norm:
            shown = shown + self.parameter("shift_cell", (self.units,), "zeros")
        h = sigmoid(self._seeing(2, o, c)) * np.tanh(shown)
        return (h, c), h

    def _seeing(self, number: int, gate: Any, c: Any) -> Any:
        """A gate with its peephole to the cell."""
        if not self.peephole:
            return gate
        weights = self.parameter("weight_peephole", (3 * self.units,), "zeros")
        return gate + weights[number * self.units : (number + 1) * self.units] * c

    def _first_bias(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        bias = np.zeros(shape)
        bias[self.units : 2 * self.units] = self.forget_bias(generator, (self.units,))
        return bias

    def _normalized(self, name: str, z: Any) -> Any:
        if not self.layer_norm:
            return z
        return standardize(z, axes=(1,), eps=1e-5) * self.parameter(f"scale_{name}", (z.shape[1],), "ones")


@layers.declare("GRU")
class GRU(_Gated):
    """A gated recurrent unit.

    r = σ(x_t Wxr + b_r + h_{t-1} Whr + d_r), z = σ(x_t Wxz + b_z + h_{t-1} Whz + d_z)
    n = tanh(x_t Wxn + b_n + r (h_{t-1} Whn + d_n))
    h_t = (1 - z) n + z h_{t-1}, y_t = h_t

    Args: units H; return_sequences, and further options: see `Recurrent`. reset_after=False is the original definition, in which the
    reset gate comes before the product, n = tanh(x_t Wxn + b_n + (r h_{t-1}) Whn), and there is no d. init: of Wx; init_hidden: of
    Wh; both for each gate by itself.
    Shapes: x (B, T, I), weight_input (I, 3 H), weight_hidden (H, 3 H), bias (3 H,), bias_hidden (3 H,) for d; gates r, z, n.
    y (B, H) or (B, T, H).
    Source: Cho et al., "Learning phrase representations using RNN encoder-decoder", EMNLP 2014, equations 5 to 8; the default is that
    of PyTorch and cuDNN.

    >>> GRU(32, reset_after=False)
    GRU(32, reset_after=False)
    """

    examples = ({"args": (3,), "input": (4, 5, 2)}, {"args": (2, True), "input": (3, 4, 3)})
    gates = 3

    def __init__(
        self,
        units: int,
        return_sequences: bool = False,
        *,
        reset_after: bool = True,
        init: Any = "glorot_uniform",
        init_hidden: Any = "orthogonal",
        **options: Any,
    ) -> None:
        self.reset_after = bool(reset_after)
        units = positive(units, "GRU: units")
        super().__init__(units, units, init, init_hidden, {"return_sequences": return_sequences, **options})

    def step(self, state: Any, x: Any) -> tuple[Any, Any]:
        of_x = self.split(self.of_input(x) + self.parameter("bias", (3 * self.units,), "zeros"))
        z, n = self._reset_after(state, *of_x) if self.reset_after else self._reset_before(state, *of_x)
        h = (1 - z) * n + z * state
        return h, h

    def _reset_after(self, h: Any, r: Any, z: Any, n: Any) -> tuple[Any, Any]:
        of_r, of_z, of_n = self.split(self.of_hidden(h) + self.parameter("bias_hidden", (3 * self.units,), "zeros"))
        return sigmoid(z + of_z), np.tanh(n + sigmoid(r + of_r) * of_n)

    def _reset_before(self, h: Any, r: Any, z: Any, n: Any) -> tuple[Any, Any]:
        h, w, both = self.drop(h), self.hidden_weight(), 2 * self.units
        gates = h @ w[:, :both]
        r = sigmoid(r + gates[:, : self.units])
        return sigmoid(z + gates[:, self.units :]), np.tanh(n + (r * h) @ w[:, both:])


# ---- layers around layers ----------------------------------------------------------------------------------------------------


@layers.declare("Bidirectional")
class Bidirectional(Module):
    """A recurrent layer in both directions of time, each with weights of its own.

    y = [layer(x), layer from the last step to the first (x)], side by side on the last axis

    Args: layer: a recurrent one; its copy that runs backwards has the same options and first values of its own.
    Shapes: x (B, T, I), y (B, 2 H) or, if the layer returns sequences, (B, T, 2 H). A second argument of the call is the pair of first
    states. Parameters: "forward.weight_input", "backward.weight_input", and so on.
    Without sequences the backward half is its output after the first step, the last that it takes. Where lengths are given, it begins
    at each sequence's own end.
    Source: Schuster & Paliwal, "Bidirectional recurrent neural networks", IEEE Transactions on Signal Processing 45, 1997.

    >>> Bidirectional(GRU(6, True))
    Bidirectional(GRU(6, True))
    """

    examples = ({"args": (LSTM(2, True),), "input": (3, 4, 2)}, {"args": (GRU(2),), "input": (4, 3, 2)})

    def __init__(self, layer: Recurrent) -> None:
        if not isinstance(layer_of(layer, "Bidirectional"), Recurrent):
            raise UsageError(f"Bidirectional takes a recurrent layer such as LSTM(32), not {layer!r}")
        if layer.reverse or layer.stateful:
            option = "reverse" if layer.reverse else "stateful"
            raise UsageError(f"Bidirectional runs its layer in both directions, so it takes none that has {option}: {layer!r}")
        self.forward, self.backward = layer, copy.deepcopy(layer)
        for part in self.backward._layers().values():
            part._init_state()
        self.backward.reverse = True

    def __call__(self, x: Any, initial: Any = (None, None)) -> Any:
        pair = [layer(x, first) for layer, first in zip((self.forward, self.backward), initial, strict=True)]
        if not self.forward.return_state:
            return np.concatenate(pair, axis=-1)
        return np.concatenate([y for y, _ in pair], axis=-1), tuple(state for _, state in pair)


@layers.declare("TimeDistributed")
class TimeDistributed(Module):
    """The same layer for each step of a sequence: y[b, t] = layer(x[b, t]).

    Dense, Activation, LayerNorm, Embedding and Dropout do so by themselves; this is for layers that look at all axes of a row.

    Args: layer: any. Shapes: x (B, T, ...), y (B, T, ...).

    >>> TimeDistributed(LSTM(4))
    TimeDistributed(LSTM(4))
    """

    examples = ({"args": (LSTM(2),), "input": (3, 2, 4, 2)},)

    def __init__(self, layer: Module) -> None:
        self.layer = layer_of(layer, "TimeDistributed")

    def __call__(self, x: Any) -> Any:
        if x.ndim < 3:
            raise ShapeError(
                located(f"TimeDistributed needs steps that are rows of something, shape (B, T, ...); it got {x.shape}")
            )
        times = _scope().times
        rows, steps = x.shape[:2]
        flat = np.reshape(x, (rows * steps, *x.shape[2:]))
        if times is not None:
            times.lengths_of(x)  # refuses steps that were mixed before
            times.follows(flat, x, axis=0)
        y = self.layer(flat)
        if y.shape[:1] != (rows * steps,):
            raise ShapeError(located(f"TimeDistributed: its layer turned {rows * steps} rows into shape {y.shape}"))
        out = np.reshape(y, (rows, steps, *y.shape[1:]))
        if times is not None:
            times.follows(out, y, at=0)
        return out
