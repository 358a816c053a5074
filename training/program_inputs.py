"""The program's inputs as one value, so that a model can take them by name."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn


class ProgramInputs(NamedTuple):
    """See :data:`feature_repo.artifact.PROGRAM_INPUTS` for the meaning of each."""

    table: Float[Tensor, "V D"]
    history_rows: Int[Tensor, "B S M"]
    history_item_keys: Int[Tensor, "B S M"]
    history_ages: Float[Tensor, "B S M"]
    history_totals: Float[Tensor, "B S"]
    user_dense: Float[Tensor, "B Fu"]
    candidate_rows: Int[Tensor, "B C"]
    candidate_item_keys: Int[Tensor, "B C"]
    candidate_dense: Float[Tensor, "B C Fi"]
    candidate_categories: Int[Tensor, "B C K"]
    context: Float[Tensor, "B C Fx"]
    evidence: Float[Tensor, "B C E"]


class ClickModel(nn.Module):
    """A model over the program's inputs: subclasses define :meth:`logits`."""

    def forward(
        self,
        table: Float[Tensor, "V D"],
        history_rows: Int[Tensor, "B S M"],
        history_item_keys: Int[Tensor, "B S M"],
        history_ages: Float[Tensor, "B S M"],
        history_totals: Float[Tensor, "B S"],
        user_dense: Float[Tensor, "B Fu"],
        candidate_rows: Int[Tensor, "B C"],
        candidate_item_keys: Int[Tensor, "B C"],
        candidate_dense: Float[Tensor, "B C Fi"],
        candidate_categories: Int[Tensor, "B C K"],
        context: Float[Tensor, "B C Fx"],
        evidence: Float[Tensor, "B C E"],
    ) -> Float[Tensor, "B C"]:
        """Logits; those of padding (item key 0) mean nothing."""
        return self.logits(
            ProgramInputs(
                table,
                history_rows,
                history_item_keys,
                history_ages,
                history_totals,
                user_dense,
                candidate_rows,
                candidate_item_keys,
                candidate_dense,
                candidate_categories,
                context,
                evidence,
            )
        )

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits of every candidate."""
        raise NotImplementedError

    def auxiliary_loss(self, clicked: Float[Tensor, " R"]) -> Tensor | None:  # noqa: ARG002
        """What the model wants to learn beside clicks, from its last forward pass.

        Args:
            clicked: 1 or 0, of the flat candidates of that pass.

        Returns:
            A scalar, weighted; None where there is nothing.
        """
        return None
