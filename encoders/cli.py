"""The command ``longtrail encode``."""

from typing import get_args

import click

from encoders.config import DEFAULT_MODEL, EncoderConfig, Pooling, Precision
from feature_repo.command import Settings, emit, pass_settings
from feature_repo.progress import progress_bar


@click.command()
@click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    metavar="NAME",
    help="The default model's package, a folder in the Hugging Face format, or a name on the hub.",
)
@click.option(
    "--split-layer",
    type=click.IntRange(min=1),
    default=None,
    show_default="3 for the default model, else half of the layers",
    help="Run the layers up to this one; the layers above are trained later.",
)
@click.option(
    "--pooling",
    type=click.Choice(get_args(Pooling)),
    default=EncoderConfig.pooling,
    show_default=True,
    help="How token states become one vector.",
)
@click.option(
    "--prompt",
    default=EncoderConfig.prompt,
    show_default=True,
    help="Template that each text is put into.",
)
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
    "--max-tokens",
    type=click.IntRange(min=1),
    default=EncoderConfig.max_tokens,
    show_default=True,
    help="Tokens kept of a text.",
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    default=EncoderConfig.batch_tokens,
    show_default=True,
    help="Tokens computed at once; moves speed and memory only.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=None,
    show_default="torch's choice: one per core",
    help="Threads of the model's arithmetic.",
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
        }
    )


commands: list[click.Command] = [encode]
