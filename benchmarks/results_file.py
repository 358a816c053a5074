"""Where a benchmark leaves its figures: a JSON file for programs, a page beside it for people.

``benchmarks/results/<what>_<hardware>_<YYYY-MM-DD>.json`` holds ``command``, ``git_revision``,
``hardware``, ``versions``, ``date`` and the benchmark's own figures.
"""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from feature_repo.revision import git_revision

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    "duckdb",
    "feast",
    "ibis-framework",
    "numpy",
    "pandas",
    "pyarrow",
    "redis",
    "scikit-learn",
    "sentence-transformers",
    "tokenizers",
    "torch",
    "transformers",
)
"""Packages whose versions can move a figure."""
OWN_KEYS = frozenset({"command", "git_revision", "hardware", "versions", "date"})


def write_result(
    what: str, command: str, figures: dict[str, Any], *, page: str | None = None
) -> Path:
    """Write the figures of one benchmark, replacing those of the same day and hardware.

    Args:
        what: What was measured, as it shall stand in the file's name: ``encode``.
        command: How to measure it again, from the project's root; see :func:`given_command`.
        figures: The benchmark's keys and raw numbers, JSON values; units in the keys' names.
        page: Markdown that tells them to people; None = a list of all of them.

    Returns:
        The JSON file; the page for people has the same name with ``.md``.

    Raises:
        ValueError: If a figure has the name of a key that every file has.
    """
    clash = OWN_KEYS & figures.keys()
    if clash:
        raise ValueError(f"figures must not be called {sorted(clash)}: every result file has these")
    hardware = describe_hardware()
    date = datetime.now(UTC).date().isoformat()
    result = {
        "command": command,
        "git_revision": git_revision(),
        "hardware": hardware,
        "versions": package_versions(),
        "date": date,
        **figures,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{what}_{hardware['name']}_{date}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(
        _page(what, result, page or _list(figures)), encoding="utf-8"
    )
    return path


def given_command(module: str) -> str:
    """The command that runs a benchmark as this process was told to, with the options given.

    Args:
        module: Its name below ``benchmarks``.
    """
    return shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]])


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells as a Markdown table; ``|`` in them is escaped."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


def describe_hardware() -> dict[str, Any]:
    """Describe the machine; ``name`` is short, for file names, and cores are those in reach."""
    processor, flags = _processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    units = [unit for unit in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if unit in flags]
    family = next(
        (name for name in ("xeon", "epyc", "ryzen", "core", "apple") if name in processor.lower()),
        re.sub(r"[^a-z0-9]+", "-", platform.machine().lower()),
    )
    amx = "-amx" if "amx_bf16" in flags else ""
    return {
        "name": f"{cores}-core-{family}{amx}",
        "processor": processor,
        "cores": cores,
        "memory_gib": _memory_gib(),
        "units": units,
        "system": f"{platform.system()} {platform.machine()}",
    }


def package_versions() -> dict[str, str]:
    """Python's version and those of the installed packages that can move a figure."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _processor() -> tuple[str, frozenset[str]]:
    """Name and feature flags of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), frozenset()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE)
    return (
        name.group(1) if name else platform.machine(),
        frozenset(flags.group(1).split()) if flags else frozenset(),
    )


def _memory_gib() -> float | None:
    if sys.platform == "win32":
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _page(what: str, result: dict[str, Any], told: str) -> str:
    """Put what every file tells above what this one does."""
    hardware = result["hardware"]
    lines = [
        f"# {what}, {result['date']}",
        "",
        f"`{result['command']}` at revision `{result['git_revision']}`",
        "",
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB "
        f"({', '.join(hardware['units']) or 'no vector units listed'}); "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
        "",
        told,
    ]
    return "\n".join(lines) + "\n"


def _list(figures: dict[str, Any]) -> str:
    """All figures, one per line of a table."""
    return markdown_table(["Figure", "Value"], _flat(figures))


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Turn ``{"a": {"b": 1}}`` into ``[("a.b", "1")]``; plain lists stay on one line."""
    if isinstance(value, dict):
        prefix = f"{name}." if name else ""
        return [row for key, inner in value.items() for row in _flat(inner, f"{prefix}{key}")]
    if isinstance(value, list):
        if any(isinstance(inner, dict | list) for inner in value):
            return [(name, f"{len(value)} raw records in the JSON file")]
        return [(name, ", ".join(_shown(inner) for inner in value))]
    return [(name, _shown(value))]


def _shown(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
