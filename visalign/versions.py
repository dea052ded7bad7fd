"""What was running: for ``visalign env``, reports and model cards."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from visalign import __version__

_PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "open_clip_torch", "safetensors", "numpy",
             "pydantic")
_OPTIONAL = ("datasets", "openai", "av", "soundfile", "mujoco", "tensorboard", "wandb", "trackio")


def versions() -> dict[str, str]:
    """Package -> version of what is installed, and the platform."""
    found = {"visalign": __version__ + _commit(), "python": sys.version.split()[0], "platform": platform.platform()}
    for package in (*_PACKAGES, *_OPTIONAL):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            if package in _PACKAGES:
                found[package] = "not installed"
    return found


def describe() -> str:
    """Versions, processors and the environment variables that matter, as lines to paste into a bug report."""
    import torch

    lines = [f"{name:<16} {value}" for name, value in versions().items()]
    lines.append(f"{'cpu':<16} {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    lines.append(f"{'cuda':<16} {torch.version.cuda or 'this torch has none'}")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        lines.append(f"{f'gpu {index}':<16} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    if not torch.cuda.is_available():
        lines.append(f"{'gpu':<16} none")
    lines += [f"{name:<16} {value}" for name, value in _kernels()]
    shown = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "PYTORCH_CUDA_ALLOC_CONF", "VISALIGN_KERNEL_CACHE", "WORLD_SIZE")
    lines += [f"{name:<16} {os.environ[name]}" for name in shown if name in os.environ]
    return "\n".join(lines)


def _kernels() -> list[tuple[str, str]]:
    """Where the fused operators run, what compiles them, and where compiled ones are kept."""
    import torch

    from visalign.kernels.backend import unavailable
    from visalign.kernels.compile import KernelError, cache_folder, compiler

    try:
        found = [("kernel compiler", compiler())]
    except KernelError as error:
        found = [("kernel compiler", f"none: {error}")]
    for index in range(torch.cuda.device_count()):
        why = unavailable(torch.device("cuda", index))
        found.append((f"kernels {index}", "cuda" if why is None else f"torch: {why}"))
    if not torch.cuda.device_count():
        found.append(("kernels", "torch: no CUDA device"))
    folder = cache_folder()
    count = len(list(folder.glob("*.cubin"))) if folder.is_dir() else 0
    return [*found, ("kernel cache", f"{folder}, {count} compiled")]


def _commit() -> str:
    """``+abc1234`` in a git checkout of this package, with ``-dirty`` when files differ; nothing when installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return ""
    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=root, capture_output=True, text=True,
                               timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"+{found.stdout.strip()}"
