"""The deep half with what it needs around it: scaled inputs, positions, ages, pooling.

Shapes: B = sequences, L = behaviours, D = vector width, Q = width of an output.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.config import BaheConfig
from training.layers import AgeEmbedding, masked_mean


class Tower(nn.Module):
    """Scenes and items to vectors of one width, through the same deep half.

    A behaviour goes in as ``scale * vector + position[distance from the newest] + age``; the output
    of a sequence is a linear map of [mean over behaviours, newest behaviour]. An empty sequence has
    a learned output of its own. An item is a sequence of length 1 with an embedding of its own in
    place of position and age.

    Args:
        config: How the model is built.
        width: D.
        deep_half: See :class:`training.model.Bahe`; None = the identity.
    """

    def __init__(self, config: BaheConfig, width: int, deep_half: nn.Module | None) -> None:
        super().__init__()
        if config.use_deep_half != (deep_half is not None):
            raise ValueError(
                f"use_deep_half is {config.use_deep_half}, "
                f"but {'no' if deep_half is None else 'a'} deep half was given"
            )
        self.deep_half = deep_half
        if deep_half is not None:
            for module in deep_half.modules():
                if isinstance(module, nn.Dropout):
                    module.p = config.deep_dropout
        self.use_bfloat16 = config.use_bfloat16
        self.scale = nn.Parameter(torch.full((width,), config.input_scale))
        self.position = nn.Embedding(config.deep_length, width)
        self.age = AgeEmbedding(config.num_age_buckets, width) if config.use_age else None
        self.item = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.position.weight, std=0.02)  # BERT's, for its position embeddings
        self.output_norm = nn.LayerNorm(width)
        self.output = nn.Linear(2 * width, config.output_width)
        self.empty = nn.Parameter(torch.zeros(config.output_width))

    def _deep(self, x: Float[Tensor, "B L D"], keep: Bool[Tensor, "B L"]) -> Float[Tensor, "B L D"]:
        """The deep half; in bfloat16 only while it learns, so that every score is float32."""
        if self.deep_half is None:
            return x
        if self.use_bfloat16 and self.training:
            # The flash kernel's backward pass is slow in bfloat16 on CPUs: 86 ms against 44 ms with
            # plain matrix products for 64 sequences of 20, width 384, one AMX core.
            with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
                y = self.deep_half(x, keep.long())
            return y.float()  # type: ignore[no-any-return]
        return self.deep_half(x, keep.long())  # type: ignore[no-any-return]

    def sequences(
        self,
        vectors: Float[Tensor, "B L D"],
        ages: Float[Tensor, "B L"],
        keep: Bool[Tensor, "B L"],
    ) -> Float[Tensor, "B Q"]:
        """One output per sequence.

        Args:
            vectors: Of the behaviours in table space, the newest last.
            ages: Seconds.
            keep: True where a behaviour is there. A row without one gets the empty output.
        """
        length = vectors.shape[1]
        x = vectors * self.scale + self.position.weight[:length].flip(0)
        if self.age is not None:
            x = x + self.age(ages)
        some = keep.any(1, keepdim=True)
        # The deep half must see one token per row: an empty row shows its last position, whose
        # output is then thrown away.
        last = torch.arange(length, device=keep.device) == length - 1
        y = self.output_norm(self._deep(x, keep | (last & ~some)))
        # The newest that is there: the last position may hold a text that is not in the table.
        newest = keep & (keep.flip(1).cumsum(1).flip(1) == 1)
        pooled = torch.cat([masked_mean(y, keep), masked_mean(y, newest)], dim=-1)
        outputs: Tensor = self.output(pooled)
        return torch.where(some, outputs, self.empty)

    def items(self, vectors: Float[Tensor, "R D"]) -> Float[Tensor, "R Q"]:
        """One output per item title."""
        x = (vectors * self.scale + self.item).unsqueeze(1)
        keep = torch.ones(x.shape[:2], dtype=torch.bool)
        y = self.output_norm(self._deep(x, keep)).squeeze(1)
        outputs: Tensor = self.output(torch.cat([y, y], dim=-1))
        return outputs

    def empty_output(self, num_rows: int) -> Float[Tensor, "B Q"]:
        """The output of ``num_rows`` empty sequences."""
        return self.empty.expand(num_rows, -1).clone()
