"""Running the user's Python on symbols.

In: a Python function written with NumPy, and the types of its arguments. Out: a closed `Graph`. A `Tracer` stands for an array
and answers NumPy's own protocols; what a NumPy function means for it is declared beside the operators by `answers`. Values that a
function takes from outside become captured inputs, so a graph never depends on another.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, TypeVar

import numpy as np

from ..errors import ChainruleError, DataError, DtypeError, ShapeError, TraceError
from ..registry import nearest
from .node import DTYPES, OPS, Array, Graph, Node, Type, constant_node, input_node, make, output_node

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_NUMPY = os.path.dirname(os.path.abspath(np.__file__)) + os.sep
_COMMAND_LINE = os.path.join("click", "core.py")
_BETWEEN = (os.sep + "operator.py", os.sep + "contextlib.py", os.sep + "functools.py")  # of Python itself, between user and us

FUNCTIONS: dict[Any, Callable[..., Any]] = {}  # NumPy's function -> what it means for traced arrays
METHODS: dict[str, Callable[..., Any]] = {}  # an array's method -> the same


def answers(*numpy_functions: Any, method: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare that the decorated function is what `numpy_functions` (and the array method) mean for traced arrays."""

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        for f in numpy_functions:
            FUNCTIONS[f] = function
        if method:
            METHODS[method] = function
        return function

    return declare


# ---- where in the user's code ------------------------------------------------------------------------------------------------


def user_line() -> str:
    """ "file:line" of the nearest caller outside chainrule and NumPy; "" below the command line, where nobody wrote one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if _is_users(name):
            return "" if name.endswith(_COMMAND_LINE) else f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@functools.cache
def _is_users(file: str) -> bool:
    return not file.startswith((_PACKAGE, _NUMPY, "<frozen")) and not file.endswith(_BETWEEN)


def located(message: str) -> str:
    """`message` with the layer and the user's line at which tracing stands."""
    current = Trace.current()
    layer = f'layer "{current.scope}"' if current is not None and current.scope else ""
    line = user_line()
    places = ", ".join(p for p in (layer, line) if p)
    return f"{message} [{places}]" if places else message


# ---- traces ------------------------------------------------------------------------------------------------------------------

T = TypeVar("T")
_stack: ContextVar[tuple[Trace, ...]] = ContextVar("chainrule_traces", default=())


class Trace:
    """The recording of one function. Traces nest: a loop body or an inner `grad` is recorded while its surroundings are.

    `key` gives the random key of the surroundings (see `ops/random.py`); without one, the enclosing trace is asked.
    """

    def __init__(self, key: Callable[[], Any] | None = None, name: str = "") -> None:
        self.captures: dict[int, tuple[Node, Any]] = {}
        self._arrays: dict[int, list[tuple[Node, Array, Any]]] = {}
        self.parent: Trace | None = Trace.current()
        self.scope: str = self.parent.scope if self.parent and not name else ""
        self.name = name
        self._key = key
        self._counts_streams = key is not None
        self._streams = 0

    @staticmethod
    def current() -> Trace | None:
        stack = _stack.get()
        return stack[-1] if stack else None

    @contextmanager
    def active(self) -> Iterator[Trace]:
        token = _stack.set((*_stack.get(), self))
        try:
            yield self
        finally:
            _stack.reset(token)

    @contextmanager
    def within(self, scope: str) -> Iterator[None]:
        """Nodes recorded inside carry this layer name."""
        before, self.scope = self.scope, scope
        try:
            yield
        finally:
            self.scope = before

    def random_key(self) -> Any:
        """The key that random numbers at this place start from, or None where none was given."""
        if self._key is not None:
            return self._key()
        return self.parent.random_key() if self.parent else None

    def derive_key(self, key: Callable[[], Any]) -> None:
        """Use a key that is made from that of the surroundings, as a loop does for each time."""
        self._key = key

    def next_stream(self) -> int:
        """A number for each use of random numbers, in the order of the program text."""
        self.streams += 1
        return self.streams

    @property
    def streams(self) -> int:
        """How many uses there were. Set back, the same code draws the same numbers again."""
        return self._counter()._streams

    @streams.setter
    def streams(self, count: int) -> None:
        self._counter()._streams = count

    def _counter(self) -> Trace:
        root = self
        while root.parent is not None and not root._counts_streams:
            root = root.parent
        return root

    def lift(self, value: Any) -> Node:
        """The node that stands for `value` here: itself, a constant, or a captured input."""
        if isinstance(value, Tracer):
            if value.home is self:
                return value.node
            if value.home not in _stack.get():
                raise TraceError(located(
                    f"a traced array ({value.node.type}, recorded at {value.node.source or 'an unknown line'}) is used after the "
                    "function that made it has ended; return it from that function instead of storing it"
                ))  # fmt: skip
            return self._capture(id(value.node), value, value.node.type, value.node.source)
        if type(value) in (bool, int, float):
            return constant_node(value, np.asarray(value).dtype, self._line(), weak=True)
        array = array_of(value)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if array.dtype not in DTYPES:
            raise DtypeError(located(
                f"arrays of {array.dtype} cannot be traced; known are bool, integers, float32 and float64: convert with .astype"
            ))  # fmt: skip
        if array.ndim == 0 and not isinstance(value, np.generic):  # how this package writes constants
            return constant_node(array, array.dtype, self._line())
        return self._capture_array(value, array)

    def _capture_array(self, value: Any, array: Array) -> Node:
        """An array from outside is taken as it is now: the function may go on writing to it. One that is met again unchanged is one
        input."""
        for node, snapshot, met in self._arrays.get(id(value), ()):
            if (
                met is value
                and snapshot.dtype == array.dtype
                and np.array_equal(snapshot, array, equal_nan=array.dtype.kind == "f")
            ):
                return node
        snapshot = np.array(array)
        node = input_node(Type(array.shape, array.dtype), "captured", self._line())
        self._arrays.setdefault(id(value), []).append((node, snapshot, value))
        self.captures[id(node)] = (node, snapshot)
        return node

    def _capture(self, key: int, value: Tracer, type: Type, source: str) -> Node:
        if key not in self.captures:
            self.captures[key] = (input_node(type, "captured", source), value)
        return self.captures[key][0]

    def _line(self) -> str:
        return "" if self.name else user_line()

    def record(self, op: str, nodes: Sequence[Node], attrs: dict[str, Any]) -> tuple[Tracer, ...]:
        """Apply an operator; one tracer for each of its results."""
        try:
            node = make(op, tuple(nodes), attrs, self._line(), self.scope)
        except (ShapeError, DtypeError) as error:
            raise type(error)(located(str(error))) from None
        if len(node.types) == 1:
            return (Tracer(node, self),)
        return tuple(Tracer(output_node(node, i), self) for i in range(len(node.types)))

    def close(self, inputs: Sequence[Node], outputs: Sequence[Any]) -> Graph:
        """The graph recorded so far, closed: what was taken from outside becomes further inputs."""
        nodes = tuple(self.lift(o) for o in outputs)
        captured = list(self.captures.values())
        values = tuple(v if isinstance(v, Tracer) else np.asarray(v) for _, v in captured)
        return Graph((*inputs, *(n for n, _ in captured)), nodes, values, self.name)


def is_traced(*values: Any) -> bool:
    """Whether any of the values is a traced array."""
    for v in values:  # noqa: SIM110  # a generator would take twice as long, several times for each operator
        if isinstance(v, Tracer):
            return True
    return False


def apply(op: str, *args: Any, **attrs: Any) -> Any:
    """One operator on traced or plain arrays. Plain arrays alone are computed at once, by the operator's NumPy definition."""
    if not is_traced(*args):
        with np.errstate(all="ignore"):  # as in a graph: NaN and infinity are values, not warnings
            return OPS[op].value(*(np.asarray(a) for a in args), **attrs)
    trace = here(op)
    results = trace.record(op, [trace.lift(a) for a in args], attrs)
    return results[0] if len(results) == 1 else results


def apply_many(op: str, args: Sequence[Any], **attrs: Any) -> list[Any]:
    """`apply` that always returns a list."""
    trace = here(op)
    return list(trace.record(op, [trace.lift(a) for a in args], attrs))


def here(what: str = "this") -> Trace:
    """The innermost active trace."""
    trace = Trace.current()
    if trace is None:
        raise TraceError(located(
            f"{what}: a traced array is used outside the function that was traced; return it from that function instead of storing it"
        ))  # fmt: skip
    return trace


def array_of(value: Any) -> Array:
    """What is not traced, as an array. Raises: `DataError` if some of it is masked, which no operator knows of."""
    if isinstance(value, np.ndarray) and type(value) is not np.ndarray and isinstance(value, np.ma.MaskedArray):
        masked = int(np.count_nonzero(np.ma.getmaskarray(value)))
        if masked:
            raise DataError(located(
                f"an array of shape {value.shape} has {masked} masked value{'s' * (masked > 1)}, which would count like the others: "
                "fill them in (numpy.ma.filled), or pass data and mask as two arrays and choose with np.where"
            ))  # fmt: skip
    return np.asarray(value)


def type_of(value: Any) -> Type:
    """The type that a value has as an argument. Python numbers are weak: they take on the type of what they meet."""
    if isinstance(value, Tracer):
        return value.node.type
    if type(value) in (bool, int, float):
        return Type((), np.asarray(value).dtype, weak=True)
    array = array_of(value)
    dtype = np.dtype(array.dtype.type)  # numbers with their bytes swapped are put right when they are read
    if dtype not in DTYPES:
        raise DtypeError(located(f"arrays of {array.dtype} cannot be traced; known are bool, integers, float32 and float64"))
    return Type(array.shape, dtype)


def build(
    f: Callable[..., Sequence[Any]], types: Sequence[Type], *, name: str = "", key: Callable[[], Any] | None = None
) -> Graph:
    """Record `f(*tracers) -> list of results` on fresh inputs of these types."""
    trace = Trace(key, name)
    inputs = [input_node(t) for t in types]
    with trace.active():
        results = f(*(Tracer(n, trace) for n in inputs))
        return trace.close(inputs, results)


def inline(graph: Graph, args: Sequence[Any]) -> list[Any]:
    """The results of a graph on these arguments, recorded where tracing stands. Captured values are added by themselves."""
    trace = here("inlining")
    values = [trace.lift(a) for a in (*args, *graph.captures)]
    table = dict(zip(graph.inputs, values, strict=True))
    for node in graph.nodes():
        if node not in table:
            new = tuple(table[a] for a in node.args)
            table[node] = Node(node.op, new, node.attrs, node.types, node.source, node.scope or trace.scope)
    return [Tracer(table[o], trace) for o in graph.outputs]


def without_global_random(record: Callable[[], T]) -> T:
    """`record()`, unless it draws from NumPy's global generator: its numbers would become constants, the same in every step.

    Another thread may draw meanwhile; so only what happens again is an error.
    """
    for _ in range(3):
        before = _random_position(np.random)
        recorded = record()
        if _random_position(np.random) == before:
            return recorded
    raise TraceError(located(
        "NumPy's global generator was used inside a traced function, where its numbers would be frozen into the program; "
        "use cr.random.normal, cr.random.uniform or cr.random.bernoulli, which draw anew in each step"
    ))  # fmt: skip


def _random_position(random: Any) -> tuple[Any, ...]:
    state = random.get_state(legacy=False)
    inner = state["state"]
    return (
        state.get("bit_generator"),
        state.get("has_gauss"),
        state.get("gauss"),
        inner.get("pos"),
        bytes(np.asarray(inner.get("key", 0)))[:16],
    )


# ---- the symbol --------------------------------------------------------------------------------------------------------------


def _refuse(what: str, remedy: str) -> Callable[..., Any]:
    def method(self: Tracer, *args: Any, **kwargs: Any) -> Any:
        raise TraceError(located(f"{what} a traced array ({self.node.type}), whose numbers are not known yet: {remedy}"))

    return method


def _not_in_place(self: Any, other: Any) -> Any:
    return NotImplemented


_CONTROL = "use np.where to choose between values, cr.scan to loop, np.minimum/np.maximum/np.clip to bound"
_CONVERT = "keep computing with NumPy functions, and return the value to look at it"


class Tracer(np.lib.mixins.NDArrayOperatorsMixin):
    """An array whose numbers are not known yet. It behaves like a NumPy array; each operation on it is recorded."""

    __slots__ = ("home", "node")
    __array_priority__ = 1000
    __hash__ = None  # type: ignore[assignment]  # like arrays: == is elementwise

    def __init__(self, node: Node, trace: Trace) -> None:
        self.node = node
        self.home = trace

    @property
    def shape(self) -> tuple[int, ...]:
        return self.node.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.node.dtype

    @property
    def ndim(self) -> int:
        return len(self.node.shape)

    @property
    def size(self) -> int:
        return self.node.type.size

    @property
    def T(self) -> Any:
        return FUNCTIONS[np.transpose](self)

    @property
    def mT(self) -> Any:
        return FUNCTIONS[np.swapaxes](self, -1, -2)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        if kwargs.pop("out", None) is not None:
            raise TraceError(located(f"np.{ufunc.__name__} cannot write a traced array into `out` (or by {ufunc.__name__}= in place): "
                                     "bind the result to a name instead, x = x + y"))  # fmt: skip
        name = f"np.{ufunc.__name__}" + ("" if method == "__call__" else f".{method}")
        if method == "reduce":
            known: Any = {np.add: np.sum, np.maximum: np.max, np.minimum: np.min, np.multiply: np.prod}.get(ufunc)
            kwargs.setdefault("axis", 0)
        else:
            known = ufunc if method == "__call__" else None
        return _dispatch(known, name, inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _dispatch(func, f"np.{func.__name__}", args, kwargs)

    def __getitem__(self, index: Any) -> Any:
        return METHODS["__getitem__"](self, index)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a traced array without axes")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        if name in METHODS and not name.startswith("__"):
            function = METHODS[name]
            return lambda *args, **kwargs: function(self, *args, **kwargs)
        if name.startswith("__"):
            raise AttributeError(name)
        known = sorted(n for n in METHODS if not n.startswith("__"))
        raise AttributeError(f'traced arrays have no attribute "{name}".{nearest(name, known)} Known methods: {", ".join(known)}')

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "home"):
            raise AttributeError(f'traced arrays take no attribute "{name}"')
        object.__setattr__(self, name, value)

    # x += y binds x to a new array, as x = x + y does: the mixin's versions would write in place.
    __iadd__ = __isub__ = __imul__ = __itruediv__ = __ifloordiv__ = __imod__ = __ipow__ = __imatmul__ = _not_in_place
    __iand__ = __ior__ = __ixor__ = __ilshift__ = __irshift__ = _not_in_place

    __bool__ = _refuse("Python asks for the truth of", _CONTROL)
    __float__ = _refuse("Python asks for the number in", _CONVERT)
    __int__ = _refuse("Python asks for the number in", _CONVERT)
    __complex__ = _refuse("Python asks for the number in", _CONVERT)
    __index__ = _refuse("Python asks for an index from", "look up in an array with cr.lookup(array, indices)")
    __array__ = _refuse(
        "NumPy asks for the numbers in",
        "this function is not recorded, or got a list of traced arrays (use np.stack), or indexes a plain array (use cr.lookup)",
    )
    __contains__ = _refuse("`in` asks for the numbers in", "use np.any(x == value) and np.where")
    __setitem__ = _refuse("items are assigned in", "use np.where, np.concatenate or cr.scatter_add, which make a new array")
    item = _refuse(".item() asks for the number in", _CONVERT)
    tolist = _refuse(".tolist() asks for the numbers in", _CONVERT)

    def __repr__(self) -> str:
        return f"Tracer({self.node.type} by {self.node.op})"

    def __deepcopy__(self, memo: Any) -> Tracer:
        return self

    def __reduce__(self) -> Any:
        raise TraceError("a traced array cannot be pickled: it only exists while a function is traced")


def _dispatch(known: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    function = FUNCTIONS.get(known)
    if function is None:
        names = sorted({f.__name__ for f in FUNCTIONS})
        raise TraceError(
            located(f"{name} is not recorded on traced arrays.{nearest(name[3:], names)} Recorded: {', '.join(names)}")
        )
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        if isinstance(error, ChainruleError) or error.__traceback__ is None or error.__traceback__.tb_next is not None:
            raise
        raise TraceError(located(f"{name} on traced arrays: {error}")) from None
