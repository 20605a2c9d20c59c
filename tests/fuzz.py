"""How the fuzzers run: the same cases every time by default, other ones each time where a test is marked slow."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
_SHARED = dict(deadline=None, database=None, suppress_health_check=_CHECKS)


def quick(cases: int) -> settings:
    """For the default suite: no seed but the test itself."""
    return settings(max_examples=cases, derandomize=True, **_SHARED)


def thorough(cases: int) -> settings:
    """For tests that are marked slow: new cases at every run, and a failing one is printed so as to be repeated."""
    return settings(max_examples=cases, derandomize=False, print_blob=True, **_SHARED)
