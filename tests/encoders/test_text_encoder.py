"""A text's vector is the pooled states of the whole model's layer k, whatever is beside it."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from encoders.config import DEFAULT_MODEL, EncoderConfig, Pooling
from encoders.fingerprint import describe_encoder
from encoders.pretrained import find_model_folder, quiet_transformers
from encoders.text_encoder import TextEncoder, pool
from feature_repo.errors import EncoderError

STATES = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("mean", [[2, 3, 4, 5], [16, 17, 18, 19]]),
        ("last", [[4, 5, 6, 7], [20, 21, 22, 23]]),
        ("first", [[0, 1, 2, 3], [12, 13, 14, 15]]),
    ],
)
def test_pooling_by_hand(pooling: Pooling, expected: list[list[float]]) -> None:
    pooled = pool(STATES, MASK, pooling)
    assert (pooled.shape, pooled.dtype) == ((2, 4), torch.float32)
    assert pooled.tolist() == expected
    # Without a mask the third token of the first text counts as well; by hand again.
    first = {"mean": [4, 5, 6, 7], "last": [8, 9, 10, 11], "first": [0, 1, 2, 3]}[pooling]
    assert pool(STATES, None, pooling).tolist() == [first, expected[1]]


def test_padding_may_hold_infinite_numbers() -> None:
    states = STATES.clone()
    states[0, 2] = torch.inf
    assert pool(states, MASK, "mean").tolist() == pool(STATES, MASK, "mean").tolist()


def test_pooled_bfloat16_is_float32() -> None:
    for pooling in ("mean", "last", "first"):
        assert pool(STATES.bfloat16(), MASK, pooling).dtype == torch.float32


def load(folder: Path, batch_tokens: int = 2048, **settings: object) -> TextEncoder:
    config = EncoderConfig(model=str(folder), max_tokens=64, **settings)  # type: ignore[arg-type]
    return TextEncoder.load(describe_encoder(config), batch_tokens=batch_tokens)


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@torch.inference_mode()
def test_vectors_equal_the_whole_models_padded_states(
    model_folder: Path, texts: list[str], pooling: Pooling
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with quiet_transformers():
        model = AutoModel.from_pretrained(model_folder).eval()
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    states = model(**batch, output_hidden_states=True).hidden_states[2]
    expected = pool(states, batch["attention_mask"], pooling)
    vectors = load(model_folder, pooling=pooling).encode(texts)
    np.testing.assert_allclose(vectors, expected.numpy(), rtol=0, atol=2e-6)


@torch.inference_mode()
def test_real_model_equals_its_hidden_states() -> None:
    texts = ["bought pink cherry lights", "bought set of 3", "cancelled a white metal lantern", "x"]
    folder = find_model_folder(DEFAULT_MODEL)
    with quiet_transformers():
        model = AutoModel.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    states = model(**batch, output_hidden_states=True).hidden_states[3]
    mask = batch["attention_mask"][:, :, None]
    expected = (states * mask).sum(dim=1) / mask.sum(dim=1)
    vectors = TextEncoder.load(describe_encoder(EncoderConfig())).encode(texts)
    np.testing.assert_allclose(vectors, expected.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 100, 700, 100_000])
def test_a_vector_does_not_depend_on_its_batch(
    model_folder: Path, texts: list[str], batch_tokens: int
) -> None:
    alone = load(model_folder, batch_tokens=1)
    expected = np.concatenate([alone.encode([text]) for text in texts[:50]])
    vectors = load(model_folder, batch_tokens=batch_tokens).encode(texts)
    np.testing.assert_allclose(vectors[:50], expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(
        load(model_folder, batch_tokens=batch_tokens).encode(texts[::-1])[::-1],
        vectors,
        rtol=0,
        atol=2e-6,
    )


def test_some_batches_are_padded_in_these_tests(bert_folder: Path, texts: list[str]) -> None:
    """Else the test above would prove less than it says."""
    encoder = load(bert_folder)
    tokens = encoder.tokenize([texts])
    near = np.flatnonzero((tokens.lengths == 16) | (tokens.lengths == 17))
    assert tokens.block(near, padding_id=0)[1] is not None


def test_unit_length_prompt_and_truncation(bert_folder: Path) -> None:
    plain = load(bert_folder).encode(["word1 word2"])
    unit = load(bert_folder, normalize=True).encode(["word1 word2"])
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain), rtol=0, atol=1e-6)

    prompted = load(bert_folder, prompt="word9 {text} word8").encode(["word1 word2"])
    by_hand = load(bert_folder).encode(["word9 word1 word2 word8"])
    np.testing.assert_array_equal(prompted, by_hand)

    long = " ".join(["word5"] * 100)
    encoder = load(bert_folder)
    assert encoder.tokenize([[long]]).lengths.tolist() == [64]
    np.testing.assert_array_equal(encoder.encode([long]), encoder.encode([long + " word7"]))


def test_bfloat16_is_near_float32(bert_folder: Path, texts: list[str]) -> None:
    full = load(bert_folder).encode(texts)
    half = load(bert_folder, dtype="bfloat16").encode(texts)
    assert half.dtype == np.float32
    difference = np.abs(half - full).max() / np.abs(full).max()
    assert 0 < difference < 0.05


def test_no_texts_give_no_vectors(bert_folder: Path) -> None:
    assert load(bert_folder).encode([]).shape == (0, 16)


def test_an_infinite_vector_names_its_text(bert_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert_folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][-1] = torch.inf  # the last word's, "word89"
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    encoder = load(folder)
    assert np.isfinite(encoder.encode(["word1 word2"])).all()
    with pytest.raises(EncoderError, match="no finite vector for the text 'word3 word89'"):
        encoder.encode(["word1", "word3 word89"])


def test_a_changed_model_is_refused(bert_folder: Path) -> None:
    manifest = describe_encoder(EncoderConfig(model=str(bert_folder), max_tokens=64))
    other = manifest.model_copy(update={"model_fingerprint": "0" * 64})
    with pytest.raises(EncoderError, match="has changed since its vectors were made"):
        TextEncoder.load(other)


def test_more_tokens_than_the_model_takes_are_refused(model_folder: Path) -> None:
    config = EncoderConfig(model=str(model_folder), max_tokens=65)
    with pytest.raises(EncoderError, match=r"max_tokens must be at most 64 .*got 65"):
        TextEncoder.load(describe_encoder(config))
    TextEncoder.load(describe_encoder(dataclasses.replace(config, max_tokens=64)))
