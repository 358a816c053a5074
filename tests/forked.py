"""Python processes that begin with everything imported, which takes seconds otherwise.

A server process imports what commands need once, then forks one process per command.
"""

import contextlib
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

PATIENCE_S = 200.0
"""A process that takes longer hangs."""
_IMPORTED = (
    "longtrail",
    "feast",
    "feast.cli.cli",
    "feature_repo.materialize",
    "feature_repo.ingest",
    "feature_repo.item_neighbors",
    "feature_repo.item_stats",
    "feature_repo.parity",
    "feature_repo.postgres_load",
    "feature_repo.sequences",
    "feature_repo.user_stats",
    "encoders.encode",
    "training.train",
    "training.export",
    "serving.ranker",
    # What these import when they first need it.
    "feast.infra.compute_engines.local.compute",
    "feast.infra.offline_stores.contrib.postgres_offline_store.postgres",
    "feast.infra.online_stores.redis",
    "feast.infra.passthrough_provider",
    "ibis.backends.duckdb",
    "sqlalchemy.dialects.postgresql",
    "transformers.models.bert.modeling_bert",
    "tests.faults.commands",
    __name__,
)


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
        code: Exit code; minus the signal's number where one ended it.
        said: What it printed, both streams.
    """

    code: int
    said: str


@pytest.fixture(scope="session")
def fork_server() -> Iterator[None]:
    """Let the process that forks others import what they need, with one thread per library."""
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        multiprocessing.set_forkserver_preload(list(_IMPORTED))
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return


def run_forked(
    target: Callable[..., object],
    *arguments: Any,
    output: Path,
    folder: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Ended:
    """Call a module's function in a process of its own, and wait for its end.

    Args:
        target: The function.
        arguments: Its arguments, which are pickled.
        output: File for what it prints.
        folder: Its working directory; None = ours.
        variables: Its whole environment; None = ours.
    """
    output.touch()
    environment = dict(os.environ if variables is None else variables)
    process = multiprocessing.get_context("forkserver").Process(
        target=_call,
        args=(target, arguments, str(output), str(folder or Path.cwd()), environment),
        daemon=True,
    )
    process.start()
    process.join(PATIENCE_S)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return Ended(process.exitcode, output.read_text("utf-8", errors="replace"))


def feast(arguments: list[str]) -> None:
    """The plain feast command, as its script calls it."""
    from feast.cli.cli import cli

    cli(arguments, prog_name="feast")


def _call(
    target: Callable[..., object],
    arguments: tuple[Any, ...],
    output: str,
    folder: str,
    variables: dict[str, str],
) -> None:
    """In the new process."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    with contextlib.closing(os.fdopen(os.open(output, os.O_WRONLY | os.O_APPEND), "wb")) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    warnings.simplefilter("ignore")
    sys.argv = ["feast"]
    target(*arguments)
