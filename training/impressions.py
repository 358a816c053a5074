"""Labelled requests: the table that ingest wrote, or any file of the same columns.

Shapes: R = rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow.dataset import dataset

from feature_repo.errors import DataSetError
from feature_repo.home import Home
from feature_repo.manifest import DataManifest

REQUIRED = ("request_id", "user_id", "item_id", "event_timestamp", "clicked")
_IDS = REQUIRED[:3]
CHUNK_ROWS = 50_000
"""Rows of a time range that are in memory at once."""
EXTRA = "extra"
"""Split of the requests that ingest samples beside the given ones; only for learning."""


@dataclass(frozen=True)
class Impressions:
    """Rows of (request, user, item, time) and whether the user clicked.

    Args:
        request_ids: str objects [R].
        user_ids: str objects [R].
        item_ids: str objects [R].
        times: int64 [R]; epoch microseconds, UTC.
        clicked: int64 [R]; 0 or 1.
        extra: bool [R]; whether a row is of the split ``extra``, sampled beside the others.
        context: float32 [R, Fx]; NaN = missing.
        context_names: The Fx names.
    """

    request_ids: NDArray[np.object_]
    user_ids: NDArray[np.object_]
    item_ids: NDArray[np.object_]
    times: NDArray[np.int64]
    clicked: NDArray[np.int64]
    extra: NDArray[np.bool_]
    context: NDArray[np.float32]
    context_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.times)

    def take(self, rows: NDArray[np.int64]) -> "Impressions":
        """The rows at these positions, in this order."""
        return Impressions(
            request_ids=self.request_ids[rows],
            user_ids=self.user_ids[rows],
            item_ids=self.item_ids[rows],
            times=self.times[rows],
            clicked=self.clicked[rows],
            extra=self.extra[rows],
            context=self.context[rows],
            context_names=self.context_names,
        )


def load_impressions(
    home: Home, manifest: DataManifest, split: str, *, with_extra: bool = False
) -> Impressions:
    """One split (train, valid or test) of the impressions of ``home``.

    Args:
        home: Where they lie.
        manifest: What ingest wrote.
        split: Which one.
        with_extra: Add the rows of the split ``extra``, if there are any: to those of ``train``.

    Raises:
        DataSetError: If the data set has no impressions, or none in this split.
    """
    if manifest.impressions == "none":
        raise DataSetError(
            f"data set {manifest.dataset!r} has no impressions to train or evaluate on: add an "
            "[impressions] table to its TOML file, then run `longtrail ingest`"
        )
    frame = pd.read_parquet(home.impressions, filters=[("split", "==", split)])
    if with_extra:
        extra = pd.read_parquet(home.impressions, filters=[("split", "==", EXTRA)])
        frame = pd.concat([frame, extra], ignore_index=True)
    if frame.empty:
        raise DataSetError(
            f"no impression of data set {manifest.dataset!r} lies in the {split} split: mend the "
            "times under [split] in its TOML file, then run `longtrail ingest`"
        )
    return _from_frame(frame, home.impressions, manifest.context_columns)


def impressions_between(
    home: Home, manifest: DataManifest, start: datetime, end: datetime
) -> Iterator[Impressions]:
    """Impressions of a time range, of all splits but ``extra``, in chunks of :data:`CHUNK_ROWS`.

    Args:
        home: The home folder.
        manifest: Of its data set.
        start: Oldest time, UTC-aware.
        end: First time that is too late, UTC-aware.

    Raises:
        DataSetError: If the data set has no impressions.
    """
    if manifest.impressions == "none":
        raise DataSetError(
            f"data set {manifest.dataset!r} has no impressions: add an [impressions] table to its "
            "TOML file, then run `longtrail ingest`"
        )
    time, split = pc.field("event_timestamp"), pc.field("split")
    low, high = (pa.scalar(moment, pa.timestamp("us", tz="UTC")) for moment in (start, end))
    batches = dataset(home.impressions).to_batches(
        filter=(time >= low) & (time < high) & (split.is_null() | (split != EXTRA)),
        batch_size=CHUNK_ROWS,
    )
    for batch in batches:
        if batch.num_rows:
            yield _from_frame(batch.to_pandas(), home.impressions, manifest.context_columns)


def load_impressions_file(path: Path, context_names: Sequence[str]) -> Impressions:
    """Any labelled parquet or CSV file with the columns of :data:`REQUIRED`.

    Ids may be integers; times without zone are UTC; a context column that the file lacks is missing
    in every row.

    Raises:
        DataSetError: If the file cannot be read or a column is missing or has a wrong value.
    """
    if not path.is_file():
        raise DataSetError(f"the impressions file {path} does not exist")
    try:
        if path.suffix.lower() == ".csv":
            frame = pd.read_csv(path, dtype=dict.fromkeys(_IDS, str))
        elif path.suffix.lower() == ".parquet":
            frame = pd.read_parquet(path)
        else:
            raise DataSetError(f"the impressions file {path} must end in .parquet or .csv")
    except DataSetError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataSetError(f"the impressions file {path} cannot be read: {reason}") from error
    return _from_frame(frame, path, tuple(context_names))


def _from_frame(frame: pd.DataFrame, path: Path, context_names: tuple[str, ...]) -> Impressions:
    missing = [name for name in REQUIRED if name not in frame.columns]
    if missing:
        raise DataSetError(
            f"{path} has no column {missing[0]!r}; it needs {', '.join(REQUIRED)} "
            f"and has {', '.join(map(str, frame.columns)) or 'none'}"
        )
    if frame.empty:
        raise DataSetError(f"{path} has no rows")
    for name in REQUIRED:
        nulls = np.flatnonzero(frame[name].isna())
        if len(nulls):
            raise DataSetError(f"{path} has no value for {name!r} in row {nulls[0] + 1}")
    ids = [_ids(frame[name], path) for name in _IDS]
    numbers = {
        name: _numbers(frame[name], path)
        for name in ("clicked", *(n for n in context_names if n in frame.columns))
    }
    wrong = np.flatnonzero(~np.isin(numbers["clicked"], (0, 1)))
    if len(wrong):
        raise DataSetError(
            f"{path} has {frame['clicked'].iloc[wrong[0]]!r} for 'clicked' in row {wrong[0] + 1}; "
            "it must be 0 or 1"
        )
    context = np.full((len(frame), len(context_names)), np.nan, dtype=np.float32)
    for column, name in enumerate(context_names):
        if name in numbers:
            context[:, column] = numbers[name]
    return Impressions(
        request_ids=ids[0],
        user_ids=ids[1],
        item_ids=ids[2],
        times=_times(frame["event_timestamp"], path),
        clicked=numbers["clicked"].astype(np.int64),
        extra=_is_extra(frame),
        context=context,
        context_names=context_names,
    )


def _is_extra(frame: pd.DataFrame) -> NDArray[np.bool_]:
    if "split" not in frame.columns:
        return np.zeros(len(frame), dtype=np.bool_)
    return np.asarray(frame["split"] == EXTRA, dtype=np.bool_)


def _ids(column: pd.Series, path: Path) -> NDArray[np.object_]:
    if pd.api.types.is_float_dtype(column):
        raise DataSetError(
            f"{path} holds {column.name!r} as fractions ({column.iloc[0]}); ids must be text or "
            "integers"
        )
    return np.asarray(column.astype(str), dtype=object)


def _numbers(column: pd.Series, path: Path) -> NDArray[np.float64]:
    values = pd.to_numeric(column, errors="coerce")
    wrong = np.flatnonzero(values.isna() & column.notna())
    if len(wrong):
        raise DataSetError(
            f"{path} has {column.iloc[wrong[0]]!r} for {column.name!r} in row {wrong[0] + 1}; "
            "it must be a number"
        )
    return np.asarray(values, dtype=np.float64)


def _times(column: pd.Series, path: Path) -> NDArray[np.int64]:
    if pd.api.types.is_numeric_dtype(column):
        raise DataSetError(
            f"{path} holds 'event_timestamp' as numbers ({column.iloc[0]}); it must be times, "
            "for example 2011-10-01T09:30:00Z"
        )
    times = pd.to_datetime(column, utc=True, errors="coerce", format="ISO8601")
    wrong = np.flatnonzero(times.isna())
    if len(wrong):
        raise DataSetError(
            f"{path} has {column.iloc[wrong[0]]!r} for 'event_timestamp' in row {wrong[0] + 1}; "
            "it must be a time, for example 2011-10-01T09:30:00Z"
        )
    # Through UTC-naive microseconds: whatever resolution the file had.
    return np.asarray(times.dt.tz_convert(None).astype("datetime64[us]").astype(np.int64))
