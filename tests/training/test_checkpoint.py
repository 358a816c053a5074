import pytest
import torch
from torch import nn

from feature_repo.errors import ArtifactError
from feature_repo.home import Home
from training.checkpoint import (
    Checkpoint,
    CheckpointState,
    open_checkpoint,
    optimizer_tensors,
    restore_optimizer,
)


def state_of(step: int) -> CheckpointState:
    return CheckpointState(
        fingerprint="one",
        tensors=f"state-{step}.safetensors",
        step=step,
        num_rows=3,
        loss_sum=0.1 + 0.2,
        best_auc=2 / 3,
        validations_since_best=1,
        history=[{"step": step, "valid_auc": 1 / 3}],
    )


def test_what_is_saved_is_read_back_bit_by_bit_and_the_one_before_goes(tmp_path):
    checkpoint = Checkpoint(tmp_path, "one")
    assert checkpoint.load() is None
    shared = torch.randn(3, 4)
    for step in (5, 10):
        tensors = {"model/a": shared, "model/b": shared, "average/a": shared.T + step}
        checkpoint.save(state_of(step), tensors)
    state, loaded = checkpoint.load()
    assert state == checkpoint.state() == state_of(10)
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["state-10.safetensors", "state.json"]


def test_a_kill_between_the_two_files_leaves_the_state_before(tmp_path):
    checkpoint = Checkpoint(tmp_path, "one")
    checkpoint.save(state_of(5), {"model/a": torch.ones(2)})
    (tmp_path / "state-10.safetensors").write_bytes(b"complete, but state.json is not written")
    (tmp_path / "state-15.safetensors.part").write_bytes(b"half")
    assert checkpoint.load()[0].step == 5


def test_an_optimizer_goes_on_as_if_nothing_had_happened():
    def learn(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.tensor([[1.0, -2.0]])).sum().backward()
        optimizer.step()

    first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    optimizers = [torch.optim.AdamW(m.parameters(), foreach=True) for m in (first, second)]
    learn(first, optimizers[0])
    second.load_state_dict(first.state_dict())
    restore_optimizer(second, optimizers[1], optimizer_tensors(first, optimizers[0]))
    learn(first, optimizers[0])
    learn(second, optimizers[1])
    assert torch.equal(first.weight, second.weight)


def test_one_process_writes_and_the_others_hold_nothing(tmp_path):
    home = Home(tmp_path)
    with open_checkpoint(home, "run", "one") as main:
        with open_checkpoint(home, "run", "one", main=False) as other:
            assert other == main
        assert main.folder.is_dir()
        with (
            pytest.raises(ArtifactError, match="another process is training run 'run'"),
            open_checkpoint(home, "run", "one"),
        ):
            pass
    assert not main.folder.exists()
