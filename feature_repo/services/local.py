"""The local servers of a home: started on demand, stopped by the last command that uses them.

Every command that uses them holds a shared lock for its whole life; the kernel takes it back
however the command ends. Whoever ends and can then take the lock for itself was the last one, and
stops the servers, unless `longtrail services start` wants them to stay. For a command that is ended
by SIGKILL a small process does that (:mod:`feature_repo.services.watch`). Servers that are left all
the same, where that one was killed too, are found by the next command (its data folder says so) and
used on.
"""

import atexit
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from filelock import FileLock
from pydantic import Field

from feature_repo.errors import StoreError
from feature_repo.home import PROJECT_ROOT, Home, complete_file
from feature_repo.manifest import Document
from feature_repo.services import watch
from feature_repo.services.binaries import SYSTEM_FOLDER
from feature_repo.services.postgres import PostgresServer
from feature_repo.services.processes import as_root, free_port, port_is_free, reachable
from feature_repo.services.redis import RedisServer

logger = logging.getLogger(__name__)

Kind = Literal["postgres", "redis"]
KINDS: tuple[Kind, ...] = ("postgres", "redis")


class ServiceRecord(Document):
    """What was chosen for one server: the port at its last start, the password with its data."""

    port: int
    password: str


class ServicesRecord(Document):
    """The servers of a home; mode 600, for it holds their passwords."""

    keep: bool = False
    """Whether they stay when no command uses them."""
    servers: dict[Kind, ServiceRecord] = Field(default_factory=dict)


@dataclass(frozen=True)
class ServiceStatus:
    """One local server as it is now; ``port`` and ``pid`` are None where it does not run."""

    running: bool
    port: int | None
    pid: int | None
    folder: str
    """Of its data and log."""


@dataclass(frozen=True)
class ServicesStatus:
    """The local servers of a home."""

    postgres: ServiceStatus
    redis: ServiceStatus
    keep: bool
    """Whether they stay until `longtrail services stop`."""
    in_use: bool
    """Whether a running command uses them."""


def start(home: Home) -> ServicesStatus:
    """Start both servers where they do not run, and let them stay until :func:`stop`.

    Raises:
        StoreError: If a server does not start or there is no program for it.
    """
    with _turn(home):
        before = _load(home).keep
        _keep(home, keep=True)
        try:
            _start(home, KINDS)
        except BaseException:
            _keep(home, keep=before)
            _stop_if_unused(home)
            raise
    return status(home)


def stop(home: Home) -> ServicesStatus:
    """Stop both servers, at once or, where commands use them, when the last of these ends."""
    if _folder(home).exists():
        with _turn(home):
            _keep(home, keep=False)
            _stop_if_unused(home)
    return status(home)


def status(home: Home) -> ServicesStatus:
    """What runs; changes nothing."""
    in_use = False
    if _use_file(home).exists():
        # The turn, because who ends a use meanwhile would take this look for another use.
        with _turn(home), _use_file(home).open("rb") as file:
            in_use = not _try_lock(file.fileno())
    return ServicesStatus(
        postgres=_status(home, "postgres"),
        redis=_status(home, "redis"),
        keep=_load(home).keep,
        in_use=in_use,
    )


def hold(home: Home, kinds: Sequence[Kind] = KINDS) -> dict[Kind, str]:
    """Make sure the servers run until this process ends or calls :func:`release`.

    Until then SIGTERM and SIGHUP end the process as an exception does, so that it releases.

    Returns:
        The address of each server, with its password.

    Raises:
        StoreError: If a server does not start or there is no program for it.
    """
    with _turn(home):
        new = home not in _held
        if new:
            _held[home] = _Hold.take(home)
        try:
            _start(home, kinds)
        except BaseException:
            if new:
                _release(home)
            raise
    return addresses(home, kinds)


def addresses(home: Home, kinds: Sequence[Kind] = KINDS) -> dict[Kind, str]:
    """The address of each running server, with its password.

    Raises:
        StoreError: If one does not run.
    """
    record = _load(home)
    urls: dict[Kind, str] = {}
    for kind in kinds:
        known = record.servers.get(kind)
        if known is None or _server(home, kind, known).process() is None:
            raise StoreError(
                f"no local {kind} runs for {home.root}: run `longtrail services start` first, or "
                "set DATABASE_URL and REDIS_URL"
            )
        urls[kind] = _server(home, kind, known).url
    return urls


def release(home: Home) -> None:
    """End this process's use of the servers; the last user stops them."""
    hold_ = _held.get(home)
    if hold_ is not None and hold_.pid == os.getpid():
        with _turn(home):
            _release(home)


def stop_if_unused(home: Home) -> None:
    """Stop the servers where no command uses them and nobody wants them to stay."""
    if _folder(home).exists():
        with _turn(home):
            _stop_if_unused(home)


def release_all() -> None:
    """:func:`release` of every home."""
    for home in list(_held):
        release(home)


@dataclass(frozen=True)
class _Hold:
    """This process's shared lock."""

    file: int
    pid: int
    """The process that took it: a forked child must not end it."""
    watch: subprocess.Popen[bytes]

    @classmethod
    def take(cls, home: Home) -> "_Hold":
        watching = subprocess.Popen(
            [sys.executable, "-m", watch.__name__, str(home.root)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            cwd=PROJECT_ROOT, start_new_session=True,
        )  # fmt: skip
        file = os.open(_use_file(home), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(file, fcntl.LOCK_SH)
        if not _held:
            atexit.register(release_all)
            _end_on_signals()
        return cls(file, os.getpid(), watching)


_held: dict[Home, _Hold] = {}


def _release(home: Home) -> None:
    ended = _held.pop(home)
    os.close(ended.file)
    if not _held:
        atexit.unregister(release_all)
        _end_on_signals(undo=True)
    _stop_if_unused(home)
    ended.watch.communicate(watch.RELEASED)


def _end_on_signals(*, undo: bool = False) -> None:
    """Let the signals that end a process run its exit functions; what others set stays."""
    before, after = (_end, signal.SIG_DFL) if undo else (signal.SIG_DFL, _end)
    if threading.current_thread() is threading.main_thread():  # others may not
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is before:
                signal.signal(number, after)


def _end(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _start(home: Home, kinds: Sequence[Kind]) -> None:
    """Start the servers that do not run, on the ports of last time where these are free."""
    record = _load(home)
    for kind in kinds:
        known = record.servers.get(kind)
        if known is None:
            known = ServiceRecord(port=free_port(), password=secrets.token_urlsafe(24))
            _discard_lost(_server(home, kind, known))
        if _server(home, kind, known).process() is not None:
            continue
        if not port_is_free(known.port):
            known = known.model_copy(update={"port": free_port()})
        # Before the start: a kill in between must leave a server that can be found.
        record = record.model_copy(update={"servers": {**record.servers, kind: known}})
        _save(home, record)
        server = _server(home, kind, known)
        server.start()
        stays = "stays" if record.keep else "ends with the last command that uses it"
        logger.info(
            "local %s started on port %d (%s), data in %s", kind, known.port, stays, server.folder
        )


def _discard_lost(server: PostgresServer | RedisServer) -> None:
    """Remove data whose password went with their home; the home's files can fill them again."""
    if not server.folder.exists():
        return
    if server.folder.parent != SYSTEM_FOLDER:
        raise StoreError(
            f"the password of the data in {server.folder} is lost with services.json: remove that "
            "folder, then run this again; the features are loaded from the home's files"
        )
    logger.info("data of a removed home are discarded: %s", server.folder)
    server.stop()
    shutil.rmtree(server.folder)


def _stop_if_unused(home: Home) -> None:
    """Stop the servers if no process holds the lock and nobody wants them to stay."""
    record = _load(home)
    with _use_file(home).open("ab") as file:
        if record.keep or not _try_lock(file.fileno()):
            return
        for kind, known in record.servers.items():
            _server(home, kind, known).stop()


def _try_lock(file: int) -> bool:
    """Whether nobody shares the lock; held until the file is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _server(home: Home, kind: Kind, known: ServiceRecord) -> PostgresServer | RedisServer:
    server = PostgresServer if kind == "postgres" else RedisServer
    return server(_data_folder(home, kind), known.port, known.password)


def _status(home: Home, kind: Kind) -> ServiceStatus:
    known = _load(home).servers.get(kind)
    process = _server(home, kind, known).process() if known else None
    folder = str(_data_folder(home, kind))
    if known is None or process is None:
        return ServiceStatus(running=False, port=None, pid=None, folder=folder)
    return ServiceStatus(running=True, port=known.port, pid=process.pid, folder=folder)


def _data_folder(home: Home, kind: Kind) -> Path:
    """Where a server's data are: below the home, unless the server's account cannot get there."""
    folder = _folder(home) / kind
    if kind == "redis" or not as_root() or folder.exists() or reachable(home.root):
        return folder
    return SYSTEM_FOLDER / f"{kind}-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"


def _folder(home: Home) -> Path:
    return home.root / "services"


def _record_file(home: Home) -> Path:
    return _folder(home) / "services.json"


def _use_file(home: Home) -> Path:
    return _folder(home) / "in-use.lock"


@contextmanager
def _turn(home: Home) -> Iterator[None]:
    """One process at a time starts or stops the servers of a home."""
    folder = _folder(home)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)  # others pass it to their own folder in it, and read nothing
    with FileLock(folder / "turn.lock"):
        yield


def _load(home: Home) -> ServicesRecord:
    path = _record_file(home)
    if not path.exists():
        return ServicesRecord()
    return ServicesRecord.load(path, made_by="longtrail services start")


def _keep(home: Home, *, keep: bool) -> None:
    _save(home, _load(home).model_copy(update={"keep": keep}))


def _save(home: Home, record: ServicesRecord) -> None:
    with complete_file(_record_file(home)) as part:
        part.touch(mode=0o600)
        part.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
