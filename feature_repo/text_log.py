"""Texts that live events brought, until an ingest takes them into the table of behaviours.

One JSON string per line, normalised; what is no whole line yet does not count. Lines are appended;
only ingest takes some away, by putting another file in place, which readers then read anew. A
text's id is its hash, so the log needs none.
"""

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from feature_repo.behavior import behavior_id
from feature_repo.home import complete_file

_LOCK_TIMEOUT_S = 30.0
_BLOCK_BYTES = 4096


class TextLog:
    """The log as one process reads it; every process that serves has its own reader.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = (0, 0)  # inode, and bytes of it; one value, so that threads agree

    def news(self) -> list[str]:
        """The texts since the last call: one ``stat``, and nothing more where there are none."""
        try:
            status = os.stat(self._path)  # noqa: PTH116  # half the time of Path.stat
        except FileNotFoundError:
            return []
        inode, start = self._read  # threads that come here at once read the same
        if status.st_ino == inode and status.st_size == start:
            return []
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != inode or status.st_size < start:  # an ingest shortened the log
                start = 0
            file.seek(start)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read = (status.st_ino, start + len(whole) + len(newline))
        return [json.loads(line) for line in whole.splitlines()]

    def add(self, texts: Iterable[str]) -> None:
        """Append texts, durably; several processes may at the same time.

        A text that is there already may be added again: it is one text all the same.
        """
        lines = b"".join(json.dumps(text).encode() + b"\n" for text in texts)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._only_change(), self._path.open("a+b") as file:
            file.truncate(_end_of_lines(file))  # a writer that was killed may have left a part
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())

    def forget(self, behavior_ids: Collection[int]) -> None:
        """Take away the texts with one of these ids: the table of behaviours has them."""
        if not self._path.exists():
            return
        with self._only_change():
            texts = dict.fromkeys(TextLog(self._path).news())
            kept = [text for text in texts if behavior_id(text) not in behavior_ids]
            if len(kept) == len(texts):
                return
            with complete_file(self._path) as part, part.open("wb") as file:
                file.writelines(json.dumps(text).encode() + b"\n" for text in kept)
                file.flush()
                os.fsync(file.fileno())

    def _only_change(self) -> FileLock:
        return FileLock(f"{self._path}.lock", timeout=_LOCK_TIMEOUT_S)


def _end_of_lines(file: BinaryIO) -> int:
    """Bytes up to and with the last line break, looked for from the end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(end - _BLOCK_BYTES, 0)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0
