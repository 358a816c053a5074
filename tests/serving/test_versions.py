"""A run is served with the vectors that it was trained on, whatever has been encoded since."""

from pathlib import Path

import pytest

from encoders.table import EmbeddingTable
from feature_repo.artifact import current_run
from feature_repo.errors import EncoderError
from feature_repo.garbage import collect_garbage
from feature_repo.home import Home
from feature_repo.version_names import ENCODER_FILE
from feature_repo.versions import promote, roll_back
from serving.ranker import Ranker
from tests.feature_repo.conftest import write_files
from tests.feature_repo.test_reader import ENCODER, build
from tests.feature_repo.test_versions import OTHER, write_encoder
from training.recipes import RECIPES
from training.sources import Sources
from training.train import train


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """Two encoders, and a run on the vectors of each; the second ones are current."""
    write_files(tmp_path)
    built = Home(tmp_path / "home")
    build(built, tmp_path)
    ENCODER.save(built.embeddings / ENCODER.fingerprint / ENCODER_FILE)
    write_encoder(built, 7)
    for run, encoder in (("first", ENCODER), ("second", OTHER)):
        encoder.save(built.encoder)
        sources = Sources.open(built, "embedded")
        train(sources, RECIPES["popularity"](), run=run, make_current=True, threads=1)
    return built


def test_serving_switches_by_artifact(home: Home) -> None:
    assert current_run(home) == "second"
    old = Ranker.open(home, "embedded", "first")
    before = old.rank("1", top_k=6)
    assert (before.model, before.num_scored) == ("first", 6)
    assert Ranker.open(home, "embedded").rank("1").model == "second"
    assert roll_back(home, "embedded").encoder == ENCODER.fingerprint
    assert Ranker.open(home, "embedded").rank("1", top_k=6) == before
    assert EmbeddingTable.open(home).fingerprint == OTHER.fingerprint  # new runs learn from these

    promote(home, "embedded", "second")
    promote(home, "embedded", "first")
    promote(home, "embedded", "second")
    (home.runs / "first" / "manifest.json").unlink()
    done = collect_garbage(home, "embedded", keep=0)
    assert done.encoders == (ENCODER.fingerprint,)
    # Who opened it before goes on: the files are mapped.
    assert old.rank("1", top_k=6).ranked == before.ranked
    with pytest.raises(EncoderError, match="expected vectors of encoder abc"):
        EmbeddingTable.open(home, fingerprint=ENCODER.fingerprint)
