"""Whether deep outputs that were computed before are those of now.

A user's deep outputs depend on the newest behaviours and, in steps, on their ages: as long as
neither changes, computing them again gives the same numbers.
"""

import numpy as np

from encoders.inputs import UserInputs, history_keys
from feature_repo.artifact import ProgramParts
from feature_repo.features import UserFeatures

_ROUNDING = 1e-6
"""Ages and their logarithms are float32 in the program: so near below a step, relatively, it may
take an age for one beyond it."""


def history_key(
    users: UserFeatures, inputs: UserInputs, scenes: tuple[str, ...], form: ProgramParts
) -> int:
    """What the deep outputs of the only user depend on, but for ages."""
    return int(history_keys(users, inputs, scenes, form.deep_length)[0])


def is_current(
    users: UserFeatures, inputs: UserInputs, scenes: tuple[str, ...], form: ProgramParts
) -> bool:
    """Whether the only user's kept deep outputs are exactly those of the request's moment.

    Args:
        users: Read with deep outputs.
        inputs: Of the same user, all kept behaviours.
        scenes: The scenes of ``inputs``, in their order.
        form: The model's.
    """
    kept = users.outputs
    if kept is None or kept.history_keys[0] != history_key(users, inputs, scenes, form):
        return False
    width = len(scenes) * form.output_width
    if kept.vectors.shape[1] != width or not np.isfinite(kept.vectors[0]).all():
        return False
    there = inputs.history_rows[0, :, -form.deep_length :] != 0
    now = inputs.history_ages[0, :, -form.deep_length :][there].astype(np.float64)
    then = now - (users.request_times[0] // 1_000_000 - kept.computed_at[0])
    edges = np.array(form.age_edges_s)
    # The lowest step that it may have been on then, and the highest that it may be on now.
    first = edges.searchsorted(np.minimum(now, then), side="right")
    last = (edges * (1 - _ROUNDING)).searchsorted(np.maximum(now, then), side="right")
    return bool((first == last).all())
