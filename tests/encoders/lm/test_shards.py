"""Shards hold every document once, and a killed run goes on after the last complete source."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from encoders.lm.shards import MANIFEST_FILE, make_shards, open_shards, tokenizer_fingerprint
from feature_repo.errors import EncoderError, MissingStepError
from feature_repo.home import Home
from tests.encoders.lm.planted_models import byte_tokenizer
from tests.encoders.lm.small_corpus import texts, write_corpus


class Killed(BaseException):
    """Stands for a signal: nothing but the files remains."""


def test_documents_come_back(tmp_path: Path) -> None:
    home, tokenizer = Home(tmp_path), byte_tokenizer()
    write_corpus(home, texts())
    told: list[int] = []

    def progress(advance: int, total: int, **figures: float) -> None:
        told.append(advance)

    shards = make_shards(home, tokenizer, progress=progress)
    sources = texts()
    assert set(shards) == {"train", "valid", "test"}
    for split, by_source in shards.items():
        for source, shard in by_source.items():
            expected = sources[source].get(split, [])
            assert shard.tokens.dtype == np.uint16
            assert len(shard.stops) == len(expected)
            assert shard.num_bytes.tolist() == [len(text.encode()) for text in expected]
            for index, text in enumerate(expected):
                tokens = shard.document(index)
                assert tokens[-1] == tokenizer.eos_token_id
                assert tokenizer.decode(tokens[:-1]) == text
            assert shard.num_tokens == len(shard.tokens) == shard.lengths.sum()
    assert sum(told) == sum(
        len(t.encode()) for s in sources.values() for p in s.values() for t in p
    )


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    home, tokenizer = Home(tmp_path), byte_tokenizer()
    write_corpus(home, texts())

    def kill(advance: int, total: int, **figures: float) -> None:
        if next(home.shards.glob("*/train/listings.index.npy"), None):
            raise Killed

    with pytest.raises(MissingStepError, match="does not exist yet: run `longtrail lm pretrain`"):
        open_shards(home, tokenizer)
    with pytest.raises(Killed):
        make_shards(home, tokenizer, progress=kill)
    (done,) = home.shards.glob("*/train/listings.index.npy")
    written = done.stat().st_mtime_ns
    assert not list(home.shards.glob("*/valid/*.npy"))
    make_shards(home, tokenizer)
    assert done.stat().st_mtime_ns == written
    assert len(list(home.shards.glob("*/*/*.npy"))) == 9
    assert not list(home.shards.rglob("*.part"))


def test_each_corpus_and_tokenizer_has_its_own(tmp_path: Path) -> None:
    home = Home(tmp_path)
    write_corpus(home, texts())
    make_shards(home, byte_tokenizer())
    merged = byte_tokenizer(texts()["listings"]["train"], num_tokens=300)
    fewer = make_shards(home, merged)["train"]["listings"].num_tokens
    assert fewer < make_shards(home, byte_tokenizer())["train"]["listings"].num_tokens
    write_corpus(home, {"listings": {"train": ["new"]}}, fingerprint="other")
    assert make_shards(home, merged)["train"]["listings"].num_tokens < fewer
    assert len(list(home.shards.glob(f"*/{MANIFEST_FILE}"))) == 3


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    class Large:
        """65,537 tokens; a text's tokens are the last one, as often as it has characters."""

        eos_token_id = 0
        name_or_path = "large"

        def __len__(self) -> int:
            return (1 << 16) + 1

        def __call__(self, rows: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1 << 16] * len(row) for row in rows]}

        @property
        def backend_tokenizer(self) -> Any:
            return byte_tokenizer().backend_tokenizer

    home = Home(tmp_path)
    write_corpus(home, {"listings": {"train": ["mug"]}})
    shard = make_shards(home, Large())["train"]["listings"]
    assert shard.tokens.dtype == np.uint32
    assert shard.document(0).tolist() == [1 << 16] * 3 + [0]


def test_slow_tokenizers_get_a_sentence() -> None:
    class Slow:
        name_or_path = "slow"

    with pytest.raises(EncoderError, match=r"'slow' has no tokenizer\.json: a fast tokenizer"):
        tokenizer_fingerprint(Slow())
