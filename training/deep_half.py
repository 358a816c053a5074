"""The deep half as a config asks for it: one or several, trained in full, in part or not at all."""

import copy

from torch import nn

from encoders.split import CheckpointContexts, DeepHalf
from feature_repo.errors import EncoderError
from training.config import BaheConfig


def prepare_deep_half(
    deep_half: nn.Module,
    config: BaheConfig,
    *,
    num_scenes: int,
    contexts: CheckpointContexts,
) -> nn.Module:
    """Set up dropout, what is trained, gradient checkpointing, and a copy for each scene.

    Args:
        deep_half: With its pretrained weights; taken over.
        config: How the model is built.
        num_scenes: S; read where ``config.share_scenes`` is False.
        contexts: See :meth:`encoders.split.DeepHalf.checkpoint_gradients`.

    Returns:
        The deep half itself, or a ``ModuleList`` of S of them where the scenes share none.

    Raises:
        ValueError: If ``config.gradient_checkpointing`` is set and ``deep_half`` has no layers to
            checkpoint.
        EncoderError: If LoRA is wanted and not installed, or finds nothing to adapt.
    """
    for module in deep_half.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.deep_dropout
    if config.fine_tune == "frozen":
        deep_half.requires_grad_(False)
    halves = [deep_half]
    if not config.share_scenes:
        halves += [copy.deepcopy(deep_half) for _ in range(num_scenes - 1)]
    for half in halves:
        if config.gradient_checkpointing:
            if not isinstance(half, DeepHalf):
                raise ValueError(
                    "gradient_checkpointing needs an encoders.split.DeepHalf, got a "
                    f"{type(half).__name__}"
                )
            half.checkpoint_gradients(contexts)
        if config.fine_tune == "lora":
            add_adapters(half, rank=config.lora_rank)  # after copying: each draws its own start
    return deep_half if config.share_scenes else nn.ModuleList(halves)


def add_adapters(module: nn.Module, *, rank: int) -> None:
    """Put LoRA adapters beside all linear layers, in place; everything else is frozen.

    A fresh adapter adds nothing: the outputs change only as it learns. The adapters stay beside the
    weights in the artifact, so that a checkpoint, a loaded model and the model that learned have
    the same parameters; the exported program holds them as two small matrix products per layer.

    Args:
        module: A deep half: its linear layers are those of attention and MLP.
        rank: Inner width of an adapter, at least 1.

    Raises:
        EncoderError: If the package peft is not installed, or there is no linear layer.

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022,
        arXiv:2106.09685; the factor alpha / rank is 1, no dropout.
    """
    try:
        # An optional extra, and slow to import: only where it is asked for.
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise EncoderError(
            "fine_tune 'lora' needs the package peft, which is not installed: run "
            "`pip install 'longtrail[lora]'`, or choose fine_tune 'full' or 'frozen'"
        ) from error
    linear = [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise EncoderError(
            f"fine_tune 'lora' adapts linear layers, and a {type(module).__name__} has none: "
            "choose fine_tune 'full' or 'frozen'"
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=linear), module)
