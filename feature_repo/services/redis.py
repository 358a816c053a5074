"""One Redis server on loopback."""

import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psutil

from feature_repo.errors import StoreError
from feature_repo.home import complete_file
from feature_repo.services.binaries import redis_binary
from feature_repo.services.processes import own_process, stop_process

_START_S = 600.0
"""It reads its data first, about 1 GB in 10 s."""
_STOP_S = 60.0


@dataclass(frozen=True)
class RedisServer:
    """A server and its data; the same values start it again on the same data.

    Args:
        folder: Data, configuration (mode 600, it holds the password) and log.
        port: On loopback.
        password: Empty needs none.
        settings: Further lines of redis.conf.
    """

    folder: Path
    port: int
    password: str
    settings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"RedisServer({str(self.folder)!r}, port={self.port})"

    @property
    def url(self) -> str:
        """The address with its password."""
        secret = f":{quote(self.password, safe='')}@" if self.password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    @property
    def connection_string(self) -> str:
        """The address as Feast spells it."""
        secret = f",password={self.password}" if self.password else ""
        return f"127.0.0.1:{self.port}{secret}"

    def process(self) -> psutil.Process | None:
        """The running server of this data, whoever started it."""
        return own_process("redis-server", self.folder / "redis.pid", self.folder)

    def start(self) -> None:
        """Start the server and wait until it has read its data and answers.

        Raises:
            StoreError: If it does not start; the sentence ends with the last line of its log.
        """
        if self.process() is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        (self.folder / "redis.pid").unlink(missing_ok=True)
        lines = [
            "bind 127.0.0.1",
            f"port {self.port}",
            f"dir {_quoted(self.folder)}",
            f"pidfile {_quoted(self.folder / 'redis.pid')}",
            f"logfile {_quoted(self.folder / 'log')}",
            "daemonize yes",
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            *([f"requirepass {_quoted(self.password)}"] if self.password else []),
            *self.settings,
        ]
        configuration = self.folder / "redis.conf"
        with complete_file(configuration) as part:
            part.touch(mode=0o600)
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
        done = subprocess.run(
            [redis_binary(), configuration],
            capture_output=True, text=True, check=False, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + _START_S
        grace = time.monotonic() + 2.0
        # A foreign server may answer on this port: ours must run too.
        while not (running := self.process() is not None) or not self._answers():
            now = time.monotonic()
            if done.returncode or (not running and now > grace) or now > deadline:
                raise StoreError(f"Redis did not start on {self.folder}: {self._last_line(done)}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Write everything and stop; nothing where it does not run."""
        process = self.process()
        if process is not None:
            stop_process(process, signal.SIGTERM, timeout_s=_STOP_S)

    def _answers(self) -> bool:
        """Whether it has read its data and accepts commands."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                secret = self.password.encode()
                login = b"*2\r\n$4\r\nAUTH\r\n$%d\r\n%s\r\n" % (len(secret), secret)
                connection.sendall((login if secret else b"") + b"PING\r\nQUIT\r\n")
                said = b""
                while chunk := connection.recv(4096):
                    said += chunk
        except OSError:
            return False
        return b"+PONG" in said

    def _last_line(self, done: subprocess.CompletedProcess[str]) -> str:
        """Why a start failed: what the program said last, else the log's last line."""
        log = self.folder / "log"
        lines = log.read_text("utf-8", errors="replace").splitlines() if log.exists() else []
        said = [*lines, *done.stdout.splitlines(), *done.stderr.splitlines()]
        return (said or ["no reason given"])[-1].strip()


def _quoted(value: str | Path) -> str:
    """A word of redis.conf."""
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
