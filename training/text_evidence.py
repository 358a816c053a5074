"""How alike candidate and history read, as learned soft counts.

Shapes: R = flat candidates, M = behaviours of one scene, K = cosine kernels, A = age scales,
E = values of evidence per candidate.
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


class TextEvidence(nn.Module):
    """How alike candidate and history read: 2 + K x A values.

    The largest and the mean cosine, and soft counts ``log1p(sum_m kernel_k(cos_m) decay_a(age_m))``
    with Gaussian kernels whose centres and widths are learned. Behaviours about the candidate
    itself are left out of all of them: they have a channel of their own (:mod:`encoders.evidence`)
    and would drown what the other texts say.

    Args:
        num_kernels: K, at least 2.
        num_scales: A.

    Source:
        Xiong et al., "End-to-End Neural Ad-hoc Ranking with Kernel Pooling", SIGIR 2017,
        arXiv:1706.06613, eq. 3 and 4; the age scales are ours.
    """

    def __init__(self, *, num_kernels: int, num_scales: int) -> None:
        super().__init__()
        if num_kernels < 2:
            raise ValueError(f"num_kernels must be at least 2, got {num_kernels}")
        low, high = -0.2, 0.95  # centred cosines of unrelated and of nearly equal texts
        self.centers = nn.Parameter(torch.linspace(low, high, num_kernels))
        # Half the distance of two centres: neighbouring kernels cross at 60 % of their height.
        width = (high - low) / (num_kernels - 1) / 2
        self.log_widths = nn.Parameter(torch.full((num_kernels,), width).log())
        self.output_width = 2 + num_kernels * num_scales

    def forward(
        self,
        cosines: Float[Tensor, "R M"],
        keep: Bool[Tensor, "R M"],
        decays: Float[Tensor, "R M A"],
    ) -> Float[Tensor, "R E"]:
        """The evidence of every candidate; zeros where nothing is kept.

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
        # The kernels' slopes first, on a small tensor: (c - mu) / w = c / w - mu / w.
        slopes = torch.exp(-self.log_widths).unsqueeze(-1)
        distance = torch.addcmul(
            -self.centers.unsqueeze(-1) * slopes, cosines.unsqueeze(1), slopes
        )  # (R, K, M)
        kernels = torch.exp(-0.5 * distance.square()) * weights.unsqueeze(1)
        pooled = torch.log1p(kernels @ decays).flatten(1)  # (R, K, A)
        return torch.cat([torch.stack([largest, mean], -1), pooled], dim=-1)
