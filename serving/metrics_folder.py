"""Where prometheus_client keeps its values: in memory, or in a folder that several workers share.

It decides when it is first imported, by a variable, and Feast sets that variable for every process
that imports it. So whoever serves comes here first, before anything that imports Feast.
"""

import importlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_VARIABLES = ("PROMETHEUS_MULTIPROC_DIR", "PROMETHEUS_MULTIPROCESS_DIR")
"""prometheus_client's own, and Feast's."""


@contextmanager
def metrics_folder(num_workers: int) -> Iterator[Path | None]:
    """A folder for several workers, gone afterwards; None for one, which needs none."""
    if num_workers == 1:
        for name in _VARIABLES:
            os.environ.pop(name, None)
        importlib.import_module("prometheus_client")
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="longtrail-metrics-") as folder:
        os.environ.update(dict.fromkeys(_VARIABLES, folder))
        importlib.import_module("prometheus_client")
        yield Path(folder)
