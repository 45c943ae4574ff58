"""Whether the LaTeX and HTML of `cr.explain` are well-formed, of known macros and elements, and fetch and run nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

MACROS = frozenset(
    [
        r"\section",
        r"\subsection",
        r"\paragraph",
        r"\begin",
        r"\end",
        r"\text",
        r"\mathrm",
        r"\mathbf",
        r"\mathrel",
        r"\operatorname",
        r"\frac",
        r"\sqrt",
        r"\sum",
        r"\left",
        r"\right",
        r"\odot",
        r"\top",
        r"\partial",
        r"\le",
        r"\ge",
        r"\ne",
        r"\wedge",
        r"\vee",
        r"\neg",
        r"\cdot",
        r"\infty",
        r"\leftarrow",
        r"\sim",
        r"\dots",
        r"\prime",
        r"\lfloor",
        r"\rfloor",
        r"\times",
        r"\to",
        r"\quad",
        r"\exp",
        r"\log",
        r"\sin",
        r"\cos",
        r"\tanh",
        r"\arcsin",
        r"\arccos",
        r"\tan",
        r"\arctan",
        r"\max",
        r"\min",
        r"\textbackslash",
        r"\textasciicircum",
        r"\textasciitilde",
        r"\textless",
        r"\textgreater",
        r"\textbar",
        r"\textquotedbl",
        r"\,",
        r"\{",
        r"\}",
        r"\$",
        r"\&",
        r"\#",
        r"\%",
        r"\_",
        r"\\",
        r"\alpha",
        r"\beta",
        r"\gamma",
        r"\delta",
        r"\varepsilon",
        r"\zeta",
        r"\eta",
        r"\theta",
        r"\iota",
        r"\kappa",
        r"\lambda",
        r"\mu",
        r"\nu",
        r"\xi",
        r"\pi",
        r"\rho",
        r"\sigma",
        r"\tau",
        r"\upsilon",
        r"\varphi",
        r"\chi",
        r"\psi",
        r"\omega",
        r"\Gamma",
        r"\Delta",
        r"\Theta",
        r"\Lambda",
        r"\Xi",
        r"\Pi",
        r"\Sigma",
        r"\Phi",
        r"\Psi",
        r"\Omega",
    ]
)


def check_latex(text: str) -> None:
    """Balanced, ASCII, and made of macros of LaTeX and amsmath only."""
    assert text.isascii()
    tokens = re.findall(r"\\(?:[A-Za-z]+|.|\n)|[{}$&]|[^\\{}$&]+", text)
    stack: list[str] = []
    for k, token in enumerate(tokens):
        if token.startswith("\\"):
            assert token in MACROS, token
        if token in ("\\begin", "\\end"):
            name = tokens[k + 2]
            assert name in ("align*", "cases", "pmatrix", "tabular")
            if token == "\\begin":
                stack.append(name)
            else:
                assert stack.pop() == name
        elif token == "{":
            stack.append("{")
        elif token == "}":
            assert stack.pop() == "{"
        elif token == "\\left":
            stack.append("left")
        elif token == "\\right":
            assert stack.pop() == "left"
        elif token == "$":
            stack.pop() if stack and stack[-1] == "$" else stack.append("$")
        elif token == "&":
            assert any(s in ("align*", "cases", "pmatrix", "tabular") for s in stack)
    assert not stack
    assert "\n\n\\end{align*}" not in text
    assert "\\begin{align*}\n\\end" not in text


MATHML = "math mrow mi mn mo mtext mspace mfrac msub msup msubsup msqrt munder mtable mtr mtd"
HTML = "html head meta title style body div h2 h3 h4 p span table tr td"


class Checker(HTMLParser):
    """Well-formed, of known elements, and nothing fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in MATHML.split() + HTML.split(), tag
        assert {k for k, _ in attrs} <= {
            "class", "style", "lang", "charset", "name", "content", "title", "mathvariant", "fence", "stretchy", "lspace", "rspace",
            "width", "movablelimits", "displaystyle",
        }  # fmt: skip
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


def check_html(page: str) -> list[str]:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    assert "url(" not in page
    assert "http" not in page
    return checker.texts
