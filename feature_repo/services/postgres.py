"""One PostgreSQL server on loopback."""

import os
import pwd
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

from feature_repo.errors import StoreError
from feature_repo.home import complete_folder
from feature_repo.services.binaries import SYSTEM_FOLDER, postgres_folder
from feature_repo.services.processes import ACCOUNT, as_root, own_process, stop_process

USER = "longtrail"
DATABASE = "longtrail"
_STOP_S = 60.0
_START_S = 600.0
"""After a kill it replays its log first."""
_SETTINGS = (
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",  # a socket's path may have 107 characters, a home folder's more
    "timezone=UTC",
    "log_timezone=UTC",
    "max_wal_size=4GB",  # else a bulk load waits for a checkpoint at every GB
)


@dataclass(frozen=True)
class PostgresServer:
    """A server and its data; the same values start it again on the same data.

    Args:
        folder: Data and log. Run by root, ``nobody`` must reach it.
        port: On loopback.
        password: Of the user ``longtrail``, who owns everything; set when the data is made.
        settings: Further ``name=value`` of postgresql.conf.
        programs: Folder of the programs; None finds those that fit the data.
    """

    folder: Path
    port: int
    password: str
    settings: tuple[str, ...] = ()
    programs: Path | None = None

    def __repr__(self) -> str:
        return f"PostgresServer({str(self.folder)!r}, port={self.port})"

    @property
    def data(self) -> Path:
        """The data folder."""
        return self.folder / "data"

    @property
    def url(self) -> str:
        """The address with its password."""
        secret = quote(self.password, safe="")
        return f"postgresql://{USER}:{secret}@127.0.0.1:{self.port}/{DATABASE}?sslmode=disable"

    def process(self) -> psutil.Process | None:
        """The running server of this data, whoever started it."""
        return own_process("postgres", self.data / "postmaster.pid", self.data)

    def start(self) -> None:
        """Start the server and wait until it answers; make its data first where there is none.

        Raises:
            StoreError: If it does not start; the sentence ends with the last line of its log.
        """
        if self.process() is not None:
            return
        programs = self.programs or postgres_folder(self._data_version())
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        if self.folder.parent == SYSTEM_FOLDER:
            SYSTEM_FOLDER.chmod(0o755)
        if as_root():
            shutil.chown(self.folder, ACCOUNT, pwd.getpwnam(ACCOUNT).pw_gid)
        if not (self.data / "PG_VERSION").exists():
            self._make_data(programs)
        # Left by a kill; the pid may belong to any other program by now, which stops a start.
        (self.data / "postmaster.pid").unlink(missing_ok=True)
        log = self.folder / "log"
        options = [f"-p {self.port}", *(f"-c {s}" for s in (*_SETTINGS, *self.settings))]
        command = [
            str(programs / "pg_ctl"), "start", "--pgdata", str(self.data), "--wait",
            "--timeout", f"{_START_S:.0f}", "--log", str(log), "--options", " ".join(options),
        ]  # fmt: skip
        # After a kill -9 the old server's children need a moment to notice and go.
        deadline = time.monotonic() + 10.0
        while (done := _run(command)).returncode:
            blocked = "shared memory block" in log.read_text("utf-8", errors="replace")[-1000:]
            if not blocked or time.monotonic() > deadline:
                raise StoreError(f"PostgreSQL did not start on {self.data}: {_last(log, done)}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End the sessions, write everything, stop; nothing where it does not run."""
        process = self.process()
        if process is not None:
            stop_process(process, signal.SIGINT, timeout_s=_STOP_S)  # its "fast" shutdown

    def _make_data(self, programs: Path) -> None:
        """Initialise the data folder with user, password and database."""
        secret = self.folder / "password"
        with complete_folder(self.data) as part:
            part.chmod(0o700)
            secret.touch(mode=0o600)
            try:
                secret.write_text(self.password, encoding="utf-8")
                if as_root():
                    for path in (part, secret):
                        shutil.chown(path, ACCOUNT, pwd.getpwnam(ACCOUNT).pw_gid)
                # Text sorts by bytes, as everywhere in this project.
                done = _run([
                    str(programs / "initdb"), "--pgdata", str(part), "--username", USER,
                    "--pwfile", str(secret), "--auth", "scram-sha-256", "--encoding", "UTF8",
                    "--no-locale",
                ])  # fmt: skip
                if not done.returncode:
                    done = _run(
                        [str(programs / "postgres"), "--single", "-D", str(part), "postgres"],
                        text_in=f"CREATE DATABASE {DATABASE}\n",
                    )
            finally:
                secret.unlink()
            if done.returncode:
                raise StoreError(f"PostgreSQL's initdb failed in {part}: {done.stderr.strip()}")

    def _data_version(self) -> int | None:
        """Major version that wrote the data; None where there is none."""
        try:
            return int((self.data / "PG_VERSION").read_text(encoding="ascii"))
        except FileNotFoundError:
            return None


def _run(command: list[str], *, text_in: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program of PostgreSQL, as :data:`ACCOUNT` where we are root."""
    options: dict[str, Any] = {}
    # Our own PGPORT, PGDATA and so on are meant for clients.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    if as_root():
        account = pwd.getpwnam(ACCOUNT)
        options = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        environment["HOME"] = "/"
    return subprocess.run(
        command, input=text_in, capture_output=True, text=True, check=False, cwd="/",
        start_new_session=True, env=environment, **options,
    )  # fmt: skip


def _last(log: Path, done: subprocess.CompletedProcess[str]) -> str:
    """Why a start failed: the log's last line, else what pg_ctl said."""
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []
    return (lines or done.stderr.splitlines() or ["no reason given"])[-1].strip()
