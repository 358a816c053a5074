"""Served requests against the offline store, with real servers: what is equal, what is found."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from feature_repo.errors import NothingToCompareError
from feature_repo.home import Home
from feature_repo.parity_series import METRICS_FILE, parity_runs
from feature_repo.reader import FeatureReader
from feature_repo.served_files import write_served
from feature_repo.served_parity import Replayed, ServedViews, replay, requests_of, sample_ids
from feature_repo.served_rows import ServedItems, ServedRequest, neighbor_hashes
from feature_repo.status import look
from longtrail import main
from tests.serving.conftest import toy_manifest

RUN = "kitchen-run"
SHELVES = ("metal",)  # the other one is a word that the model does not know
ITEMS = [f"P{n}" for n in range(6)]
USERS = [str(n) for n in range(0, 30, 3)]
VIEWS = {"item_neighbors", "items", "user_sequences", "user_stats"}
Serve = Callable[..., ServedRequest]


@pytest.fixture
def kitchen_log(home: Home) -> Iterator[Home]:
    """The kitchen, with a run's manifest and no log yet."""
    manifest = toy_manifest(run=RUN, category_vocabularies={"shelf": SHELVES})
    (home.runs / RUN).mkdir(parents=True, exist_ok=True)
    manifest.save(home.runs / RUN / "manifest.json")
    yield home
    shutil.rmtree(home.served, ignore_errors=True)


@pytest.fixture
def serve(kitchen_log: Home, profile: str) -> Serve:
    """Answers a request from the profile's online store."""
    reader = FeatureReader(kitchen_log, profile)

    def serve(request_id: str, user_id: str, at: datetime | None = None) -> ServedRequest:
        at = at or reader.manifest.now()
        items = reader.online_items(np.array(ITEMS, dtype=object), at=at)
        index = {word: place for place, word in enumerate(SHELVES, start=1)}
        return ServedRequest(
            request_id=request_id,
            served_at=datetime.now(UTC),
            items_at=at,
            run=RUN,
            encoder="abc",
            path="live",
            degraded=(),
            context={"position": 1.0},
            user=reader.online_users(np.array([user_id], dtype=object), at=at),
            num_scored=len(ITEMS),
            num_returned=2,
            items=ServedItems(
                item_ids=items.item_ids,
                logits=np.linspace(1, 0, len(ITEMS), dtype=np.float32),
                text_ids=items.text_ids,
                dense=items.dense,
                dense_names=items.dense_names,
                categories=np.array(
                    [[index.get(word, 0)] for word in items.categorical["shelf"]], dtype=np.int32
                ),
                category_names=("shelf",),
                neighbors=neighbor_hashes(items.neighbor_keys, items.neighbor_weights),
            ),
        )

    return serve


def compared(home: Home, profile: str, *requests: ServedRequest, join: str = "fast") -> ServedViews:
    """The comparison of requests that went through the log."""
    write_served(home.served, requests)
    reader = FeatureReader(home, profile)
    views = ServedViews(home, reader)
    wanted = {request.request_id for request in requests}
    for replayed in replay(reader, requests_of(home, wanted), join=join):  # type: ignore[arg-type]
        views.compare(replayed)
    return views


def wrong(views: ServedViews) -> dict[str, int]:
    return {name: view.wrong for name, view in views.views.items() if view.wrong}


def test_what_was_served_is_what_training_reads(
    kitchen_log: Home, profile: str, serve: Serve
) -> None:
    requests = [serve(f"r-{user}", user) for user in [*USERS, "no such user"]]
    fast = compared(kitchen_log, profile, *requests)
    assert fast.views.keys() == VIEWS
    assert wrong(fast) == {}
    num = len(requests)
    counted = {name: (view.num_keys, view.values) for name, view in fast.views.items()}
    assert counted["item_neighbors"] == (num * 6, num * 6)
    # text_id, shelf and the dense values of every item
    width = requests[0].items.dense.shape[1]
    assert counted["items"] == (num * 6, num * 6 * (width + 2))
    assert counted["user_stats"][0] == counted["user_sequences"][0] == num
    behaviors = [sequence.mask.sum() for r in requests for sequence in r.user.sequences.values()]
    # Three lists for each scene, and a total where the user is known.
    assert counted["user_sequences"][1] == 3 * sum(behaviors) + 3 * (num - 1)
    assert counted["user_stats"][1] == (num - 1) * requests[0].user.dense.shape[1]
    feast = compared(kitchen_log, profile, *requests, join="feast")
    assert {name: (view.num_keys, view.values) for name, view in feast.views.items()} == {
        name: (2 * keys, 2 * values) for name, (keys, values) in counted.items()
    }  # the log now has every request twice
    assert wrong(feast) == {}


def test_the_moment_of_the_request_counts_not_today(
    kitchen_log: Home, profile: str, serve: Serve
) -> None:
    """Read online now, but for a moment before the last events: what was served knew too much."""
    at = FeatureReader(kitchen_log, profile).manifest.now()
    early = compared(kitchen_log, profile, serve("early", USERS[0], at - timedelta(days=60)))
    assert early.views["user_sequences"].wrong > 0
    assert early.views["items"].wrong > 0


def test_every_kind_of_value_that_differs_is_found(
    kitchen_log: Home, profile: str, serve: Serve
) -> None:
    request = serve("r1", USERS[1])
    user, items = request.user, request.items
    scene = "buy"
    sequence = user.sequences[scene]
    ids, times = sequence.behavior_ids.copy(), sequence.timestamps.copy()
    ids[0, -1] += 1
    times[0, -1] += 60
    user_dense = user.dense.copy()
    user_dense[0, 0] = np.nextafter(user_dense[0, 0], np.float32(np.inf))
    dense, text_ids = items.dense.copy(), items.text_ids.copy()
    dense[2, 1] = -1.5
    text_ids[3] += 1
    categories, neighbors = items.categories.copy(), items.neighbors.copy()
    categories[4] = 2
    neighbors[5] ^= 1
    changed = replace(
        request,
        user=replace(
            user,
            dense=user_dense,
            sequences=user.sequences
            | {scene: replace(sequence, behavior_ids=ids, timestamps=times)},
        ),
        items=replace(
            items, dense=dense, text_ids=text_ids, categories=categories, neighbors=neighbors
        ),
    )
    found = compared(kitchen_log, profile, changed)
    assert wrong(found) == {"user_sequences": 2, "user_stats": 1, "items": 3, "item_neighbors": 1}
    told = [d for view in found.views.values() for d in view.differences]
    assert {d["feature"] for d in told} == {
        f"{scene}_behavior_ids",
        f"{scene}_timestamps",
        user.dense_names[0],
        items.dense_names[1],
        "text_id",
        "shelf",
        "neighbors",
    }
    assert {d["key"] for d in told} == {
        f"{USERS[1]} (request r1)", *(f"P{n} (request r1)" for n in (2, 3, 4, 5))
    }  # fmt: skip
    of_items = found.views["items"].differences
    (price,) = [d for d in of_items if d["feature"] == items.dense_names[1]]
    assert (price["online"], price["offline"]) == ("-1.5", str(items.dense[2, 1]))


def test_rows_and_columns_that_are_gone_are_found(
    kitchen_log: Home, profile: str, serve: Serve
) -> None:
    request = serve("r1", USERS[2])
    ghost = request.items.item_ids.copy()
    ghost[0] = "ghost"
    renamed = ("bought_long_ago", *request.items.dense_names[1:])
    stranger = replace(request.user, user_ids=np.array(["stranger"], dtype=object))
    found = compared(
        kitchen_log,
        profile,
        replace(
            request,
            user=stranger,
            items=replace(request.items, item_ids=ghost, dense_names=renamed),
        ),
    )
    assert found.views["user_sequences"].missing_offline == 1
    assert found.views["user_stats"].missing_offline == 1
    assert found.views["items"].missing_offline == 1
    gone = found.views["(no view has these)"]
    # The ghost's is no value at all; of the five others those that were there.
    there = ~np.isnan(request.items.dense[1:, 0])
    assert (gone.values, gone.mismatches, gone.missing_offline) == (5, there.sum(), 1)


def test_categories_of_a_run_that_is_gone_are_left_out(
    kitchen_log: Home, profile: str, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    known, unknown = serve("r1", USERS[0]), replace(serve("r2", USERS[0]), run="gone")
    views = compared(kitchen_log, profile, known)
    before = views.views["items"].values
    for replayed in replay(
        FeatureReader(kitchen_log, profile), iter([unknown, unknown]), join="fast"
    ):
        views.compare(replayed)
    assert views.views["items"].values == before + 2 * (before - len(ITEMS))
    assert wrong(views) == {}
    assert caplog.text.count("categories of run gone are not compared") == 1


def test_a_replay_is_of_the_right_rows_across_chunks(
    kitchen_log: Home, profile: str, serve: Serve
) -> None:
    """More requests than are read at once, of two moments, items of each in an order of its own."""
    now = FeatureReader(kitchen_log, profile).manifest.now()
    order = np.random.default_rng(0)
    requests = []
    for n in range(60):
        request = serve(f"r{n}", USERS[n % len(USERS)], now + timedelta(days=n % 2))
        rows = order.permutation(len(ITEMS))[: 1 + n % 6]
        items = request.items
        shuffled = replace(
            items,
            **{
                name: getattr(items, name)[rows]
                for name in ("item_ids", "logits", "text_ids", "dense", "categories", "neighbors")
            },
        )
        requests.append(replace(request, items=shuffled))
    reader = FeatureReader(kitchen_log, profile)
    replayed: list[Replayed] = list(replay(reader, requests, join="fast"))
    assert [one.request.request_id for one in replayed] == [f"r{n}" for n in range(60)]
    for one, request in zip(replayed, requests, strict=True):
        assert one.items.item_ids.tolist() == request.items.item_ids.tolist()
        assert one.user.user_ids.tolist() == request.user.user_ids.tolist()
    views = ServedViews(kitchen_log, reader)
    for one in replayed:
        views.compare(one)
    assert wrong(views) == {}


def test_the_sample_is_the_same_every_time(kitchen_log: Home, profile: str, serve: Serve) -> None:
    request = serve("r", USERS[0])
    write_served(kitchen_log.served, [replace(request, request_id=f"r{n}") for n in range(30)])
    few = sample_ids(kitchen_log, 5)
    assert len(few) == 5
    assert few < sample_ids(kitchen_log, 10)
    assert len(sample_ids(kitchen_log, 1000)) == 30
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).date()
    with pytest.raises(NothingToCompareError, match=f"no served request .* since {tomorrow}"):
        sample_ids(kitchen_log, 5, since=tomorrow)


def test_the_command_counts_degraded_answers_apart_and_writes_a_series_of_its_own(
    kitchen_log: Home, profile: str, serve: Serve
) -> None:
    home = kitchen_log
    arguments = ["--home", str(home.root), "--profile", profile, "parity", "--sample", "20"]
    nothing = CliRunner().invoke(main, [*arguments, "--served"])
    assert nothing.exit_code == 1
    assert "Error: no served request is logged" in nothing.stderr

    broken = replace(serve("broken", USERS[1]), degraded=("the feature store does not answer",))
    other = serve("other", USERS[2])
    broken = replace(broken, user=replace(other.user, user_ids=broken.user.user_ids))
    write_served(home.served, [serve("whole", USERS[0]), broken])
    stores_before = look(home, profile).parity
    done = CliRunner().invoke(main, [*arguments, "--served", "--join", "fast"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    counts = {name: told[name] for name in ("requests", "degraded", "without_model", "mismatches")}
    # The run has a manifest and no program: nobody can compute its scores.
    assert counts == {"requests": 2, "degraded": 1, "without_model": 1, "mismatches": 0}
    assert told["views"].keys() == {*VIEWS, "scores"}
    assert told["compared_values"] > 100

    late = replace(other, request_id="late", items_at=other.items_at - timedelta(days=60))
    write_served(home.served, [late])
    done = CliRunner().invoke(main, [*arguments, "--served"])
    assert done.exit_code == 1
    assert "Error: items: " in done.stderr
    assert "request late" in done.stderr
    *_, first, last = parity_runs(home)
    assert first.served is not None
    assert last.served is not None
    assert (first.served.degraded, last.served.requests) == (1, 3)
    assert last.views["items"].mismatches > 0 == first.views["items"].mismatches
    text = (home.metrics / METRICS_FILE).read_text(encoding="utf-8")
    metrics = {
        (sample.name, sample.labels.get("view", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels["profile"] == profile
    }
    assert metrics["longtrail_served_parity_requests", ""] == 3
    assert metrics["longtrail_served_parity_degraded", ""] == 1
    assert metrics["longtrail_served_parity_mismatches", "items"] == last.views["items"].mismatches
    # It is no comparison of the stores, whose series and status stay as they were.
    assert ("longtrail_parity_mismatches", "items") not in metrics
    assert look(home, profile).parity == stores_before

    # A night after a day on which nothing was logged is none that fails.
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).date()
    quiet = CliRunner().invoke(main, [*arguments, "--served", "--since", str(tomorrow)])
    assert (quiet.exit_code, quiet.stdout) == (0, "")
    assert "Nothing to compare: no served request is logged" in quiet.stderr

    wrong_use = CliRunner().invoke(main, [*arguments, "--since", "2024-01-01"])
    assert wrong_use.exit_code == 2
    assert "give --served as well" in wrong_use.stderr
