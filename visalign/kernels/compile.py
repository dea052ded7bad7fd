"""CUDA sources to machine code: compiled for one architecture on first use by NVRTC, kept on disk by what went into it.

NVRTC is a library that CUDA builds of PyTorch already bring along, and so is ``cuda.bindings``, through which it is called; neither a
toolkit nor a C++ compiler is needed, and nothing is compiled when the package is installed. The folder of compiled kernels is
``$VISALIGN_KERNEL_CACHE``, by default ``~/.cache/visalign/kernels``. No torch here: a test compiles for devices that it does not have.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
HEADERS = ("elements.h", "rows.cuh")
OPTIONS = ("--std=c++17", "--fmad=false")  # the sources say themselves where a multiply-add is fused, see elements.h
CACHE_VARIABLE = "VISALIGN_KERNEL_CACHE"


class KernelError(RuntimeError):
    """A kernel cannot be compiled, loaded or launched."""


def compiled(source: str, macros: Mapping[str, str | int], arch: int) -> bytes:
    """The cubin of ``<source>/<source>.cu`` under these macros for compute capability ``arch`` (90 for 9.0), from disk if it is there.

    Raises:
        KernelError: no compiler, or the source does not compile; the message holds the compiler's log.
    """
    options = (f"--gpu-architecture=sm_{arch}", *OPTIONS, *(f"-D{name}={value}" for name, value in sorted(macros.items())))
    path = cache_folder() / f"{source}-sm{arch}-{digest(source, options)[:24]}.cubin"
    found = _read(path)
    if found is None:
        found = nvrtc_compile(source, options).code
        _write(path, found)
    return found


def digest(source: str, options: Sequence[str]) -> str:
    """Of everything that machine code depends on: sources, options, compiler."""
    state = hashlib.sha256(compiler().encode())
    for text in (*(_text(header) for header in HEADERS), _text(f"{source}/{source}.cu"), *options):
        state.update(len(text).to_bytes(8, "little") + text.encode())
    return state.hexdigest()


@dataclass(frozen=True)
class MachineCode:
    """A cubin, and what the compiler had to say (with ``--ptxas-options=-v``: registers and spills)."""

    code: bytes
    log: str


def nvrtc_compile(source: str, options: Sequence[str]) -> MachineCode:
    """Machine code by NVRTC. Raises as `compiled`."""
    nvrtc = _nvrtc()
    names, headers = [name.encode() for name in HEADERS], [_text(name).encode() for name in HEADERS]
    text = _text(f"{source}/{source}.cu").encode()
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(text, f"{source}.cu".encode(), len(headers), headers, names))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    # A bytearray, not bytes: NVRTC writes into it, and Python shares its bytes objects of length 1, which is what an empty log has.
    log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
    said = log.decode(errors="replace").strip("\0 \n")
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        nvrtc.nvrtcDestroyProgram(program)
        raise KernelError(f"{compiler()} cannot compile {source}.cu with {' '.join(options)}:\n{said}")
    code = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
    _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return MachineCode(bytes(code), said)


@cache
def compiler() -> str:
    """Such as ``NVRTC 13.0``.

    Raises:
        KernelError: there is none; the message says what to install.
    """
    nvrtc = _nvrtc()
    try:
        major, minor = _checked(nvrtc, nvrtc.nvrtcVersion())
    except (RuntimeError, OSError) as error:  # what the bindings raise when they find no library
        raise KernelError(f"NVRTC, CUDA's run-time compiler, was not found ({str(error).splitlines()[0]}); it comes with PyTorch's CUDA "
                          "builds, or as the package nvidia-cuda-nvrtc") from error
    return f"NVRTC {major}.{minor}"


def supported_architectures() -> list[int]:
    """Compute capabilities this compiler knows."""
    nvrtc = _nvrtc()
    return list(_checked(nvrtc, nvrtc.nvrtcGetSupportedArchs()))


def target(arch: int) -> int:
    """What to compile for a device of compute capability ``arch`` (103 for 10.3): that, or, where the compiler is older than the device,
    the first capability of its major version (100), whose machine code the device runs too.

    Raises:
        KernelError: no compiler, or one that knows neither.
    """
    name = compiler()
    known = supported_architectures()
    for one in (arch, arch // 10 * 10):
        if one in known:
            return one
    raise KernelError(f"{name} does not know compute capability {arch // 10}.{arch % 10}; use a PyTorch built for a newer CUDA")


def cache_folder() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "visalign" / "kernels").expanduser()


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelError("the package cuda-bindings is missing, which PyTorch's CUDA builds install; pip install cuda-bindings of "
                          "PyTorch's CUDA version") from error
    return nvrtc


def _checked(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"NVRTC failed: {status!r}")
    return values[0] if len(values) == 1 else tuple(values)


@cache
def _text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def _read(path: Path) -> bytes | None:
    """A file holds the SHA-256 of the code and the code; one that does not fit is written anew."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data[32:]).digest() == data[:32]:
        return data[32:]
    logger.warning("%s is damaged and is compiled again", path)
    return None


def _write(path: Path, code: bytes) -> None:
    """Atomically, so that processes which compile the same kernel at once do not read halves."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("compiled kernels cannot be kept in %s (%s); every process compiles its own. Set %s to a folder that can be "
                       "written", path.parent, error, CACHE_VARIABLE)
