"""Rows for appended tokens: the mean of the rows of the pieces that wrote them before.

Shapes: V = tokens, D = width.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from encoders.lm.extend import Appended
from encoders.pretrained import load_config, load_model
from feature_repo.errors import EncoderError


def load_enlarged(folder: Path, num_tokens: int, appended: Sequence[Appended]) -> PreTrainedModel:
    """Load a causal model with rows for appended tokens, in its own precision.

    Args:
        folder: Of the model.
        num_tokens: Of its tokenizer, before.
        appended: What comes after them.

    Raises:
        EncoderError: If it cannot be loaded, or has fewer rows than its tokenizer has tokens.
    """
    stored = load_config(str(folder)).dtype or torch.float32
    model = load_model(str(folder), stored, auto=AutoModelForCausalLM)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < num_tokens:
        raise EncoderError(
            f"the model in {folder} has vectors for {rows:,} tokens, the tokenizer has "
            f"{num_tokens:,}: they do not belong together; give the model that this tokenizer is of"
        )
    enlarge(model, appended)
    return model


def enlarge(model: PreTrainedModel, appended: Sequence[Appended]) -> None:
    """Give a model rows for appended tokens, in place; rows that it has to spare are used.

    Input and output embeddings, which may be one, and the output's bias, where there is one.

    Source:
        arXiv:2509.26124: the mean of the old pieces.
    """
    if not appended:
        return
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(
        max(rows, appended[-1].token_id + 1), mean_resizing=False
    )  # copies the rows that are there
    output = model.get_output_embeddings()
    tables = [model.get_input_embeddings().weight]
    if output is not None:
        tables += [table for table in (output.weight, output.bias) if table is not None]
    # Tied tables are one tensor, and appended pieces are old tokens: written twice, it is the same.
    for table in tables:
        _set_means(table, appended)


@torch.no_grad()
def _set_means(table: Tensor, appended: Sequence[Appended]) -> None:
    """Rows of ``table``, [V, D] or [V]."""
    for token in appended:
        pieces = table[list(token.pieces)].float()
        table[token.token_id] = pieces.mean(dim=0).to(table.dtype)
