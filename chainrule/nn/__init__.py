"""Layers and networks: `from chainrule import nn`."""

from typing import TYPE_CHECKING, NoReturn

from ..registry import nearest
from .convolution import (
    AvgPool1D,
    AvgPool2D,
    Conv1D,
    Conv2D,
    Dropout2D,
    GlobalAvgPool,
    MaxPool1D,
    MaxPool2D,
)
from .from_torch import torch_parameters
from .images import Augment, Rescale
from .layers import (
    Activation,
    BatchNorm,
    Dense,
    Dropout,
    Embedding,
    Flatten,
    LayerNorm,
    Reshape,
    Residual,
    Sequential,
)
from .module import Module
from .recurrent import GRU, LSTM, RNN, Bidirectional, Recurrent, TimeDistributed
from .saving import layers, load

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Activation",
    "Augment",
    "AvgPool1D",
    "AvgPool2D",
    "BatchNorm",
    "Bidirectional",
    "Conv1D",
    "Conv2D",
    "Dense",
    "Dropout",
    "Dropout2D",
    "Embedding",
    "Flatten",
    "GlobalAvgPool",
    "LayerNorm",
    "MaxPool1D",
    "MaxPool2D",
    "Module",
    "Recurrent",
    "Rescale",
    "Reshape",
    "Residual",
    "Sequential",
    "TimeDistributed",
    "layers",
    "load",
    "torch_parameters",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> NoReturn:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{nearest(name, __all__)}")
