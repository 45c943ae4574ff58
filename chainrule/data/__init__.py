"""Tables from files, what their columns mean, and how they become the numbers a network learns from."""

from .read import read_table
from .table import Table

__all__ = ["Table", "read_table"]
