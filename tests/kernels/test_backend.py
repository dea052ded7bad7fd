"""Which backend is taken is decided by rules, said once, and never differs from what was asked without a word."""

import logging

import pytest
import torch

from visalign.kernels import backend
from visalign.kernels.arguments import Arguments, as_rows, num_chunks
from visalign.kernels.backend import resolve


@pytest.fixture(autouse=True)
def fresh_log(caplog):
    backend._say.cache_clear()
    caplog.set_level(logging.INFO, logger="visalign.kernels.backend")


def test_auto_takes_torch_on_a_cpu_and_says_so_once(caplog):
    for _ in range(3):
        assert resolve("auto", "guided_step", [torch.zeros(2)]) == "torch"
    assert caplog.messages == ["guided_step runs on backend torch: tensors are on cpu"]


def test_another_reason_is_said_again(caplog):
    resolve("auto", "guided_step", [torch.zeros(2)])
    resolve("auto", "guided_step", [torch.zeros(2)], obstacle="the guidance correction 'token norm' is not fused")
    resolve("torch", "guided_step", [torch.zeros(2)])
    assert len(caplog.messages) == 3
    assert caplog.messages[1].endswith("the guidance correction 'token norm' is not fused")
    assert caplog.messages[2].endswith("asked for")


def test_cuda_that_is_not_possible_is_an_error_with_the_reason():
    with pytest.raises(ValueError, match=r"paired_error: kernels='cuda' is not possible here, tensors are on cpu; use kernels='auto'"):
        resolve("cuda", "paired_error", [torch.zeros(2)])
    with pytest.raises(ValueError, match="not possible here, because"):
        resolve("cuda", "paired_error", [torch.zeros(2)], obstacle="because")
    with pytest.raises(ValueError, match="unknown kernel backend 'triton'"):
        resolve("triton", "paired_error", [torch.zeros(2)])


def test_arguments_are_laid_out_as_c_does():
    """Addresses and strides of eight bytes, doubles, floats, and the end padded to eight."""
    packed = Arguments().pointers(None).integers(-2).doubles(0.5).floats(1.0, 2.0, 3.0).packed()
    assert packed == bytes(8) + b"\xfe" + b"\xff" * 7 + bytes(6) + b"\xe0\x3f" + b"\x00\x00\x80\x3f" + b"\x00\x00\x00\x40" + \
        b"\x00\x00\x40\x40" + bytes(4)


def test_rows_are_read_in_place_where_their_elements_are_neighbours():
    whole = torch.arange(48.0).reshape(4, 2, 6)
    for view, stride in ((whole, 12), (whole[::2], 24), (whole[:, 1], 12), (whole[:, :, None], 12), (whole[:1].expand(3, 2, 6), 0),
                         (whole.transpose(0, 1)[:, :1], 6)):
        found, found_stride = as_rows(view)
        assert found.data_ptr() == view.data_ptr()
        assert found_stride == stride
    for view in (whole[..., ::2], whole.transpose(1, 2)):
        found, stride = as_rows(view)
        assert found.is_contiguous()
        assert stride == view[0].numel()
        assert torch.equal(found, view)


@pytest.mark.parametrize(("dims", "chunks"), [(1, 1), (4096, 1), (4097, 2), (16 * 21 * 60 * 104, 512)])
def test_chunks(dims, chunks):
    assert num_chunks(dims) == chunks
