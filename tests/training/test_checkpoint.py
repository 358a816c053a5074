import pytest

from feature_repo.errors import ArtifactError
from feature_repo.home import Home
from training.checkpoint import open_run_checkpoint


def test_one_process_writes_and_the_others_hold_nothing(tmp_path):
    home = Home(tmp_path)
    with open_run_checkpoint(home, "run", "one") as main:
        with open_run_checkpoint(home, "run", "one", main=False) as other:
            assert other == main
        assert main.folder.is_dir()
        with (
            pytest.raises(ArtifactError, match="another process is at run 'run'"),
            open_run_checkpoint(home, "run", "one"),
        ):
            pass
    assert not main.folder.exists()
