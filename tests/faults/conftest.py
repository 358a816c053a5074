"""One world for all faults: two servers of its own, and every step's undisturbed result."""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator

import pytest
import torch
from transformers import BertConfig, BertModel

from feature_repo.services.postgres import PostgresServer
from feature_repo.services.processes import free_port, stop_process
from feature_repo.services.redis import RedisServer
from tests.encoders.conftest import SIZES, save
from tests.faults.world import Servers, World, steps, write_data
from tests.servers import PASSWORD, scratch_folder

# A killed server's commits are in the system's memory: the disk need not see them.
_SETTINGS = ("fsync=off", "full_page_writes=off")


def end(server: PostgresServer | RedisServer) -> None:
    """Stop a server at once, and its children: nobody wants its data."""
    process = server.process()
    if process is not None:
        # PostgreSQL takes its children along. Redis would ignore it where its parents did, as the
        # background jobs of a script do.
        at_once = signal.SIGQUIT if isinstance(server, PostgresServer) else signal.SIGKILL
        stop_process(process, at_once, timeout_s=60)


@pytest.fixture(scope="session")
def world(_ends_in_order: None, fork_server: None) -> Iterator[World]:
    """Every step's undisturbed result."""
    with contextlib.ExitStack() as stack:
        folder = scratch_folder()
        stack.callback(shutil.rmtree, folder)
        postgres = PostgresServer(folder / "postgres", free_port(), PASSWORD, settings=_SETTINGS)
        redis = RedisServer(folder / "redis", free_port(), "")
        for server in (postgres, redis):
            stack.callback(end, server)
            server.start()
        torch.manual_seed(0)
        bert = BertModel(BertConfig(max_position_embeddings=64, **SIZES))
        model = save(bert, folder / "bert")
        toml = write_data(folder / "data")
        built = World(folder, Servers(postgres, redis), steps(toml, model))
        built.build()
        yield built


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Tests start without addresses, and those that the code sets end with the test."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("LONGTRAIL_", "DATABASE_URL", "REDIS_URL")):
            del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)
