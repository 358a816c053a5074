"""A view's rows in a window, counted by hand from its files, on both profiles."""

from datetime import UTC, datetime, timedelta

import pyarrow.parquet as pq
import pytest

from feature_repo.home import Home
from feature_repo.profiles import open_store
from feature_repo.view_statistics import view_statistics

END = datetime(2024, 2, 1, tzinfo=UTC)
WEEK = timedelta(days=7)


def test_rows_behind_the_windows_end_count_for_nothing(home: Home, profile: str) -> None:
    files = sorted(home.view("user_stats").glob("*.parquet"))
    moments = pq.read_table(files, columns=["event_timestamp"])["event_timestamp"].to_pylist()
    assert max(moments) > END  # which gave a negative age
    store = open_store(home, profile)
    found = view_statistics(store, ["user_stats"], start=END - WEEK, end=END)["user_stats"]
    assert found.num_rows == sum(END - WEEK <= moment <= END for moment in moments)
    newest = max(moment for moment in moments if moment <= END)
    assert found.age_days == pytest.approx((END - newest) / timedelta(days=1))
    long_ago = min(moments) - WEEK
    none = view_statistics(store, ["user_stats"], start=long_ago - WEEK, end=long_ago)["user_stats"]
    assert (none.num_rows, none.age_days) == (0, None)
