"""Tokenizers as folders in the Hugging Face format, found by name or path."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from encoders.pretrained import quiet_transformers
from feature_repo.errors import EncoderError
from feature_repo.home import Home

TOKENIZER_FILE = "tokenizer.json"


def find_tokenizer(home: Home, name_or_folder: str) -> Path:
    """The folder of a tokenizer: one of the home's by name, else any folder, a model's too.

    Raises:
        EncoderError: If there is none.
    """
    candidates = (home.tokenizers / name_or_folder, Path(name_or_folder).expanduser())
    for folder in candidates:
        if (folder / TOKENIZER_FILE).exists():
            return folder.resolve()
    made = sorted(path.parent.name for path in home.tokenizers.glob(f"*/{TOKENIZER_FILE}"))
    raise EncoderError(
        f"there is no tokenizer {name_or_folder!r}: expected a folder with {TOKENIZER_FILE}, or "
        f"one of this home's ({', '.join(made) or 'none yet: run `longtrail lm tokenizer`'})"
    )


def read_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from its folder, which need not hold a model.

    Raises:
        EncoderError: If it cannot be loaded.
    """
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EncoderError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error
