from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from feature_repo.artifact import current_run
from feature_repo.errors import ArtifactError, MissingStepError
from training.artifact import load_manifest, load_model
from training.evaluate import evaluate
from training.export import export_embeddings


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
    assert found["history_6_20"]["num_rows"] == 0
    assert found["history_6_20"]["auc"] is None
    assert found["novel"]["num_rows"] == ((lengths > 0) & ~seen).sum()
    known = set(world.events.loc[world.events["event_timestamp"]
        <= load_manifest(world.sources.home, "bahe").train_end, "item_id"])  # fmt: skip
    assert found["cold_items"]["num_rows"] == (~test["item_id"].isin(known)).sum()


def test_evaluation_refuses_what_does_not_fit(world, bahe, tmp_path):
    with pytest.raises(ArtifactError, match=r"no finished run 'nothing'.*bahe"):
        evaluate(world.sources, "nothing")
    table = world.sources.table
    other = type(table)(table._ids, table.vectors, "table-2")
    with pytest.raises(ArtifactError, match="encoder table-1, but the current table is of table-2"):
        evaluate(replace(world.sources, table=other), "bahe")
    home = world.sources.home.__class__(tmp_path)
    with pytest.raises(MissingStepError, match="run `longtrail train` first"):
        current_run(home)


# Export.


def test_export_writes_the_deep_outputs_of_everyone(world, bahe):
    home = world.sources.home
    result = export_embeddings(world.sources, "bahe")
    users = pq.read_table(home.view("user_embeddings"))
    items = pq.read_table(home.view("item_embeddings"))
    assert [str(f.type) for f in users.schema] == [
        "string", "list<element: float>", "string", "timestamp[us, tz=UTC]", "timestamp[us, tz=UTC]"
    ]  # fmt: skip
    assert users["user_id"].to_pylist() == sorted(set(world.events["user_id"]))
    assert result.num_items == items.num_rows == 48
    assert result.user_width == len(users["embedding"][0]) == 16
    assert result.item_width == len(items["embedding"][0]) == 8
    assert set(users["model_version"].to_pylist()) == {"bahe"}
    last = world.events.groupby("user_id")["event_timestamp"].max()
    assert users["event_timestamp"].to_pylist() == last.sort_index().tolist()
    now = world.sources.manifest.now()
    assert set(items["event_timestamp"].to_pylist()) == {now}
    model = load_model(world.sources, load_manifest(home, "bahe"))
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
