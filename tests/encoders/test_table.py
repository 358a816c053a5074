"""The memory-mapped table gives the right vector for any id, and never another encoder's."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from encoders.config import EncoderConfig
from encoders.encode import encode_behaviors
from encoders.table import EmbeddingTable, table_encoder, table_encoders
from encoders.text_encoder import TextEncoder
from feature_repo.behavior import hash63_array
from feature_repo.errors import EncoderError, MissingStepError
from feature_repo.home import Home

MakeHome = Callable[..., Home]
IDS = st.integers(1, 2**63 - 1)


@settings(derandomize=True, deadline=None)
@given(known=st.sets(IDS, max_size=30), unknown=st.lists(IDS, max_size=10))
def test_rows_agree_with_a_dictionary(known: set[int], unknown: list[int]) -> None:
    ids = np.array(sorted(known), dtype=np.int64)
    vectors = np.zeros((len(ids) + 1, 2), dtype=np.float32)
    table = EmbeddingTable(ids, vectors, "f")
    expected = {value: row for row, value in enumerate(sorted(known), start=1)}
    asked = [*known, *unknown, 0, *(value - 1 for value in known)]
    assert table.rows(np.array(asked, dtype=np.int64)).tolist() == [
        expected.get(value, 0) for value in asked
    ]


def test_ids_above_2_to_the_53_are_told_apart() -> None:
    ids = np.array([2**53, 2**53 + 1, 2**63 - 2, 2**63 - 1], dtype=np.int64)
    table = EmbeddingTable(ids, np.zeros((5, 2), dtype=np.float32), "f")
    asked = np.array([[2**53 + 1, 2**53 + 2], [2**63 - 1, 2**63 - 2]], dtype=np.int64)
    assert table.rows(asked).tolist() == [[2, 0], [4, 3]]


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)])
def test_rows_keep_the_shape(shape: tuple[int, ...]) -> None:
    table = EmbeddingTable(np.array([7]), np.zeros((2, 2), dtype=np.float32), "f")
    rows = table.rows(np.full(shape, 7, dtype=np.int64))
    assert rows.shape == shape
    assert rows.dtype == np.int64
    assert (rows == 1).all()


def test_ids_that_went_through_a_float_are_refused() -> None:
    table = EmbeddingTable(np.array([7]), np.zeros((2, 2), dtype=np.float32), "f")
    with pytest.raises(ValueError, match="must be int64, got float64"):
        table.rows(np.array([7.0]))


def test_arrays_must_fit() -> None:
    with pytest.raises(EncoderError, match=r"1 ids must have 2 vectors, got .*\(3, 2\)"):
        EmbeddingTable(np.array([7]), np.zeros((3, 2), dtype=np.float32), "f")


@pytest.fixture
def config(bert_folder: Path) -> EncoderConfig:
    return EncoderConfig(model=str(bert_folder), max_tokens=64, part_texts=40)


@pytest.fixture
def home(make_home: MakeHome, config: EncoderConfig, texts: list[str]) -> Home:
    home = make_home(texts)
    encode_behaviors(home, config)
    return home


def test_every_text_has_its_vector(home: Home, config: EncoderConfig, texts: list[str]) -> None:
    table = EmbeddingTable.open(home)
    manifest = encode_behaviors(home, config).manifest
    assert (len(table), table.width, table.fingerprint) == (
        len(texts) + 1,
        16,
        manifest.fingerprint,
    )
    assert not table.vectors[0].any()
    vectors = table.vectors[table.rows(hash63_array(texts))]
    expected = TextEncoder.load(manifest).encode(texts)
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=2e-6)


def test_torch_maps_the_vectors_without_copy_or_warning(home: Home) -> None:
    table = EmbeddingTable.open(home)
    assert isinstance(table.vectors, np.memmap)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = torch.from_numpy(table.vectors)
    assert tensor.data_ptr() == table.vectors.ctypes.data
    tensor[0] = 1.0  # a private copy of that page: the file stays as it is
    assert not EmbeddingTable.open(home).vectors[0].any()


def test_a_present_table_is_not_built_again(home: Home) -> None:
    path = next(home.embeddings.glob("*/table/vectors.npy"))
    before = path.stat().st_mtime_ns
    EmbeddingTable.open(home)
    assert path.stat().st_mtime_ns == before


def test_a_new_part_file_makes_a_new_table(home: Home, texts: list[str]) -> None:
    before = EmbeddingTable.open(home)
    parts = sorted(home.embeddings.glob("*/part-*.parquet"))
    last = pq.read_table(parts[-1])
    parts[-1].unlink()
    assert len(EmbeddingTable.open(home)) == len(before) - last.num_rows
    pq.write_table(last, parts[-1].with_name("part-00099.parquet"))
    table = EmbeddingTable.open(home)
    np.testing.assert_array_equal(table.ids, before.ids)
    np.testing.assert_array_equal(table.vectors, before.vectors)


def test_a_missing_table_is_built(home: Home) -> None:
    before = EmbeddingTable.open(home)
    next(home.embeddings.glob("*/table/ids.npy")).unlink()
    np.testing.assert_array_equal(EmbeddingTable.open(home).ids, before.ids)


def test_no_part_file_is_below_the_table(home: Home) -> None:
    """The offline store reads ``*.parquet`` in this folder: it must see part files only."""
    folder = next(home.embeddings.iterdir())
    assert all(path.name.startswith("part-") for path in folder.rglob("*.parquet"))
    assert sorted(path.name for path in (folder / "table").iterdir()) == [
        "ids.npy",
        "live.ids",
        "table.json",
        "vectors.npy",
    ]


def test_another_encoders_part_is_refused(home: Home) -> None:
    part = sorted(home.embeddings.glob("*/part-*.parquet"))[0]
    table = pq.read_table(part)
    column = table.schema.get_field_index("encoder_fingerprint")
    strangers = pa.array(["stranger"] * table.num_rows)
    pq.write_table(table.set_column(column, "encoder_fingerprint", strangers), part)
    with pytest.raises(EncoderError, match="holds vectors of encoder stranger, expected"):
        EmbeddingTable.open(home)


def test_vectors_of_another_width_are_refused(home: Home) -> None:
    part = sorted(home.embeddings.glob("*/part-*.parquet"))[0]
    table = pq.read_table(part)
    column = table.schema.get_field_index("embedding")
    shorter = pc.list_slice(table["embedding"], 0, 15)
    pq.write_table(table.set_column(column, "embedding", shorter), part)
    with pytest.raises(EncoderError, match="vectors that are not 16 long"):
        EmbeddingTable.open(home)


def test_a_model_trained_on_other_vectors_is_refused(home: Home) -> None:
    fingerprint = EmbeddingTable.open(home).fingerprint
    assert len(EmbeddingTable.open(home, fingerprint=fingerprint)) > 1
    with pytest.raises(EncoderError, match="expected vectors of encoder 0123, but those in"):
        EmbeddingTable.open(home, fingerprint="0123")


def test_an_earlier_encoders_table_can_still_be_opened(
    home: Home, config: EncoderConfig, llama_folder: Path, texts: list[str]
) -> None:
    first = EmbeddingTable.open(home)
    manifest = table_encoder(home)
    second = encode_behaviors(home, EncoderConfig(model=str(llama_folder), max_tokens=64)).manifest
    assert table_encoder(home) == second
    assert table_encoder(home, first.fingerprint) == manifest
    assert {e.fingerprint for e in table_encoders(home)} == {first.fingerprint, second.fingerprint}
    again = EmbeddingTable.open(home, fingerprint=first.fingerprint)
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.vectors, first.vectors)
    assert EmbeddingTable.open(home).fingerprint == second.fingerprint


def test_open_wants_encode_first(home: Home, tmp_path: Path) -> None:
    with pytest.raises(MissingStepError, match="run `longtrail encode` first"):
        EmbeddingTable.open(Home(tmp_path / "empty"))
    for part in home.embeddings.glob("*/part-*.parquet"):
        part.unlink()
    with pytest.raises(MissingStepError, match="holds no vectors: run `longtrail encode` first"):
        EmbeddingTable.open(home)
