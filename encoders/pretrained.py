"""Finding and loading a language model by name or folder, quietly and completely or not at all."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from encoders.config import DEFAULT_MODEL, DEFAULT_MODEL_SPLIT
from encoders.layout import keep_layers, layer_stack
from feature_repo.errors import EncoderError

MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""What is fetched from the hub: configuration, weights and tokenizer. Nothing pickled, no code."""
OTHER_FILES = ("*/*", "consolidated*")
"""What is not: other formats' folders, and the weights' second copy in Mistral's repositories."""

_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


def find_model_folder(name_or_folder: str) -> Path:
    """Find the folder with a model's files, fetching them from the hub if they are nowhere here.

    Args:
        name_or_folder: :data:`encoders.config.DEFAULT_MODEL`, a folder, or a name on the hub.

    Raises:
        EncoderError: If there is no such package, folder or hub model, or it has no safetensors.
    """
    if name_or_folder == DEFAULT_MODEL:
        folder = find_package_folder(DEFAULT_MODEL)
    elif Path(name_or_folder).expanduser().is_dir():
        folder = Path(name_or_folder).expanduser().resolve()
    else:
        folder = _hub_folder(name_or_folder)
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise EncoderError(
                f"model {name_or_folder!r} has no {pattern} in {folder}: expected a folder in the "
                "Hugging Face format with its weights as safetensors (save_pretrained writes one)"
            )
    return folder


def default_split(name_or_folder: str, num_layers: int) -> int:
    """Choose the layer at which a model is split where nobody says: the middle."""
    if name_or_folder == DEFAULT_MODEL:
        return DEFAULT_MODEL_SPLIT
    return max(1, num_layers // 2)


def load_config(name_or_folder: str) -> Any:
    """Read a model's configuration without its weights.

    Returns:
        A transformers configuration that has ``hidden_size`` and ``num_hidden_layers``.

    Raises:
        EncoderError: If it cannot be found or read, or is no stack of layers.
    """
    folder = find_model_folder(name_or_folder)
    with quiet_transformers(), _sentence(name_or_folder, folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    for name in ("hidden_size", "num_hidden_layers"):
        if not isinstance(getattr(config, name, None), int):
            raise EncoderError(
                f"model {name_or_folder!r} of type {config.model_type} has no {name}: only models "
                "that are one stack of layers can be split"
            )
    return config


def load_model(
    name_or_folder: str, dtype: torch.dtype = torch.float32, *, auto: Any = AutoModel
) -> PreTrainedModel:
    """Load a model with all its weights, in evaluation mode.

    Args:
        name_or_folder: See :func:`find_model_folder`.
        dtype: Of the weights.
        auto: Of transformers: ``AutoModel`` has no head, ``AutoModelForCausalLM`` one that tells
            the next token.

    Raises:
        EncoderError: If it cannot be found or loaded, or if weights are missing from its files,
            which transformers would fill with random numbers.
    """
    folder = find_model_folder(name_or_folder)
    with quiet_transformers(), _sentence(name_or_folder, folder):
        model, report = auto.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    # The pooler is a head for sentence pairs that many checkpoints lack; no half keeps it.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key.split("."))
    if missing:
        raise EncoderError(
            f"model {name_or_folder!r} in {folder} lacks {len(missing)} of its weights, the first "
            f"is {missing[0]}: the files are incomplete or belong to another architecture"
        )
    return model.to(dtype).eval()


def empty_model(name_or_folder: str, *, auto: Any = AutoModel) -> PreTrainedModel:
    """A model as :func:`load_model` loads it, its weights on torch's meta device: shapes alone.

    Raises:
        EncoderError: If it cannot be found, or its configuration cannot be read.
    """
    folder = find_model_folder(name_or_folder)
    with quiet_transformers(), _sentence(name_or_folder, folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model: PreTrainedModel = auto.from_config(config)
    return model.float().eval()


def load_whole_model(name_or_folder: str) -> PreTrainedModel:
    """Load all layers of a model for training, float32: no head above them, no cache.

    Raises:
        EncoderError: See :func:`load_model`; also if the model's layout is unknown.
    """
    model = load_model(name_or_folder)
    keep_layers(model, 0, len(layer_stack(model)))
    return model


def load_tokenizer(name_or_folder: str) -> Any:
    """Load a model's tokenizer.

    Raises:
        EncoderError: If it cannot be found or loaded.
    """
    folder = find_model_folder(name_or_folder)
    with quiet_transformers(), _sentence(name_or_folder, folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing its own bars and reports; put its settings back afterwards."""
    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


def find_package_folder(package: str) -> Path:
    """Find the model inside a pip package without importing it: that would load much more.

    Args:
        package: The pip package's name; it holds the model in its folder ``model``.

    Raises:
        EncoderError: If it is not installed or holds no model.
    """
    specification = importlib.util.find_spec(package.replace("-", "_"))
    locations = specification.submodule_search_locations if specification else None
    folder = Path(locations[0]) / "model" if locations else None
    if folder is None or not folder.is_dir():
        raise EncoderError(
            f"the model's pip package {package} with its folder model/ is not installed here: run "
            f"`pip install {package}`, or choose another model with --model FOLDER_OR_HUB_NAME"
        )
    return folder


def _hub_folder(name: str) -> Path:
    """Fetch a model from the hub or find it in the hub's cache on this machine."""
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=list(MODEL_FILES), ignore_patterns=list(OTHER_FILES)
            )
        )
    except (OSError, ValueError) as error:  # the hub's own errors are of these two kinds
        reason = str(error).strip().splitlines()[0]
        folder = Path(name).expanduser().absolute()
        raise EncoderError(
            f"model {name!r} was not found: there is no folder {folder}, "
            f"and the Hugging Face hub and its cache on this machine did not give it ({reason}); "
            "check the name, or fetch the model where there is a network and pass its folder"
        ) from error


@contextmanager
def _sentence(name_or_folder: str, folder: Path) -> Iterator[None]:
    """Turn what transformers raises into one sentence."""
    try:
        yield
    except _LOAD_ERRORS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EncoderError(
            f"model {name_or_folder!r} in {folder} cannot be loaded: {reason}"
        ) from error
