"""The vocabulary. Importing it registers every operator and every NumPy function that is recorded."""

from . import activations, call, contract, elementwise, functions, index, layout, loop, random, reduce, window

__all__ = ["activations", "call", "contract", "elementwise", "functions", "index", "layout", "loop", "random", "reduce", "window"]
