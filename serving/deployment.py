"""The model that serves now, and how another one takes its place without a dropped request.

Whoever answers a request asks once for the ranker and keeps it until the answer is sent, so that a
swap is one assignment: requests in flight end on the old ranker, which is gone after the last.

Where no model could be loaded yet there is no ranker: whoever asks gets a :class:`NotLoadedError`,
which is an answer as well, until the follower has loaded one.
"""

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from feature_repo.artifact import current_run
from feature_repo.errors import LongtrailError
from feature_repo.home import Home
from serving.metrics import Metrics
from serving.question import ServingRanker
from serving.shadow import Shadow

INTERVAL_S = 1.0
"""Between two looks at the file that names the current run: one stat call each."""
RETRY_S = 60.0
"""Until a run that could not be loaded is tried again: a store may have been away."""
WAITING_RETRY_S = 5.0
"""The same while no model serves at all: a try costs a second or two of one core."""

_Stamp = tuple[int, int, int]

_log = logging.getLogger(__name__)


class NotLoadedError(LongtrailError):
    """No model serves yet; the follower goes on trying."""


class Deployment:
    """Holds the ranker that serves now, and the one in its shadow.

    Args:
        ranker: Serves until another takes its place; warmed up. None where none could be loaded
            yet.
        metrics: Where what happens is counted; None for metrics of its own.
        shadow: Ranks a share of the requests as well, for comparison.
    """

    def __init__(
        self,
        ranker: ServingRanker | None,
        *,
        metrics: Metrics | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        self.metrics = metrics or Metrics()
        self.shadow = shadow
        self.problem: str | None = None
        """Why the run that should serve does not; None while it does."""
        self._ranker = ranker
        if ranker is not None:
            self.metrics.serve_model(ranker.manifest)

    @property
    def run(self) -> str | None:
        """Name of the run that serves; None while none does."""
        ranker = self._ranker
        return None if ranker is None else ranker.manifest.run

    def ranker(self) -> ServingRanker:
        """Return the ranker that serves now; keep it for the whole of a request.

        Raises:
            NotLoadedError: If none does yet; with the reason.
        """
        ranker = self._ranker
        if ranker is None:
            raise NotLoadedError(self.problem or "no model is loaded yet")
        return ranker

    def swap(self, ranker: ServingRanker) -> None:
        """Serve with another ranker, which is warmed up, from the next request on."""
        was, self._ranker = self.run, ranker
        self.problem = None
        self.metrics.serve_model(ranker.manifest)
        self.metrics.model_loads.labels("loaded").inc()
        _log.warning("run %s serves now, in place of %s", ranker.manifest.run, was or "none")

    def keep(self, run: str, reason: str) -> None:
        """Go on with the ranker that serves, or without one, because ``run`` cannot."""
        serving = self.run
        meanwhile = " yet" if serving is None else f", {serving} still is"
        self.problem = f"run {run} cannot be served{meanwhile}: {reason}"
        self.metrics.model_loads.labels("failed").inc()
        _log.error("%s", self.problem)


class HomeFollower:
    """Serves what the home says, from a thread in the background.

    That is the run that it names as current; and the same run anew when an ingest has replaced the
    tables or something was copied to the online store: items, texts and deep outputs that came.

    Args:
        home: Whose.
        profile: Whose online store is served from.
        deployment: What serves.
        open_ranker: Opens the ranker of a run.
        run: Serve this one, whatever the home names.
        interval_s: Seconds between two looks, above 0.
        retry_s: Seconds until a run that could not be loaded is tried again, above 0.
        waiting_retry_s: The same while none serves.
    """

    def __init__(
        self,
        home: Home,
        profile: str,
        deployment: Deployment,
        open_ranker: Callable[[str], ServingRanker],
        *,
        run: str | None = None,
        interval_s: float = INTERVAL_S,
        retry_s: float = RETRY_S,
        waiting_retry_s: float = WAITING_RETRY_S,
    ) -> None:
        self._home = home
        self._profile = profile
        self._run = run
        self._deployment = deployment
        self._open_ranker = open_ranker
        self._interval_s = interval_s
        self._retry_s = retry_s
        self._waiting_retry_s = waiting_retry_s
        self._looks_left = 0
        self._seen = _stamp(home.current_run)
        self._data_seen = self._data_served = self._data_stamps()
        self._has_swapped = False
        self._woken = threading.Event()
        self._is_stopped = False
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="load-run")
        self._thread = threading.Thread(target=self._follow, name="current-run", daemon=True)

    def start(self) -> None:
        """Begin to follow."""
        self._thread.start()

    def wake(self) -> None:
        """Look now, whether or not the file seems to have changed."""
        self._seen = None
        self._woken.set()

    def stop(self) -> None:
        """End the thread; a model that is being loaded is waited for."""
        self._is_stopped = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()
        self._loader.shutdown()

    def look(self) -> None:
        """Look once, and load another run if one is named."""
        if self._has_swapped:
            # One look after the swap: what the old ranker left behind in cycles goes now, and what
            # stays is never walked again.
            self._has_swapped = False
            settle_memory()
        stamp, data = _stamp(self._home.current_run), self._data_stamps()
        # A copy saves its record again and again: only what stood still for a look is loaded.
        is_outdated = data == self._data_seen and data != self._data_served
        self._data_seen = data
        self._looks_left -= 1
        if self._deployment.problem is None:
            is_due = stamp != self._seen or is_outdated
        else:
            is_due = stamp != self._seen or self._looks_left <= 0
        if not is_due:
            return
        self._seen = stamp
        try:
            run = self._run or current_run(self._home)
        except LongtrailError as error:
            self._fail("that is current", str(error))
            return
        if run == self._deployment.run and not is_outdated:
            self._deployment.problem = None
            return
        _log.info("loading run %s", run)
        loading = self._loader.submit(self._load, run)
        fault = loading.exception()
        if fault is None:
            self._data_served = data
            self._deployment.swap(loading.result())
            self._has_swapped = True
        else:
            self._fail(run, loading_fault(run, fault))

    def _load(self, run: str) -> ServingRanker:
        ranker = self._open_ranker(run)
        ranker.warm_up()
        return ranker

    def _fail(self, run: str, reason: str) -> None:
        retry_s = self._waiting_retry_s if self._deployment.run is None else self._retry_s
        self._looks_left = max(1, round(retry_s / self._interval_s))
        self._deployment.keep(run, reason)

    def _data_stamps(self) -> tuple[_Stamp | None, ...]:
        """Of the tables, and of the record of what is online."""
        return tuple(
            _stamp(path) for path in (self._home.manifest, self._home.materialized(self._profile))
        )

    def _follow(self) -> None:
        while not self._is_stopped:
            self._woken.wait(self._interval_s)
            self._woken.clear()
            if not self._is_stopped:
                self.look()


def loading_fault(run: str, fault: BaseException) -> str:
    """Why a run could not be loaded, for people; a defect goes into the log with its traceback.

    It must not keep the next run from being loaded, so it ends nothing.
    """
    if isinstance(fault, LongtrailError):
        return str(fault)
    _log.error("loading run %s failed: this is a defect", run, exc_info=fault)
    return f"unexpected {type(fault).__name__}, see the log"


def _stamp(path: Path) -> _Stamp | None:
    """What changes when a file does; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def settle_memory() -> None:
    """Free what nothing refers to, and take the rest out of the garbage collector's walks.

    A model and a catalogue are millions of objects that stay: walking them took 130 ms in the
    middle of requests.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
