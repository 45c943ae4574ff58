"""Every error that chainrule raises on purpose.

In: nothing. Out: one hierarchy under `ChainruleError`. A class is also a `ValueError`, `TypeError`, ... where that is what a
caller would already catch. A message says what is wrong, where, and what to do.
"""


class ChainruleError(Exception):
    """The root of all errors raised on purpose by chainrule."""


class ShapeError(ChainruleError, ValueError):
    """Shapes that do not fit together; the message gives both, the layer and the user's line."""


class DtypeError(ChainruleError, TypeError):
    """A data type that an operation cannot take."""


class TraceError(ChainruleError, TypeError):
    """Python code that cannot be recorded: control flow on a traced value, item assignment, conversion to a number."""


class GraphError(ChainruleError):
    """A graph that breaks a rule of `graph/verify.py`: a defect of chainrule itself or of an operator added to it."""


class UnknownNameError(ChainruleError, ValueError, KeyError):
    """A name that no registry knows; the message offers the nearest one."""

    def __str__(self) -> str:  # KeyError would print the message in quotes
        return str(self.args[0]) if self.args else ""


class GradientMismatch(ChainruleError, AssertionError):
    """A derivative that disagrees with central differences. `report` holds the comparison."""

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class DataError(ChainruleError, ValueError):
    """Data that cannot be learnt from as it is; the message gives column, row and remedy."""


class UsageError(ChainruleError, ValueError):
    """An option or a call that makes no sense; the message says which ones do."""


class BudgetError(UsageError):
    """A budget of memory that cannot be kept. `least` is the number of bytes that can."""

    def __init__(self, message: str, least: int = 0) -> None:
        super().__init__(message)
        self.least = least


class NotBuiltError(ChainruleError, RuntimeError):
    """A network that has not seen data yet, so it has no shapes and no parameters."""


class BusyError(ChainruleError, RuntimeError):
    """A network that another thread is training at this moment."""


class DivergenceError(ChainruleError, ArithmeticError):
    """Training that ran to NaN or infinity. The last good weights are on the network; `run` holds the history."""

    def __init__(self, message: str, run: object = None) -> None:
        super().__init__(message)
        self.run = run


class FileFormatError(ChainruleError, ValueError):
    """A file that is truncated, forged, or not what it claims to be."""
