"""What the candidate has to do with the history: the same item before, and texts alike.

All of it is computed inside the model from its inputs, so training and serving cannot differ.

Shapes: R = candidates (flat rows), S = scenes, M = behaviours per scene, K = cosine kernels,
A = age scales.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from training.layers import SECONDS_PER_DAY

AGE_SCALES_DAYS = (3.0, 10.0, 30.0, 90.0, 270.0, 1000.0)
"""Where the learned decay times start: a few days to years, three per factor of ten or so."""


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
        same: Bool[Tensor, "R S M"],
        ages: Float[Tensor, "R S M"],
        decays: Float[Tensor, "R S M A"],
    ) -> Float[Tensor, "R E"]:
        """The evidence of every row.

        Args:
            same: True where the behaviour is about the candidate itself.
            ages: Seconds.
            decays: Of :class:`AgeDecay`.
        """
        count = same.sum(-1)
        days = ages.clamp(min=0) / SECONDS_PER_DAY
        newest = torch.where(same, days, torch.full_like(days, torch.inf)).amin(-1)
        has = count > 0
        recency = torch.where(has, torch.log1p(newest), torch.zeros_like(newest))
        sums = (decays * same.unsqueeze(-1)).sum(2)
        plain = torch.stack([has.to(ages.dtype), torch.log1p(count.to(ages.dtype)), recency], -1)
        return torch.cat([plain, torch.log1p(sums)], dim=-1).flatten(1)


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
        self.centers = nn.Parameter(torch.linspace(-0.2, 0.95, num_kernels))
        # Neighbouring kernels cross at about 60 % of their height.
        self.log_widths = nn.Parameter(
            torch.full((num_kernels,), 1.15 / (num_kernels - 1) / 2).log()
        )
        self.output_width = num_scenes * (2 + num_kernels * num_scales)

    def forward(
        self,
        cosines: Float[Tensor, "R S M"],
        keep: Bool[Tensor, "R S M"],
        decays: Float[Tensor, "R S M A"],
    ) -> Float[Tensor, "R E"]:
        """The evidence of every row.

        Args:
            cosines: Of candidate and behaviour in table space.
            keep: True where a behaviour is there that is not about the candidate itself.
            decays: Of :class:`AgeDecay`.
        """
        weights = keep.to(cosines.dtype)
        number = weights.sum(-1)
        largest = torch.where(keep, cosines, torch.full_like(cosines, -1.0)).amax(-1)
        largest = torch.where(number > 0, largest, torch.zeros_like(largest))
        mean = (cosines * weights).sum(-1) / number.clamp(min=1)
        distance = (cosines.unsqueeze(-1) - self.centers) * torch.exp(-self.log_widths)
        kernels = torch.exp(-0.5 * distance.square()) * weights.unsqueeze(-1)
        pooled = torch.log1p(kernels.transpose(-1, -2) @ decays)  # (R, S, K, A)
        plain = torch.stack([largest, mean], dim=-1)
        return torch.cat([plain, pooled.flatten(2)], dim=-1).flatten(1)
