"""Memory of this process."""

import re
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """Most memory that it has held."""
    # Not getrusage where it can be helped: a child starts with the peak of whoever forked it.
    found = _of_status("VmHWM")
    if found is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """What it holds now; where the system does not say, the most it has held."""
    found = _of_status("VmRSS")
    return peak_bytes() if found is None else found


def _of_status(name: str) -> int | None:
    try:
        status = _STATUS.read_text(encoding="utf-8")
    except OSError:  # not Linux
        return None
    found = re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
