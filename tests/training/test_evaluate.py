from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from encoders.table import EmbeddingTable, table_encoders
from feature_repo.artifact import current_run, load_run_manifest
from feature_repo.command import Settings
from feature_repo.errors import ArtifactError, EncoderError, MissingStepError
from feature_repo.home import Home
from tests.training.tables import save_table
from tests.training.world import make_world
from training.artifact import load_model
from training.cli_evaluate import evaluate as evaluate_command
from training.evaluate import evaluate
from training.export import export_embeddings
from training.recipes import RECIPES
from training.train import train


def test_evaluation_of_a_split_and_of_a_file_agree(world, bahe, tmp_path):
    by_split = evaluate(world.sources, "bahe", split="test")
    assert by_split.metrics["auc"] == pytest.approx(bahe.metrics["test"]["auc"])
    rows = world.impressions.query("split == 'test'").drop(columns="split")
    rows.sample(frac=1, random_state=0).to_csv(tmp_path / "labels.csv", index=False)
    by_file = evaluate(world.sources, "bahe", impressions=tmp_path / "labels.csv")
    assert by_file.metrics["auc"] == pytest.approx(by_split.metrics["auc"])
    assert by_file.notes == []
    rows.drop(columns="hour").to_parquet(tmp_path / "labels.parquet")
    without = evaluate(world.sources, "bahe", impressions=tmp_path / "labels.parquet")
    assert without.notes == ["missing in every row: hour"]


def test_slices_hold_the_rows_they_name(world, bahe):
    found = evaluate(world.sources, "bahe", split="test").slices
    test = world.impressions.query("split == 'test'")
    counts = world.events.groupby("user_id").size()
    lengths = test["user_id"].map(counts).fillna(0)
    pairs = set(zip(world.events["user_id"], world.events["item_id"], strict=True))
    seen = np.array([p in pairs for p in zip(test["user_id"], test["item_id"], strict=True)])
    assert found["cold_users"]["num_rows"] == found["history_0"]["num_rows"] == (lengths == 0).sum()
    assert found["history_1_5"]["num_rows"] == ((lengths > 0) & (lengths < 6)).sum()
    assert found["history_1_20"] == found["history_1_5"]
    assert found["history_6_20"]["num_rows"] == found["history_101_plus"]["num_rows"] == 0
    assert found["history_6_20"]["auc"] is None
    assert found["novel"]["num_rows"] == ((lengths > 0) & ~seen).sum()
    known = set(world.events.loc[world.events["event_timestamp"]
        <= load_run_manifest(world.sources.home, "bahe").train_end, "item_id"])  # fmt: skip
    assert found["cold_items"]["num_rows"] == (~test["item_id"].isin(known)).sum()


def test_runs_are_compared_on_the_same_rows(world, bahe, popularity):
    found = evaluate(world.sources, ["bahe"], against=["popularity"], split="test")
    assert (found.runs, found.against) == (["bahe"], ["popularity"])
    whole = found.comparison["all"]["auc"]
    assert whole["first"] == pytest.approx(found.metrics["auc"])
    assert whole["second"] == pytest.approx(popularity.metrics["test"]["auc"])
    assert whole["difference"] == pytest.approx(whole["first"] - whole["second"])
    assert 0 < whole["low"] < whole["difference"] < whole["high"]
    assert set(found.comparison) == {"all", *found.slices}
    novel = found.comparison["novel"]["auc"]
    assert novel["first"] == pytest.approx(found.slices["novel"]["auc"])
    assert found.comparison["history_6_20"]["auc"]["difference"] is None


def test_several_runs_give_means(world, bahe, popularity):
    found = evaluate(world.sources, ["bahe", "popularity"])
    expected = (bahe.metrics["test"]["auc"] + popularity.metrics["test"]["auc"]) / 2
    assert found.metrics["auc"] == pytest.approx(expected)
    assert found.comparison == {}


def test_a_run_is_scored_on_the_vectors_that_it_was_trained_on(tmp_path):
    world = make_world(tmp_path / "home", num_users=60)
    sources = world.sources
    train(sources, RECIPES["popularity"](), run="one", threads=1)
    # The home goes on to another encoder: other vectors, and other rows, for it misses a text.
    others = EmbeddingTable(sources.table.ids[1:], sources.table.vectors[1:, :4], "table-2")
    save_table(sources.home, sources.table)
    save_table(sources.home, others, current=True)
    later = replace(sources, table=EmbeddingTable.open(sources.home))
    train(later, RECIPES["popularity"](), run="two", threads=1)
    assert [e.fingerprint for e in table_encoders(sources.home)] == ["table-1", "table-2"]
    np.testing.assert_array_equal(
        later.with_encoder("table-1").table.vectors, sources.table.vectors
    )
    assert later.with_encoder("table-2") is later
    found = evaluate(later, "one", against=["two"])
    assert found.metrics["auc"] == load_run_manifest(sources.home, "one").metrics["test"]["auc"]
    assert found.comparison["all"]["auc"]["difference"] == 0


def test_evaluation_refuses_what_does_not_fit(world, bahe, tmp_path):
    with pytest.raises(ArtifactError, match=r"no finished run 'nothing'.*bahe"):
        evaluate(world.sources, "nothing")
    home = make_world(tmp_path / "home", num_users=4).sources.home
    with pytest.raises(MissingStepError, match="run `longtrail train` first"):
        current_run(home)
    table = world.sources.table
    other = EmbeddingTable(table.ids, table.vectors, "table-2")
    save_table(home, other, current=True)
    with pytest.raises(EncoderError, match="expected vectors of encoder table-1, but those in"):
        replace(world.sources, home=home, table=other).with_encoder("table-1")


@pytest.mark.parametrize("extra", [["a-run"], ["--against", "a-run"], ["--impressions", "x.csv"]])
def test_the_command_refuses_what_ablations_cannot_use(tmp_path, extra):
    settings = Settings(home=Home(tmp_path), profile="embedded")
    result = CliRunner().invoke(evaluate_command, ["--ablate", *extra], obj=settings)
    assert result.exit_code == 2
    assert "--ablate takes no RUN, --against or --impressions" in result.output


# Export.


def test_export_writes_the_deep_outputs_of_everyone(world, bahe):
    home = world.sources.home
    result = export_embeddings(world.sources, "bahe")
    users = pq.read_table(home.view("user_embeddings") / "bahe")
    items = pq.read_table(home.view("item_embeddings") / "bahe")
    assert [str(f.type) for f in users.schema] == [
        "string", "list<element: float>", "string", "int64", "int64",
        "timestamp[us, tz=UTC]", "timestamp[us, tz=UTC]",
    ]  # fmt: skip
    now = world.sources.manifest.now()
    assert set(users["computed_time"].to_pylist()) == {int(now.timestamp())}
    assert 0 not in users["history_key"].to_pylist()
    texts = world.sources.reader.historical_items(
        np.array(items["item_id"].to_pylist(), object), np.full(items.num_rows, 2**60)
    ).text_ids
    assert items["text_id"].to_pylist() == texts.tolist()
    assert users["user_id"].to_pylist() == sorted(set(world.events["user_id"]))
    assert result.num_items == items.num_rows == 48
    assert result.user_width == len(users["embedding"][0]) == 16
    assert result.item_width == len(items["embedding"][0]) == 8
    assert set(users["model_version"].to_pylist()) == {"bahe"}
    last = world.events.groupby("user_id")["event_timestamp"].max()
    assert users["event_timestamp"].to_pylist() == last.sort_index().tolist()
    assert set(items["event_timestamp"].to_pylist()) == {now}
    model = load_model(world.sources, load_run_manifest(home, "bahe"))
    row = world.sources.table.rows(
        world.sources.reader.historical_items(
            np.array([items["item_id"][5].as_py()], object), np.array([2**60])
        ).text_ids
    )
    table = torch.from_numpy(world.sources.table.vectors)
    with torch.inference_mode():
        expected = model.item_vectors(table, torch.from_numpy(row))[0].numpy()
    np.testing.assert_allclose(items["embedding"][5].as_py(), expected, atol=1e-5)


def test_export_of_a_baseline_says_why_not(world, popularity):
    with pytest.raises(ArtifactError, match="popularity model, which has no deep outputs"):
        export_embeddings(world.sources, "popularity")
