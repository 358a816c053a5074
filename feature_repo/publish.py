"""What a step wrote becomes visible to historical reads of the profile."""

from contextlib import AbstractContextManager
from typing import Any

from feature_repo.command import Settings
from feature_repo.progress import Progress, progress_bar

FILES_PROFILE = "embedded"
"""Its offline store is the files that the steps write: there is nothing to do."""


def publish(settings: Settings) -> dict[str, Any]:
    """Load what is new in the home into the profile's offline store.

    Every step that writes tables or features calls it last. It loads whatever is missing, so where
    it fails the next step, or the same one again, makes up for it.

    Returns:
        For the command's JSON line: ``loaded``, table -> rows; nothing in a profile over files.

    Raises:
        StoreError: If the store cannot be reached or refuses.
    """
    if settings.profile == FILES_PROFILE:
        return {}
    # Feast takes seconds to import: a profile over files does not wait for it.
    from feature_repo.postgres_load import load_tables
    from feature_repo.postgres_session import Database
    from feature_repo.profiles import open_store

    config = open_store(settings.home, settings.profile).config.offline_store
    if config.type != "postgres":
        return {}
    loaded = load_tables(settings.home, Database(config), bars=_row_bars)
    return {"loaded": {table.name: table.num_rows for table in loaded}}


def _row_bars(table: str) -> AbstractContextManager[Progress]:
    return progress_bar(f"load {table}", "rows")
