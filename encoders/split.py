"""A language model cut in two at a layer: the shallow half below, the deep half above.

``hidden_states[k]`` are the token states after layer k, ``hidden_states[0]`` the embeddings. The
shallow half maps token ids to ``hidden_states[k]``; the deep half maps ``hidden_states[k]`` to the
model's last hidden states, final norm included. Fed one into the other, with the same mask, they
equal the whole model.

Shapes: B = batch, T = tokens, M = sequence length of the deep half, D = width, L = layers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from encoders.pretrained import load_model
from feature_repo.errors import EncoderError

_STACKS = (("encoder", "layer"), ("transformer", "layer"), ("", "layers"))
"""Where the layers lie: BERT, RoBERTa, ELECTRA, MPNet; DistilBERT; Llama, Mistral, Qwen, ModernBERT."""
_FINAL_NORMS = ("norm", "final_norm")
"""Names of the norm after the last layer in models of the third kind."""
_PROBE_TOKENS = 8
"""Tokens of the trial run that a loaded half must pass."""
_TOLERANCE = 1e-3
"""Largest difference accepted there, relative to the largest state; float32 gives about 1e-6."""


class ShallowHalf(nn.Module):
    """Embeddings and layers 1..k; the layers above are removed.

    Args:
        model: A transformers base model; taken over and cut in place.
        split_layer: k, in [1, L]; k = L is the whole model with its final norm.

    Raises:
        EncoderError: If the model's layout is unknown or k is out of range.
    """

    def __init__(self, model: nn.Module, split_layer: int) -> None:
        super().__init__()
        num_layers = len(_layers(model))
        _check_split(split_layer, num_layers)
        norm = _final_norm_name(model)
        if norm is not None and split_layer < num_layers:
            setattr(model, norm, nn.Identity())  # hidden_states[k] are taken before the norm
        _keep_layers(model, 0, split_layer)
        self.model = model
        self.width: int = _config(model).hidden_size

    def forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Compute ``hidden_states[k]``; mask 1 = keep, None = every token is kept."""
        states: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask
        ).last_hidden_state
        return states


class DeepHalf(nn.Module):
    """Layers k+1..L and the final norm over vectors instead of tokens; trainable, exportable.

    Args:
        model: A transformers base model; taken over and cut in place.
        split_layer: k, in [1, L - 1].
        num_layers: Keep only the first so many of the L - k layers; None keeps them all.

    Raises:
        EncoderError: If the model's layout is unknown, or k or ``num_layers`` is out of range.
    """

    def __init__(self, model: nn.Module, split_layer: int, num_layers: int | None = None) -> None:
        super().__init__()
        total = len(_layers(model))
        _check_split(split_layer, total - 1)
        deep = total - split_layer
        kept = deep if num_layers is None else num_layers
        if not 1 <= kept <= deep:
            raise EncoderError(
                f"num_layers must be in [1, {deep}] (the layers above layer {split_layer} of "
                f"{total}), got {kept}"
            )
        _keep_layers(model, split_layer, split_layer + kept)
        if hasattr(model, "embeddings"):
            model.embeddings = _VectorsAsTheyAre()
        else:
            model.embed_tokens = None
        self.model = model
        self.width: int = _config(model).hidden_size

    def forward(
        self, inputs_embeds: Float[Tensor, "B M D"], attention_mask: Int[Tensor, "B M"]
    ) -> Float[Tensor, "B M D"]:
        """Compute the last hidden states.

        Args:
            inputs_embeds: States of layer k, or vectors in their place.
            attention_mask: 1 = keep, 0 = padding; at least one kept per row.

        Returns:
            States of every position; those of padding mean nothing.
        """
        states: Tensor = self.model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask
        ).last_hidden_state
        return states


class _VectorsAsTheyAre(nn.Module):
    """Stands where the token embeddings were: hands the given vectors on."""

    def forward(
        self,
        input_ids: Tensor | None = None,  # noqa: ARG002 - DistilBERT passes it by position
        inputs_embeds: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        assert inputs_embeds is not None
        return inputs_embeds


def load_shallow_half(
    name_or_folder: str, split_layer: int, *, dtype: torch.dtype = torch.float32
) -> ShallowHalf:
    """Load a model and keep its shallow half, frozen, in evaluation mode.

    Args:
        name_or_folder: See :func:`encoders.pretrained.find_model_folder`.
        split_layer: k, in [1, L].
        dtype: Arithmetic.

    Raises:
        EncoderError: If the model cannot be loaded or split.
    """
    half = ShallowHalf(load_model(name_or_folder, dtype), split_layer)
    half.requires_grad_(False)
    _try_shallow_half(half, name_or_folder, split_layer)
    return half


def load_deep_half(
    name_or_folder: str, split_layer: int, *, num_layers: int | None = None
) -> DeepHalf:
    """Load a model and keep its deep half, float32, trainable, in evaluation mode.

    Before the cut is kept, both sides are run once on a few tokens and compared with the whole.

    Args:
        name_or_folder: See :func:`encoders.pretrained.find_model_folder`.
        split_layer: k, in [1, L - 1].
        num_layers: Keep only the first so many deep layers; None keeps them all.

    Raises:
        EncoderError: If the model cannot be loaded or split.
    """
    model = load_model(name_or_folder)
    _check_split(split_layer, len(_layers(model)) - 1)
    tokens = torch.arange(_PROBE_TOKENS)[None] % _config(model).vocab_size
    mask = torch.ones_like(tokens)
    with torch.inference_mode():
        whole = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    half = DeepHalf(model, split_layer)
    with torch.inference_mode():
        states = half(whole.hidden_states[split_layer], mask)
    _check_equal(states, whole.last_hidden_state, name_or_folder, split_layer)
    return half if num_layers is None else DeepHalf(model, 0, num_layers)


def _layers(model: nn.Module) -> nn.ModuleList:
    """Find the stack of layers."""
    for holder_name, name in _STACKS:
        holder = getattr(model, holder_name, None) if holder_name else model
        layers = getattr(holder, name, None)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return layers
    raise EncoderError(_unknown_layout(model))


def _final_norm_name(model: nn.Module) -> str | None:
    """Find the norm after the last layer; BERT's family has none."""
    if not hasattr(model, "layers"):
        return None
    for name in _FINAL_NORMS:
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    raise EncoderError(_unknown_layout(model))
