"""The data set file: what a user writes instead of code.

One TOML file names three SQL queries over files (DuckDB's dialect) and how the labels are split in
time. ``docs/data.md`` shows every key.
"""

import os
import re
import tomllib
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

from feature_repo.errors import DataSetError
from feature_repo.manifest import SEQUENCE_LENGTH

DATA_DIR_VARIABLE = "LONGTRAIL_DATA_DIR"
DATASETS = Path(__file__).resolve().parent / "datasets"


def _to_utc(value: Any) -> Any:
    """A date, or a time without zone, is taken as UTC."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if isinstance(value, datetime):
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    return value


UtcTime = Annotated[datetime, BeforeValidator(_to_utc)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Query(_Part):
    """One SQL query."""

    sql: str = Field(min_length=1)


class Negatives(_Part):
    """How labels are made where no impressions were logged: one purchase against drawn items."""

    scene: str = "purchase"
    """Behaviours of this scene that name an item are the positives."""
    per_positive: PositiveInt = 4
    window_days: PositiveInt = 14
    """Negatives are drawn from the positives of this many days before the request."""
    match: Literal["popularity"] = "popularity"
    """A negative is the item of a uniformly drawn positive: by recent popularity."""
    seed: int = 0
    max_requests: dict[Literal["train", "valid", "test"], PositiveInt] = Field(default_factory=dict)
    """At most this many requests per split, drawn uniformly; all where not named."""
    extra_train: bool = False
    """Make requests of the positives of the train split that no impression covers, too. They are
    the split ``extra``, from which a recipe may learn; nothing is measured on them."""


class ImpressionsQuery(_Part):
    """Labelled requests: logged ones by ``sql``, or made from the positives by ``negatives``."""

    sql: str | None = None
    logged: bool = True
    """False: the rows of ``sql`` are sampled, not what users were shown."""
    negatives: Negatives | None = None
    """With ``sql`` beside it: used where the files that ``sql`` reads do not exist, and for
    ``extra_train``, which goes with sampled rows only."""

    @model_validator(mode="after")
    def _one_source(self) -> "ImpressionsQuery":
        if self.sql is None and self.negatives is None:
            raise ValueError("needs `sql` (logged impressions) or `negatives` (sampled ones)")
        extra = self.negatives is not None and self.negatives.extra_train
        if extra and self.sql is not None and self.logged:
            raise ValueError(
                "negatives.extra_train = true would mix sampled rows with logged ones: set it to "
                "false, or logged = false if `sql` reads sampled rows"
            )
        return self


class SplitTimes(_Part):
    """First moments of the splits, UTC."""

    train: UtcTime | None = None
    """Impressions before it only count as history."""
    valid: UtcTime
    test: UtcTime

    @model_validator(mode="after")
    def _in_order(self) -> "SplitTimes":
        if self.valid >= self.test or (self.train is not None and self.train >= self.valid):
            raise ValueError("the times must be in the order train < valid < test")
        return self


class DataSet(_Part):
    """A data set file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    dir: str | None = None
    """Folder that ``{dir}`` stands for, relative to this file; this file's folder by default."""
    replay: bool = False
    """The data is historical: the last event's time is "now"."""
    lowercase: bool = True
    """Texts that differ only in case are one behaviour."""
    max_text_length: PositiveInt = 1000
    """Characters; longer texts are rejected."""
    reject_threshold: float = Field(default=0.01, ge=0, le=1)
    """Share of a query's rows that may be rejected before ingest stops."""
    sequence_length: int = Field(default=SEQUENCE_LENGTH, ge=1, le=10_000)
    """Behaviours kept per scene of a user; exact-id evidence looks at all of them."""
    availability_delay_s: float = Field(default=1e-6, ge=1e-6)
    """Seconds from an event to the moment its features can be read."""
    label_delay_s: float = Field(default=3600, ge=1e-6)
    """Seconds from an impression to the moment it is known whether it was clicked."""
    events: Query
    items: Query
    impressions: ImpressionsQuery | None = None
    split: SplitTimes


class LoadedDataSet(_Part):
    """A data set file with its folder of data."""

    path: Path
    data_dir: Path
    content: DataSet

    def sql(self, text: str) -> str:
        """The query with ``{dir}`` filled in."""
        return text.replace("{dir}", str(self.data_dir).replace("'", "''"))

    def files(self, text: str) -> list[Path]:
        """The files that a query names in quotes, patterns resolved; missing ones are kept."""
        found: list[Path] = []
        for quoted in re.findall(r"'((?:[^']|'')*)'", self.sql(text)):
            path = Path(quoted.replace("''", "'"))
            if not path.is_absolute() or not path.suffix:
                continue
            matches = sorted(path.parent.glob(path.name)) if "*" in path.name else []
            found += matches or [path]
        return found


def load_dataset(path: Path, *, data_dir: Path | None = None) -> LoadedDataSet:
    """Read a data set file.

    Args:
        path: The TOML file.
        data_dir: What ``{dir}`` stands for; by default the environment's ``LONGTRAIL_DATA_DIR``,
            else the file's own ``dir``, else the folder that the file lies in.

    Raises:
        DataSetError: If the file is missing, no TOML, or not of the documented form.
    """
    try:
        content = DataSet.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise DataSetError(
            f"the data set file {path} does not exist; give the path of a TOML file such as "
            f"{DATASETS / 'online_retail.toml'}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataSetError(f"the data set file {path} cannot be read as text: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise DataSetError(f"{path} is not a TOML file: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"]) or "the file"
        came = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise DataSetError(f"{path}: {place}: {first['msg']}{came}") from error
    if data_dir is None:
        named = os.environ.get(DATA_DIR_VARIABLE)
        data_dir = Path(named) if named else path.parent / (content.dir or ".")
    return LoadedDataSet(path=path, data_dir=data_dir.expanduser().resolve(), content=content)
