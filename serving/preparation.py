"""A request made ready for the model: user read, deep outputs found or computed, items chosen."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from encoders.inputs import UserInputs
from feature_repo.behavior import normalize
from feature_repo.errors import LongtrailError, StoreError
from feature_repo.features import OnlineReader, UserFeatures
from feature_repo.moments import micros
from serving.answers import HistoryChanges, UserPath
from serving.changes import change_history
from serving.freshness import history_key, is_current
from serving.history import History
from serving.item_cache import ItemCache
from serving.items import Catalogue, ItemSnapshot
from serving.refresh import FreshOutputs
from serving.retrieval import retrieve
from serving.scoring import Scorer

_log = logging.getLogger(__name__)

OnStoreError = Literal["answer", "fail"]


@dataclass(frozen=True)
class RankerConfig:
    """How a ranker spends time and memory."""

    chunk_size: int = 2048
    """Items in one call of the model; at least 1."""
    item_age_s: float = 300.0
    """Seconds after which the catalogue's features are read again; at least 0."""
    num_threads: int = 1
    """Threads of one call of the model; at least 1. PyTorch keeps this per process. Requests run
    side by side, so more than one pays only on idle cores: on two busy ones it took 8x as long."""
    num_retrieved: int = 500
    """Items that are scored where a request names none; at least 1."""
    on_store_error: OnStoreError = "answer"
    """Where a user cannot be read: rank for an empty history and say so, or fail."""

    def __post_init__(self) -> None:
        for name in ("chunk_size", "num_threads", "num_retrieved"):
            if getattr(self, name) < 1:
                raise LongtrailError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.item_age_s >= 0:
            raise LongtrailError(f"item_age_s must be at least 0 seconds, got {self.item_age_s}")
        if self.on_store_error not in get_args(OnStoreError):
            raise LongtrailError(
                f"on_store_error must be answer or fail, got {self.on_store_error!r}"
            )


class TextCatalog(Protocol):
    """What serving asks of the catalogue of texts."""

    @property
    def item_ids(self) -> NDArray[np.object_]:
        """Every item id."""

    def refresh(self) -> None:
        """Take in texts that have come meanwhile."""

    def texts(self, behavior_ids: NDArray[np.int64]) -> list[str]:
        """Texts of behaviour ids, empty where unknown."""

    def title(self, item_id: str) -> str | None:
        """Title of an item; None for an unknown one."""


@dataclass
class PreparedRequest:
    """A user at a moment, read and made ready for the model.

    Args:
        at: The moment, UTC.
        catalogue: As of then, with the scorer that fits it.
        users: The user as read, or as it might have been.
        user: The program's inputs of the same.
        history: The same for people.
        outputs: float32 [1, S, Q]; None where the model has no deep outputs.
        path: Where they came from.
        degraded: Why the answer will be worse than it could be; more may be added.
        seconds: Stage -> time that it took.
    """

    at: datetime
    catalogue: Catalogue
    users: UserFeatures
    user: UserInputs
    history: History
    outputs: NDArray[np.float32] | None
    path: UserPath
    degraded: list[str]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def scorer(self) -> Scorer:
        """Whose rows the catalogue's are."""
        return self.catalogue.scorer

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the time of a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Preparation:
    """Prepares requests; one instance serves many threads.

    Args:
        reader: Reads the online store.
        items: The catalogue.
        catalog: Texts.
        lowercase: Whether the data set's texts are.
        config: Of the ranker.
    """

    def __init__(
        self,
        reader: OnlineReader,
        items: ItemCache,
        catalog: TextCatalog,
        *,
        lowercase: bool,
        config: RankerConfig,
    ) -> None:
        self.write_back: Callable[[FreshOutputs], None] | None = None
        """Takes deep outputs that had to be computed, for the next request."""
        self._reader = reader
        self._items = items
        self._catalog = catalog
        self._lowercase = lowercase
        self._config = config
        self._nobody: UserFeatures | None = None

    def read_user(self, user_id: str, at: datetime) -> UserFeatures:
        """The features of one user.

        Raises:
            StoreError: If the store does not answer.
        """
        return self._reader.online_users(np.array([user_id], dtype=object), at=at)

    def read_nobody(self, at: datetime) -> None:
        """Learn what a user looks like of whom the store knows nothing, to rank without a store."""
        self._nobody = self.read_user("", at)

    def prepare(
        self, user_id: str, at: datetime, changes: HistoryChanges | None, *, may_degrade: bool
    ) -> PreparedRequest:
        """Read a user, and compute the deep outputs unless those that are kept hold.

        Raises:
            LongtrailError: If a change cannot be.
            StoreError: If the store does not answer and the answer may not be degraded.
        """
        start = time.perf_counter()
        self._catalog.refresh()
        users, degraded = self._read_or_degrade(user_id, at, may_degrade=may_degrade)
        read = time.perf_counter()
        catalogue = self._items.current(at)
        if changes is not None:
            users = change_history(
                users,
                changes,
                title=self._catalog.title,
                normalize=lambda text: normalize(text, lowercase=self._lowercase),
            )
        user = catalogue.scorer.user_side(users)
        ready = time.perf_counter()
        outputs, path = self._outputs(catalogue.scorer, users, user)
        return PreparedRequest(
            at=at,
            catalogue=catalogue,
            users=users,
            user=user,
            history=History.of(users),
            outputs=outputs,
            path=path,
            degraded=degraded,
            seconds={
                "read": read - start,
                "features": ready - read,
                "model": time.perf_counter() - ready,
            },
        )

    def candidates(
        self, request: PreparedRequest, wanted: Sequence[str] | None, *, may_degrade: bool
    ) -> tuple[ItemSnapshot, tuple[str, ...]]:
        """Return the items to score, and the wanted ones that the store does not know.

        Raises:
            StoreError: If the store does not answer and the answer may not be degraded.
        """
        known = request.catalogue.items
        if wanted is None:
            rows = retrieve(
                request.catalogue, request.history, request.outputs, self._config.num_retrieved
            )
            return known.take(rows).at_moment(request.at), ()
        distinct = list(dict.fromkeys(wanted))
        found = [known.row.get(c) for c in distinct]
        places = sorted(row for row in found if row is not None)
        cached = known.take(np.array(places, dtype=np.intp)).at_moment(request.at)
        missing = [c for c, row in zip(distinct, found, strict=True) if row is None]
        if not missing:
            return cached, ()
        # An item that came after the catalogue was read: the store may know it all the same.
        ids = np.array(missing, dtype=object)
        try:
            late = self._items.read(ids, request.at, scorer=request.scorer)
        except StoreError as error:
            if not may_degrade or self._config.on_store_error == "fail":
                raise
            _log.warning("candidates beyond the catalogue were left out: %s", error)
            request.degraded.append(
                "the feature store does not answer: candidates beyond the catalogue are left out"
            )
            return cached, ()
        unknown = tuple(c for c in missing if c not in late.row)
        return cached.merged(late), unknown

    def _read_or_degrade(
        self, user_id: str, at: datetime, *, may_degrade: bool
    ) -> tuple[UserFeatures, list[str]]:
        """The user, or nobody with the reason."""
        try:
            return self.read_user(user_id, at), []
        except StoreError as error:
            answers = may_degrade and self._config.on_store_error == "answer"
            if not answers or self._nobody is None:
                raise
            _log.warning("ranked without the user's features: %s", error)
            nobody = replace(
                self._nobody,
                user_ids=np.array([user_id], dtype=object),
                request_times=np.array([micros(at)], dtype=np.int64),
            )
            return nobody, [
                "the feature store does not answer: ranked by the model with an empty history"
            ]

    def _outputs(
        self, scorer: Scorer, users: UserFeatures, user: UserInputs
    ) -> tuple[NDArray[np.float32] | None, UserPath]:
        """The user's deep outputs [1, S, Q], and where they came from."""
        form, scenes = scorer.form, scorer.manifest.scenes
        if form is None:
            return None, "whole"
        if users.outputs is not None and is_current(users, user, scenes, form):
            return users.outputs.vectors.reshape(1, len(scenes), form.output_width), "cached"
        outputs = scorer.user_outputs(user)
        # Without kept outputs the history is one that was never read: changed, or nobody's.
        if self.write_back is not None and users.outputs is not None and users.found[0]:
            seconds = int(users.request_times[0]) // 1_000_000
            newest = max(int(s.timestamps.max()) for s in users.sequences.values())
            self.write_back(
                FreshOutputs(
                    user_id=str(users.user_ids[0]),
                    vector=outputs.ravel(),
                    history_key=history_key(users, user, scenes, form),
                    computed_at=seconds,
                    newest=newest or seconds,
                )
            )
        return outputs, "live"
