"""`explain`: a computation and its gradients as equations.

In: a function and arguments, or a network with data and a loss. Out: an `Explanation` in plain text, LaTeX and HTML. The equations are
read off the recorded graph and off the graph that the chain rule makes of it. They hold in exact arithmetic: where the program
distinguishes cases only to keep exponentials from overflowing, or multiplies by one, they leave it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .. import optim
from ..errors import UsageError
from ..graph.node import Array
from ..records import record

if TYPE_CHECKING:  # what makes and writes documents is imported by the first explanation: few programs explain anything
    from .document import Document


@record(frozen=True)
class Explanation:
    """Equations of a computation and its gradients. Printed, it is plain text; a notebook shows it as formulas.

    Attributes:
        text: plain text; the equations are Python with NumPy's meaning.
        latex: for a LaTeX document that uses amsmath; ASCII only.
        html: a page of its own, with formulas in MathML, for light and dark.
        values: the arrays of the example by the names that the equations use (empty without numbers=True).
    """

    document: Document

    @cached_property
    def text(self) -> str:
        from .plain import plain_text

        return plain_text(self.document)

    @cached_property
    def latex(self) -> str:
        from .page import latex

        return latex(self.document)

    @cached_property
    def html(self) -> str:
        from .page import html_page

        return html_page(self.document)

    @property
    def values(self) -> dict[str, Array]:
        return {var.name: value for var, value in self.document.numbers.items()}

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Explanation({self.document.title!r})"

    def _repr_html_(self) -> str:
        from .page import html_fragment

        return html_fragment(self.document)

    def _repr_latex_(self) -> str:
        return self.latex


def explain(f: Any, *args: Any, numbers: bool = False, argnums: int | Sequence[int] | None = None, loss: Any = None,
            optimizer: Any = None, seed: int = 0, training: bool = True) -> Explanation:  # fmt: skip
    """The forward pass, the backward pass and the update of a function or a network, as equations.

    L = f(...);  ∂L/∂a for each argument a, by the chain rule, with a name for each value that is used more than once

    Args: f, a function that returns one number, and its arguments; or a network, and x and y. numbers: whether to show the values
    of this example; argnums: the arguments to differentiate by, by default all that are floating-point; optimizer: a name or an
    optimizer whose update rule is shown too. For a network also loss (this and the optimizer by default those of the last fit),
    seed (of dropout), training.
    Returns: an `Explanation`; print it, or take its `.text`, `.latex`, `.html`.
    Raises: `ShapeError` if f returns anything but one floating-point number; `DtypeError` for an argument without derivative.

    >>> import numpy as np
    >>> def f(w, x):
    ...     return np.sum(np.tanh(x @ w))
    >>> print(explain(f, np.ones((2, 1)), np.ones((3, 2)), argnums=0))
    L = f(w, x)
    <BLANKLINE>
    Names
      w   (2, 1)
      x   (3, 2)
    <BLANKLINE>
    Forward pass
      v1 = tanh(x @ w)           (3, 1)
      L = sum(v1)                number
    <BLANKLINE>
    Backward pass
      ∂L/∂w = x.T @ (1 - v1**2)  (2, 1)
    """
    from .subject import of_function, of_network

    chosen = None if optimizer is None else optim.resolve(optimizer)
    if hasattr(f, "_explained"):
        return Explanation(of_network(f, args, numbers, argnums, loss, chosen, seed, training))
    if not callable(f):
        raise UsageError(f"explain takes a function or a network, not {f!r:.60}")
    if loss is not None:
        raise UsageError("explain: loss= is for networks; a function returns its loss itself")
    return Explanation(of_function(f, args, numbers, argnums, chosen))
