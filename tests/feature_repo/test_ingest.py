import hashlib
import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from feature_repo.behavior import behavior_id, item_key
from feature_repo.dataset import LoadedDataSet, load_dataset
from feature_repo.errors import DataSetError, LongtrailError
from feature_repo.home import Home
from feature_repo.ingest import bucket_of, ingest
from feature_repo.manifest import DataManifest
from feature_repo.text_log import TextLog


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def test_a_data_set_of_csv_files_becomes_canonical_tables(
    kitchen: LoadedDataSet, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    summary = ingest(home, kitchen)
    manifest = summary.manifest
    assert manifest.scenes == ("buy", "look", "search")
    assert [(c.name, c.kind) for c in manifest.item_columns] == [
        ("price", "numeric"),
        ("shelf", "categorical"),
    ]
    assert manifest.context_columns == ("position",)
    assert manifest.impressions == "logged"
    assert manifest.num_users == 30
    assert any("taken as UTC" in note for note in summary.notes)

    events = pq.read_table(sorted(home.events.glob("*.parquet"))).to_pandas()
    assert len(events) == manifest.num_events
    assert str(events["event_timestamp"].dtype) == "datetime64[us, UTC]"
    one = events[events["scene"] == "buy"].iloc[0]
    title = {f"P{n}": w for n, w in enumerate(("oak table", "steel pan", "blue plate",
             "linen towel", "glass bowl", "copper pot"))}[one["item_id"]]  # fmt: skip
    assert one["behavior_id"] == behavior_id(title)
    assert one["item_key"] == item_key(one["item_id"])
    searches = events[events["scene"] == "search"]
    assert searches["item_id"].isna().all()
    assert (searches["item_key"] == 0).all()
    order = ["user_id", "event_timestamp", "scene", "behavior_id", "item_key"]
    assert events[order].equals(events[order].sort_values(order).reset_index(drop=True))
    assert {bucket_of(u, manifest.num_buckets) for u in events["user_id"]} == {0}

    behaviors = pq.read_table(home.behaviors).to_pandas()
    assert behaviors["behavior_id"].is_unique
    assert set(pq.read_table(home.items)["text_id"].to_pylist()) <= set(behaviors["behavior_id"])
    impressions = pq.read_table(home.impressions).to_pandas()
    spans = impressions.groupby("split")["event_timestamp"].agg(["min", "max"])
    assert spans.loc["train", "max"] < spans.loc["valid", "min"]
    assert spans.loc["valid", "max"] < spans.loc["test", "min"]


def test_a_second_run_changes_nothing_and_a_changed_file_does(
    kitchen: LoadedDataSet, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    assert ingest(home, kitchen).changed
    before = {p: p.stat().st_mtime_ns for p in home.tables.rglob("*")}
    assert not ingest(home, kitchen).changed
    assert before == {p: p.stat().st_mtime_ns for p in home.tables.rglob("*")}
    log = kitchen.data_dir / "log.csv"
    log.write_text(log.read_text() + "3,2024-03-30 10:00:00,look,new thing,\n")
    again = ingest(home, kitchen)
    assert again.changed
    assert again.manifest.last_event.day == 30


def test_the_same_data_elsewhere_or_written_again_is_the_same_data(
    kitchen: LoadedDataSet, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    first = ingest(home, kitchen)
    for file in kitchen.data_dir.iterdir():
        os.utime(file, ns=(1, 1))
    assert not ingest(home, kitchen).changed
    elsewhere = shutil.copytree(kitchen.data_dir, tmp_path / "elsewhere")
    copied = kitchen.model_copy(update={"data_dir": elsewhere})
    moved = ingest(home, copied)
    assert not moved.changed
    assert moved.manifest == first.manifest
    log = elsewhere / "log.csv"
    status, text = log.stat(), log.read_text()
    log.write_text(text.replace("look", "keep", 1))  # as long as before
    os.utime(log, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert ingest(home, copied).changed


def test_what_cannot_be_read_is_named(
    kitchen: LoadedDataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = kitchen.data_dir / "log.csv"

    def refuse(_path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(log))

    monkeypatch.setattr("feature_repo.ingest.file_fingerprint", refuse)
    with pytest.raises(DataSetError, match=re.escape(f"{log} cannot be read (Permission denied)")):
        ingest(Home(tmp_path / "home"), kitchen)
    assert not (tmp_path / "home").exists()


def test_a_table_may_be_a_folder_of_files(kitchen: LoadedDataSet, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    num_events = ingest(home, kitchen).manifest.num_events
    log = kitchen.data_dir / "log.csv"
    text = log.read_text()
    log.unlink()
    log.mkdir()
    (log / "part-1.csv").write_text(text)
    assert ingest(home, kitchen).manifest.num_events == num_events
    assert not ingest(home, kitchen).changed
    header = text.splitlines()[0]
    (log / "part-2.csv").write_text(f"{header}\n3,2024-03-30 10:00:00,look,new thing,\n")
    again = ingest(home, kitchen)
    assert again.changed
    assert again.manifest.num_events == num_events + 1


def test_the_same_files_give_the_same_bytes(kitchen: LoadedDataSet, tmp_path: Path) -> None:
    one, two = Home(tmp_path / "one"), Home(tmp_path / "two")
    ingest(one, kitchen)
    ingest(two, kitchen)
    assert _hashes(one.tables) == _hashes(two.tables)


def test_dry_run_shows_and_writes_nothing(kitchen: LoadedDataSet, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    summary = ingest(home, kitchen, dry_run=True)
    assert summary.manifest.num_events > 600
    assert set(summary.samples["events"][0]) >= {"user_id", "event_timestamp", "text"}
    assert not home.root.exists()


def test_bad_rows_are_set_aside_with_the_reason(kitchen: LoadedDataSet, tmp_path: Path) -> None:
    log = kitchen.data_dir / "log.csv"
    lines = log.read_text().splitlines()
    bad = {
        "user_id is missing": ",2024-01-01 10:00:00,look,a,",
        "event_timestamp is missing": "1,,look,a,",
        "event_timestamp is in the future": "1,2924-01-01 10:00:00,look,a,",
        "event_timestamp is before 1970-01-02": "1,1869-01-01 10:00:00,look,a,",
        "scene is missing": "1,2024-01-01 10:00:00,,a,",
        "scene is not a lower-case name of letters, digits and _": "1,2024-01-01 10:00:00,A b,a,",
        "text is missing": "1,2024-01-01 10:00:00,look,,",
        "text is empty": '1,2024-01-01 10:00:00,look,"  ",',
        "text has a broken encoding (control or replacement characters)": (
            "1,2024-01-01 10:00:00,look,caf\ufffd,"
        ),
        "text is longer than 1000 characters": f"1,2024-01-01 10:00:00,look,{'x' * 1001},",
        "duplicate of another row": lines[1],
    }
    log.write_text("\n".join([*lines, *bad.values()]) + "\n", encoding="utf-8")
    home = Home(tmp_path / "home")
    with pytest.raises(DataSetError, match=r"11 of \d+ rows of \[events\] cannot be used.*nothing"):
        ingest(home, kitchen)
    assert not home.tables.exists()

    toml = kitchen.path.read_text().replace(
        "replay = true", "replay = true\nreject_threshold = 0.1"
    )
    kitchen.path.write_text(toml)
    summary = ingest(home, load_dataset(kitchen.path))
    assert summary.rejected["events"] == dict.fromkeys(bad, 1)
    rejected = pq.read_table(home.rejected).to_pandas()
    assert set(rejected["reason"]) == set(bad)
    assert set(rejected["file"]) == {"log.csv"}
    first = rejected[rejected["reason"] == "user_id is missing"].iloc[0]
    assert first["row"] == len(lines)  # the header is no row
    assert '"words":"a"' in first["values"] or '"text":"a"' in first["values"]


NEGATIVES = 'negatives = { scene = "buy", per_positive = 2, window_days = 14, extra_train = true }'


def _with_extra(kitchen: LoadedDataSet, *, logged: bool) -> LoadedDataSet:
    given = f"[impressions]\nlogged = {str(logged).lower()}\n{NEGATIVES}"
    kitchen.path.write_text(kitchen.path.read_text().replace("[impressions]", given))
    return load_dataset(kitchen.path)


def test_extra_requests_stand_beside_the_sampled_rows_of_a_file(
    kitchen: LoadedDataSet, tmp_path: Path
) -> None:
    plain, home = Home(tmp_path / "plain"), Home(tmp_path / "home")
    ingest(plain, kitchen)
    summary = ingest(home, _with_extra(kitchen, logged=False))
    before = pq.read_table(plain.impressions).to_pandas()
    rows = pq.read_table(home.impressions).to_pandas()
    given, extra = rows[rows["split"] != "extra"], rows[rows["split"] == "extra"]
    assert given.reset_index(drop=True).equals(before)
    assert summary.manifest.impressions == "sampled"
    assert summary.manifest.num_impressions == len(rows) > len(before)
    assert extra["event_timestamp"].max() < given.loc[
        given["split"] == "valid", "event_timestamp"
    ].min()  # fmt: skip
    bought = ["user_id", "item_id", "event_timestamp"]
    both = extra[extra["clicked"] == 1].merge(given[given["clicked"] == 1], on=bought)
    assert both.empty
    assert extra["position"].isna().all()


BAD_INPUT = {
    "extra requests beside logged ones": (
        lambda t: t.replace("[impressions]", "[impressions]\n" + NEGATIVES),
        "would mix sampled rows with logged ones",
    ),
    "not a toml": (lambda _: "name = ", "is not a TOML file"),
    "unknown key": (lambda t: t.replace("replay", "replya"), "replya"),
    "no query": (lambda t: t.replace("[items]\nsql", "[items]\nsqll"), "items.sql"),
    "order of split": (lambda t: t.replace("2024-03-01", "2024-03-20"), "train < valid < test"),
    "missing file": (lambda t: t.replace("log.csv", "logs.csv"), "which does not exist"),
    "sql error": (
        lambda t: t.replace("words AS text", "word AS text"),
        r"query \[events\]: .*word.*\(line 1\)",
    ),
    "sql syntax": (lambda t: t.replace("SELECT sku", "SELEKT sku"), r"query \[items\].*SELEKT"),
    "missing column": (
        lambda t: t.replace("kind AS scene, ", ""),
        "column scene is missing; expected user_id, scene, text, event_timestamp",
    ),
    "unknown column": (
        lambda t: t.replace("kind AS scene", "kind AS scene, kind AS sort"),
        "unknown column sort",
    ),
    "wrong type of time": (
        lambda t: t.replace("moment AS event_timestamp, kind", "words AS event_timestamp, kind"),
        "event_timestamp must be a timestamp, got VARCHAR",
    ),
    "wrong type of user": (
        lambda t: t.replace("customer AS user_id, moment AS event_timestamp, kind",
                            "0.5 AS user_id, moment AS event_timestamp, kind"),
        "user_id must be text or an integer, got DECIMAL",
    ),
    "text in context": (
        lambda t: t.replace("clicked, position", "clicked, 'x' AS position"),
        "position must be a number, got VARCHAR",
    ),
    "column no feature name": (
        lambda t: t.replace("shelf", "shelf AS \"The Shelf\""),
        "'The Shelf' cannot name a feature",
    ),
    "column taken": (
        lambda t: t.replace("cost AS price", "cost AS buy_count_7d"),
        "buy_count_7d.*names of built features",
    ),
    "empty result": (
        lambda t: t.replace("FROM '{dir}/log.csv'", "FROM '{dir}/log.csv' WHERE words = 'no'"),
        r"\[events\] returned no rows",
    ),
    "too many scenes": (
        lambda t: t.replace("kind AS scene", "'s' || (row_number() OVER () % 20) AS scene"),
        "20 scenes",
    ),
    "no valid rows": (
        lambda t: t.replace("2024-03-01", "2025-03-01").replace("2024-03-15", "2025-03-15"),
        "no row of the valid split",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence_and_changes_nothing(
    kitchen: LoadedDataSet, tmp_path: Path, case: str
) -> None:
    change, sentence = BAD_INPUT[case]
    home = Home(tmp_path / "home")
    ingest(home, kitchen)
    before = _hashes(home.root)
    kitchen.path.write_text(change(kitchen.path.read_text()))
    with pytest.raises(DataSetError, match=sentence) as caught:
        ingest(home, load_dataset(kitchen.path))
    assert "\n" not in str(caught.value)
    assert _hashes(home.root) == before


def test_a_file_that_is_not_utf8_is_named(kitchen: LoadedDataSet, tmp_path: Path) -> None:
    log = kitchen.data_dir / "log.csv"
    log.write_bytes(log.read_bytes() + b"1,2024-01-01 10:00:00,look,caf\xe9,\n")
    with pytest.raises(DataSetError, match="latin-1"):
        ingest(Home(tmp_path / "home"), kitchen)


def test_two_ingests_at_once_do_not_mix(kitchen: LoadedDataSet, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with home.lock("tables"), pytest.raises(LongtrailError, match="another process is writing"):
        ingest(home, kitchen)


def test_the_manifest_says_now(kitchen: LoadedDataSet, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    manifest = ingest(home, kitchen).manifest
    assert (manifest.now() - manifest.last_event).total_seconds() == pytest.approx(1e-6)
    assert DataManifest.load(home.manifest, made_by="x") == manifest


def test_texts_that_the_tables_have_leave_the_log_of_live_texts(
    kitchen: LoadedDataSet, tmp_path: Path
) -> None:
    home = Home(tmp_path / "home")
    ingest(Home(tmp_path / "other"), kitchen)
    known = pq.read_table(Home(tmp_path / "other").behaviors)["text"][0].as_py()
    log = TextLog(home.live_texts)
    log.add([known, "a text that no log has"])
    ingest(home, kitchen)
    assert log.news() == ["a text that no log has"]
