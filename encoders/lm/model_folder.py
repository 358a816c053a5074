"""Language models as folders in the Hugging Face format, with the tokenizer inside."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from transformers import AutoModelForCausalLM

from encoders.lm.documents import end_token
from encoders.pretrained import (
    empty_model,
    find_model_folder,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from feature_repo.errors import EncoderError, MissingStepError
from feature_repo.home import Home
from feature_repo.manifest import Document

Made = TypeVar("Made", bound=Document)

PRETRAINING_FILE = "pretraining.json"
"""What a model made by ``lm pretrain`` tells of itself (:mod:`encoders.lm.pretraining`)."""
CHECKPOINTS = "checkpoints"
"""Folder in it with ``step-<N>/``: weights alone, for ``lm average``."""
WEIGHTS_FILE = "model.safetensors"


def find_language_model(home: Home, name_or_folder: str) -> Path:
    """The folder of a model: one of the home's by name, else any folder or name on the hub.

    Raises:
        EncoderError: If there is none.
    """
    made_here = home.models / name_or_folder
    if (made_here / "config.json").exists():
        return made_here
    return find_model_folder(name_or_folder)


def check_model_name(name: str) -> None:
    """Refuse a name that is no folder's.

    Raises:
        EncoderError: If it is none.
    """
    if name != Path(name).name or name.startswith(".") or name.endswith(".part") or not name:
        raise EncoderError(f"a model's name must be a plain file name, got {name!r}: give --name")


def latest_model(home: Home, file: str, *, made_by: str) -> Path:
    """The home's model whose ``file`` was written last.

    Args:
        home: Whose.
        file: What such models have in their folder, as :data:`PRETRAINING_FILE`.
        made_by: Command that makes one.

    Raises:
        MissingStepError: If there is none.
    """
    newest = newest_model(home, file)
    if newest is None:
        raise MissingStepError(f"{home.models} has no such model yet: run `{made_by}` first")
    return newest


def newest_model(home: Home, *files: str) -> Path | None:
    """The home's finished model that has the file, of any of these, that was written last."""
    found = [path for file in files for path in home.models.glob(f"*/{file}")]
    whole = [path for path in found if path.parent.suffix != ".part"]
    return max(whole, key=lambda path: path.stat().st_mtime_ns).parent if whole else None


def finished_model(
    folder: Path,
    file: str,
    kind: type[Made],
    *,
    made_by: str,
    is_same: Callable[[Made], bool],
    otherwise: str,
) -> Made | None:
    """What a command before this one has finished; None where there is nothing.

    Args:
        folder: Of the model.
        file: What such models have in their folder.
        kind: Of what the file tells.
        made_by: Command that makes one.
        is_same: Whether the model would be made anew just so.
        otherwise: What another one was made from, for people.

    Raises:
        EncoderError: If it is something else.
    """
    if not folder.exists():
        return None
    if (folder / file).exists():
        manifest = kind.load(folder / file, made_by=made_by)
        if is_same(manifest):
            return manifest
    raise EncoderError(
        f"{folder} exists already, made {otherwise}: give another --name, or delete it"
    )


def load_language_model(folder: str | Path, *, empty: bool = False) -> tuple[Any, Any]:
    """A causal model in evaluation mode, float32 on the CPU, and its tokenizer.

    Args:
        folder: Or a name on the hub.
        empty: Leave the weights on torch's meta device, where they take no memory.

    Raises:
        EncoderError: If one of them cannot be loaded, or they do not fit together.
    """
    if empty:
        model = empty_model(str(folder), auto=AutoModelForCausalLM)
    else:
        model = load_model(str(folder), auto=AutoModelForCausalLM)
    tokenizer = load_tokenizer(str(folder))
    check_fit(model, tokenizer, str(folder))
    return model, tokenizer


def check_fit(model: Any, tokenizer: Any, name: str) -> None:
    """Make sure that a model has a vector for every token.

    Raises:
        EncoderError: If it has not, or if documents have no end.
    """
    rows, tokens = model.get_input_embeddings().num_embeddings, len(tokenizer)
    if tokens > rows:
        raise EncoderError(
            f"the tokenizer in {name} has {tokens:,} tokens, its model vectors for {rows:,}: they "
            "do not belong together; `longtrail lm extend --model` enlarges both"
        )
    end_token(tokenizer)


def save_language_model(
    model: Any, tokenizer: Any, folder: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model and its tokenizer into a folder.

    Args:
        model: Of transformers.
        tokenizer: The model's.
        folder: Where to.
        weights: By parameter name, instead of the model's own.
    """
    with quiet_transformers():
        model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
        tokenizer.save_pretrained(folder)
