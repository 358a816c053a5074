"""The identity of an encoder: what changes a vector changes the fingerprint, and nothing else."""

import hashlib
import json
from pathlib import Path

from encoders.config import DEFAULT_MODEL, EncoderConfig
from encoders.pretrained import default_split, find_model_folder, load_config
from feature_repo.errors import EncoderError
from feature_repo.manifest import EncoderManifest

IDENTITY_FILES = (
    "config.json",
    "*.safetensors",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
)
"""Architecture, weights and tokenizer: what decides over a text's token states."""
_DIGITS = 16
"""Of 64 hexadecimal digits: it names a folder, and 64 bits tell any number of encoders apart."""


def model_fingerprint(folder: Path) -> str:
    """Hash the contents of a model's files; their place and times do not count.

    Returns:
        64 hexadecimal digits, SHA-256. Costs one read of the weights, about 1 GB/s.
    """
    names = {path.name: path for pattern in IDENTITY_FILES for path in folder.glob(pattern)}
    digests = []
    for name, path in sorted(names.items()):
        with path.open("rb") as file:
            digests.append((name, hashlib.file_digest(file, "sha256").hexdigest()))
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def describe_encoder(config: EncoderConfig) -> EncoderManifest:
    """Complete an encoder's configuration with what the model says, and take its fingerprint.

    The weights are read for their hash but not loaded.

    Raises:
        EncoderError: If the model cannot be found or the split layer is out of range.
    """
    model_config = load_config(config.model)
    folder = find_model_folder(config.model)
    num_layers: int = model_config.num_hidden_layers
    split_layer = (
        default_split(config.model, num_layers)
        if config.split_layer is None
        else config.split_layer
    )
    if not 1 <= split_layer <= num_layers:
        raise EncoderError(
            f"split layer must be in [1, {num_layers}] (the layers of model {config.model!r}), "
            f"got {split_layer}"
        )
    is_folder = config.model != DEFAULT_MODEL and Path(config.model).expanduser().is_dir()
    identity = {
        "model_fingerprint": model_fingerprint(folder),
        "split_layer": split_layer,
        "pooling": config.pooling,
        "prompt": config.prompt,
        "normalize": config.normalize,
        "dtype": config.dtype,
        "max_tokens": config.max_tokens,
        "width": model_config.hidden_size,
    }
    canonical = json.dumps(identity, sort_keys=True).encode()
    return EncoderManifest.model_validate(
        {
            **identity,
            "model": str(folder) if is_folder else config.model,
            "fingerprint": hashlib.sha256(canonical).hexdigest()[:_DIGITS],
        }
    )
