"""Fixtures of every test folder: the real servers, and the one that forks processes."""

import os

# Before Feast, which would have it keep all values in files: every test counts from 0.
import prometheus_client  # noqa: F401

# Whoever runs the tests may work with data and servers of his own: no test may see these. Here, for
# fixtures of whole sessions and the processes that they start inherit what is left.
for _variable in [name for name in os.environ if name.startswith("LONGTRAIL_")]:
    del os.environ[_variable]
for _variable in ("DATABASE_URL", "REDIS_URL"):
    os.environ.pop(_variable, None)

pytest_plugins = ["tests.servers", "tests.forked"]
