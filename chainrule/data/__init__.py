"""Tables and images from files, what they mean, and how they become the numbers a network learns from."""

from .images import Images, read_images
from .read import read_table
from .table import Table

__all__ = ["Images", "Table", "read_images", "read_table"]
