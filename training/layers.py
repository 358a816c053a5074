"""Blocks that the click models are put together from.

Shapes: R = rows, F = numeric features, T = bins per feature, D = width of the head's input.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, distributed, nn
from torch.nn import functional

SECONDS_PER_DAY = 86_400.0
MIN_STATISTICS_SHARE = 0.01
"""Least weight of a new batch in running statistics."""
MAX_STATISTICS_ROWS = 100_000
"""A mean over this many vectors is exact enough; a table may hold a hundred times more."""


def quantile_edges(values: NDArray[np.float32], num_bins: int) -> NDArray[np.float32]:
    """Edges of bins with equally many training rows, one row of edges per feature.

    A feature with few distinct values has fewer bins: its edges are distinct quantiles, the last
    one repeated, and a bin between equal edges is always 0. A feature that is always missing, or
    constant, gets edges that are all equal.

    Args:
        values: float32 [R, F]; NaN = missing.
        num_bins: T, at least 1.

    Returns:
        float32 [F, T + 1], ascending.
    """
    edges = np.zeros((values.shape[1], num_bins + 1), dtype=np.float32)
    for feature in range(values.shape[1]):
        column = values[:, feature]
        column = column[np.isfinite(column)]
        if not column.size:
            continue
        distinct = np.unique(np.quantile(column, np.linspace(0, 1, num_bins + 1)))
        edges[feature, : len(distinct)] = distinct
        edges[feature, len(distinct) :] = distinct[-1]
    return edges


class PiecewiseLinear(nn.Module):
    """Numeric features as positions between training quantiles, each with a flag for "missing".

    ``bin_t = clip((x - edge_t) / (edge_{t+1} - edge_t), 0, 1)``, then a linear map of each feature
    of its own. Everything is finite whatever comes in: NaN and infinities count as missing, values
    beyond the training range as its ends.

    Args:
        num_features: F, at least 1.
        num_bins: T.
        width: Values per feature that come out.

    Source:
        Gorishniy et al., "On Embeddings for Numerical Features in Tabular Deep Learning", NeurIPS
        2022, arXiv:2203.05556, section 3.2; quantile bins; the flag for missing values is ours.
    """

    edges: Tensor

    def __init__(self, num_features: int, *, num_bins: int, width: int) -> None:
        super().__init__()
        self.register_buffer("edges", torch.zeros(num_features, num_bins + 1))
        # The last channel is the flag for "missing".
        self.weight = nn.Parameter(torch.empty(num_features, num_bins + 1, width))
        nn.init.normal_(self.weight, std=1 / math.sqrt(num_bins))
        self.skip = nn.Parameter(torch.zeros(num_features, num_bins + 1))
        self.output_width = num_features * width

    def set_edges(self, values: NDArray[np.float32]) -> None:
        """Take the bins from training rows, float32 [R, F]; NaN = missing."""
        edges = quantile_edges(values, self.edges.shape[1] - 1)
        self.edges.copy_(torch.from_numpy(edges))

    def lines(self) -> tuple[Float[Tensor, "F T1 W1"], Float[Tensor, "F T1 W1"]]:
        """What comes out at the lower edge of each bin, and how much more at the upper one.

        A value in bin t has all of the bins below, and a share of its own: two rows of small
        tables, instead of T products per feature. The last row stands for "missing", the last
        channel is the direct part of the logit.
        """
        channels = torch.cat([self.weight, self.skip.unsqueeze(-1)], dim=-1)
        of_bins = channels[:, :-1] * (self.edges.diff(dim=1) > 0).unsqueeze(-1)
        below = of_bins.cumsum(1) - of_bins
        base = torch.cat([below, channels[:, -1:]], dim=1)
        slope = torch.cat([of_bins, torch.zeros_like(channels[:, -1:])], dim=1)
        return base, slope

    def forward(
        self, values: Float[Tensor, "R F"]
    ) -> tuple[Float[Tensor, "R FW"], Float[Tensor, " R"]]:
        """The encoded features, and their direct linear part of the logit."""
        num_features, num_edges = self.edges.shape
        span = self.edges.diff(dim=1)
        base, slope = (values.flatten(0, 1) for values in self.lines())
        present = torch.isfinite(values)
        clean = torch.where(present, values, torch.zeros_like(values))
        bins = torch.searchsorted(self.edges, clean.t().contiguous(), right=True).t() - 1
        bins = bins.clamp(0, num_edges - 2)
        place = bins + num_edges * torch.arange(num_features, device=bins.device)
        low, width = self.edges.flatten()[place], _padded(span).flatten()[place]
        share = ((clean - low) / torch.where(width > 0, width, torch.ones_like(width))).clamp(0, 1)
        share = share * (width > 0)
        missing = num_edges * torch.arange(1, num_features + 1, device=bins.device) - 1
        place = torch.where(present, place, missing)
        encoded = functional.embedding(place, base) + share.unsqueeze(-1) * functional.embedding(
            place, slope
        )
        return encoded[..., :-1].flatten(1), encoded[..., -1].sum(1)


def _padded(span: Float[Tensor, "F T"]) -> Float[Tensor, "F T1"]:
    """A column of zeros behind the bins, for the place of missing values."""
    return functional.pad(span, (0, 1))


class LowRankCross(nn.Module):
    """Explicit feature crosses of degree ``num_layers + 1``.

    Each layer computes ``x <- x0 * (U (V x) + b) + x``: the shape never changes.

    Args:
        width: D, width of the input vector.
        rank: Inner width of each cross, in ``[1, width]``.
        num_layers: Number of crosses; 0 makes the block the identity.

    Raises:
        ValueError: If ``rank`` is outside ``[1, width]``.

    Source:
        Wang et al., "DCN V2", WWW 2021, arXiv:2008.13535, low-rank cross layer; the gate is left
        out.
    """

    def __init__(self, width: int, *, rank: int, num_layers: int) -> None:
        super().__init__()
        if not 1 <= rank <= width:
            raise ValueError(f"rank must be in [1, {width}] (the input width), got {rank}")
        self.down = nn.ModuleList(nn.Linear(width, rank, bias=False) for _ in range(num_layers))
        self.up = nn.ModuleList(nn.Linear(rank, width) for _ in range(num_layers))

    def forward(self, x0: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        """Cross ``x0`` with itself ``num_layers`` times."""
        return self._crossed(x0, len(self.down))

    def _crossed(self, x0: Float[Tensor, "R D"], num_layers: int) -> Float[Tensor, "R D"]:
        x = x0
        for down, up in zip(self.down[:num_layers], self.up[:num_layers], strict=True):
            x = x0 * up(down(x)) + x  # (R, D) -> (R, rank) -> (R, D)
        return x

    def project(self, x0: Float[Tensor, "R D"], onto: nn.Linear) -> Float[Tensor, "R 1"]:
        """``onto(self(x0))`` for a map to one value, without the last cross at full width.

        ``w (x0 * (U z + b)) = ((w * x0) U) z + (w * x0) b`` with ``z = V x``: one product with a
        matrix of rank + 1 columns in place of one to width D and two passes over [R, D].
        """
        if not len(self.down):
            projected: Tensor = onto(x0)
            return projected
        x = self._crossed(x0, len(self.down) - 1)
        z = functional.pad(self.down[-1](x), (0, 1), value=1.0)  # (R, rank + 1)
        crossed: Tensor = ((x0 @ self.last_columns(onto)) * z).sum(-1, keepdim=True)
        rest: Tensor = onto(x)
        return crossed + rest

    def last_columns(self, onto: nn.Linear) -> Float[Tensor, "D r1"]:
        """``[w * U, w * b]`` of the last cross, see :meth:`project`."""
        last = self.up[-1]
        assert isinstance(last, nn.Linear)
        return torch.cat([last.weight, last.bias.unsqueeze(1)], dim=1) * onto.weight.t()


class RunningNorm(nn.Module):
    """Inputs with mean 0 and variance 1 over the training rows, then a learned scale and shift.

    Unlike batch norm it normalises by the running statistics while it learns, too: batches hold
    contexts of one history length, so a batch's own statistics would hide what is long and short,
    and would not be those of a score. With several processes the statistics are those of all rows;
    where a step has several passes (``accumulate_batches``) each is taken in by itself.

    Args:
        width: D.
    """

    mean: Tensor
    square: Tensor
    num_batches: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("square", torch.ones(width))
        self.register_buffer("num_batches", torch.zeros((), dtype=torch.int64))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "R D"]) -> Float[Tensor, "R D"]:
        """Normalise; while learning, take the rows into the statistics first."""
        if self.training:
            with torch.no_grad():
                self.num_batches += 1
                # A plain mean of the first batches, then an exponential one.
                share = max(1 / int(self.num_batches), MIN_STATISTICS_SHARE)
                sums = torch.stack([x.sum(0), x.square().sum(0), torch.full_like(x[0], len(x))])
                if distributed.is_available() and distributed.is_initialized():
                    distributed.all_reduce(sums)
                mean, square = sums[:2] / sums[2]
                self.mean.lerp_(mean, share)
                self.square.lerp_(square, share)
        # Clones: the backward pass needs the values of now, and the next batch writes over them.
        return (x - self.mean.clone()) * self._scale() * self.weight + self.bias

    def affine(self) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
        """Gain and shift that do the same to a score's input."""
        gain = self._scale() * self.weight
        return gain, self.bias - self.mean * gain

    def _scale(self) -> Float[Tensor, " D"]:
        return torch.rsqrt((self.square - self.mean.square()).clamp(min=1e-4))


class Perceptron(nn.Module):
    """Linear, GELU, dropout for every width, then a linear layer to one logit.

    Args:
        width: D, width of the input.
        hidden: Widths of the hidden layers.
        dropout: In ``[0, 1)``.
    """

    def __init__(self, width: int, *, hidden: Sequence[int], dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.GELU(), nn.Dropout(dropout)]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def set_base_rate(self, rate: float) -> None:
        """Start from the share of clicked rows, in ``(0, 1)``, instead of one half."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.bias.fill_(math.log(rate / (1 - rate)))

    def forward(self, x: Float[Tensor, "R D"]) -> Float[Tensor, " R"]:
        """The logits."""
        logits: Tensor = self.layers(x)
        return logits.squeeze(-1)


class MemberPerceptron(nn.Module):
    """K perceptrons that share nearly all weights: an ensemble at the cost of one model's weights.

    Member k sees the input with a sign of its own on every value, ``x * r_k``, and has an output of
    its own; all hidden weights are shared. The signs are learned on as scales. ``x * r_k`` is never
    made: ``(x * r_k) W = x (r_k W)``, so the first layer is one product.

    Args:
        width: D, width of the input.
        hidden: Widths of the hidden layers, at least one.
        dropout: In ``[0, 1)``.
        num_members: K; 1 is a plain perceptron.
        use_bfloat16: Compute the products in bfloat16 while learning.

    Source:
        Gorishniy et al., "TabM: Advancing Tabular Deep Learning with Parameter-Efficient
        Ensembling", ICLR 2025, arXiv:2410.24210, TabM-mini.
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: Sequence[int],
        dropout: float,
        num_members: int,
        use_bfloat16: bool,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("hidden must have at least one width, got none")
        self.use_bfloat16 = use_bfloat16
        self.first = nn.Linear(width, hidden[0])
        layers: list[nn.Module] = [nn.GELU(), nn.Dropout(dropout)]
        for before, size in pairwise(hidden):
            layers += [nn.Linear(before, size), nn.GELU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*layers)
        self.scale = nn.Parameter(torch.ones(num_members, width))
        if num_members > 1:
            with torch.no_grad():
                self.scale.copy_(torch.randint(0, 2, self.scale.shape) * 2 - 1)
        self.output = nn.Parameter(torch.empty(num_members, hidden[-1]))
        self.bias = nn.Parameter(torch.zeros(num_members))
        nn.init.uniform_(self.output, -(hidden[-1] ** -0.5), hidden[-1] ** -0.5)

    def set_base_rate(self, rate: float) -> None:
        """Start from the share of clicked rows, in ``(0, 1)``, instead of one half."""
        with torch.no_grad():
            self.bias.fill_(math.log(rate / (1 - rate)))

    def first_weights(self) -> Float[Tensor, "KH D"]:
        """``r_k W`` of every member, one below the other."""
        return (self.scale.unsqueeze(1) * self.first.weight).flatten(0, 1)

    def forward(self, x: Float[Tensor, "R D"]) -> Float[Tensor, "R K"]:
        """The logits of every member."""
        weight = self.first_weights()
        # Only where it is on: an exported program would carry the context along.
        with (
            torch.autocast(x.device.type, torch.bfloat16)
            if self.use_bfloat16 and self.training
            else nullcontext()
        ):
            h = functional.linear(x, weight).reshape(x.shape[0], len(self.scale), -1)
            h = self.layers(h + self.first.bias)
        logits: Tensor = (h.float() * self.output).sum(-1) + self.bias
        return logits


class AgeEmbedding(nn.Module):
    """A vector for how long ago something was: buckets of doubling length.

    Bucket 0 is below an hour, bucket i below ``2**i`` hours, the last one everything older.

    Args:
        num_buckets: At least 2; 16 reach 3.7 years.
        width: Width of the vectors.
    """

    def __init__(self, num_buckets: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_buckets, width)
        nn.init.normal_(self.table.weight, std=0.02)  # BERT's, as for its position embeddings

    def buckets(self, ages: Float[Tensor, "*N"]) -> Int[Tensor, "*N"]:
        """Bucket of each age in seconds."""
        exponent = torch.log2(ages.clamp(min=1) / 3600).floor() + 1
        return exponent.clamp(0, self.table.num_embeddings - 1).long()

    def edges_s(self) -> tuple[float, ...]:
        """The ages in seconds at which buckets 1 and on begin."""
        return tuple(3600.0 * 2**i for i in range(self.table.num_embeddings - 1))

    def forward(self, ages: Float[Tensor, "*N"]) -> Float[Tensor, "*N W"]:
        """The vectors of ages in seconds."""
        vectors: Tensor = self.table(self.buckets(ages))
        return vectors


def masked_mean(
    values: Float[Tensor, "*N M W"], keep: Bool[Tensor, "*N M"]
) -> Float[Tensor, "*N W"]:
    """Mean over the positions where ``keep`` is True; zero where there are none."""
    weights = keep.to(values.dtype).unsqueeze(-1)
    return (values * weights).sum(-2) / weights.sum(-2).clamp(min=1)


def once_per_row(
    compute: Callable[[Int[Tensor, " U"]], Float[Tensor, "U W"]], rows: Int[Tensor, "*N"]
) -> Float[Tensor, "*N W"]:
    """``compute(rows)`` where the result of a row depends on that row alone.

    In a batch most texts come several times: eagerly each distinct row is computed once. An
    exported program, whose shapes must not depend on values, computes all of them.
    """
    if torch.compiler.is_exporting():
        return compute(rows)
    distinct, places = torch.unique(rows, return_inverse=True)
    return functional.embedding(places, compute(distinct))


def deep_interactions(
    users: Float[Tensor, "R S Q"], items: Float[Tensor, "R Q"]
) -> Float[Tensor, "R W"]:
    """What a head reads of vectors that meet: users, items, products, one similarity per scene.

    Returns:
        W = Q (2 S + 1) + S values per row; see :func:`interactions_width`.
    """
    products = users * items.unsqueeze(1)
    similarity = products.sum(-1) / items.shape[-1] ** 0.5
    return torch.cat([users.flatten(1), items, products.flatten(1), similarity], dim=-1)


def interactions_width(num_scenes: int, output_width: int) -> int:
    """W of :func:`deep_interactions`."""
    return output_width * (2 * num_scenes + 1) + num_scenes


class TableSpace(nn.Module):
    """The embedding table's vectors as the deep half wants them, and as directions to compare.

    Vectors of one text model share a large common part, so that raw cosines crowd near 1; without
    their mean they spread. The statistics are those of the table at training time.

    Args:
        width: D, of a vector.
    """

    mean: Tensor
    gain: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("gain", torch.ones(1))

    def set_statistics(self, vectors: NDArray[np.float32]) -> None:
        """Take the statistics of a table, float32 [V, D], whose row 0 is "no text"."""
        step = max(1, len(vectors) // MAX_STATISTICS_ROWS)
        rows = np.asarray(vectors[1::step], dtype=np.float64)
        if not len(rows):
            return
        self.mean.copy_(torch.from_numpy(rows.mean(axis=0)))
        lengths = np.linalg.norm(rows, axis=1)
        if np.allclose(lengths[lengths > 0], 1, atol=1e-3):
            # An encoder that scales to unit length: bring its vectors to unit variance. Any other
            # keeps the scale of its hidden states, which is what the layers above expect.
            self.gain.fill_(math.sqrt(rows.shape[1]))

    def forward(self, vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Vectors on the scale of hidden states."""
        return vectors * self.gain

    def centered(self, vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """The same, moved to mean 0."""
        return (vectors - self.mean) * self.gain

    def directions(self, vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Centered vectors of unit length."""
        return functional.normalize(vectors - self.mean, dim=-1)
