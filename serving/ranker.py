"""From a user id to ranked items with reasons: read, choose, score, sort, explain."""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime

import numpy as np
import torch
from numpy.typing import NDArray

from encoders.loaded_artifact import Artifact, load_artifact
from encoders.table import EmbeddingTable
from feature_repo.artifact import current_run
from feature_repo.catalog import Catalog
from feature_repo.errors import LongtrailError, MissingStepError
from feature_repo.features import OnlineReader
from feature_repo.home import Home
from feature_repo.manifest import DataClock, load_manifest
from feature_repo.reader import FeatureReader
from serving.answers import (
    Explanation,
    HistoryChanges,
    RankedItem,
    Ranking,
    Served,
    SimilarItem,
    UnknownItemError,
    UserView,
)
from serving.explain import contributions_of
from serving.history import Behavior, History
from serving.item_cache import ItemCache
from serving.items import Catalogue, ItemSnapshot
from serving.preparation import Preparation, PreparedRequest, RankerConfig, TextCatalog
from serving.reasons import reasons
from serving.refresh import OutputRefresher
from serving.retrieval import similar
from serving.scoring import DeepOutputs, Scorer

_log = logging.getLogger(__name__)

ALIKE_BEHAVIORS = 200
"""Newest behaviours that a reason may say an item is like."""
EXPLAINED_TEXTS = 30
"""Newest distinct texts of a history that are left out one by one to explain scores."""


class Ranker:
    """Ranks items for user ids with one model; one instance serves many threads.

    Users are read for every request. Items are read once per ``config.item_age_s``; ages among
    their features are brought up to each request's moment.

    Args:
        artifact: The model.
        reader: Reads the online store.
        table: Vectors of the encoder that the model was trained on.
        catalog: Item ids and texts.
        clock: Tells the moment of a request that names none, UTC.
        lowercase: Whether the data set's texts are.
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
        lowercase: bool = True,
        config: RankerConfig | None = None,
    ) -> None:
        self.config = config or RankerConfig()
        torch.set_num_threads(self.config.num_threads)
        self.manifest = artifact.manifest
        self._reader = reader
        self._catalog = catalog
        self._clock = clock
        scorer = Scorer(artifact, table, chunk_size=self.config.chunk_size)
        self._items = ItemCache(reader, scorer, catalog.item_ids, max_age_s=self.config.item_age_s)
        self._preparation = Preparation(
            reader, self._items, catalog, lowercase=lowercase, config=self.config
        )

    @classmethod
    def open(
        cls,
        home: Home,
        profile: str,
        run: str | None = None,
        *,
        config: RankerConfig | None = None,
        guard: Callable[[OnlineReader], OnlineReader] | None = None,
    ) -> "Ranker":
        """Open the ranker of a run in ``home``.

        Args:
            home: Where the run, the vectors and the texts are.
            profile: Whose online store to read.
            run: Name of the run; None for the current one.
            config: Time and memory.
            guard: Puts something between the ranker and the store, such as a circuit breaker.

        Raises:
            MissingStepError: If a step before has not been run.
            ArtifactError: If the run cannot be served.
            EncoderError: If the vectors that it was trained on are gone.
        """
        artifact = load_artifact(home, current_run(home) if run is None else run)
        outputs_of = None if artifact.parts is None else artifact.manifest.run
        reader: OnlineReader = FeatureReader(home, profile, outputs_of=outputs_of)
        ranker = cls(
            artifact,
            guard(reader) if guard else reader,
            EmbeddingTable.open(home, fingerprint=artifact.manifest.encoder_fingerprint),
            Catalog.load(home),
            clock=DataClock(home),
            lowercase=load_manifest(home).lowercase,
            config=config,
        )
        # Last: its thread would outlive an opening that failed.
        refresher = OutputRefresher.open(home, profile, outputs_of) if outputs_of else None
        if refresher is not None:
            ranker._preparation.write_back = refresher.submit
            weakref.finalize(ranker, refresher.stop)  # or a swap of models
        return ranker

    def refresh_items(self, at: datetime | None = None) -> int:
        """Read the whole catalogue now; returns how many items the store knows."""
        return len(self._items.refresh(at or self._clock()).items.item_ids)

    def warm_up(self) -> None:
        """Read all items and rank once, so that the first request is fast and misfits show now.

        Raises:
            ArtifactError: If the store lacks a feature that the model reads.
            MissingStepError: If it holds no item.
            StoreError: If it cannot be read.
        """
        num_items = self.refresh_items()
        if not num_items:
            raise MissingStepError(
                "no item of the data set is in the online store: run `longtrail materialize` first"
            )
        _log.info("%d items are ready", num_items)
        at = self._clock()
        self._preparation.read_nobody(at)
        self.rank("", top_k=1, at=at)

    def check(self) -> None:
        """Make sure that the store answers.

        Raises:
            StoreError: If it does not.
        """
        self._preparation.read_user("", self._clock())

    @property
    def num_items(self) -> int:
        """Items that the store knows."""
        return len(self._items.current(self._clock()).items.item_ids)

    @property
    def items_at(self) -> datetime:
        """The moment that the catalogue was read for, UTC."""
        return self._items.current(self._clock()).items.at

    def user(self, user_id: str, *, at: datetime | None = None) -> UserView:
        """Tell what the online store knows of one user at ``at``; None for now.

        Raises:
            StoreError: If it does not answer.
        """
        at = self._moment(at)
        self._catalog.refresh()
        users = self._preparation.read_user(user_id, at)
        history = History.of(users)
        return UserView(
            known=bool(users.found[0]),
            at=at,
            history=self._behaviors(history, self._items.current(at)),
            totals={scene: int(one.total[0]) for scene, one in users.sequences.items()},
            dense=dict(zip(users.dense_names, users.dense[0].tolist(), strict=True)),
            feature_age_s=history.age_s,
        )

    def rank(
        self,
        user_id: str,
        *,
        candidates: Sequence[str] | None = None,
        top_k: int = 10,
        at: datetime | None = None,
        context: Mapping[str, float] | None = None,
        changes: HistoryChanges | None = None,
        num_history: int = 20,
        num_contributions: int = 0,
    ) -> Ranking:
        """Rank items for a user.

        Args:
            user_id: Any string; a user whom the store does not know gets the model's ranking of an
                empty history and a note that says so.
            candidates: Item ids to rank; None for the whole catalogue, of which the
                ``config.num_retrieved`` most promising are scored (:mod:`serving.retrieval`).
            top_k: Most items to return, at least 1.
            at: The moment of the request, UTC-aware; None for now.
            context: What the request itself tells, by the names that the model was trained with.
            changes: What if the history were another.
            num_history: Most behaviours to return.
            num_contributions: Per item returned, how many of the texts that pulled it up or down.

        Raises:
            LongtrailError: If ``top_k``, ``at``, a context name or a change is not usable.
            ArtifactError: If the store lacks a feature that the model reads.
            StoreError: If the store does not answer and ``config.on_store_error`` says to fail.

        Cost: one user read and ceil(items / ``chunk_size``) calls of the model.
        """
        context = context or {}
        if top_k < 1:
            raise LongtrailError(f"top_k must be at least 1, got {top_k}")
        self._check_context(context)
        request = self._preparation.prepare(user_id, self._moment(at), changes, may_degrade=True)
        with request.stage("features"):
            items, unknown = self._preparation.candidates(request, candidates, may_degrade=True)
        with request.stage("model"):
            logits = self._logits(request, items, context)
            # By logit, not by probability: those of very sure models round to 1. The items come by
            # id and the sort is stable, so that the smaller id is first among equals.
            order = np.argsort(-logits, kind="stable")
            scored = order[~np.isnan(logits[order])]
        with request.stage("explain"):
            best = scored[:top_k]
            ranked = self._answer(
                request, items.take(best), logits[best], context, num_contributions
            )
            history = self._behaviors(request.history.newest(num_history), request.catalogue)
        dense = request.users.dense[0]
        return Ranking(
            user_id=user_id,
            known=bool(request.users.found[0]),
            model=self.manifest.run,
            at=request.at,
            history=history,
            ranked=ranked,
            unknown_items=unknown,
            num_scored=len(scored),
            notes=self._notes(request, candidates, unknown, len(logits), len(scored)),
            path=request.path,
            degraded=tuple(request.degraded),
            seconds=request.seconds,
            feature_age_s=request.history.age_s,
            missing_rate=float(np.isnan(dense).mean()) if len(dense) else None,
            # A history that might have been is nothing that was served: no log, no replay.
            served=Served(self.manifest, request.users, items, logits) if changes is None else None,
        )

    def explain(
        self,
        user_id: str,
        item_id: str,
        *,
        at: datetime | None = None,
        context: Mapping[str, float] | None = None,
        changes: HistoryChanges | None = None,
    ) -> Explanation:
        """What each text of a user's history adds to an item's score, by leaving it out.

        Raises:
            UnknownItemError: If the store does not know the item.
            StoreError: If the store does not answer.
        """
        context = context or {}
        self._check_context(context)
        request = self._preparation.prepare(user_id, self._moment(at), changes, may_degrade=False)
        items, unknown = self._preparation.candidates(request, [item_id], may_degrade=False)
        if unknown:
            raise UnknownItemError(f"the feature store does not know the item {item_id!r}")
        found = request.scorer.attribute(request.user, items.inputs, context, EXPLAINED_TEXTS)
        whole, without = _probabilities(
            np.array([found.logits[0], found.logits_without_history[0]])
        )
        (ranked,) = self._answer(request, items, found.logits, context, 0)
        return Explanation(
            user_id=user_id,
            item_id=item_id,
            text=ranked.text,
            model=self.manifest.run,
            at=request.at,
            score=whole,
            score_without_history=without,
            contributions=contributions_of(
                found, 0, len(found), self.manifest.scenes, self._behaviors_at(request)
            ),
            reason=ranked.reason,
        )

    def similar(self, item_id: str, *, top_k: int = 10) -> tuple[SimilarItem, ...]:
        """The items nearest to one in the space of the model's vectors.

        Raises:
            UnknownItemError: If the store does not know the item.
        """
        catalogue = self._items.current(self._clock())
        row = catalogue.items.row.get(item_id)
        if row is None:
            raise UnknownItemError(f"the feature store does not know the item {item_id!r}")
        rows, cosines = similar(catalogue, row, top_k)
        texts = self._catalog.texts(catalogue.items.text_ids[rows])
        return tuple(
            SimilarItem(str(near), text, min(1.0, float(cosine)))
            for near, text, cosine in zip(
                catalogue.items.item_ids[rows], texts, cosines, strict=True
            )
        )

    def _logits(
        self, request: PreparedRequest, items: ItemSnapshot, context: Mapping[str, float]
    ) -> NDArray[np.float32]:
        outputs = None
        if request.outputs is not None and items.outputs is not None:
            outputs = DeepOutputs(request.outputs, items.outputs)
        return request.scorer.logits(request.user, items.inputs, context, outputs)

    def _moment(self, at: datetime | None) -> datetime:
        if at is not None and at.tzinfo is None:
            raise LongtrailError(f"at must have a time zone, got {at.isoformat()}")
        return at or self._clock()

    def _check_context(self, context: Mapping[str, float]) -> None:
        for name in context:
            if name not in self.manifest.context_names:
                raise LongtrailError(
                    f"context has {name!r}, which run {self.manifest.run} does not read; it reads "
                    f"{', '.join(self.manifest.context_names) or 'none'}"
                )

    def _answer(
        self,
        request: PreparedRequest,
        top: ItemSnapshot,
        logits: NDArray[np.float32],
        context: Mapping[str, float],
        num_contributions: int,
    ) -> tuple[RankedItem, ...]:
        history = request.history.newest(ALIKE_BEHAVIORS)
        why = reasons(
            request.history,
            self._catalog.texts(history.behavior_ids),
            item_keys=top.inputs.candidate_item_keys,
            item_vectors=request.scorer.unit_vectors(top.text_ids),
            history_vectors=request.scorer.unit_vectors(history.behavior_ids),
            popular=top.recent_behaviors >= request.catalogue.popular_from,
            min_similarity=request.catalogue.alike_from,
        )
        ranked = tuple(
            RankedItem(item_id=str(item_id), text=text, score=score, reason=reason)
            for item_id, text, score, reason in zip(
                top.item_ids,
                self._catalog.texts(top.text_ids),
                _probabilities(logits),
                why,
                strict=True,
            )
        )
        if not num_contributions or not ranked:
            return ranked
        found = request.scorer.attribute(request.user, top.inputs, context, EXPLAINED_TEXTS)
        behaviors = self._behaviors_at(request)
        return tuple(
            replace(
                item,
                contributions=contributions_of(
                    found, place, num_contributions, self.manifest.scenes, behaviors
                ),
            )
            for place, item in enumerate(ranked)
        )

    def _behaviors(self, history: History, catalogue: Catalogue) -> tuple[Behavior, ...]:
        return history.behaviors(
            self._catalog.texts(history.behavior_ids), catalogue.ids_of_keys(history.item_keys)
        )

    def _behaviors_at(self, request: PreparedRequest) -> dict[tuple[str, int], Behavior]:
        """Scene and place in its sequence -> the behaviour."""
        history = request.history
        places = zip(history.scenes.tolist(), history.positions.tolist(), strict=True)
        return dict(zip(places, self._behaviors(history, request.catalogue), strict=True))

    def _notes(
        self,
        request: PreparedRequest,
        candidates: Sequence[str] | None,
        unknown: tuple[str, ...],
        num_items: int,
        num_scored: int,
    ) -> tuple[str, ...]:
        notes = []
        if request.degraded:
            pass  # it says why nothing is known
        elif not request.users.found[0]:
            notes.append("unknown user: ranked by the model with an empty history")
        elif not len(request.history):
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


def _probabilities(logits: NDArray[np.float32]) -> list[float]:
    probabilities: list[float] = torch.from_numpy(logits.astype(np.float64)).sigmoid().tolist()
    return probabilities
