"""Which commit of the project made something: stands in artifacts and in result files."""

import subprocess

from feature_repo.home import PROJECT_ROOT


def git_revision() -> str | None:
    """The project's commit, ``+changes`` where tracked files differ; None outside a repository."""
    try:
        revision = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+changes" if changed else "")


def _git(*arguments: str) -> str:
    result = subprocess.run(
        ["git", *arguments], cwd=PROJECT_ROOT, check=True, capture_output=True, text=True
    )
    return result.stdout.strip()
