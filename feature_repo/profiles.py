"""Profiles: which stores the features live in. One yaml file each in this folder.

The checked-in files speak of the default home, ``../var``. For the stores of a home, ``longtrail``
writes the file with absolute paths into that home, and both ``longtrail`` and
``feast -f HOME/feature_store.yaml`` read it.
"""

import os
from pathlib import Path

import click
import yaml
from feast import FeatureStore

from feature_repo.connections import (
    DATABASE_URL,
    REDIS_URL,
    DatabaseAddress,
    RedisAddress,
    feast_variables,
)
from feature_repo.errors import StoreError
from feature_repo.home import DEFAULT_HOME, HOME_VARIABLE, Home, complete_file
from feature_repo.registry import open_registry
from feature_repo.services import local

REPO_FOLDER = Path(__file__).resolve().parent
PROFILES = {"embedded": "feature_store.yaml", "production": "production.yaml"}
"""Profile -> its yaml file."""
DEFAULT_PROFILE = "embedded"
_HOME_IN_YAML = "../var/"
_ADDRESS_IN_YAML = "${LONGTRAIL_"
_CONNECT_TIMEOUT = "PGCONNECT_TIMEOUT"


def profile_file(home: Home, profile: str) -> Path:
    """The profile's yaml file for ``home``; written into it where it is not there yet.

    Raises:
        StoreError: If there is no such profile.
    """
    text = profile_text(home, profile)
    path = home.root / PROFILES[profile]
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        with complete_file(path) as part:
            part.write_text(text, encoding="utf-8")
    return path


def profile_text(home: Home, profile: str) -> str:
    """The profile's yaml with absolute paths; see :func:`profile_file`."""
    if profile not in PROFILES:
        raise StoreError(f"there is no profile {profile!r}; expected {', '.join(PROFILES)}")
    template = (REPO_FOLDER / PROFILES[profile]).read_text(encoding="utf-8")
    # The default home is spelled as Feast spells it in this folder, or it would see other tables.
    root = REPO_FOLDER / _HOME_IN_YAML if home == Home(DEFAULT_HOME) else home.root
    return template.replace(_HOME_IN_YAML, f"{root}/")


def open_store(home: Home, profile: str) -> FeatureStore:
    """Feast's store of a home under a profile.

    Where the profile wants a server that has no address, a local one runs until this process ends
    (:func:`feature_repo.services.local.hold`).

    Raises:
        StoreError: If there is no such profile, an address cannot be used, or a server does not
            start.
    """
    file = profile_file(home, profile)
    if _ADDRESS_IN_YAML in profile_text(home, profile):
        os.environ.update(store_variables(home))
    store = FeatureStore(repo_path=str(REPO_FOLDER), fs_yaml_file=file)
    open_registry(store, profile)
    return store


def store_variables(home: Home, *, start: bool = True) -> dict[str, str]:
    """The variables of ``production.yaml``, secrets included, from the environment's addresses.

    Args:
        home: Whose local servers stand in for an address that is not given.
        start: Whether to start and hold them; else they must run.

    Raises:
        StoreError: If an address cannot be used, or a local server does not start or run.
    """
    database_url, redis_url = os.environ.get(DATABASE_URL), os.environ.get(REDIS_URL)
    # Before any server starts: a mistake in one address needs none.
    database = DatabaseAddress.parse(database_url) if database_url else None
    redis = RedisAddress.parse(redis_url) if redis_url else None
    missing: list[local.Kind] = []
    if database is None:
        missing.append("postgres")
    if redis is None:
        missing.append("redis")
    urls: dict[local.Kind, str] = {}
    if missing:
        urls = local.hold(home, missing) if start else local.addresses(home, missing)
    variables = feast_variables(
        database or DatabaseAddress.parse(urls["postgres"]),
        redis or RedisAddress.parse(urls["redis"]),
    )
    # Feast's configuration has no place for it; PostgreSQL's own library reads it.
    return variables | {_CONNECT_TIMEOUT: os.environ.get(_CONNECT_TIMEOUT, "10")}


def active_home() -> Home:
    """The home whose definitions Feast wants: ``repo.py`` asks while the feast command runs.

    A yaml file inside a home names that home; the checked-in one speaks of the default home.

    Raises:
        StoreError: If ``LONGTRAIL_HOME`` names a home that the checked-in file does not speak of.
    """
    active = _active_yaml()
    if active.parent != REPO_FOLDER:
        return Home(active.parent)
    home = Home.from_environment()
    if home != Home(DEFAULT_HOME):
        raise StoreError(
            f"{HOME_VARIABLE} is {home.root}, but {active.name} keeps its stores in "
            f"{DEFAULT_HOME}; run `feast -f {home.root / active.name} ...` (any longtrail command "
            "writes that file)"
        )
    return home


def active_offline_type() -> str:
    """The type of offline store that the running feast command uses."""
    configuration = yaml.safe_load(_active_yaml().read_text(encoding="utf-8"))
    return str(configuration["offline_store"]["type"])


def _active_yaml() -> Path:
    """The yaml file that the running feast command uses: its ``-f``, else its environment."""
    context = click.get_current_context(silent=True)
    root = context.find_root().obj if context else None
    chosen = root.get("FS_YAML_FILE") if isinstance(root, dict) else None
    chosen = chosen or os.environ.get("FEAST_FS_YAML_FILE_PATH")
    return Path(chosen).resolve() if chosen else REPO_FOLDER / PROFILES[DEFAULT_PROFILE]
