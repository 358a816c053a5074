"""A click model as three programs, so that serving computes each part only when it changes.

A model with deep outputs scores late (:mod:`training.model`): users and items go through the deep
half apart and meet in the head alone. Serving keeps what the first two give and runs the head.

Shapes: see :data:`feature_repo.artifact.PROGRAM_INPUTS`; Q = width of a deep output, R = items.
"""

import copy
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.export import Dim

from feature_repo.artifact import (
    HEAD_FILE,
    ITEM_FILE,
    PROGRAM_INPUTS,
    USER_FILE,
    Calibration,
    ProgramParts,
)
from training.calibration import Calibrator
from training.folding import MAX_CROSSES, FoldedHead
from training.model import Bahe
from training.program import dynamic_sizes, example_inputs, save_exported
from training.program_inputs import ProgramInputs
from training.schema import InputSchema
from training.trees import Ensemble

_Model = TypeVar("_Model", bound=nn.Module)
_HISTORY_ROWS = PROGRAM_INPUTS.index("history_rows")
_HISTORY_AGES = PROGRAM_INPUTS.index("history_ages")


def deep_model(model: nn.Module) -> Bahe | None:
    """The part of a model whose head reads deep outputs; None where there is none.

    A head whose attention reads the deep half's states needs more of it than its outputs: such a
    model is one program only.
    """
    if isinstance(model, Ensemble):
        model = model.network
    if not isinstance(model, Bahe) or not model.config.use_text or model.config.attends_states:
        return None
    return model


def _tower(model: Bahe) -> Bahe:
    """What the deep outputs need of a model."""
    others = tuple(name for name in model._modules if name not in ("tower", "space"))
    return _sharing(model, others)


def _head(model: Bahe | Ensemble) -> Bahe | Ensemble | FoldedHead:
    """What the head needs of a model."""
    if isinstance(model, Bahe):
        if model.config.num_crosses > MAX_CROSSES:
            return _sharing(model, ("tower",))
        needed = ("space", "decay", "text", "attention", "ids")
        return FoldedHead(model, _sharing(model, tuple(set(model._modules) - set(needed))))
    part = _sharing(model, ())
    assert isinstance(model.network, Bahe)
    part._modules["network"] = _head(model.network)
    return part


def _sharing(model: _Model, without: tuple[str, ...]) -> _Model:
    """A model with all but some of another's modules: each part is saved with its own weights."""
    part = copy.copy(model)
    part._modules = {name: m for name, m in model._modules.items() if name not in without}
    part._parameters = {}  # its own ones, outside of modules, are read while learning alone
    return part


class UserPart(nn.Module):
    """Deep outputs of histories."""

    def __init__(self, model: Bahe) -> None:
        super().__init__()
        self.model = _tower(model)

    def forward(
        self,
        table: Float[Tensor, "V D"],
        history_rows: Int[Tensor, "B S M"],
        history_ages: Float[Tensor, "B S M"],
    ) -> Float[Tensor, "B S Q"]:
        """See :meth:`training.model.Bahe.user_vectors`."""
        return self.model.user_vectors(table, history_rows, history_ages)


class ItemPart(nn.Module):
    """Deep outputs of titles."""

    def __init__(self, model: Bahe) -> None:
        super().__init__()
        self.model = _tower(model)

    def forward(
        self, table: Float[Tensor, "V D"], candidate_rows: Int[Tensor, " R"]
    ) -> Float[Tensor, "R Q"]:
        """See :meth:`training.model.Bahe.item_vectors`."""
        return self.model.item_vectors(table, candidate_rows)


class HeadPart(nn.Module):
    """Calibrated logits from deep outputs and the program's inputs.

    Args:
        model: With deep outputs, see :func:`deep_model`.
        calibration: Of its logits.
    """

    def __init__(self, model: Bahe | Ensemble, calibration: Calibration) -> None:
        super().__init__()
        self.model = _head(model)
        self.calibrator = Calibrator(calibration)

    def forward(
        self,
        user_outputs: Float[Tensor, "B S Q"],
        item_outputs: Float[Tensor, "B C Q"],
        *inputs: Tensor,
    ) -> Float[Tensor, "B C"]:
        """Calibrated logits of every candidate."""
        logits = self.model.head(ProgramInputs(*inputs), user_outputs, item_outputs)
        calibrated: Tensor = self.calibrator(logits)
        return calibrated


def save_parts(
    model: nn.Module, calibration: Calibration, schema: InputSchema, folder: Path
) -> ProgramParts | None:
    """Export the parts of a model into ``folder``; None where :func:`deep_model` finds none."""
    deep = deep_model(model)
    if deep is None:
        return None
    assert isinstance(model, Bahe | Ensemble)
    width = deep.config.output_width
    inputs, dynamic = example_inputs(schema), dynamic_sizes()
    history = [i for i, name in enumerate(PROGRAM_INPUTS) if name.startswith("history")]
    num_contexts, num_candidates = inputs[history[0]].shape[0], 4
    users = torch.zeros(num_contexts, len(schema.scenes), width)
    items = torch.zeros(num_contexts, num_candidates, width)
    contexts, candidates, rows = Dim("contexts"), Dim("candidates"), Dim("rows")
    chosen = (0, _HISTORY_ROWS, _HISTORY_AGES)
    save_exported(
        UserPart(deep),
        tuple(inputs[i] for i in chosen),
        tuple(dynamic[i] for i in chosen),
        folder / USER_FILE,
    )
    save_exported(
        ItemPart(deep),
        (inputs[0], torch.arange(num_candidates)),
        ({0: rows}, {0: candidates}),
        folder / ITEM_FILE,
    )
    save_exported(
        HeadPart(model, calibration),
        (users, items, *inputs),
        ({0: contexts}, {0: contexts, 1: candidates}, dynamic),
        folder / HEAD_FILE,
    )
    age = deep.tower.age
    return ProgramParts(
        output_width=width,
        deep_length=deep.config.deep_length,
        age_edges_s=() if age is None else age.edges_s(),
    )
