"""Settings of the property tests: the same examples on every run in CI, few enough to stay fast everywhere."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "compression",
    deadline=None,  # machines are shared, and the first call of a kernel compiles it
    max_examples=30,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("compression")
