"""What a kernel is handed: tensors as rows, scalars, packed as the C structure that the ``.cu`` file declares."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

import torch
from torch import Tensor

C_TYPES: Mapping[torch.dtype, str] = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "f16"}
CHUNK = 4096  # elements of a row that one block sums, as in rows.cuh
THREADS, WARP = 256, 32
Macros = dict[str, str | int]


class Engine(Protocol):
    """Runs kernels: the device, or a test's emulation of it."""

    @property
    def resident_blocks(self) -> int:
        """Blocks that the device holds at a time; a larger grid gains nothing."""

    def launch(self, source: str, kernel: str, macros: Macros, arguments: bytes, grid: int, threads: int) -> None:
        """Run ``kernel`` of ``<source>/<source>.cu``, compiled with ``macros``, after all that was launched before.

        Raises:
            KernelError: it does not compile, load or launch.
        """


class Arguments:
    """Fields in the order of the structure. Eight-byte fields come first there, so that alignment adds nothing in between."""

    def __init__(self) -> None:
        self._codes: list[str] = []
        self._values: list[float | int] = []
        self._held: list[Tensor] = []  # copies must live until the launch

    def pointers(self, *tensors: Tensor | None) -> Arguments:
        self._held += [tensor for tensor in tensors if tensor is not None]
        return self._add("P", *(0 if tensor is None else tensor.data_ptr() for tensor in tensors))

    def rows(self, *tensors: Tensor | None) -> Arguments:
        """Addresses, then the elements from one row to the next."""
        found = [(None, 0) if tensor is None else as_rows(tensor) for tensor in tensors]
        return self.pointers(*(tensor for tensor, _ in found)).integers(*(stride for _, stride in found))

    def integers(self, *values: int) -> Arguments:
        return self._add("q", *values)

    def doubles(self, *values: float) -> Arguments:
        return self._add("d", *values)

    def floats(self, *values: float) -> Arguments:
        return self._add("f", *values)

    def _add(self, code: str, *values: float | int) -> Arguments:
        self._codes += [code] * len(values)
        self._values += values
        return self

    def packed(self) -> bytes:
        """As C lays them out: native alignment, and the end padded to that of eight bytes."""
        return struct.pack(f"@{''.join(self._codes)}0q", *self._values)


def check_alike(like: Tensor, **tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Before a kernel reads by address: everything has the shape of ``like`` and lies beside it.

    Raises:
        ValueError: a tensor does not; the message names it.
    """
    for name, given in tensors.items():
        for tensor in [] if given is None else [given] if isinstance(given, Tensor) else given:
            if tensor.shape != like.shape or tensor.device != like.device:
                raise ValueError(f"{name} is {tuple(tensor.shape)} on {tensor.device}, the state {tuple(like.shape)} on {like.device}; a "
                                 "fused operator takes tensors of one shape on one device")


def as_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor (B, ...) whose rows are contiguous, a copy if need be, and the elements from one row to the next."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return tensor.contiguous(), tensor[0].numel()
        expected *= size
    return tensor, tensor.stride(0)


def launch_rows(engine: Engine, source: str, kernel: str, macros: Macros, arguments: Arguments, rows: int, dims: int,
                finish: bool = False) -> None:
    """Run ``kernel`` over the chunks of all rows and, with ``finish``, ``<kernel>_finish`` over the rows."""
    packed = arguments.packed()
    macros = {**macros, "ARGS_SIZE": len(packed), "CHUNK_SIZE": CHUNK}
    engine.launch(source, kernel, macros, packed, min(rows * num_chunks(dims), engine.resident_blocks), THREADS)
    if finish:
        engine.launch(source, f"{kernel}_finish", macros, packed, min(rows, 8 * engine.resident_blocks), WARP)


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    """The tensors of a dataclass in the order of its fields, as an operator returns them."""
    return tuple(getattr(found, field.name) for field in fields(found))


def no_second_derivative(*_: Any) -> Any:
    """The gradient of an operator's gradient.

    Raises:
        RuntimeError: always; autograd would otherwise warn and go on as if the gradient were a constant.
    """
    raise RuntimeError("the gradient of a fused operator cannot be differentiated again; use kernels: torch for second derivatives")


def num_chunks(dims: int) -> int:
    return -(-dims // CHUNK)


def partials(like: Tensor, num_sums: int) -> Tensor:
    """Room for the sums of every chunk, float32 (rows, num_sums, chunks)."""
    return torch.empty(like.shape[0], num_sums, num_chunks(like[0].numel()), dtype=torch.float32, device=like.device)
