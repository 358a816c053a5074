"""Where a run computes: one process or several (``torchrun``), on a CPU or an accelerator each.

Every process reads the same data and takes every n-th context of every batch; gradients, losses and
running statistics are added up over the processes, so all of them hold the same weights after every
step. The main one alone writes files, bars and results.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch import distributed as dist

from encoders.config import Precision

T = TypeVar("T")

WAITING_TIME = timedelta(hours=12)
"""How long a process waits for the others. The main one exports and evaluates alone, and a process
that dies ends all of them under torchrun, so this is only a guard against waiting for ever."""


@dataclass(frozen=True)
class Devices:
    """This process among its equals; made by :func:`open_devices`, or alone on the CPU.

    Args:
        device: Where this process computes.
        num_processes: All of them, on all machines.
        process_index: In ``[0, num_processes)``; 0 is the main one.
        num_local_processes: Those on this machine, which share its cores.
    """

    device: torch.device = torch.device("cpu")  # noqa: RUF009  # immutable
    num_processes: int = 1
    process_index: int = 0
    num_local_processes: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.process_index == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place; the tensor must lie on :attr:`device`."""
        if self.num_processes > 1:
            dist.all_reduce(tensor)
        return tensor

    def copy_main(self, tensor: Tensor) -> Tensor:
        """The main process' values in all, in place; the tensor must lie on :attr:`device`."""
        if self.num_processes > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def agree(self, value: T) -> T:
        """What the main process passes, in every process; the others pass anything."""
        if self.num_processes == 1:
            return value
        values: list[T] = broadcast_object_list([value])
        return values[0]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.num_processes > 1:
            dist.barrier()

    def seed(self, run: int, step: int, index: int) -> None:
        """Begin the stream of random numbers of one pass, a function of all that names it.

        Args:
            run: The run's seed.
            step: Of the optimiser, from 0.
            index: Of the pass in its step.
        """
        words = np.random.SeedSequence((run, step, index, self.process_index)).generate_state(2)
        torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))

    def reduce_gradients(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Add up the gradients of all processes, and their parts of the loss.

        One all-reduce of one buffer. A parameter keeps ``grad is None`` only where no process has a
        gradient for it, as it would in one process: the optimiser skips those.

        Args:
            model: Whose gradients are replaced by their sums.
            loss: This process' part, a scalar.

        Returns:
            The loss of all processes.
        """
        if self.num_processes == 1:
            return loss
        learned = [p for p in model.parameters() if p.requires_grad]
        there = loss.new_tensor([p.grad is not None for p in learned])
        gradients = [(p.grad if p.grad is not None else torch.zeros_like(p)) for p in learned]
        buffer = torch.cat([loss.detach().reshape(1), there, *[g.flatten() for g in gradients]])
        self.add_up(buffer)
        counts = buffer[1 : 1 + len(learned)].tolist()
        sums = torch.split(buffer[1 + len(learned) :], [p.numel() for p in learned])
        for parameter, count, total in zip(learned, counts, sums, strict=True):
            parameter.grad = total.view_as(parameter).to(parameter.dtype) if count else None
        return buffer[0]


@contextmanager
def open_devices(*, cpu: bool = False) -> Iterator[Devices]:
    """Join the processes that torchrun has started, or be the only one.

    Args:
        cpu: Compute on the CPU even where there is an accelerator.
    """
    # Without an accelerator accelerate would see one process, not several, unless told so.
    cpu = cpu or not torch.accelerator.is_available()
    state = PartialState(cpu=cpu, timeout=WAITING_TIME)
    yield Devices(
        device=torch.device("cpu") if cpu else state.device,
        num_processes=state.num_processes,
        process_index=state.process_index,
        num_local_processes=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )
    # After an error the other processes may still wait for this one: torchrun ends them.
    state.destroy_process_group()


def products_in(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which matrix products are of a precision; weights and sums stay float32."""
    dtype = getattr(torch, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


@contextmanager
def torch_threads(number: int | None, *, num_local_processes: int = 1) -> Iterator[int]:
    """Compute with a number of threads, then as before.

    Args:
        number: None = as many as OMP_NUM_THREADS says, which torch reads when it is imported; where
            it says nothing, or is torchrun's for several processes, this process' share of the
            cores.
        num_local_processes: That share this machine's cores.
    """
    before = torch.get_num_threads()
    if number is None:
        told = num_local_processes == 1 and "OMP_NUM_THREADS" in os.environ
        number = before if told else max(1, (os.cpu_count() or 1) // num_local_processes)
    torch.set_num_threads(number)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Refuse operations whose result changes from run to run on the same machine."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        # cuBLAS reads it when it is first used: a fixed workspace, as PyTorch's notes on
        # reproducibility ask for.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
