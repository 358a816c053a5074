"""A language model cut in two at a layer: the shallow half below, the deep half above.

``hidden_states[k]`` are the token states after layer k, ``hidden_states[0]`` the embeddings. The
shallow half maps token ids to ``hidden_states[k]``; the deep half maps ``hidden_states[k]`` to the
model's last hidden states, final norm included. Fed one into the other, with the same mask, they
equal the whole model.

Shapes: B = batch, T = tokens, M = sequence length of the deep half, D = width, L = layers.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from encoders.layout import final_norm_name, keep_layers, layer_stack
from encoders.pretrained import load_model
from feature_repo.errors import EncoderError

_PROBE_TOKENS = 8
"""Tokens of the trial run that a loaded half must pass."""
_TOLERANCE = 1e-3
"""Largest difference accepted there, relative to the largest state; float32 gives about 1e-6."""

CheckpointContexts = Callable[
    [], tuple[AbstractContextManager[object], AbstractContextManager[object]]
]
"""See :meth:`DeepHalf.checkpoint_gradients`."""


class ShallowHalf(nn.Module):
    """Embeddings and layers 1..k; the layers above are removed.

    Args:
        model: A transformers base model; taken over and cut in place.
        split_layer: k, in [1, L]; k = L is the whole model with its final norm.

    Raises:
        EncoderError: If the model's layout is unknown or k is out of range.
    """

    def __init__(self, model: PreTrainedModel, split_layer: int) -> None:
        super().__init__()
        num_layers = len(layer_stack(model))
        _check_split(split_layer, num_layers, f"a model of {num_layers} layers")
        norm = final_norm_name(model)
        if norm is not None and split_layer < num_layers:
            setattr(model, norm, nn.Identity())  # hidden_states[k] are taken before the norm
        keep_layers(model, 0, split_layer)
        self.model = model
        self.width: int = model.config.hidden_size

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

    def __init__(
        self, model: PreTrainedModel, split_layer: int, num_layers: int | None = None
    ) -> None:
        super().__init__()
        total = len(layer_stack(model))
        _check_split(split_layer, total - 1, f"the deep half of a model of {total} layers")
        deep = total - split_layer
        kept = deep if num_layers is None else num_layers
        if not 1 <= kept <= deep:
            raise EncoderError(
                f"num_layers must be in [1, {deep}] (the layers above layer {split_layer} of "
                f"{total}), got {kept}"
            )
        keep_layers(model, split_layer, split_layer + kept)
        if hasattr(model, "embeddings"):
            model.embeddings = _VectorsAsTheyAre()
        else:
            model.embed_tokens = None
        model.main_input_name = "inputs_embeds"  # else checkpointing looks for token embeddings
        self.model = model
        self.width: int = model.config.hidden_size

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

    def checkpoint_gradients(self, contexts: CheckpointContexts) -> None:
        """While learning, compute each layer again for its gradient instead of keeping its values.

        Memory for one layer's inner values instead of for those of all; about a third more time.

        Args:
            contexts: Called for each layer; gives the context for its first computation and the one
                for the second, which happens in the backward pass, after any context around the
                forward pass has ended (autocast is restored by torch itself).
        """
        model = self.model
        # The first is the name from transformers 5 on, where the second one warns.
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": contexts})


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
    whole = _run_whole(model)
    norm = final_norm_name(model)
    normed = getattr(model, norm) if norm else nn.Identity()
    half = DeepHalf(model, split_layer, num_layers)
    top = split_layer + len(layer_stack(model))
    with torch.inference_mode():
        # hidden_states hold the states below the norm, except that the last of them are above it.
        last = top == len(whole.hidden_states) - 1
        expected = whole.last_hidden_state if last else normed(whole.hidden_states[top])
        states = half(whole.hidden_states[split_layer], _probe_mask())
    _check_equal(states, expected, name_or_folder, split_layer)
    return half


def _check_split(split_layer: int, highest: int, what: str) -> None:
    if not 1 <= split_layer <= highest:
        raise EncoderError(f"split layer must be in [1, {highest}] for {what}, got {split_layer}")


def _probe_tokens(model: PreTrainedModel) -> Tensor:
    tokens: Tensor = torch.arange(_PROBE_TOKENS)[None] % model.config.vocab_size
    return tokens


def _probe_mask() -> Tensor:
    return torch.ones(1, _PROBE_TOKENS, dtype=torch.long)


def _run_whole(model: PreTrainedModel) -> Any:
    """Run the uncut model on a few tokens, all hidden states kept."""
    with torch.inference_mode():
        return model(
            input_ids=_probe_tokens(model), attention_mask=_probe_mask(), output_hidden_states=True
        )


def _try_shallow_half(half: ShallowHalf, name: str, split_layer: int) -> None:
    """Make sure that nothing comes after layer k: no norm or projection that we do not know of."""
    last_layer_gave: list[Any] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        last_layer_gave.append(output[0] if isinstance(output, tuple) else output)

    handle = layer_stack(half.model)[-1].register_forward_hook(note)
    try:
        with torch.inference_mode():
            states = half(_probe_tokens(half.model), _probe_mask())
    finally:
        handle.remove()
    norm = final_norm_name(half.model)
    with torch.inference_mode():
        expected = getattr(half.model, norm)(last_layer_gave[0]) if norm else last_layer_gave[0]
    _check_equal(states, expected, name, split_layer)


def _check_equal(states: Tensor, expected: Tensor, name: str, split_layer: int) -> None:
    """Compare what a half gives with what it must give."""
    if not torch.isfinite(expected).all():
        raise EncoderError(
            f"model {name!r} gives infinite or undefined states: its weights are damaged"
        )
    difference = float((states - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:  # true for NaN as well
        raise EncoderError(
            f"model {name!r} does not split at layer {split_layer}: its halves give other states "
            f"than the whole model (relative difference {difference:.2g}); this type of model "
            "computes something between or after its layers that is not supported"
        )
