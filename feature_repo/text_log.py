"""Texts that live events brought, until an ingest takes them into the table of behaviours.

One JSON string per line, normalised; lines are only ever appended, and what is no whole line yet
does not count. A text's id is its hash, so the log needs none.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from filelock import FileLock

_LOCK_TIMEOUT_S = 30.0


class TextLog:
    """The log as one process reads it; every process that serves has its own reader.

    Args:
        path: The file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def news(self) -> list[str]:
        """The texts since the last call: one ``stat``, and nothing more where there are none."""
        try:
            size = os.stat(self._path).st_size  # noqa: PTH116  # half the time of Path.stat
        except FileNotFoundError:
            return []
        start = self._offset  # threads that come here at once read the same
        if size <= start:
            return []
        with self._path.open("rb") as file:
            file.seek(start)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset = start + len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]

    def add(self, texts: Iterable[str]) -> None:
        """Append texts, durably; several processes may at the same time.

        A text that is there already may be added again: it is one text all the same.
        """
        lines = b"".join(json.dumps(text).encode() + b"\n" for text in texts)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with (
            FileLock(f"{self._path}.lock", timeout=_LOCK_TIMEOUT_S),
            self._path.open("a+b") as file,
        ):
            # A writer that was killed may have left a part of a line.
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
