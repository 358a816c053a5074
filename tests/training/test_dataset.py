import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo.behavior import item_key
from feature_repo.errors import ArtifactError, DataSetError
from tests.training.world import LENGTH, SCENES, make_world
from training import dataset as dataset_module
from training.batches import make_batch, plan_batches, plan_pieces
from training.dataset import read_clicks
from training.impressions import Impressions, load_impressions, load_impressions_file
from training.schema import select_columns


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("dataset") / "home", num_users=60)


def read(world, impressions=None, **options):
    sources = world.sources
    if impressions is None:
        impressions = load_impressions(sources.home, sources.manifest, "train")
    return read_clicks(
        impressions,
        sources.reader,
        sources.table,
        scenes=SCENES,
        sequence_length=LENGTH,
        **options,
    )


def contexts(data):
    """Of each row: a user at one time."""
    return list(zip(data.impressions.user_ids, data.impressions.times, strict=True))


def test_every_impression_is_there_once_with_its_label(world):
    data = read(world)
    found = pd.DataFrame(
        {
            "request_id": data.impressions.request_ids,
            "item_id": data.impressions.item_ids,
            "clicked": data.clicked,
        }
    )
    wanted = world.impressions[world.impressions["split"] == "train"][list(found.columns)]
    order = ["request_id", "item_id"]
    pd.testing.assert_frame_equal(
        found.sort_values(order, ignore_index=True),
        wanted.sort_values(order, ignore_index=True),
        check_dtype=False,
    )


def test_history_is_strictly_before_the_request_and_right_aligned(world):
    data = read(world)
    view = SCENES.index("view")
    for context in range(0, data.num_contexts, 7):
        row = data.offsets[context]
        user, time = data.impressions.user_ids[row], data.impressions.times[row]
        events = world.events
        mine = events[(events["user_id"] == user) & (events["time"] < time)].sort_values("time")
        keys = [item_key(item) for item in mine["item_id"]][-LENGTH:]
        wanted = [0] * (LENGTH - len(keys)) + keys
        assert data.users.history_item_keys[context, view].tolist() == wanted
        assert data.history_lengths[context] == len(keys)
        ages = (time // 1_000_000 - mine["time"].to_numpy() // 1_000_000)[-LENGTH:]
        assert data.users.history_ages[context, view, LENGTH - len(keys) :].tolist() == list(ages)


def test_chunks_change_nothing(world, monkeypatch):
    whole = read(world)
    monkeypatch.setattr(dataset_module, "CHUNK_CONTEXTS", 7)
    seen = []

    def progress(advance: int, total: int) -> None:
        seen.append(advance)

    chunked = read(world, progress=progress)
    assert sum(seen) == len(whole)
    for side in ("users", "items"):
        for name, values in vars(getattr(whole, side)).items():
            np.testing.assert_array_equal(values, getattr(getattr(chunked, side), name))
    np.testing.assert_array_equal(whole.evidence, chunked.evidence)
    assert chunked.category_vocabularies == whole.category_vocabularies
    assert set(whole.category_vocabularies["brand"]) == {"a", "b"}


def test_rare_categories_have_no_index(world, monkeypatch):
    counts = np.bincount(read(world).items.candidate_categories[:, 0])
    monkeypatch.setattr(dataset_module, "MIN_CATEGORY_COUNT", int(counts[1:].min()) + 1)
    data = read(world)
    assert len(data.category_vocabularies["brand"]) == 1
    assert set(data.items.candidate_categories[:, 0]) == {0, 1}


def test_columns_are_matched_by_name():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = select_columns(values, ("a", "b", "c"), ("c", "a"), what="user")
    assert found.tolist() == [[2, 0], [5, 3]]
    with pytest.raises(ArtifactError, match="no user feature 'd'"):
        select_columns(values, ("a", "b", "c"), ("d",), what="user")


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 11), min_size=1, max_size=12),
    most=st.integers(1, 6),
    seed=st.one_of(st.none(), st.integers(0, 5)),
    batch=st.integers(1, 5),
)
def test_plans_hold_every_row_once(sizes, most, seed, batch):
    data = fake_data(sizes)
    pieces = plan_pieces(data, most)
    assert (pieces[:, 2] - pieces[:, 1]).max() <= most
    plan = plan_batches(data, batch_contexts=batch, max_candidates=most, seed=seed)
    assert max(len(part) for part in plan) <= batch
    rows = np.concatenate([np.arange(a, b) for part in plan for _, a, b in part])
    assert sorted(rows) == list(range(sum(sizes)))
    for part in plan:
        for context, first, last in part:
            assert data.offsets[context] <= first < last <= data.offsets[context + 1]


def fake_data(sizes):
    """Contexts with these numbers of rows and histories of growing length."""
    num, rows = len(sizes), sum(sizes)
    length = 12
    history = np.arange(length)[None, None, :] >= length - np.arange(num)[:, None, None]
    return dataset_module.ClickData(
        users=dataset_module.UserInputs(
            history.astype(np.int64), history.astype(np.int64) * 3, history * np.float32(60),
            history.sum(-1).astype(np.float32), np.zeros((num, 1), np.float32),
        ),
        items=dataset_module.ItemInputs(
            np.arange(rows) + 1, np.arange(rows) + 100, np.zeros((rows, 1), np.float32),
            np.zeros((rows, 1), np.int64), np.zeros((rows, 0), np.int64),
            np.zeros((rows, 0, 2), np.float32),
        ),
        context=np.zeros((rows, 0), np.float32),
        evidence=np.arange(rows, dtype=np.float32)[:, None] / 8,
        clicked=np.arange(rows) % 2,
        offsets=np.append(0, np.cumsum(sizes)),
        impressions=Impressions(
            *(np.array(["x"] * rows, object) for _ in range(3)),
            np.zeros(rows, np.int64), np.arange(rows) % 2, np.zeros(rows, np.bool_),
            np.zeros((rows, 0), np.float32), (),
        ),
        user_dense_names=("u",), item_dense_names=("i",), category_vocabularies={"k": ()},
        evidence_names=("e",),
    )  # fmt: skip


def test_rows_to_keep_take_their_contexts_along():
    data = fake_data([2, 3, 1])
    kept = data.where(np.array([False, False, True, False, True, True]))
    assert kept.offsets.tolist() == [0, 2, 3]
    assert kept.num_contexts == 2
    np.testing.assert_array_equal(kept.users.history_rows, data.users.history_rows[1:])
    np.testing.assert_array_equal(kept.history_lengths, data.history_lengths[1:])
    assert kept.items.candidate_item_keys.tolist() == [102, 104, 105]
    assert kept.evidence[:, 0].tolist() == [2 / 8, 4 / 8, 5 / 8]
    assert kept.clicked.tolist() == [0, 0, 1]
    assert len(kept.impressions) == len(kept.context) == 3


def test_a_sample_holds_whole_contexts_drawn_with_the_seed(world):
    data = read(world)
    part = data.sample(0.3, seed=1)
    assert part.num_contexts == round(0.3 * data.num_contexts)
    keys = contexts(data)
    chosen = set(contexts(part))
    assert [key for key in keys if key in chosen] == contexts(part)
    again, other = data.sample(0.3, seed=1), data.sample(0.3, seed=2)
    assert contexts(again) == contexts(part)
    assert set(contexts(other)) != chosen
    assert data.sample(1e-9, seed=1).num_contexts == 1


def test_batch_cuts_padding_and_marks_what_is_there():
    data = fake_data([2, 3, 1])
    batch = make_batch(data, np.array([[1, 2, 5], [2, 5, 6]]), truncate=True)
    assert batch.inputs[0].shape == (2, 1, 2)  # the longest history of contexts 1 and 2
    assert batch.mask.tolist() == [[True] * 3, [True, False, False]]
    assert batch.rows.tolist() == [2, 3, 4, 5]
    assert batch.inputs[6].tolist() == [[102, 103, 104], [105, 0, 0]]
    assert batch.inputs[10][batch.mask].tolist() == [[2 / 8], [3 / 8], [4 / 8], [5 / 8]]
    assert batch.labels[batch.mask].tolist() == [0, 1, 0, 1]
    whole = make_batch(data, np.array([[0, 0, 2]]), truncate=False)
    assert whole.inputs[0].shape == (1, 1, 12)
    assert make_batch(data, np.array([[0, 0, 2]]), truncate=True).inputs[0].shape == (1, 1, 1)


def test_seed_decides_the_order():
    data = fake_data(list(range(1, 12)) * 3)

    def order(seed):
        plan = plan_batches(data, batch_contexts=4, max_candidates=8, seed=seed)
        return torch.from_numpy(np.concatenate(plan)).tolist()

    assert order(1) == order(1)
    assert order(1) != order(2)


# Files.


def label_frame(**changes):
    frame = {
        "request_id": [1, 1],
        "user_id": ["u", "u"],
        "item_id": ["007", "8"],
        "event_timestamp": ["2024-01-02 03:04:05", "2024-01-02T03:04:05+01:00"],
        "clicked": [1, 0],
        "hour": [3.0, None],
    } | changes
    return pd.DataFrame({name: values for name, values in frame.items() if values is not None})


def test_csv_and_parquet_give_the_same_rows(tmp_path):
    frame = label_frame()
    frame.to_csv(tmp_path / "a.csv", index=False)
    times = pd.to_datetime(frame["event_timestamp"], utc=True, format="ISO8601")
    frame.assign(event_timestamp=times).to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        rows = load_impressions_file(tmp_path / name, ("hour", "place"))
        assert rows.item_ids.tolist() == ["007", "8"]
        assert rows.request_ids.tolist() == ["1", "1"]
        first = 1_704_164_645_000_000
        assert rows.times.tolist() == [first, first - 3_600_000_000]
        assert rows.clicked.tolist() == [1, 0]
        np.testing.assert_array_equal(rows.context, [[3, np.nan], [np.nan, np.nan]])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"clicked": None}, "has no column 'clicked'; it needs request_id, user_id"),
        ({"clicked": [1, 2]}, "has .*2.* for 'clicked' in row 2; it must be 0 or 1"),
        ({"clicked": [1, "yes"]}, "has 'yes' for 'clicked' in row 2; it must be a number"),
        ({"user_id": ["u", None]}, "has no value for 'user_id' in row 2"),
        ({"event_timestamp": ["2024-01-01", "soon"]}, "has 'soon' for 'event_timestamp' in row 2"),
        ({"event_timestamp": [1, 2]}, "holds 'event_timestamp' as numbers"),
        ({"hour": ["3", "late"]}, "has 'late' for 'hour' in row 2; it must be a number"),
    ],
)
def test_bad_file_gets_one_sentence(tmp_path, changes, sentence):
    label_frame(**changes).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataSetError, match=sentence):
        load_impressions_file(tmp_path / "a.csv", ("hour",))


def test_unreadable_files_get_one_sentence(tmp_path):
    with pytest.raises(DataSetError, match="does not exist"):
        load_impressions_file(tmp_path / "none.csv", ())
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataSetError, match=r"must end in .parquet or .csv"):
        load_impressions_file(tmp_path / "a.txt", ())
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataSetError, match="cannot be read"):
        load_impressions_file(tmp_path / "a.parquet", ())
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataSetError, match="cannot be read"):
        load_impressions_file(tmp_path / "a.csv", ())
    label_frame().head(0).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(DataSetError, match="has no rows"):
        load_impressions_file(tmp_path / "a.csv", ())
    label_frame(user_id=[1.5, 2.0]).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(DataSetError, match="holds 'user_id' as fractions"):
        load_impressions_file(tmp_path / "b.parquet", ())


def test_data_set_without_impressions_or_split_says_so(world):
    sources = world.sources
    without = sources.manifest.model_copy(update={"impressions": "none"})
    with pytest.raises(DataSetError, match="has no impressions"):
        load_impressions(sources.home, without, "train")
    with pytest.raises(DataSetError, match="lies in the later split"):
        load_impressions(sources.home, sources.manifest, "later")
