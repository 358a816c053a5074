"""Homes with a small corpus and a tokenizer: sentences of a grammar that a small model learns."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from encoders.lm.corpus import (
    DOCUMENT_SCHEMA,
    SPLITS,
    CorpusManifest,
    MixtureConfig,
    SourceSummary,
    SplitSize,
    manifest_path,
)
from encoders.lm.recipes import LearningConfig, ModelShape, PretrainingConfig
from encoders.pretrained import quiet_transformers
from feature_repo.behavior import hash63_array
from feature_repo.home import Home
from tests.encoders.lm.planted_models import SPECIAL, byte_tokenizer

UNTIL = datetime(2024, 3, 1, tzinfo=UTC)
_ADJECTIVES = ("red", "small", "paper", "glass", "vintage", "silver")
_NOUNS = ("lantern", "teapot", "clock", "basket", "frame", "candle", "mug")

Texts = Mapping[str, Mapping[str, Sequence[str]]]
"""Source -> split -> texts."""


def listings(number: int, *, seed: int) -> list[str]:
    """Short documents of a few words each."""
    random = np.random.default_rng(seed)
    return [
        " ".join((*random.choice(_ADJECTIVES, size=random.integers(1, 4)), random.choice(_NOUNS)))
        for _ in range(number)
    ]


def baskets(number: int, *, seed: int) -> list[str]:
    """Longer documents: up to 12 listings each."""
    random = np.random.default_rng(seed)
    return [
        ", ".join(listings(int(random.integers(1, 12)), seed=int(random.integers(1 << 30))))
        for _ in range(number)
    ]


def texts() -> dict[str, dict[str, list[str]]]:
    """A source of the domain with short and one with long documents, and a general one."""
    return {
        "listings": {
            s: listings(n, seed=i) for i, (s, n) in enumerate([("train", 300), ("valid", 40)])
        },
        "baskets": {
            s: baskets(n, seed=i) for i, (s, n) in enumerate([("train", 60), ("valid", 10)])
        },
        "prose": {"train": [f"return the value number {i}" for i in range(80)], "valid": ["end."]},
    }


def write_corpus(home: Home, sources: Texts, *, fingerprint: str = "corpus") -> CorpusManifest:
    """Write a corpus as ``lm corpus`` would."""
    summaries = {}
    for source, splits in sources.items():
        sizes = {}
        for split in SPLITS:
            rows = list(splits.get(split, []))
            table = pa.table(
                {
                    "document_id": hash63_array(rows),
                    "text": pa.array(rows, pa.string()),
                    "time": pa.array([UNTIL] * len(rows), pa.timestamp("us", tz="UTC")),
                },
                schema=DOCUMENT_SCHEMA,
            )
            path = home.corpus / split / f"{source}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
            sizes[split] = SplitSize(
                documents=len(rows), bytes=sum(len(text.encode()) for text in rows)
            )
        summaries[source] = SourceSummary(
            kind="general" if source == "prose" else "domain",
            origin="made up",
            fingerprint=source,
            splits=sizes,
            dropped={},
            languages={},
            scrubbed={},
        )
    manifest = CorpusManifest(
        created=UNTIL,
        fingerprint=fingerprint,
        dataset="made up",
        until=UNTIL,
        sources=summaries,
        special_tokens=tuple(SPECIAL),
        mixture=MixtureConfig(),
        options={},
    )
    manifest.save(manifest_path(home))
    return manifest


def write_tokenizer(home: Home, name: str = "domain") -> Any:
    """A byte-level tokenizer with a few merges, in the home's folder."""
    made = texts()
    tokenizer = byte_tokenizer(
        [*made["listings"]["train"], *made["prose"]["train"]], num_tokens=320
    )
    with quiet_transformers():
        tokenizer.save_pretrained(home.tokenizers / name)
    return tokenizer


def make_home(root: Path) -> Home:
    """A home in which a model can be pretrained."""
    home = Home(root)
    write_corpus(home, texts())
    write_tokenizer(home)
    return home


def small(**changes: Any) -> PretrainingConfig:
    """A recipe of a second."""
    learning = LearningConfig(
        steps=12,
        batch_rows=8,
        pass_rows=4,
        learning_rate=1e-2,
        warmup_steps=2,
        precision="float32",
        checkpoint_steps=4,
        num_snapshots=3,
        snapshot_share=0.5,
        num_validations=2,
    )
    shape = ModelShape(
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=4,
        num_key_value_heads=2,
        sequence_length=32,
        tied=True,
    )
    return PretrainingConfig("small", shape, replace(learning, **changes), validation_bytes=400)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a model folder, by name."""
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def assert_equal_weights(one: Path, other: Path) -> None:
    """Every bit of two model folders."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
