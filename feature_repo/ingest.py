"""Raw logs to canonical tables: events, items, impressions and the distinct behaviour texts.

The tables are replaced as a whole or not at all. Rows that cannot be used are kept in
``rejected.parquet`` with the reason; too many of them stop the ingest before anything changes.
"""

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from feature_repo.behavior import hash63
from feature_repo.dataset import LoadedDataSet, Negatives
from feature_repo.errors import DataSetError
from feature_repo.feature_files import file_fingerprint
from feature_repo.home import Home, complete_folder, tidy_folder
from feature_repo.item_stats import fields as item_fields
from feature_repo.live_events import LiveSource
from feature_repo.manifest import DataManifest, ItemColumn, Split
from feature_repo.negatives import SplitBounds, sample_extra, sample_impressions
from feature_repo.progress import Progress, silent
from feature_repo.text_log import TextLog
from feature_repo.validate import (
    LoadedQuery,
    check_events,
    check_impressions,
    check_items,
    is_numeric,
    map_keys,
    map_texts,
    run_query,
)

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised whenever the canonical tables change for the same input."""
EVENTS_PER_BUCKET = 250_000
"""One bucket's events, sequences and window frames fit well below 1 GiB at N = 100."""
EVENT_GROUP_SIZE = 16_384
"""Events that are read for those of one user (:mod:`feature_repo.push`)."""
_STEPS = 8
_SAMPLED = (
    "* REPLACE (make_timestamp(event_timestamp) AT TIME ZONE 'UTC' AS event_timestamp) FROM sampled"
)
"""The rows of :mod:`feature_repo.negatives`, registered as ``sampled``, as the table has them."""


@dataclass(frozen=True)
class IngestSummary:
    """What ingest found.

    Args:
        manifest: The tables; with ``dry_run`` what they would be.
        changed: False where the tables were already those of the same files.
        rejected: Query -> reason -> rows.
        notes: Sentences that a user should know.
        samples: Query -> first rows, for ``--dry-run``.
    """

    manifest: DataManifest
    changed: bool
    rejected: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def ingest(
    home: Home,
    dataset: LoadedDataSet,
    *,
    live: LiveSource | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
) -> IngestSummary:
    """Build the canonical tables of a data set in ``home``.

    Nothing is done where the data set file, the files that it reads and the live events are those
    of the last run.

    Args:
        home: Where the tables are written.
        dataset: What is read.
        live: Events that the service took; those that the files hold as well count once.
        dry_run: Look, and write nothing.
        progress: Receives steps.

    Raises:
        DataSetError: If a query fails or too many rows are rejected; the old tables stay.
        LongtrailError: If another ingest into the same home is running.
    """
    # Before anything is read: what is written meanwhile is of the next run.
    fingerprint = source_fingerprint(dataset, live)
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            return _Ingest(dataset, live, fingerprint, Path(folder), progress).run(None)
    with home.lock("tables"):
        scratch = home.root / "ingest.part"
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        tidy_folder(home.tables)
        if home.manifest.exists():
            manifest = DataManifest.load(home.manifest, made_by="longtrail ingest")
            if manifest.source_fingerprint == fingerprint:
                return IngestSummary(manifest, changed=False)
        scratch.mkdir()
        try:
            with complete_folder(home.tables) as folder:
                summary = _Ingest(dataset, live, fingerprint, scratch, progress).run(folder)
            if home.live_texts.exists():
                ids = pq.read_table(home.behaviors, columns=["behavior_id"])["behavior_id"]
                TextLog(home.live_texts).forget(set(ids.to_pylist()))
            return summary
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def source_fingerprint(dataset: LoadedDataSet, live: LiveSource | None = None) -> str:
    """Hash of the data set's content, of its files' bytes, and of live events.

    Where files lie and when they were written does not count: runs that were trained on the same
    data are of the same data. What is missing does not count either: the query that reads it says
    so.

    Raises:
        DataSetError: If a file cannot be read.
    """
    queries = [dataset.content.events.sql, dataset.content.items.sql]
    if dataset.content.impressions and dataset.content.impressions.sql:
        queries.append(dataset.content.impressions.sql)
    named = dict.fromkeys(path for sql in queries for path in dataset.files(sql))
    try:
        files = [file_fingerprint(file) for path in named for file in _files_at(path)]
    except OSError as error:
        raise DataSetError(
            f"{error.filename} cannot be read ({error.strerror}): the data set file names it"
        ) from error
    content = [FORMAT, dataset.content.model_dump(mode="json"), files]
    if live is not None:
        content.append(live.sequence)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _files_at(path: Path) -> list[Path]:
    """The file, or all below the folder: some tables are folders."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.exists() else []


class _Ingest:
    """One run: a scratch database, filled step by step, then written out."""

    def __init__(
        self,
        dataset: LoadedDataSet,
        live: LiveSource | None,
        fingerprint: str,
        scratch: Path,
        progress: Progress,
    ) -> None:
        self.dataset = dataset
        self.live = live
        self.fingerprint = fingerprint
        self.options = dataset.content
        self.progress = progress
        self.notes: list[str] = []
        self.connection = duckdb.connect(str(scratch / "ingest.duckdb"))
        if live is not None:
            self.connection.register("raw_live", live.events)
        self.connection.execute("SET TimeZone = 'UTC'")
        self.connection.execute("SET enable_progress_bar = false")
        self.connection.execute("SET memory_limit = '4GB'")
        self.connection.execute(f"SET temp_directory = '{scratch / 'spill'}'")

    def run(self, folder: Path | None) -> IngestSummary:
        with self.connection:
            events = self._load("events", self.options.events.sql)
            items = self._load("items", self.options.items.sql)
            impressions = self._load_impressions()
            sources = ["raw_events", "raw_items"]
            if self.live is not None:
                sources.append("raw_live")
            map_texts(self.connection, sources, self.dataset)
            self._step()
            check_events(self.connection, events)
            check_items(self.connection, items)
            if impressions is not None:
                check_impressions(self.connection, impressions)
            self._step()
            loaded = [q for q in (events, items, impressions) if q is not None]
            rejected = {query.name: self._rejected(query) for query in loaded}
            self._keep_accepted(loaded)
            self._add_live()
            kind = self._make_impressions(impressions)
            self._step()
            manifest = self._manifest(items, impressions, kind, sum(map(_total, rejected.values())))
            samples = {
                name: self._records(f'SELECT * EXCLUDE ("row") FROM {name} LIMIT 3')
                for name in ("events", "items", "impressions")
            }
            if folder is not None:
                self._write(folder, manifest, loaded)
            self._step()
            return IngestSummary(manifest, True, rejected, tuple(self.notes), samples)

    def _step(self) -> None:
        self.progress(1, _STEPS)

    def _load(self, name: str, sql: str) -> LoadedQuery:
        query = run_query(self.connection, self.dataset, name, sql)
        if query.naive_times:
            self.notes.append(
                f"[{name}] {', '.join(query.naive_times)} has no time zone; it is taken as UTC"
            )
        self._step()
        return query

    def _load_impressions(self) -> LoadedQuery | None:
        """The logged impressions, or None where negatives are to be sampled instead."""
        options = self.options.impressions
        if options is None or options.sql is None:
            self._step()
            return None
        missing = [f for f in self.dataset.files(options.sql) if not f.exists()]
        if missing and options.negatives is not None:
            self.notes.append(
                f"{missing[0].name} is not in {self.dataset.data_dir}; impressions are sampled"
            )
            self._step()
            return None
        return self._load("impressions", options.sql)

    def _rejected(self, query: LoadedQuery) -> dict[str, int]:
        """Rows per reason.

        Raises:
            DataSetError: If they are more than the threshold allows.
        """
        counts = dict(
            self.connection.execute(
                f"SELECT reason, count(*) FROM checked_{query.name} WHERE reason IS NOT NULL "
                "GROUP BY reason ORDER BY count(*) DESC, reason"
            ).fetchall()
        )
        total = _total(counts)
        if total == query.num_rows or total > self.options.reject_threshold * query.num_rows:
            (example,) = self._records(
                f"SELECT * EXCLUDE (reason) FROM checked_{query.name} WHERE reason IS NOT NULL "
                'ORDER BY "row" LIMIT 1'
            )
            reasons = "; ".join(f"{reason}: {number:,}" for reason, number in counts.items())
            raise DataSetError(
                f"{self.dataset.path.name}: {total:,} of {query.num_rows:,} rows of [{query.name}] "
                f"cannot be used, more than reject_threshold = {self.options.reject_threshold:g} "
                f"allows ({reasons}; first: {_short(example)}); clean them in the SQL or raise the "
                "threshold; nothing was changed"
            )
        return counts

    def _keep_accepted(self, loaded: Sequence[LoadedQuery]) -> None:
        self.connection.execute(
            "CREATE OR REPLACE TABLE events AS SELECT * EXCLUDE (reason) FROM checked_events "
            "WHERE reason IS NULL"
        )
        self.connection.execute(
            "CREATE OR REPLACE TABLE items AS SELECT * EXCLUDE (reason) FROM checked_items "
            "WHERE reason IS NULL"
        )
        if any(query.name == "impressions" for query in loaded):
            bounds = self._bounds()
            self.connection.execute(
                f"""CREATE OR REPLACE TABLE impressions AS SELECT * EXCLUDE (reason) REPLACE (
                coalesce(split, CASE WHEN epoch_us(event_timestamp) >= {bounds.test} THEN 'test'
                WHEN epoch_us(event_timestamp) >= {bounds.valid} THEN 'valid'
                WHEN epoch_us(event_timestamp) >= {bounds.train} THEN 'train'
                END) AS split) FROM checked_impressions WHERE reason IS NULL"""
            )

    def _add_live(self) -> None:
        """Append the live events that are no event of the files."""
        if self.live is None:
            return
        before = self._number("SELECT count(*) FROM events")
        self.connection.execute("""
            INSERT INTO events BY NAME
            SELECT row_number() OVER () + (SELECT coalesce(max("row"), 0) FROM events) AS "row", l.*
            FROM (
                SELECT DISTINCT l.user_id, l.event_timestamp, l.scene, t.text, t.behavior_id,
                    l.item_id
                FROM raw_live l JOIN texts t ON t.raw = l.text WHERE t.reason IS NULL
            ) l WHERE NOT EXISTS (
                SELECT 1 FROM events e WHERE e.user_id = l.user_id
                AND e.event_timestamp = l.event_timestamp AND e.scene = l.scene
                AND e.behavior_id = l.behavior_id AND e.item_id IS NOT DISTINCT FROM l.item_id
            )
        """)
        added = self._number("SELECT count(*) FROM events") - before
        self.notes.append(
            f"{added:,} of {self.live.events.num_rows:,} live events were added to those of the "
            "files"
        )

    def _bounds(self) -> SplitBounds:
        split = self.options.split
        return SplitBounds(
            train=_micros(split.train) if split.train else 0,
            valid=_micros(split.valid),
            test=_micros(split.test),
        )

    def _make_impressions(self, logged: LoadedQuery | None) -> Literal["logged", "sampled", "none"]:
        """Make sure that the table ``impressions`` exists."""
        options = self.options.impressions
        if logged is not None:
            self._check_split()
            assert options is not None
            if options.negatives is not None and options.negatives.extra_train:
                self._add_extra(self._positives(options.negatives), options.negatives)
            return "logged" if options.logged else "sampled"
        if options is None or options.negatives is None:
            self.connection.execute(
                'CREATE OR REPLACE TABLE impressions ("row" BIGINT, request_id VARCHAR, '
                "user_id VARCHAR, item_id VARCHAR, event_timestamp TIMESTAMPTZ, clicked TINYINT, "
                "split VARCHAR)"
            )
            return "none"
        positives = self._positives(options.negatives)
        sampled = sample_impressions(positives, options.negatives, self._bounds())
        with self._registered(sampled):
            self.connection.execute(
                'CREATE OR REPLACE TABLE impressions AS SELECT row_number() OVER () AS "row", '
                + _SAMPLED
            )
        if options.negatives.extra_train:
            self._add_extra(positives, options.negatives)
        return "sampled"

    def _positives(self, options: Negatives) -> pd.DataFrame:
        """The events from which requests are made."""
        positives = self.connection.execute(
            "SELECT DISTINCT user_id, item_id, epoch_us(event_timestamp) AS event_timestamp "
            "FROM events WHERE scene = ? AND item_id IN (SELECT item_id FROM items)",
            [options.scene],
        ).df()
        if positives.empty:
            raise DataSetError(
                f"[impressions.negatives] scene {options.scene!r} has no event that "
                "names an item of [items]; expected the scene whose items were chosen"
            )
        return positives

    def _add_extra(self, positives: pd.DataFrame, options: Negatives) -> None:
        """Append the requests of the train split's other positives."""
        covered = self.connection.execute(
            "SELECT user_id, item_id, epoch_us(event_timestamp) AS event_timestamp "
            "FROM impressions WHERE clicked = 1"
        ).df()
        extra = sample_extra(positives, options, self._bounds(), covered)
        with self._registered(extra):
            self.connection.execute(
                "INSERT INTO impressions BY NAME SELECT row_number() OVER () + "
                f'(SELECT coalesce(max("row"), 0) FROM impressions) AS "row", {_SAMPLED}'
            )

    @contextmanager
    def _registered(self, sampled: pd.DataFrame) -> Iterator[None]:
        """Sampled impressions as the table ``sampled``."""
        self.connection.register("sampled", pa.Table.from_pandas(sampled, preserve_index=False))
        try:
            yield
        finally:
            self.connection.unregister("sampled")

    def _check_split(self) -> None:
        """A split that the impressions bring themselves must be by time."""
        rows = self.connection.execute(
            "SELECT split, min(event_timestamp), max(event_timestamp) FROM impressions "
            "WHERE split IS NOT NULL GROUP BY split"
        ).fetchall()
        spans = {split: (low, high) for split, low, high in rows}
        for name in ("train", "valid", "test"):
            if name not in spans:
                raise DataSetError(
                    f"[impressions] has no row of the {name} split; check the dates in [split]"
                )
        for before, after in (("train", "valid"), ("valid", "test")):
            if spans[before][1] >= spans[after][0]:
                raise DataSetError(
                    f"[impressions] split is not by time: {before} reaches {spans[before][1]}, "
                    f"{after} begins at {spans[after][0]}; leave the column out to split by [split]"
                )

    def _manifest(
        self,
        items: LoadedQuery,
        impressions: LoadedQuery | None,
        kind: Literal["logged", "sampled", "none"],
        num_rejected: int,
    ) -> DataManifest:
        options = self.options
        one = self._records(
            "SELECT count(*) AS events, count(DISTINCT user_id) AS users, "
            "min(event_timestamp) AS first, max(event_timestamp) AS last FROM events"
        )[0]
        scenes = self.connection.execute("SELECT DISTINCT scene FROM events ORDER BY 1").fetchall()
        self._behaviors()
        negatives = None
        if kind == "sampled":
            drawn = options.impressions.negatives if options.impressions else None
            negatives = (
                "as the impressions file has them"
                if impressions is not None or drawn is None
                else f"{drawn.per_positive} per {drawn.scene}, drawn from the {drawn.scene} events "
                f"of the {drawn.window_days} days before, never from the same basket"
            )
        manifest = DataManifest(
            dataset=options.name,
            scenes=tuple(scene for (scene,) in scenes),
            item_columns=tuple(
                ItemColumn(name=n, kind="numeric" if is_numeric(kind_) else "categorical")
                for n, kind_ in items.others.items()
            ),
            context_columns=tuple(impressions.others) if impressions else (),
            impressions=kind,
            negatives=negatives,
            split=Split(
                train=options.split.train, valid=options.split.valid, test=options.split.test
            ),
            replay=options.replay,
            lowercase=options.lowercase,
            sequence_length=options.sequence_length,
            availability_delay_us=round(options.availability_delay_s * 1e6),
            label_delay_us=round(options.label_delay_s * 1e6),
            num_events=one["events"],
            num_users=one["users"],
            num_items=self._number("SELECT count(DISTINCT item_id) FROM items"),
            num_behaviors=self._number("SELECT count(*) FROM behaviors"),
            num_impressions=self._number("SELECT count(*) FROM impressions"),
            num_rejected=num_rejected,
            first_event=one["first"],
            last_event=one["last"],
            num_buckets=_num_buckets(one["events"]),
            source_fingerprint=self.fingerprint,
            max_text_length=options.max_text_length,
            live_sequence=self.live.sequence if self.live else 0,
        )
        item_fields(manifest)  # refuses a column with the name of a computed feature
        return manifest

    def _behaviors(self) -> None:
        """Every distinct text: of events, and of items, whose titles are behaviours as well."""
        self.connection.execute("""
            CREATE OR REPLACE TABLE behaviors AS
            SELECT behavior_id, any_value(text) AS text, min(event_timestamp) AS first_seen,
                sum(n)::BIGINT AS num_events
            FROM (
                SELECT behavior_id, text, event_timestamp, 1 AS n FROM events
                UNION ALL SELECT text_id, text, event_timestamp, 0 FROM items
            ) GROUP BY behavior_id ORDER BY behavior_id
        """)

    def _write(self, folder: Path, manifest: DataManifest, loaded: Sequence[LoadedQuery]) -> None:
        """Write the tables; the manifest last."""
        connection = self.connection
        map_keys(
            connection, "users", "SELECT DISTINCT user_id FROM events", name="user_id", items=False
        )
        map_keys(
            connection, "keys",
            "SELECT DISTINCT item_id FROM (SELECT item_id FROM events UNION ALL SELECT item_id "
            "FROM items)", name="item_id", items=True,
        )  # fmt: skip
        (folder / "events").mkdir()
        for bucket in range(manifest.num_buckets):
            self._copy(
                "SELECT e.user_id, e.event_timestamp, e.scene, e.behavior_id, e.item_id, "
                "coalesce(k.key, 0) AS item_key FROM events e JOIN users u USING (user_id) "
                f"LEFT JOIN keys k USING (item_id) WHERE u.key % {manifest.num_buckets} = {bucket} "
                "ORDER BY user_id, event_timestamp, scene, behavior_id, item_key",
                folder / "events" / f"part-{bucket:05d}.parquet",
                row_group_size=EVENT_GROUP_SIZE,
            )
        self._step()
        self._copy(
            'SELECT * EXCLUDE ("row", text) FROM items ORDER BY item_id, event_timestamp',
            folder / "items.parquet",
        )
        self._copy(
            'SELECT * EXCLUDE ("row") FROM impressions ORDER BY event_timestamp, request_id, "row"',
            folder / "impressions.parquet",
        )
        self._copy("SELECT * FROM behaviors ORDER BY behavior_id", folder / "behaviors.parquet")
        self._copy(
            " UNION ALL ".join(
                f"SELECT '{q.name}' AS query, '{q.files.replace(chr(39), chr(39) * 2)}' AS file, "
                f'r."row", c.reason, CAST(to_json(r) AS VARCHAR) AS "values" FROM raw_{q.name} r '
                f'JOIN checked_{q.name} c USING ("row") WHERE c.reason IS NOT NULL'
                for q in loaded
            )
            + ' ORDER BY query, "row"',
            folder / "rejected.parquet",
        )
        manifest.save(folder / "manifest.json")

    def _copy(self, sql: str, path: Path, *, row_group_size: int = 122_880) -> None:
        self.connection.execute(
            f"COPY ({sql}) TO '{str(path).replace(chr(39), chr(39) * 2)}' "
            f"(FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {row_group_size})"
        )

    def _records(self, sql: str) -> list[dict[str, Any]]:
        cursor = self.connection.execute(sql)
        names = [column[0] for column in cursor.description or ()]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def _number(self, sql: str) -> int:
        row = self.connection.execute(sql).fetchone()
        assert row is not None
        return int(row[0])


def bucket_of(user_id: str, num_buckets: int) -> int:
    """Which file in the folder of events holds a user."""
    return hash63(user_id) % num_buckets


def _num_buckets(num_events: int) -> int:
    """A power of two, so that a growing data set seldom moves its users to other buckets."""
    buckets = 1
    while buckets * EVENTS_PER_BUCKET < num_events:
        buckets *= 2
    return buckets


def _total(counts: dict[str, int]) -> int:
    return sum(counts.values())


def _micros(time: datetime) -> int:
    return round(time.timestamp() * 1e6)


def _short(record: dict[str, Any]) -> str:
    text = ", ".join(f"{name}={value}" for name, value in record.items() if value is not None)
    return text if len(text) <= 200 else text[:200] + "..."
