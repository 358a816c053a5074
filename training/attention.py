"""Target attention: what the candidate makes of each scene of the history.

It comes after the deep half (late fusion): nothing of a candidate goes into a user's vectors, so a
history is projected once per context, however many candidates ask.

Shapes: B = contexts, C = candidates, S = scenes, M = behaviours per scene, D = vector width,
H = heads, E = width of a head.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from training.layers import AgeEmbedding

START_COSINE_WEIGHT = 4.0
"""A behaviour with a cosine of .5 starts with e^2 = 7 times the weight of one with 0."""
START_SAME_WEIGHT = 2.0
"""The candidate itself in the history starts like a cosine .5 closer than its text is."""


class TargetAttention(nn.Module):
    """Heads of attention from each candidate to the behaviours of each scene.

    In scene s, head h, the logit of behaviour m for candidate c is

        q_c k_m / sqrt(E) + u_sh cosine(c, m) + v_sh [same item] + age_h[bucket of the age of m]

    and a null slot of logit n_sh and value 0 takes what no behaviour deserves, so that a history
    without anything relevant (or anything at all) gives zeros. Queries, keys and values are linear
    maps of the vectors, the same for all scenes.

    Cost: a history's projection B S M D H E once, then B S C M H E for all candidates; the largest
    intermediate is the logits, [B, S, H, C, M].

    Args:
        width: D.
        num_scenes: S.
        num_heads: H.
        head_width: E.
        num_age_buckets: See :class:`training.layers.AgeEmbedding`.

    Source:
        Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv:1706.03762, section 3.2.2,
        with the candidate as the query as in Zhou et al., "Deep Interest Network", KDD 2018,
        arXiv:1706.06978; the cosine, exact-match and age terms and the null slot are ours.
    """

    def __init__(
        self,
        width: int,
        num_scenes: int,
        *,
        num_heads: int = 4,
        head_width: int = 16,
        num_age_buckets: int = 16,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_width = head_width
        self.query = nn.Linear(width, num_heads * head_width)
        self.key_value = nn.Linear(width, 2 * num_heads * head_width, bias=False)
        self.age = AgeEmbedding(num_age_buckets, num_heads)
        self.cosine_weight = nn.Parameter(torch.full((num_scenes, num_heads), START_COSINE_WEIGHT))
        self.same_weight = nn.Parameter(torch.full((num_scenes, num_heads), START_SAME_WEIGHT))
        self.null_logit = nn.Parameter(torch.zeros(num_scenes, num_heads))
        self.output_width = num_scenes * num_heads * head_width

    def forward(
        self,
        history: Float[Tensor, "B S M D"],
        ages: Float[Tensor, "B S M"],
        keep: Bool[Tensor, "B S M"],
        candidates: Float[Tensor, "B C D"],
        cosines: Float[Tensor, "B S C M"],
        same: Bool[Tensor, "B S C M"],
    ) -> Float[Tensor, "B C SHE"]:
        """What every candidate finds in every scene.

        Args:
            history: Vectors of behaviours, unit length: directions of their texts, or of the deep
                half's states.
            ages: Seconds.
            keep: True where a behaviour is there; all else has no influence, whatever it holds.
            candidates: Vectors of the same kind, unit length.
            cosines: Of candidate and behaviour in table space, whatever the vectors are.
            same: True where the behaviour is about the candidate itself.
        """
        scenes = [
            self.scene(
                scene,
                history[:, scene],
                ages[:, scene],
                keep[:, scene],
                candidates,
                cosines[:, scene],
                same[:, scene],
            )
            for scene in range(history.shape[1])
        ]
        return torch.cat(scenes, dim=-1)

    def scene(
        self,
        scene: int,
        history: Float[Tensor, "B M D"],
        ages: Float[Tensor, "B M"],
        keep: Bool[Tensor, "B M"],
        candidates: Float[Tensor, "B C D"],
        cosines: Float[Tensor, "B C M"],
        same: Bool[Tensor, "B C M"],
    ) -> Float[Tensor, "B C HE"]:
        """What every candidate finds in one scene; see :meth:`forward`."""
        heads = (self.num_heads, self.head_width)
        # Unit vectors at mean square 1, which a linear layer's usual start expects; the larger
        # tensor is scaled after its map, where it is narrower.
        scale = candidates.shape[-1] ** 0.5
        queries = self.query(candidates * scale).unflatten(-1, heads)
        queries = queries.transpose(1, 2) / self.head_width**0.5  # (B, H, C, E)
        keys, values = (
            (self.key_value(history) * scale).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        )  # (2, B, H, M, E)
        logits = queries @ keys.transpose(-1, -2)  # (B, H, C, M)
        logits = torch.addcmul(logits, _per_head(self.cosine_weight[scene]), cosines.unsqueeze(1))
        logits = torch.addcmul(
            logits, _per_head(self.same_weight[scene]), same.unsqueeze(1).to(logits)
        )
        logits = logits + self.age(ages).transpose(1, 2).unsqueeze(2)
        logits = logits.masked_fill(~keep[:, None, None], -torch.inf)
        null = _per_head(self.null_logit[scene]).expand(*logits.shape[:-1], 1)
        # With the null slot there is always something finite, in an empty history too.
        weights = torch.cat([logits, null], dim=-1).softmax(-1)[..., :-1]
        found: Tensor = weights @ values  # (B, H, C, E)
        return found.transpose(1, 2).flatten(2)


def _per_head(values: Float[Tensor, " H"]) -> Float[Tensor, "1 H 1 1"]:
    return values[None, :, None, None]
