"""PyTorch: eager with the fused Adam; the same with forward and backward pass compiled by `torch.compile`."""

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

ACTIVATIONS: dict[str, Callable[[], Any]] = {"relu": nn.ReLU, "tanh": nn.Tanh}


class Last(nn.Module):  # type: ignore[misc]  # torch is not typed where it is not installed
    """A recurrent layer, batch first, that gives all its outputs or the last one."""

    def __init__(self, cell: Any, sequences: bool) -> None:
        super().__init__()
        self.cell, self.sequences = cell, sequences

    def forward(self, x: Any) -> Any:
        """(B, T, I) -> (B, T, H) or (B, H)."""
        y = self.cell(x)[0]
        return y if self.sequences else y[:, -1]


class Permuted(nn.Module):  # type: ignore[misc]
    """A layer for images with the channels first, given images with the channels last: views, no copies."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        """(B, H, W, C) -> (B, H, W, C)."""
        return self.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def dense(layer: kinds.Dense, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """A linear layer with its activation."""
    made = nn.Linear(shape[-1], layer.units)
    _set(made.weight, w["weight"].T)
    _set(made.bias, w["bias"])
    return [made, *_activation(layer.activation)]


def batch_norm(layer: kinds.BatchNorm, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """Batch norm over rows, or over images."""
    made = nn.BatchNorm1d(shape[-1]) if len(shape) == 1 else nn.BatchNorm2d(shape[-1])
    _set(made.weight, w["scale"])
    _set(made.bias, w["shift"])
    return [made if len(shape) == 1 else Permuted(made)]


def recurrent(layer: Any, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """RNN, GRU, LSTM. The second bias of RNN and LSTM says nothing that the first does not; it is held at 0."""
    cell: Any = getattr(nn, type(layer).__name__)(shape[-1], layer.units, batch_first=True)
    _set(cell.weight_ih_l0, w["weight_input"].T)
    _set(cell.weight_hh_l0, w["weight_hidden"].T)
    _set(cell.bias_ih_l0, w["bias"])
    _set(cell.bias_hh_l0, w.get("bias_hidden", w["bias"] * 0))
    if "bias_hidden" not in w:
        cell.bias_hh_l0.requires_grad_(False)
    return [Last(cell, layer.return_sequences)]


def conv2d(layer: kinds.Conv2D, shape: kinds.Shape, w: dict[str, Any]) -> list[Any]:
    """Convolution, with the memory of images and weights ordered channels last."""
    made = nn.Conv2d(shape[-1], layer.filters, layer.kernel).to(memory_format=torch.channels_last)
    _set(made.weight, w["weight"].transpose(3, 2, 0, 1))
    _set(made.bias, w["bias"])
    return [Permuted(made), *_activation(layer.activation)]


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
    kinds.Flatten: lambda layer, shape, w: [nn.Flatten()],
    kinds.RNN: recurrent,
    kinds.GRU: recurrent,
    kinds.LSTM: recurrent,
    kinds.Conv2D: conv2d,
    kinds.MaxPool2D: lambda layer, shape, w: [Permuted(nn.MaxPool2d(layer.size))],
}


def network(row: Row) -> Any:
    """The network with the row's initial weights."""
    values, modules = row.parameters(), []
    for i, (layer, shape) in enumerate(zip(row.layers, row.shapes(), strict=False)):
        build = BUILDERS.get(type(layer))
        if build is None:
            raise Unsupported(f"bench/libraries/with_torch.py has no line for {type(layer).__name__}")
        own = {n.partition(".")[2]: v for n, v in values.items() if n.startswith(f"{i}.")}
        modules += build(layer, shape, own)
    return nn.Sequential(*modules)


class Training:
    """A step a call, over batches cut beforehand."""

    def __init__(self, row: Row, compiled: bool) -> None:
        torch.manual_seed(0)
        self.net = network(row)
        x, y = (torch.from_numpy(a) for a in row.data())
        if row.loss == "binary_cross_entropy":
            y, function = y.float()[:, None], nn.functional.binary_cross_entropy_with_logits
        else:
            function = nn.functional.cross_entropy
        self.batches = list(zip(x.split(row.batch), y.split(row.batch), strict=True))
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, row.learning_rate, fused=True)
        net = self.net

        def objective(x: Any, y: Any) -> Any:
            return function(net(x), y)

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
    if way == "compile" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise Unsupported("torch.compile needs a C++ compiler, and there is none here")
    return Training(row, way == "compile")
