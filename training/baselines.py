"""What a click model has to beat: simple models on the same inputs, through the same code path.

Shapes: B = contexts, S = scenes, M = behaviours per scene, C = candidates, R = flat candidates,
D = vector width, W = width of a behaviour's vector, A = width of an attention's hidden layer.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from feature_repo.errors import ArtifactError
from training.candidates import FlatCandidates
from training.config import (
    DcnConfig,
    DinIdsConfig,
    DinTextConfig,
    ItemOnlyConfig,
    MeanPoolingConfig,
    PopularityConfig,
    RepeatCountConfig,
)
from training.inputs import DenseInputs
from training.item_ids import ItemEmbedding
from training.layers import (
    LowRankCross,
    Perceptron,
    TableSpace,
    masked_mean,
    once_per_row,
)
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

    same: Tensor

    def __init__(self, config: RepeatCountConfig, schema: InputSchema) -> None:
        super().__init__(schema, config.popularity_suffix)
        names = [f"same_{scene}_count" for scene in schema.scenes]
        self.register_buffer("same", torch.tensor([schema.evidence_names.index(n) for n in names]))

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits."""
        count = torch.nan_to_num(inputs.evidence[..., self.same], nan=0.0).sum(-1)
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


class DinAttention(nn.Module):
    """What a history holds for one candidate: ``sum_m MLP([h_m, c, h_m - c, h_m * c]) h_m``.

    The weights are not normalised, as in the paper; the adaptive activation is left out. The MLP's
    first layer is linear in h_m for a given candidate: its weights for ``h`` and for ``h * c`` are
    added up per candidate, so that one matrix product gives all of it and neither ``h - c`` nor
    ``h * c`` is ever made.

    Args:
        width: W, of a behaviour's and a candidate's vector.
        hidden: A, width of the MLP's hidden layer.

    Source:
        Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018,
        arXiv:1706.06978, section 4.3.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # h - c is linear in h and c: its share of the first layer is in these two.
        self.from_history = nn.Linear(width, hidden)
        self.from_candidate = nn.Linear(width, hidden, bias=False)
        self.from_product = nn.Linear(width, hidden, bias=False)
        self.attention = nn.Linear(hidden, 1)

    def forward(
        self,
        flat: FlatCandidates,
        history: Float[Tensor, "B S M W"],
        keep: Bool[Tensor, "B S M"],
        items: Float[Tensor, "R W"],
    ) -> Float[Tensor, "R S W"]:
        """The history's vector per scene and candidate; zero where nothing is there.

        Args:
            flat: Whose candidates the items are.
            history: One vector per behaviour.
            keep: True where a behaviour is there.
            items: One vector per flat candidate.
        """
        behaviours = flat.spread(history)  # (R, S, M, W)
        # (R, A, W): the first layer's weights on h, given the candidate.
        weight = self.from_history.weight + self.from_product.weight * items.unsqueeze(1)
        offset = self.from_history.bias + self.from_candidate(items)
        hidden = torch.baddbmm(
            offset.unsqueeze(1), behaviours.flatten(1, 2), weight.transpose(1, 2)
        )
        weights = self.attention(torch.relu(hidden)).reshape(behaviours.shape[:3])
        weights = weights * flat.spread(keep)
        interest: Tensor = weights.unsqueeze(2) @ behaviours
        return interest.squeeze(2)


class DinText(ClickModel):
    """:class:`DinAttention` over the history's frozen text vectors, and an MLP."""

    def __init__(self, config: DinTextConfig, schema: InputSchema) -> None:
        super().__init__()
        self.space = TableSpace(schema.vector_width)
        self.project = nn.Linear(schema.vector_width, config.output_width)
        self.attention = DinAttention(config.output_width, config.attention_hidden)
        width = (2 * len(schema.scenes) + 1) * config.output_width
        self.perceptron = Perceptron(width, hidden=config.hidden, dropout=config.dropout)

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits."""
        flat, rows = FlatCandidates(inputs.candidate_item_keys), inputs.history_rows

        def project(rows: Tensor) -> Tensor:
            return self.project(self.space.centered(inputs.table[rows]))  # type: ignore[no-any-return]

        history = once_per_row(project, rows)
        items = once_per_row(project, flat.select(inputs.candidate_rows))
        interest = self.attention(flat, history, rows != 0, items)
        return flat.restore(self.perceptron(_with_products(interest, items)))


class DinIds(ClickModel):
    """:class:`DinAttention` over learned vectors of item ids, and an MLP.

    Items that did not occur in the training rows have a vector of zeros, and behaviours about them
    are left out: ids say nothing about them.
    """

    def __init__(self, config: DinIdsConfig, schema: InputSchema) -> None:
        super().__init__()
        self.ids = ItemEmbedding(config.id_width)
        self.attention = DinAttention(config.id_width, config.attention_hidden)
        width = (2 * len(schema.scenes) + 1) * config.id_width
        self.perceptron = Perceptron(width, hidden=config.hidden, dropout=config.dropout)

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits."""
        flat = FlatCandidates(inputs.candidate_item_keys)
        places = self.ids.indices(inputs.history_item_keys)
        items = self.ids(flat.select(inputs.candidate_item_keys))
        interest = self.attention(flat, self.ids.table(places), places != 0, items)
        return flat.restore(self.perceptron(_with_products(interest, items)))


def _with_products(
    interest: Float[Tensor, "R S W"], items: Float[Tensor, "R W"]
) -> Float[Tensor, "R width"]:
    """The history per scene, the candidate, and their products, side by side."""
    products = interest * items.unsqueeze(1)
    return torch.cat([interest.flatten(1), items, products.flatten(1)], dim=-1)


class Dcn(ClickModel):
    """Low-rank crosses beside an MLP, over dense features, categories and the item's id.

    Of the history it knows what the user's and item's dense features say, and no more.

    Source:
        Wang et al., "DCN V2", WWW 2021, arXiv:2008.13535, the parallel structure; numeric features
        go in through :class:`training.layers.PiecewiseLinear`.
    """

    def __init__(self, config: DcnConfig, schema: InputSchema) -> None:
        super().__init__()
        self.ids = ItemEmbedding(config.id_width)
        self.dense = DenseInputs(schema, num_bins=config.num_bins, width=config.numeric_width)
        width = self.dense.output_width + config.id_width
        self.cross = LowRankCross(width, rank=config.cross_rank, num_layers=config.num_crosses)
        self.cross_logit = nn.Linear(width, 1)
        self.perceptron = Perceptron(width, hidden=config.hidden, dropout=config.dropout)

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits."""
        flat = FlatCandidates(inputs.candidate_item_keys)
        dense, dense_logit = self.dense(flat, inputs)
        x = torch.cat([dense, self.ids(flat.select(inputs.candidate_item_keys))], dim=-1)
        logits = self.perceptron(x) + self.cross.project(x, self.cross_logit).squeeze(-1)
        return flat.restore(logits + dense_logit)


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
