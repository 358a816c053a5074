"""Which models a command takes where none is named: the last of each step."""

from pathlib import Path

from encoders.lm.averaging import AVERAGING_FILE, AveragingManifest
from encoders.lm.instruction_tuning import TUNING_FILE, InstructionTuningManifest
from encoders.lm.model_folder import PRETRAINING_FILE, latest_model, newest_model
from feature_repo.errors import MissingStepError
from feature_repo.home import Home


def model_to_tune(home: Home) -> Path:
    """The last average of the home.

    Raises:
        MissingStepError: If there is none.
    """
    return latest_model(home, AVERAGING_FILE, made_by="longtrail lm average")


def models_to_compare(home: Home) -> list[Path]:
    """The model that was made last, and before it those that it was made from, first of all.

    Raises:
        MissingStepError: If the home has no model.
    """
    # A model's own file is newer than those that it was copied with.
    newest = newest_model(home, TUNING_FILE, AVERAGING_FILE, PRETRAINING_FILE)
    if newest is None:
        raise MissingStepError(
            f"{home.models} has no model yet: run `longtrail lm pretrain` first, or name a folder"
        )
    chain = [newest]
    while (base := _base(chain[0])) is not None and base not in chain:
        chain.insert(0, base)
    return chain


def _base(folder: Path) -> Path | None:
    """The folder that a model was tuned or averaged from, if it is still there."""
    base: str | None = None
    if (folder / TUNING_FILE).exists():
        made_by = "longtrail lm tune"
        base = InstructionTuningManifest.load(folder / TUNING_FILE, made_by=made_by).base_model
    elif (folder / AVERAGING_FILE).exists():
        made_by = "longtrail lm average"
        base = AveragingManifest.load(folder / AVERAGING_FILE, made_by=made_by).model
    return Path(base) if base is not None and (Path(base) / "config.json").exists() else None
