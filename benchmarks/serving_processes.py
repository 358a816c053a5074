"""The processes of the serving benchmark: how they start, what they use, how they end."""

import json
import os
import select
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import psutil

from feature_repo.home import PROJECT_ROOT, Home
from feature_repo.profiles import profile_file, store_variables
from feature_repo.services.processes import free_port

START_TIMEOUT_S = 300.0
_MIB = 2**20


@dataclass(frozen=True)
class Usage:
    """Of a process and its children so far."""

    cpu_s: float
    rss_mib: float
    """With the pages of files that are mapped, such as the embedding table."""
    own_mib: float
    """What would be free if they ended."""


def usage(pid: int) -> Usage:
    """What a process and all its children use now."""
    cpu_s = rss = own = 0.0
    parent = psutil.Process(pid)
    for process in (parent, *parent.children(recursive=True)):
        try:
            times, memory = process.cpu_times(), process.memory_full_info()
        except psutil.NoSuchProcess:
            continue
        cpu_s += times.user + times.system
        rss += memory.rss
        own += memory.uss
    return Usage(cpu_s, rss / _MIB, own / _MIB)


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    url: str
    pid: int
    also: tuple[int, ...] = ()
    """Further processes that it cannot do without."""

    def usage(self) -> Usage:
        """Of all its processes."""
        parts = [usage(pid) for pid in (self.pid, *self.also)]
        return Usage(
            sum(part.cpu_s for part in parts),
            sum(part.rss_mib for part in parts),
            sum(part.own_mib for part in parts),
        )


@contextmanager
def longtrail_server(
    home: Home, profile: str, scratch: Path, *, workers: int, options: Sequence[str] = ()
) -> Iterator[Server]:
    """`longtrail serve` on any free port.

    Args:
        home: What it serves.
        profile: From which stores.
        scratch: For its log.
        workers: Processes.
        options: Further ones of the command.
    """
    command = [
        *(sys.executable, "-m", "longtrail", "--home", str(home.root), "--profile", profile),
        *("serve", "--port", "0", "--workers", str(workers), *options),
    ]
    log = scratch / "longtrail.log"
    with log.open("wb") as errors, ending(
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=PROJECT_ROOT)
    ) as process:  # fmt: skip
        output = process.stdout
        line = b""
        if output is not None and select.select([output], [], [], START_TIMEOUT_S)[0]:
            line = output.readline()
        if not line:
            raise SystemExit(f"longtrail serve did not start:\n{_end_of(log)}")
        yield Server(json.loads(line)["url"], process.pid)


@contextmanager
def rival_server(
    home: Home, profile: str, scratch: Path, *, workers: int, keep_items: bool
) -> Iterator[Server]:
    """`feast serve` and the model server over it; see :mod:`benchmarks.rival_server`.

    Args:
        home: As for :func:`longtrail_server`.
        profile: Likewise.
        scratch: For the logs.
        workers: Processes of `feast serve`.
        keep_items: Whether the model server keeps the items.
    """
    feast_port, port = free_port(), free_port()
    feast_url, url = f"http://127.0.0.1:{feast_port}", f"http://127.0.0.1:{port}"
    feast = [
        *(str(Path(sys.executable).with_name("feast")), "-f", str(profile_file(home, profile))),
        *("serve", "--port", str(feast_port), "--workers", str(workers), "--no-access-log"),
        # By default a worker starts anew after a thousand requests.
        *("--max-requests", "1000000000"),
    ]
    model = [
        *(sys.executable, "-m", "benchmarks.rival_server", "--home", str(home.root)),
        *("--profile", profile, "--feast-url", feast_url, "--port", str(port)),
        *(["--keep-items"] if keep_items else []),
    ]
    variables = store_variables(home)
    with (
        _logged(feast, scratch / "feast.log", variables, PROJECT_ROOT / "feature_repo") as first,
        _logged(model, scratch / "rival.log", variables, PROJECT_ROOT) as second,
    ):
        _wait_for(f"{feast_url}/health", first, scratch / "feast.log")
        _wait_for(f"{url}/healthz", second, scratch / "rival.log")
        yield Server(url, second.pid, also=(first.pid,))


@contextmanager
def _logged(
    command: Sequence[str], log: Path, variables: Mapping[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, **variables, "PYTHONPATH": str(PROJECT_ROOT)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=folder
        )
        with ending(process):
            yield process


@contextmanager
def ending(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The process; it is asked to end afterwards, then made to, with its children."""
    try:
        yield process
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in psutil.wait_procs(children, timeout=1)[1]:
            child.kill()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):  # noqa: S310  # our own address
                return
        except (URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{url} does not answer:\n{_end_of(log)}") from None
            time.sleep(0.2)


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-2000:]
