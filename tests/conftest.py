"""Fixtures of every test folder: the real servers."""

# Before Feast, which would have it keep all values in files: every test counts from 0.
import prometheus_client  # noqa: F401

pytest_plugins = ["tests.servers"]
