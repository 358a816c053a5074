"""The log of served features: which requests, what of them, in which files, and what is lost."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from feature_repo.behavior import behavior_id, hash63
from feature_repo.errors import LongtrailError, MissingStepError, NothingToCompareError, StoreError
from feature_repo.home import Home
from feature_repo.served_files import (
    read_served,
    request_ids,
    served_files,
    write_served,
)
from feature_repo.served_impressions import join_clicks
from feature_repo.served_rows import SCHEMA, ServedRequest, neighbor_hashes
from serving.answers import Ranking
from serving.app import create_app
from serving.deployment import Deployment
from serving.served_log import ServedLog
from tests import waiting
from tests.serving.conftest import FINGERPRINT, ITEMS, NOW, RUN, World
from tests.serving.stand_in import client_of, toy_directory

wait_until = partial(waiting.wait_until, most_s=10, poll_s=0.01)
SERVED_AT = datetime(2024, 6, 1, 12, 0, 5, 678, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "log")


@pytest.fixture
def ranking(world: World) -> Ranking:
    """Of ann, three of all items returned."""
    return world.ranker().rank("ann", top_k=3, context={"slot": 2.0})


def make_log(home: Home, **changes: Any) -> ServedLog:
    options: dict[str, Any] = {"share": 1.0, "flush_s": 60.0, "clock": lambda: SERVED_AT}
    return ServedLog(home.served, **options | changes)


def logged(home: Home, *request_ids: str) -> list[ServedRequest]:
    """Of some ids, or all that are there."""
    files = served_files(home)
    wanted = set(request_ids) or {
        name for file in files for name in pq.read_table(file)["request_id"].to_pylist()
    }
    return [request for file in files for request in read_served(file, wanted)]


def test_a_row_holds_what_the_ranking_was_computed_from(home: Home, ranking: Ranking) -> None:
    log = make_log(home)
    log.record(ranking, {"slot": 2.0}, "r1")
    log.close()
    assert (log.num_written, log.num_dropped) == (1, 0)
    (file,) = served_files(home)
    assert file.parent == home.served / "date=2024-06-01"
    with pq.ParquetFile(file) as parquet:
        assert parquet.schema_arrow == SCHEMA

    (request,) = logged(home)
    assert (request.request_id, request.served_at) == ("r1", SERVED_AT)
    assert (request.run, request.encoder, request.path) == (RUN, FINGERPRINT, ranking.path)
    assert (request.degraded, request.context) == ((), {"slot": 2.0})
    assert (request.items_at, request.num_scored, request.num_returned) == (NOW, len(ITEMS), 3)

    user = request.user
    assert (user.user_ids.tolist(), user.found.tolist()) == (["ann"], [True])
    assert user.request_times.tolist() == [int(NOW.timestamp()) * 1_000_000]
    assert (user.dense.tolist(), user.dense_names) == ([[0.5]], ("activity",))
    purchases, searches = user.sequences["purchase"], user.sequences["search"]
    assert purchases.behavior_ids.tolist() == [[behavior_id("red lamp")] * 2]
    assert purchases.item_keys.tolist() == [[hash63("L1")] * 2]
    days = [(NOW.timestamp() - seconds) / 86_400 for seconds in purchases.timestamps[0]]
    assert days == [40, 12]
    assert (purchases.total.tolist(), searches.total.tolist()) == ([2], [1])
    assert searches.item_keys.tolist() == [[0]]

    items = request.items
    assert items.item_ids[:3].tolist() == [item.item_id for item in ranking.ranked]
    scores = 1 / (1 + np.exp(-items.logits[:3]))
    assert scores == pytest.approx([item.score for item in ranking.ranked], abs=1e-6)
    assert (np.diff(items.logits) <= 0).all()
    assert items.dense_names == ("price", "purchase_count_30d")
    assert items.category_names == ("kind",)
    served = ranking.served
    assert served is not None
    for place, item_id in enumerate(items.item_ids):
        item = ITEMS[item_id]
        np.testing.assert_array_equal(
            items.dense[place], np.array([item.price, item.recent], dtype=np.float32)
        )
        assert items.text_ids[place] == behavior_id(item.text)
        assert items.categories[place] == [{"lamp": 1, "boat": 2}.get(item.kind or "", 0)]
        row = served.items.row[item_id]
        inputs = served.items.inputs
        expected = neighbor_hashes(inputs.neighbor_keys[[row]], inputs.neighbor_weights[[row]])
        assert items.neighbors[place] == expected[0]
    near = dict(zip(items.item_ids, items.neighbors, strict=True))
    assert near["B2"] != near["B1"]
    assert near["B1"] == near["L1"]  # neither has a neighbour


def test_the_best_items_are_kept_and_the_number_of_all(home: Home, world: World) -> None:
    ranker = world.ranker()
    whole, two = ranker.rank("ann", top_k=6), ranker.rank("bob", candidates=["A1", "GONE", "B1"])
    log = make_log(home, max_items=5)
    log.record(whole, {}, "whole")
    log.record(two, {}, "two")
    log.close()
    first, second = logged(home)
    # A1 and A2 tie: the smaller id stays.
    assert first.items.item_ids.tolist() == [item.item_id for item in whole.ranked[:5]]
    assert (first.num_scored, first.num_returned, len(first.items.logits)) == (6, 6, 5)
    assert second.items.item_ids.tolist() == ["B1", "A1"]
    assert (second.num_scored, second.num_returned) == (2, 2)
    assert first.context == {}


def test_items_without_a_score_and_users_without_a_history(home: Home, world: World) -> None:
    ranking = world.ranker().rank("nobody")
    served = ranking.served
    assert served is not None
    logits = served.logits.copy()
    logits[:2] = np.nan
    degraded = replace(
        ranking,
        degraded=("the feature store does not answer: ranked with an empty history",),
        served=replace(served, logits=logits),
    )
    log = make_log(home)
    log.record(degraded, {}, "r1")
    log.close()
    (request,) = logged(home)
    assert not request.user.found[0]
    assert request.user.sequences["search"].behavior_ids.shape == (1, 0)
    assert np.isnan(request.user.dense).all()
    assert request.degraded == degraded.degraded
    assert len(request.items.item_ids) == len(ITEMS) - 2
    assert not np.isnan(request.items.logits).any()


def test_the_same_requests_are_logged_everywhere(home: Home, ranking: Ranking) -> None:
    ids = [f"request-{n}" for n in range(400)]
    log = make_log(home, share=0.25, max_queue=400)
    for name in ids:
        log.record(ranking, {}, name)
    log.close()
    found = {request.request_id for request in logged(home)}
    assert found == {name for name in ids if hash63(name) < 0.25 * 2**63}
    assert 60 < len(found) < 140
    none, all_of_them = make_log(home, share=0), make_log(home, share=1)
    assert not any(none.wants(name) for name in ids)
    assert all(all_of_them.wants(name) for name in ids)
    for one in (none, all_of_them):
        one.close()


def test_an_answer_that_says_nothing_of_its_features_is_left_out(
    home: Home, ranking: Ranking
) -> None:
    log = make_log(home)
    log.record(replace(ranking, served=None), {}, "what-if")
    log.close()
    log.record(ranking, {}, "too late")
    assert log.num_written == 0
    with pytest.raises(MissingStepError, match="no served request is logged in"):
        served_files(home)


def test_a_file_comes_with_enough_rows_or_after_some_time(home: Home, ranking: Ranking) -> None:
    log = make_log(home, flush_rows=2, flush_s=1.0)
    for n in range(5):
        log.record(ranking, {}, f"r{n}")
    wait_until(lambda: log.num_written == 5)
    log.record(ranking, {}, "later")
    log.close()
    sizes = [pq.read_metadata(file).num_rows for file in served_files(home)]
    assert sorted(sizes) == [1, 1, 2, 2]
    assert not list(home.served.rglob("*.part"))


def test_days_are_folders_and_may_be_chosen(home: Home, ranking: Ranking) -> None:
    moments = iter([SERVED_AT, SERVED_AT + timedelta(days=1), SERVED_AT + timedelta(days=2)])
    log = make_log(home, clock=lambda: next(moments))
    for n in range(3):
        log.record(ranking, {}, f"r{n}")
    log.close()
    since = served_files(home, since=(SERVED_AT + timedelta(days=1)).date())
    assert [file.parent.name for file in since] == ["date=2024-06-02", "date=2024-06-03"]
    with pytest.raises(NothingToCompareError, match="since 2024-06-04"):
        served_files(home, since=(SERVED_AT + timedelta(days=3)).date())
    assert [request.request_id for request in logged(home, "r1")] == ["r1"]


def test_a_full_queue_drops_and_counts_and_nobody_waits(
    home: Home, ranking: Ranking, caplog: pytest.LogCaptureFixture
) -> None:
    writing, go_on = threading.Event(), threading.Event()

    class SlowLog(ServedLog):
        def _write(self, rows: list[ServedRequest]) -> None:
            writing.set()
            go_on.wait(10)
            super()._write(rows)

    log = SlowLog(home.served, share=1.0, max_queue=3, flush_rows=1)
    log.record(ranking, {}, "first")
    assert writing.wait(10)
    began = time.perf_counter()
    for n in range(10):
        log.record(ranking, {}, f"r{n}")
    assert time.perf_counter() - began < 5
    assert log.num_dropped == 7
    assert "lost 1 requests, 7 in all: its queue is full" in caplog.text
    go_on.set()
    log.close()
    assert log.num_written == 4


def test_a_disk_that_takes_nothing_loses_rows_and_nothing_else(
    home: Home, ranking: Ranking, caplog: pytest.LogCaptureFixture
) -> None:
    home.root.mkdir()
    home.served.write_text("a file where the folder should be")
    log = make_log(home, flush_rows=1)
    log.record(ranking, {}, "r1")
    wait_until(lambda: log.num_dropped == 1)
    home.served.unlink()
    log.record(ranking, {}, "r2")
    log.close()
    assert (log.num_written, log.num_dropped) == (1, 1)
    assert "cannot be written" in caplog.text
    assert [request.request_id for request in logged(home)] == ["r2"]


def test_a_defect_loses_rows_and_nothing_else(
    home: Home, ranking: Ranking, caplog: pytest.LogCaptureFixture
) -> None:
    """In what a request is picked from, in its row, and in what is written of it."""
    served = ranking.served
    assert served is not None

    def with_categories(values: Any) -> Ranking:
        inputs = replace(served.items.inputs, candidate_categories=values)
        return replace(ranking, served=replace(served, items=replace(served.items, inputs=inputs)))

    no_numbers = np.full(served.items.inputs.candidate_categories.shape, "boat")
    no_path: Any = object()
    broken = (with_categories(None), with_categories(no_numbers), replace(ranking, path=no_path))
    log = make_log(home, flush_rows=1)
    for one in broken:
        log.record(one, {}, "broken")
    log.record(ranking, {}, "whole")
    log.close()
    assert [request.request_id for request in logged(home)] == ["whole"]
    assert (log.num_written, log.num_dropped) == (1, 3)
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_many_threads_and_two_logs_share_a_folder(home: Home, ranking: Ranking) -> None:
    logs = [make_log(home, flush_rows=7, max_queue=100) for _ in range(2)]

    def record(start: int) -> None:
        for n in range(start, start + 20):
            logs[n % 2].record(ranking, {}, f"r{n}")

    threads = [threading.Thread(target=record, args=(20 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()
    found = sorted(request.request_id for request in logged(home))
    assert found == sorted(f"r{n}" for n in range(80))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"share": 1.5}, r"share of logged requests must be in \[0, 1\], got 1.5"),
        ({"share": float("nan")}, "got nan"),
        ({"max_queue": 0}, "max_queue must be at least 1, got 0"),
        ({"flush_rows": 0}, "flush_rows must be at least 1"),
        ({"max_items": 0}, "max_items must be at least 1"),
        ({"flush_s": 0.0}, "flush_s must be above 0 seconds, got 0.0"),
    ],
)
def test_numbers_out_of_range_are_refused(home: Home, wrong: dict[str, Any], sentence: str) -> None:
    with pytest.raises(LongtrailError, match=sentence):
        make_log(home, **wrong)


_ENDLESS = """
import sys, time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from feature_repo.home import Home
from feature_repo.served_files import read_served, served_files, write_served
home = Home(Path(sys.argv[1]))
(request,) = read_served(served_files(home)[0], {"seed"})
print("ready", flush=True)
for n in range(1_000_000):
    write_served(home.served, [replace(request, request_id=f"{n}-{k}") for k in range(20)])
"""


@pytest.fixture
def writer(home: Home, ranking: Ranking) -> Iterator["subprocess.Popen[str]"]:
    """A process that writes file after file."""
    log = make_log(home)
    log.record(ranking, {}, "seed")
    log.close()
    process = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, str(home.root)],
        stdout=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def test_a_kill_leaves_no_broken_file(home: Home, writer: "subprocess.Popen[str]") -> None:
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    wait_until(lambda: len(served_files(home)) > 5)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    requests = logged(home)
    whole = [file for file in served_files(home) if pq.read_metadata(file).num_rows == 20]
    assert len(whole) == len(served_files(home)) - 1  # and the seed's
    assert len(requests) == 20 * len(whole) + 1


def test_rows_may_have_no_items_no_scenes_and_any_text(home: Home, ranking: Ranking) -> None:
    served = ranking.served
    assert served is not None
    empty = replace(
        served, items=served.items.take(np.zeros(0, dtype=np.intp)), logits=served.logits[:0]
    )
    log = make_log(home)
    log.record(replace(ranking, served=empty, ranked=()), {"ä": -0.0}, "\u65e5\u672c/'\"\n")
    log.close()
    (request,) = logged(home)
    assert request.request_id == "\u65e5\u672c/'\"\n"
    assert request.items.dense.shape == (0, 2)
    assert request.num_returned == 0
    bare = replace(request, user=replace(request.user, sequences={}), request_id="bare")
    whole = replace(request, request_id="whole")
    write_served(home.served, [bare, whole])
    again, beside = logged(home, "bare", "whole")
    assert again.user.sequences == {}
    assert str(again.context["ä"]) == "-0.0"
    # Numbers above 2**53 beside a row without any.
    ids = beside.user.sequences["purchase"].behavior_ids
    assert ids.tolist() == [[behavior_id("red lamp")] * 2]


def test_a_file_that_is_none_of_the_log_is_named(home: Home, ranking: Ranking) -> None:
    log = make_log(home)
    log.record(ranking, {}, "r1")
    log.close()
    (file,) = served_files(home)
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["run"]), file)
    with pytest.raises(StoreError, match=f"{file} is not of the form that this version logs"):
        request_ids(file)
    file.write_bytes(b"PAR1 and no more")
    for read in (lambda: request_ids(file), lambda: list(read_served(file, {"r1"}))):
        with pytest.raises(StoreError, match=f"{file} cannot be read .*: move it away"):
            read()


def test_clicks_that_name_the_ids_of_answers_join(home: Home, world: World, tmp_path: Path) -> None:
    log = make_log(home)
    app = create_app(Deployment(world.ranker()), directory=toy_directory(), served_log=log)
    requests = [{"user_id": user_id, "top_k": 3} for user_id in ("ann", "bob", "idle")]
    with client_of(app) as client:
        answers = [
            *client.post("/v1/rank:batch", json={"requests": requests}).json()["results"],
            client.post("/v1/rank", json=requests[0]).json(),
        ]
    log.close()
    # Of every answer the second item: one alone has the id of nothing else.
    clicked = [(answer["request_id"], answer["ranked"][1]["item_id"]) for answer in answers]
    assert len(dict(clicked)) == 4
    values = ", ".join(f"('{name}', '{item}')" for name, item in clicked)
    out = tmp_path / "shown.parquet"
    joined = join_clicks(
        home,
        f"SELECT * FROM (VALUES {values}) given(request_id, item_id)",
        out,
        window=timedelta(hours=1),
        now=SERVED_AT + timedelta(days=1),
    )
    assert (joined.requests, joined.impressions, joined.clicked) == (4, 12, 4)
    assert (joined.repeated_requests, joined.unmatched_clicks) == (0, 0)
    rows = pq.read_table(out, columns=["request_id", "item_id", "clicked"]).to_pylist()
    assert {(row["request_id"], row["item_id"]) for row in rows if row["clicked"]} == set(clicked)
