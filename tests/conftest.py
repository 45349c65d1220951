"""What holds for every test: nothing asks the real Hub, and properties are tried on the same
examples each time."""

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
