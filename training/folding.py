"""The head of a trained model with all that its weights alone decide worked out beforehand.

A trained head is mostly one linear map of a wide input, and most of that input is the same for all
candidates of a request, or a product of the user's deep outputs with the item's. Folded, the user's
part is computed once, the products with the user become a matrix of Q rows per request, and each
number is looked up in one small table. The logits are those of :meth:`training.model.Bahe.head` up
to rounding.

Shapes: B = contexts, S = scenes, C = candidates, Q = width of a deep output, F = numeric features,
W = values per feature, D = width of the head's input, N = columns of the folded map.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from training.candidates import FlatCandidates
from training.layers import PiecewiseLinear
from training.model import Bahe
from training.program_inputs import ProgramInputs

MAX_CROSSES = 1
"""A second cross needs the input at full width for every candidate: nothing is left to fold."""


class FoldedNumbers(nn.Module):
    """Numeric features of several :class:`PiecewiseLinear` side by side, in one lookup.

    Args:
        encoders: Of the same numbers of bins and values.
    """

    edges: Tensor
    cells: Tensor
    first: Tensor

    @torch.no_grad()
    def __init__(self, encoders: Sequence[PiecewiseLinear]) -> None:
        super().__init__()
        edges = torch.cat([encoder.edges for encoder in encoders])
        base, slope = (
            torch.cat(tables) for tables in zip(*(e.lines() for e in encoders), strict=True)
        )
        span = functional.pad(edges.diff(dim=1), (0, 1))  # an empty one behind, for "missing"
        scale = torch.where(span > 0, 1 / span, torch.zeros_like(span))
        cells = torch.cat([torch.stack([edges, scale], dim=-1), base, slope], dim=-1)
        self.register_buffer("edges", edges)
        self.register_buffer("cells", cells.flatten(0, 1))  # (F (T + 1), 2 + 2 (W + 1))
        self.register_buffer("first", torch.arange(len(edges), dtype=torch.int32) * edges.shape[1])

    def forward(self, values: Float[Tensor, "R F"]) -> Float[Tensor, "R FW1"]:
        """Per feature its W values and its direct part of the logit."""
        last = self.edges.shape[1] - 1
        present = (values - values) == 0  # neither NaN nor infinite, in two passes
        clean = torch.where(present, values, 0.0)
        bins = torch.searchsorted(self.edges, clean.t().contiguous(), right=True, out_int32=True)
        bins = torch.where(present, (bins.t() - 1).clamp(0, last - 1), last)
        cell = functional.embedding(bins + self.first, self.cells)
        share = ((clean - cell[..., 0]) * cell[..., 1]).clamp(0, 1)
        width = (cell.shape[-1] - 2) // 2
        return torch.addcmul(
            cell[..., 2 : 2 + width], share.unsqueeze(-1), cell[..., 2 + width :]
        ).flatten(1)


class FoldedHead(nn.Module):
    """:meth:`Bahe.head` for models with deep outputs and at most :data:`MAX_CROSSES` crosses.

    Args:
        model: Trained; its tower is not needed.
        texts: What computes its text evidence, attention and vectors of ids, if it has any.
    """

    of_users: Tensor
    of_items: Tensor
    of_products: Tensor
    of_similarities: Tensor
    of_candidates: Tensor
    bias: Tensor
    output: Tensor
    evidence_columns: Tensor

    @torch.no_grad()
    def __init__(self, model: Bahe, texts: Bahe) -> None:
        super().__init__()
        config, dense = model.config, model.dense
        assert config.use_text, config
        assert config.num_crosses <= MAX_CROSSES, config
        self.texts = texts
        self.layers = model.perceptron.layers
        self.num_members = config.num_members
        self.rank = config.cross_rank if config.num_crosses else 0
        encoders = {name: _piecewise(encoder) for name, encoder in dense.numeric.items()}
        of_user = [encoders.pop("user")] if "user" in encoders else []
        self.user_numbers = FoldedNumbers(of_user) if of_user else None
        self.number_kinds = tuple(encoders)
        self.candidate_numbers = FoldedNumbers(list(encoders.values())) if encoders else None
        self.categories = dense.categories

        weight, bias = self._linear_map(model)
        *_, evidence_width, dense_width, _ = model.input_widths
        deep, attention, evidence, numbers, ids = torch.split(weight, list(model.input_widths))
        num_scenes, width = model.num_sizes // 2, config.output_width
        users, items, products, similarities = torch.split(
            deep, [num_scenes * width, width, num_scenes * width, num_scenes]
        )
        sizes, of_texts = torch.split(evidence, [model.num_sizes, evidence_width - model.num_sizes])
        widths = [encoder.output_width for encoder in (*of_user, *encoders.values())]
        *by_kind, categories = torch.split(numbers, [*widths, dense_width - sum(widths)])
        by_kind = [
            self._with_logit(rows, encoder)
            for rows, encoder in zip(by_kind, (*of_user, *encoders.values()), strict=True)
        ]
        by_user, by_candidate = by_kind[: len(of_user)], by_kind[len(of_user) :]
        for name, value in {
            "of_users": torch.cat([users, sizes, *by_user]),
            "of_items": items,
            "of_products": products.reshape(num_scenes, width, -1),
            "of_similarities": similarities / width**0.5,
            "of_candidates": torch.cat([attention, of_texts, *by_candidate, categories, ids]),
            "bias": bias,
            "output": (model.perceptron.output / config.num_members).flatten(),
            "evidence_columns": dense.evidence_columns,
        }.items():
            self.register_buffer(name, value.detach().clone())

    def head(
        self,
        inputs: ProgramInputs,
        users: Float[Tensor, "B S Q"],
        items: Float[Tensor, "B C Q"],
    ) -> Float[Tensor, "B C"]:
        """Logits of every candidate."""
        of_user = [users.flatten(1), self.texts.history_sizes(inputs)]
        if self.user_numbers is not None:
            of_user.append(self.user_numbers(inputs.user_dense))
        shared = torch.addmm(self.bias, torch.cat(of_user, dim=-1), self.of_users)  # (B, N)
        # u i W_products + u.i W_similarities, as a map of i.
        of_items = (
            self.of_items
            + (users.unsqueeze(-1) * self.of_products).sum(1)
            + users.transpose(1, 2) @ self.of_similarities
        )  # (B, Q, N)
        x = torch.baddbmm(shared.unsqueeze(1), items, of_items)  # (B, C, N)
        x = torch.addmm(x.flatten(0, 1), self._candidates(inputs), self.of_candidates)
        left, right, direct, first = torch.split(
            x, [self.rank, self.rank, 1, x.shape[1] - 2 * self.rank - 1], dim=1
        )
        hidden = self.layers(first.reshape(x.shape[0], self.num_members, -1))
        logits: Tensor = direct[:, 0] + (left * right).sum(-1) + hidden.flatten(1) @ self.output
        return logits.reshape(inputs.candidate_rows.shape)

    def _linear_map(self, model: Bahe) -> tuple[Float[Tensor, "D N"], Float[Tensor, " N"]]:
        """All that is linear in the head's input, as one map.

        Columns: rank r of ``V x``, r of what these are multiplied with, the direct part of the
        logit, and the members' first hidden layers.
        """
        perceptron, onto, skip = model.perceptron, model.cross_logit, model.evidence_skip
        crossed = []
        logit = onto.weight.t()
        if self.rank:
            columns = model.cross.last_columns(onto)
            (down,) = model.cross.down
            assert isinstance(down, nn.Linear)
            crossed = [down.weight.t(), columns[:, :-1]]
            logit = logit + columns[:, -1:]
        weight = torch.cat([*crossed, logit, perceptron.first_weights().t()], dim=1)
        bias = torch.cat(
            [
                logit.new_zeros(2 * self.rank),
                onto.bias + skip.bias + perceptron.bias.mean(),
                perceptron.first.bias.repeat(self.num_members),
            ]
        )
        # The evidence is normalised first, and goes to the logit on a way of its own, too.
        before = sum(model.input_widths[:2])
        evidence = slice(before, before + model.input_widths[2])
        gain, shift = model.evidence_norm.affine()
        weight = weight.clone()
        weight[evidence, 2 * self.rank] += skip.weight[0]
        bias = bias + shift @ weight[evidence]
        weight[evidence] *= gain.unsqueeze(1)
        return weight, bias

    def _with_logit(
        self, weight: Float[Tensor, "FW N"], encoder: PiecewiseLinear
    ) -> Float[Tensor, "FW1 N"]:
        """A row more per feature, for its direct part of the logit."""
        rows = functional.pad(weight.reshape(len(encoder.edges), -1, weight.shape[1]), (0, 0, 0, 1))
        rows[:, -1, 2 * self.rank] = 1
        return rows.flatten(0, 1)

    def _candidates(self, inputs: ProgramInputs) -> Float[Tensor, "R W"]:
        """What is to be told of the candidates, without their deep outputs."""
        flat = FlatCandidates(inputs.candidate_item_keys)
        evidence, attended = self.texts.text_values(flat, inputs)
        parts = [*attended, *evidence]
        numbers = {
            "item": inputs.candidate_dense,
            "context": inputs.context,
            "evidence": inputs.evidence[..., self.evidence_columns],
        }
        if self.candidate_numbers is not None:
            values = torch.cat([numbers[kind] for kind in self.number_kinds], dim=-1)
            parts.append(self.candidate_numbers(values.flatten(0, 1)))
        categories = inputs.candidate_categories.flatten(0, 1)
        parts += [table(categories[:, column]) for column, table in enumerate(self.categories)]
        parts += self.texts.id_values(flat, inputs)
        if not parts:
            return self.bias.new_zeros((categories.shape[0], 0))
        return torch.cat(parts, dim=-1)


def _piecewise(module: nn.Module) -> PiecewiseLinear:
    assert isinstance(module, PiecewiseLinear)
    return module
