"""A disk that is full for a while: a small tmpfs with a ballast.

Where this process may not mount one, a file's size is limited instead, or no file can be made:
writes meet the same kind of error.
"""

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from feature_repo.services.postgres import PostgresServer
from feature_repo.services.redis import RedisServer
from tests.faults.commands import Done
from tests.faults.world import Stage
from tests.servers import scratch_folder


@dataclass(frozen=True)
class SmallDisk:
    """A folder whose disk can be filled."""

    folder: Path
    mounted: bool

    def run(self, stage: Stage, arguments: list[str], *, room: int) -> Done:
        """Run a command with room for so many bytes."""
        if not self.mounted:
            return stage.run(arguments, file_size=room)
        with self._ballast(room):
            return stage.run(arguments)

    @contextlib.contextmanager
    def full(self, server: PostgresServer | RedisServer, room: int = 0) -> Iterator[None]:
        """Room for so many bytes more of a running server, whose data are here."""
        if self.mounted:
            with self._ballast(room):
                yield
        elif isinstance(server, PostgresServer):
            with _no_new_files(server):
                yield
        else:
            with _no_longer_files(server):
                yield

    @contextlib.contextmanager
    def _ballast(self, room: int) -> Iterator[None]:
        ballast = self.folder / "ballast"
        try:
            # A server writes meanwhile: the last of the room may be its own.
            with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                left = shutil.disk_usage(self.folder).free - room
                while left > 0:
                    left -= file.write(bytes(min(left, 1 << 20)))
            yield
        finally:
            ballast.unlink()


@contextlib.contextmanager
def _no_new_files(server: PostgresServer) -> Iterator[None]:
    """Its account, which is never root, may not make files where its tables are."""
    folders = [path for path in (server.data / "base").iterdir() if path.is_dir()]
    for folder in folders:
        folder.chmod(0o500)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(0o700)


@contextlib.contextmanager
def _no_longer_files(server: RedisServer) -> Iterator[None]:
    """The system ends it when it writes."""
    process = server.process()
    assert process is not None
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    yield
    if process.is_running():
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[SmallDisk]:
    """A new disk of so many bytes, gone at the end."""
    folder = scratch_folder()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=711", "tmpfs", str(folder)]
    mounted = not subprocess.run(mount, capture_output=True, check=False).returncode
    try:
        yield SmallDisk(folder, mounted)
    finally:
        if mounted:
            # A killed server's threads, or its child that saves, may hold it a moment longer.
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        shutil.rmtree(folder)
