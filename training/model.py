"""The BAHE click model: frozen text vectors, a trainable deep half, late fusion.

Shapes: B = contexts, S = scenes, M = behaviours per scene, L = the newest of them that the deep
half reads, D = vector width, Q = width of a deep output, C = candidates per context, R = flat
candidates.

The order of the data: table rows are gathered in the model; the deep half turns each scene into one
vector and the candidate into one; the head sees these, their product, what the candidate's text and
attention over the history's texts tell, and numbers: dense features and evidence. The deep half
never sees a candidate (late fusion), so it is computed once per context.

Source:
    Geng et al., "Breaking the Length Barrier: LLM-Enhanced CTR Prediction in Long Textual User
    Behaviors", SIGIR 2024, arXiv:2403.19347. Position and age embeddings, exact-id and kernel
    evidence and the numeric inputs are ours; the paper does not say how its head is built.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from training.attention import TargetAttention
from training.candidates import FlatCandidates
from training.config import BaheConfig
from training.inputs import DenseInputs
from training.item_ids import ItemEmbedding
from training.layers import (
    LowRankCross,
    MemberPerceptron,
    RunningNorm,
    TableSpace,
    deep_interactions,
    interactions_width,
    masked_mean,
    once_per_row,
)
from training.program_inputs import ClickModel, ProgramInputs
from training.schema import InputSchema
from training.text_evidence import AgeDecay, TextEvidence
from training.tower import Tower


class DeepStates(NamedTuple):
    """What attention over the deep half's states reads of it."""

    history: Float[Tensor, "B S L D"]
    """Of the newest behaviours; of places without one anything."""
    items: Float[Tensor, "R D"]


class Bahe(ClickModel):
    """Logits of candidates from the program's inputs.

    Args:
        config: How the model is built.
        schema: What it reads.
        deep_half: Takes (inputs_embeds [B, M, D], attention_mask [B, M]) and returns [B, M, D]; it
            is never given a row without a kept token. None where ``config.use_deep_half`` is False.
    """

    def __init__(
        self, config: BaheConfig, schema: InputSchema, deep_half: nn.Module | None
    ) -> None:
        super().__init__()
        self.config = config
        num_scenes = len(schema.scenes)
        self.space = TableSpace(schema.vector_width)
        self._last_pass: tuple[Tensor, ...] = ()
        if config.next_behavior_weight:
            self.sharpness = nn.Parameter(torch.zeros(()))
        if config.use_text:
            self.tower = Tower(config, schema.vector_width, deep_half, num_scenes=num_scenes)
        self.dense = DenseInputs(
            schema,
            num_bins=config.num_bins,
            width=config.numeric_width,
            evidence=config.evidence_kinds,
        )
        self.num_sizes = evidence_width = 2 * num_scenes
        attention_width = 0
        if config.use_text_evidence:
            self.decay = AgeDecay(config.num_age_scales)
            self.text = TextEvidence(
                num_kernels=config.num_kernels, num_scales=config.num_age_scales
            )
            evidence_width += num_scenes * self.text.output_width
        if config.use_target_attention:
            self.attention = TargetAttention(schema.vector_width, num_scenes)
            attention_width = self.attention.output_width
        self.evidence_norm = RunningNorm(evidence_width)
        self.evidence_skip = nn.Linear(evidence_width, 1)
        nn.init.zeros_(self.evidence_skip.weight)
        deep_width = 0
        if config.use_text:
            deep_width = interactions_width(num_scenes, config.output_width)
        id_width = 0
        if config.id_width is not None:
            self.ids = ItemEmbedding(config.id_width)
            id_width = interactions_width(num_scenes, config.id_width)
        # The parts of the head's input, in their order.
        self.input_widths = (
            *(deep_width, attention_width, evidence_width, self.dense.output_width),
            id_width,
        )
        width = sum(self.input_widths)
        self.cross = LowRankCross(width, rank=config.cross_rank, num_layers=config.num_crosses)
        self.cross_logit = nn.Linear(width, 1)
        nn.init.zeros_(self.cross_logit.weight)
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.perceptron = MemberPerceptron(
            width,
            hidden=config.hidden,
            dropout=config.dropout,
            num_members=config.num_members,
            use_bfloat16=config.use_bfloat16,
        )

    def user_vectors(
        self,
        table: Float[Tensor, "V D"],
        history_rows: Int[Tensor, "B S M"],
        history_ages: Float[Tensor, "B S M"],
    ) -> Float[Tensor, "B S Q"]:
        """Q_u: one deep output per scene; no candidate goes in."""
        newest = self._newest_deep
        return self.tower.scenes(
            lambda rows: self.space(table[rows]),
            history_rows[..., newest],
            history_ages[..., newest],
        )

    @property
    def _newest_deep(self) -> slice:
        return slice(-self.config.deep_length, None)

    def item_vectors(
        self, table: Float[Tensor, "V D"], candidate_rows: Int[Tensor, " R"]
    ) -> Float[Tensor, "R Q"]:
        """Q_i: the item's title through the same deep half, a sequence of length 1."""
        return once_per_row(lambda rows: self.tower.items(self.space(table[rows])), candidate_rows)

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits of every candidate; while learning those of every member, [B, C, K]."""
        flat = FlatCandidates(inputs.candidate_item_keys)
        if not self.config.use_text:
            return self._head(flat, inputs, None)
        rows = flat.select(inputs.candidate_rows)
        states = None
        if self.config.attends_states:
            contexts, items, states = self._outputs_and_states(inputs, rows)
        else:
            contexts = self.user_vectors(inputs.table, inputs.history_rows, inputs.history_ages)
            items = self.item_vectors(inputs.table, rows)
        if self.training and self.config.next_behavior_weight:
            owners = flat.spread(torch.arange(len(contexts), device=contexts.device))
            self._last_pass = (contexts, items, rows, owners)
        return self._head(flat, inputs, deep_interactions(flat.spread(contexts), items), states)

    def _outputs_and_states(
        self, inputs: ProgramInputs, candidate_rows: Int[Tensor, " R"]
    ) -> tuple[Float[Tensor, "B S Q"], Float[Tensor, "R Q"], DeepStates]:
        """Deep outputs of contexts and of candidates, and the states that they were made of."""

        def look_up(rows: Int[Tensor, "*N"]) -> Float[Tensor, "*N D"]:
            return self.space(inputs.table[rows])  # type: ignore[no-any-return]

        newest = self._newest_deep
        contexts, history = self.tower.scenes_and_states(
            look_up, inputs.history_rows[..., newest], inputs.history_ages[..., newest]
        )
        items = once_per_row(lambda rows: self.tower.item_states(look_up(rows)), candidate_rows)
        return contexts, self.tower.item_outputs(items), DeepStates(history, items)

    def head(
        self,
        inputs: ProgramInputs,
        users: Float[Tensor, "B S Q"],
        items: Float[Tensor, "B C Q"],
    ) -> Float[Tensor, "B C"]:
        """The same from deep outputs that were computed before.

        For models that read texts and whose attention does not need the deep half's states.
        """
        assert not self.config.attends_states, self.config
        flat = FlatCandidates(inputs.candidate_item_keys)
        return self._head(flat, inputs, deep_interactions(flat.spread(users), flat.select(items)))

    def _head(
        self,
        flat: FlatCandidates,
        inputs: ProgramInputs,
        deep: Float[Tensor, "R W"] | None,
        states: DeepStates | None = None,
    ) -> Float[Tensor, "B C"]:
        texts, attended = self._texts(flat, inputs)
        if states is not None:
            attended = [self._attend_states(flat, inputs, states)]
        evidence = self.evidence_norm(texts)
        dense, dense_logit = self.dense(flat, inputs)
        parts = [*attended, evidence, dense, *self.id_values(flat, inputs)]
        x = self.input_dropout(torch.cat(parts if deep is None else [deep, *parts], dim=-1))
        shared = self.cross.project(x, self.cross_logit) + self.evidence_skip(evidence)
        logits = self.perceptron(x) + shared + dense_logit.unsqueeze(-1)  # (R, K)
        return flat.restore(logits if self.training else logits.mean(-1))

    def auxiliary_loss(self, clicked: Float[Tensor, " R"]) -> Tensor | None:
        """Softmax over the batch's items, by the similarity of deep outputs alone.

        ``-log exp(s_bi - log q_i) / sum_j exp(s_bj - log q_j)`` of every clicked item i, with q the
        item's share of the batch's rows: what is popular comes often and would be pushed away for
        that alone. Other items that the same context clicked are left out of the sum.

        Source:
            Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
            Recommendations", RecSys 2019, eq. 2 and 3.
        """
        # Taken out: a batch's graph must not live until the next forward pass.
        last_pass, self._last_pass = self._last_pass, ()
        if not last_pass or not bool(clicked.any()):
            return None
        users, items, rows, owners = last_pass
        distinct, places, counts = torch.unique(rows, return_inverse=True, return_counts=True)
        first = torch.empty_like(distinct).scatter_(
            0, places, torch.arange(len(rows), device=rows.device)
        )
        scores = (users.sum(1) @ items[first].t()) / self.config.output_width**0.5  # (B, U)
        scores = scores * self.sharpness.exp() - torch.log(counts / len(rows))
        positive = clicked > 0
        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen[owners[positive], places[positive]] = True
        own = scores[owners[positive], places[positive]]
        others = scores.masked_fill(chosen, -torch.inf).logsumexp(1)[owners[positive]]
        loss: Tensor = (torch.logaddexp(own, others) - own).mean()
        return self.config.next_behavior_weight * loss

    def _texts(
        self, flat: FlatCandidates, inputs: ProgramInputs
    ) -> tuple[Float[Tensor, "R E"], list[Float[Tensor, "R W"]]]:
        """History sizes with the text evidence, and what attention over the texts gives, if any."""
        evidence, attended = self.text_values(flat, inputs)
        sizes = flat.spread(self.history_sizes(inputs))
        return torch.cat([sizes, *evidence], dim=-1), attended

    @property
    def _attends_texts(self) -> bool:
        return self.config.use_target_attention and not self.config.attends_states

    def _told_ages(self, ages: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
        """Ages as attention and decay may know them: all 0 where the model uses none."""
        return ages if self.config.use_age else torch.zeros_like(ages)

    def _told_same(self, same: Bool[Tensor, "*N"]) -> Bool[Tensor, "*N"]:
        """What attention may know of it: nothing where the model uses no exact-id evidence."""
        return same if self.config.use_exact_evidence else torch.zeros_like(same)

    def _there(self, inputs: ProgramInputs) -> Bool[Tensor, "B S M"]:
        return inputs.history_rows[..., -self.config.text_length :] != 0

    def history_sizes(self, inputs: ProgramInputs) -> Float[Tensor, "B E"]:
        """Logarithms of how much each scene holds in all, and among its newest behaviours."""
        newest = self._there(inputs).sum(-1).to(inputs.history_ages)
        return torch.log1p(torch.cat([inputs.history_totals, newest], dim=-1))

    def id_values(self, flat: FlatCandidates, inputs: ProgramInputs) -> list[Float[Tensor, "R W"]]:
        """Vectors of ids: histories' means, candidates and how they meet; empty without ids.

        Items without a vector, and behaviours about none, are left out of the means.
        """
        if self.config.id_width is None:
            return []
        places = self.ids.indices(inputs.history_item_keys)  # (B, S, M)
        means = masked_mean(self.ids.table(places), places != 0)
        items = self.ids(flat.select(inputs.candidate_item_keys))
        return [deep_interactions(flat.spread(means), items)]

    def _attend_states(
        self, flat: FlatCandidates, inputs: ProgramInputs, states: DeepStates
    ) -> Float[Tensor, "R W"]:
        """Target attention over the deep half's states, with the cosines of the texts beside."""
        newest = self._newest_deep
        rows = inputs.history_rows[..., newest]
        titles = self.space.directions(inputs.table[inputs.candidate_rows])  # (B, C, D)
        history = self.space.directions(inputs.table[rows])  # (B, S, L, D)
        found = self.attention(
            functional.normalize(states.history, dim=-1),
            self._told_ages(inputs.history_ages[..., newest]),
            rows != 0,
            flat.restore(functional.normalize(states.items, dim=-1)),
            titles.unsqueeze(1) @ history.transpose(2, 3),
            self._told_same(
                _is_candidate(
                    inputs.history_item_keys[..., newest], inputs.candidate_item_keys.unsqueeze(1)
                )
            ),
        )
        return flat.select(found)

    def text_values(
        self, flat: FlatCandidates, inputs: ProgramInputs
    ) -> tuple[list[Float[Tensor, "R W"]], list[Float[Tensor, "R W"]]]:
        """Text evidence by scene, and attention by scene; what the model does without is empty."""
        evidence: list[Tensor] = []
        attended: list[Tensor] = []
        if self.config.use_text_evidence or self._attends_texts:
            there = self._there(inputs)
            for scene in range(there.shape[1]):
                values = self._scene_texts(scene, flat, inputs, there[:, scene])
                if self._attends_texts:
                    attended.append(values.pop())
                evidence += values
        return evidence, attended

    def _scene_texts(
        self, scene: int, flat: FlatCandidates, inputs: ProgramInputs, there: Bool[Tensor, "B M"]
    ) -> list[Float[Tensor, "R W"]]:
        """One scene's text evidence and attention; eagerly only where there is a history.

        What an empty history gives is zeros, for both.
        """
        newest = slice(-self.config.text_length, None)
        rows, ages, keys = (
            values[:, scene, newest]
            for values in (inputs.history_rows, inputs.history_ages, inputs.history_item_keys)
        )
        ages = self._told_ages(ages)
        candidate_rows, candidate_keys = inputs.candidate_rows, inputs.candidate_item_keys
        some = None
        if not torch.compiler.is_exporting():
            some = there.any(1)
            # At least one position, so that a batch without any history needs no branch.
            first = int(there.any(0).to(torch.uint8).argmax())
            rows, ages, keys = (values[some, first:] for values in (rows, ages, keys))
            candidate_rows, candidate_keys = candidate_rows[some], candidate_keys[some]
            there = there[some, first:]
        history = self.space.directions(inputs.table[rows])  # (B, M, D)
        titles = self.space.directions(inputs.table[candidate_rows])  # (B, C, D)
        cosines = titles @ history.transpose(1, 2)  # (B, C, M)
        same = _is_candidate(keys, candidate_keys)
        here = FlatCandidates(candidate_keys)
        values = []
        if self.config.use_text_evidence:
            # Also where the exact id is not to be told: a cosine of 1 would tell it.
            keep = there.unsqueeze(1) & ~same & (candidate_rows != 0).unsqueeze(2)
            decays = here.spread(self.decay(ages, there))  # (R, M, A)
            values.append(self.text(here.select(cosines), here.select(keep), decays))
        if self._attends_texts:
            told = self._told_same(same)
            found = self.attention.scene(scene, history, ages, there, titles, cosines, told)
            values.append(here.select(found))
        if some is None:
            return values
        owners = flat.spread(some)
        return [
            value.new_zeros((flat.num_rows, value.shape[1])).index_put((owners,), value)
            for value in values
        ]


def _is_candidate(
    keys: Int[Tensor, "*N M"], candidate_keys: Int[Tensor, "*N C"]
) -> Bool[Tensor, "*N C M"]:
    """True where a behaviour is about the candidate; never of padding."""
    candidates = candidate_keys.unsqueeze(-1)
    return (keys.unsqueeze(-2) == candidates) & (candidates != 0)
