"""Which backend an operator runs on: decided by rules that can be read here, said once in the log, never silently different."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from visalign.kernels.compile import KernelError, compiler, target

logger = logging.getLogger(__name__)

Backend = Literal["auto", "cuda", "torch"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels read; they compute in float32
LOWEST_CAPABILITY = (8, 0)


def resolve(backend: Backend, operator: str, tensors: Sequence[Tensor], obstacle: str | None = None) -> Literal["cuda", "torch"]:
    """The backend that ``operator`` takes for these tensors.

    Args:
        backend: what was asked for.
        tensors: what the kernel would read.
        obstacle: why this call cannot be fused, if the operator already knows.
    Raises:
        ValueError: an unknown backend, or "cuda" where it is not possible; the message says why.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"unknown kernel backend {backend!r}; use {', '.join(get_args(Backend))}")
    if backend == "torch":
        _say(operator, "torch", "asked for")
        return "torch"
    obstacle = obstacle or _obstacle(tensors)
    if obstacle is None:
        _say(operator, "cuda", device_name(tensors[0].device.index))
        return "cuda"
    if backend == "cuda":
        raise ValueError(f"{operator}: kernels='cuda' is not possible here, {obstacle}; use kernels='auto' or 'torch'")
    _say(operator, "torch", obstacle)
    return "torch"


def check_backend(backend: Backend, device: torch.device) -> None:
    """Before anything is loaded: whether what was insisted on is there.

    Raises:
        ValueError: "cuda" on a device that has no kernels.
    """
    if backend == "cuda" and (why := unavailable(device)) is not None:
        raise ValueError(f"kernels: cuda is not possible on {device}, {why}; use kernels=auto or kernels=torch")


def unavailable(device: torch.device) -> str | None:
    """Why no kernel can run on this device, ``None`` if they can."""
    if device.type != "cuda":
        return f"tensors are on {device.type}"
    return _unavailable(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _unavailable(index: int) -> str | None:
    if torch.version.cuda is None:
        return "this PyTorch was not built for CUDA"
    capability = torch.cuda.get_device_capability(index)
    if capability < LOWEST_CAPABILITY:
        return f"the device has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0"
    try:
        target(10 * capability[0] + capability[1])
    except KernelError as error:
        return str(error)
    return None


@cache
def device_name(index: int) -> str:
    """Such as ``NVIDIA H100, sm_90, NVRTC 13.0``."""
    major, minor = torch.cuda.get_device_capability(index)
    return f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {compiler()}"


def _obstacle(tensors: Sequence[Tensor]) -> str | None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"its tensors are on several devices ({', '.join(sorted(map(str, devices)))})"
    wrong = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.dtype not in DTYPES}
    return unavailable(tensors[0].device) or (f"kernels do not read {', '.join(sorted(wrong))}" if wrong else None)


@cache
def _say(operator: str, backend: str, why: str) -> None:
    """Once per operator, backend and reason."""
    logger.info("%s runs on backend %s: %s", operator, backend, why)
