"""Open-loop load over HTTP/1.1: a request every ``1 / rate`` seconds, whatever the server does.

Latency counts from the moment at which a request was *meant* to leave, so a server that stalls is
charged for every request that it kept waiting (no "coordinated omission"). The generator is a
process of its own, :mod:`benchmarks.load_generator`.

Source: Tene, "How NOT to Measure Latency", 2013; wrk2.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from feature_repo.home import PROJECT_ROOT

QUANTILES = {"p50": 50.0, "p90": 90.0, "p99": 99.0, "p999": 99.9, "max": 100.0}


@dataclass(frozen=True)
class LoadPlan:
    """What to send, and how an answer must look.

    Args:
        url: Address of the server, ``http://HOST:PORT``.
        path: Of every request.
        bodies: JSON documents, sent in turn by POST; at least one.
        rate: Requests per second, above 0.
        seconds: For how long, after the warm-up; above 0.
        num_ranked: Entries that an answer's ``ranked`` must have.
        answer_path: What an answer's ``path`` must be; None does not look at it.
        warm_up_s: Seconds of the same load before, which count for nothing.
        timeout_s: After which a request counts as an error, from its intended moment.
        check_every: Every how many-th answer is parsed and checked; the status always is.
        num_connections: Opened before the first request; more open as they are needed.
        max_connections: Most at a time; further requests wait, and their time counts.
    """

    url: str
    path: str
    bodies: tuple[str, ...]
    rate: float
    seconds: float
    num_ranked: int
    answer_path: str | None = None
    warm_up_s: float = 2.0
    timeout_s: float = 5.0
    check_every: int = 10
    num_connections: int = 16
    max_connections: int = 512

    def __post_init__(self) -> None:
        if not self.bodies:
            raise ValueError("bodies must hold at least one request, got none")
        for name in ("rate", "seconds", "timeout_s", "check_every", "num_connections"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        parts = urlsplit(self.url)
        if parts.scheme != "http" or not parts.hostname or not parts.port:
            raise ValueError(f"url must be of the form http://HOST:PORT, got {self.url!r}")

    @property
    def num_warm(self) -> int:
        """Requests of the warm-up."""
        return round(self.rate * self.warm_up_s)

    @property
    def num_measured(self) -> int:
        """Requests that count."""
        return max(1, round(self.rate * self.seconds))


@dataclass(frozen=True)
class LoadResult:
    """What came of a plan; times in milliseconds from the intended moment of each request."""

    rate: float
    """Requests per second that were meant."""
    achieved_rate: float
    """Good answers per second."""
    num_requests: int
    num_errors: int
    errors: dict[str, int]
    """Why -> how often."""
    num_checked: int
    """Answers that were parsed and as expected."""
    latency_ms: dict[str, float]
    """Of the good answers, by :data:`QUANTILES`; empty where there was none."""
    answer_ms: dict[str, float]
    """The same from when each request was written: what the server alone answers for, where it is
    not loaded. Says nothing about a server that is: there only ``latency_ms`` counts."""
    late_ms: float
    """99th percentile of how late the generator itself wrote a request that met a free
    connection: what of the latency is not the server's."""
    num_connections: int
    """Most that were open."""
    cpu_s: float
    """Of the generator, over the measured time."""
    seconds: float
    """From the first intended moment to the last answer."""


def run_load(plan: LoadPlan, *, meanwhile: Callable[[], None] | None = None) -> LoadResult:
    """Run a plan in a process of its own.

    Args:
        plan: The plan.
        meanwhile: Called again and again while it runs; it should take a moment and sleep.

    Raises:
        RuntimeError: If the generator failed; the text is its last words.
    """
    with tempfile.TemporaryDirectory(prefix="longtrail-load-") as folder:
        file = Path(folder) / "plan.json"
        file.write_text(json.dumps(asdict(plan)), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.load_generator", str(file)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT_ROOT
        )
        try:
            while meanwhile is not None and process.poll() is None:
                meanwhile()
            out, err = process.communicate()
        finally:
            process.kill()
    if process.returncode:
        raise RuntimeError(f"the load generator failed: {err.strip()[-2000:]}")
    return LoadResult(**json.loads(out))
