"""PyTorch: eager with the fused Adam; the same with forward and backward pass compiled by `torch.compile`.

PyTorch's images are (B, C, H, W). In memory they lie, as do weights, in that order (NCHW) or with the channels last (NHWC): two ways.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import nn

from .. import layers as kinds
from ..rows import Row
from . import Settings, Trainee, Unsupported

RECURRENT = (kinds.RNN, kinds.GRU, kinds.LSTM, kinds.Bidirectional)
ACTIVATIONS: dict[str, Callable[[], Any]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class Last(nn.Module):  # type: ignore[misc]  # torch is not typed where it is not installed
    """A recurrent layer, batch first or packed, that gives all its outputs or the last one."""

    def __init__(self, cell: Any, sequences: bool) -> None:
        super().__init__()
        self.cell, self.sequences = cell, sequences

    def forward(self, x: Any) -> Any:
        """(B, T, I) -> (B, T, H) or (B, H); packed sequences -> the same packed, or (B, H)."""
        y, state = self.cell(x)
        if self.sequences:
            return y
        return state[0][-1] if isinstance(state, tuple) else state[-1]


class Permuted(nn.Module):  # type: ignore[misc]  # as above
    """A layer for sequences with the channels first, given some with the channels last: views, no copies."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        """(B, ..., C) -> (B, ..., C)."""
        return self.layer(x.movedim(-1, 1)).movedim(1, -1)


class ChannelsLast(nn.Module):  # type: ignore[misc]  # as above
    """Images with the channels last, as a Flatten after them takes them everywhere."""

    def forward(self, x: Any) -> Any:
        """(B, C, H, W) -> (B, H, W, C)."""
        return x.movedim(1, -1)


class Added(nn.Module):  # type: ignore[misc]  # as above
    """Layers side by side, whose outputs are added up; a way around them is an identity."""

    def __init__(self, layer: Any, around: Any) -> None:
        super().__init__()
        self.layer, self.around = layer, around

    def forward(self, x: Any) -> Any:
        """around(x) + layer(x)."""
        return self.around(x) + self.layer(x)


def dense(layer: kinds.Dense, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """A linear layer with its activation."""
    made = nn.Linear(shape[-1], layer.units)
    _set(made.weight, w["weight"].T)
    _set(made.bias, w["bias"])
    return [made, *_activation(layer.activation)]


def batch_norm(layer: kinds.BatchNorm, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """Batch norm over rows, or over images."""
    made = {1: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(shape)](shape[-1])
    _set(made.weight, w["scale"])
    _set(made.bias, w["shift"])
    return [made]


def recurrent(layer: Any, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """RNN, GRU, LSTM. The second bias of RNN and LSTM says nothing that the first does not; it is held at 0."""
    cell: Any = getattr(nn, type(layer).__name__)(shape[-1], layer.units, batch_first=True)
    _set_cell(cell, "", w)
    return [Last(cell, layer.return_sequences)]


def bidirectional(layer: kinds.Bidirectional, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """Both directions in one layer of PyTorch's."""
    one: Any = layer.layer
    if not one.return_sequences:
        raise Unsupported("bench/libraries/with_torch.py gives all outputs of two directions, not the last ones")
    cell: Any = getattr(nn, type(one).__name__)(shape[-1], one.units, batch_first=True, bidirectional=True)
    for suffix, direction in (("", "forward."), ("_reverse", "backward.")):
        _set_cell(cell, suffix, {n.removeprefix(direction): v for n, v in w.items() if n.startswith(direction)})
    return [Last(cell, True)]


def _set_cell(cell: Any, suffix: str, w: dict[str, Any]) -> None:
    _set(getattr(cell, f"weight_ih_l0{suffix}"), w["weight_input"].T)
    _set(getattr(cell, f"weight_hh_l0{suffix}"), w["weight_hidden"].T)
    _set(getattr(cell, f"bias_ih_l0{suffix}"), w["bias"])
    second = getattr(cell, f"bias_hh_l0{suffix}")
    _set(second, w.get("bias_hidden", w["bias"] * 0))
    second.requires_grad_("bias_hidden" in w)


def conv2d(layer: kinds.Conv2D, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """Convolution."""
    made = nn.Conv2d(shape[-1], layer.filters, layer.kernel, layer.stride, layer.padding, bias=layer.bias)
    _set(made.weight, w["weight"].transpose(3, 2, 0, 1))
    if layer.bias:
        _set(made.bias, w["bias"])
    return [made, *_activation(layer.activation)]


def conv1d(layer: kinds.Conv1D, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """Convolution over time."""
    made = nn.Conv1d(shape[-1], layer.filters, layer.kernel, layer.stride, layer.padding)
    _set(made.weight, w["weight"].transpose(2, 1, 0))
    _set(made.bias, w["bias"])
    return [Permuted(made), *_activation(layer.activation)]


def flatten(layer: kinds.Flatten, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """All axes of a row as one, in the order of chainrule's."""
    return [*([ChannelsLast()] if len(shape) == 3 else []), nn.Flatten()]


def sequential(layer: kinds.Sequential, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """One after the other."""
    modules = []
    for i, (part, own) in enumerate(zip(layer.layers, layer.shapes(shape), strict=False)):
        modules += build(part, own, _part(w, str(i)))
    return [nn.Sequential(*modules)]


def residual(layer: kinds.Residual, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """A layer and the way around it."""
    made = {name: nn.Sequential(*build(part, shape, _part(w, name))) for name, part in layer.parts.items()}
    return [Added(made["layer"], made.get("projection", nn.Identity()))]


def build(layer: kinds.Layer, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """A layer by its kind."""
    builder = BUILDERS.get(type(layer))
    if builder is None:
        raise Unsupported(f"bench/libraries/with_torch.py has no line for {type(layer).__name__}")
    return builder(layer, shape, w)


def _part(w: dict[str, Any], name: str) -> dict[str, Any]:
    """The values of a part, by its own names."""
    return {n.removeprefix(f"{name}."): v for n, v in w.items() if n.startswith(f"{name}.")}


def _set(parameter: Any, value: Any) -> None:
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(value.copy()))


def _activation(name: str | None) -> list[Any]:
    return [ACTIVATIONS[name]()] if name else []


# A kind of layer -> a function (layer, shape of a row of input, initial values) -> modules.
BUILDERS: dict[type[kinds.Layer], Callable[[Any, kinds.Shape, dict[str, Any]], list[Any]]] = {
    kinds.Dense: dense,
    kinds.Activation: lambda layer, shape, w: _activation(layer.activation),
    kinds.Dropout: lambda layer, shape, w: [nn.Dropout(layer.rate)] if layer.rate else [],
    kinds.BatchNorm: batch_norm,
    kinds.Flatten: flatten,
    kinds.RNN: recurrent,
    kinds.GRU: recurrent,
    kinds.LSTM: recurrent,
    kinds.Bidirectional: bidirectional,
    kinds.Conv1D: conv1d,
    kinds.Conv2D: conv2d,
    kinds.MaxPool2D: lambda layer, shape, w: [nn.MaxPool2d(layer.size)],
    kinds.GlobalAvgPool: lambda layer, shape, w: [nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    kinds.Sequential: sequential,
    kinds.Residual: residual,
}


def network(row: Row) -> Any:
    """The network with the row's initial weights."""
    (made,) = sequential(row.network, row.input, row.parameters())
    return made


# A loss by name -> PyTorch's function, and the targets as it takes them: beside scores (rows, or steps of all rows, outputs).
LOSSES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]] = {
    "cross_entropy": (nn.functional.cross_entropy, lambda y: y.reshape(-1)),
    "binary_cross_entropy": (nn.functional.binary_cross_entropy_with_logits, lambda y: y.float()[:, None]),
    "mse": (nn.functional.mse_loss, lambda y: y.reshape(len(y), -1)),
}


def _packed(row: Row, batches: Any) -> Any:
    """The inputs of batches; sequences that differ in length as PyTorch wants them. That is done once, not in each step."""
    lengths = row.lengths()
    if lengths is None:
        return batches
    pack = nn.utils.rnn.pack_padded_sequence
    each = torch.from_numpy(lengths.copy()).split(row.batch)
    return [pack(x, own, batch_first=True) for x, own in zip(batches, each, strict=True)]


class Training:
    """A step a call, over batches cut beforehand."""

    def __init__(self, row: Row, compiled: bool, memory_format: Any) -> None:
        torch.manual_seed(0)
        self.net = network(row).to(memory_format=memory_format)
        function, shape = LOSSES[row.loss]
        x, y = (torch.from_numpy(a) for a in row.data())
        if row.of_images:
            x = x.movedim(-1, 1).contiguous(memory_format=memory_format)
        batches = zip(_packed(row, x.split(row.batch)), y.split(row.batch), strict=True)
        self.batches = [(packed, shape(own)) for packed, own in batches]
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, row.learning_rate, fused=True)
        net = self.net

        def objective(x: Any, y: Any) -> Any:
            scores = net(x)
            return function(scores.reshape(-1, scores.shape[-1]), y)

        if compiled:
            torch._dynamo.reset()  # it stops compiling a function, without a word, after 8 networks
        self.objective = torch.compile(objective) if compiled else objective
        self.at = 0

    def _step(self) -> Any:
        x, y = self.batches[self.at]
        self.at = (self.at + 1) % len(self.batches)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.objective(x, y)
        loss.backward()
        self.optimizer.step()
        return loss

    def losses(self, steps: int) -> list[float]:
        """Step by step."""
        return [self._step().item() for _ in range(steps)]

    def train(self, steps: int) -> tuple[int, float]:
        """Step by step, without looking at the loss."""
        begun = perf_counter()
        for _ in range(steps):
            self._step()
        return steps, perf_counter() - begun


def prepare(row: Row, way: str, settings: Settings) -> Trainee:
    """See `bench.libraries`."""
    torch.set_num_threads(settings.threads)
    torch.set_flush_denormal(True)  # as JAX and chainrule do: what vanishes over time would slow it down
    compiled = way.startswith("compile")
    if compiled and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise Unsupported("torch.compile needs a C++ compiler, and there is none here")
    if compiled and any(isinstance(layer, RECURRENT) for layer in row.layers):
        raise Unsupported("torch.compile leaves recurrent layers as they are; allowed to unroll them, it takes minutes")
    return Training(row, compiled, torch.channels_last if way.endswith("NHWC") else torch.contiguous_format)
