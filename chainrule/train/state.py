"""The state of a network: its arrays, its shapes, and how it is built from the first data it sees.

In: a subclass that says how scores come from inputs, and what layers it holds. Out: parameters and statistics by name, building,
and the `Task` and `Program`s that training runs. Arrays live on the layers they belong to, in logical layout, so backend and
threads may change between calls.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from ..errors import BusyError, DataError, NotBuiltError, ShapeError, UnknownNameError, UsageError
from ..graph.node import Array, Graph, Node, Type
from ..graph.trace import Tracer, build
from ..losses import Loss
from ..metrics import Metric
from ..optim import Optimizer
from ..program import Kind, Program
from ..recent import keep, recall
from ..records import record
from ..registry import nearest
from ..run.backend import Kept
from .data import NOTHING, Inputs, check_index, fits_into, inputs_of, numeric
from .objective import Task, make_program
from .scope import Scope, Window, initial
from .sequences import Times, measured_by
from .windows import BEGIN, Windows

_STATE = threading.RLock()  # held for moments only: while state is read as a whole, or replaced
OWN = {  # attributes of a layer that are not its own affair
    *("_now", "_later", "_kinds", "_built", "_slots_now", "_optimizer", "_loss", "_counters", "_schedule_state"),
    *("_lock", "_owner", "_programs", "_config", "_fresh", "_fitted"),
}
_KEPT_PROGRAMS = 32
_Places = Sequence[tuple[Any, Mapping[str, str]]]

LENGTHS = np.dtype(np.int32)  # what programs read lengths as

DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("f4"), "float64": np.dtype("f8")}


class Stateful(ABC):
    """What a network keeps, and how it comes to be."""

    trainable: bool
    _config: tuple[tuple[Any, ...], dict[str, Any]]  # the arguments it was made with

    # ---- what a subclass says ------------------------------------------------------------------------------------------------

    @abstractmethod
    def _scores(self, *inputs: Any, **named: Any) -> Any:
        """The forward pass, inside an active `Scope`."""

    @abstractmethod
    def _layers(self) -> dict[str, Any]:
        """Dotted name -> layer for this network ("") and all layers in it, each once, in order."""

    # ---- state ---------------------------------------------------------------------------------------------------------------
    # Each layer keeps its arrays in `_values` (name -> array) and what they are in `_kinds` (name -> Kind). The network that is
    # trained keeps the rest: dtype, input types, optimizer slots, counters. What a training has learnt is fetched from it when
    # somebody looks: see `_Later`.

    def _init_state(self) -> None:
        self._now: dict[str, Array] = {}
        self._later: _Later | None = None
        self._kinds: dict[str, Kind] = {}
        self._lock = threading.Lock()
        self._owner = 0  # the thread that holds the lock
        self._forget()

    def _forget(self) -> None:
        """What a network knows beside its arrays, as at first."""
        self._built: dict[str, Any] = {}  # dtype, inputs (name -> Type of one row), keys, seed, and what `_Seen` says
        self._slots_now: dict[str, Array] = {}
        self._optimizer: Optimizer | None = None
        self._loss: Loss | None = None
        self._counters = {"steps": 0, "updates": 0, "epochs": 0}
        self._schedule_state: dict[str, float] = {}
        self._fresh: list[tuple[Any, str]] = []
        self._programs: dict[Any, Program] = {}  # by all that they depend on
        self._fitted: Any = None  # what the last fit ran, for `compiled`

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        state = dict(vars(self))
        state.pop("_lock", None)
        state["_programs"], state["_owner"], state["_fitted"] = {}, 0, None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    @property
    def _values(self) -> dict[str, Array]:
        self._settle()
        return self._now

    @_values.setter
    def _values(self, values: dict[str, Array]) -> None:
        self._settle()
        self._now = values

    @property
    def _slots(self) -> dict[str, Array]:
        self._settle()
        return self._slots_now

    @_slots.setter
    def _slots(self, slots: dict[str, Array]) -> None:
        self._settle()
        self._slots_now = slots

    def _settle(self) -> None:
        """Fetch what has been learnt and not been looked at."""
        later = self._later
        if later is not None:
            later.settle()

    @property
    def built(self) -> bool:
        """Whether the network has seen data, and so has shapes and parameters."""
        return bool(self._built)

    def _require_built(self, what: str) -> None:
        if not self.built:
            raise NotBuiltError(
                f"{what}: this network has not seen data yet, so it has no shapes; call fit first (fit(x, y, epochs=0) only builds it)"
            )

    @contextmanager
    def _busy(self, what: str) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            if self._owner == threading.get_ident():
                raise BusyError(
                    f"{what}: this network is being trained; a callback may look at it, and change it when fit has returned"
                )
            raise BusyError(
                f"{what}: another thread is training this network at this moment; wait for it, or train a copy (copy.deepcopy)"
            )
        self._owner = threading.get_ident()
        try:
            yield
        finally:
            self._owner = 0
            self._lock.release()

    def _state(self) -> dict[str, Array]:
        """Parameters and statistics, all from one moment."""
        with _STATE:
            return {**self._arrays("parameter"), **self._arrays("statistic")}

    def _arrays(self, kind: Kind) -> dict[str, Array]:
        """Full name -> array of this kind."""
        with _STATE:
            return {
                f"{path}.{name}" if path else name: value
                for path, layer in self._layers().items()
                for name, value in layer._values.items()
                if layer._kinds[name] == kind
            }

    def _places(self) -> _Places:
        """Each layer, and the full name of each of its arrays."""
        layers = self._layers().items()
        return [(layer, {name: f"{path}.{name}" if path else name for name in layer._values}) for path, layer in layers]

    def _store(self, state: Mapping[str, Array]) -> None:
        """Put new values of parameters, statistics and slots in place, all at once for those who look."""
        self._store_later(Kept(state), self._places())
        self._settle()

    def _store_later(self, state: Kept, places: _Places) -> None:
        """As `_store`, when somebody looks. places: what `_places` said."""
        later = _Later(state, self, places)
        with _STATE:
            for layer, _ in places:
                layer._later = later

    def _frozen_paths(self) -> Callable[[str], bool]:
        frozen = [path for path, layer in self._layers().items() if not layer.trainable]
        return lambda path: any(path == f or f == "" or path.startswith(f + ".") for f in frozen)

    def _trainable(self) -> list[str]:
        frozen = self._frozen_paths()
        return [n for n in self._arrays("parameter") if not frozen(n.rpartition(".")[0])]

    @property
    def parameters(self) -> dict[str, Array]:
        """Full name -> read-only copy of each parameter; empty before the network is built.

        Weights of dense layers are (in, out), so that y = x @ weight + bias.
        """
        copies = {n: np.array(v) for n, v in self._arrays("parameter").items()}
        for copy in copies.values():
            copy.flags.writeable = False
        return copies

    @property
    def statistics(self) -> dict[str, Array]:
        """Full name -> copy of each running statistic (batch norm)."""
        return {n: np.array(v) for n, v in self._arrays("statistic").items()}

    def load_parameters(self, values: Mapping[str, Any], *, strict: bool = True) -> None:
        """Set parameters and statistics by full name.

        Args: values: name -> array of the same shape; strict: all parameters must be there (False sets those that are).
        Raises: `UnknownNameError` for a name that the network lacks, `ShapeError` for another shape, `DataError` for missing
        names or values that are not finite.
        """
        self._require_built("load_parameters")
        known = {**self._arrays("parameter"), **self._arrays("statistic")}
        new = {}
        for name, value in values.items():
            if name not in known:
                raise UnknownNameError(f'this network has no parameter "{name}".{nearest(name, known)} It has {", ".join(known)}')
            one = isinstance(value, (int, float, np.generic)) or np.shape(value if hasattr(value, "shape") else [0]) == ()
            given = numeric([value], name)[0] if one else numeric(value, name)
            fits_into(np.asarray(given), self._built["dtype"], name)
            array = np.array(given, self._built["dtype"])
            if array.shape != known[name].shape:
                raise ShapeError(f'"{name}" has shape {known[name].shape}; the given array has {array.shape}')
            new[name] = array
        missing = [n for n in self._arrays("parameter") if n not in values]
        if strict and missing:
            raise DataError(
                f"load_parameters: no value for {', '.join(missing)}; pass strict=False to set only those that are given"
            )
        with self._busy("load_parameters"):
            self._store({**self._slots, **new})

    def reset(self) -> None:
        """Forget everything learnt: parameters, statistics, optimizer state, shapes. The next use builds the network anew. Layers that
        another network shares are reset for both."""
        with self._busy("reset"), _STATE:
            for layer in self._layers().values():
                layer._values, layer._kinds = {}, {}
            self._forget()

    # ---- building ------------------------------------------------------------------------------------------------------------

    def _forward(
        self,
        state: Mapping[str, Any],
        given: Mapping[str, Any],
        training: bool,
        watched: dict[str, tuple[int, ...]] | None = None,
        windows: Windows | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Scores and new statistics, while tracing. watched, outputs: see `Scope`. windows: of which these inputs are some; the
        scores are then those of the steps that have a loss. Only where `BEGIN` is given do states go on from window to window."""
        names = {id(layer): path for path, layer in reversed(list(self._layers().items()))}
        inputs = Inputs({}, self._built["keys"])
        args, named = inputs.arguments(given)
        times = Times(given, list(self._built["inputs"]), list(state.values()), windows.inputs if windows is not None else ())
        dtype = next((v.dtype for v in state.values()), self._built["dtype"])
        window = Window(windows.every, windows.back, given[BEGIN]) if windows is not None and BEGIN in given else None
        scope = Scope(
            names,
            state,
            training=training,
            frozen=self._frozen_paths(),
            dtype=dtype,
            times=times,
            watched=watched,
            window=window,
            outputs=outputs,
        )
        with scope.active():
            scores = self._scores(*args, **named)
        self._check_scores(scores)
        if times.limited:
            times.of_scores(scores)
            times.check(scope.updates)
        if windows is not None and windows.before:
            scores = scores[:, windows.before :]
        return scores, scope.updates

    def _check_scores(self, scores: Any) -> None:
        if not isinstance(scores, Tracer) or scores.ndim == 0 or scores.dtype.kind != "f":
            raise ShapeError(f"the network must return one array of numbers with the rows first, not {scores!r}")

    def _build(self, x: Inputs, seed: int, dtype: Any, *, create: bool = True) -> None:
        """Create parameters by tracing the forward pass once on the data's shapes. Layers that have theirs from another network keep
        them; without `create` all of them must."""
        known: dict[str, Any] = self._state()
        kind = self._common_dtype(known, dtype)

        def make(layer: Any, path: str, name: str, sort: Kind, shape: tuple[int, ...], init: Any) -> Array:
            value = initial(init, f"{path}.{name}", shape, seed, kind)
            layer._values[name], layer._kinds[name] = value, sort
            known[f"{path}.{name}" if path else name] = value
            self._fresh.append((layer, name))
            return value

        def types(index: Sequence[str]) -> dict[str, Type]:
            return {n: Type((2, *a.shape[1:]), np.dtype(np.int64) if n in index else kind) for n, a in x.arrays.items()}

        def look(index: Sequence[str]) -> _Seen:
            return self._look(types(index), x.keys, known, kind, make if create else None)

        self._fresh = []
        with self._undone_if_it_fails():
            whole = [n for n, a in x.arrays.items() if a.dtype.kind in "iu"]
            seen = look(whole)
            index = [n for n in whole if seen.index[n]]
            seen = seen if index == whole else look(index)
        self._built = {
            "dtype": kind,
            "inputs": {n: Type(t.shape[1:], t.dtype) for n, t in types(index).items()},
            "keys": x.keys,
            "names": list(self._state()),
            "seed": seed,
            **seen.kept(),
        }

    def _look(self, types: Mapping[str, Type], keys: tuple[Any, ...], state: Mapping[str, Any], dtype: Any,
              create: Callable[..., Array] | None = None) -> _Seen:  # fmt: skip
        """Trace the forward pass once, in evaluation mode, on two rows of these types, and look at what it does."""
        names = {id(layer): path for path, layer in reversed(list(self._layers().items()))}
        clock: list[tuple[Times, tuple[str, ...], tuple[str, ...]]] = []

        def run(*values: Any) -> list[Any]:
            given = dict(zip(types, values, strict=True))
            times = Times(given, list(types), ())
            args, named = Inputs({}, keys).arguments(given)
            with Scope(names, state, training=False, create=create, dtype=dtype, times=times).active():
                scores = self._scores(*args, **named)
            self._check_scores(scores)
            clock.append((times, times.of_scores(scores), times.along(scores)))
            return [scores]

        graph = build(run, list(types.values()))
        shape = graph.outputs[0].shape
        if shape[:1] != (2,):
            raise ShapeError(f"the network must keep the rows of a batch on the first axis; it turned 2 rows into shape {shape}")
        nodes = zip(types.items(), graph.inputs, strict=False)
        index = {n: index_uses(graph, node) for (n, t), node in nodes if t.dtype.kind == "i"}
        ((times, stepwise, timed),) = clock
        return _Seen(shape[1:], index, tuple(sorted(times.reached)), stepwise, timed)

    def _common_dtype(self, known: Mapping[str, Array], wanted: Any) -> np.dtype[Any]:
        """The type to build in: the one asked for, else that of layers which have parameters already, else float32."""
        found = {str(v.dtype) for v in known.values()}
        kind = dtype_of(wanted if wanted is not None else min(found, default="float32"))
        if found - {str(kind)}:
            other = next(n for n, v in known.items() if v.dtype != kind)
            raise UsageError(
                f'"{other}" was built as {known[other].dtype} in another network; build this one with the same dtype'
            )
        return kind

    @contextmanager
    def _undone_if_it_fails(self) -> Iterator[None]:
        """Take back what was built inside if an error follows; layers that had their arrays before keep them."""
        built_before = self.built
        try:
            yield
        except BaseException:
            if not built_before:
                for layer, name in self._fresh:
                    layer._values.pop(name, None)
                    layer._kinds.pop(name, None)
                self._fresh, self._built = [], {}
            raise

    def _takes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether an input may have rows of this shape: that which the network was built for, or, for sequences that recurrent layers
        read, another number of steps."""
        built = self._built["inputs"][name].shape
        return shape == built or (name in self._built["sequences"] and len(shape) == len(built) and shape[1:] == built[1:])

    def _seen(self, inputs: Inputs) -> _Seen:
        """What the network does with rows of these shapes."""
        built: dict[str, Type] = self._built["inputs"]
        shapes = {n: a.shape[1:] for n, a in inputs.arrays.items()}
        if all(shapes[n] == t.shape for n, t in built.items()):
            return _Seen.of(self._built)
        known: dict[Any, _Seen] = self._built["others"]
        key = tuple(shapes.items())
        if key not in known:
            types = {n: Type((2, *shapes[n]), t.dtype) for n, t in built.items()}
            known[key] = self._look(types, inputs.keys, self._state(), self._built["dtype"])
        return known[key]

    def _inputs(self, x: Any, lengths: Any = None, mask: Any = None, *, empty: str | None = NOTHING) -> Inputs:
        """Data checked against what the network was built for. empty: why data without a number are refused; None: they are not."""
        inputs = inputs_of(x, lengths, mask, empty=empty)
        expected: dict[str, Type] = self._built["inputs"]
        missing = sorted(set(self._built["names"]) - set(self._state()))
        if missing:
            raise NotBuiltError(
                f'"{missing[0]}" is gone: a layer that this network shares was reset elsewhere; call reset() and fit again'
            )
        if set(inputs.arrays) != set(expected):
            raise ShapeError(f"this network takes the inputs {', '.join(expected)}; got {', '.join(inputs.arrays)}")
        known = {*self._built["sequences"], *self._built["stepwise"]}
        for name in {n for lengths in inputs.lengths for n in measured_by(lengths)} - known:
            raise DataError(
                f"{name}: its rows differ in length, and no layer of this network knows where a sequence ends (RNN, LSTM, GRU do, unless "
                "a layer before them mixes steps, as a convolution does): "
                "pad them or pass arrays of one shape"
            )
        for name, array in inputs.arrays.items():
            if not self._takes(name, array.shape[1:]):
                raise ShapeError(
                    f"{name} has rows of shape {array.shape[1:]}, but this network was built for rows of shape {expected[name].shape}; "
                    f"{_remedy(array.shape[1:], expected[name].shape)}net.reset() lets it be built anew"
                )
            if expected[name].dtype.kind == "i":
                check_index(array, name, [(u.layer, u.low, u.high) for u in self._built["index"][name]])
            fits_into(array, expected[name].dtype, name)
        return inputs

    def _ready(self, x: Any, seed: int, dtype: Any, lengths: Any = None, mask: Any = None, *, empty: str = NOTHING) -> Inputs:
        """Build if needed; the inputs, checked. dtype None: what the network has."""
        x = inputs_of(x, lengths, mask, empty=empty)
        if not self.built:
            self._build(x, seed, dtype)
        elif dtype is not None and dtype_of(dtype) != self._built["dtype"]:
            raise UsageError(f"this network was built as {self._built['dtype']}; net.reset() lets it be built as {dtype}")
        return self._inputs(x)

    def _task(self, loss: Loss | None = None, target: Array | None = None, weighted: bool = False, optimizer: Optimizer | None = None,
              dtype: Any = None, inputs: Inputs | None = None, metrics: Sequence[Metric] = ()) -> Task:  # fmt: skip
        """inputs: those of which the shapes are to be taken; None: shapes that the network was built for."""
        kind = np.dtype(dtype) if dtype is not None else self._built["dtype"]

        def typed(types: Mapping[str, Any]) -> dict[str, Type]:
            return {n: Type(tuple(t.shape), kind if t.dtype.kind == "f" else t.dtype) for n, t in types.items()}

        target_type = None
        if target is not None:
            target_type = Type(target.shape[1:], kind if target.dtype.kind == "f" else np.dtype(np.int64))
        given, steps = typed(self._built["inputs"]), None
        if inputs is not None:
            given = {n: Type(inputs.arrays[n].shape[1:], t.dtype) for n, t in given.items()}
            given |= {n: Type((), LENGTHS) for n in inputs.lengths}
            steps = self._steps(inputs) if target is not None else None
        return Task(
            self._forward, typed(self._arrays("parameter")), tuple(self._trainable()), typed(self._arrays("statistic")),
            given, kind, loss, target_type, weighted, optimizer, steps,
            tuple(dict.fromkeys(m for m in metrics if loss is not None and m.is_summed(loss))),
        )  # fmt: skip

    def _steps(self, inputs: Inputs) -> str | None:
        """The name of the lengths by which a loss counts the steps of scores; None where scores are no sequences, or all count."""
        wanted = self._seen(inputs).stepwise
        return next((n for n in inputs.lengths if set(wanted) & set(measured_by(n))), None)

    def _forward_program(self, rows: int, inputs: Inputs) -> Program:
        """The program of `predict`, kept for the next call. It is recorded anew when an attribute of a layer changes."""
        task = self._task(inputs=inputs)
        key = (rows, str(self._built["dtype"]), tuple(task.inputs.items()), self.fingerprint(identity=True))
        return self._kept_program(key, lambda: make_program(task, rows, ("forward",)))

    def _kept_program(self, key: Any, record: Callable[[], Program]) -> Program:
        """The program that is kept under this key, recorded if there is none."""
        return recall(self._programs, key) or keep(self._programs, key, record(), _KEPT_PROGRAMS)

    def fingerprint(self, *, identity: bool = False) -> tuple[Any, ...]:
        """What the layers say of themselves, as a hashable value: class and attributes of each. Objects that have no value of their
        own, functions for instance, count by identity, or only by their class."""
        layers = self._layers()
        paths = {id(layer): path for path, layer in reversed(list(layers.items()))}
        return tuple(
            (path, type(layer), tuple((k, _mark(v, paths, identity)) for k, v in sorted(vars(layer).items()) if k not in OWN))
            for path, layer in layers.items()
        )


class _Later:
    """A state that a network has and nobody has looked at yet. To fetch it takes longer than a step of a large network, and mostly
    the next epoch has another one."""

    def __init__(self, state: Kept, network: Stateful, places: _Places) -> None:
        self._state, self._network, self._places = state, network, places

    def settle(self) -> None:
        """Put it into all layers that have not got a newer one since."""
        with _STATE:
            waiting = [(layer, names) for layer, names in self._places if layer._later is self]
            state = self._state.arrays() if waiting else {}
            for layer, names in waiting:
                layer._now = {n: state.get(names.get(n, ""), v) for n, v in layer._now.items()}
                if layer is self._network:
                    layer._slots_now = {n: v for n, v in state.items() if n.startswith("slot/")}
                layer._later = None  # last, so that an interrupt leaves what can be done again


def _mark(value: Any, paths: Mapping[int, str], identity: bool) -> Any:
    """An attribute as a hashable value."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return (type(value), repr(value))
    if isinstance(value, (np.ndarray, np.generic)):
        return (value.shape, value.dtype.str, value.tobytes())
    if isinstance(value, (list, tuple, set, frozenset)):
        return (type(value), tuple(_mark(v, paths, identity) for v in value))
    if isinstance(value, dict):
        return (dict, tuple((_mark(k, paths, identity), _mark(v, paths, identity)) for k, v in value.items()))
    if isinstance(value, Stateful):
        return ("layer", paths.get(id(value), ""), type(value))
    if is_dataclass(value) and not isinstance(value, type):
        return (type(value), tuple(_mark(getattr(value, f.name), paths, identity) for f in fields(value)))
    return (type(value), _Same(value) if identity else 0)


class _Same:
    """An object that equals none but itself. It is held, lest another one take its place in memory and be taken for it."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._thing is other._thing

    def __hash__(self) -> int:
        return id(self._thing)


def dtype_of(dtype: Any) -> np.dtype[Any]:
    """A floating-point type that networks know.

    Raises: `UsageError` for any other.
    """
    name = dtype if isinstance(dtype, str) else str(np.dtype(dtype))
    found = DTYPES.get(name)
    if found is None:
        raise UsageError(f'dtype is "float32" or "float64", not {dtype!r}')
    return found


@record(frozen=True)
class _Seen:
    """What a network does with rows of certain shapes.

    outputs: the shape of a row of scores. index: for each integer input, what its values may be. sequences: inputs whose second axis
    is the time of layers that read lengths. timed: inputs whose time the scores have as their second axis; stepwise: those of them
    whose lengths a loss goes by.
    """

    outputs: tuple[int, ...]
    index: Mapping[str, Sequence[IndexUse]]
    sequences: tuple[str, ...]
    stepwise: tuple[str, ...]
    timed: tuple[str, ...]

    def kept(self) -> dict[str, Any]:
        """As part of what a network knows of itself; `others` is for rows of other shapes."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "others": {}}

    @classmethod
    def of(cls, built: Mapping[str, Any]) -> _Seen:
        return cls(**{f.name: built[f.name] for f in fields(cls)})


@record(frozen=True)
class IndexUse:
    """How an integer input is used as an index: `layer` reads places `low` to `high` with it (None: the values are changed before, so
    nobody can say yet which are allowed)."""

    layer: str
    low: int | None = None
    high: int | None = None


_KEEPS_VALUES = ("reshape", "transpose", "slice", "flip", "broadcast", "cast", "concatenate")


def index_uses(graph: Graph, node: Node) -> list[IndexUse]:
    """Where an integer input reaches a `take`, a `scatter_add` or a comparison as integers, in bodies of loops too."""
    same: dict[Node, bool] = {node: True}  # what holds whole numbers made of the input, and whether they are the input's own
    uses = []
    for n in graph.nodes():
        reached = [i for i, a in enumerate(n.args) if a in same]
        if not reached:
            continue
        own = all(same[n.args[i]] for i in reached)
        if n.op in ("take", "scatter_add") and 1 in reached:
            size = n.args[0].shape[n.attrs["axis"]]
            low = -size if n.attrs.get("negative", True) else 0
            uses.append(IndexUse(n.scope, low, size - 1) if own else IndexUse(n.scope))
        elif n.op == "equal":
            uses.append(IndexUse(n.scope))
        body = n.attrs.get("body")
        if isinstance(body, Graph):
            for i in reached:
                uses += [
                    u if own and u.layer else IndexUse(u.layer or n.scope, u.low, u.high)
                    for u in index_uses(body, body.inputs[i])
                ]
        if any(t.dtype.kind in "iu" for t in n.types):
            same[n] = own and n.op in _KEEPS_VALUES
    return uses


def _remedy(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What brings rows of one shape into the other, if it is a common slip: an axis of channels that is missing, grey for colour."""
    if (*shape, 1) == wanted:
        return "x[..., None] gives it the last axis; "
    if len(shape) == 3 and shape[:-1] == wanted[:-1] and {shape[-1], wanted[-1]} == {1, 3}:
        return (
            "np.repeat(x, 3, axis=-1) makes grey images of three channels; "
            if wanted[-1] == 3
            else "np.mean(x, axis=-1, keepdims=True) makes colour images grey; "
        )
    return ""
