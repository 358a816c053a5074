"""New impressions against training rows: in the small world, then the command on both stores."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from feature_repo.artifact import REFERENCE_FILE
from feature_repo.command import SentenceGroup, Settings
from feature_repo.connections import DATABASE_URL, REDIS_URL
from feature_repo.errors import ArtifactError, NothingToCompareError
from feature_repo.features import ItemFeatures, UserFeatures
from feature_repo.home import Home
from feature_repo.manifest import LiveClock, load_manifest
from feature_repo.materialize import apply
from feature_repo.publish import publish
from feature_repo.version_names import ENCODER_FILE, encoder_view
from tests.feature_repo.conftest import write_files
from tests.feature_repo.test_reader import ENCODER, build
from tests.training.test_report import Page
from tests.training.world import LENGTH, START, MemoryReader, World
from training.cli_drift import drift
from training.dataset import read_clicks
from training.drift import load_reference, measure_drift
from training.impressions import CHUNK_ROWS, impressions_between, load_impressions
from training.recipes import RECIPES, Recipe
from training.reference import RowCounter
from training.sources import Sources
from training.train import train


class ShiftedReader(MemoryReader):
    """The world's reader with a planted shift: dearer items, and histories cut to the newest."""

    def __init__(self, inner: MemoryReader) -> None:
        vars(self).update(vars(inner))

    def historical_users(self, user_ids: np.ndarray, request_times: np.ndarray) -> UserFeatures:
        found = super().historical_users(user_ids, request_times)
        sequences = {}
        for scene, sequence in found.sequences.items():
            ids = sequence.behavior_ids.copy()
            ids[:, :-1] = 0
            sequences[scene] = replace(sequence, behavior_ids=ids)
        return replace(found, sequences=sequences)

    def historical_items(self, item_ids: np.ndarray, request_times: np.ndarray) -> ItemFeatures:
        found = super().historical_items(item_ids, request_times)
        dense = found.dense.copy()
        dense[:, found.dense_names.index("price")] *= 2
        return replace(found, dense=dense)


def counting() -> Recipe:
    """A baseline that is trained at once, and yet reads histories."""
    return replace(RECIPES["popularity"](), sequence_length=LENGTH)


@pytest.fixture(scope="module")
def counted(world: World) -> str:
    """Name of a run of it."""
    return train(world.sources, counting(), run="counted", threads=1).run


def ending_with_training(world: World) -> tuple[Sources, timedelta]:
    """The sources as of the last training impression, and the time since the first."""
    times = world.impressions.query("split == 'train'")["event_timestamp"]
    last: datetime = times.max().to_pydatetime()
    manifest = world.sources.manifest.model_copy(update={"last_event": last})
    return replace(world.sources, manifest=manifest), last - START


def test_the_training_rows_themselves_have_not_moved(world: World, counted: str) -> None:
    sources, window = ending_with_training(world)
    found = measure_drift(sources, counted, window=window, threshold=1e-6)
    assert found.window == found.reference == load_reference(sources.home, counted)
    assert found.drift.drifted == ()
    assert {f.psi for group in found.drift.features.values() for f in group.values()} == {0}
    assert found.drift.vectors == {
        "history": pytest.approx(0, abs=1e-9), "candidates": pytest.approx(0, abs=1e-9)
    }  # fmt: skip
    rows = world.impressions.query("split == 'train'")
    assert found.window.num_rows == len(rows)
    assert found.window.num_contexts == len(rows.groupby(["user_id", "event_timestamp"]))
    assert found.reference.distributions.keys() == {
        "user", "item", "category", "context", "evidence", "history", "text"
    }  # fmt: skip


def test_a_planted_shift_is_found(world: World, counted: str) -> None:
    sources, window = ending_with_training(world)
    assert isinstance(sources.reader, MemoryReader)
    shifted = replace(sources, reader=ShiftedReader(sources.reader))
    found = measure_drift(shifted, counted, window=window, threshold=0.2)
    assert {"item.price", "history.view_length"} <= set(found.drift.drifted)
    assert not {"user.view_total", "context.hour", "category.brand"} & set(found.drift.drifted)
    assert found.drift.features["history"]["view_total"].psi == 0


def test_values_by_hand(world: World, counted: str) -> None:
    reference = load_reference(world.sources.home, counted)
    rows = world.impressions.query("split == 'train'")
    contexts = rows.drop_duplicates(["user_id", "event_timestamp"])
    # Every twentieth user has no history; the others viewed two to four things.
    known = contexts["user_id"].isin(world.events["user_id"])
    length = reference.distributions["history"]["view_length"]
    assert length.num_rows == len(contexts)
    newest = reference.distributions["history"]["view_newest_age_days"]
    assert newest.missing_rate == pytest.approx(1 - known.mean())
    table = world.sources.table
    items = table.rows(
        world.sources.reader.historical_items(
            rows["item_id"].to_numpy(object), np.full(len(rows), 2**60)
        ).text_ids
    )
    np.testing.assert_allclose(
        reference.mean_vectors["candidates"], table.vectors[items].mean(axis=0), rtol=1e-5
    )


def test_chunks_count_as_the_whole(world: World, counted: str) -> None:
    sources = world.sources
    reference = load_reference(sources.home, counted)
    impressions = load_impressions(sources.home, sources.manifest, "train")
    counter = RowCounter(reference.distributions, sources.table, sources.manifest.scenes)
    users = np.unique(impressions.user_ids.astype(str), return_inverse=True)[1]
    for part in range(3):
        counter.add(
            read_clicks(
                impressions.take(np.flatnonzero(users % 3 == part)),
                sources.reader,
                sources.table,
                scenes=sources.manifest.scenes,
                sequence_length=LENGTH,
                vocabularies={"brand": ("a", "b")},
            )
        )
    whole = counter.reference()
    numbers = reference.distributions.keys() - {"category"}  # the vocabulary's order is the run's
    assert {g: whole.distributions[g] for g in numbers} == {
        g: reference.distributions[g] for g in numbers
    }
    for kind, mean in reference.mean_vectors.items():
        np.testing.assert_allclose(whole.mean_vectors[kind], mean, rtol=1e-12)


def test_a_time_range_of_impressions(world: World) -> None:
    sources = world.sources
    times = world.impressions["event_timestamp"]
    start, end = times.sort_values().iloc[[40, 400]]
    parts = list(impressions_between(sources.home, sources.manifest, start, end))
    inside = world.impressions[(times >= start) & (times < end)]
    assert sum(len(part) for part in parts) == len(inside) > 300
    assert max(len(part) for part in parts) <= CHUNK_ROWS
    assert sorted(np.concatenate([p.item_ids for p in parts])) == sorted(inside["item_id"])


def test_what_cannot_be_measured(world: World, counted: str) -> None:
    sources = world.sources
    longer = r"no impressions between .* choose a longer --window"
    with pytest.raises(NothingToCompareError, match=longer):
        measure_drift(
            replace(sources, manifest=sources.manifest.model_copy(update={"last_event": START})),
            counted, window=timedelta(hours=1), threshold=0.2,
        )  # fmt: skip
    path = sources.home.runs / counted / REFERENCE_FILE
    text = path.read_text()
    path.unlink()
    with pytest.raises(ArtifactError, match=r"has no reference\.json.*train it again"):
        load_reference(sources.home, counted)
    path.write_text(text)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """An embedded home with a trained baseline."""
    folder = tmp_path_factory.mktemp("drift")
    write_files(folder)
    home = Home(folder / "home")
    build(home, folder)
    ENCODER.save(home.embeddings / ENCODER.fingerprint / ENCODER_FILE)
    train(Sources.open(home, "embedded"), counting(), run="counts", threads=1)
    return home


@pytest.fixture(params=["embedded", "production"])
def settings(
    request: pytest.FixtureRequest, template: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Settings]:
    """A copy of it in the stores of a profile."""
    before = dict(os.environ)
    if request.param == "production":
        monkeypatch.setenv(DATABASE_URL, request.getfixturevalue("database_url"))
        monkeypatch.setenv(REDIS_URL, request.getfixturevalue("redis_url"))
    # Applying a copied registry would drop the tables of the online store that it speaks of.
    stores = shutil.ignore_patterns("*.db", "materialized-*")
    home = Home(shutil.copytree(template.root, tmp_path / "home", ignore=stores))
    made = Settings(home, request.param)
    publish(made)
    apply(made.home, request.param)
    yield made
    os.environ.clear()
    os.environ.update(before)


def invoke(settings: Settings, *arguments: str) -> Result:
    group = SentenceGroup(commands={"drift": drift})
    return CliRunner().invoke(group, ["drift", *arguments], obj=settings, catch_exceptions=False)


def run(settings: Settings, *arguments: str) -> tuple[Result, dict[str, Any]]:
    done = invoke(settings, *arguments)
    return done, json.loads(done.stdout)


def test_the_command_tells_and_fails_past_the_threshold(settings: Settings, tmp_path: Path) -> None:
    page = tmp_path / "drift.html"
    options = ["--against", "counts", "--window", "14d"]
    # Users do ever more over the 90 days: totals must move.
    done, result = run(settings, *options, "--report", str(page))
    assert done.exit_code == 1
    assert "features have moved past 0.2 since run counts was trained" in done.stderr
    assert "history.buy_total" in result["drifted"]
    assert 0 < result["num_contexts"] < result["num_rows"]
    assert result["features"]["context"]["position"]["psi"] < 0.01
    assert result["features"]["item"]["price"]["missing_now"] == 0
    view_of = {
        f"{group}.{name}": feature["view"]
        for group, features in result["features"].items()
        for name, feature in features.items()
    }
    assert view_of["history.buy_total"] == "user_sequences"
    assert view_of["text.buy_norm"] == encoder_view("abc")
    assert view_of["item.price"] == view_of["category.shelf"] == "items"
    assert view_of["context.position"] is None
    assert {feature["view"] for feature in result["features"]["user"].values()} == {"user_stats"}
    views = result["views"]
    assert {"user_sequences", "user_stats", "items", encoder_view("abc")} <= views.keys()
    assert views["user_sequences"]["age_days"] < 1e-6
    assert views["user_stats"]["num_rows"] > 0
    assert views["items"]["missing"]["price"] == 0
    assert 3.7 < views["items"]["means"]["price"] < 3.8  # 0, 1.5, ... 7.5
    text = Page(page.read_text(encoding="utf-8")).text  # type: ignore[no-untyped-call]
    assert "Drift against the training rows of counts" in text
    assert "buy_total" in text
    assert "behavior_embeddings_abc" in text

    done, result = run(settings, *options, "--threshold", "1000")
    assert (done.exit_code, result["drifted"]) == (0, [])
    assert result["threshold"] == 1000

    # Nobody was shown anything for a month: the nightly run goes on.
    later = load_manifest(settings.home).now() + timedelta(days=30)
    LiveClock(newest_event=later).save(settings.home.live_clock)
    done = invoke(settings, *options)
    assert (done.exit_code, done.stdout) == (0, "")
    assert "Nothing to compare: there are no impressions between" in done.stderr
