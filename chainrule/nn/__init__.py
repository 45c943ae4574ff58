"""Layers and networks: `from chainrule import nn`."""

from typing import TYPE_CHECKING, NoReturn

from ..registry import nearest
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
from .recurrent import GRU, LSTM, RNN, Bidirectional, Recurrent, TimeDistributed, torch_parameters
from .saving import layers, load

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Activation",
    "Augment",
    "BatchNorm",
    "Bidirectional",
    "Dense",
    "Dropout",
    "Embedding",
    "Flatten",
    "LayerNorm",
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
