"""Texts never seen before: a vector in every place, at once, in every process."""

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import normalizers
from transformers import BertConfig, BertModel

from encoders.config import EncoderConfig
from encoders.encode import SCHEMA, embedding_rows, encode_behaviors
from encoders.encode import TIME as TIME_TYPE
from encoders.live_files import add_live, live_files, live_rows
from encoders.live_texts import LiveTexts, append_live
from encoders.pretrained import quiet_transformers
from encoders.table import EmbeddingTable
from encoders.table_files import SPARE_ROWS
from encoders.text_encoder import TextEncoder
from feature_repo.behavior import behavior_id, hash63_array
from feature_repo.catalog import Catalog
from feature_repo.home import Home
from feature_repo.manifest import load_encoder
from feature_repo.offline_files import batch_parts
from feature_repo.text_log import TextLog
from tests.encoders.conftest import SIZES, make_tokenizer, save

KNOWN = ["word1 word2", "word3"]
TIME = 1_700_000_000_000_000


class Pushed(list[pa.Table]):
    """Stands where the online store is."""

    def __call__(self, rows: pa.Table) -> None:
        self.append(rows)

    @property
    def ids(self) -> list[int]:
        return [key for rows in self for key in rows["behavior_id"].to_pylist()]


def config(model: Path) -> EncoderConfig:
    return EncoderConfig(model=str(model), split_layer=2, max_tokens=16)


@pytest.fixture
def home(make_home: Callable[..., Home], bert_folder: Path) -> Home:
    made = make_home(KNOWN)
    encode_behaviors(made, config(bert_folder))
    return made


@pytest.fixture
def pushed() -> Pushed:
    return Pushed()


@pytest.fixture
def texts(home: Home, pushed: Pushed) -> LiveTexts:
    return LiveTexts.open(home, load_encoder(home).fingerprint, pushed)


def rows(table: EmbeddingTable, wanted: Sequence[str]) -> list[int]:
    found: list[int] = table.rows(hash63_array(wanted)).tolist()
    return found


def vectors(home: Home, wanted: Sequence[str]) -> np.ndarray:
    with quiet_transformers():
        return TextEncoder.load(load_encoder(home)).encode(wanted)


def test_a_new_text_is_in_every_place(home: Home, texts: LiveTexts, pushed: Pushed) -> None:
    table, catalog = EmbeddingTable.open(home), TextLog(home.live_texts)
    assert texts.add({"word5 word6": TIME, "word3": TIME}) == {}
    assert table.refreshed() is not table
    edition = table.edition
    table = table.refreshed()
    assert table.edition == edition
    assert rows(table, [*KNOWN, "word5 word6"]) == [*rows(table, KNOWN), 3]
    assert table.ids[2] == behavior_id("word5 word6")
    np.testing.assert_allclose(table.vectors[3], vectors(home, ["word5 word6"])[0], atol=1e-6)
    assert not table.vectors[0].any()
    assert len(table) == 4
    assert pushed.ids == [behavior_id("word5 word6")]
    assert catalog.news() == ["word5 word6"]
    live = live_rows(home.embeddings / table.fingerprint, SCHEMA)
    assert live["behavior_id"].to_pylist() == pushed.ids
    assert live["event_timestamp"].cast(pa.int64()).to_pylist() == [TIME]
    np.testing.assert_array_equal(live["embedding"][0].values.to_numpy(), table.vectors[3])
    # Known by now.
    assert texts.add({"word5 word6": TIME}) == {}
    assert table.refreshed() is table
    assert len(pushed) == 1


def add_word6(home: Home, fingerprint: str) -> None:
    """In another process."""
    assert rows(EmbeddingTable.open(home), ["word5"]) == [3]
    LiveTexts.open(home, fingerprint, Pushed()).add({"word5": TIME, "word6": TIME})


def test_another_process_sees_it_and_adds_its_own(home: Home, texts: LiveTexts) -> None:
    texts.add({"word5": TIME})
    table = EmbeddingTable.open(home)
    process = multiprocessing.get_context("fork").Process(
        target=add_word6, args=(home, table.fingerprint)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    assert rows(table, ["word6"]) == [0]
    table = table.refreshed()
    assert rows(table, ["word5", "word6"]) == [3, 4]
    np.testing.assert_allclose(table.vectors[4], vectors(home, ["word6"])[0], atol=1e-6)


def test_a_table_of_a_former_version_gets_room(home: Home, texts: LiveTexts) -> None:
    folder = home.embeddings / load_encoder(home).fingerprint / "table"
    old = np.load(folder / "vectors.npy")[:3]
    np.save(folder / "vectors.npy", old)
    (folder / "live.ids").unlink()
    table = EmbeddingTable.open(home)
    assert len(table) == 3
    assert table.refreshed() is table
    texts.add({"word5": TIME})
    assert rows(table.refreshed(), [*KNOWN, "word5"]) == [*rows(table, KNOWN), 3]


def test_a_full_table_is_made_anew_with_more_room(
    home: Home, texts: LiveTexts, bert_folder: Path
) -> None:
    texts.add({"word5": TIME})
    folder = home.embeddings / load_encoder(home).fingerprint / "table"
    full = np.load(folder / "vectors.npy")[:4]
    np.save(folder / "vectors.npy", full)
    table = EmbeddingTable.open(home)
    texts.add({"word6": TIME})
    refreshed = table.refreshed()
    assert rows(refreshed, ["word5", "word6"]) == [3, 4]
    np.testing.assert_array_equal(refreshed.vectors[:4], full)
    assert len(np.load(folder / "vectors.npy", mmap_mode="r")) == 5 + SPARE_ROWS
    assert (folder / "vectors.npy").stat().st_blocks * 512 < 2**20  # spare rows take no room


def test_what_a_kill_left_between_two_files_is_made_good(
    home: Home, texts: LiveTexts, pushed: Pushed
) -> None:
    texts.add({"word5": TIME})
    folder = home.embeddings / load_encoder(home).fingerprint / "table"
    live_ids = (folder / "live.ids").read_bytes()
    (folder / "live.ids").write_bytes(live_ids[:5])  # killed within the id
    assert rows(EmbeddingTable.open(home), ["word5"]) == [0]
    LiveTexts.open(home, load_encoder(home).fingerprint, pushed)
    assert (folder / "live.ids").read_bytes() == live_ids
    assert rows(EmbeddingTable.open(home), ["word5"]) == [3]


def test_encode_takes_live_texts_over(
    home: Home, texts: LiveTexts, make_home: Callable[..., Home], bert_folder: Path
) -> None:
    texts.add({"word5": TIME, "word6 word7": TIME})
    table = EmbeddingTable.open(home)
    before = table.vectors[rows(table, ["word5"])[0]].copy()
    make_home([*KNOWN, "word5"])  # ingest found one of them
    encode_behaviors(home, config(bert_folder))
    after = table.refreshed()
    assert len(after) == len(table)
    assert after.edition != table.edition
    np.testing.assert_allclose(after.vectors[rows(after, ["word5"])[0]], before, atol=1e-6)
    live = live_rows(home.embeddings / table.fingerprint, SCHEMA)
    assert live["behavior_id"].to_pylist() == [behavior_id("word6 word7")]
    assert rows(after, ["word6 word7"]) == [4]
    make_home([*KNOWN, "word5", "word6 word7"])
    encode_behaviors(home, config(bert_folder))
    assert not live_files(home.embeddings / table.fingerprint)
    assert len(after.refreshed()) == len(table)
    texts.add({"word8": TIME})
    assert rows(after.refreshed(), ["word8"]) == [5]


def test_a_text_without_tokens_has_a_sentence_and_spoils_no_other(
    make_home: Callable[..., Home], tmp_path: Path, pushed: Pushed
) -> None:
    torch.manual_seed(0)
    folder = save(BertModel(BertConfig(max_position_embeddings=64, **SIZES)), tmp_path / "picky")
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("!", "")
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(folder)
    home = make_home(KNOWN)
    encode_behaviors(home, config(folder))
    texts = LiveTexts.open(home, load_encoder(home).fingerprint, pushed)
    failed = texts.add({"!!!": TIME, "word4": TIME})
    assert failed == {"!!!": "the tokenizer finds no token in the text '!!!'"}
    assert pushed.ids == [behavior_id("word4")]
    assert rows(EmbeddingTable.open(home), ["!!!", "word4"]) == [0, 3]


def test_where_the_online_store_is_away_nothing_was_added(home: Home) -> None:
    def away(_: pa.Table) -> None:
        raise ValueError("away")

    texts = LiveTexts.open(home, load_encoder(home).fingerprint, away)
    with pytest.raises(ValueError, match="away"):
        texts.add({"word5": TIME})
    assert rows(EmbeddingTable.open(home), ["word5"]) == [0]
    assert not home.live_texts.exists()


def test_the_log_of_texts_survives_a_part_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    reader, writer = TextLog(path), TextLog(path)
    assert reader.news() == []
    writer.add(["straße\n東京", "a"])
    assert reader.news() == ["straße\n東京", "a"]
    assert reader.news() == []
    with path.open("ab") as file:
        file.write(b'"half a li')  # killed
    assert reader.news() == []
    writer.add(["b"])
    assert reader.news() == ["b"]
    assert TextLog(path).news() == ["straße\n東京", "a", "b"]


def test_a_catalog_takes_new_texts_in(home: Home, texts: LiveTexts) -> None:
    catalog = Catalog(np.array([], dtype=object), {}, {}, TextLog(home.live_texts))
    texts.add({"word5": TIME})
    assert catalog.texts(hash63_array(["word5"])) == [""]
    catalog.refresh()
    assert catalog.texts(hash63_array(["word5"])) == ["word5"]


def rows_of(ids: range, fingerprint: str = "fp", width: int = 2) -> pa.Table:
    times = pa.array([TIME] * len(ids), pa.int64()).cast(TIME_TYPE)
    return embedding_rows(
        pa.array(list(ids)), np.ones((len(ids), width), np.float32), fingerprint, times
    )


def test_a_file_of_live_rows_that_is_full_is_never_written_again(tmp_path: Path) -> None:
    add_live(tmp_path, rows_of(range(1, 200)))
    add_live(tmp_path, rows_of(range(200, 300)))
    (full,) = live_files(tmp_path)
    before = full.stat()
    for number in range(300, 303):
        add_live(tmp_path, rows_of(range(number, number + 1)))
    assert full.stat().st_ino == before.st_ino
    assert [pq.read_metadata(file).num_rows for file in live_files(tmp_path)] == [299, 3]
    assert live_rows(tmp_path, SCHEMA)["behavior_id"].to_pylist() == list(range(1, 303))
    parts = {file.name: [1, 1] for file in live_files(tmp_path)}
    assert batch_parts(parts | {"live.parquet": [1, 1], "part-0.parquet": [1, 1]}) == {
        "part-0.parquet": [1, 1]
    }


def test_what_a_kill_left_in_the_files_alone_counts_once(home: Home, texts: LiveTexts) -> None:
    encoder = load_encoder(home)
    left = rows_of(range(7, 9), encoder.fingerprint, encoder.width)
    add_live(home.embeddings / encoder.fingerprint, left)  # and killed
    append_live(
        home, encoder.fingerprint, rows_of(range(8, 10), encoder.fingerprint, encoder.width)
    )
    assert EmbeddingTable.open(home).ids[2:].tolist() == [7, 8, 9]
    live = live_rows(home.embeddings / encoder.fingerprint, SCHEMA)
    assert live["behavior_id"].to_pylist() == [7, 8, 9]


def test_a_live_text_never_builds_the_table_while_encode_writes_parts(
    home: Home, texts: LiveTexts
) -> None:
    encoder = load_encoder(home)
    before = EmbeddingTable.open(home)
    part = rows_of(range(5, 7), encoder.fingerprint, encoder.width)
    pq.write_table(part, home.embeddings / encoder.fingerprint / "part-00009.parquet")
    texts.add({"word5": TIME})
    assert before.refreshed().edition == before.edition
    assert rows(before.refreshed(), ["word5"]) == [3]
    assert EmbeddingTable.open(home).ids.tolist()[-1] == behavior_id("word5")
    assert len(EmbeddingTable.open(home)) == 6


def test_a_log_that_was_shortened_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    reader, writer = TextLog(path), TextLog(path)
    writer.forget({1})
    assert not path.exists()
    writer.add(["a", "b", "c"])
    assert reader.news() == ["a", "b", "c"]
    writer.forget({behavior_id("a"), behavior_id("c"), 5})
    writer.add(["d", "e"])  # as long as before
    assert reader.news() == ["b", "d", "e"]
    assert reader.news() == []
    writer.add(["x" * 10_000])
    with path.open("ab") as file:
        file.write(b"y" * 9_000)  # killed
    writer.add(["z"])
    assert reader.news() == ["x" * 10_000, "z"]
