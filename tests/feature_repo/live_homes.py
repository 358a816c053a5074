"""The kitchen in the stores of both profiles, all the way to the online stores."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import redis
from feast import FeatureView

from feature_repo.connections import DATABASE_URL, REDIS_URL
from feature_repo.home import Home
from feature_repo.live_store import LiveStore
from feature_repo.materialize import apply, materialize
from feature_repo.postgres_load import load_tables
from feature_repo.postgres_session import Database
from feature_repo.profiles import open_store
from feature_repo.services.postgres import DATABASE
from tests.feature_repo.conftest import write_files
from tests.feature_repo.test_reader import build


@contextmanager
def live_kitchen(folder: Path, request: pytest.FixtureRequest) -> Iterator[Home]:
    """A home whose features are in the stores of every profile; the servers are the tests'."""
    write_files(folder)
    home = Home(folder / "home")
    build(home, folder)
    postgres = request.getfixturevalue("postgres")
    redis_server = request.getfixturevalue("redis_server")
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    with redis.Redis(port=redis_server.port) as client:
        client.flushall()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DATABASE_URL, postgres.url.replace(f"/{DATABASE}?", f"/{name}?"))
        patch.setenv(REDIS_URL, redis_server.url)
        apply(home, "production")
        load_tables(home, Database(open_store(home, "production").config.offline_store))
        materialize(home, "production")
        yield home
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def newest_row(live: LiveStore, view: FeatureView, key: str) -> pa.RecordBatch:
    """What :meth:`OnlineWriter.write` takes: the newest row of a key, a batch of one."""
    (column,) = view.entity_columns
    _, batches = live.offline.newest_rows(
        view.name, start=live.manifest.first_event, end=live.now, batch_rows=10_000
    )
    (row,) = [
        found
        for batch in batches
        if (found := batch.filter(pc.equal(batch.column(column.name), key))).num_rows
    ]
    return row
