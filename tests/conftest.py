"""Fixtures of every test folder: the real servers, and the one that forks processes."""

# Before Feast, which would have it keep all values in files: every test counts from 0.
import prometheus_client  # noqa: F401

pytest_plugins = ["tests.servers", "tests.forked"]
