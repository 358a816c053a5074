"""Dense and categorical features and evidence as one vector per candidate."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from training.candidates import FlatCandidates
from training.layers import PiecewiseLinear
from training.program_inputs import ProgramInputs
from training.schema import InputSchema

MAX_CATEGORY_WIDTH = 16


class DenseInputs(nn.Module):
    """Numeric features through :class:`PiecewiseLinear`, categories through small embeddings.

    Args:
        schema: Which features there are; each kind may have none.
        num_bins: Bins per numeric feature.
        width: Values per numeric feature that come out.
        with_user: Read the user's features, too.
        evidence: Kinds of evidence to read, of :data:`encoders.evidence.KINDS`.
    """

    evidence_columns: Tensor

    def __init__(
        self,
        schema: InputSchema,
        *,
        num_bins: int,
        width: int,
        with_user: bool = True,
        evidence: Sequence[str] = (),
    ) -> None:
        super().__init__()
        chosen = schema.evidence_columns(evidence)
        self.register_buffer("evidence_columns", torch.tensor(chosen, dtype=torch.int64))
        sizes = {
            "user": len(schema.user_dense_names) if with_user else 0,
            "item": len(schema.item_dense_names),
            "context": len(schema.context_names),
            "evidence": len(chosen),
        }
        self.numeric = nn.ModuleDict(
            {
                name: PiecewiseLinear(size, num_bins=num_bins, width=width)
                for name, size in sizes.items()
                if size
            }
        )
        self.categories = nn.ModuleList()
        self.output_width = width * sum(sizes.values())
        for values in schema.category_vocabularies.values():
            category_width = min(MAX_CATEGORY_WIDTH, 2 + len(values) // 8)
            table = nn.Embedding(len(values) + 1, category_width)
            nn.init.normal_(table.weight, std=0.1)
            self.categories.append(table)
            self.output_width += category_width

    def set_edges(self, dense: Sequence[NDArray[np.float32]]) -> None:
        """Take the bins from training rows of user, item, context and evidence, [R, F] each."""
        for name, values in zip(("user", "item", "context", "evidence"), dense, strict=True):
            if name in self.numeric:
                if name == "evidence":
                    values = values[:, self.evidence_columns.numpy()]
                encoder = self.numeric[name]
                assert isinstance(encoder, PiecewiseLinear)
                encoder.set_edges(values)

    def forward(
        self, flat: FlatCandidates, inputs: ProgramInputs
    ) -> tuple[Float[Tensor, "R W"], Float[Tensor, " R"]]:
        """The encoded features, and their direct part of the logit, of every flat candidate."""
        parts: list[Tensor] = []
        logit = inputs.candidate_dense.new_zeros(()).expand(flat.num_rows)
        if "user" in self.numeric:  # once per context, not per candidate
            encoded, skip = self.numeric["user"](inputs.user_dense)
            parts.append(flat.spread(encoded))
            logit = logit + flat.spread(skip)
        for name, values in (
            ("item", inputs.candidate_dense),
            ("context", inputs.context),
            ("evidence", inputs.evidence[..., self.evidence_columns]),
        ):
            if name in self.numeric:
                encoded, skip = self.numeric[name](flat.select(values))
                parts.append(encoded)
                logit = logit + skip
        categories = flat.select(inputs.candidate_categories)
        parts += [table(categories[:, column]) for column, table in enumerate(self.categories)]
        if not parts:
            return logit.new_zeros((flat.num_rows, 0)), logit
        return torch.cat(parts, dim=-1), logit
