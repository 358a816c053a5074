"""The paper's comparison: a whole language model over the concatenated texts of the history.

Shapes: B = contexts, S = scenes, M = behaviours per scene, N = S M, P = tokens of a text, D = width
of the language model, Q = width of its output, C = candidates per context, R = flat candidates.

The scenes are merged by time into one text, as the paper's users are one text; which scene a token
is of is told by a learned vector added to it, in place of words. All layers learn. The user side
never sees a candidate, so it is computed once per context, and each title of a batch once: what is
compared is the model over the text, not how often it runs.

Texts that are encoded after training have no tokens here and count as empty: this baseline cannot
read them.

Source:
    Geng et al., "Breaking the Length Barrier: LLM-Enhanced CTR Prediction in Long Textual User
    Behaviors", SIGIR 2024, arXiv:2403.19347, the model that BAHE is compared with. Pooling,
    separators and scene vectors are ours; the paper gives none of them.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from feature_repo.errors import ArtifactError
from training.candidates import FlatCandidates
from training.config import FullTextConfig
from training.inputs import DenseInputs
from training.layers import (
    LowRankCross,
    Perceptron,
    deep_interactions,
    interactions_width,
    masked_mean,
    once_per_row,
)
from training.program_inputs import ClickModel, ProgramInputs
from training.schema import InputSchema
from training.text_tokens import TextTokens


class FullText(ClickModel):
    """Logits from [Q_u, Q_i, their product, their similarity], as :class:`training.model.Bahe`.

    Args:
        config: How the model is built.
        schema: What it reads.
        deep_half: All layers of a language model
            (:func:`encoders.pretrained.load_whole_model`): a model cut below its first layer.

    Raises:
        ArtifactError: If the language model's window is shorter than ``config.num_tokens``.
    """

    def __init__(
        self, config: FullTextConfig, schema: InputSchema, deep_half: PreTrainedModel
    ) -> None:
        super().__init__()
        self.config = config
        window = getattr(deep_half.config, "max_position_embeddings", None)
        if window is not None and window < config.num_tokens:
            raise ArtifactError(
                f"num_tokens is {config.num_tokens}, but the language model reads at most "
                f"{window} tokens: lower it, or encode with a model of a longer window"
            )
        self.texts = TextTokens(schema.vector_width)
        self.deep_half = deep_half
        for module in deep_half.modules():
            if isinstance(module, nn.Dropout):
                module.p = config.deep_dropout
        if config.gradient_checkpointing:
            # The first is the name from transformers 5 on, where the second one warns.
            enable = getattr(deep_half, "activation_checkpointing_enable", None)
            enable = enable or deep_half.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        width = deep_half.config.hidden_size
        self.scene = nn.Embedding(len(schema.scenes), width)
        self.item = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.scene.weight, std=0.02)  # BERT's, for its position embeddings
        self.output_norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, config.output_width)
        self.empty = nn.Parameter(torch.zeros(config.output_width))
        head_width = interactions_width(1, config.output_width)
        self.dense: DenseInputs | None = None
        if config.use_numeric:
            self.dense = DenseInputs(
                schema,
                num_bins=config.num_bins,
                width=config.numeric_width,
                evidence=("same", "near"),
            )
            head_width += self.dense.output_width
        self.cross = LowRankCross(head_width, rank=config.cross_rank, num_layers=config.num_crosses)
        self.cross_logit = nn.Linear(head_width, 1)
        nn.init.zeros_(self.cross_logit.weight)
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.perceptron = Perceptron(head_width, hidden=config.hidden, dropout=config.dropout)

    def user_vectors(
        self,
        table: Float[Tensor, "V D"],
        history_rows: Int[Tensor, "B S M"],
        history_ages: Float[Tensor, "B S M"],
    ) -> Float[Tensor, "B Q"]:
        """Q_u: the newest tokens of the history through the language model."""
        # Padding and unknown texts have no tokens: where they are sorted to does not matter.
        order = history_ages.flatten(1).sort(dim=1, descending=True, stable=True).indices
        scenes = torch.arange(history_rows.shape[1], device=order.device)
        scenes = scenes.unsqueeze(1).expand(history_rows.shape[1:]).flatten()[order]
        places = self.texts.places(table[history_rows.flatten(1).gather(1, order)])
        num_tokens = self.config.num_tokens - len(self.texts.start)
        tokens, owners, keep = self.texts.pack(places, num_tokens)
        return self._outputs(tokens, self.scene(scenes.gather(1, owners)), keep)

    def item_vectors(
        self, table: Float[Tensor, "V D"], candidate_rows: Int[Tensor, " R"]
    ) -> Float[Tensor, "R Q"]:
        """Q_i: the item's title through the same language model."""
        return once_per_row(lambda rows: self._titles(table[rows]), candidate_rows)

    def _titles(self, vectors: Float[Tensor, "R D"]) -> Float[Tensor, "R Q"]:
        longest = min(self.texts.tokens.shape[1], self.config.num_tokens - len(self.texts.start))
        tokens, _, keep = self.texts.pack(self.texts.places(vectors).unsqueeze(1), longest)
        return self._outputs(tokens, self.item, keep)

    def _outputs(
        self, tokens: Int[Tensor, "B P"], marks: Float[Tensor, "*BP D"], keep: Bool[Tensor, "B P"]
    ) -> Float[Tensor, "B Q"]:
        """One output per text; a text without tokens has a learned one of its own."""
        some = keep.any(1, keepdim=True)
        if not torch.compiler.is_exporting():  # only as long as the longest
            length = max(1, int(keep.sum(1).max()))
            tokens, keep = tokens[:, :length], keep[:, :length]
            marks = marks if marks.dim() == 1 else marks[:, :length]
        embed = self.deep_half.get_input_embeddings()
        # shape[0], not len(): an export takes len() for a number that never changes.
        start = embed(self.texts.start).expand(tokens.shape[0], -1, -1)
        x = torch.cat([start, embed(tokens) + marks], dim=1)
        # The language model must see one token per row: an empty row shows its first, whose output
        # is then thrown away.
        first = torch.arange(keep.shape[1], device=keep.device) == 0
        shown = functional.pad(keep | (first & ~some), (start.shape[1], 0), value=True)
        pooled = masked_mean(self.output_norm(self._states(x, shown)), shown)
        outputs: Tensor = self.output(pooled)
        return torch.where(some, outputs, self.empty)

    def _states(
        self, x: Float[Tensor, "B P D"], keep: Bool[Tensor, "B P"]
    ) -> Float[Tensor, "B P D"]:
        """Last hidden states; bfloat16 only while learning, so that every score is float32."""
        with torch.autocast(
            x.device.type,
            dtype=torch.bfloat16,
            enabled=self.config.use_bfloat16 and self.training,
        ):
            states = self.deep_half(inputs_embeds=x, attention_mask=keep.long())
        return states.last_hidden_state.float()  # type: ignore[no-any-return]

    def logits(self, inputs: ProgramInputs) -> Float[Tensor, "B C"]:
        """Logits."""
        flat = FlatCandidates(inputs.candidate_item_keys)
        users = flat.spread(
            self.user_vectors(inputs.table, inputs.history_rows, inputs.history_ages)
        )
        items = self.item_vectors(inputs.table, flat.select(inputs.candidate_rows))
        x = deep_interactions(users.unsqueeze(1), items)
        logit: Tensor | float = 0.0
        if self.dense is not None:
            dense, logit = self.dense(flat, inputs)
            x = torch.cat([x, dense], dim=-1)
        x = self.input_dropout(x)
        return flat.restore(
            self.perceptron(x) + self.cross.project(x, self.cross_logit).squeeze(-1) + logit
        )
