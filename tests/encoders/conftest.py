"""Tiny models made on the spot, with a tokenizer of their own, and homes with a few texts."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from encoders.pretrained import quiet_transformers
from feature_repo.behavior import hash63_array
from feature_repo.home import Home

WORDS = [f"word{i}" for i in range(90)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": len(SPECIAL) + len(WORDS),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS)}
    unknown = SPECIAL[1]
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], unk_token=unknown, model_max_length=64
    )


def save(model: PreTrainedModel, folder: Path) -> Path:
    with quiet_transformers():
        model.eval().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = BertModel(BertConfig(max_position_embeddings=64, **SIZES))
    return save(model, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(num_key_value_heads=2, max_position_embeddings=64, **SIZES))
    return save(model, tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=["bert", "llama"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(f"{request.param}_folder")
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """300 distinct texts of 1 to 20 words."""
    random = np.random.default_rng(1)
    lengths = random.integers(1, 21, size=300)
    made = (" ".join(random.choice(WORDS, size=length)) for length in lengths)
    return list(dict.fromkeys(made))


@pytest.fixture
def make_home(tmp_path: Path) -> Callable[..., Home]:
    """Write the table of behaviours into a home folder; text i is first seen in second i."""

    def make(texts: Sequence[str], name: str = "home") -> Home:
        home = Home(tmp_path / name)
        home.tables.mkdir(parents=True, exist_ok=True)
        seconds = np.arange(len(texts), dtype=np.int64)
        table = pa.table(
            {
                "behavior_id": hash63_array(texts),
                "text": pa.array(texts, pa.string()),
                "first_seen": pa.array(seconds * 1_000_000, pa.timestamp("us", tz="UTC")),
                "num_events": np.ones(len(texts), dtype=np.int64),
            }
        )
        pq.write_table(table, home.behaviors)
        return home

    return make
