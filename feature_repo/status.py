"""What is in the stores, how fresh it is, and which versions: one look, nothing is changed."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from feast import FeatureView

from feature_repo.artifact import current_run, finished_runs, load_run_manifest
from feature_repo.connections import DATABASE_URL, REDIS_URL
from feature_repo.errors import LongtrailError, StoreError
from feature_repo.home import Home
from feature_repo.live_store import LiveStore
from feature_repo.manifest import load_encoder
from feature_repo.offline import time_literal
from feature_repo.parity_series import ParityRun, parity_runs
from feature_repo.postgres_session import Database
from feature_repo.redis_lookup import RedisLine
from feature_repo.version_names import BEHAVIOR_VIEW, RUN_VIEWS

_TIMEOUT_S = 2.0
_BUILT_BY_SEQUENCES = ("user_sequences", "user_stats", "items", "item_neighbors")


@dataclass(frozen=True)
class ViewStatus:
    """A feature view.

    Args:
        version: Of its encoder or run; None where it has no versions.
        num_rows: Rows offline.
        num_keys: Keys offline.
        newest_event: Newest event time offline that can be read by now; UTC.
        age_s: How long before now that is: the freshness of the data.
        online_keys: Keys online; None where the store cannot be reached.
        copied_until: Event time up to which the last finished copy went; None where there is none.
        lag_s: How much later than that the newest event is; 0 where it is online.
        pending: Whether rows offline have changed since that copy, also late ones.
    """

    version: str | None
    num_rows: int
    num_keys: int
    newest_event: datetime | None
    age_s: float | None
    online_keys: int | None
    copied_until: datetime | None
    lag_s: float | None
    pending: bool


@dataclass(frozen=True)
class ServiceState:
    """A server of the profile.

    Args:
        up: Whether it answers.
        place: Where it is; no secrets.
        local: Whether it belongs to the home, started on demand.
        milliseconds: Until it answered.
        error: Why it does not.
    """

    up: bool
    place: str
    local: bool
    milliseconds: float | None
    error: str | None


@dataclass(frozen=True)
class Status:
    """Everything that is shown."""

    profile: str
    dataset: str
    now: datetime
    services: dict[str, ServiceState]
    views: dict[str, ViewStatus]
    encoder: dict[str, Any] | None
    """Of the last encode."""
    served: dict[str, Any] | None
    """The run that is served."""
    num_runs: int
    steps: dict[str, datetime | None]
    """Step -> when it last changed something; None where it never did."""
    parity: dict[str, Any] | None
    """The profile's last comparison."""

    @property
    def ok(self) -> bool:
        """Whether every server answers."""
        return all(service.up for service in self.services.values())


def look(home: Home, profile: str) -> Status:
    """The state of a home under a profile.

    Args:
        home: The data set.
        profile: Which stores.

    Raises:
        MissingStepError: If nothing was ingested.
        StoreError: If the registry or the offline store cannot be reached.
    """
    live = LiveStore.open(home, profile)
    services = _services(live)
    is_online = "redis" not in services or services["redis"].up
    runs = [r for r in parity_runs(home) if r.profile == profile and r.served is None]
    return Status(
        profile=profile,
        dataset=live.manifest.dataset,
        now=live.now,
        services=services,
        views={view.name: _view(live, view, is_online=is_online) for view in live.views},
        encoder=_encoder(home),
        served=_served(home),
        num_runs=len(finished_runs(home)),
        steps=_steps(live, runs),
        parity=_parity(runs[-1]) if runs else None,
    )


def _view(live: LiveStore, view: FeatureView, *, is_online: bool) -> ViewStatus:
    num_rows = num_keys = 0
    newest: datetime | None = None
    if live.parts[view.name]:
        num_rows, num_keys, newest = live.offline.ask(
            view.name,
            "SELECT count(*), count(DISTINCT {key}), "  # noqa: S608
            f"max(event_timestamp) FILTER (WHERE event_timestamp <= {time_literal(live.now)}) "
            "FROM {rows}",
        )
    state = live.copies.get(view.name)
    until = state.end if state else None
    lag = None
    if newest is not None and until is not None:
        lag = max(0.0, (newest - until).total_seconds())
    return ViewStatus(
        version=view.tags.get("encoder_fingerprint") or view.tags.get("model_version"),
        num_rows=num_rows,
        num_keys=num_keys,
        newest_event=newest,
        age_s=(live.now - newest).total_seconds() if newest is not None else None,
        online_keys=live.writer.count(view) if is_online else None,
        copied_until=until,
        lag_s=lag,
        pending=(state.parts if state else {}) != live.parts[view.name],
    )


def _services(live: LiveStore) -> dict[str, ServiceState]:
    """The servers of the profile; none where it is files alone."""
    config = live.store.config
    services = {}
    if config.offline_store.type == "postgres":
        database = Database(config.offline_store, patience_s=0)
        services["postgres"] = _ask(
            lambda: database.read(lambda session: session.execute("SELECT 1").fetchone()),
            database.place,
            DATABASE_URL,
        )
    if config.online_store.type == "redis":
        line = RedisLine(live.store, timeout_s=_TIMEOUT_S)

        def ping() -> None:
            with line.errors():
                line.client.ping()

        services["redis"] = _ask(ping, line.place, REDIS_URL)
    return services


def _ask(question: Callable[[], Any], place: str, variable: str) -> ServiceState:
    began = time.perf_counter()
    error = None
    try:
        question()
    except StoreError as away:
        error = str(away)
    milliseconds = (time.perf_counter() - began) * 1000
    return ServiceState(
        up=error is None,
        place=place,
        local=not os.environ.get(variable),
        milliseconds=None if error else round(milliseconds, 3),
        error=error,
    )


def _encoder(home: Home) -> dict[str, Any] | None:
    if not home.encoder.exists():
        return None
    encoder = load_encoder(home)
    shown = {"fingerprint", "model", "split_layer", "width"}
    return encoder.model_dump(include=shown)


def _served(home: Home) -> dict[str, Any] | None:
    if not home.current_run.exists():
        return None
    run = current_run(home)
    try:
        manifest = load_run_manifest(home, run)
    except LongtrailError as error:
        return {"run": run, "error": str(error)}
    return {
        "run": run,
        "recipe": manifest.recipe,
        "created": manifest.created,
        "encoder_fingerprint": manifest.encoder_fingerprint,
    }


def _steps(live: LiveStore, runs: Sequence[ParityRun]) -> dict[str, datetime | None]:
    """When each step last changed something."""
    home = live.home
    # A copy stamps the views, too; the services change with an apply alone.
    stamps = [service.last_updated_timestamp for service in live.store.list_feature_services()]
    applied = [stamp.replace(tzinfo=UTC) for stamp in stamps if stamp]
    return {
        "ingest": _changed([home.manifest]),
        "encode": _changed([home.encoder, *home.view(BEHAVIOR_VIEW).glob("*/*.parquet")]),
        "sequences": _changed(
            file for view in _BUILT_BY_SEQUENCES for file in home.view(view).glob("*.parquet")
        ),
        "apply": max(applied, default=None),
        "materialize": _changed([home.materialized(live.profile)]),
        "train": _changed(home.runs.glob("*/manifest.json")),
        "export": _changed(
            file for view in RUN_VIEWS for file in home.view(view).glob("*/*.parquet")
        ),
        "parity": max((run.time for run in runs), default=None),
    }


def _changed(files: Iterable[Path]) -> datetime | None:
    """The newest change of files, those that are there."""
    times = [file.stat().st_mtime for file in files if file.exists()]
    return datetime.fromtimestamp(max(times), UTC) if times else None


def _parity(run: ParityRun) -> dict[str, Any]:
    counts = run.views.values()
    return {
        "time": run.time,
        "values": sum(view.values for view in counts),
        "mismatches": sum(view.wrong for view in counts),
    }


def as_json(status: Status) -> dict[str, Any]:
    """The status as the command's JSON line."""
    return {"ok": status.ok, **asdict(status)}
