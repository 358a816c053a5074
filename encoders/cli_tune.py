"""The command tune."""

from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

import click

from encoders.cli_options import encoder_options
from encoders.config import EncoderConfig, Pooling, Precision, TuningConfig, TuningRecipe
from feature_repo.command import Settings, emit, pass_settings, rounded, say
from feature_repo.progress import BarLine


@click.command(short_help="Teach a language model which behaviours go together.")
@click.argument("folder", type=click.Path(path_type=Path))
@encoder_options
@click.option(
    "--until",
    type=click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"]),
    default=None,
    show_default="the first training impression, or the validation period if too little is before",
    help="Use only events strictly before this time, UTC.",
)
@click.option(
    "--recipe",
    type=click.Choice(get_args(TuningRecipe)),
    default=TuningConfig.recipe,
    show_default=True,
    help="What goes together: texts of the same or the user's next basket, or of the next one.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=TuningConfig.steps,
    show_default=True,
    help="Updates of the weights.",
)
@click.option(
    "--batch-texts",
    type=click.IntRange(min=2),
    default=TuningConfig.batch_texts,
    show_default=True,
    help="Distinct texts of a step.",
)
@click.option(
    "--group-texts",
    type=click.IntRange(min=1),
    default=TuningConfig.group_texts,
    show_default=True,
    help="Texts computed at once; moves speed and memory only.",
)
@click.option(
    "--learning-rate",
    type=click.FloatRange(min=0, min_open=True),
    default=TuningConfig.learning_rate,
    show_default=True,
    help="Highest.",
)
@click.option(
    "--final-weight",
    type=click.FloatRange(min=0),
    default=TuningConfig.final_weight,
    show_default=True,
    help="Of the same loss at the last layer; 0 tunes the layers below the split only.",
)
@click.option(
    "--dtype",
    type=click.Choice(get_args(Precision)),
    default=TuningConfig.dtype,
    show_default=True,
    help="Arithmetic of the tuning; weights are kept as float32.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=TuningConfig.seed,
    show_default=True,
    help="Of the choice of texts.",
)
@pass_settings
def tune(
    settings: Settings,
    *,
    folder: Path,
    model: str,
    split_layer: int | None,
    pooling: Pooling,
    prompt: str,
    max_tokens: int,
    threads: int | None,
    until: datetime | None,
    recipe: TuningRecipe,
    steps: int,
    batch_texts: int,
    group_texts: int,
    learning_rate: float,
    final_weight: float,
    dtype: Precision,
    seed: int,
) -> None:
    """Teach a language model which behaviours go together, before its lower half is frozen.

    Writes a model FOLDER for `longtrail encode --model FOLDER`, which makes a new version of the
    vectors. Split, pool and prompt there as here. Events of labelled requests would carry their
    labels into the vectors, so only those before the training impressions are used. A run that was
    killed goes on when the same command is given again.

    Example: longtrail tune --steps 100 models/tuned
    """
    import torch

    from encoders.tuning import tune as run_tuning

    config = TuningConfig(
        encoder=EncoderConfig(
            model=model,
            split_layer=split_layer,
            pooling=pooling,
            prompt=prompt,
            max_tokens=max_tokens,
        ),
        recipe=recipe,
        steps=steps,
        batch_texts=batch_texts,
        group_texts=group_texts,
        learning_rate=learning_rate,
        final_weight=final_weight,
        dtype=dtype,
        seed=seed,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    with BarLine() as bars:
        summary = run_tuning(
            settings.home,
            config,
            folder,
            until=until and until.replace(tzinfo=UTC),
            progress=bars.bar("tune", "steps"),
        )
    manifest = summary.manifest
    if summary.steps_resumed:
        say(f"Went on after step {summary.steps_resumed}.")
    for split, num in manifest.seen_labels.items():
        say(
            f"Note: {num:,} {split} impressions are older than {manifest.until.isoformat()}: the "
            "tuned model has seen their labels, so its vectors look better on them than they are."
        )
    say(f"Next: longtrail encode --model {summary.folder} --split-layer {manifest.split_layer}")
    emit(
        {
            "folder": str(summary.folder),
            "base_model": manifest.base_model,
            "split_layer": manifest.split_layer,
            "recipe": manifest.recipe,
            "until": manifest.until.isoformat(),
            "num_texts": manifest.num_texts,
            "num_pairs": manifest.num_pairs,
            "steps": manifest.steps,
            "first_loss": round(manifest.losses[0], 4),
            "last_loss": round(manifest.losses[-1], 4),
            "held_out_pairs": manifest.held_out.num_pairs,
            "held_out_auc_before": rounded(manifest.held_out.before),
            "held_out_auc_after": rounded(manifest.held_out.after),
            "seen_labels": manifest.seen_labels,
            "seconds": round(summary.seconds, 1),
        }
    )
