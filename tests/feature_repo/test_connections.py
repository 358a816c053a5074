"""Addresses as users write them, as Feast wants them, and as real servers take them."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
import redis
from feast import RepoConfig
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.infra.utils.postgres.connection_utils import _get_conn
from feast.repo_config import load_repo_config
from redis.backoff import NoBackoff
from redis.retry import Retry
from sqlalchemy import create_engine, text

from feature_repo.connections import DatabaseAddress, RedisAddress, feast_variables
from feature_repo.errors import StoreError
from feature_repo.profiles import PROFILES, REPO_FOLDER
from feature_repo.services.postgres import PostgresServer
from feature_repo.services.processes import free_port
from feature_repo.services.redis import RedisServer
from tests.feature_repo.tls import tls_before, write_certificate
from tests.servers import PASSWORD, scratch_folder

NASTY = "p,w='\"\\ $HOME:/@#%1e5é"


def configuration(database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> RepoConfig:
    """What Feast makes of production.yaml for two addresses."""
    variables = feast_variables(DatabaseAddress.parse(database_url), RedisAddress.parse(redis_url))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return load_repo_config(REPO_FOLDER, REPO_FOLDER / PROFILES["production"])


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg2"])
def test_a_database_url_says_everything(scheme: str) -> None:
    address = DatabaseAddress.parse(
        f"{scheme}://ann%40shop:{quote(NASTY, safe='')}@db.example:6543/my%20db"
        "?sslmode=verify-full&sslrootcert=/etc/ca.pem"
    )
    assert dataclasses.asdict(address) == {
        "host": "db.example",
        "port": 6543,
        "name": "my db",
        "user": "ann@shop",
        "password": NASTY,
        "sslmode": "verify-full",
        "files": {"sslrootcert": "/etc/ca.pem"},
    }
    assert DatabaseAddress.parse(f"postgresql://{address.location}") == address
    assert address.shown == "postgresql://ann@shop@db.example:6543/my db"


def test_what_a_database_url_may_leave_out() -> None:
    address = DatabaseAddress.parse("postgresql://ann@[::1]/shop")
    assert (address.host, address.port, address.password) == ("::1", 5432, "")
    assert address.sslmode == "require"
    assert DatabaseAddress.parse(f"postgresql://{address.location}") == address


def test_a_redis_url_says_everything() -> None:
    address = RedisAddress.parse(
        f"rediss://ann:{quote(NASTY, safe='')}@cache.example:6380/3"
        "?ssl_ca_certs=/etc/ca.pem&socket_timeout=2"
    )
    nodes, options = RedisOnlineStore._parse_connection_string(address.connection_string)
    assert nodes == [{"host": "cache.example", "port": "6380"}]
    assert options == {
        "username": "ann",
        "password": NASTY,
        "db": 3,
        "ssl": True,
        "ssl_ca_certs": "/etc/ca.pem",
        "socket_timeout": 2.0,
        "socket_connect_timeout": 0.2,
    }
    assert address.url == f"rediss://ann:{quote(NASTY, safe='')}@cache.example:6380/3"
    assert RedisAddress.parse("redis://a.example").url == "redis://a.example:6379/0"


def test_redis_cli_takes_the_address(secured_redis: RedisServer) -> None:
    with redis.Redis.from_url(RedisAddress.parse(secured_redis.url).url) as client:
        assert client.ping()


def test_several_hosts_are_a_cluster() -> None:
    address = RedisAddress.parse("redis://:12345@a.example,b.example:7001")
    assert address.cluster
    nodes, options = RedisOnlineStore._parse_connection_string(address.connection_string)
    assert nodes == [
        {"host": "a.example", "port": "6379"},
        {"host": "b.example", "port": "7001"},
    ]
    assert options["password"] == str(12345)  # text, not the number that JSON would make of it
    assert "db" not in options
    assert RedisAddress.parse("redis://a.example?cluster=true").cluster
    assert not RedisAddress.parse("redis://a.example").cluster


BAD_DATABASES = {
    "mysql://u:tiger@h/d": "scheme",
    "tiger": "scheme",
    "postgresql://h/d": "no user",
    "postgresql://u:tiger@/d": "no host",
    "postgresql://u:tiger@h": "no database",
    "postgresql://u:ti/ger@h/d": "host or port",
    "postgresql://u:tiger@h:many/d": "host or port",
    "postgresql://u:ti#ger@h/d": "%23",
    "postgresql://u:tiger@h/d\n": "line break",
    "postgresql://u:tiger@h/d?sslmode=tiger": "disable, allow, prefer, require",
    "postgresql://u:tiger@h/d?tiger=1": "sslmode, sslrootcert, sslcert, sslkey",
}
BAD_REDISES = {
    "http://:tiger@h": "scheme",
    "localhost:6379": "scheme",
    "redis://": "no host",
    "redis://:tiger@": "no host",
    "redis://:tiger@h,/0": "no host",
    "redis://:tiger@[::1]:1": "IPv6",
    "redis://:tiger@h:many": "host or port",
    "redis://:ti#ger@h": "%23",
    "redis://:tiger@h/tiger": "database",
    "redis://:tiger@a,b/2": "database",
    "redis://:tiger@a,b?cluster=false": "cluster",
    "redis://:tiger@h?tiger=1": "cluster, socket_timeout",
    "redis://:tiger@h?socket_timeout=tiger": "socket_timeout",
}


@pytest.mark.parametrize("url", BAD_DATABASES)
def test_a_bad_database_url_gets_a_sentence_without_its_secret(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        DatabaseAddress.parse(url)
    assert BAD_DATABASES[url] in str(caught.value)
    assert str(caught.value).startswith("DATABASE_URL cannot be used: ")
    assert "tiger" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("url", BAD_REDISES)
def test_a_bad_redis_url_gets_a_sentence_without_its_secret(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        RedisAddress.parse(url)
    assert BAD_REDISES[url] in str(caught.value)
    assert str(caught.value).startswith("REDIS_URL cannot be used: ")
    assert "tiger" not in str(caught.value)


def test_nothing_shows_a_password() -> None:
    database = DatabaseAddress.parse("postgresql://u:tiger@h/d")
    online = RedisAddress.parse("redis://u:tiger@h")
    for address in (database, online):
        assert "tiger" not in f"{address} {address!r} {address.shown}"


def test_every_variable_of_the_yaml_is_set_and_survives_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret = quote(NASTY, safe="")
    config = configuration(
        f"postgresql://u:{secret}@h/d?sslkey=/k%27.pem", f"redis://:{secret}@h/1", monkeypatch
    )
    offline = config.offline_store
    assert (offline.host, offline.port, offline.database, offline.user) == ("h", 5432, "d", "u")
    assert (offline.password, offline.sslmode) == (NASTY, "require")
    assert (offline.sslkey_path, offline.sslcert_path) == ("/k'.pem", "")
    location = f"u:{secret}@h:5432/d?sslmode=require&sslkey=/k%27.pem"
    assert config.registry.path == f"postgresql+psycopg2://{location}"
    _, options = RedisOnlineStore._parse_connection_string(config.online_store.connection_string)
    assert options["password"] == NASTY
    assert config.online_store.redis_type.value == "redis"


@pytest.fixture(scope="module")
def secured_redis() -> Iterator[RedisServer]:
    """A Redis with a password that wants quoting everywhere."""
    folder = scratch_folder()
    server = RedisServer(folder / "redis", free_port(), NASTY)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


def works(config: RepoConfig) -> None:
    """Every connection that Feast makes with a configuration."""
    with _get_conn(config.offline_store) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    engine = create_engine(config.registry.path)
    with engine.connect() as connected:
        assert connected.execute(text("SELECT 1")).scalar() == 1
    engine.dispose()
    ping(config)


def ping(config: RepoConfig) -> None:
    """Reach Redis as Feast does, but without its ten seconds of retries."""
    client = RedisOnlineStore()._get_client(config.online_store)
    client.set_retry(Retry(NoBackoff(), 0))
    assert client.ping()
    client.close()


def test_passwords_reach_real_servers(
    postgres: PostgresServer, secured_redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    works(configuration(postgres.url, secured_redis.url, monkeypatch))
    wrong = configuration(
        postgres.url.replace(quote(PASSWORD, safe=""), "wrong"),
        f"redis://:wrong@127.0.0.1:{secured_redis.port}",
        monkeypatch,
    )
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        _get_conn(wrong.offline_store)
    with pytest.raises(redis.AuthenticationError):
        ping(wrong)


def test_tls_is_spoken_and_certificates_are_checked(
    postgres: PostgresServer,
    secured_redis: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificate, key = write_certificate(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    stranger, _ = write_certificate(other)
    secret = quote(NASTY, safe="")
    with (
        tls_before(postgres.port, certificate, key) as database_port,
        tls_before(secured_redis.port, certificate, key) as redis_port,
    ):
        database_url = postgres.url.replace(str(postgres.port), str(database_port))
        for trusted, accepted in ((certificate, True), (stranger, False)):
            config = configuration(
                database_url.replace("disable", f"verify-full&sslrootcert={trusted}"),
                f"rediss://:{secret}@127.0.0.1:{redis_port}/0?ssl_ca_certs={trusted}"
                "&socket_timeout=5",
                monkeypatch,
            )
            if accepted:
                works(config)
                continue
            with pytest.raises(psycopg.OperationalError, match="certificate"):
                _get_conn(config.offline_store)
            with pytest.raises(redis.ConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
                ping(config)


def test_a_database_without_tls_is_refused_unless_asked_for(
    postgres: PostgresServer, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = postgres.url.removesuffix("?sslmode=disable")
    assert url != postgres.url
    config = configuration(url, redis_url, monkeypatch)
    with pytest.raises(psycopg.OperationalError, match="SSL"):
        _get_conn(config.offline_store)
