"""What the candidate has to do with the history: the same item before, and texts alike.

All of it is computed inside the model from its inputs, so training and serving cannot differ.

Shapes: B = contexts, C = candidates, S = scenes, M = behaviours per scene, K = cosine kernels,
A = age scales, E = values of evidence per candidate.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from training.config import AGE_SCALES_DAYS
from training.layers import SECONDS_PER_DAY


class AgeDecay(nn.Module):
    """``exp(-age / scale)`` at A learned scales.

    Args:
        num_scales: A, in ``[1, 6]``.
    """

    def __init__(self, num_scales: int) -> None:
        super().__init__()
        scales = torch.tensor(AGE_SCALES_DAYS[:num_scales])
        self.log_days = nn.Parameter(scales.log())

    def forward(self, ages: Float[Tensor, "*N"], keep: Bool[Tensor, "*N"]) -> Float[Tensor, "*N A"]:
        """Weights of ages in seconds; 0 where ``keep`` is False."""
        days = (ages / SECONDS_PER_DAY).clamp(min=0).unsqueeze(-1)
        return torch.exp(-days * torch.exp(-self.log_days)) * keep.unsqueeze(-1)


class ExactEvidence(nn.Module):
    """Has the candidate been in a scene before, how often, how long ago: 3 + A values per scene.

    Args:
        num_scenes: S.
        num_scales: A.
    """

    def __init__(self, num_scenes: int, *, num_scales: int) -> None:
        super().__init__()
        self.output_width = num_scenes * (3 + num_scales)

    def forward(
        self,
        same: Bool[Tensor, "B S C M"],
        ages: Float[Tensor, "B S M"],
        decays: Float[Tensor, "B S M A"],
    ) -> Float[Tensor, "B C E"]:
        """The evidence of every candidate.

        Args:
            same: True where the behaviour is about the candidate itself.
            ages: Seconds.
            decays: Of :class:`AgeDecay`.
        """
        weights = same.to(ages.dtype)
        count = weights.sum(-1)
        days = (ages / SECONDS_PER_DAY).clamp(min=0).unsqueeze(2)
        newest = torch.where(same, days, torch.inf).amin(-1)
        has = count > 0
        recency = torch.where(has, torch.log1p(newest), 0.0)
        plain = torch.stack([has.to(ages.dtype), torch.log1p(count), recency], -1)
        return _per_candidate(torch.cat([plain, torch.log1p(weights @ decays)], dim=-1))


class TextEvidence(nn.Module):
    """How alike candidate and history read: 2 + K x A values per scene.

    The largest and the mean cosine, and soft counts ``log1p(sum_m kernel_k(cos_m) decay_a(age_m))``
    with Gaussian kernels whose centres and widths are learned. Behaviours about the candidate
    itself are left out of all of them: they have a channel of their own (:class:`ExactEvidence`)
    and would drown what the other texts say.

    Args:
        num_scenes: S.
        num_kernels: K, at least 2.
        num_scales: A.

    Source:
        Xiong et al., "End-to-End Neural Ad-hoc Ranking with Kernel Pooling", SIGIR 2017,
        arXiv:1706.06613, eq. 3 and 4; the age scales are ours.
    """

    def __init__(self, num_scenes: int, *, num_kernels: int, num_scales: int) -> None:
        super().__init__()
        if num_kernels < 2:
            raise ValueError(f"num_kernels must be at least 2, got {num_kernels}")
        low, high = -0.2, 0.95  # centred cosines of unrelated and of nearly equal texts
        self.centers = nn.Parameter(torch.linspace(low, high, num_kernels))
        # Half the distance of two centres: neighbouring kernels cross at 60 % of their height.
        width = (high - low) / (num_kernels - 1) / 2
        self.log_widths = nn.Parameter(torch.full((num_kernels,), width).log())
        self.output_width = num_scenes * (2 + num_kernels * num_scales)

    def forward(
        self,
        cosines: Float[Tensor, "B S C M"],
        keep: Bool[Tensor, "B S C M"],
        decays: Float[Tensor, "B S M A"],
    ) -> Float[Tensor, "B C E"]:
        """The evidence of every candidate.

        Args:
            cosines: Of candidate and behaviour in table space.
            keep: True where a behaviour is there that is not about the candidate itself.
            decays: Of :class:`AgeDecay`.
        """
        weights = keep.to(cosines.dtype)
        number = weights.sum(-1)
        largest = torch.where(keep, cosines, -1.0).amax(-1)
        largest = torch.where(number > 0, largest, 0.0)
        mean = (cosines * weights).sum(-1) / number.clamp(min=1)
        centers, widths = self.centers.unsqueeze(-1), self.log_widths.exp().unsqueeze(-1)
        distance = (cosines.unsqueeze(3) - centers) / widths  # (B, S, C, K, M)
        kernels = torch.exp(-0.5 * distance.square()) * weights.unsqueeze(3)
        pooled = kernels.flatten(2, 3) @ decays  # (B, S, C K, A)
        pooled = torch.log1p(pooled).reshape(*largest.shape, -1)
        return _per_candidate(torch.cat([torch.stack([largest, mean], -1), pooled], dim=-1))


def _per_candidate(values: Float[Tensor, "B S C F"]) -> Float[Tensor, "B C SF"]:
    return values.transpose(1, 2).flatten(2)
