"""What each past behaviour adds to the score of one item for one user.

:mod:`encoders.attribution` with the features read and the texts named.
"""

from dataclasses import dataclass

import numpy as np

from encoders.attribution import attribute
from encoders.inputs import item_inputs, user_inputs
from encoders.loaded_artifact import load_artifact
from feature_repo.catalog import Catalog
from training.impressions import Impressions
from training.sources import Sources

SHOWN_BEHAVIORS = 10


@dataclass(frozen=True)
class Explanation:
    """One item's score for one user at one time, and where it comes from."""

    user_id: str
    item_id: str
    title: str
    """Of the item; empty where it has no text."""
    logit: float
    logit_without_history: float
    behaviors: list[tuple[str, float]]
    """``<scene>: <text>`` (how often) and what it adds to the logit, strongest first."""


def explain(
    sources: Sources, run: str, request: Impressions, *, number: int = SHOWN_BEHAVIORS
) -> Explanation:
    """Explain the score of one impression by leaving behaviours out.

    Args:
        sources: What to read from.
        run: Name of a finished run.
        request: One row: who, what, when and the request's own features.
        number: Most behaviours that are named.

    Raises:
        ArtifactError: If there is no such run, or it does not fit the feature store.
        ValueError: If there is not exactly one row.
    """
    if len(request) != 1:
        raise ValueError(f"one impression is explained at a time, got {len(request)}")
    artifact = load_artifact(sources.home, run)
    manifest = artifact.manifest
    sources = sources.with_encoder(manifest.encoder_fingerprint)
    users = sources.reader.historical_users(request.user_ids, request.times)
    items = sources.reader.historical_items(request.item_ids, request.times)
    user = user_inputs(users, sources.table, scenes=manifest.scenes)
    item = item_inputs(items, sources.table, vocabularies=manifest.category_vocabularies)
    found = attribute(
        artifact.score,
        sources.table,
        user,
        item,
        request.context[0],
        sequence_length=manifest.sequence_length,
    )
    strongest = found.strongest(number)
    scenes = [manifest.scenes[index] for index in found.scene_index[strongest]]
    texts = Catalog.load(sources.home)
    ids = np.array(
        [
            users.sequences[scene].behavior_ids[0, place]
            for scene, place in zip(scenes, found.position[strongest], strict=True)
        ],
        dtype=np.int64,
    )
    names = [
        f"{scene}: {text or 'a text that is not in the catalogue'}"
        + (f" ({count} times)" if count > 1 else "")
        for scene, text, count in zip(scenes, texts.texts(ids), found.count[strongest], strict=True)
    ]
    return Explanation(
        user_id=str(request.user_ids[0]),
        item_id=str(request.item_ids[0]),
        title=texts.texts(items.text_ids)[0],
        logit=float(found.logits[0]),
        logit_without_history=float(found.logits_without_history[0]),
        behaviors=[
            (name, float(value))
            for name, value in zip(names, found.contributions[strongest, 0], strict=True)
        ],
    )


def explain_examples(
    sources: Sources, run: str, rows: Impressions, *, number: int = 3
) -> list[Explanation]:
    """Explain clicked rows of different users, spread over the rows' time.

    A user without any history is passed over: there is nothing to explain.
    """
    clicked = np.flatnonzero(rows.clicked == 1)
    _, first = np.unique(rows.user_ids[clicked].astype(str), return_index=True)
    candidates = np.sort(clicked[first])
    examples = []
    for part in np.array_split(candidates, min(number, len(candidates)) or 1):
        explained = (explain(sources, run, rows.take(part[[place]])) for place in range(len(part)))
        example = next((found for found in explained if found.behaviors), None)
        if example is not None:
            examples.append(example)
    return examples
