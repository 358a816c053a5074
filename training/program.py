"""A model as a program: ``torch.export``, saved without anything pickled.

Shapes: see :data:`feature_repo.artifact.PROGRAM_INPUTS`.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from feature_repo.artifact import PROGRAM_INPUTS
from training.schema import InputSchema


def example_inputs(schema: InputSchema) -> tuple[Tensor, ...]:
    """Inputs of the right shapes: three contexts, four candidates, a table of five rows.

    The sizes differ from each other and from 0 and 1, so that the export takes none for another.
    """
    num_contexts, num_candidates, num_rows = 3, 4, 5
    history = (num_contexts, len(schema.scenes), schema.sequence_length)
    block = (num_contexts, num_candidates)
    rows = torch.arange(num_contexts * history[1] * history[2]).reshape(history) % num_rows
    return (
        torch.linspace(-1, 1, num_rows * schema.vector_width).reshape(num_rows, -1),
        rows,
        rows.clone(),  # one tensor in two places would be taken for one input
        rows.float() * 3600,
        torch.ones(history[:2]),
        torch.zeros(num_contexts, len(schema.user_dense_names)),
        torch.ones(block, dtype=torch.int64),
        torch.ones(block, dtype=torch.int64),
        torch.zeros(*block, len(schema.item_dense_names)),
        torch.zeros(*block, len(schema.category_vocabularies), dtype=torch.int64),
        torch.zeros(*block, len(schema.context_names)),
        torch.zeros(*block, len(schema.evidence_names)),
    )


def save_program(model: nn.Module, schema: InputSchema, path: Path) -> None:
    """Export ``model`` in float32 with any number of contexts, candidates and table rows.

    The archive holds no example inputs, which torch would pickle; their member is there, for
    ``torch.export.load`` asks for it, but empty.

    Args:
        model: Takes the program's inputs; put into evaluation mode.
        schema: What it reads.
        path: File to write.
    """
    save_exported(model, example_inputs(schema), dynamic_sizes(), path)


def dynamic_sizes() -> tuple[dict[int, Dim], ...]:
    """Which sizes of the program's inputs may be any, in their order."""
    contexts, candidates, rows = Dim("contexts"), Dim("candidates"), Dim("rows")
    dynamic: list[dict[int, Dim]] = []
    for name in PROGRAM_INPUTS:
        if name == "table":
            dynamic.append({0: rows})
        elif name.startswith("candidate") or name in ("context", "evidence"):
            dynamic.append({0: contexts, 1: candidates})
        else:
            dynamic.append({0: contexts})
    return tuple(dynamic)


def save_exported(
    model: nn.Module, inputs: tuple[Tensor, ...], dynamic: tuple[Any, ...], path: Path
) -> None:
    """Export any module; see :func:`save_program`.

    Args:
        model: Put into evaluation mode.
        inputs: Examples of its inputs.
        dynamic: Of each input, which sizes may be any.
        path: File to write.
    """
    model.eval()
    program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
    program.example_inputs = None
    torch.export.save(program, path)
