"""Every text once; a kill loses a part file at most; nothing new, nothing written."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from encoders.config import EncoderConfig
from encoders.encode import SCHEMA, encode_behaviors
from encoders.fingerprint import describe_encoder
from encoders.table import EmbeddingTable, table_encoders
from encoders.text_encoder import TextEncoder
from feature_repo.behavior import behavior_id
from feature_repo.errors import EncoderError, LongtrailError, MissingStepError
from feature_repo.home import PROJECT_ROOT, Home
from feature_repo.manifest import load_encoder

MakeHome = Callable[..., Home]

SLOW_ENCODE = """
import sys, time
from pathlib import Path
from encoders.config import EncoderConfig
from encoders.encode import encode_behaviors
from feature_repo.home import Home
encode_behaviors(
    Home(Path(sys.argv[1])),
    EncoderConfig(model=sys.argv[2], max_tokens=64, part_texts=40),
    lambda advance, total, **figures: time.sleep(0.05),
)
"""


@pytest.fixture
def config(bert_folder: Path) -> EncoderConfig:
    return EncoderConfig(model=str(bert_folder), max_tokens=64, part_texts=40)


def written(home: Home) -> dict[str, tuple[int, int]]:
    """Every file but locks, with size and time."""
    files = (path for path in home.root.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def parts(home: Home) -> list[Path]:
    return sorted(home.embeddings.glob("*/part-*.parquet"))


def test_the_offline_store_holds_every_text_once(
    make_home: MakeHome, config: EncoderConfig, texts: list[str]
) -> None:
    home = make_home(texts)
    done: list[tuple[int, int]] = []
    summary = encode_behaviors(
        home, config, lambda advance, total, **_: done.append((advance, total))
    )
    assert (summary.num_behaviors, summary.num_new) == (len(texts), len(texts))
    assert sum(advance for advance, _ in done) == len(texts)
    assert {total for _, total in done} == {len(texts)}

    assert len(parts(home)) == -(-len(texts) // 40)
    assert all(pq.read_schema(path).equals(SCHEMA) for path in parts(home))
    table = pa.concat_tables(pq.read_table(path) for path in parts(home))
    rows = {row["behavior_id"]: row for row in table.to_pylist()}
    assert len(rows) == table.num_rows == len(texts)
    expected = TextEncoder.load(describe_encoder(config)).encode(texts)
    behaviors = pq.read_table(home.behaviors).to_pylist()
    for behavior, vector in zip(behaviors, expected, strict=True):
        row = rows[behavior["behavior_id"]]
        np.testing.assert_allclose(row["embedding"], vector, rtol=0, atol=2e-6)
        assert row["event_timestamp"] == row["created_timestamp"] == behavior["first_seen"]
        assert row["encoder_fingerprint"] == summary.manifest.fingerprint

    assert load_encoder(home) == summary.manifest
    assert table_encoders(home) == [summary.manifest]
    assert {path.parent.name for path in parts(home)} == {summary.manifest.fingerprint}


def test_a_rerun_writes_nothing(
    make_home: MakeHome, config: EncoderConfig, texts: list[str]
) -> None:
    home = make_home(texts)
    encode_behaviors(home, config)
    before = written(home)
    summary = encode_behaviors(home, config)
    assert (summary.num_new, summary.texts_per_s) == (0, None)
    assert written(home) == before
    assert len(before) > 8  # part files, the table's three, the manifest, the behaviours


def test_only_new_texts_are_encoded(
    make_home: MakeHome, config: EncoderConfig, texts: list[str]
) -> None:
    first, then = texts[:100], texts
    home = make_home(first)
    encode_behaviors(home, config)
    before = {path: stat for path, stat in written(home).items() if path.endswith(".parquet")}
    make_home(then)
    summary = encode_behaviors(home, config)
    assert summary.num_new == len(then) - 100
    after = written(home)
    assert all(after[path] == stat for path, stat in before.items() if "part-" in path)
    ids = np.array([behavior_id(text) for text in then])
    assert (EmbeddingTable.open(home).rows(ids) > 0).all()


def test_a_text_that_turns_out_older_gets_an_earlier_row_too(
    make_home: MakeHome, config: EncoderConfig, texts: list[str]
) -> None:
    home = make_home(texts[:5])
    encode_behaviors(home, config)
    behaviors = pq.read_table(home.behaviors)
    older = behaviors["first_seen"][2].as_py() - timedelta(days=400)
    times = [older if n == 2 else t for n, t in enumerate(behaviors["first_seen"].to_pylist())]
    place = behaviors.schema.get_field_index("first_seen")
    field = behaviors.schema.field(place)
    changed = behaviors.set_column(place, field, pa.array(times, field.type))
    pq.write_table(changed, home.behaviors)
    assert encode_behaviors(home, config).num_new == 1
    assert encode_behaviors(home, config).num_new == 0
    rows = pa.concat_tables(pq.read_table(path) for path in parts(home)).to_pylist()
    mine = [row for row in rows if row["behavior_id"] == behaviors["behavior_id"][2].as_py()]
    assert sorted(row["event_timestamp"] for row in mine)[0] == older
    assert len(mine) == 2
    np.testing.assert_allclose(mine[0]["embedding"], mine[1]["embedding"], rtol=0, atol=2e-6)
    assert len(EmbeddingTable.open(home).ids) == 5


def test_texts_at_the_limit_are_counted(make_home: MakeHome, config: EncoderConfig) -> None:
    home = make_home(["word1", " ".join(["word2"] * 80), " ".join(["word3"] * 62)])
    assert encode_behaviors(home, config).num_at_limit == 2


def test_another_encoder_stands_beside_the_first(
    make_home: MakeHome, config: EncoderConfig, llama_folder: Path, texts: list[str]
) -> None:
    home = make_home(texts)
    first = encode_behaviors(home, config).manifest
    before = {path: stat for path, stat in written(home).items() if first.fingerprint in path}
    other = EncoderConfig(model=str(llama_folder), max_tokens=64, pooling="last")
    second = encode_behaviors(home, other).manifest
    assert load_encoder(home) == second
    assert EmbeddingTable.open(home).fingerprint == second.fingerprint != first.fingerprint
    after = written(home)
    assert all(after[path] == stat for path, stat in before.items())
    encode_behaviors(home, config)  # back again: nothing to encode, only the choice is written
    assert load_encoder(home) == first


def test_a_killed_run_is_resumed(
    make_home: MakeHome, config: EncoderConfig, texts: list[str]
) -> None:
    home = make_home(texts)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_ENCODE, str(home.root), config.model], env=environment
    )
    deadline = time.monotonic() + 120
    while not parts(home) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    survived = {path: stat for path, stat in written(home).items() if "part-" in path}
    num_survived = sum(pq.read_metadata(path).num_rows for path in parts(home))
    assert 40 <= num_survived < len(texts)
    assert not home.encoder.exists()
    with pytest.raises(MissingStepError):
        EmbeddingTable.open(home)

    summary = encode_behaviors(home, config)
    assert summary.num_new == len(texts) - num_survived
    after = written(home)
    assert all(after[p] == stat for p, stat in survived.items() if not p.endswith(".part"))
    assert not list(home.root.rglob("*.part"))
    undisturbed = make_home(texts, name="undisturbed")
    encode_behaviors(undisturbed, config)
    resumed_table, table = EmbeddingTable.open(home), EmbeddingTable.open(undisturbed)
    np.testing.assert_array_equal(resumed_table.ids, table.ids)
    np.testing.assert_allclose(resumed_table.vectors, table.vectors, rtol=0, atol=1e-6)
    assert [path.name for path in parts(home)] == [path.name for path in parts(undisturbed)]


def test_an_infinite_vector_is_never_stored(
    make_home: MakeHome, bert_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bert_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][-1] = torch.nan  # the last word's, "word89"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    home = make_home(["word1", "word89 word2"])
    with pytest.raises(EncoderError, match="no finite vector for the text 'word89 word2'"):
        encode_behaviors(home, EncoderConfig(model=str(folder), max_tokens=64))
    assert not parts(home)
    assert not home.encoder.exists()


def test_encode_wants_ingest_first(tmp_path: Path, config: EncoderConfig) -> None:
    with pytest.raises(MissingStepError, match="run `longtrail ingest` first"):
        encode_behaviors(Home(tmp_path), config)


def test_two_runs_at_once_are_refused(make_home: MakeHome, config: EncoderConfig) -> None:
    home = make_home(["word1"])
    with (
        home.lock("embeddings"),
        pytest.raises(LongtrailError, match="another process is writing embeddings"),
    ):
        encode_behaviors(home, config)
