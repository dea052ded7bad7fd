"""Which process this is, and the few sums a run needs across processes.

Processes are started by ``torchrun`` or ``accelerate launch`` and found by accelerate's ``PartialState``. Losses are sums over *global*
denominators, so gradients are **summed** over processes, never averaged: a batch split unevenly over processes still gives the gradient
of the whole batch. With one process every function returns its argument.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_ELEMENTS = 1 << 25  # 128 MiB of float32 gradients per all-reduce


@dataclass(frozen=True)
class Processes:
    """This process among all.

    Attributes:
        rank: 0..world-1.
        world: number of processes.
        device: where this process computes.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable

    @staticmethod
    def start(device: str = "auto") -> Processes:
        """Join the processes of this launch; ``device`` is ``auto``, ``cpu``, ``cuda`` or ``cuda:i`` (one process only).

        Raises:
            ValueError: CUDA was asked for and there is none.
        """
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"model.device is {device} but torch sees no CUDA device; set model.device=cpu, or check nvidia-smi and "
                             f"that this torch ({torch.__version__}) is a CUDA build")
        if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
            found = "cuda" if torch.cuda.is_available() else "cpu"
            return Processes(device=torch.device(found if device == "auto" else device))
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        return Processes(rank=state.process_index, world=state.num_processes, device=state.device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's contiguous part of ``range(count)``; ``count`` is a multiple of ``world``."""
        if count % self.world:
            raise ValueError(f"{count} items do not divide over {self.world} processes")
        size = count // self.world
        return range(self.rank * size, (self.rank + 1) * size)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sums over processes, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Sequence[float]) -> list[float]:
        """Element-wise maxima over processes."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenation over processes along the first axis in rank order, (world * n, ...); every process gets it, on the CPU."""
        if self.world == 1:
            return tensor.detach().cpu()
        return torch.cat([part.cpu() for part in self.gather_objects(tensor.detach().cpu())])

    def gather_objects(self, value: Any) -> list[Any]:
        """One entry per process, in rank order, on every process. For small host-side values: names, RNG states, per-sample scores."""
        if self.world == 1:
            return [value]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, value)
        return parts

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum ``.grad`` over processes in place, in flat buckets; a parameter without gradient counts as zero."""
        if self.world == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (parameter.grad.dtype != bucket[0].dtype or sum(g.numel() for g in bucket) + parameter.numel() > BUCKET_ELEMENTS):
                _sum_bucket(bucket)
                bucket = []
            bucket.append(parameter.grad)
        if bucket:
            _sum_bucket(bucket)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def _reduce(self, values: Sequence[float], op: Any) -> list[float]:
        if self.world == 1:
            return list(values)
        # NCCL reduces device tensors only.
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total, op=op)
        return [float(v) for v in total.tolist()]


def _sum_bucket(gradients: Sequence[Tensor]) -> None:
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat, op=dist.ReduceOp.SUM)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
