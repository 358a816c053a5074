"""Fixtures of every test folder: the real servers, and the one that forks processes."""

pytest_plugins = ["tests.servers", "tests.forked"]
