"""Served requests and clicks as training data, and that ingest and training read them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from feature_repo.dataset import LoadedDataSet, load_dataset
from feature_repo.errors import DataSetError, MissingStepError
from feature_repo.features import UserFeatures
from feature_repo.home import Home
from feature_repo.ingest import ingest
from feature_repo.manifest import load_manifest
from feature_repo.moments import micros
from feature_repo.served_files import write_served
from feature_repo.served_impressions import clicks_query, join_clicks, write_dataset
from feature_repo.served_rows import ServedItems, ServedRequest
from longtrail import main
from training.impressions import load_impressions, load_impressions_file

START = datetime(2024, 3, 1, 9, tzinfo=UTC)
DAY = timedelta(days=1)
NOW = START + 30 * DAY


def request(
    name: str,
    served_at: datetime,
    items: Sequence[str],
    *,
    returned: int = 2,
    context: dict[str, float] | None = None,
) -> ServedRequest:
    """Of user 7, whose features were read a second before the answer."""
    at = served_at - timedelta(seconds=1)
    num = len(items)
    return ServedRequest(
        request_id=name,
        served_at=served_at,
        items_at=at,
        run="run",
        encoder="abc",
        path="live",
        degraded=(),
        context=context or {},
        user=UserFeatures(
            user_ids=np.array(["7"], dtype=object),
            request_times=np.array([micros(at)]),
            found=np.array([True]),
            sequences={},
            dense=np.zeros((1, 0), dtype=np.float32),
            dense_names=(),
        ),
        num_scored=num,
        num_returned=returned,
        items=ServedItems(
            item_ids=np.array(items, dtype=object),
            logits=np.zeros(num, dtype=np.float32),
            text_ids=np.zeros(num, dtype=np.int64),
            dense=np.zeros((num, 0), dtype=np.float32),
            dense_names=(),
            categories=np.zeros((num, 0), dtype=np.int32),
            category_names=(),
            neighbors=np.zeros(num, dtype=np.int64),
        ),
    )


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def write_clicks(path: Path, *rows: tuple[str, str, datetime | None]) -> str:
    """A CSV file of clicks as a query."""
    lines = [f"{name},{item},{'' if at is None else at.isoformat()}" for name, item, at in rows]
    path.write_text("\n".join(["request_id,item_id,event_timestamp", *lines]) + "\n")
    return clicks_query(path)


def rows_of(path: Path) -> list[tuple[object, ...]]:
    return [tuple(row.values()) for row in pq.read_table(path).to_pylist()]


def test_what_was_returned_becomes_impressions_and_clicks_in_time_count(
    home: Home, tmp_path: Path
) -> None:
    write_served(
        home.served,
        [
            request("r1", START, ["P1", "P2", "P3"], returned=2),
            request("r2", START + DAY, ["P2"], returned=1, context={"hour": 9.0, "a\"'b": -1.0}),
            request("empty", START + DAY, [], returned=0),
            request("open", NOW - timedelta(hours=1), ["P1"]),
        ],
    )
    clicks = write_clicks(
        tmp_path / "clicks.csv",
        ("r1", "P2", START + timedelta(minutes=5)),
        ("r1", "P2", START + timedelta(minutes=9)),  # the same again
        ("r1", "P1", START + timedelta(hours=25)),  # late
        ("r1", "P3", START + timedelta(minutes=1)),  # scored, not returned
        ("r2", "P2", None),
        ("nobody's", "P2", None),
    )
    out = tmp_path / "shown.parquet"
    joined = join_clicks(home, clicks, out, window=DAY, now=NOW)
    assert asdict(joined) == {
        "requests": 2,
        "open_requests": 1,
        "repeated_requests": 0,
        "impressions": 3,
        "clicked": 2,
        "clicks": 5,
        "late_clicks": 1,
        "unmatched_clicks": 2,
    }
    table = pq.read_table(out)
    assert table.column_names[:5] == ["request_id", "user_id", "item_id", "event_timestamp",
                                      "clicked"]  # fmt: skip
    assert sorted(table.column_names[5:]) == ["a\"'b", "hour"]
    first, second = START - timedelta(seconds=1), START + DAY - timedelta(seconds=1)
    assert rows_of(out) == [
        ("r1", "7", "P1", first, 0, None, None),
        ("r1", "7", "P2", first, 1, None, None),
        ("r2", "7", "P2", second, 1, -1.0, 9.0),
    ]
    read = load_impressions_file(out, ("hour", "unheard_of"))
    assert read.item_ids.tolist() == ["P1", "P2", "P2"]
    assert read.clicked.tolist() == [0, 1, 1]
    assert read.times.tolist() == [micros(first), micros(first), micros(second)]
    np.testing.assert_array_equal(read.context[:, 0], [np.nan, np.nan, 9.0])


def test_of_one_request_id_the_last_answer_counts(home: Home, tmp_path: Path) -> None:
    again = START + timedelta(seconds=30)
    write_served(home.served, [request("r1", again, ["P2", "P3"])])
    write_served(home.served, [request("r1", START, ["P1", "P2"]), request("r2", START, ["P1"])])
    clicks = write_clicks(tmp_path / "clicks.csv", ("r1", "P2", again), ("r1", "P1", START))
    out = tmp_path / "shown.parquet"
    joined = join_clicks(home, clicks, out, window=DAY, now=NOW)
    assert (joined.requests, joined.repeated_requests) == (2, 1)
    assert [row[:3] + row[4:] for row in rows_of(out)] == [
        ("r1", "7", "P2", 1), ("r1", "7", "P3", 0), ("r2", "7", "P1", 0)
    ] or [row[:3] + row[4:] for row in rows_of(out)] == [
        ("r2", "7", "P1", 0), ("r1", "7", "P2", 1), ("r1", "7", "P3", 0)
    ]  # fmt: skip
    assert joined.unmatched_clicks == 1


def test_days_may_be_chosen(home: Home, tmp_path: Path) -> None:
    write_served(home.served, [request(f"r{n}", START + n * DAY, ["P1"]) for n in range(5)])
    clicks = write_clicks(tmp_path / "clicks.csv", ("r1", "P1", None), ("r4", "P1", None))
    out = tmp_path / "shown.parquet"
    since = (START + 3 * DAY).date()
    joined = join_clicks(home, clicks, out, window=DAY, now=NOW, since=since)
    assert (joined.requests, joined.clicked, joined.unmatched_clicks) == (2, 1, 1)


def test_clicks_may_come_as_parquet_json_or_a_query(home: Home, tmp_path: Path) -> None:
    write_served(home.served, [request("12", START, ["007", "7"])])
    table = pa.table({"request_id": [12], "item_id": ["007"]})
    pq.write_table(table, tmp_path / "clicks.parquet")
    (tmp_path / "clicks.jsonl").write_text('{"request_id": "12", "item_id": "007"}\n')
    (tmp_path / "clicks.csv").write_text("request_id,item_id\n12,007\n")
    for name in ("parquet", "jsonl", "csv"):
        query = clicks_query(tmp_path / f"clicks.{name}")
        joined = join_clicks(home, query, tmp_path / "out.parquet", window=DAY, now=NOW)
        assert (joined.clicks, joined.clicked) == (1, 1), name
    query = "SELECT 12 AS request_id, '7' AS item_id, TIMESTAMP '2024-03-01 09:00:01' AS "
    joined = join_clicks(
        home, query + "event_timestamp", tmp_path / "out.parquet", window=DAY, now=NOW
    )
    assert joined.clicked == 1
    assert [row[2] for row in rows_of(tmp_path / "out.parquet") if row[4]] == ["7"]


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("SELECT 1 AS request_id", "no column 'item_id'; they need request_id, item_id and"),
        ("SELECT 1.5::DOUBLE AS request_id, 2 AS item_id", "hold request_id as fractions"),
        ("SELECT nonsense", "the clicks cannot be read: Binder Error"),
        ("", "it must be one SELECT"),
        (
            "SELECT 1 AS request_id, 2 AS item_id, 'noon' AS event_timestamp",
            "event_timestamp must be times, for example 2026-01-31T09:30:00Z",
        ),
    ],
)
def test_clicks_that_cannot_be_used_are_refused(
    home: Home, tmp_path: Path, query: str, sentence: str
) -> None:
    write_served(home.served, [request("r1", START, ["P1"])])
    out = tmp_path / "shown.parquet"
    with pytest.raises(DataSetError, match=sentence):
        join_clicks(home, query, out, window=DAY, now=NOW)
    assert not out.exists()


def test_no_log_no_old_request_and_no_file_are_told(home: Home, tmp_path: Path) -> None:
    query, out = "SELECT 1 AS request_id, 2 AS item_id", tmp_path / "shown.parquet"
    with pytest.raises(MissingStepError, match="no served request is logged"):
        join_clicks(home, query, out, window=DAY, now=NOW)
    write_served(home.served, [request("r1", NOW - timedelta(hours=2), ["P1"])])
    with pytest.raises(DataSetError, match="none of the 1 served requests is older than"):
        join_clicks(home, query, out, window=DAY, now=NOW)
    with pytest.raises(DataSetError, match="does not exist"):
        clicks_query(tmp_path / "none.csv")
    with pytest.raises(DataSetError, match=r"must end in one of \.csv, \.parquet"):
        clicks_query(tmp_path / "clicks.xlsx")


def test_requests_of_one_moment_cannot_be_split(
    home: Home, tmp_path: Path, kitchen: LoadedDataSet
) -> None:
    write_served(home.served, [request(f"r{n}", START, ["P1"]) for n in range(9)])
    out = tmp_path / "shown.parquet"
    query = "SELECT 1 AS request_id, 2 AS item_id"
    join_clicks(home, query, out, window=DAY, now=NOW)
    with pytest.raises(DataSetError, match="its rows are of 1 moment, most of them of one"):
        write_dataset(kitchen, out, tmp_path / "served.toml", window=DAY)
    assert not (tmp_path / "served.toml").exists()


def test_the_command_makes_a_data_set_that_ingest_and_training_read(
    home: Home, tmp_path: Path, kitchen: LoadedDataSet
) -> None:
    write_served(
        home.served,
        [
            request(f"r{n}", START + n * timedelta(hours=7), [f"P{n % 6}", f"P{(n + 1) % 6}"],
                    context={"hour": float(n % 24)})
            for n in range(50)
        ],
    )  # fmt: skip
    rows = ((f"r{n}", f"P{n % 6}", START + n * timedelta(hours=7)) for n in range(0, 50, 2))
    write_clicks(tmp_path / "clicks.csv", *rows)
    out = tmp_path / "served's impressions.parquet"
    arguments = ["--home", str(home.root), "impressions", str(out)]
    done = CliRunner().invoke(
        main,
        [*arguments, "--clicks", str(tmp_path / "clicks.csv"), "--window-hours", "2",
         "--dataset", str(kitchen.path)],
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["requests"], told["impressions"], told["clicked"]) == (50, 100, 25)

    dataset = load_dataset(Path(told["dataset_file"]))
    assert dataset.content.name == "kitchen"  # whose live events an ingest of it takes in
    assert dataset.content.label_delay_s == 7200
    assert dataset.content.events == kitchen.content.events
    assert dataset.content.replay
    assert dataset.data_dir == kitchen.data_dir
    training = Home(tmp_path / "training")
    summary = ingest(training, dataset)
    assert summary.rejected["impressions"] == {}
    manifest = load_manifest(training)
    assert (manifest.impressions, manifest.context_columns) == ("logged", ("hour",))
    num = {}
    for split in ("train", "valid", "test"):
        impressions = load_impressions(training, manifest, split)
        num[split] = len(impressions)
        numbers = [int(name[1:]) for name in impressions.request_ids]
        assert impressions.context[:, 0].tolist() == [n % 24 for n in numbers]
        clicked = [
            n % 2 == 0 and item == f"P{n % 6}"
            for n, item in zip(numbers, impressions.item_ids, strict=True)
        ]
        assert impressions.clicked.tolist() == clicked
    assert sum(num.values()) == 100
    assert num["train"] == pytest.approx(80, abs=4)
    assert num["test"] == pytest.approx(10, abs=4)

    for wrong in ([], ["--clicks", "a.csv", "--clicks-sql", "SELECT 1"]):
        done = CliRunner().invoke(main, [*arguments, *wrong])
        assert done.exit_code == 2
        assert "give either --clicks or --clicks-sql" in done.stderr


def test_options_of_the_base_survive_as_they_are(
    home: Home, tmp_path: Path, kitchen: LoadedDataSet
) -> None:
    write_served(home.served, [request(f"r{n}", START + n * DAY, ["P1"]) for n in range(20)])
    out = tmp_path / "shown.parquet"
    query = "SELECT 1 AS request_id, 2 AS item_id"
    join_clicks(home, query, out, window=DAY, now=NOW)
    text = "SELECT 'it''s \"quoted\" \\ tab\t' AS text"
    content = kitchen.content.model_copy(
        update={
            "lowercase": False,
            "reject_threshold": 0.25,
            "sequence_length": 7,
            "items": kitchen.content.items.model_copy(update={"sql": text}),
        }
    )
    base = kitchen.model_copy(update={"content": content})
    write_dataset(base, out, tmp_path / "served.toml", window=DAY)
    again = load_dataset(tmp_path / "served.toml").content
    assert (again.lowercase, again.reject_threshold, again.sequence_length) == (False, 0.25, 7)
    assert again.items.sql == text
    assert again.events.sql.strip() == kitchen.content.events.sql.strip()
    assert again.impressions is not None
    assert again.impressions.sql is not None
    rows = duckdb.sql(again.impressions.sql).fetchall()
    assert len(rows) == 20
    assert again.split.valid == START + 15 * DAY - timedelta(seconds=1)
    assert again.split.test == START + 17 * DAY - timedelta(seconds=1)
