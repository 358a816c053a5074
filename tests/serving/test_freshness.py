"""Kept deep outputs count as current exactly as long as they are those of the moment."""

from dataclasses import replace

import numpy as np
import pytest

from encoders.inputs import UserInputs, history_keys, user_inputs
from encoders.table import EmbeddingTable
from feature_repo.artifact import ProgramParts
from feature_repo.features import KeptOutputs, SceneSequence, UserFeatures
from serving.freshness import is_current

SCENES = ("view",)
FORM = ProgramParts(output_width=2, deep_length=2, age_edges_s=(3600.0, 7200.0))
NOW = 1_700_000_000
TABLE = EmbeddingTable(np.arange(1, 6), np.ones((6, 3), np.float32), "toy")


def user(*ages: int, now: int = NOW, ids: tuple[int, ...] | None = None) -> UserFeatures:
    """Behaviours 1, 2 and on, of so many seconds before NOW, oldest first, in four places."""
    values = np.zeros((3, 1, 4), dtype=np.int64)
    if ages:
        values[0, 0, -len(ages) :] = ids or range(1, len(ages) + 1)
        values[2, 0, -len(ages) :] = [NOW - age for age in ages]
    return UserFeatures(
        user_ids=np.array(["ann"], dtype=object),
        request_times=np.array([now * 1_000_000]),
        found=np.array([True]),
        sequences={"view": SceneSequence(*values, np.array([len(ages)]))},
        dense=np.zeros((1, 0), np.float32),
        dense_names=(),
    )


def inputs_of(users: UserFeatures, table: EmbeddingTable = TABLE) -> UserInputs:
    return user_inputs(users, table, scenes=SCENES)


def kept(users: UserFeatures, at: int = NOW, table: EmbeddingTable = TABLE) -> KeptOutputs:
    keys = history_keys(users, inputs_of(users, table), SCENES, FORM.deep_length)
    return KeptOutputs(np.ones((1, 2), np.float32), keys, np.array([at]))


def current(users: UserFeatures, outputs: KeptOutputs, form: ProgramParts = FORM) -> bool:
    users = replace(users, outputs=outputs)
    return is_current(users, inputs_of(users), SCENES, form)


@pytest.mark.parametrize(
    ("age", "later", "expected"),
    [
        (10, 3589, True),
        (10, 3590, False),  # an hour old now
        (3600, 0, True),
        (3600, 3599, True),
        (3600, 3600, False),
        (7200, 10**8, True),  # there is no further step
    ],
)
def test_until_an_age_reaches_a_step(age: int, later: int, expected: bool) -> None:
    users = user(age, now=NOW + later)
    assert current(users, kept(user(age))) is expected


def test_a_moment_before_counts_as_one_after() -> None:
    assert not current(user(3600, now=NOW - 1), kept(user(3600)))
    assert current(user(3601, now=NOW - 1), kept(user(3601)))


def test_where_rounding_may_decide_nothing_is_taken_for_granted() -> None:
    form = FORM.model_copy(update={"age_edges_s": (3600.0 * 2**13,)})
    assert not current(user(3600 * 2**13 - 2), kept(user(3600 * 2**13 - 2)), form)
    assert current(user(3600 * 2**13), kept(user(3600 * 2**13)), form)


def test_only_behaviours_that_the_outputs_depend_on_matter() -> None:
    before = kept(user(9000, 50, 40))
    assert current(user(8000, 50, 40), before)  # the oldest is not read: another time
    assert current(user(50, 40, ids=(2, 3)), before)  # or gone
    assert not current(user(9000, 50, 41), before)
    assert not current(user(50, 40, ids=(2, 4)), before)
    assert not current(user(9000, 50, 40, 40), before)


def test_a_vector_that_came_meanwhile_changes_the_history() -> None:
    without = EmbeddingTable(np.arange(1, 3), np.ones((3, 3), np.float32), "toy")
    before = kept(user(30, 20, 10), table=without)
    assert not current(user(30, 20, 10), before)
    assert current(user(20, ids=(2,)), kept(user(20, ids=(2,)), table=without))


def test_no_history_is_always_the_same() -> None:
    assert current(user(now=NOW + 10**7), kept(user()))


def test_what_is_not_there_or_does_not_fit() -> None:
    users = user(10)
    assert not is_current(users, inputs_of(users), SCENES, FORM)
    good = kept(users)
    assert not current(users, replace(good, vectors=np.full((1, 2), np.nan, np.float32)))
    assert not current(users, replace(good, vectors=np.ones((1, 4), np.float32)))
    assert not current(users, replace(good, history_keys=np.array([0])))
