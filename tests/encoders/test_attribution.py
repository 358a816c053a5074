"""Contributions against scores whose answer is known by hand."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from encoders.attribution import CHUNK_CONTEXTS, attribute
from encoders.evidence import evidence_names
from encoders.inputs import ItemInputs, UserInputs
from encoders.table import EmbeddingTable
from feature_repo.artifact import PROGRAM_INPUTS

TABLE = EmbeddingTable(np.arange(1, 9), np.eye(9, dtype=np.float32) * (np.arange(9) > 0), "eye")
DAY = 86_400.0


def make_user(rows, keys=None, ages=None) -> UserInputs:
    rows = np.asarray(rows, dtype=np.int64)[None]
    keys = rows * 11 if keys is None else np.asarray(keys, dtype=np.int64)[None]
    there = (rows != 0) | (keys != 0)
    if ages is None:  # the last place is a day old, the one before it two days
        ages = np.broadcast_to(np.arange(rows.shape[-1], 0, -1) * DAY, rows.shape)
    return UserInputs(
        history_rows=rows,
        history_item_keys=keys,
        history_ages=np.where(there, ages, 0).astype(np.float32),
        history_totals=there.sum(-1).astype(np.float32) + 2,
        user_dense=np.array([[5.0]], dtype=np.float32),
    )


def make_item(row: int = 3) -> ItemInputs:
    return ItemInputs(
        candidate_rows=np.array([row]),
        candidate_item_keys=np.array([row * 11]),
        candidate_dense=np.array([[0.5, np.nan]], dtype=np.float32),
        candidate_categories=np.array([[1]]),
        neighbor_keys=np.array([[22, 44]]),
        neighbor_weights=np.array([[[0.5, 0.25], [0.125, 0.0]]], dtype=np.float32),
    )


class Program:
    """A score with an answer by hand: the weights of the rows that are there, added up."""

    def __init__(self, weights=(0, 1, 2, 4, 8, 16, 32, 64, 128)) -> None:
        self.weights = torch.tensor(weights, dtype=torch.float32)
        self.calls: list[dict[str, torch.Tensor]] = []

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(PROGRAM_INPUTS, inputs, strict=True))
        self.calls.append(named)
        sums = self.weights[named["history_rows"]].sum((1, 2))
        return sums[:, None].expand(named["candidate_rows"].shape)


CONTEXT = np.array([1.0], dtype=np.float32)


def explain(score, user, item=None, **options):
    """Of a program that reads all that is kept, where the test says nothing else."""
    options = {"sequence_length": user.history_rows.shape[-1]} | options
    return attribute(score, TABLE, user, item or make_item(), CONTEXT, **options)


def test_single_behaviours_newest_first():
    score = Program()
    user = make_user([[0, 1, 3, 3], [0, 0, 2, 1]])
    found = explain(score, user, group_by_text=False)
    assert found.contributions[:, 0].tolist() == [4, 1, 4, 2, 1]
    assert found.scene_index.tolist() == [0, 1, 0, 1, 0]
    assert found.position.tolist() == [3, 3, 2, 2, 1]
    assert found.count.tolist() == [1] * 5
    assert (found.logits, found.logits_without_history) == ([12], [0])
    assert found.strongest(2).tolist() == [0, 2]


def test_the_same_text_of_a_scene_is_left_out_together():
    found = explain(Program(), make_user([[3, 1, 3, 3], [0, 0, 3, 1]]))
    assert found.contributions[:, 0].tolist() == [12, 1, 4, 1]
    assert found.scene_index.tolist() == [0, 1, 1, 0]
    assert found.position.tolist() == [3, 3, 2, 1]
    assert found.count.tolist() == [3, 1, 1, 1]


def test_what_hides_one_by_one_shows_as_a_group():
    def bought_before(*inputs: torch.Tensor) -> torch.Tensor:
        keys, candidates = inputs[2], inputs[7]
        return (keys == candidates[:, :, None]).any(-1).any(-1, keepdim=True).float()

    user = make_user([[3, 3, 3, 1]])
    single = explain(bought_before, user, group_by_text=False)
    grouped = explain(bought_before, user)
    assert single.contributions[:, 0].tolist() == [0, 0, 0, 0]
    assert grouped.contributions[:, 0].tolist() == [0, 1]


def test_leaving_out_empties_the_place_and_lowers_the_total():
    score = Program()
    user = make_user([[0, 1, 3, 3], [0, 0, 0, 2]])
    explain(score, user)
    (call,) = score.calls
    assert [tuple(call[name].shape) for name in PROGRAM_INPUTS[1:]] == [
        (5, 2, 4),
        (5, 2, 4),
        (5, 2, 4),
        (5, 2),
        (5, 1),
        (5, 1),
        (5, 1),
        (5, 1, 2),
        (5, 1, 1),
        (5, 1, 1),
        (5, 1, len(evidence_names("ab"))),
    ]
    # The newest is the text of row 3, twice in the first scene; then row 2, then row 1.
    assert call["history_rows"][0].tolist() == [[0, 1, 0, 0], [0, 0, 0, 2]]
    assert call["history_item_keys"][0].tolist() == [[0, 11, 0, 0], [0, 0, 0, 22]]
    assert call["history_ages"][0].tolist() == [[0, 3 * DAY, 0, 0], [0, 0, 0, DAY]]
    assert call["history_totals"].tolist() == [[3, 3], [5, 2], [4, 3], [5, 3], [2, 2]]
    whole, nothing = 3, 4
    assert torch.equal(call["history_rows"][whole], torch.from_numpy(user.history_rows[0]))
    assert not call["history_rows"][nothing].any()
    assert call["user_dense"].tolist() == [[5.0]] * 5
    assert call["candidate_rows"].tolist() == [[3]] * 5
    assert call["context"].tolist() == [[[1.0]]] * 5
    for name, value in call.items():
        wanted = torch.int64 if name.endswith(("rows", "keys", "categories")) else torch.float32
        assert value.dtype is wanted, name


def test_a_behaviour_whose_text_is_not_in_the_table_goes_by_its_item():
    user = make_user([[0, 0, 0, 1]], keys=[[70, 80, 70, 11]])
    score = Program()
    found = explain(score, user)
    assert found.position.tolist() == [3, 2, 1]
    assert found.count.tolist() == [1, 2, 1]
    assert score.calls[0]["history_item_keys"][1].tolist() == [[0, 80, 0, 11]]


def test_only_the_newest_of_all_scenes_and_groups_as_a_whole():
    ages = [[[9 * DAY, 8 * DAY, 7 * DAY], [9 * DAY, 2 * DAY, 1 * DAY]]]
    user = make_user([[5, 2, 3], [4, 5, 4]], ages=ages)
    found = explain(Program(), user, max_behaviors=3)
    assert found.scene_index.tolist() == [1, 1, 0]
    assert found.position.tolist() == [2, 1, 2]
    assert found.contributions[:, 0].tolist() == [16, 16, 4]
    assert found.count.tolist() == [2, 1, 1]


def test_long_histories_go_in_chunks_and_the_result_is_the_same():
    rows = np.random.default_rng(0).integers(1, 9, size=(2, 70))
    score = Program()
    found = explain(score, make_user(rows), max_behaviors=1000, group_by_text=False)
    assert [len(call["context"]) for call in score.calls] == [64, 64, 14]
    assert CHUNK_CONTEXTS == 64
    expected = score.weights.numpy()[rows[found.scene_index, found.position]]
    np.testing.assert_array_equal(found.contributions[:, 0], expected)
    assert len(found) == 140


def test_an_empty_history_has_nothing_to_attribute():
    found = explain(Program(), make_user([[0, 0, 0]]))
    assert len(found) == 0
    assert found.logits.tolist() == found.logits_without_history.tolist() == [0]
    assert found.strongest(3).tolist() == []


def test_the_evidence_is_counted_without_what_is_left_out():
    names = evidence_names(("buy",))
    bought, near, text = map(
        names.index, ("same_buy_count", "near_basket_sum", "text_buy_recent_max")
    )

    def score(*inputs: torch.Tensor) -> torch.Tensor:
        evidence = torch.nan_to_num(dict(zip(PROGRAM_INPUTS, inputs, strict=True))["evidence"])
        return 100 * evidence[..., bought] + 10 * evidence[..., near] + evidence[..., text]

    # The item is bought three times; its neighbours are those of row 2 (.5) and row 4 (.125).
    found = explain(score, make_user([[3, 2, 3, 4, 3]]))
    single = explain(score, make_user([[3, 2, 3, 4, 3]]), group_by_text=False)
    assert found.position.tolist() == [4, 3, 1]
    np.testing.assert_allclose(found.contributions[:, 0], [300, 1.25, 5], atol=1e-5)
    np.testing.assert_allclose(single.contributions[:, 0], [100, 1.25, 100, 5, 100], atol=1e-5)
    assert found.logits[0] == pytest.approx(306.25)
    assert found.logits_without_history[0] == 0


def test_behaviours_older_than_the_program_reads_speak_through_the_evidence():
    bought = evidence_names(("buy",)).index("same_buy_count")
    widths = []

    def score(*inputs: torch.Tensor) -> torch.Tensor:
        named = dict(zip(PROGRAM_INPUTS, inputs, strict=True))
        widths.append(named["history_rows"].shape[-1])
        counted = torch.nan_to_num(named["evidence"][..., bought])
        return counted + Program()(*inputs) / 1000

    user = make_user([[3, 3, 1, 2, 3]])
    found = explain(score, user, sequence_length=2, group_by_text=False)
    assert widths == [2]
    assert found.position.tolist() == [4, 3, 2, 1, 0]
    expected = [1.004, 0.002, 0, 1, 1]  # the program sees the rows of the newest two alone
    np.testing.assert_allclose(found.contributions[:, 0], expected, atol=1e-6)
    grouped = explain(score, user, sequence_length=2)
    assert grouped.count.tolist() == [3, 1, 1]
    np.testing.assert_allclose(grouped.contributions[:, 0], [3.004, 0.002, 0], atol=1e-6)


def test_totals_never_fall_below_zero():
    user = replace(make_user([[1, 2]]), history_totals=np.zeros((1, 1), dtype=np.float32))
    score = Program()
    explain(score, user)
    assert not score.calls[0]["history_totals"].any()


def test_several_items_get_what_each_gets_alone():
    rows = np.array([[1, 2, 3, 0], [0, 4, 1, 5]])
    user = make_user(rows)
    one, other = make_item(), make_item()
    both = ItemInputs(
        **{
            f.name: np.concatenate([getattr(one, f.name), getattr(other, f.name)])
            for f in fields(one)
        }
    )
    score = Program()
    found = explain(score, user, both)
    alone = explain(Program(), user, one)
    assert found.contributions.shape == (len(alone), 2)
    np.testing.assert_allclose(found.contributions[:, 0], alone.contributions[:, 0])
    np.testing.assert_allclose(found.contributions[:, 1], alone.contributions[:, 0])
    np.testing.assert_allclose(found.logits, np.repeat(alone.logits, 2))


def test_one_user_and_at_least_one_behaviour():
    user, item = make_user([[1, 2]]), make_item()
    two = UserInputs(**{f.name: np.repeat(getattr(user, f.name), 2, axis=0) for f in fields(user)})
    with pytest.raises(ValueError, match="for one user, got 2"):
        explain(Program(), two, item)
    with pytest.raises(ValueError, match="max_behaviors must be at least 1, got 0"):
        explain(Program(), user, item, max_behaviors=0)
