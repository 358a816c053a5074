"""The deep half as a config asks for it: one or several, trained in full, in part or not at all."""

import copy

from torch import nn

from encoders.layout import final_norm_name, layer_stack
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
        ValueError: If ``config.gradient_checkpointing`` or ``config.num_trained_layers`` is set and
            ``deep_half`` has no layers to tell apart.
        EncoderError: If there are fewer layers than are to be trained, or LoRA is wanted and not
            installed, or finds nothing to adapt.
    """
    for module in deep_half.modules():
        if isinstance(module, nn.Dropout):
            module.p = config.deep_dropout
    if config.fine_tune == "frozen":
        deep_half.requires_grad_(False)
    if config.num_trained_layers is not None:
        top = _top_layers(deep_half, config.num_trained_layers)
        deep_half.requires_grad_(False)
        for module in top:
            module.requires_grad_(True)
    halves = [deep_half]
    if not config.share_scenes:
        halves += [copy.deepcopy(deep_half) for _ in range(num_scenes - 1)]
    for half in halves:
        if config.gradient_checkpointing:
            _of_layers(half, "gradient_checkpointing").checkpoint_gradients(contexts)
        if config.fine_tune == "lora":  # after copying: each draws its own start
            add_adapters(half, rank=config.lora_rank)
    return deep_half if config.share_scenes else nn.ModuleList(halves)


def _of_layers(deep_half: nn.Module, option: str) -> DeepHalf:
    if not isinstance(deep_half, DeepHalf):
        raise ValueError(
            f"{option} needs an encoders.split.DeepHalf, got a {type(deep_half).__name__}"
        )
    return deep_half


def _top_layers(deep_half: nn.Module, number: int) -> list[nn.Module]:
    """The highest layers and the norm above them."""
    model = _of_layers(deep_half, "num_trained_layers").model
    layers, norm = layer_stack(model), final_norm_name(model)
    if number > len(layers):
        raise EncoderError(
            f"num_trained_layers must be in [1, {len(layers)}] (the deep half's layers), "
            f"got {number}"
        )
    return [*layers[-number:], *([] if norm is None else [getattr(model, norm)])]


def add_adapters(module: nn.Module, *, rank: int) -> None:
    """Put LoRA adapters beside the linear layers that learn, in place; all else is frozen.

    A fresh adapter adds nothing: the outputs change only as it learns. The adapters stay beside the
    weights in the artifact, so that a checkpoint, a loaded model and the model that learned have
    the same parameters; the exported program holds them as two small matrix products per layer.

    Args:
        module: A deep half: its linear layers are those of attention and MLP. One whose weights
            are frozen gets no adapter.
        rank: Inner width of an adapter, at least 1.

    Raises:
        EncoderError: If the package peft is not installed, or no linear layer learns.

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
    linear = [
        name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and part.weight.requires_grad
    ]
    if not linear:
        raise EncoderError(
            f"fine_tune 'lora' adapts linear layers, and a {type(module).__name__} has none: "
            "choose fine_tune 'full' or 'frozen'"
        )
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=linear), module)
