"""A computation and its gradients as equations: plain text, LaTeX, HTML."""

from .api import Explanation, explain

__all__ = ["Explanation", "explain"]
