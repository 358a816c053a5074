"""What `longtrail status` shows on both profiles, with real servers."""

import json
from datetime import UTC, datetime, timedelta

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from feature_repo.home import Home
from feature_repo.live_store import LiveStore
from feature_repo.manifest import load_manifest
from feature_repo.materialize import materialize
from feature_repo.parity import check_parity
from feature_repo.status import look
from longtrail import main

BEGAN = datetime.now(UTC) - timedelta(minutes=10)


def test_counts_freshness_and_versions_are_those_of_the_files(home: Home, profile: str) -> None:
    status = look(home, profile)
    now = load_manifest(home).now()
    assert status.now == now
    assert status.dataset == "kitchen"
    for name, view in status.views.items():
        paths = sorted(home.view(name.replace("_abc", "/abc")).glob("*.parquet"))
        rows = pq.read_table(paths).to_pandas()
        assert view.num_rows == len(rows)
        assert view.num_keys == view.online_keys == rows.iloc[:, 0].nunique()
        times = rows["event_timestamp"]
        assert view.newest_event == times[times <= now].max()  # those of clicks wait for an hour
        assert view.age_s == (now - view.newest_event).total_seconds()
        assert (view.copied_until, view.lag_s, view.pending) == (now, 0.0, False)
        assert view.version == ("abc" if name.endswith("_abc") else None)
    assert status.encoder is not None
    assert status.encoder["fingerprint"] == "abc"
    assert (status.served, status.num_runs) == (None, 0)
    done = {name for name, moment in status.steps.items() if moment is not None}
    assert done == {"ingest", "encode", "sequences", "apply", "materialize"}
    assert all(moment > BEGAN for moment in status.steps.values() if moment)


def test_rows_that_came_later_lag(home: Home, profile: str) -> None:
    record = home.materialized(profile)
    before = record.read_text(encoding="utf-8")
    copied = json.loads(before)
    state = copied["views"]["user_stats"]
    state["end"] = (datetime.fromisoformat(state["end"]) - timedelta(hours=3)).isoformat()
    state["parts"] = {}
    record.write_text(json.dumps(copied), encoding="utf-8")
    try:
        views = look(home, profile).views
    finally:
        record.write_text(before, encoding="utf-8")
    stats = views["user_stats"]
    assert stats.pending
    assert stats.newest_event is not None
    assert stats.copied_until is not None
    assert stats.lag_s == (stats.newest_event - stats.copied_until).total_seconds() > 3600
    assert not views["items"].pending


def test_the_command_prints_a_table_and_one_line_of_json(home: Home, profile: str) -> None:
    check_parity(home, profile, sample=2)
    done = CliRunner().invoke(main, ["--home", str(home.root), "--profile", profile, "status"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["ok"]
    assert told["views"]["user_stats"]["num_keys"] == 30
    assert told["parity"]["mismatches"] == 0
    assert told["parity"]["values"] > 0
    assert told["steps"]["parity"]
    assert set(told["services"]) == ({"postgres", "redis"} if profile == "production" else set())
    assert all(service["up"] and not service["local"] for service in told["services"].values())
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("user_stats")]
    assert line.split()[2:3] == ["30"]
    assert "encoder   abc" in done.stderr


@pytest.mark.parametrize("profile", ["production"])
def test_a_redis_that_is_away_is_said_and_the_rest_is_shown(
    home: Home, profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:word@127.0.0.1:1/0")
    done = CliRunner().invoke(main, ["--home", str(home.root), "--profile", profile, "status"])
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert (told["services"]["postgres"]["up"], told["services"]["redis"]["up"]) == (True, False)
    assert told["views"]["user_stats"]["online_keys"] is None
    assert told["views"]["user_stats"]["num_keys"] == 30
    assert "DOWN: Redis at 127.0.0.1:1 does not answer" in done.stderr
    assert "word" not in done.output


def test_status_changes_nothing(home: Home, profile: str) -> None:
    files = {path: path.stat().st_mtime_ns for path in home.root.rglob("*.parquet")}
    before = {view.name: view.state for view in LiveStore.open(home, profile).views}
    look(home, profile)
    assert {view.name: view.state for view in LiveStore.open(home, profile).views} == before
    assert {path: path.stat().st_mtime_ns for path in home.root.rglob("*.parquet")} == files
    assert all(copied.start is None for copied in materialize(home, profile))
