"""Live events in the stores: the rows that a batch would have built of the same events."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.behavior import behavior_id, item_key
from feature_repo.catalog import Catalog
from feature_repo.errors import StoreError
from feature_repo.fields import EVENT_TIMESTAMP
from feature_repo.home import Home
from feature_repo.live_events import EventJournal
from feature_repo.live_rows import JournalEvent
from feature_repo.manifest import DataClock, load_manifest
from feature_repo.materialize import materialize
from feature_repo.moments import micros, moment_of
from feature_repo.offline_files import LIVE_PART
from feature_repo.online import open_writer
from feature_repo.parity import check_parity
from feature_repo.profiles import PROFILES, open_store
from feature_repo.progress import Progress
from feature_repo.push import LivePush, event_table, newest_rows, stored_events
from feature_repo.reader import FeatureReader
from feature_repo.sequences import VIEW, sequence_rows
from feature_repo.view_reader import Join
from tests.feature_repo.event_tables import DAY, Event, make_manifest, write_tables
from tests.live_home import NUM_USERS, live_home, nightly

USERS = [f"u{n}" for n in range(NUM_USERS)]
HOUR = 3_600_000_000


def live(
    user: str, time: int, *, text: str = "word1 word2", scene: str = "buy", item: str | None = "i1"
) -> JournalEvent:
    return JournalEvent(uuid.uuid4().hex, user, scene, text, behavior_id(text), item, time)


# The row alone.
SMALL = st.builds(
    JournalEvent,
    event_id=st.just(""),
    user_id=st.sampled_from(["ann", "bob", "cé"]),
    scene=st.sampled_from(["buy", "view"]),
    text=st.just(""),
    behavior_id=st.integers(2**53 + 1, 2**53 + 3),
    item_id=st.sampled_from([None, "A", "B"]),
    # Several within a second, several at one microsecond.
    time=st.sampled_from([DAY, DAY + 1, DAY + 2, DAY + 1_000_000, 2 * DAY]),
)


@settings(max_examples=8, derandomize=True, deadline=None)
@given(st.lists(SMALL, min_size=1, max_size=25), st.integers(1, 4))
def test_the_newest_row_is_that_of_the_batch(events: list[JournalEvent], length: int) -> None:
    plain = [Event(e.user_id, e.time, e.scene, e.behavior_id, e.item_id) for e in events]
    manifest = make_manifest(plain, ["buy", "view"], length=length, delay=7)
    found = newest_rows(event_table(events), manifest).to_pylist()
    once = pa.Table.from_pylist(
        [dict(row) for row in {tuple(r.items()) for r in event_table(events).to_pylist()}],
        schema=event_table([]).schema,
    )
    rows = sequence_rows(ibis.memtable(once), ("buy", "view"), length=length, delay_us=7)
    newest: dict[str, dict[str, Any]] = {}
    for row in sorted(rows.to_pyarrow().to_pylist(), key=lambda row: row[EVENT_TIMESTAMP]):
        newest[row["user_id"]] = row
    assert {row["user_id"]: row for row in found} == {
        user: row | {"created_timestamp": row[EVENT_TIMESTAMP]} for user, row in newest.items()
    }


def test_a_scene_that_is_gone_is_passed_over() -> None:
    manifest = make_manifest([Event("ann", DAY, "buy", 5)], ["buy"])
    (row,) = newest_rows(
        event_table([live("ann", DAY), live("ann", 2 * DAY, scene="view")]), manifest
    ).to_pylist()
    assert (row["buy_total"], row[EVENT_TIMESTAMP]) == (1, moment_of(DAY + 1))


def test_no_events_are_no_rows() -> None:
    manifest = make_manifest([Event("ann", DAY, "buy", 5)], ["buy"])
    assert newest_rows(event_table([]), manifest).num_rows == 0


def test_stored_events_are_those_of_the_users_alone(tmp_path: Path) -> None:
    events = [Event(f"user {n % 50}", DAY + n, "buy", n + 1) for n in range(500)]
    manifest = make_manifest(events, ["buy"], num_buckets=4)
    home = write_tables(tmp_path, events, manifest)
    read, table = stored_events(home, ["user 3", "user 17", "nobody"])
    assert read == manifest
    assert sorted(set(table["user_id"].to_pylist())) == ["user 17", "user 3"]
    assert table.num_rows == 20


# The stores of both profiles.
@dataclass
class Live:
    home: Home
    profile: str
    journal: EventJournal
    push: LivePush
    reader: FeatureReader

    def take(self, *events: JournalEvent) -> None:
        """What the service does with events whose texts are known."""
        self.journal.add(events)
        self.push.push(self.journal.pending_users([event.event_id for event in events]))

    def now(self) -> int:
        return micros(DataClock(self.home)())

    def online(self, user: str, scene: str = "buy") -> tuple[list[int], int]:
        """Behaviour ids, oldest first, and the total."""
        users = self.reader.online_users([user])
        return _one(users.sequences[scene])

    def offline(self, user: str, at: int, scene: str = "buy") -> tuple[list[int], int]:
        users = self.reader.historical_users([user], np.array([at]))
        return _one(users.sequences[scene])

    def mismatches(self, join: Join = "fast") -> int:
        return check_parity(self.home, self.profile, sample=200, join=join).mismatches


def _one(sequence: Any) -> tuple[list[int], int]:
    return sequence.behavior_ids[0][sequence.mask[0]].tolist(), int(sequence.total[0])


@pytest.fixture(scope="module", params=PROFILES)
def stores(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    profile = str(request.param)
    folder = tmp_path_factory.mktemp(profile)
    with live_home(folder, profile, request) as home:
        journal = EventJournal.open(home, profile, load_manifest(home).dataset)
        store = open_store(home, profile)
        push = LivePush(home, store, open_writer(store), journal)
        yield Live(home, profile, journal, push, FeatureReader(home, profile))
        journal.close()


def test_an_event_is_online_and_offline_from_its_moment_on(stores: Live) -> None:
    before, total = stores.online("u1")
    time = stores.now()
    stores.take(live("u1", time))
    expected = ([*before, behavior_id("word1 word2")][-10:], total + 1)
    assert stores.online("u1") == expected
    assert stores.offline("u1", stores.now()) == expected
    assert stores.offline("u1", time) == (before, total)  # the event's own moment: no leak
    assert stores.offline("u1", time + 1) == expected
    assert stores.mismatches() == 0


def test_a_new_user_is_known(stores: Live) -> None:
    stores.take(live("fresh", stores.now(), text="word8"), live("fresh", stores.now() + 1))
    assert stores.online("fresh") == ([behavior_id("word8"), behavior_id("word1 word2")], 2)
    assert stores.offline("fresh", stores.now()) == stores.online("fresh")
    users = stores.reader.online_users(["fresh"])
    assert users.found.tolist() == [True]
    assert np.isnan(users.dense).all()  # statistics are those of the last build


def test_a_late_event_falls_into_its_place_and_moves_no_clock(stores: Live) -> None:
    stores.take(live("u2", stores.now(), text="word7"))
    now = stores.now()
    before, total = stores.online("u2")
    stores.take(live("u2", now - HOUR, text="word6"))
    assert stores.now() == now
    after, new_total = stores.online("u2")
    assert new_total == total + 1
    assert after == [*before[1:-1], behavior_id("word6"), behavior_id("word7")]
    assert stores.offline("u2", now) == (after, new_total)
    assert behavior_id("word6") in stores.offline("u2", now - HOUR + 1)[0]
    assert behavior_id("word6") not in stores.offline("u2", now - HOUR)[0]
    assert stores.mismatches("feast") == 0


def test_an_event_that_the_tables_hold_counts_once(stores: Live) -> None:
    _, table = stored_events(stores.home, ["u3"])
    row = table.slice(table.num_rows - 1).to_pylist()[0]
    before = stores.online("u3", row["scene"])
    text = Catalog.load(stores.home).text_by_id[row["behavior_id"]]
    item = next(f"i{n}" for n in range(40) if item_key(f"i{n}") == row["item_key"])
    time = micros(row[EVENT_TIMESTAMP])
    stores.take(live("u3", time, text=text, scene=row["scene"], item=item))
    assert stores.online("u3", row["scene"]) == before


def test_events_left_by_a_kill_are_applied_at_the_start(stores: Live) -> None:
    event = live("u4", stores.now(), text="word9")
    stores.journal.add([event])  # and killed
    assert behavior_id("word9") not in stores.online("u4")[0]
    assert stores.push.recover() == 1
    assert stores.online("u4")[0][-1] == behavior_id("word9")
    total = stores.online("u4")[1]
    stores.push.push(["u4"])  # once more changes nothing
    assert stores.online("u4")[1] == total
    assert stores.push.recover() == 0


def test_events_that_a_crashed_online_store_has_forgotten_are_there_after_a_start(
    stores: Live,
) -> None:
    stores.take(live("u4", stores.now(), text="word5"))
    applied = stores.online("u4")
    store = open_store(stores.home, stores.profile)
    open_writer(store).delete(
        store.get_feature_view(VIEW), pa.array(["u4"]), until=moment_of(stores.now())
    )
    assert stores.online("u4") == ([], 0)
    assert stores.push.recover() == 0  # none of them was pending
    assert stores.online("u4") == applied
    # Those of long ago stay as they are: a start takes no longer for them.
    assert stores.journal.newest_users(1) == ["u4"]


def test_a_late_event_that_comes_during_a_copy_is_online_after_it(stores: Live) -> None:
    now = stores.now()
    stores.take(live("u5", now, text="word3"))
    sent: list[str] = []

    @contextmanager
    def bars(view: str) -> Iterator[Progress]:
        def progress(advance: int, total: int, **figures: float) -> None:
            if view == "user_sequences" and not sent:
                sent.append(view)
                stores.take(live("u5", now - HOUR, text="word4"))

        yield progress

    materialize(stores.home, stores.profile, full=True, bars=bars)
    assert sent
    assert stores.online("u5")[0][-2:] == [behavior_id("word4"), behavior_id("word3")]
    assert stores.mismatches() == 0


def test_the_nightly_run_keeps_live_events_and_makes_the_same_rows(stores: Live) -> None:
    stores.take(*(live("u6", stores.now() + n, text=f"word{n}") for n in range(5)))
    rows = {user: stores.online(user) for user in [*USERS, "fresh"]}
    past = stores.now() - HOUR
    earlier = {user: stores.offline(user, past) for user in USERS}
    assert (stores.home.view("user_sequences") / LIVE_PART).exists()
    nightly(stores.home, stores.profile)
    assert not (stores.home.view("user_sequences") / LIVE_PART).exists()
    manifest = load_manifest(stores.home)
    assert manifest.live_sequence == stores.journal.last_sequence()
    assert micros(manifest.now()) == stores.now()
    assert {user: stores.online(user) for user in rows} == rows
    assert {user: stores.offline(user, stores.now()) for user in rows} == rows
    assert {user: stores.offline(user, past) for user in USERS} == earlier
    # And goes on.
    stores.take(live("u6", stores.now(), text="word5"))
    assert stores.online("u6")[0][-1] == behavior_id("word5")
    nothing_new = materialize(stores.home, stores.profile)
    assert stores.mismatches() == 0
    sequences = next(view for view in nothing_new if view.name == "user_sequences")
    assert sequences.num_rows < NUM_USERS  # not copied as a whole, for all that live events did


class Replaced(Home):
    """A home whose tables other ingests replace, each just after the manifest was read."""

    ingests: list[Callable[[], object]]

    @property
    def events(self) -> Path:
        if self.ingests:
            self.ingests.pop(0)()
        return super().events


@pytest.mark.parametrize("num_ingests", [1, 1000])
def test_manifest_and_events_are_of_one_ingest(tmp_path: Path, num_ingests: int) -> None:
    events = [Event("ann", DAY, "buy", 5)]
    more = [*events, Event("ann", DAY + 1, "fly", 6)]
    manifest = make_manifest(more, ["buy", "fly"])
    write_tables(tmp_path, events, make_manifest(events, ["buy"]))

    def ingest(number: int) -> None:
        version = manifest.model_copy(update={"source_fingerprint": f"{number}"})
        write_tables(tmp_path, more, version)

    home = Replaced(tmp_path)
    object.__setattr__(home, "ingests", [partial(ingest, n) for n in range(num_ingests)])
    if num_ingests == 1:
        read, table = stored_events(home, ["ann"])
        assert read.scenes == ("buy", "fly")
        assert table.num_rows == 2
    else:
        with pytest.raises(StoreError, match="are replaced time after time"):
            stored_events(home, ["ann"])
