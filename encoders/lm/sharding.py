"""A model whose weights, gradients and optimiser's state are shared out over processes (FSDP)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from encoders.checkpoint import beside
from encoders.config import Precision
from encoders.devices import Devices
from encoders.lm.loss import LanguageModelLoss


def shard(loss: LanguageModelLoss, devices: Devices, precision: Precision) -> None:
    """Leave every process its share of each layer's weights; a layer's are gathered as it runs.

    The weights are the main process' own. They come to the devices layer by layer, so that none of
    these holds more than one whole layer, or what is outside of all layers, beside its share.

    Args:
        loss: Whole in the main process; of the others shapes alone are looked at, so that theirs
            may be on torch's meta device. Changed in place; on ``devices.device`` afterwards.
        devices: The processes, at least two.
        precision: Of the gathered weights; sums of gradients are float32.

    Source:
        Zhao et al., "PyTorch FSDP", 2023, arXiv:2304.11277; torch's ``fully_shard``.
    """
    mesh = init_device_mesh(devices.device.type, (devices.num_processes,))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, precision), reduce_dtype=torch.float32)
    layers = loss.model.base_model.layers
    for layer in layers:
        _take_over(layer.modules(), devices)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    in_layers = {module for layer in layers for module in layer.modules()}
    _take_over([module for module in loss.modules() if module not in in_layers], devices)
    # Also after a validation: the outermost weights would stay gathered, and a state that is saved
    # then would miss their moments.
    fully_shard(loss, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def _take_over(modules: Iterable[nn.Module], devices: Devices) -> None:
    """Put the main process' weights and buffers, whole, on every process' device."""
    taken: dict[Tensor, Tensor] = {}
    for module in modules:
        own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        own |= dict(module.named_buffers(recurse=False))
        for name, tensor in own.items():
            if tensor not in taken:  # else modules that share a weight would get one each
                taken[tensor] = _main_value(tensor, devices)
            setattr(module, name, taken[tensor])


def _main_value(tensor: Tensor, devices: Devices) -> Tensor:
    """The main process' value of a parameter or buffer, on this process' device."""
    if devices.is_main:
        value = tensor.detach().to(devices.device)
    else:
        value = torch.empty_like(tensor, device=devices.device, requires_grad=False)
    devices.copy_main(value)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, requires_grad=tensor.requires_grad)
    return value


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shares of all processes put together; all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], devices: Devices) -> dict[str, Tensor]:
    """The tensors whole, on the CPU of the main process; the others get nothing.

    All processes call this. Tensor after tensor is put together and leaves the devices again, so
    that each of these holds one whole tensor at a time.

    Args:
        tensors: Of equal names in all processes, in the same order.
        devices: The processes.
    """
    gathered: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if devices.is_main:
            gathered[name] = whole(tensor.detach()).cpu()
        else:
            whole(tensor.detach())
    return gathered


def share_of(value: Tensor, parameter: Tensor) -> Tensor:
    """This process' share of a whole value that belongs to a parameter; numbers are not cut."""
    if isinstance(parameter, DTensor) and value.dim():
        mesh, places = parameter.device_mesh, parameter.placements
        # Every process has the whole value: nothing need be sent.
        return distribute_tensor(value.to(parameter.device), mesh, places, src_data_rank=None)
    return beside(value, parameter)
