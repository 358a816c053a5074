"""From a home and a few options to an application that answers: everything opened, in order.

A mistake ends the start with its sentence. What may pass by itself does not: while a server of the
feature store is away the application answers all the same, that it cannot rank yet and why, and
loads the model when it can. One that takes the place of an application that has answered does so
whatever the reason: callers wait for it on a socket that stays open.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

from feature_repo.artifact import current_run
from feature_repo.errors import LongtrailError, StoreAwayError
from feature_repo.features import OnlineReader
from feature_repo.home import Home
from feature_repo.services import local
from serving.app import AppSettings, create_app
from serving.breaker import FAIL_MAX, RESET_S, SLOW_S, BreakerReader
from serving.deployment import Deployment, HomeFollower, loading_fault
from serving.directory import HomeDirectory
from serving.event_service import FollowingEvents
from serving.metrics import Metrics, Rising
from serving.preparation import RankerConfig
from serving.ranker import Ranker
from serving.served_log import ServedLog
from serving.server import OpenedApp
from serving.shadow import Shadow

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BreakerOptions:
    """When the online store is left alone for a while."""

    fail_max: int = FAIL_MAX
    """Failures in a row, at least 1."""
    reset_s: float = RESET_S
    """Seconds, above 0."""
    slow_s: float = SLOW_S
    """Seconds of an answer that counts as a failure, above 0."""


@dataclass(frozen=True)
class ServiceOptions:
    """What is served, and how."""

    run: str | None = None
    """Name of the run; None follows the one that is current."""
    shadow_run: str | None = None
    """Name of the run that ranks in the shadow."""
    shadow_share: float = 0.1
    """Part of the rankings that it repeats, in (0, 1]."""
    served_share: float = 0.0
    """Part of the rankings whose features are logged, in [0, 1]."""
    takes_events: bool = True
    """Whether live events are taken; they need the encoder in memory."""
    ranker: RankerConfig = field(default_factory=RankerConfig)
    breaker: BreakerOptions = field(default_factory=BreakerOptions)
    app: AppSettings = field(default_factory=AppSettings)


def open_service(
    home: Home,
    profile: str,
    options: ServiceOptions,
    is_replacement: bool = False,
    *,
    metrics_folder: Path | None = None,
) -> OpenedApp:
    """Open everything that answers requests.

    Args:
        home: Whose data and runs.
        profile: Whose stores.
        options: What is served, and how.
        is_replacement: Whether it takes the place of one that has answered: what cannot be loaded
            is then loaded later, whatever the reason.
        metrics_folder: Where the workers of one service keep their metrics; None for one process.

    Raises:
        LongtrailError: If something is missing or does not fit; a store that is away is waited for.
    """
    with ExitStack() as stack:
        metrics = Metrics(metrics_folder)
        breakers = _Breakers(options.breaker, metrics)
        stack.callback(local.release_all)

        def open_ranker(run: str) -> Ranker:
            return Ranker.open(
                home, profile, run, config=options.ranker, guard=breakers.around_reader
            )

        def open_warm(run: str) -> Ranker:
            ranker = open_ranker(run)
            ranker.warm_up()
            return ranker

        def open_shadow(run: str) -> Shadow:
            return Shadow(open_warm(run), share=options.shadow_share, metrics=metrics)

        def open_late(run: str) -> Ranker:
            """What the follower loads; the first model brings the shadow that is still missing."""
            ranker = open_ranker(run)
            if deployment.shadow is None and options.shadow_run is not None:
                try:
                    deployment.shadow = open_shadow(options.shadow_run)
                except LongtrailError as error:  # the model itself is worth more
                    _log.error("nothing ranks in the shadow: %s", error)
            return ranker

        samplers: list[Callable[[], None]] = [breakers.sample]
        run = options.run or ""
        ranker = shadow = problem = None
        try:
            run = run or current_run(home)
            ranker = open_warm(run)
            if options.shadow_run is not None:
                shadow = open_shadow(options.shadow_run)
        except Exception as error:
            if not (is_replacement or isinstance(error, StoreAwayError)):
                raise
            ranker, problem = None, loading_fault(run, error)
        deployment = Deployment(ranker, metrics=metrics, shadow=shadow)
        if problem is not None:
            deployment.keep(run or "that is current", problem)
        stack.callback(_close_shadow, deployment)

        refresh: list[Callable[[], None]] = []
        follower = HomeFollower(home, profile, deployment, open_late, run=options.run)
        follower.start()
        stack.callback(follower.stop)
        refresh.append(follower.wake)
        if options.app.keys is not None:
            refresh.append(options.app.keys.reload)

        served_log = None
        if options.served_share > 0:
            served_log = ServedLog(home.served, share=options.served_share)
            stack.callback(served_log.close)
            samplers.append(_served_sampler(served_log, metrics))

        events = None
        if options.takes_events:
            events = _open_events(home, profile, deployment)
        if events is not None:
            stack.callback(events.close)

        app = create_app(
            deployment,
            directory=HomeDirectory(home),
            events=events,
            served_log=served_log,
            settings=options.app,
            samplers=samplers,
        )
        close = stack.pop_all().close
    return OpenedApp(app, run, partial(look_again, refresh), close)


def _open_events(home: Home, profile: str, deployment: Deployment) -> FollowingEvents | None:
    """What takes live events; None, with a line in the log, where the data set can have none."""
    try:
        return FollowingEvents(home, profile, lambda: deployment.ranker().manifest)
    except LongtrailError as error:
        _log.warning("no live events are taken: %s", error)
        return None


def _close_shadow(deployment: Deployment) -> None:
    if deployment.shadow is not None:
        deployment.shadow.close()


def look_again(work: Sequence[Callable[[], None]]) -> None:
    """Look for what changed; what cannot be read stays as it was, with a line in the log."""
    for one in work:
        try:
            one()
        except LongtrailError as error:
            _log.error("%s", error)


class _Breakers:
    """Around the readers of all rankers, for as long as those live; metrics tell of them all."""

    def __init__(self, options: BreakerOptions, metrics: Metrics) -> None:
        self._options = options
        self._open = metrics.store_open
        self._failures = metrics.store_failures
        self._lock = threading.Lock()
        self._counted: WeakKeyDictionary[BreakerReader, int] = WeakKeyDictionary()

    def around_reader(self, reader: OnlineReader) -> BreakerReader:
        """Put one around a reader."""
        breaker = BreakerReader(reader, **asdict(self._options))
        with self._lock:  # a run is loaded in another thread than the one that samples
            self._counted[breaker] = 0
        return breaker

    def sample(self) -> None:
        """Bring the metrics up to date."""
        with self._lock:
            self._open.set(any(breaker.state != "closed" for breaker in self._counted))
            for breaker, before in list(self._counted.items()):
                self._counted[breaker] = breaker.num_failures
                self._failures.inc(self._counted[breaker] - before)


def _served_sampler(served_log: ServedLog, metrics: Metrics) -> Callable[[], None]:
    written = Rising(metrics.served_log.labels("written"))
    dropped = Rising(metrics.served_log.labels("dropped"))

    def sample() -> None:
        written.to(served_log.num_written)
        dropped.to(served_log.num_dropped)

    return sample
