"""The deep half with what it needs around it: scaled inputs, positions, ages, pooling.

Shapes: B = contexts, S = scenes, N = sequences, L = behaviours, D = vector width, Q = width of an
output.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.config import BaheConfig
from training.deep_half import prepare_deep_half
from training.layers import AgeEmbedding, masked_mean

LookUp = Callable[[Int[Tensor, "N L"]], Float[Tensor, "N L D"]]
"""From table rows to vectors in table space."""


class _SceneStates(NamedTuple):
    """States of one scene, of the contexts where it is not empty, as long as its longest."""

    states: Float[Tensor, "N L D"]
    keep: Bool[Tensor, "N L"]
    owners: Int[Tensor, " N"]
    """Their contexts."""


class Tower(nn.Module):
    """Scenes and items to vectors of one width, through the same deep half.

    A behaviour goes in as ``scale * vector + position[distance from the newest] + age``; the output
    of a sequence is a linear map of its pooled states. An empty sequence has a learned output of
    its own. An item is a sequence of length 1 with an embedding of its own in place of position and
    age.

    Where the scenes do not share the deep half, each has a copy of its own and the item goes
    through the first scene's: an item must have one vector, whatever scene it is compared with.
    All else (scale, positions, ages, pooling, output) is shared in any case.

    Args:
        config: How the model is built.
        width: D.
        deep_half: See :class:`training.model.Bahe`; None = the identity.
        num_scenes: S; read where ``config.share_scenes`` is False.

    Raises:
        ValueError: If ``deep_half`` does not fit the config.
        EncoderError: See :func:`training.deep_half.prepare_deep_half`.
    """

    def __init__(
        self, config: BaheConfig, width: int, deep_half: nn.Module | None, *, num_scenes: int = 1
    ) -> None:
        super().__init__()
        if config.use_deep_half != (deep_half is not None):
            raise ValueError(
                f"use_deep_half is {config.use_deep_half}, "
                f"but {'no' if deep_half is None else 'a'} deep half was given"
            )
        self.config = config
        self.deep_half: nn.Module | None = None
        if deep_half is not None:
            self.deep_half = prepare_deep_half(
                deep_half, config, num_scenes=num_scenes, contexts=self._checkpoint_contexts
            )
        self.scale = nn.Parameter(torch.full((width,), config.input_scale))
        self.position: nn.Embedding | None = None
        if config.position == "distance":
            self.position = nn.Embedding(config.deep_length, width)
        self.age = AgeEmbedding(config.num_age_buckets, width) if config.use_age else None
        self.item = nn.Parameter(torch.zeros(width))
        if self.position is not None:
            nn.init.normal_(self.position.weight, std=0.02)  # BERT's, for its position embeddings
        self.output_norm = nn.LayerNorm(width)
        if config.pooling == "attention":
            self.query = nn.Parameter(torch.zeros(width))  # starts as the mean
        pooled_width = 2 * width if config.pooling == "mean_newest" else width
        self.output = nn.Linear(pooled_width, config.output_width)
        self.empty = nn.Parameter(torch.zeros(config.output_width))

    def _half(self, scene: int | None) -> nn.Module | None:
        """The deep half of a scene; ``scene`` matters only where they share none."""
        if not isinstance(self.deep_half, nn.ModuleList):
            return self.deep_half
        if scene is None:
            raise ValueError("say which scene this is: share_scenes is False")
        return self.deep_half[scene]

    def _attention_kernel(self) -> AbstractContextManager[object]:
        """While learning in bfloat16: how the deep half multiplies queries and keys."""
        if not self.config.use_bfloat16 or self.scale.device.type != "cpu":
            return nullcontext()
        # The flash kernel's backward pass is slow in bfloat16 on CPUs: 86 ms against 44 ms with
        # plain matrix products for 64 sequences of 20, width 384, one AMX core.
        return sdpa_kernel(SDPBackend.MATH)

    def _checkpoint_contexts(
        self,
    ) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
        """What a checkpointed layer computes in, at first and when it is computed again."""
        return nullcontext(), self._attention_kernel()

    def _deep(
        self, x: Float[Tensor, "N L D"], keep: Bool[Tensor, "N L"], scene: int | None
    ) -> Float[Tensor, "N L D"]:
        """The deep half; in bfloat16 only while it learns, so that every score is float32."""
        half = self._half(scene)
        if half is None:
            return x
        if self.config.use_bfloat16 and self.training:
            with torch.autocast(x.device.type, dtype=torch.bfloat16), self._attention_kernel():
                y = half(x, keep.long())
            return y.float()  # type: ignore[no-any-return]
        return half(x, keep.long())  # type: ignore[no-any-return]

    def states(
        self,
        vectors: Float[Tensor, "N L D"],
        ages: Float[Tensor, "N L"],
        keep: Bool[Tensor, "N L"],
        scene: int | None = None,
    ) -> Float[Tensor, "N L D"]:
        """The deep half's normalised outputs, one per behaviour, not pooled.

        Args:
            vectors: Of the behaviours in table space, the newest last.
            ages: Seconds.
            keep: True where a behaviour is there; the states of the others mean nothing.
            scene: Index of the scene; needed where ``share_scenes`` is False.
        """
        length = vectors.shape[1]
        x = vectors * self.scale
        if self.position is not None:
            x = x + self.position.weight[:length].flip(0)
        if self.age is not None:
            x = x + self.age(ages)
        # The deep half must see one token per row: an empty row shows its last position, whose
        # output is then thrown away.
        last = torch.arange(length, device=keep.device) == length - 1
        some = keep.any(1, keepdim=True)
        states: Tensor = self.output_norm(self._deep(x, keep | (last & ~some), scene))
        return states

    def _pool(
        self, y: Float[Tensor, "N L D"], keep: Bool[Tensor, "N L"]
    ) -> Float[Tensor, "N pooled"]:
        """One vector per sequence; the state itself, once or twice, where L is 1."""
        match self.config.pooling:
            case "mean":
                return masked_mean(y, keep)
            case "attention":
                logits: Tensor = (y @ self.query) / y.shape[-1] ** 0.5
                # Not infinity: a row without any behaviour must stay finite, its gradient too.
                logits = logits.masked_fill(~keep, torch.finfo(logits.dtype).min)
                return (logits.softmax(-1).unsqueeze(1) @ y).squeeze(1)
            case pooling:
                # The newest that is there: the last position may hold a text that is not in the
                # table.
                newest = masked_mean(y, keep & (keep.flip(1).cumsum(1).flip(1) == 1))
                if pooling == "newest":
                    return newest
                return torch.cat([masked_mean(y, keep), newest], dim=-1)

    def sequences(
        self,
        vectors: Float[Tensor, "N L D"],
        ages: Float[Tensor, "N L"],
        keep: Bool[Tensor, "N L"],
        scene: int | None = None,
    ) -> Float[Tensor, "N Q"]:
        """One output per sequence; see :meth:`states`. A row without any gets the empty output."""
        return self._outputs(self.states(vectors, ages, keep, scene), keep)

    def _outputs(
        self, states: Float[Tensor, "N L D"], keep: Bool[Tensor, "N L"]
    ) -> Float[Tensor, "N Q"]:
        outputs: Tensor = self.output(self._pool(states, keep))
        return torch.where(keep.any(1, keepdim=True), outputs, self.empty)

    def scenes(
        self,
        look_up: LookUp,
        rows: Int[Tensor, "B S L"],
        ages: Float[Tensor, "B S L"],
    ) -> Float[Tensor, "B S Q"]:
        """One output per scene of every context.

        Eagerly a scene is computed only where it is not empty and only as long as its longest; in
        an exported program, whose shapes must not depend on values, all of it.

        Args:
            look_up: From table rows to vectors in table space.
            rows: 0 = nothing there, the newest last.
            ages: Seconds.
        """
        if torch.compiler.is_exporting():
            return self._all_scenes(look_up, rows, ages)[0]
        found = self._scene_states(look_up, rows, ages)
        return torch.stack([self._scene_outputs(scene, len(rows)) for scene in found], dim=1)

    def scenes_and_states(
        self, look_up: LookUp, rows: Int[Tensor, "B S L"], ages: Float[Tensor, "B S L"]
    ) -> tuple[Float[Tensor, "B S Q"], Float[Tensor, "B S L D"]]:
        """The same, with the states of all behaviours; those of places without one mean nothing."""
        if torch.compiler.is_exporting():
            return self._all_scenes(look_up, rows, ages)
        found = self._scene_states(look_up, rows, ages)
        outputs = [self._scene_outputs(scene, len(rows)) for scene in found]
        num_contexts, _, length = rows.shape
        states = []
        for scene in found:
            padded = self.scale.new_zeros((num_contexts, length, len(self.scale)))
            if scene is not None:
                missing = length - scene.states.shape[1]
                whole = functional.pad(scene.states, (0, 0, missing, 0))
                padded = padded.index_put((scene.owners,), whole)
            states.append(padded)
        return torch.stack(outputs, dim=1), torch.stack(states, dim=1)

    def _all_scenes(
        self, look_up: LookUp, rows: Int[Tensor, "B S L"], ages: Float[Tensor, "B S L"]
    ) -> tuple[Float[Tensor, "B S Q"], Float[Tensor, "B S L D"]]:
        """Outputs and states of every scene at full length, whatever is there."""
        flat = rows.flatten(0, 1)
        if isinstance(self.deep_half, nn.ModuleList):
            each = [
                self.states(look_up(rows[:, s]), ages[:, s], rows[:, s] != 0, s)
                for s in range(rows.shape[1])
            ]
            states = torch.stack(each, dim=1)
        else:
            states = self.states(look_up(flat), ages.flatten(0, 1), flat != 0)
            states = states.reshape(*rows.shape, -1)
        outputs = self._outputs(states.flatten(0, 1), flat != 0)
        return outputs.reshape(*rows.shape[:2], -1), states

    def _scene_states(
        self, look_up: LookUp, rows: Int[Tensor, "B S L"], ages: Float[Tensor, "B S L"]
    ) -> list[_SceneStates | None]:
        """One entry per scene; None where no context has anything in it."""
        return [self._one_scene(look_up, rows[:, s], ages[:, s], s) for s in range(rows.shape[1])]

    def _one_scene(
        self, look_up: LookUp, rows: Int[Tensor, "B L"], ages: Float[Tensor, "B L"], scene: int
    ) -> _SceneStates | None:
        keep = rows != 0
        some = keep.any(1)
        if not bool(some.any()):
            return None
        first = int(keep.any(0).to(torch.uint8).argmax())
        rows, ages, keep = rows[some, first:], ages[some, first:], keep[some, first:]
        states = self.states(look_up(rows), ages, keep, scene)
        return _SceneStates(states, keep, some.nonzero()[:, 0])

    def _scene_outputs(self, scene: _SceneStates | None, num_contexts: int) -> Float[Tensor, "B Q"]:
        result = self.empty_output(num_contexts)
        if scene is None:
            return result
        return result.index_put((scene.owners,), self._outputs(scene.states, scene.keep))

    def items(self, vectors: Float[Tensor, "N D"]) -> Float[Tensor, "N Q"]:
        """One output per item title."""
        return self.item_outputs(self.item_states(vectors))

    def item_states(self, vectors: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """The deep half's normalised output of each item title."""
        x = (vectors * self.scale + self.item).unsqueeze(1)
        keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        states: Tensor = self.output_norm(self._deep(x, keep, 0))
        return states.squeeze(1)

    def item_outputs(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N Q"]:
        """One output per item, from its state."""
        y = states.unsqueeze(1)
        keep = torch.ones(y.shape[:2], dtype=torch.bool, device=y.device)
        outputs: Tensor = self.output(self._pool(y, keep))
        return outputs

    def empty_output(self, num_rows: int) -> Float[Tensor, "N Q"]:
        """The output of ``num_rows`` empty sequences."""
        return self.empty.expand(num_rows, -1).clone()
