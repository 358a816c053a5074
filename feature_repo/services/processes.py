"""Server processes: which one is ours, how it stops, which port it gets.

Servers run detached and write their own pid files. A pid alone proves nothing (it may have been
given to another program since), so a process counts as ours only if it is that server, and works in
our data folder.
"""

import os
import pwd
import socket
import time
from pathlib import Path

import psutil

from feature_repo.errors import StoreError

ACCOUNT = "nobody"
"""PostgreSQL refuses to run as root: this account runs it there."""
_POLL_S = 0.02


def free_port(*, above: int = 0) -> int:
    """A free TCP port on loopback, with ``port + above`` free as well (a cluster node's bus)."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            if not above:
                return port
            try:
                second.bind(("127.0.0.1", port + above))
            except (OSError, OverflowError):
                continue
            return port


def port_is_free(port: int) -> bool:
    """Whether nothing listens on the loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def own_process(program: str, pid_file: Path, folder: Path) -> psutil.Process | None:
    """The running process that the pid file names, if it is ``program`` and works in ``folder``."""
    try:
        process = psutil.Process(int(pid_file.read_text(encoding="ascii").split()[0]))
        if process.status() == psutil.STATUS_ZOMBIE or process.name() != program:
            return None
        if not _works_in(process, folder):
            return None
    except (FileNotFoundError, IndexError, ValueError, psutil.NoSuchProcess):
        return None
    return process


def _works_in(process: psutil.Process, folder: Path) -> bool:
    """Whether it was started on ``folder``, by its arguments or its working directory."""
    # The arguments of a server of another account can be read without privileges, its directory
    # cannot; Redis overwrites its arguments.
    if str(folder) in process.cmdline():
        return True
    try:
        return Path(process.cwd()) == folder
    except psutil.AccessDenied:
        return False


def stop_process(process: psutil.Process, signal_number: int, *, timeout_s: float) -> None:
    """Send the signal and wait for the end.

    Raises:
        StoreError: If the process still runs after ``timeout_s``.
    """
    try:
        process.send_signal(signal_number)
        deadline = time.monotonic() + timeout_s
        # A zombie has ended too, even where nobody collects it (a container without init).
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                raise StoreError(
                    f"the server with pid {process.pid} did not stop within {timeout_s:.0f} s; its "
                    "log says why"
                )
            time.sleep(_POLL_S)
    except psutil.NoSuchProcess:
        return


def as_root() -> bool:
    """Whether servers must be given to another account."""
    return os.geteuid() == 0


def reachable(path: Path) -> bool:
    """Whether :data:`ACCOUNT` can pass every existing folder down to ``path``."""
    account = pwd.getpwnam(ACCOUNT)
    for folder in (path, *path.parents):
        if not folder.exists():
            continue
        status = folder.stat()
        bit = 0o100 if status.st_uid == account.pw_uid else 0o001
        if not status.st_mode & bit:
            return False
    return True
