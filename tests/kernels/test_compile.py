"""Every kernel compiles for every architecture by NVRTC and nvcc, without a device; machine code is kept, checked and made anew."""

import re
import shutil
import subprocess

import pytest
import torch

from tests.kernels.cases import COMBINATIONS, STEP, normal, outputs
from visalign.kernels import backend
from visalign.kernels import compile as compiling
from visalign.kernels.compile import FOLDER, OPTIONS, KernelError, compiled, nvrtc_compile, supported_architectures, target
from visalign.kernels.formula import StepFormula
from visalign.kernels.guided_step import run as guided_step
from visalign.kernels.paired_error import fused as pairs
from visalign.kernels.paired_error.formula import PairFormula
from visalign.kernels.transition_log_prob import fused as steps

NVCC = shutil.which("nvcc")


def has_nvrtc():
    try:
        return bool(compiling.compiler())
    except KernelError:
        return False


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="no NVRTC: not a CUDA build of torch")


class Specialisations:
    """An engine that notes what would be launched."""

    resident_blocks = 1

    def __init__(self):
        self.found = {}

    def launch(self, source, kernel, macros, arguments, grid, threads):
        self.found[source, tuple(sorted(macros.items()))] = True


def typical():
    """What sampling and training in bfloat16 compile, and the largest specialisations."""
    engine, shape = Specialisations(), (2, 5)
    x, noise, seeds = normal(shape, 0), normal(shape, 9), torch.tensor([1, 2])
    for name, dtype, num_terms, drawn in ((2, torch.bfloat16, 0, (noise, None)), (2, torch.bfloat16, 0, (None, seeds)),
                                          ("rescale", torch.float16, 1, (noise, None)), (3, torch.float32, 2, (None, seeds))):
        found = outputs(shape, COMBINATIONS[name], dtype=dtype, num_terms=num_terms)
        guided_step(engine, x, found.tensors, [term.gradient for term in found.terms], *drawn, dtype, True, True, False,
                    StepFormula.of(found, STEP))
    for name, dtype, old in ((2, torch.bfloat16, None), ("rescale", torch.float16, x), (3, torch.float32, x)):
        found = outputs(shape, COMBINATIONS[name], "v_prediction", dtype)
        held, formula = () if old is None else found.tensors, StepFormula.of(found, STEP)
        given = steps.Inputs(x.to(dtype), x.to(dtype), found.tensors, held, old)
        steps.run(engine, given, formula)
        steps.run_backward(engine, given, formula, steps.empty(given, formula), steps.Slopes(*[torch.zeros(2)] * 3))
    for name, dtype, mask in ((1, torch.bfloat16, None), (3, torch.float32, x > 0)):
        found = outputs(shape, COMBINATIONS[name], "epsilon", dtype)
        pair = pairs.Inputs(x, noise, found.tensors, found.tensors, mask)
        scalars = PairFormula(torch.full((2,), 0.6), torch.full((2,), 0.8), found.readout, "flow", 0.5)
        pairs.run(engine, pair, scalars, norms=True)
        pairs.run_backward(engine, pair, scalars, torch.ones(2), (torch.zeros(2), torch.zeros(2)))
    return [(source, dict(macros)) for source, macros in engine.found]


TYPICAL = typical()
IDS = [f"{source}-{index}" for index, (source, _) in enumerate(TYPICAL)]


def source_kernels(source):
    return (FOLDER / source / f"{source}.cu").read_text(encoding="utf-8").count('extern "C" __global__')


def test_all_sources_are_among_them():
    assert {source for source, _ in TYPICAL} == {path.parent.name for path in FOLDER.glob("*/*.cu")}


@needs_nvrtc
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(("source", "macros"), TYPICAL, ids=IDS)
def test_nvrtc_compiles_without_local_memory(source, macros, arch):
    if arch not in supported_architectures():
        pytest.skip(f"{compiling.compiler()} does not know sm_{arch}")
    options = (f"--gpu-architecture=sm_{arch}", *OPTIONS, *(f"-D{name}={value}" for name, value in macros.items()), "--ptxas-options=-v")
    found = nvrtc_compile(source, options)
    assert found.code.startswith(b"\x7fELF")
    assert source.encode() in found.code
    # No array lies in local memory. A compiler may trade a register or two for a further block per multiprocessor (NVRTC 12.8 on sm_100).
    frames = [int(size) for size in re.findall(r"(\d+) bytes stack frame", found.log)]
    assert len(frames) == source_kernels(source)
    assert max(frames) <= 8
    assert "warning" not in found.log.lower()


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize(("source", "macros"), TYPICAL, ids=IDS)
def test_nvcc_compiles_them_too(source, macros, tmp_path):
    command = [NVCC, "-arch=sm_90", "-cubin", *OPTIONS, "-Werror", "all-warnings", f"-I{FOLDER}", str(FOLDER / source / f"{source}.cu"),
               "-o", str(tmp_path / "kernel.cubin"), *(f"-D{name}={value}" for name, value in macros.items())]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def vector_accesses(source, kernel, macros):
    """128-bit loads and stores of one kernel, for whole groups at whole addresses: each of its tensors, `GROUPS` times."""
    wide = {"float": 2, "bf16": 1, "f16": 1}
    output = macros["NUM_OUTPUTS"] * wide[macros["OUTPUT_TYPE"]]
    if source == "guidance_rescale":
        loads, stores = output, 0
    elif source == "guided_step":
        loads = output + macros["USES_X"] * wide[macros["X_TYPE"]] + macros["NUM_GRADIENTS"] * wide[macros["GRADIENT_TYPE"]]
        loads += 2 * (macros["NOISE"] == 1)
        stores = wide[macros["NEXT_TYPE"]] + 2 * (macros["WRITES_MEAN"] + macros["WRITES_VELOCITY"])
    else:
        loads, stores = output * (1 + macros["HAS_REFERENCE"]), output if kernel.endswith("_backward") else 0
        if source == "paired_error":
            loads += 2 * (macros["USES_X0"] + macros["USES_NOISE"])
        else:
            loads += macros["USES_X"] * wide[macros["X_TYPE"]] + wide[macros["NEXT_TYPE"]] + 2 * macros["HAS_OLD"]
    return 2 * loads, 2 * stores


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
@pytest.mark.parametrize(("source", "macros"), TYPICAL, ids=IDS)
def test_every_tensor_is_read_and_written_in_128_bits(source, macros, tmp_path):
    command = [NVCC, "-arch=sm_90", "-ptx", *OPTIONS, f"-I{FOLDER}", str(FOLDER / source / f"{source}.cu"), "-o", str(tmp_path / "ptx"),
               *(f"-D{name}={value}" for name, value in macros.items())]
    subprocess.run(command, check=True)
    bodies = re.split(r"\.entry (\w+)\(", (tmp_path / "ptx").read_text())
    kernels = {name: body for name, body in zip(bodies[1::2], bodies[2::2], strict=True) if not name.endswith("_finish")}
    assert source in kernels
    for kernel, body in kernels.items():
        found = tuple(len(re.findall(rf"\b{access}\.global\S*\.v4\.\w32", body)) for access in ("ld", "st"))
        assert found == vector_accesses(source, kernel, macros), kernel


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(tmp_path / "kernels"))
    return tmp_path / "kernels"


@needs_nvrtc
def test_machine_code_is_kept_by_what_went_into_it(folder, monkeypatch):
    source, macros = TYPICAL[0]
    first = compiled(source, macros, 90)
    (path,) = folder.iterdir()
    assert path.name.startswith("guided_step-sm90-")
    monkeypatch.setattr(compiling, "nvrtc_compile", lambda *_: pytest.fail("compiled although it was there"))
    assert compiled(source, macros, 90) == first
    monkeypatch.undo()
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(folder))
    compiled(source, {**macros, "LOG_PROB": 0}, 90)
    compiled(source, macros, 80)
    assert len(list(folder.iterdir())) == 3
    options = ("--gpu-architecture=sm_90",)
    before = compiling.digest(source, options)
    monkeypatch.setattr(compiling, "_text", lambda name: "changed")
    assert compiling.digest(source, options) != before
    monkeypatch.undo()
    monkeypatch.setattr(compiling, "compiler", lambda: "NVRTC 99.0")
    assert compiling.digest(source, options) != before


@needs_nvrtc
def test_an_empty_log_is_not_written_into_pythons_own_bytes(folder):
    """NVRTC ends it with a NUL; written into a shared object it would turn every b" " of the process into one."""
    assert nvrtc_compile(TYPICAL[0][0], ("--gpu-architecture=sm_90", *OPTIONS, *(f"-D{name}={value}" for name, value in
                                                                                TYPICAL[0][1].items()))).log == ""
    assert [bytes([value])[0] for value in range(256)] == list(range(256))


@needs_nvrtc
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:40] + b"x" + data[41:], lambda data: b""])
def test_a_damaged_file_is_made_anew(folder, damage, caplog):
    source, macros = TYPICAL[0]
    whole = compiled(source, macros, 90)
    (path,) = folder.iterdir()
    kept = path.read_bytes()
    path.write_bytes(damage(kept))
    assert compiled(source, macros, 90) == whole
    assert "is damaged and is compiled again" in caplog.text
    assert path.read_bytes() == kept


@needs_nvrtc
def test_a_folder_that_cannot_be_written_is_said_and_does_no_harm(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(tmp_path / "file" / "kernels"))
    assert compiled(*TYPICAL[0], 90).startswith(b"\x7fELF")
    assert "every process compiles its own. Set VISALIGN_KERNEL_CACHE" in caplog.text


@needs_nvrtc
def test_a_source_that_does_not_compile_shows_the_log(folder):
    source, macros = TYPICAL[0]
    with pytest.raises(KernelError, match=r"cannot compile guided_step.cu with .*sm_90(.|\n)*the argument structure differs"):
        compiled(source, {**macros, "ARGS_SIZE": 8}, 90)
    assert not folder.exists()


def test_a_device_newer_than_the_compiler_takes_code_of_its_major_version_or_none(monkeypatch):
    """CUDA 12.8 knows 10.0, 10.1 (a Tegra, whose code runs nowhere else) and 12.0."""
    monkeypatch.setattr(compiling, "compiler", lambda: "NVRTC 12.8")
    monkeypatch.setattr(compiling, "supported_architectures", lambda: [80, 86, 87, 89, 90, 100, 101, 120])
    assert [target(arch) for arch in (80, 87, 90, 100, 103, 121)] == [80, 87, 90, 100, 100, 120]
    with pytest.raises(KernelError, match=r"NVRTC 12.8 does not know compute capability 11.0; use a PyTorch built for a newer CUDA"):
        target(110)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (11, 0))
    assert "does not know compute capability 11.0" in backend._unavailable.__wrapped__(0)


def test_without_bindings_the_message_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    compiling.compiler.cache_clear()
    with pytest.raises(KernelError, match="the package cuda-bindings is missing"):
        compiling.compiler()
    monkeypatch.undo()
    compiling.compiler.cache_clear()


