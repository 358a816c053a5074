"""Embedding tables on disk, as encode writes them."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from encoders.encode import SCHEMA
from encoders.table import EmbeddingTable
from feature_repo.home import Home
from feature_repo.manifest import EncoderManifest
from feature_repo.version_names import ENCODER_FILE


def save_table(
    home: Home, table: EmbeddingTable, *, model: str = "toy", current: bool = False
) -> EncoderManifest:
    """Write the part file and the manifest of a table's encoder."""
    manifest = EncoderManifest(
        model=model,
        model_fingerprint=f"weights of {model}",
        split_layer=1,
        pooling="mean",
        prompt="{text}",
        normalize=False,
        dtype="float32",
        max_tokens=8,
        width=table.width,
        fingerprint=table.fingerprint,
    )
    folder = home.embeddings / table.fingerprint
    manifest.save(folder / ENCODER_FILE)
    if current:
        manifest.save(home.encoder)
    num = len(table.ids)
    times = [datetime(2024, 1, 1, tzinfo=UTC)] * num
    rows = {
        "behavior_id": np.asarray(table.ids),
        "embedding": table.vectors[1:].tolist(),
        "encoder_fingerprint": [table.fingerprint] * num,
        "event_timestamp": times,
        "created_timestamp": times,
    }
    pq.write_table(pa.table(rows, schema=SCHEMA), folder / "part-00000.parquet")
    return manifest
