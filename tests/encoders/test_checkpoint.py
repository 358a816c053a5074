import psutil
import pytest
import torch
from torch import nn

from encoders.checkpoint import (
    Checkpoint,
    SavedState,
    open_checkpoint,
    optimizer_tensors,
    restore_optimizer,
)
from feature_repo.errors import ArtifactError


class Steps(SavedState):
    losses: list[float]


def state_of(step: int) -> Steps:
    return Steps(
        fingerprint="one", tensors=f"state-{step}.safetensors", losses=[0.1 + 0.2, 2 / 3, step]
    )


def test_what_is_saved_is_read_back_bit_by_bit_and_the_one_before_goes(tmp_path):
    checkpoint = Checkpoint(tmp_path, "one", Steps)
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
    checkpoint = Checkpoint(tmp_path, "one", Steps)
    checkpoint.save(state_of(5), {"model/a": torch.ones(2)})
    (tmp_path / "state-10.safetensors").write_bytes(b"complete, but state.json is not written")
    (tmp_path / "state-15.safetensors.part").write_bytes(b"half")
    assert checkpoint.load()[0] == state_of(5)


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


@pytest.mark.parametrize("fused", [True, False])
def test_the_count_of_steps_lies_where_torch_itself_would_put_it(fused):
    learned = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(learned.parameters(), fused=fused)
    learned(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    elsewhere = nn.Linear(2, 3, device="meta")  # stands for a GPU
    ours, theirs = (torch.optim.AdamW(elsewhere.parameters(), fused=fused) for _ in range(2))
    restore_optimizer(elsewhere, ours, optimizer_tensors(learned, optimizer))
    theirs.load_state_dict(optimizer.state_dict())
    for parameter in elsewhere.parameters():
        devices = {key: value.device.type for key, value in ours.state[parameter].items()}
        assert devices == {key: v.device.type for key, v in theirs.state[parameter].items()}
        assert devices["step"] == ("meta" if fused else "cpu")


def test_a_state_that_is_loaded_takes_no_memory_of_its_own(tmp_path):
    checkpoint = Checkpoint(tmp_path, "one", Steps)
    size_bytes = 2**26
    checkpoint.save(state_of(5), {"model/a": torch.ones(size_bytes // 4)})
    before = psutil.Process().memory_info().rss
    _, loaded = checkpoint.load()
    assert psutil.Process().memory_info().rss - before < size_bytes / 4
    assert loaded["model/a"][-1] == 1


def test_one_process_holds_the_folder_and_a_kill_leaves_what_was_saved(tmp_path):
    options = {"state_type": Steps, "what": "run 'x'", "error": ArtifactError}
    with open_checkpoint(tmp_path / "x", "one", **options) as held:
        assert held.folder == tmp_path / "x.checkpoint.part"
        with (
            pytest.raises(ArtifactError, match="another process is at run 'x'"),
            open_checkpoint(tmp_path / "x", "one", **options),
        ):
            pass
    assert not held.folder.exists()

    def killed(saves: bool) -> None:
        with open_checkpoint(tmp_path / "x", "one", **options) as held:
            if saves:
                held.save(state_of(5), {"model/a": torch.ones(2)})
            raise KeyboardInterrupt

    for saves in (False, True):
        with pytest.raises(KeyboardInterrupt):
            killed(saves)
        assert held.folder.exists() == saves
    with (
        pytest.raises(ArtifactError, match="run 'x' was begun with other settings"),
        open_checkpoint(tmp_path / "x", "two", **options),
    ):
        pass
    with open_checkpoint(tmp_path / "x", "one", **options) as held:
        assert held.state() == state_of(5)
