"""Fixtures of every test folder: the real servers."""

pytest_plugins = ["tests.servers"]
