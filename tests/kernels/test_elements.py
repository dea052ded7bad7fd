"""The kernels' arithmetic, compiled for the host: conversions bit for bit, noise against the published answers and against float64."""

import ctypes
import math
import subprocess

import pytest
import torch

from tests.kernels.host_engine import COMPILER, FOLDER, HERE
from visalign.maths.philox import philox_normal

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("elements") / "elements.so"
    subprocess.run([COMPILER, "-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-Werror", "-ffp-contract=off", "-shared", "-fPIC",
                    f"-I{FOLDER}", str(HERE / "elements_on_host.cpp"), "-o", str(path)], check=True)
    return ctypes.CDLL(str(path))


def call(function, *values):
    function(*(ctypes.c_void_p(value.data_ptr()) if isinstance(value, torch.Tensor) else ctypes.c_int64(value) for value in values))


def ulps(found, exact):
    """Distance in units in the last place of the float32 nearest to ``exact`` (float64)."""
    unit = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-126))) - 23)
    return ((found.double() - exact).abs() / unit).max().item()


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_every_16_bit_number_widens_as_in_torch(library, dtype, name):
    every = torch.arange(65536).to(torch.int32).to(torch.uint16).view(torch.int16)
    found, expected = torch.empty(65536), every.view(dtype).float()
    call(getattr(library, f"widen_{name}"), every, found, 65536)
    same = (found.view(torch.int32) == expected.view(torch.int32)) | (found.isnan() & expected.isnan())
    assert bool(same.all())
    assert int(expected.isnan().sum()) > 100


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_rounding_is_that_of_torch_for_all_magnitudes_and_ties(library, dtype, name):
    """Random bit patterns, every 16-bit number, its ties with the next one, and their neighbours: subnormals, overflow, infinities, NaN."""
    patterns = torch.randint(-2**31, 2**31, (1_000_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32).view(torch.float32)
    every = torch.arange(65536).to(torch.int32).to(torch.uint16).view(torch.int16).view(dtype).float()
    ties = (every[:-1].double() / 2 + every[1:].double() / 2).float()
    steps = [torch.nextafter(ties, torch.tensor(way)) for way in (math.inf, -math.inf)]
    near = torch.rand(100_000, generator=torch.Generator().manual_seed(1)) * 2.0**-13
    values = torch.cat([patterns, every, ties, *steps, near, -near, torch.tensor([65519.996, 65520.0, -65520.0, 3.4e38])]).contiguous()
    found = torch.empty(len(values), dtype=torch.int16)
    call(getattr(library, f"round_{name}"), values, found, len(values))
    expected = values.to(dtype)
    same = (found == expected.view(torch.int16)) | (found.view(dtype).isnan() & expected.isnan())
    assert bool(same.all()), values[~same][:5]


@pytest.mark.parametrize(("counter", "key", "answer"), [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1))])
def test_philox_gives_the_known_answers(library, counter, key, answer):
    out = (ctypes.c_uint32 * 4)()
    library.words((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), out)
    assert tuple(out) == answer


def test_the_logarithm_is_good_to_two_units_everywhere(library):
    words = torch.cat([torch.arange(1, 1000), torch.randint(1, 2**32, (500_000,), generator=torch.Generator().manual_seed(0)),
                       2**32 - torch.arange(0, 100_000, 7)])
    values = ((words.double() + 0.5) / 2**32).float()
    found = torch.empty(len(values))
    call(library.logarithms, values, found, len(values))
    assert torch.equal(found[values == 1], torch.zeros(int((values == 1).sum())))
    inside = values < 1
    assert ulps(found[inside], values[inside].double().log()) < 2


def test_cosine_and_sine_are_good_to_three_units_everywhere(library):
    """Also where they vanish: quarter turns are taken off before anything is rounded."""
    eighths = torch.tensor([k * 2**29 + offset for k in range(8) for offset in (-2, -1, 0, 1, 2)]) % 2**32
    words = torch.cat([eighths, torch.randint(0, 2**32, (500_000,), generator=torch.Generator().manual_seed(0))])
    given = words.to(torch.uint32)
    cosine, sine = torch.empty(len(words)), torch.empty(len(words))
    call(library.turns, given, cosine, sine, len(words))
    # The exact remainder after quarter turns keeps the small one of the two exact in float64 as well.
    quarter = ((words + 2**29) >> 30) % 4
    rest = (words - (((words + 2**29) >> 30) << 30)).double() * (2 * math.pi / 2**32)
    exact_cosine = torch.stack([rest.cos(), -rest.sin(), -rest.cos(), rest.sin()])[quarter, torch.arange(len(words))]
    exact_sine = torch.stack([rest.sin(), rest.cos(), -rest.sin(), -rest.cos()])[quarter, torch.arange(len(words))]
    assert ulps(cosine, exact_cosine) < 3
    assert ulps(sine, exact_sine) < 3


@pytest.mark.parametrize("seed", [0, 12345, 2**63 - 1])
def test_normals_are_those_of_the_reference_to_four_units(library, seed):
    found, count = torch.empty(400_000), 100_000
    call(library.normals, seed, 0, found, count)
    exact = philox_normal(torch.tensor([seed]), (400_000,))[0]
    # Where a radius or an angle is exactly 0 both are; elsewhere relative to the value itself.
    assert torch.equal(found == 0, exact == 0)
    kept = exact != 0
    assert ulps(found[kept], exact[kept].double()) < 4 + 0.5


def test_blocks_beyond_32_bits_are_other_blocks(library):
    near, far = torch.empty(4), torch.empty(4)
    call(library.normals, 3, 5, near, 1)
    call(library.normals, 3, 5 + 2**32, far, 1)
    assert not torch.equal(near, far)
