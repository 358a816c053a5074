"""The journal: every event once, in order, in each profile's database."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from feature_repo.behavior import behavior_id
from feature_repo.connections import DATABASE_URL, REDIS_URL
from feature_repo.errors import StoreError
from feature_repo.home import Home
from feature_repo.live_events import EventJournal, live_source
from feature_repo.live_rows import JournalEvent
from feature_repo.postgres_session import Database, TimeLimits
from feature_repo.profiles import open_store
from feature_repo.publish import FILES_PROFILE
from feature_repo.services.postgres import PostgresServer

DATASET = "kitchen"


def event(number: int, user: str = "ann", *, text: str = "oak table") -> JournalEvent:
    return JournalEvent(
        f"e{number}", user, "buy", text, behavior_id(text), None, 1_700_000_000_000_000 + number
    )


@pytest.fixture
def place(
    profile: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Home, str]:
    """A home and a profile whose database is empty."""
    if profile != FILES_PROFILE:
        monkeypatch.setenv(DATABASE_URL, request.getfixturevalue("database_url"))
        monkeypatch.setenv(REDIS_URL, request.getfixturevalue("redis_url"))
    return Home(tmp_path / "home"), profile


@pytest.fixture
def journal(place: tuple[Home, str]) -> Iterator[EventJournal]:
    opened = EventJournal.open(*place, DATASET)
    yield opened
    opened.close()


def test_an_event_is_taken_once_also_by_another_process(
    place: tuple[Home, str], journal: EventJournal
) -> None:
    assert journal.add([event(1), event(2)]) == {"e1", "e2"}
    assert journal.add([event(2), event(3)]) == {"e3"}
    again = EventJournal.open(*place, DATASET)  # another process, or the same after a restart
    assert again.add([event(1, text="another text"), event(4)]) == {"e4"}
    assert [row.text for row in again.events(["ann"])] == ["oak table"] * 4
    again.close()
    assert journal.add([]) == set()


def test_many_events_are_taken_together(journal: EventJournal) -> None:
    events = [event(number, f"user {number % 7}") for number in range(1200)]
    assert len(journal.add(events)) == 1200
    assert sorted(journal.events([f"user {n}" for n in range(7)]), key=lambda e: e.time) == events
    assert journal.pending_users([e.event_id for e in events]) == [f"user {n}" for n in range(7)]


def test_what_came_after_a_look_stays_pending(journal: EventJournal) -> None:
    journal.add([event(1), event(2, "bob")])
    with journal.turn(["ann"]) as turn:
        assert turn.events() == [event(1)]
    assert journal.pending_users() == ["ann", "bob"]  # not marked
    with journal.turn(["ann"]) as turn:
        turn.events()
        turn.mark_applied()
    assert journal.pending_users() == ["bob"]
    journal.add([event(3)])
    with journal.turn(["ann"]) as turn:
        assert turn.events(after=1) == [event(3)]
        assert len(turn.events()) == 2
        turn.mark_applied()
    assert journal.pending_users() == ["bob"]
    assert journal.pending_users(["e1", "e3"]) == []


def test_an_event_that_comes_while_others_are_applied_is_not_marked(
    place: tuple[Home, str], journal: EventJournal
) -> None:
    journal.add([event(1)])
    other = EventJournal.open(*place, DATASET)
    with journal.turn(["ann"]) as turn:
        assert len(turn.events()) == 1
        assert other.add([event(2)]) == {"e2"}  # nobody waits for an apply to be durable
        turn.mark_applied()
    assert other.pending_users() == ["ann"]
    other.close()


def test_turns_of_a_user_never_overlap(place: tuple[Home, str], journal: EventJournal) -> None:
    other = EventJournal.open(*place, DATASET)
    order: list[str] = []

    def wait() -> None:
        with other.turn(["bob", "ann"]):
            order.append("second")

    with journal.turn(["ann"]):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.1)
        order.append("first")
    waiting.join()
    assert order == ["first", "second"]
    other.close()


def test_an_error_in_a_turn_marks_nothing(journal: EventJournal) -> None:
    journal.add([event(1)])

    def fail() -> None:
        with journal.turn(["ann"]) as turn:
            turn.events()
            turn.mark_applied()
            raise StoreError("the online store is away")

    with pytest.raises(StoreError, match="away"):
        fail()
    assert journal.pending_users() == ["ann"]


def test_data_sets_do_not_mix(place: tuple[Home, str], journal: EventJournal) -> None:
    other = EventJournal.open(*place, "another")
    assert journal.add([event(1)]) == {"e1"}
    assert other.add([event(1, "bob")]) == {"e1"}
    assert [row.user_id for row in other.events(["ann", "bob"])] == ["bob"]
    assert other.pending_users() == ["bob"]
    other.close()


def test_ingest_reads_all_in_the_order_of_acceptance(
    place: tuple[Home, str], journal: EventJournal
) -> None:
    assert live_source(*place, DATASET) is None
    journal.add([event(2, "bob"), event(1)])
    source = live_source(*place, DATASET)
    assert source is not None
    assert source.events["user_id"].to_pylist() == ["bob", "ann"]
    assert source.sequence == journal.last_sequence() >= 2
    assert journal.users_since(0) == ["ann", "bob"]
    assert journal.users_since(source.sequence) == []


def test_no_journal_before_the_first_event(place: tuple[Home, str]) -> None:
    assert EventJournal.find(*place, DATASET) is None
    assert not place[0].live_events.exists()


def test_a_broken_file_is_a_sentence(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.live_events.write_bytes(b"no database " * 100)
    with pytest.raises(StoreError, match=r"journal of live events.*is not a database"):
        EventJournal.open(home, FILES_PROFILE, DATASET)


def test_a_server_that_went_away_is_a_sentence(
    database_url: str, redis_url: str, postgres: PostgresServer, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(DATABASE_URL, database_url)
    monkeypatch.setenv(REDIS_URL, redis_url)
    journal = EventJournal.open(Home(tmp_path), "production", DATASET)
    journal.add([event(1)])
    journal.close()
    postgres.stop()
    try:
        with pytest.raises(StoreError, match=r"PostgreSQL at 127\.0\.0\.1.*send the events again"):
            journal.add([event(2)])
    finally:
        postgres.start()
    assert journal.add([event(1), event(2)]) == {"e2"}
    journal.close()


def test_nobody_waits_for_ever_for_a_process_that_was_stopped(
    place: tuple[Home, str], journal: EventJournal
) -> None:
    waiting = EventJournal.connect(*place, DATASET, turn_timeout_s=0.2)
    with (
        journal.turn(["ann"]),
        pytest.raises(StoreError, match=r"is it stopped\? End it"),
        waiting.turn(["ann"]),
    ):
        pass
    with waiting.turn(["ann"]) as turn:
        assert turn.events() == []
    waiting.close()


def test_statements_on_the_server_have_a_limit(place: tuple[Home, str]) -> None:
    if place[1] == FILES_PROFILE:
        return
    database = Database(open_store(*place).config.offline_store)
    connection = database.connect(limits=TimeLimits(lock_s=1, statement_s=0.1, network_s=3))
    assert connection.execute("SHOW lock_timeout").fetchone() == ("1s",)
    assert connection.pgconn.parameter_status(b"TimeZone") == b"UTC"
    with pytest.raises(psycopg.errors.QueryCanceled):
        connection.execute("SELECT pg_sleep(5)")
    connection.close()
