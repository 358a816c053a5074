"""From what the reader returns to logits: the program's inputs in the order of its manifest.

Shapes: T = items to score for one user at one time, C = candidates per call of the program; the
others as in :data:`feature_repo.artifact.PROGRAM_INPUTS`, where B is always 1 here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from encoders.attribution import Attribution, attribute
from encoders.evidence import candidate_evidence, evidence_names
from encoders.inputs import ItemInputs, UserInputs, item_inputs, user_inputs
from encoders.loaded_artifact import Artifact
from encoders.table import EmbeddingTable
from feature_repo.artifact import ProgramParts
from feature_repo.errors import ArtifactError
from feature_repo.features import ItemFeatures, UserFeatures


@dataclass(frozen=True)
class DeepOutputs:
    """Of one user and of T items.

    Args:
        user: float32 [1, S, Q].
        items: float32 [T, Q].
    """

    user: NDArray[np.float32]
    items: NDArray[np.float32]


class Scorer:
    """Runs an artifact's program over one user's candidates.

    Args:
        artifact: The model.
        table: Vectors of the encoder that the model was trained on.
        chunk_size: C, the most candidates in one call of the program, at least 1. It bounds the
            memory of a request; the user's half of the model is computed once per chunk.

    Raises:
        ArtifactError: If the table is another encoder's.
    """

    def __init__(self, artifact: Artifact, table: EmbeddingTable, *, chunk_size: int) -> None:
        artifact.check_table(table)
        self.manifest = artifact.manifest
        if self.manifest.evidence_names != evidence_names(self.manifest.scenes):
            raise ArtifactError(
                f"run {self.manifest.run} reads evidence that this version does not compute: run "
                "`longtrail train` again"
            )
        self._artifact = artifact
        self._table = table
        self._vectors = torch.from_numpy(table.vectors)
        self._chunk_size = chunk_size

    def user_side(self, users: UserFeatures) -> UserInputs:
        """Build the user's inputs, dense columns in the manifest's order.

        Raises:
            ArtifactError: If the store lacks a scene, a behaviour or a column that the model reads.
        """
        manifest = self.manifest
        for scene in manifest.scenes:
            if scene not in users.sequences:
                raise self._lacks(f"scene {scene!r} of users")
            length = users.sequences[scene].behavior_ids.shape[1]
            if length < manifest.sequence_length:
                raise self._lacks(
                    f"{manifest.sequence_length} behaviours of {scene!r} per user ({length} kept)"
                )
        dense = self._aligned(
            users.dense, users.dense_names, manifest.user_dense_names, "feature {} of users"
        )
        return user_inputs(
            replace(users, dense=dense, dense_names=manifest.user_dense_names),
            self._table,
            scenes=manifest.scenes,
        )

    def item_side(self, items: ItemFeatures) -> ItemInputs:
        """Build the items' inputs, dense and categorical columns in the manifest's order.

        Raises:
            ArtifactError: If the store lacks a column that the model reads.
        """
        for name in self.manifest.category_vocabularies:
            if name not in items.categorical:
                raise self._lacks(f"column {name!r} of items")
        dense = self._aligned(
            items.dense, items.dense_names, self.manifest.item_dense_names, "feature {} of items"
        )
        return item_inputs(
            replace(items, dense=dense, dense_names=self.manifest.item_dense_names),
            self._table,
            vocabularies=self.manifest.category_vocabularies,
        )

    @property
    def form(self) -> ProgramParts | None:
        """What deep outputs depend on; None where they cannot be computed apart from scores."""
        return None if self._artifact.parts is None else self._artifact.parts.form

    def user_outputs(self, user: UserInputs) -> NDArray[np.float32]:
        """Deep outputs of users, [B, S, Q]; for a model with a :attr:`form`."""
        assert self._artifact.parts is not None
        newest = user.last(self.manifest.sequence_length)
        history = _tensors(newest.history_rows, newest.history_ages)
        with torch.inference_mode():
            outputs: NDArray[np.float32] = self._artifact.parts.users(
                self._vectors, *history
            ).numpy()
        return outputs

    def item_outputs(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Deep outputs of titles by their table rows, [R, Q]; for a model with a :attr:`form`.

        Cost: each distinct row once, in calls of at most C rows.
        """
        assert self._artifact.parts is not None
        distinct, places = np.unique(rows, return_inverse=True)
        outputs = np.empty((len(distinct), self._artifact.parts.form.output_width), np.float32)
        with torch.inference_mode():
            for start in range(0, len(distinct), self._chunk_size):
                chunk = slice(start, start + self._chunk_size)
                (part,) = _tensors(distinct[chunk])
                outputs[chunk] = self._artifact.parts.items(self._vectors, part)
        return outputs[places]

    def logits(
        self,
        user: UserInputs,
        items: ItemInputs,
        context: Mapping[str, float],
        outputs: DeepOutputs | None = None,
    ) -> NDArray[np.float32]:
        """Logits [T] of one user's candidates.

        Args:
            user: Inputs of exactly one user.
            items: Inputs of T items; T may be 0.
            context: Name -> value, the same for every candidate; a name left out is missing.
            outputs: What was computed before; with it only the head runs.

        Cost: ceil(T / C) runs of the program.
        """
        assert user.history_rows.shape[0] == 1, user.history_rows.shape
        num_items = len(items.candidate_rows)
        values = self.context_values(context)
        newest = user.last(self.manifest.sequence_length)
        user_side = _tensors(
            newest.history_rows,
            newest.history_item_keys,
            newest.history_ages,
            newest.history_totals,
            newest.user_dense,
        )
        logits = np.empty(num_items, dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, num_items, self._chunk_size):
                chunk = slice(start, start + self._chunk_size)
                part = items.take(chunk)
                evidence = candidate_evidence(
                    user, 0, part, self._table, self.manifest.evidence_kinds
                )
                columns = np.repeat(values[None], len(evidence), axis=0)
                inputs = (
                    self._vectors,
                    *user_side,
                    *(
                        tensor[None]
                        for tensor in _tensors(
                            part.candidate_rows,
                            part.candidate_item_keys,
                            part.candidate_dense,
                            part.candidate_categories,
                            columns,
                            evidence,
                        )
                    ),
                )
                logits[chunk] = self._call(inputs, outputs, chunk)[0]
        return logits

    def _call(
        self, inputs: tuple[Tensor, ...], outputs: DeepOutputs | None, chunk: slice
    ) -> Tensor:
        if outputs is None:
            return self._artifact.score(*inputs)
        assert self._artifact.parts is not None
        user, items = _tensors(outputs.user, outputs.items[chunk])
        return self._artifact.parts.head(user, items[None], *inputs)

    def context_values(self, context: Mapping[str, float]) -> NDArray[np.float32]:
        """A request's context in the manifest's order, [Fx]; NaN = missing."""
        names = self.manifest.context_names
        return np.array([context.get(name, np.nan) for name in names], dtype=np.float32)

    def attribute(
        self, user: UserInputs, items: ItemInputs, context: Mapping[str, float], number: int
    ) -> Attribution:
        """What the ``number`` newest texts of one user's history add to the scores of T items."""
        return attribute(
            self._artifact.score,
            self._table,
            user,
            items,
            self.context_values(context),
            sequence_length=self.manifest.sequence_length,
            max_behaviors=number,
        )

    def refreshed(self) -> "Scorer":
        """The same with the vectors that other processes have added; itself where none are."""
        table = self._table.refreshed()
        if table is self._table:
            return self
        return Scorer(self._artifact, table, chunk_size=self._chunk_size)

    @property
    def edition(self) -> object:
        """Of the table: while it is the same, rows are only added."""
        return self._table.edition

    def rows(self, behavior_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of texts in the table, 0 where it has none."""
        return self._table.rows(behavior_ids)

    def unit_vectors(self, behavior_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Look up vectors of behaviours, at unit length [R, D]; all zero where there is none."""
        return self._table.directions(self._table.rows(behavior_ids))

    def _aligned(
        self,
        dense: NDArray[np.float32],
        found: tuple[str, ...],
        wanted: tuple[str, ...],
        what: str,
    ) -> NDArray[np.float32]:
        """Columns of ``dense`` by name, in the order of ``wanted``."""
        if found == wanted:
            return dense
        index = {name: column for column, name in enumerate(found)}
        for name in wanted:
            if name not in index:
                raise self._lacks(what.format(repr(name)))
        return np.ascontiguousarray(dense[:, [index[name] for name in wanted]])

    def _lacks(self, what: str) -> ArtifactError:
        return ArtifactError(
            f"run {self.manifest.run} reads {what}, which the feature store does not have: run "
            "`longtrail train` again on the features as they are now"
        )


def _tensors(*arrays: NDArray[Any]) -> tuple[Tensor, ...]:
    # Arrays over a store's bytes are read-only, which tensors cannot be: these alone are copied.
    writable = (np.require(array, requirements=("C", "W")) for array in arrays)
    return tuple(torch.from_numpy(array) for array in writable)
