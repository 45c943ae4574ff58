"""What a network makes of its inputs: what each layer gives, and which numbers of an input a score hangs on.

In: a network that is built, and rows of inputs. Out: arrays. Both run as programs in evaluation mode, batch by batch, like `predict`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .errors import DataError, UsageError
from .graph.node import Array, Type
from .nn import Module
from .ops.index import one_hot
from .program import Input, Program, ProgramBuilder, Variable, differentiate
from .run.backend import Steps, backends
from .run.batches import step_sizes
from .train.data import Inputs
from .train.fit import EVALUATION_ROWS
from .train.objective import Task, batch_type
from .transforms import DEFAULT_BACKEND

_ENTRY, _CLASS, _SALIENCY = "look", "class", "saliency"

Look = Callable[[Task, Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]


def activations(net: Module, x: Any, *, backend: str = DEFAULT_BACKEND) -> dict[str, Array]:
    """What each layer of a network gives for each row of x, in evaluation mode.

    Args: net: a network that is built; x: inputs as for `predict`.
    Returns: the layer's name -> its output, (rows, ...), in the order in which they are computed; "" is the network itself, if that is
    no `Sequential`. A layer that is called again is "name (2)". Left out are layers within a loop over time, and those whose output is
    not one array with the rows first.
    Raises: `NotBuiltError` before the first fit; `ShapeError` and `DataError` as `predict`.

    >>> import numpy as np
    >>> from chainrule import nn
    >>> net = nn.Sequential(nn.Dense(4, "relu"), nn.Dense(2))
    >>> x = np.ones((8, 3))
    >>> _ = net.fit(x, np.ones((8, 2)), epochs=1)
    >>> found = activations(net, x)
    >>> {name: y.shape for name, y in found.items()}
    {'0': (8, 4), '1': (8, 2)}
    >>> bool(np.array_equal(found["1"], net.predict(x)))
    True
    """
    net._require_built("activations")

    def look(task: Task, state: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
        outputs: dict[str, Any] = {}
        net._forward(state, given, False, outputs=outputs)
        rows = len(next(iter(given.values())))
        return {name: y for name, y in outputs.items() if y.shape[:1] == (rows,)}

    return _looked(net, net._inputs(x), {}, look, backend)


def saliency(net: Module, x: Any, label: Any = None, *, backend: str = DEFAULT_BACKEND) -> Array:
    """How the score of a class changes with each number of the input: the gradient of the score by the input, in evaluation mode.

    s[b, ...] = ∂ score[b, label] / ∂ x[b, ...]

    Args: net: a network that is built and has one input, of numbers; x (rows, ...); label: the class, one for all rows or one for each;
    None takes the class with the highest score. Of a network with one score, class 1 has this score and class 0 its negative.
    Returns: an array of the shape of x. Its sign says in which direction the score rises; pictures mostly show its size.
    Raises: `NotBuiltError` before the first fit; `DataError` for a class that is not there; `UsageError` for a network with several
    inputs, with inputs that are indices, or with other than one row of scores.
    Source: Simonyan, Vedaldi, Zisserman, "Deep inside convolutional networks", ICLR 2014 workshop, section 3.

    >>> import numpy as np
    >>> from chainrule import nn
    >>> net = nn.Dense(2)
    >>> x = np.ones((4, 3))
    >>> _ = net.fit(x, np.ones((4, 2)), epochs=1)
    >>> bool(np.allclose(saliency(net, x, 1), net.parameters["weight"][:, 1]))
    True
    """
    net._require_built("saliency")
    inputs = net._inputs(x)
    types, outputs = net._built["inputs"], net._built["outputs"]
    if list(types) != ["x"] or types["x"].dtype.kind != "f" or inputs.lengths:
        raise UsageError("saliency is for networks with one input of numbers, all rows of one shape; an index has no gradient")
    if len(outputs) != 1:
        raise UsageError(f"saliency is for networks that give a row of scores, one for each class, not {outputs} for a row")
    if label is None:
        scores = net.predict(x, backend=backend)
        label = scores.argmax(axis=1) if outputs[0] > 1 else scores[:, 0] > 0
    labels = _labels(label, inputs.rows, max(outputs[0], 2))

    def look(task: Task, state: Mapping[str, Any], given: Mapping[str, Any]) -> Mapping[str, Any]:
        def total(pixels: Any) -> tuple[Any, Any]:
            scores = net._forward(state, {"x": pixels}, False)[0]
            if outputs[0] == 1:
                return np.sum(np.where(np.equal(given[_CLASS], 1), scores[:, 0], -scores[:, 0])), ()
            return np.sum(scores * one_hot(given[_CLASS], outputs[0], task.dtype)), ()

        return {_SALIENCY: differentiate(total, given["x"])[2]}

    return _looked(net, inputs, {_CLASS: labels}, look, backend)[_SALIENCY]


def _labels(label: Any, rows: int, classes: int) -> Array:
    """A class for each row. Raises: `DataError` for anything else."""
    array = np.asarray(label)
    if array.dtype.kind not in "iub" or array.shape not in ((), (rows,)):
        raise DataError(f"label is the number of a class, or one for each of the {rows} rows, not {label!r:.60}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < classes:
        raise DataError(f"label goes from {array.min()} to {array.max()}, but this network has the classes 0 to {classes - 1}")
    return np.broadcast_to(array, (rows,)).astype(np.int64)


def _looked(net: Module, inputs: Inputs, further: Mapping[str, Array], look: Look, backend: str) -> dict[str, Array]:
    """The results of `look` over all rows. further: data beside the inputs, one number a row."""
    task = net._task(inputs=inputs)
    sizes = step_sizes(inputs.rows, EVALUATION_ROWS)
    programs = {rows: _program(task, rows, look, further) for rows in dict.fromkeys(sizes)}
    entries = [program.entries[_ENTRY].results for program in programs.values()]
    keep = [name for name in entries[0] if all(name in results for results in entries)]
    session = backends[backend].session(programs, net._state())
    data = {**inputs.all, **further}
    taken = session.run(Steps([_ENTRY] * len(sizes), data, np.arange(inputs.rows), sizes, {}, keep))
    if taken.interrupted:
        raise KeyboardInterrupt
    return {name: taken.results[name] for name in keep}


def _program(task: Task, rows: int, look: Look, further: Mapping[str, Array]) -> Program:
    state = [Variable(n, t, "parameter") for n, t in task.parameters.items()]
    state += [Variable(n, t, "statistic") for n, t in task.statistics.items()]
    data = [Input(n, batch_type(t, rows), rows=0) for n, t in task.inputs.items()]
    data += [Input(n, Type((rows,), v.dtype), rows=0) for n, v in further.items()]
    builder = ProgramBuilder(state, data, rows)
    found: dict[str, int] = {}

    def entry(state: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
        results = look(task, state, given)
        found.update(dict.fromkeys(results, 0))
        return results, {}

    builder.entry(_ENTRY, entry, [i.name for i in data], rows_of=found)
    return builder.build()
