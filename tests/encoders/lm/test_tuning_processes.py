"""Several processes tune what one process tunes: with shared rows, shared weights, or adapters."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from encoders.lm.examples import TaskConfig
from encoders.lm.instruction_tuning import InstructionTuningConfig, tune_on_tasks
from tests.encoders.lm.planted_models import byte_tokenizer, save, small_model
from tests.encoders.lm.shop_home import TITLES, make_home
from tests.together import run_together, script

CONFIG = InstructionTuningConfig(
    tasks=TaskConfig(max_train=20, max_train_baskets=10, max_valid=5, history_lines=2),
    epochs=0.5,
    batch_rows=4,
    pass_rows=2,
    precision="float32",
    num_validations=1,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "rows": {},
    "sharded": {"sharded": True},
    "adapters": {"lora_rank": 2},
}

TOGETHER = """
import json, sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from encoders.devices import open_devices, torch_threads
from encoders.lm.instruction_tuning import tune_on_tasks
from feature_repo.home import Home
from tests.encoders.lm.test_tuning_processes import CONFIG, VARIANTS

home = Home(Path(sys.argv[1]))
with open_devices(cpu=True) as devices, torch_threads(1):
    for name, change in VARIANTS.items():
        config = replace(CONFIG, **change)
        summary = tune_on_tasks(home, home.models / "base", name, config, devices=devices)
        told = [summary.manifest.held_out_before, summary.manifest.validations[-1].figures]
        path = home.root / f"{name}-{devices.process_index}.json"
        path.write_text(json.dumps([devices.num_processes, *told]))
"""


def test_two_processes_tune_what_one_tunes(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    save(small_model(300, length=256), byte_tokenizer(TITLES, num_tokens=300), home.models / "base")
    run_together(script(TOGETHER, home.root), home.root)
    for name, change in VARIANTS.items():
        first, second = (
            json.loads((home.root / f"{name}-{index}.json").read_text()) for index in range(2)
        )
        assert first == second
        config = replace(CONFIG, **{**change, "sharded": False})
        alone = tune_on_tasks(home, home.models / "base", f"{name}-alone", config)
        num_processes, before, after = first
        assert num_processes == 2
        assert before == pytest.approx(alone.manifest.held_out_before, rel=1e-5)
        figures = alone.manifest.validations[-1].figures
        assert after == pytest.approx(figures, rel=1e-4)
        assert figures["answer_loss"] < before
        expected = load_file(alone.folder / "model.safetensors")
        for key, value in load_file(home.models / name / "model.safetensors").items():
            torch.testing.assert_close(value, expected[key], rtol=1e-2, atol=1e-3, msg=key)
