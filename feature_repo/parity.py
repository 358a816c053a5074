"""Are the features that serving reads those that training reads? Compared value by value.

Every applied view is compared whole. Keys are chosen by their hash, from both stores: every run
looks at the same ones, also those that only one of the stores knows.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from feature_repo.behavior import hash63
from feature_repo.columns import Column, Columns, Ragged
from feature_repo.home import Home
from feature_repo.online import open_writer
from feature_repo.parity_series import ParityRun, ViewCounts, record_run
from feature_repo.progress import Progress, silent
from feature_repo.reader import FeatureReader
from feature_repo.view_reader import Join

_CHUNK_KEYS = 1000
"""Keys compared at once: bounds the memory, whatever the sample."""
_SCAN_KEYS = 50_000
_FIRST_DIFFERENCES = 5
"""Shown of each view."""
_STRANGERS = {"user_id": "no such user", "item_id": "no such item", "behavior_id": 0}
"""A key that no store knows."""


@dataclass
class ViewParity:
    """How a view compares.

    Args:
        num_keys: Keys that were looked up, unknown ones included.
        values: Numbers and words compared, list elements one by one, of keys in both stores.
        mismatches: How many of them differ.
        missing_offline: Keys with a row online only.
        missing_online: Keys with a row offline only.
        recomputed: Keys whose deep outputs serving has computed anew since the last export; left
            out of all else, for they are those of a later moment or of late events.
        differences: The first of all these.
    """

    num_keys: int = 0
    values: int = 0
    mismatches: int = 0
    missing_offline: int = 0
    missing_online: int = 0
    recomputed: int = 0
    differences: list[dict[str, Any]] = field(default_factory=list)

    @property
    def counts(self) -> ViewCounts:
        """What the time series keeps."""
        return ViewCounts(**{name: getattr(self, name) for name in ViewCounts.model_fields})

    @property
    def wrong(self) -> int:
        """Values that differ and rows that are missing."""
        return self.counts.wrong

    def compare(self, keys: NDArray[Any], offline: Columns, online: Columns) -> None:
        """Add R keys: whether they are there, and where they are, every feature."""
        self.num_keys += len(keys)
        self.missing_online += int((offline.present & ~online.present).sum())
        self.missing_offline += int((online.present & ~offline.present).sum())
        for row in np.flatnonzero(offline.present != online.present):
            self._tell(
                "(row)", keys[row], None, bool(offline.present[row]), not offline.present[row]
            )
        both = np.flatnonzero(offline.present & online.present)
        for name, column in offline.values.items():
            self._compare_column(name, keys, both, column, online.values[name])

    def _compare_column(
        self,
        name: str,
        keys: NDArray[Any],
        rows: NDArray[np.int64],
        offline: Column,
        online: Column,
    ) -> None:
        if isinstance(offline, Ragged) and isinstance(online, Ragged):
            lengths = offline.lengths[rows], online.lengths[rows]
            self.values += int(np.maximum(*lengths).sum())
            # Where one list is longer, every element of it is in doubt.
            unequal = np.flatnonzero(lengths[0] != lengths[1])
            self.mismatches += int(np.maximum(*lengths)[unequal].sum())
            for row in unequal:
                told = [f"{side[row]} elements" for side in lengths]
                self._tell(name, keys[rows[row]], None, *told)
            rows = rows[lengths[0] == lengths[1]]
            (owner, place, left), (_, _, right) = _elements(offline, rows), _elements(online, rows)
        else:
            assert isinstance(offline, np.ndarray)
            assert isinstance(online, np.ndarray)
            self.values += len(rows)
            owner, place, left, right = rows, None, offline[rows], online[rows]
        different = np.flatnonzero(~_equal(left, right))
        self.mismatches += len(different)
        for at in different:
            position = None if place is None else int(place[at])
            self._tell(name, keys[owner[at]], position, left[at], right[at])

    def _tell(
        self, feature: str, key: Any, position: int | None, offline: Any, online: Any
    ) -> None:
        if len(self.differences) < _FIRST_DIFFERENCES:
            self.differences.append(
                {
                    "feature": feature,
                    "key": str(key),
                    "position": position,
                    "offline": str(offline),
                    "online": str(online),
                }
            )


@dataclass(frozen=True)
class ParityReport:
    """Outcome of a comparison, by view."""

    views: dict[str, ViewParity]
    seconds: float

    @property
    def compared_values(self) -> int:
        """Over all views."""
        return sum(view.values for view in self.views.values())

    @property
    def mismatches(self) -> int:
        """Values that differ and rows that are missing, over all views."""
        return sum(view.wrong for view in self.views.values())


def check_parity(
    home: Home, profile: str, *, sample: int, join: Join = "feast", progress: Progress = silent
) -> ParityReport:
    """Compare offline features as of now with online ones, for ``sample`` keys of each view.

    The outcome is appended to the home's time series and replaces its Prometheus file.

    Args:
        home: The data set.
        profile: Which stores.
        sample: Keys taken from each of the two stores, mostly the same ones; each view is asked
            for an unknown one too.
        join: How offline rows are found: by Feast's own join, or by the fast one of training.
        progress: Receives keys.

    Raises:
        MissingStepError: If a step before was not run.
        StoreError: If a store fails.
    """
    began, moment = time.perf_counter(), datetime.now(UTC)
    reader = FeatureReader(home, profile)
    now = reader.manifest.now()
    writer = open_writer(reader.store)
    known = {key: smallest_hashes(_offline_keys(home, key), sample) for key in _STRANGERS}
    keys: dict[str, NDArray[Any]] = {}
    for view in sorted(reader.store.list_feature_views(), key=lambda view: str(view.name)):
        key = view.entity_columns[0].name
        copied = (batch.to_pylist() for batch in writer.keys(view, _SCAN_KEYS))
        both = {*known[key], *smallest_hashes(copied, sample), _STRANGERS[key]}
        kind = np.int64 if key == "behavior_id" else object
        keys[view.name] = np.array(sorted(both), dtype=kind)
    total = sum(map(len, keys.values()))
    views = {}
    for view, wanted in keys.items():
        views[view] = parity = ViewParity()
        for start in range(0, len(wanted), _CHUNK_KEYS):
            chunk = wanted[start : start + _CHUNK_KEYS]
            progress(len(chunk), total)
            while True:
                offline = reader.historical_columns(
                    view, chunk, reader.request_times(len(chunk), now), join=join
                )
                online = reader.online_columns(view, chunk, at=now)
                anew = _recomputed(offline, online)
                if not anew.any():
                    break
                parity.recomputed += int(anew.sum())
                chunk = chunk[~anew]
            parity.compare(chunk, offline, online)
    report = ParityReport(views, time.perf_counter() - began)
    run = ParityRun(
        time=moment,
        profile=profile,
        sample=sample,
        join=join,
        views={name: view.counts for name, view in views.items()},
        seconds=round(report.seconds, 3),
    )
    record_run(home, run)
    return report


def _recomputed(offline: Columns, online: Columns) -> NDArray[np.bool_]:
    """Whether a row holds deep outputs of a later moment than those that export wrote.

    Where the clock of a replayed data set stands still, those of another history are later ones.
    """
    sides = (offline, online)
    exported, kept = (columns.values.get("computed_time") for columns in sides)
    history, kept_history = (columns.values.get("history_key") for columns in sides)
    if not isinstance(exported, np.ndarray) or not isinstance(kept, np.ndarray):
        return np.zeros(len(online.present), dtype=bool)
    another = (kept == exported) & (np.asarray(history) != np.asarray(kept_history))
    later: NDArray[np.bool_] = online.present & ((kept > exported) | (offline.present & another))
    return later


def _offline_keys(home: Home, key: str) -> Iterator[list[Any]]:
    """Distinct keys of the canonical tables, a batch at a time; one may come twice."""
    files = {
        "user_id": sorted(home.events.glob("*.parquet")),
        "item_id": [home.items],
        "behavior_id": [home.behaviors],
    }
    for file in files[key]:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(columns=[key]):
                yield pc.unique(batch.column(key)).to_pylist()


def smallest_hashes(batches: Iterable[Sequence[Any]], number: int) -> list[Any]:
    """The ``number`` keys with the smallest hashes: a sample that is the same every time.

    Args:
        batches: Keys; one may come several times.
        number: How many to keep, at least 1.
    """
    smallest: dict[Any, int] = {}
    limit = 1 << 63  # above every hash
    for batch in batches:
        hashes = {key: hash63(str(key)) for key in batch}
        smallest |= {key: value for key, value in hashes.items() if value < limit}
        if len(smallest) > number:
            kept = sorted(smallest.items(), key=lambda pair: (pair[1], str(pair[0])))[:number]
            smallest, limit = dict(kept), kept[-1][1]
    return list(smallest)


def _elements(
    column: Ragged, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
    """Of the lists of some rows, all elements: their row, their place in its list, the value."""
    lengths = column.lengths[rows]
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    starts = (np.cumsum(column.lengths) - column.lengths)[rows]
    return np.repeat(rows, lengths), place, column.values[np.repeat(starts, lengths) + place]


def _equal(left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.bool_]:
    """Which values are equal bit by bit; NaN, which stands for null, equals NaN."""
    if left.dtype != right.dtype:
        return np.zeros(len(left), dtype=bool)
    if left.dtype.kind != "f":
        return np.asarray(left == right, dtype=bool)
    bits = np.dtype(f"u{left.dtype.itemsize}")
    both_null = np.isnan(left) & np.isnan(right)
    return np.asarray((left.view(bits) == right.view(bits)) | both_null, dtype=bool)
