"""What a layer is, and a network.

In: a class whose `__call__` is written in NumPy. Out: a layer that can be put into others, trained, saved and copied. The built-in
layers use nothing that a user's own layer cannot use.
"""

from __future__ import annotations

import functools
import inspect
import os
from abc import ABCMeta
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar

import numpy as np

from .. import initializers
from ..errors import NotBuiltError, UnknownNameError, UsageError
from ..graph.trace import Trace, is_traced, located
from ..ops.activations import activations
from ..train.data import inputs_of
from ..train.model import Model
from ..train.scope import Scope
from ..train.state import OWN
from . import saving
from .names import check_attribute, closed_names, freed, methods


class _Made(ABCMeta):
    """Layers take `trainable=False` when they are made, whatever else their `__init__` takes."""

    def __call__(cls, *args: Any, trainable: bool = True, **kwargs: Any) -> Any:
        layer = super().__call__(*args, **kwargs)
        if not trainable:
            layer.trainable = False
        return layer


class Module(Model, metaclass=_Made):
    """A layer, or a network of layers.

    A subclass makes its parts in `__init__` and computes in `__call__`, in NumPy, with

    - `self.parameter(name, shape, init)`: a trainable array; `init` is an initializer, its name, a number, or a function of
      (generator, shape);
    - `self.statistic(name, shape, init=0)`: an array that the layer measures; `self.update(name, value)` gives it a new value, in
      training only;
    - `self.training`: whether this is a training pass; `cr.random`: numbers drawn anew in each step.

    Shapes come from the arrays that `__call__` receives. Layers kept in attributes (or in lists, tuples, dicts of them) are part of
    the network; their parameters are named by attribute or position, dotted: "encoder.0.weight". A layer kept twice is shared and
    keeps its first name. `trainable=False`,
    given when a layer is made or set later, freezes it and all in it: parameters and statistics stay as they are.

    Methods and attributes of your own may have any name that is not taken; one that is, be it private, is refused when the class is
    made or the attribute set. To replace a method on purpose, name it: `class Net(Module, overrides=["summary"])`.

    >>> import numpy as np
    >>> class Scale(Module):
    ...     def __call__(self, x):
    ...         return x * self.parameter("scale", (x.shape[-1],), "ones")
    >>> net = Scale()
    >>> _ = net.fit(np.ones((4, 2)), np.ones((4, 2)), epochs=0)
    >>> net.parameters["scale"].tolist()
    [1.0, 1.0]
    """

    trainable: bool = True
    _closed: ClassVar[frozenset[str]]  # names that a subclass may not take by chance

    def __new__(cls, *args: Any, **kwargs: Any) -> Module:
        self = super().__new__(cls)
        self._config = (args, kwargs)  # how to make it again: for saving
        self._init_state()
        return self

    def __init_subclass__(cls, overrides: Collection[str] = (), free: Collection[str] = (), **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        inherited: frozenset[str] = frozenset().union(*(base._closed for base in cls.__bases__ if issubclass(base, Module)))
        cls._closed = closed_names(cls, Module, inherited, overrides).difference(freed(cls, free))
        if "__call__" in vars(cls):
            cls.__call__ = _traced_call(vars(cls)["__call__"])  # type: ignore[method-assign]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._closed:
            check_attribute(type(self), name)
        super().__setattr__(name, value)

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {}

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        raise UsageError(f"{type(self).__name__} defines no __call__(self, x): it computes the layer's output from its input")

    # ---- what `__call__` may use ---------------------------------------------------------------------------------------------

    def parameter(self, name: str, shape: Any, init: Any = "glorot_uniform") -> Any:
        """The trainable array `name`, made on the first use.

        Args: name: an identifier; shape: an int or a tuple; init: see the class.
        """
        return _scope(self, name).ask(self, _identifier(name), "parameter", _shape(shape), _initializer(init))

    def statistic(self, name: str, shape: Any, init: Any = 0.0) -> Any:
        """The running statistic `name`: kept with the network, moved by `update` and not by gradients."""
        return _scope(self, name).ask(self, _identifier(name), "statistic", _shape(shape), _initializer(init))

    def update(self, name: str, value: Any) -> None:
        """Give a statistic its new value. Nothing happens outside training or in a frozen layer."""
        _scope(self, name).update(self, name, value)

    @property
    def training(self) -> bool:
        """Whether this is a training pass."""
        scope = Scope.current()
        return scope is not None and scope.training

    @property
    def frozen(self) -> bool:
        """Whether this layer, or one that holds it, has `trainable = False`."""
        scope = Scope.current()
        return not self.trainable or (scope is not None and scope.frozen(scope.path(self)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network to a safetensors file: layers, parameters, statistics, optimizer state. `cr.load` reads it.

        Arrays that layers were made with are tensors of the file, so they may be large.

        Raises: `UsageError` for parts that no file can describe, such as a lambda as activation or an array of complex numbers.
        """
        saving.save(self, path)

    def _adopt(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A layer of a trained network, called by itself: it has its parameters, and only its shapes are new."""
        try:
            self._build(inputs_of(named or inputs if len(inputs) > 1 or named else inputs[0]), 0, None, create=False)
        except (UsageError, NotBuiltError):
            self._require_built(f"calling {type(self).__name__}")
            raise

    # ---- what the training needs to know -------------------------------------------------------------------------------------

    def _scores(self, *inputs: Any, **named: Any) -> Any:
        return self(*inputs, **named)

    def _children(self) -> Iterator[tuple[str, Module]]:
        """Name and layer of each direct part."""
        for name, value in vars(self).items():
            if name not in OWN:
                yield from _modules(name, value)

    def _layers(self) -> dict[str, Module]:
        found: dict[str, Module] = {}
        seen: set[int] = set()

        def walk(path: str, layer: Module) -> None:
            if id(layer) in seen:
                return
            seen.add(id(layer))
            found[path] = layer
            for name, child in layer._children():
                walk(f"{path}.{name}" if path else name, child)

        walk("", self)
        return found

    def __repr__(self) -> str:
        args, kwargs = self._config
        words = [*(_word(a) for a in args), *(f"{k}={_word(v)}" for k, v in kwargs.items())]
        frozen = "" if self.trainable else ", trainable=False"
        return f"{type(self).__name__}({', '.join(words)}{frozen})"


Module._closed = frozenset({*OWN, "_closed", *(n for base in Module.__mro__[:-1] for n in methods(base))})


def _modules(name: str, value: Any) -> Iterator[tuple[str, Module]]:
    if isinstance(value, Module):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from _modules(f"{name}.{i}", v)
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from _modules(f"{name}.{k}", v)


def _traced_call(call: Callable[..., Any]) -> Callable[..., Any]:
    """`__call__` with the layer's name on all that it records. Outside a network's own tracing it is the network in evaluation mode:
    recorded with the present weights in a traced function, computed at once on arrays."""

    @functools.wraps(call)
    def wrapped(self: Module, *inputs: Any, **named: Any) -> Any:
        scope, trace = Scope.current(), Trace.current()
        if scope is not None and trace is not None:
            with trace.within(scope.path(self)):
                y = call(self, *inputs, **named)
            scope.gave(self, y)
            return y
        if not self.built:
            self._adopt(inputs, named)
        if not is_traced(*inputs, *named.values()):
            return self.predict(named if named else inputs if len(inputs) > 1 else inputs[0])
        values = {**self._arrays("parameter"), **self._arrays("statistic")}
        names = {id(layer): path for path, layer in self._layers().items()}
        with Scope(names, values, training=False, dtype=self._built["dtype"]).active():
            return wrapped(self, *inputs, **named)

    return wrapped


def _scope(layer: Module, name: str) -> Scope:
    scope = Scope.current()
    if scope is None:
        raise UsageError(
            located(f'"{name}" is asked for outside a forward pass; call self.parameter and self.statistic in __call__')
        )
    return scope


def _identifier(name: str) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise UsageError(located(f"a parameter's name must be a word such as weight, not {name!r}"))
    return name


def _initializer(init: Any) -> Any:
    try:
        return initializers.resolve(init)
    except (UnknownNameError, UsageError) as error:
        raise type(error)(located(str(error))) from None


def _shape(shape: Any) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1 for n in sizes):
        raise UsageError(located(f"the shape of a parameter must be whole numbers of at least 1, not {shape!r}"))
    return tuple(int(n) for n in sizes)


def _word(value: Any) -> str:
    return value.__name__ if inspect.isfunction(value) else repr(value)


def activation_of(thing: Any) -> Callable[[Any], Any]:
    """An activation by its name, or any function of one array; None is the identity.

    Raises: `UnknownNameError` for a name that is not known.
    """
    if thing is None:
        return activations["identity"]
    if callable(thing):
        return thing  # type: ignore[no-any-return]  # any function will do
    return activations[thing]


def positive(value: Any, what: str) -> int:
    """A whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise UsageError(f"{what} must be a whole number of at least 1, not {value!r}")
    return int(value)
