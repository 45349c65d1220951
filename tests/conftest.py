"""Settings for all tests: no requests to the real Hub, and hypothesis uses the same examples every
time."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "diffxfer",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("diffxfer")

# Before huggingface_hub is imported, which reads it once; the tests' own Hub is in tests/hub.
os.environ["HF_HUB_OFFLINE"] = "1"
