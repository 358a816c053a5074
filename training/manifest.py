"""What a trained model says about itself: its inputs, its settings, its figures."""

from datetime import UTC, datetime
from typing import Any

from feature_repo.artifact import ArtifactManifest, Calibration, ProgramParts
from feature_repo.definitions import CTR_SERVICE
from feature_repo.revision import git_revision
from training.artifact import describe_recipe, versions
from training.dataset import ClickData
from training.recipes import Recipe
from training.schema import InputSchema
from training.sources import Sources


def input_schema(sources: Sources, recipe: Recipe, data: ClickData) -> InputSchema:
    """What a recipe's model reads, from the training rows."""
    return InputSchema(
        scenes=sources.manifest.scenes,
        # The reader may keep fewer behaviours than the recipe would take.
        sequence_length=min(recipe.sequence_length, data.users.history_rows.shape[-1]),
        vector_width=sources.table.width,
        user_dense_names=data.user_dense_names,
        item_dense_names=data.item_dense_names,
        context_names=data.impressions.context_names,
        evidence_names=data.evidence_names,
        category_vocabularies=data.category_vocabularies,
    )


def artifact_manifest(
    sources: Sources,
    recipe: Recipe,
    schema: InputSchema,
    run: str,
    train_data: ClickData,
    history: list[dict[str, Any]],
    *,
    calibration: Calibration,
    parts: ProgramParts | None,
) -> ArtifactManifest:
    """What an artifact says about itself, but for its metrics.

    Args:
        sources: What was read from.
        recipe: What was trained; its settings and the validations become ``config``.
        schema: What the model reads.
        run: Name of the run.
        train_data: What was learned from, for its time range.
        history: One entry per validation.
        calibration: Of the program.
        parts: Of the program; None where it has none.
    """
    times = train_data.impressions.times
    start, end = (datetime.fromtimestamp(int(t) / 1e6, UTC) for t in (times.min(), times.max()))
    return ArtifactManifest(
        run=run,
        created=datetime.now(UTC),
        dataset=sources.manifest.dataset,
        source_fingerprint=sources.manifest.source_fingerprint,
        feature_service=CTR_SERVICE,
        scenes=schema.scenes,
        sequence_length=schema.sequence_length,
        user_dense_names=schema.user_dense_names,
        item_dense_names=schema.item_dense_names,
        context_names=schema.context_names,
        evidence_names=schema.evidence_names,
        evidence_kinds=getattr(recipe.model, "evidence_kinds", None),
        category_vocabularies=schema.category_vocabularies,
        encoder_fingerprint=sources.table.fingerprint,
        encoder_width=schema.vector_width,
        recipe=recipe.name,
        config={**describe_recipe(recipe), "validations": history},
        seed=recipe.training.seed,
        git_revision=git_revision(),
        versions=versions(),
        train_start=start,
        train_end=end,
        metrics={},
        parts=parts,
        calibration=calibration,
    )
