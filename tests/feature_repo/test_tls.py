"""Our own lines to PostgreSQL and Redis through TLS, with certificates that are checked."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from feature_repo.connections import DATABASE_URL, REDIS_URL
from feature_repo.errors import StoreError
from feature_repo.home import Home
from feature_repo.live_store import LiveStore
from feature_repo.materialize import apply, materialize
from feature_repo.online import open_writer
from feature_repo.postgres_load import load_tables
from feature_repo.postgres_session import Database
from feature_repo.profiles import open_store
from feature_repo.reader import FeatureReader
from feature_repo.services.postgres import PostgresServer
from feature_repo.services.redis import RedisServer
from tests.feature_repo.conftest import write_files
from tests.feature_repo.test_reader import assert_equal, build
from tests.feature_repo.tls import tls_before, write_certificate

USERS = np.array([*(str(n) for n in range(30)), "stranger"], dtype=object)
Addresses = Callable[[Path], None]


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """The one that both servers show."""
    return write_certificate(tmp_path)[0]


@pytest.fixture
def addresses(
    postgres: PostgresServer,
    redis_server: RedisServer,
    database_url: str,
    redis_url: str,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Addresses]:
    """Sets the addresses of an empty database and an empty Redis behind TLS, for a certificate."""
    key = certificate.with_name("key.pem")
    with (
        tls_before(postgres.port, certificate, key) as database_port,
        tls_before(redis_server.port, certificate, key) as redis_port,
    ):

        def trust(trusted: Path) -> None:
            url = database_url.replace(f":{postgres.port}/", f":{database_port}/")
            checked = f"sslmode=verify-full&sslrootcert={trusted}"
            monkeypatch.setenv(DATABASE_URL, url.replace("sslmode=disable", checked))
            # Its handshakes are Python's, and the machine may be busy.
            options = f"ssl_ca_certs={trusted}&socket_timeout=10&socket_connect_timeout=10"
            monkeypatch.setenv(REDIS_URL, f"rediss://127.0.0.1:{redis_port}/0?{options}")

        assert redis_url == redis_server.url
        yield trust


def test_features_go_in_and_come_out_through_tls(
    tmp_path: Path, certificate: Path, addresses: Addresses
) -> None:
    write_files(tmp_path)
    home = Home(tmp_path / "home")
    build(home, tmp_path)
    addresses(certificate)
    apply(home, "production")
    database = Database(open_store(home, "production").config.offline_store)
    load_tables(home, database)
    assert database.read(lambda session: session.pgconn.ssl_in_use)
    materialize(home, "production", num_workers=2)
    reader, files = FeatureReader(home, "production"), FeatureReader(home)
    expected = files.online_users(USERS)
    assert expected.found.sum() == 30
    assert_equal(reader.online_users(USERS), expected)
    times = reader.request_times(len(USERS))
    assert_equal(reader.historical_users(USERS, times), expected)
    live = LiveStore.open(home, "production")
    (view,) = [view for view in live.views if view.name == "user_stats"]
    assert open_writer(live.store).count(view) == 30


def test_a_server_with_another_certificate_is_refused(
    tmp_path: Path, certificate: Path, addresses: Addresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    stranger, _ = write_certificate(tmp_path / "other")
    home = Home(tmp_path / "home")
    addresses(certificate)
    store = open_store(home, "production")
    config = store.config
    wrong = config.offline_store.model_copy(update={"sslrootcert_path": str(stranger)})
    with pytest.raises(StoreError, match="certificate verify failed"):
        Database(wrong, patience_s=0).read(lambda session: session.execute("SELECT 1"))
    address = config.online_store.connection_string.replace(str(certificate), str(stranger))
    monkeypatch.setattr(config.online_store, "connection_string", address)
    with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
        open_writer(store)
    addresses(stranger)
    with pytest.raises(StoreError, match=r"cannot be reached .*certificate verify failed"):
        open_store(home, "production")
