"""How the tests sample: `ci` draws the same examples at each run, `all` more and new ones (`--hypothesis-profile=all`).

Machine code is kept in a folder of its own for each run of the tests, which all their processes share. What each pass of the compiler
makes is verified.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from chainrule.compiler import pipeline

os.environ.setdefault("COLUMNS", "130")  # terminal tables must not depend on the width of the developer's window

# Asserts of what tests share say what they compared, as those of tests do.
HELPERS = [file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith(("test_", "conftest"))]
pytest.register_assert_rewrite(*HELPERS)

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", derandomize=True, database=None, deadline=None, max_examples=40, suppress_health_check=SLOW)
settings.register_profile("all", deadline=None, max_examples=400, print_blob=True, suppress_health_check=SLOW)
settings.load_profile("ci")

pipeline.VERIFY_EACH_PASS = True

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has switched off in what it starts in the background

# The first process of a run makes the folder and takes it away; the workers that it starts find its name in their environment.
OWNER = "PYTEST_XDIST_WORKER" not in os.environ
if OWNER:
    os.environ["CHAINRULE_CACHE"] = tempfile.mkdtemp(prefix="chainrule-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if OWNER:
        shutil.rmtree(os.environ["CHAINRULE_CACHE"], ignore_errors=True)
