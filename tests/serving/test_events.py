"""Live events: taken once, in order, and in the next ranking, whoever is killed."""

import multiprocessing
import os
import signal
import sqlite3
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from encoders.table import EmbeddingTable
from feature_repo.behavior import behavior_id
from feature_repo.catalog import Catalog
from feature_repo.errors import LongtrailError, StoreError
from feature_repo.home import Home
from feature_repo.manifest import DataClock, load_encoder, load_manifest
from feature_repo.parity import check_parity
from feature_repo.profiles import PROFILES
from feature_repo.publish import FILES_PROFILE
from feature_repo.reader import FeatureReader
from feature_repo.services.redis import RedisServer
from serving.event_rules import LiveEvent
from serving.events import EventReceipt, EventService
from tests.feature_repo.event_tables import Event, make_manifest
from tests.live_home import live_home
from tests.servers import command

KEPT = 10  # N of the data set


def events(num: int, user: str, *, text: str = "word1 word2") -> list[LiveEvent]:
    return [LiveEvent(uuid.uuid4().hex, user, "buy", text, f"i{n % 40}") for n in range(num)]


@dataclass
class Live:
    home: Home
    profile: str
    service: EventService
    reader: FeatureReader

    def take(self, *sent: LiveEvent) -> EventReceipt:
        return self.service.accept(sent)

    def history(self, user: str, scene: str = "buy") -> list[int]:
        """Behaviour ids as the online store has them, oldest first."""
        sequence = self.reader.online_users([user]).sequences[scene]
        found: list[int] = sequence.behavior_ids[0][sequence.mask[0]].tolist()
        return found

    def total(self, user: str) -> int:
        return int(self.reader.online_users([user]).sequences["buy"].total[0])

    def is_the_same_offline(self, user: str) -> bool:
        at = self.reader.request_times(1)
        online = self.reader.online_users([user])
        offline = self.reader.historical_users([user], at)
        return all(
            np.array_equal(getattr(one, part), getattr(offline.sequences[scene], part))
            for scene, one in online.sequences.items()
            for part in ("behavior_ids", "item_keys", "timestamps", "total")
        )


@pytest.fixture(scope="module", params=PROFILES)
def live(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    profile = str(request.param)
    with live_home(tmp_path_factory.mktemp(profile), profile, request) as home:
        service = EventService.open(home, profile)
        service.warm_up()
        yield Live(home, profile, service, FeatureReader(home, profile))
        service.close()


def test_an_event_is_in_the_users_history_when_it_is_answered(live: Live) -> None:
    before = live.history("u1")
    (event,) = events(1, "u1")
    assert live.take(event) == EventReceipt(1, 0, ())
    assert live.history("u1") == [*before, behavior_id("word1 word2")][-KEPT:]
    assert live.is_the_same_offline("u1")


def test_the_same_event_again_changes_nothing(live: Live) -> None:
    sent = events(3, "u2")
    assert live.take(*sent) == EventReceipt(3, 0, ())
    total = live.total("u2")
    assert live.take(*sent, *sent[:1]) == EventReceipt(0, 4, ())
    restarted = EventService.open(live.home, live.profile)
    assert restarted.accept(sent) == EventReceipt(0, 3, ())
    restarted.close()
    assert live.total("u2") == total
    (event,) = events(1, "u2")
    assert live.take(event, event) == EventReceipt(1, 1, ())
    assert live.total("u2") == total + 1


def test_a_text_never_seen_before_is_a_behaviour_like_any_other(live: Live) -> None:
    fingerprint = load_encoder(live.home).fingerprint
    table, catalog = EmbeddingTable.open(live.home), Catalog.load(live.home)
    text = f"word3 word4 {live.profile}"
    sent = LiveEvent("new text", "u3", "buy", f"  WORD3\tword4  {live.profile.upper()} ", "i1")
    assert live.take(sent).accepted == 1
    key = behavior_id(text)  # normalised as ingest does
    assert live.history("u3")[-1] == key
    catalog.refresh()
    assert catalog.texts(np.array([key])) == [text]
    row = table.refreshed().rows(np.array([key]))[0]
    vector = table.refreshed().vectors[row]
    assert vector.any()
    for source in ("online", "offline"):
        stored = live.reader.vectors(np.array([key]), source=source, encoder=fingerprint)
        assert stored[0].tobytes() == vector.tobytes()
    assert live.is_the_same_offline("u3")


def test_events_without_a_time_keep_their_order(live: Live) -> None:
    texts = [f"word{n}" for n in (9, 3, 7, 1)]
    sent = [LiveEvent(uuid.uuid4().hex, "u4", "buy", text) for text in texts]
    assert live.take(*sent).accepted == 4
    assert live.history("u4")[-4:] == [behavior_id(text) for text in texts]
    assert live.is_the_same_offline("u4")


def test_an_item_stands_for_its_title(live: Live) -> None:
    assert live.take(LiveEvent("title", "u5", "view", None, "i7")).accepted == 1
    assert live.history("u5", "view")[-1] == behavior_id("word7 word47")
    refused = live.take(LiveEvent("no title", "u5", "view", None, "no such item"))
    assert refused.rejected[0][1].startswith("text is missing, and item_id names no item")


def test_what_cannot_be_used_is_set_aside_with_a_sentence(live: Live) -> None:
    now = DataClock(live.home)()
    good = LiveEvent("good", "u1", "buy", "word1", None, now - timedelta(days=1))
    bad: dict[str, dict[str, Any]] = {
        "event_id is missing": {"event_id": " "},
        "user_id is longer than 256 characters": {"user_id": "x" * 257},
        "user_id has a broken encoding or control characters": {"user_id": "a\x85b"},
        "item_id has a broken encoding or control characters": {"item_id": "\ud800"},
        "scene is unknown; this data set has buy, view": {"scene": "fly"},
        "text is empty": {"text": " \t "},
        "text is longer than 1000 characters": {"text": "x" * 1001},
        "text has a broken encoding (control or replacement characters)": {"text": "a\ufffd"},
        "event_timestamp has no time zone; end it with Z for UTC": {
            "event_timestamp": datetime(2024, 1, 1)  # noqa: DTZ001
        },
        "event_timestamp is before 1970-01-02": {
            "event_timestamp": datetime(1970, 1, 1, tzinfo=UTC)
        },
        f"event_timestamp is in the future: for this data set it is {now:%Y-%m-%dT%H:%M:%SZ}; "
        "leave it out for now": {"event_timestamp": now + timedelta(minutes=2)},
    }
    sent = [LiveEvent(**{**vars(good), "event_id": "e", **change}) for change in bad.values()]
    receipt = live.take(*sent, good)
    assert [sentence for _, sentence in receipt.rejected] == list(bad)
    assert [place for place, _ in receipt.rejected] == list(range(len(bad)))
    assert receipt.accepted == 1


def test_a_clock_that_is_a_little_ahead_counts_as_now(live: Live) -> None:
    now = DataClock(live.home)()
    ahead = (now + timedelta(seconds=50)).astimezone(timezone(timedelta(hours=2)))
    assert live.take(LiveEvent("ahead", "u6", "buy", "word1", None, ahead)).accepted == 1
    assert DataClock(live.home)() - now == timedelta(microseconds=1)  # the delay
    assert live.is_the_same_offline("u6")


def test_a_text_with_the_id_of_another_is_refused(live: Live) -> None:
    clash = "word5 word5 word5"
    as_it_was = live.home.behaviors.read_bytes()
    table = pq.read_table(live.home.behaviors)
    row = {**table.slice(0, 1).to_pylist()[0], "behavior_id": behavior_id(clash), "text": "else"}
    both = pa.concat_tables([table, pa.Table.from_pylist([row], schema=table.schema)])
    pq.write_table(both, live.home.behaviors)
    live.home.manifest.touch()  # as an ingest does: the service reads the tables again
    try:
        (rejected,) = live.take(LiveEvent("clash", "u1", "buy", clash)).rejected
    finally:
        live.home.behaviors.write_bytes(as_it_was)
        live.home.manifest.touch()
    assert rejected == (0, "text has the same 63-bit id as another text; change a word")
    assert live.take(LiveEvent("clash", "u1", "buy", clash)).accepted == 1


# Several processes.
def in_process(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process of its own, which has everything imported."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    return process


def send(home: Home, profile: str, batches: Sequence[Sequence[LiveEvent]]) -> None:
    service = EventService.open(home, profile)
    for batch in batches:
        service.accept(batch)
    service.close()


def test_interleaved_events_of_one_user_end_as_a_batch_would_have_them(live: Live) -> None:
    total = live.total("u7")
    shared = events(4, "u7")
    own = [[events(2, "u7", text=f"word{n} word{w}") for n in range(4)] for w in range(3)]
    # Every process sends events of its own and some that all of them send.
    workers = [
        in_process(send, live.home, live.profile, [[*batch, event] for batch, event in
                                                   zip(batches, shared, strict=True)])
        for batches in own
    ]  # fmt: skip
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert live.total("u7") == total + 3 * 8 + 4
    assert live.is_the_same_offline("u7")


def send_until_killed(home: Home, profile: str, batch: Sequence[LiveEvent], call: int) -> None:
    """Send a batch, and die by SIGKILL before the given call of a Python function."""
    service = EventService.open(home, profile)
    service.warm_up()
    left = call

    def count(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal left
        left -= event == "call"
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    service.accept(batch)


def num_calls(live: Live, batch: Sequence[LiveEvent]) -> int:
    """Calls of Python functions while a batch is being taken."""
    num = 0

    def count(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal num
        num += event == "call"

    sys.setprofile(count)
    try:
        live.take(*batch)
    finally:
        sys.setprofile(None)
    return num


def test_sigkill_at_any_moment_loses_no_event_and_applies_none_twice(live: Live) -> None:
    def batch(text: str) -> list[LiveEvent]:
        return [*events(2, "u8"), *events(1, "u9", text=text)]

    every = num_calls(live, batch(f"word1 {live.profile} 0"))
    for point in np.linspace(0.05, 0.95, 5):
        text = f"word1 {live.profile} {point}"
        sent, totals = batch(text), [live.total(user) for user in ("u8", "u9")]
        killed = in_process(send_until_killed, live.home, live.profile, sent, int(point * every))
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        receipt = live.take(*sent)  # nobody answered, so they are sent again
        assert receipt.accepted + receipt.duplicates == 3
        assert [live.total(user) for user in ("u8", "u9")] == [totals[0] + 2, totals[1] + 1]
        assert live.history("u9")[-1] == behavior_id(text)
        assert EmbeddingTable.open(live.home).rows(np.array([behavior_id(text)]))[0]
    assert check_parity(live.home, live.profile, sample=500, join="fast").mismatches == 0


@pytest.fixture
def online_store_away(live: Live, request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """The online store does not answer, until it is called: a stopped Redis, or a locked file."""
    if live.profile == FILES_PROFILE:
        holder = sqlite3.connect(live.home.online_store)
        holder.execute("BEGIN EXCLUSIVE")
        yield holder.rollback
        holder.close()
    else:
        server: RedisServer = request.getfixturevalue("redis_server")
        with redis.Redis(port=server.port) as client:
            command(client, "SAVE")
        server.stop()
        yield server.start
        server.start()


def test_an_event_is_kept_while_the_online_store_is_away(
    live: Live, online_store_away: Callable[[], None]
) -> None:
    sent = events(1, "u10")
    with pytest.raises(StoreError, match="does not answer as it should"):
        live.take(*sent)
    online_store_away()
    total = live.total("u10")
    assert live.take(*sent) == EventReceipt(0, 1, ())  # it was kept; now it is applied
    assert live.total("u10") == total + 1


def test_a_data_set_that_is_known_too_late_takes_no_live_events(tmp_path: Path) -> None:
    home = Home(tmp_path)
    make_manifest([Event("ann", 1, "buy", 5)], ["buy"], delay=3_600_000_000).save(home.manifest)
    with pytest.raises(LongtrailError, match=r"availability_delay_s of at most 0.001, got 3600"):
        EventService.open(home, "embedded")


def test_events_of_another_data_set_are_refused(live: Live) -> None:
    manifest = load_manifest(live.home)
    sent = events(1, "u11")
    manifest.model_copy(update={"dataset": "another"}).save(live.home.manifest)
    try:
        with pytest.raises(StoreError, match=f"takes events of '{manifest.dataset}'"):
            live.take(*sent)
    finally:
        manifest.save(live.home.manifest)
    assert live.take(*sent).accepted == 1
