"""What a click model has to beat: simple models on the same inputs, through the same code path.

Shapes: B = contexts, S = scenes, M = behaviours per scene, C = candidates, R = flat candidates,
D = vector width, W = width of projected vectors.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from feature_repo.errors import ArtifactError
from training.candidates import FlatCandidates
from training.config import (
    DinTextConfig,
    ItemOnlyConfig,
    MeanPoolingConfig,
    PopularityConfig,
    RepeatCountConfig,
)
from training.inputs import DenseInputs
from training.layers import Perceptron, TableSpace, masked_mean
from training.program_inputs import ClickModel, ProgramInputs
from training.schema import InputSchema


class ScoreBaseline(ClickModel):
    """A score without weights, and the line that makes logits of it.

    Args:
        schema: What the model reads.
        popularity_suffix: Ending of the names of the item features that are added up.

    Raises:
        ArtifactError: If no item feature's name ends so.
    """

    columns: Tensor

    def __init__(self, schema: InputSchema, popularity_suffix: str) -> None:
        super().__init__()
        names = schema.item_dense_names
        columns = [i for i, name in enumerate(names) if name.endswith(popularity_suffix)]
        if not columns:
            raise ArtifactError(
                f"no item feature ends in {popularity_suffix!r}, which this baseline ranks by; "
                f"there are: {', '.join(names) or 'none'}"
            )
        self.register_buffer("columns", torch.tensor(columns))
        self.slope = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def popularity(self, candidate_dense: Tensor) -> Tensor:
        """``log(1 + events in the window)``, [B, C]; a missing count is 0."""
        counts = torch.nan_to_num(candidate_dense[..., self.columns], nan=0.0)
        return torch.log1p(counts.clamp(min=0).sum(-1))

    def calibrated(self, score: Tensor) -> Tensor:
        """The logits; the slope is never negative, so the order is the score's."""
        return score * self.slope + self.bias


class Popularity(ScoreBaseline):
    """The same ranking for everyone: :meth:`ScoreBaseline.popularity`."""

    def __init__(self, config: PopularityConfig, schema: InputSchema) -> None:
        super().__init__(schema, config.popularity_suffix)

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits."""
        return self.calibrated(self.popularity(inputs.candidate_dense))


class RepeatCount(ScoreBaseline):
    """How often the candidate is in the history, all scenes together; popularity breaks ties."""

    def __init__(self, config: RepeatCountConfig, schema: InputSchema) -> None:
        super().__init__(schema, config.popularity_suffix)

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits."""
        keys = inputs.history_item_keys
        history = torch.where(keys != 0, keys, torch.full_like(keys, -1)).flatten(1)
        count = (inputs.candidate_item_keys.unsqueeze(-1) == history.unsqueeze(1)).sum(-1)
        popularity = self.popularity(inputs.candidate_dense)
        return self.calibrated(count + popularity / (1 + popularity))  # the tie-break is below 1


class MeanPooling(ClickModel):
    """Mean of the history's text vectors per scene, the candidate's, their product, an MLP."""

    def __init__(self, config: MeanPoolingConfig, schema: InputSchema) -> None:
        super().__init__()
        self.space = TableSpace(schema.vector_width)
        self.project = nn.Linear(schema.vector_width, config.output_width)
        width = (2 * len(schema.scenes) + 1) * config.output_width
        self.perceptron = Perceptron(width, hidden=config.hidden, dropout=config.dropout)

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits."""
        flat, rows = FlatCandidates(inputs.candidate_item_keys), inputs.history_rows
        mean = masked_mean(self.space.centered(inputs.table[rows]), rows != 0)
        users = flat.spread(self.project(mean))  # (R, S, W)
        items = self.project(
            self.space.centered(inputs.table[flat.select(inputs.candidate_rows)])
        ).unsqueeze(1)
        x = torch.cat([users.flatten(1), items.flatten(1), (users * items).flatten(1)], dim=-1)
        return flat.restore(self.perceptron(x))


class DinText(ClickModel):
    """Target attention over the history's frozen text vectors.

    ``weight_m = MLP([h_m, c, h_m - c, h_m * c])``, the history is ``sum_m weight_m h_m``: not
    normalised, as in the paper; the adaptive activation is left out.

    Source:
        Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018,
        arXiv:1706.06978, section 4.3.
    """

    def __init__(self, config: DinTextConfig, schema: InputSchema) -> None:
        super().__init__()
        self.space = TableSpace(schema.vector_width)
        self.project = nn.Linear(schema.vector_width, config.output_width)
        # The attention's first layer on [h, c, h - c, h * c], written as three maps: h - c is
        # linear in h and c, so only the product needs rows of its own.
        self.from_history = nn.Linear(config.output_width, config.attention_hidden)
        self.from_candidate = nn.Linear(config.output_width, config.attention_hidden, bias=False)
        self.from_product = nn.Linear(config.output_width, config.attention_hidden, bias=False)
        self.attention = nn.Linear(config.attention_hidden, 1)
        width = (2 * len(schema.scenes) + 1) * config.output_width
        self.perceptron = Perceptron(width, hidden=config.hidden, dropout=config.dropout)

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits."""
        flat, rows = FlatCandidates(inputs.candidate_item_keys), inputs.history_rows
        history = self.project(self.space.centered(inputs.table[rows]))  # (B, S, M, W)
        items = self.project(self.space.centered(inputs.table[flat.select(inputs.candidate_rows)]))[
            :, None, None
        ]
        behaviours = flat.spread(history)  # (R, S, M, W)
        hidden = (
            flat.spread(self.from_history(history))
            + self.from_candidate(items)
            + self.from_product(behaviours * items)
        )
        weights = self.attention(torch.relu(hidden)) * flat.spread(rows != 0).unsqueeze(-1)
        interest = (weights * behaviours).sum(2)  # (R, S, W)
        items = items.squeeze(2)
        x = torch.cat(
            [interest.flatten(1), items.flatten(1), (interest * items).flatten(1)], dim=-1
        )
        return flat.restore(self.perceptron(x))


class ItemOnly(ClickModel):
    """Item and request features through an MLP: nothing of the user."""

    def __init__(self, config: ItemOnlyConfig, schema: InputSchema) -> None:
        super().__init__()
        self.dense = DenseInputs(
            schema, num_bins=config.num_bins, width=config.numeric_width, with_user=False
        )
        self.perceptron = Perceptron(
            self.dense.output_width, hidden=config.hidden, dropout=config.dropout
        )

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits."""
        flat = FlatCandidates(inputs.candidate_item_keys)
        x, logit = self.dense(flat, inputs)
        return flat.restore(self.perceptron(x) + logit)
