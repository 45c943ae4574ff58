"""Parameters of tests that only `make test-all` tries."""

from __future__ import annotations

from typing import Any

import pytest


def rarely(*values: Any) -> list[Any]:
    """These, as slow tests: `@pytest.mark.parametrize("rows", [16, *rarely(30, 100)])`."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
