"""Compiled kernels on a device: loaded once per process and device, launched on PyTorch's current stream.

The driver is called through ``cuda.bindings``, in the context that PyTorch uses, the device's primary one. PyTorch binds it to a thread
when that thread first needs it; a backward pass runs on a thread of its own, so every launch makes sure.
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from typing import Any

import torch

from visalign.kernels.arguments import Macros
from visalign.kernels.compile import KernelError, compiled, target

BLOCKS_PER_PROCESSOR = 8  # of 256 threads: what a multiprocessor of compute capability 8.0 to 10.0 holds at most


class CudaEngine:
    """`arguments.Engine` of one device."""

    def __init__(self, index: int) -> None:
        self.index = index
        properties = torch.cuda.get_device_properties(index)
        self.arch = target(10 * properties.major + properties.minor)
        self.resident_blocks = BLOCKS_PER_PROCESSOR * properties.multi_processor_count
        with torch.cuda.device(index):
            torch.empty(1, device="cuda")  # PyTorch initialises the primary context
            self.context = _checked(_driver().cuDevicePrimaryCtxRetain(_checked(_driver().cuDeviceGet(index), "cuDeviceGet")),
                                    "cuDevicePrimaryCtxRetain")
        self._lock = threading.Lock()
        self._modules: dict[tuple[str, tuple[tuple[str, str | int], ...]], Any] = {}
        self._functions: dict[tuple[Any, str], Any] = {}

    def launch(self, source: str, kernel: str, macros: Macros, arguments: bytes, grid: int, threads: int) -> None:
        """See `arguments.Engine`."""
        driver = _driver()
        with torch.cuda.device(self.index):
            if int(_checked(driver.cuCtxGetCurrent(), "cuCtxGetCurrent")) != int(self.context):
                _checked(driver.cuCtxSetCurrent(self.context), "cuCtxSetCurrent")
            function = self._function(source, kernel, macros)
            buffer = ctypes.create_string_buffer(arguments, len(arguments))
            parameters = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))  # the driver copies both before it returns
            stream = torch.cuda.current_stream(self.index).cuda_stream
            _checked(driver.cuLaunchKernel(function, grid, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(parameters), 0),
                     f"launching {kernel} with {grid} blocks of {threads} threads")

    def _function(self, source: str, kernel: str, macros: Macros) -> Any:
        key = (source, tuple(sorted(macros.items())))
        with self._lock:
            if key not in self._modules:
                self._modules[key] = _checked(_driver().cuModuleLoadData(compiled(source, macros, self.arch)), f"loading {source}")
            if (key, kernel) not in self._functions:
                self._functions[key, kernel] = _checked(_driver().cuModuleGetFunction(self._modules[key], kernel.encode()), kernel)
            return self._functions[key, kernel]


def engine_of(device: torch.device) -> CudaEngine:
    """The device's engine in this process; a forked process makes its own."""
    return _engine(torch.cuda.current_device() if device.index is None else device.index, os.getpid())


@cache
def _engine(index: int, process: int) -> CudaEngine:
    return CudaEngine(index)


@cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _checked(result: tuple[Any, ...], what: str) -> Any:
    status, *values = result
    if int(status) != 0:
        _, text = _driver().cuGetErrorString(status)
        raise KernelError(f"{what} failed: {status!r}, {text.decode() if text else 'unknown error'}")
    return values[0] if values else None
