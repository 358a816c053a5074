"""Pretraining ends with the same bits after any kill, and several processes learn what one does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from encoders.lm.pretraining import pretrain
from encoders.lm.pretraining_manifest import PretrainingManifest
from feature_repo.home import PROJECT_ROOT, Home
from tests.encoders.lm.small_corpus import assert_equal_weights, make_home, small, weights
from tests.together import run_together, script

ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"}

# Imports once; each line that it reads starts a process that pretrains.
RUNS = """
import os, sys
from pathlib import Path
from encoders.lm.pretraining import pretrain
from feature_repo.home import Home
from tests.encoders.lm.small_corpus import small

def tell(advance, total, **figures):
    if figures:
        print("step", flush=True)

for _ in sys.stdin:
    process = os.fork()
    if not process:
        config = small(steps=40, precision="bfloat16", optimizer="muon")
        pretrain(Home(Path(sys.argv[1])), config, name="killed", threads=1, learning=tell)
        os._exit(0)
    print(process, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


@contextmanager
def runs(home: Home) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", RUNS, str(home.root)],
        cwd=PROJECT_ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as started:
        yield started


def test_killed_at_three_random_points_it_ends_with_the_same_bits(home: Home) -> None:
    config = small(steps=40, precision="bfloat16", optimizer="muon")
    undisturbed = pretrain(home, config, threads=1).folder
    random = np.random.default_rng(0)
    with runs(home) as started:
        assert started.stdin is not None
        assert started.stdout is not None
        for _ in range(3):
            started.stdin.write("run\n")
            process = int(started.stdout.readline())
            for _line in range(int(random.integers(5, 12))):
                assert started.stdout.readline() == "step\n"
            time.sleep(float(random.random()) * 0.01)  # anywhere in the step
            os.kill(process, signal.SIGKILL)
            lines = iter(started.stdout.readline, "")
            assert next(line for line in lines if line != "step\n") == f"{-signal.SIGKILL}\n"
            assert not (home.models / "killed").exists()
            assert (home.models / "killed.checkpoint.part" / "state.json").exists()
    summary = pretrain(home, config, name="killed", threads=1)
    assert 12 <= summary.steps_resumed < 40
    assert_equal_weights(undisturbed, summary.folder)
    for step in (27, 33, 40):
        place = Path("checkpoints") / f"step-{step}"
        assert_equal_weights(undisturbed / place, summary.folder / place)
    one, other = (
        PretrainingManifest.load(f / "pretraining.json", made_by="test")
        for f in (undisturbed, summary.folder)
    )
    assert one.curve == other.curve
    assert one.validations == other.validations
    assert sorted(path.name for path in home.models.iterdir()) == ["killed", "small"]


TOGETHER = """
import json, sys
from dataclasses import replace
from pathlib import Path
from encoders.devices import open_devices
from encoders.lm.pretraining import pretrain
from feature_repo.home import Home
from tests.encoders.lm.small_corpus import small

root = Path(sys.argv[1])
with open_devices(cpu=True) as devices:
    for name, sharded in (("rows", False), ("sharded", True)):
        config = small(steps=8, sharded=sharded)
        summary = pretrain(Home(root), config, name=name, threads=1, devices=devices)
        told = {"curve": [p.loss for p in summary.manifest.curve], "n": devices.num_processes}
        (root / f"{name}-{devices.process_index}.json").write_text(json.dumps(told))
"""


def test_two_processes_learn_what_one_learns_with_shared_rows_or_shared_weights(
    home: Home,
) -> None:
    run_together(script(TOGETHER, home.root), home.root)
    alone = pretrain(home, small(steps=8), threads=1)
    expected = [point.loss for point in alone.manifest.curve]
    for name in ("rows", "sharded"):
        told = [json.loads((home.root / f"{name}-{i}.json").read_text()) for i in range(2)]
        assert told[0] == told[1]
        assert told[0]["n"] == 2
        assert told[0]["curve"] == pytest.approx(expected, rel=1e-4)
        together = weights(home.models / name)
        for key, value in weights(alone.folder).items():
            torch.testing.assert_close(together[key], value, rtol=1e-2, atol=1e-3, msg=key)
    # A state of shared weights is whole: one process could go on from it.
    snapshot = home.models / "sharded" / "checkpoints" / "step-8"
    assert_equal_weights(home.models / "sharded", snapshot)
