"""A home that can take live events: texts, a tiny encoder, a run that is served, both profiles.

For the tests of live events; the data set is that of :mod:`tests.faults.world`.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import redis
import torch
from transformers import BertConfig, BertModel

from encoders.config import EncoderConfig
from encoders.encode import encode_behaviors
from feature_repo.artifact import set_current_run
from feature_repo.cli import build_features
from feature_repo.command import Settings
from feature_repo.connections import DATABASE_URL, REDIS_URL
from feature_repo.dataset import LoadedDataSet, load_dataset
from feature_repo.home import Home
from feature_repo.ingest import ingest
from feature_repo.live_events import live_source
from feature_repo.manifest import load_encoder, load_manifest
from feature_repo.materialize import apply, materialize
from feature_repo.publish import FILES_PROFILE, publish
from feature_repo.services.postgres import DATABASE
from tests.encoders.conftest import SIZES, save
from tests.faults.world import write_data
from tests.serving.conftest import toy_manifest

RUN = "live-run"
NUM_USERS = 12


def make_home(folder: Path) -> Home:
    """Canonical tables, vectors and features; nothing applied yet."""
    write_data(folder / "data", num_users=NUM_USERS, num_events=400)
    torch.manual_seed(0)
    save(BertModel(BertConfig(max_position_embeddings=64, **SIZES)), folder / "bert")
    home = Home(folder / "home")
    ingest(home, data_set(home))
    build(home, FILES_PROFILE)
    manifest = load_manifest(home)
    run = toy_manifest(
        run=RUN,
        scenes=manifest.scenes,
        encoder_fingerprint=load_encoder(home).fingerprint,
        encoder_width=load_encoder(home).width,
    )
    (home.runs / RUN).mkdir(parents=True)
    run.save(home.runs / RUN / "manifest.json")
    set_current_run(home, RUN)
    return home


def data_set(home: Home) -> LoadedDataSet:
    """The data set file of a home of :func:`make_home`."""
    return load_dataset(home.root.parent / "data" / "data.toml")


def build(home: Home, profile: str) -> None:
    """Vectors and features of the tables as they are."""
    config = EncoderConfig(
        model=str(home.root.parent / "bert"), split_layer=2, max_tokens=16, part_texts=5000
    )
    encode_behaviors(home, config)
    build_features(Settings(home, profile), threads=1)


def nightly(home: Home, profile: str) -> None:
    """The batch pipeline once more, as the commands run it: ingest, encode, sequences, the rest."""
    dataset = data_set(home)
    ingest(home, dataset, live=live_source(home, profile, dataset.content.name))
    build(home, profile)
    apply(home, profile)
    publish(Settings(home, profile))
    materialize(home, profile)


@contextmanager
def live_home(folder: Path, profile: str, request: pytest.FixtureRequest) -> Iterator[Home]:
    """A home of :func:`make_home` in the stores of a profile, all the way to the online store."""
    home = make_home(folder)
    with stores(profile, request):
        apply(home, profile)
        publish(Settings(home, profile))
        materialize(home, profile)
        yield home


@contextmanager
def stores(profile: str, request: pytest.FixtureRequest) -> Iterator[None]:
    """Addresses of a database of its own and of an empty Redis, for the profile production."""
    if profile == FILES_PROFILE:
        yield
        return
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
        yield
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
