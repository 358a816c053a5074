"""From a user id to ranked items with reasons: read, score, sort, explain."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.inputs import ItemInputs
from encoders.table import EmbeddingTable
from feature_repo.artifact import current_run
from feature_repo.catalog import Catalog
from feature_repo.errors import LongtrailError
from feature_repo.features import OnlineReader, UserFeatures
from feature_repo.home import Home
from feature_repo.manifest import load_manifest
from feature_repo.reader import FeatureReader
from serving.answers import RankedItem, Ranking, UserView
from serving.artifact import Artifact, load_artifact
from serving.history import History
from serving.items import Catalogue, ItemCache, ItemSnapshot
from serving.reasons import reasons
from serving.scoring import Scorer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankerConfig:
    """How a ranker spends time and memory."""

    chunk_size: int = 2048
    """Items in one call of the model; at least 1."""
    item_age_s: float = 60.0
    """Seconds after which the catalogue's features are read again; at least 0."""
    num_threads: int = 1
    """Threads of one call of the model; at least 1. PyTorch keeps this per process. Requests run
    side by side, so more than one pays only on idle cores: on two busy ones it took 8x as long."""

    def __post_init__(self) -> None:
        for name in ("chunk_size", "num_threads"):
            if getattr(self, name) < 1:
                raise LongtrailError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.item_age_s >= 0:
            raise LongtrailError(f"item_age_s must be at least 0 seconds, got {self.item_age_s}")


class TextCatalog(Protocol):
    """What serving asks of the catalogue of texts."""

    @property
    def item_ids(self) -> NDArray[np.object_]:
        """Every item id."""

    def texts(self, behavior_ids: NDArray[np.int64]) -> list[str]:
        """Texts of behaviour ids, empty where unknown."""


class Ranker:
    """Ranks items for user ids with one model; one instance serves many threads.

    Users are read for every request. Items are read once per ``config.item_age_s``: their ages and
    windowed counts are those of a moment at most that far from the request's, so a score can differ
    by as much as the model cares about that time.

    Args:
        artifact: The model.
        reader: Reads the online store.
        table: Vectors of the encoder that the model was trained on.
        catalog: Item ids and texts.
        clock: Tells the moment of a request that names none, UTC.
        config: Time and memory.

    Raises:
        ArtifactError: If the table is another encoder's.
    """

    def __init__(
        self,
        artifact: Artifact,
        reader: OnlineReader,
        table: EmbeddingTable,
        catalog: TextCatalog,
        *,
        clock: Callable[[], datetime],
        config: RankerConfig | None = None,
    ) -> None:
        config = config or RankerConfig()
        torch.set_num_threads(config.num_threads)
        self.manifest = artifact.manifest
        self._reader = reader
        self._catalog = catalog
        self._clock = clock
        self._scorer = Scorer(artifact, table, chunk_size=config.chunk_size)
        self._items = ItemCache(reader, self._scorer, catalog.item_ids, max_age_s=config.item_age_s)

    @classmethod
    def open(
        cls, home: Home, profile: str, run: str | None = None, *, config: RankerConfig | None = None
    ) -> "Ranker":
        """Open the ranker of a run in ``home``.

        Args:
            home: Where the run, the vectors and the texts are.
            profile: Whose online store to read.
            run: Name of the run; None for the current one.
            config: Time and memory.

        Raises:
            MissingStepError: If a step before has not been run.
            ArtifactError: If the run cannot be served.
            EncoderError: If the vectors that it was trained on are gone.
        """
        artifact = load_artifact(home, current_run(home) if run is None else run)
        return cls(
            artifact,
            FeatureReader(home, profile),
            EmbeddingTable.open(home, fingerprint=artifact.manifest.encoder_fingerprint),
            Catalog.load(home),
            clock=load_manifest(home).now,
            config=config,
        )

    def refresh_items(self, at: datetime | None = None) -> int:
        """Read the whole catalogue now; returns how many items the store knows."""
        return len(self._items.refresh(at or self._clock()).items.item_ids)

    def warm_up(self) -> None:
        """Read all items and rank once, so that the first request is fast and misfits show now.

        Raises:
            ArtifactError: If the store lacks a feature that the model reads.
        """
        num_items = self.refresh_items()
        _log.info("%d items are ready", num_items)
        self.rank("", top_k=1)

    def user(self, user_id: str, *, at: datetime | None = None) -> UserView:
        """Tell what the online store knows of one user at ``at``; None for now."""
        at = at or self._clock()
        users = self._read_user(user_id, at)
        history = History.of(users)
        return UserView(
            known=bool(users.found[0]),
            at=at,
            history=history.behaviors(self._catalog.texts(history.behavior_ids)),
            totals={scene: int(one.total[0]) for scene, one in users.sequences.items()},
            dense=dict(zip(users.dense_names, users.dense[0].tolist(), strict=True)),
        )

    def rank(
        self,
        user_id: str,
        *,
        candidates: Sequence[str] | None = None,
        top_k: int = 10,
        at: datetime | None = None,
        context: Mapping[str, float] | None = None,
    ) -> Ranking:
        """Rank items for a user.

        Args:
            user_id: Any string; a user whom the store does not know gets the model's ranking of an
                empty history and a note that says so.
            candidates: Item ids to rank; None for the whole catalogue.
            top_k: Most items to return, at least 1.
            at: The moment of the request, UTC-aware; None for now.
            context: What the request itself tells, by the names that the model was trained with.

        Raises:
            LongtrailError: If ``top_k``, ``at`` or a context name is not usable.
            ArtifactError: If the store lacks a feature that the model reads.

        Cost: one user read and ceil(items / ``chunk_size``) calls of the model.
        """
        self._check(top_k, at, context or {})
        at = at or self._clock()
        users = self._read_user(user_id, at)
        catalogue = self._items.at(at)
        items, unknown = self._candidates(catalogue.items, candidates, at)
        logits = self._scorer.logits(self._scorer.user_side(users), items.inputs, context or {})
        # By logit, not by probability: those of very sure models round to 1. The items come by id
        # and the sort is stable, so that the smaller id is first among equals.
        order = np.argsort(-logits, kind="stable")
        scored = order[~np.isnan(logits[order])]

        history = History.of(users)
        texts = self._catalog.texts(history.behavior_ids)
        top = items.take(scored[:top_k])
        return Ranking(
            user_id=user_id,
            known=bool(users.found[0]),
            model=self.manifest.run,
            at=at,
            history=history.behaviors(texts),
            ranked=self._answer(top, logits[scored[:top_k]], history, texts, catalogue),
            unknown_items=unknown,
            num_scored=len(scored),
            notes=self._notes(users, candidates, unknown, len(logits), len(scored)),
        )

    def _read_user(self, user_id: str, at: datetime) -> UserFeatures:
        return self._reader.online_users(np.array([user_id], dtype=object), at=at)

    def _check(self, top_k: int, at: datetime | None, context: Mapping[str, float]) -> None:
        if top_k < 1:
            raise LongtrailError(f"top_k must be at least 1, got {top_k}")
        if at is not None and at.tzinfo is None:
            raise LongtrailError(f"at must have a time zone, got {at.isoformat()}")
        for name in context:
            if name not in self.manifest.context_names:
                raise LongtrailError(
                    f"context has {name!r}, which run {self.manifest.run} does not read; it reads "
                    f"{', '.join(self.manifest.context_names) or 'none'}"
                )

    def _candidates(
        self, known: ItemSnapshot, candidates: Sequence[str] | None, at: datetime
    ) -> tuple[ItemSnapshot, tuple[str, ...]]:
        """Return the items to score and the candidates that the store does not know."""
        if candidates is None:
            return known, ()
        distinct = list(dict.fromkeys(candidates))
        rows = sorted(known.row[c] for c in distinct if c in known.row)
        cached = known.take(np.array(rows, dtype=np.intp))
        missing = [c for c in distinct if c not in known.row]
        if not missing:
            return cached, ()
        # An item that came after the catalogue was read: the store may know it all the same.
        late = self._items.read(np.array(missing, dtype=object), at)
        unknown = tuple(c for c in missing if c not in late.row)
        return cached.merged(late), unknown

    def _answer(
        self,
        top: ItemSnapshot,
        logits: NDArray[np.float32],
        history: History,
        texts: list[str],
        catalogue: Catalogue,
    ) -> tuple[RankedItem, ...]:
        inputs: ItemInputs = top.inputs
        why = reasons(
            history,
            texts,
            item_keys=inputs.candidate_item_keys,
            item_vectors=self._scorer.unit_vectors(top.text_ids),
            history_vectors=self._scorer.unit_vectors(history.behavior_ids),
            popular=top.recent_behaviors >= catalogue.popular_from,
            min_similarity=catalogue.alike_from,
        )
        scores = torch.from_numpy(logits.astype(np.float64)).sigmoid().tolist()
        columns = zip(top.item_ids, self._catalog.texts(top.text_ids), scores, why, strict=True)
        return tuple(
            RankedItem(item_id=str(item_id), text=text, score=score, reason=reason)
            for item_id, text, score, reason in columns
        )

    def _notes(
        self,
        users: UserFeatures,
        candidates: Sequence[str] | None,
        unknown: tuple[str, ...],
        num_items: int,
        num_scored: int,
    ) -> tuple[str, ...]:
        notes = []
        if not users.found[0]:
            notes.append("unknown user: ranked by the model with an empty history")
        elif not any(sequence.mask.any() for sequence in users.sequences.values()):
            notes.append("no behaviours are kept: ranked by the model with an empty history")
        if candidates is not None and len(set(candidates)) < len(candidates):
            notes.append("candidates named more than once were ranked once")
        if unknown:
            plural = "s" if len(unknown) > 1 else ""
            notes.append(f"{len(unknown)} unknown item{plural} left out")
        if not num_items:
            notes.append("nothing to rank: the feature store knows none of the items")
        if num_scored < num_items:
            notes.append(f"{num_items - num_scored} items left out: the model gave them no score")
            _log.error(
                "run %s gave NaN for %d of %d items",
                self.manifest.run,
                num_items - num_scored,
                num_items,
            )
        return tuple(notes)
