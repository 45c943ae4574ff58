"""Neural networks by backpropagation: recorded as a graph, differentiated by the chain rule, run as one program.

>>> import numpy as np
>>> float(grad(lambda x: x ** 2)(3.0))
6.0
"""

from . import initializers, losses, metrics, nn, ops, optim, schedules
from .errors import (
    BudgetError,
    BusyError,
    ChainruleError,
    DataError,
    DivergenceError,
    DtypeError,
    FileFormatError,
    GradientMismatch,
    GraphError,
    NotBuiltError,
    ShapeError,
    TraceError,
    UnknownNameError,
    UsageError,
)
from .explain import Explanation, explain
from .features import activations, saliency
from .gradcheck import GradientReport, check_gradients
from .nn import load
from .ops import random
from .ops.activations import elu, gelu, leaky_relu, mish, relu, selu, sigmoid, silu, softplus, softsign
from .ops.elementwise import erf
from .ops.index import lookup, one_hot, scatter_add
from .ops.loop import scan
from .ops.reduce import log_softmax, logsumexp, softmax
from .ops.window import windows
from .optim import LBFGS, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, Lion, Nadam, Optimizer, RAdam, RMSprop, Rprop
from .train.history import Callback, EarlyStopping, Run
from .transforms import compile, custom_gradient, grad, hvp, jacobian, jvp, stop_gradient, value_and_grad, vjp

__version__ = "0.1.0"
