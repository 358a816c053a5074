"""The command encode."""

from typing import get_args

import click

from encoders.cli_options import encoder_options
from encoders.config import EncoderConfig, Pooling, Precision
from feature_repo.command import Settings, emit, pass_settings
from feature_repo.progress import progress_bar
from feature_repo.publish import publish


@click.command()
@encoder_options
@click.option(
    "--normalize/--no-normalize",
    default=EncoderConfig.normalize,
    show_default=True,
    help="Scale vectors to unit length.",
)
@click.option(
    "--dtype",
    type=click.Choice(get_args(Precision)),
    default=EncoderConfig.dtype,
    show_default=True,
    help="Arithmetic of the model; vectors are stored as float32.",
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=EncoderConfig.batch_tokens,
    show_default=True,
    help="Tokens computed at once; moves speed and memory only.",
)
@pass_settings
def encode(
    settings: Settings,
    *,
    model: str,
    split_layer: int | None,
    pooling: Pooling,
    prompt: str,
    normalize: bool,
    dtype: Precision,
    max_tokens: int,
    batch_tokens: int,
    threads: int | None,
) -> None:
    """Turn every distinct behaviour text into a vector, once.

    Texts that this encoder has encoded before are skipped, so running it again, or after a kill,
    does only what is missing. Other settings make a new version beside the old one.

    Example: longtrail encode --model intfloat/e5-small-v2 --split-layer 6 --prompt "query: {text}"
    """
    # torch and transformers take seconds to import, and no other command's help should wait.
    import torch

    from encoders.encode import encode_behaviors

    config = EncoderConfig(
        model=model,
        split_layer=split_layer,
        pooling=pooling,
        prompt=prompt,
        normalize=normalize,
        dtype=dtype,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    with progress_bar("encode", "texts") as progress:
        summary = encode_behaviors(settings.home, config, progress)
    emit(
        {
            "num_behaviors": summary.num_behaviors,
            "num_new": summary.num_new,
            "num_at_limit": summary.num_at_limit,
            "texts_per_s": summary.texts_per_s and round(summary.texts_per_s, 1),
            "model": summary.manifest.model,
            "split_layer": summary.manifest.split_layer,
            "width": summary.manifest.width,
            "fingerprint": summary.manifest.fingerprint,
            "seconds": round(summary.seconds, 3),
            **publish(settings),
        }
    )
