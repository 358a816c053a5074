"""After a step: what it wrote is what the production profile reads, value by value."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from feature_repo.cli import sequences
from feature_repo.command import SentenceGroup, Settings
from feature_repo.home import Home
from feature_repo.materialize import apply
from feature_repo.publish import publish
from feature_repo.reader import FeatureReader
from feature_repo.services.processes import free_port
from feature_repo.view_reader import Join
from tests.feature_repo.conftest import write_files
from tests.feature_repo.test_reader import assert_equal, build


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("publish")
    write_files(folder)
    built = Home(folder / "home")
    build(built, folder)
    return built


@pytest.fixture
def production(
    home: Home, database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    monkeypatch.setenv("DATABASE_URL", database_url)
    monkeypatch.setenv("REDIS_URL", redis_url)
    return Settings(home, "production")


def test_the_embedded_profile_reads_the_files_themselves(home: Home) -> None:
    assert publish(Settings(home, "embedded")) == {}


def test_what_is_loaded_is_read_as_from_files(production: Settings) -> None:
    home = production.home
    loaded = publish(production)["loaded"]
    views = ("user_sequences", "user_stats", "items", "item_neighbors")
    assert loaded.keys() == {
        *(f"canonical_{name}" for name in ("events", "items", "impressions", "behaviors")),
        "behavior_embeddings_abc",
        *views,
    }
    for view in views:
        paths = sorted(home.view(view).glob("*.parquet"))
        assert loaded[view] == sum(pq.read_metadata(path).num_rows for path in paths)
    assert publish(production) == {"loaded": {}}

    apply(home, "production")
    embedded, reader = FeatureReader(home), FeatureReader(home, "production")
    # Feast's join compares every request with every row: a few requests must do.
    rows = pq.read_table(home.impressions).to_pandas()[::67]
    moments = rows["event_timestamp"].astype("datetime64[us, UTC]").astype(np.int64).to_numpy()
    shifts = (-2, -1, 0, 1)
    times = np.concatenate([moments + shift for shift in shifts])
    users = np.tile(rows["user_id"].to_numpy(object), len(shifts))
    items = np.tile(rows["item_id"].to_numpy(object), len(shifts))
    users[::11] = "nobody"
    items[::11] = "nothing"
    expected_users = embedded.historical_users(users, times)
    expected_items = embedded.historical_items(items, times)
    joins: tuple[Join, ...] = ("fast", "feast")
    for join in joins:
        assert_equal(reader.historical_users(users, times, join=join), expected_users)
        assert_equal(reader.historical_items(items, times, join=join), expected_items)
    behaviors = pq.read_table(home.behaviors)["behavior_id"].to_numpy()
    vectors = reader.vectors(behaviors, source="offline")
    assert vectors.tobytes() == embedded.vectors(behaviors, source="offline").tobytes()
    assert not np.isnan(vectors).any()


def test_a_step_says_what_it_loaded_and_survives_a_server_that_is_away(
    production: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = SentenceGroup(commands=[sequences])
    done = CliRunner().invoke(group, ["sequences"], obj=production, catch_exceptions=False)
    assert done.exit_code == 0
    assert '"loaded": {"canonical_events":' in done.stdout
    port = free_port()
    monkeypatch.setenv("DATABASE_URL", f"postgresql://u:secret@127.0.0.1:{port}/shop")
    done = CliRunner().invoke(group, ["sequences"], obj=production, catch_exceptions=False)
    assert done.exit_code == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "secret" not in done.stderr
