"""A model whose weights, gradients and optimiser's state are shared out over processes (FSDP)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from encoders.config import Precision
from encoders.devices import Devices
from encoders.lm.loss import LanguageModelLoss


def shard(loss: LanguageModelLoss, devices: Devices, precision: Precision) -> None:
    """Leave every process its share of each layer's weights; a layer's are gathered as it runs.

    Args:
        loss: Whole and equal in all processes; changed in place.
        devices: The processes, at least two.
        precision: Of the gathered weights; sums of gradients are float32.

    Source:
        Zhao et al., "PyTorch FSDP", 2023, arXiv:2304.11277; torch's ``fully_shard``.
    """
    mesh = init_device_mesh(devices.device.type, (devices.num_processes,))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, precision), reduce_dtype=torch.float32)
    for layer in loss.model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Also after a validation: the outermost weights would stay gathered, and a state that is saved
    # then would miss their moments.
    fully_shard(loss, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all processes put together; all of them call this."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for name, tensor in tensors.items()
    }


def share_of(value: Tensor, parameter: Tensor) -> Tensor:
    """This process' share of a whole value that belongs to a parameter."""
    if isinstance(parameter, DTensor) and value.dim():
        mesh, places = parameter.device_mesh, parameter.placements
        # Every process has the whole value: nothing need be sent.
        return distribute_tensor(value.to(parameter.device), mesh, places, src_data_rank=None)
    return value.to(parameter.device) if value.dim() else value
