"""Runs the CUDA sources on the host: `arguments.Engine` without a device, so that CI executes what a GPU would."""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

from visalign.kernels.arguments import Macros
from visalign.kernels.compile import FOLDER

HERE = Path(__file__).parent
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


class HostEngine:
    """Compiles each specialisation to a shared library with the C++ compiler; contraction off, as for the device.

    Engines of one folder share their libraries."""

    def __init__(self, folder: Path, resident_blocks: int = 3) -> None:
        self.folder, self.resident_blocks = folder, resident_blocks
        self._libraries: dict[str, ctypes.CDLL] = {}

    def launch(self, source: str, kernel: str, macros: Macros, arguments: bytes, grid: int, threads: int) -> None:
        assert threads <= 256
        assert grid >= 1
        run = getattr(self._library(source, macros), f"run_{kernel}")
        buffer = ctypes.create_string_buffer(arguments, len(arguments))
        run(ctypes.addressof(buffer), ctypes.c_int(grid), ctypes.c_int(threads))

    def _library(self, source: str, macros: Macros) -> ctypes.CDLL:
        defines = [f"-D{name}={value}" for name, value in sorted(macros.items())]
        name = hashlib.sha256(" ".join([source, *defines]).encode()).hexdigest()[:20]
        if name not in self._libraries:
            path, main = self.folder / f"{name}.so", self.folder / f"{name}.cpp"
            main.write_text(entry_points(source), encoding="utf-8")
            includes = [f"-I{place}" for place in (FOLDER, HERE)]
            command = [str(COMPILER), "-std=c++17", "-O1", "-w", "-ffp-contract=off", "-shared", "-fPIC", *includes, *defines, str(main),
                       "-o", str(path)]
            if not path.exists():
                found = subprocess.run(command, capture_output=True, text=True, check=False)
                assert found.returncode == 0, f"{' '.join(command)}\n{found.stderr}"
            library = ctypes.CDLL(str(path))
            for kernel in kernels_of(source):
                function = getattr(library, f"run_{kernel}")
                function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int], None
            self._libraries[name] = library
        return self._libraries[name]


def kernels_of(source: str) -> list[str]:
    """Names of the ``extern "C" __global__`` functions."""
    text = (FOLDER / source / f"{source}.cu").read_text(encoding="utf-8")
    return re.findall(r'^extern "C" __global__ .*?(\w+)\(const __grid_constant__ Args', text, flags=re.MULTILINE)


def entry_points(source: str) -> str:
    lines = ['#include "cuda_on_host.h"', f'#include "{source}/{source}.cu"', "static const Args* given;"]
    for kernel in kernels_of(source):
        lines += [f"static void body_{kernel}() {{ {kernel}(*given); }}",
                  f'extern "C" void run_{kernel}(const Args* args, int grid, int threads)',
                  f"{{ given = args; host::run(body_{kernel}, grid, threads); }}"]
    return "\n".join(lines) + "\n"
