"""Layers and networks: `from chainrule import nn`."""

from ..registry import nearest
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
from .saving import layers, load

__all__ = [
    "Activation",
    "BatchNorm",
    "Dense",
    "Dropout",
    "Embedding",
    "Flatten",
    "LayerNorm",
    "Module",
    "Reshape",
    "Residual",
    "Sequential",
    "layers",
    "load",
]
