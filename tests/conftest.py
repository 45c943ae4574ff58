"""How the tests sample: `ci` draws the same examples at each run, `all` more and new ones (`--hypothesis-profile=all`)."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

os.environ.setdefault("COLUMNS", "130")  # terminal tables must not depend on the width of the developer's window

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", derandomize=True, database=None, deadline=None, max_examples=40, suppress_health_check=SLOW)
settings.register_profile("all", deadline=None, max_examples=400, print_blob=True, suppress_health_check=SLOW)
settings.load_profile("ci")
