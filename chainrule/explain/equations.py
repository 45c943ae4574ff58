"""What an explanation is made of: equations, and loops of equations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .terms import Index, Term, Terms, Var

Place = tuple[Index | None, int]  # a counter and an offset, or (None, step) for a certain step


@dataclass(eq=False)
class Equation:
    """`var` at `places` (where its counters stand, if there are none given) is `term`.

    mode: define, start (of a state), add (to a sum), draw (a random number), update (by an optimizer). scope: the layer.
    """

    var: Var
    term: Term
    mode: str = "define"
    places: tuple[Place, ...] = ()
    scope: str = ""

    @property
    def left(self) -> tuple[Place, ...]:
        """The places of the left side."""
        return self.places or tuple((ix, 0) for ix in self.var.indices)


@dataclass(eq=False)
class Loop:
    """Equations repeated for each step of `index`, from the last to the first if `reverse`."""

    index: Index
    reverse: bool
    items: list[Item] = field(default_factory=list)
    scope: str = ""

    @property
    def span(self) -> tuple[int, int]:
        """The first and the last step."""
        last = self.index.length - 1
        return (last, 0) if self.reverse else (0, last)


Item = Equation | Loop


def equations(items: Sequence[Item]) -> Iterator[Equation]:
    """All equations, those in loops included."""
    for item in items:
        if isinstance(item, Loop):
            yield from equations(item.items)
        else:
            yield item


def added(terms: Terms, equation: Equation) -> Term:
    """What a step adds to a sum."""
    parts = zip(equation.term.attrs[0], equation.term.args, strict=True)
    rest = [(r, t) for r, t in parts if not (t.op == "at" and t.attrs[0] is equation.var)]
    return terms.full(terms.add(*rest), equation.var.shape)
