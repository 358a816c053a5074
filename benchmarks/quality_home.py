"""The home folder of the quality benchmarks: data, features and vectors."""

from pathlib import Path

from encoders.config import EncoderConfig, TuningConfig
from encoders.encode import encode_behaviors
from encoders.tuning import tune
from feature_repo.cli import build_features
from feature_repo.command import Settings
from feature_repo.dataset import load_dataset
from feature_repo.home import Home
from feature_repo.ingest import ingest
from feature_repo.materialize import apply
from feature_repo.progress import progress_bar


def prepare(home: Home, dataset: Path, *, tuned: Path | None) -> Settings:
    """Tables, features, plain vectors and, unless ``tuned`` is None, those of the tuned model.

    What is there already is not made again.

    Args:
        home: Where everything is kept.
        dataset: Data set file.
        tuned: Folder of the tuned language model, made where it is not there; None = no tuning.
    """
    settings = Settings(home, "embedded")
    with progress_bar("ingest", "steps") as progress:
        ingest(home, load_dataset(dataset), progress=progress)
    with progress_bar("encode", "texts") as progress:
        encode_behaviors(home, EncoderConfig(), progress)
    if tuned is not None:
        if not tuned.exists():
            with progress_bar("tune", "steps") as progress:
                tune(home, TuningConfig(), tuned, progress=progress)
        with progress_bar("encode with the tuned model", "texts") as progress:
            encode_behaviors(home, EncoderConfig(model=str(tuned)), progress)
    build_features(settings)
    apply(home, settings.profile)
    return settings
