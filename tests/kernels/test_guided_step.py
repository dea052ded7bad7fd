"""``guided_step``: the CUDA source on the host against the float64 formula; the same bits whatever the batch, the grid and the address."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import (
    COMBINATIONS,
    DTYPES,
    EPS,
    KINDS,
    ODE_STEP,
    SHAPES,
    STEP,
    double,
    end_points,
    magnitude,
    normal,
    outputs,
)
from tests.kernels.host_engine import HostEngine
from visalign.kernels.formula import StepFormula
from visalign.kernels.guided_step import guided_step, run
from visalign.kernels.guided_step.reference import reference
from visalign.maths.gaussian import log_prob, transition_mean
from visalign.maths.outputs import GradientTerm, Outputs
from visalign.maths.philox import philox_normal
from visalign.types import Transition


def fused(engine, found, x, step, noise=None, seeds=None, storage=None, **wanted):
    """The kernel's answer as a dictionary; everything is asked for unless said otherwise."""
    want = {"log_prob": step.std > 0, "velocity": True, "mean": True, **wanted}
    gradients = [term.gradient for term in found.terms]
    names = ("x_next", "log_prob", "velocity", "mean")
    return dict(zip(names, run(engine, x, found.tensors, gradients, noise, seeds, storage, want["log_prob"], want["velocity"],
                               want["mean"], StepFormula.of(found, step)), strict=True))


def check(engine, found, x, step, noise, storage=None):
    """Against the reference in float64: elements to a few roundings of their largest term, the density given the same x_next."""
    got = fused(engine, found, x, step, noise, storage=storage)
    wide = double(found)
    exact = reference(wide, x.double(), step, None if noise is None else noise.double(), None, None, False, True, True)
    tolerance = 8 * EPS * magnitude(found, x)
    for name in ("mean", "velocity"):
        assert (got[name].double() - getattr(exact, name)).abs().max() <= 4 * tolerance, name
    rounded = exact.x_next if storage is None else exact.x_next.float().to(storage).double()
    spacing = 0.0 if storage is None else float(torch.finfo(storage).eps)
    assert bool(((got["x_next"].double() - rounded).abs() <= 4 * tolerance + spacing * rounded.abs()).all())
    assert got["x_next"].dtype == (storage or torch.float32)
    if step.std > 0:
        density = log_prob(got["x_next"].double(), exact.mean, step.std)
        deviation = (got["x_next"].double() - exact.mean).abs().flatten(1).sum(1) / step.std**2
        slack = 4 * tolerance * deviation + 4e-7 * density.abs() + 1e-6 * x[0].numel()
        assert bool(((got["log_prob"].double() - density).abs() <= slack).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(engine, shape, dtype):
    x, noise = normal(shape, 0), normal(shape, 9)
    check(engine, outputs(shape, COMBINATIONS[2], dtype=dtype), x, STEP, noise, storage=dtype)


@pytest.mark.parametrize("name", [name for name in COMBINATIONS if name != 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_guidance(engine, name, dtype):
    shape = (3, 4, 1031)  # two chunks, the second short
    check(engine, outputs(shape, COMBINATIONS[name], dtype=dtype), normal(shape, 0), STEP, normal(shape, 9), storage=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_kinds(engine, kind):
    check(engine, outputs((4, 77), COMBINATIONS[2], kind), normal((4, 77), 0), STEP, normal((4, 77), 9))


@pytest.mark.parametrize("num_terms", [1, 2])
@pytest.mark.parametrize("step", [STEP, ODE_STEP], ids=["noisy", "ode"])
def test_reward_gradients(engine, num_terms, step):
    found = outputs((3, 5, 41), COMBINATIONS[2], "epsilon", torch.float16, num_terms)
    check(engine, found, normal((3, 5, 41), 0), step, normal((3, 5, 41), 9) if step.std else None)


def test_end_points_of_a_policy_without_raw_outputs(engine):
    x = normal((3, 50), 0)
    check(engine, end_points((3, 50), x), x, STEP, normal((3, 50), 9))


def test_a_deterministic_step_is_its_mean(engine):
    shape = (3, 50)
    got = fused(engine, outputs(shape, COMBINATIONS[1]), normal(shape, 0), ODE_STEP)
    assert torch.equal(got["x_next"], got["mean"])
    assert got["log_prob"].shape == (0,)


def test_what_is_not_wanted_is_not_made(engine):
    shape = (3, 50)
    found, x, noise = outputs(shape, COMBINATIONS[1]), normal(shape, 0), normal(shape, 9)
    got = fused(engine, found, x, STEP, noise, log_prob=False, velocity=False, mean=False)
    everything = fused(engine, found, x, STEP, noise)
    assert [got[name].shape for name in ("log_prob", "velocity", "mean")] == [(0,)] * 3
    assert torch.equal(got["x_next"], everything["x_next"])


def select(found, rows):
    return Outputs(tuple(tensor[rows] for tensor in found.tensors), found.alpha, found.sigma, found.readout,
                   tuple(GradientTerm(term.gradient[rows], term.max_ratio) for term in found.terms))


@pytest.mark.parametrize("noise_from", ["given", "philox"])
@pytest.mark.parametrize("name", [2, "rescale"])
def test_batch_split_and_grid_change_no_bit(engine, noise_from, name):
    shape = (5, 9001)
    found, x = outputs(shape, COMBINATIONS[name], dtype=torch.bfloat16, num_terms=1), normal(shape, 0)
    noise, seeds = (normal(shape, 9), None) if noise_from == "given" else (None, torch.tensor([3, 2**62, 5, 7, 11]))

    def at(engine, rows):
        return fused(engine, select(found, rows), x[rows], STEP, None if noise is None else noise[rows],
                     None if seeds is None else seeds[rows], torch.bfloat16)

    whole = at(engine, slice(0, 5))
    parts = [at(HostEngine(engine.folder, resident_blocks=blocks), rows) for blocks, rows in ((1, slice(0, 2)), (7, slice(2, 3)),
                                                                                        (1000, slice(3, 5)))]
    for key, value in whole.items():
        assert torch.equal(value, torch.cat([part[key] for part in parts])), key


def test_noise_made_in_the_kernel_is_that_of_the_reference(engine):
    shape, seeds = (3, 4, 1031), torch.tensor([0, 17, 2**63 - 1])
    flat = outputs(shape, COMBINATIONS[1])
    got = fused(engine, flat, torch.zeros(shape), Transition(A=0.0, B=0.0, std=1.0), seeds=seeds)
    exact = philox_normal(seeds, shape[1:])
    assert (got["x_next"] - exact).abs().max() < 4 * 2.0**-22
    stored = fused(engine, flat, normal(shape, 0), STEP, seeds=seeds)
    given = fused(engine, flat, normal(shape, 0), STEP, noise=got["x_next"])
    assert all(torch.equal(stored[name], given[name]) for name in stored)


def spread(tensor, gap, offset):
    """The same rows in a larger buffer of NaN, ``gap`` elements apart, the first at ``offset``: nothing outside them may matter."""
    rows, dims = tensor.shape[0], tensor[0].numel()
    buffer = torch.full((offset + rows * (dims + gap),), float("nan"), dtype=tensor.dtype)
    inside = buffer[offset:].as_strided(tensor.shape, (dims + gap, *tensor.stride()[1:]))
    return inside.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_and_strides_change_no_bit(engine, dtype):
    """Rows that lie apart, begin off every 16-byte boundary, or are transposed: read in place, or copied."""
    shape = (3, 5, 824)
    x, noise, found = normal(shape, 0), normal(shape, 9), outputs(shape, COMBINATIONS[2], dtype=dtype, num_terms=1)
    plain = fused(engine, found, x, STEP, noise, storage=dtype)
    apart = replace(found, tensors=tuple(spread(tensor, 3, k + 1) for k, tensor in enumerate(found.tensors)),
                    terms=(GradientTerm(spread(found.terms[0].gradient, 8, 4), found.terms[0].max_ratio),))
    moved = fused(engine, apart, spread(x, 1, 1), STEP, spread(noise, 2, 3), storage=dtype)
    transposed = replace(found, tensors=tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in found.tensors))
    copied = fused(engine, transposed, x, STEP, noise, storage=dtype)
    for name, value in plain.items():
        assert torch.equal(moved[name], value), name
        assert torch.equal(copied[name], value), name


def test_an_empty_batch_is_empty(engine):
    shape = (0, 7)
    got = fused(engine, outputs(shape, COMBINATIONS[1]), normal(shape, 0), STEP, normal(shape, 9))
    assert got["x_next"].shape == (0, 7)
    assert got["log_prob"].shape == (0,)


def test_tensors_of_another_shape_are_refused_before_an_address_is_read(engine):
    shape = (3, 50)
    found, x, noise = outputs(shape, COMBINATIONS[1], num_terms=1), normal(shape, 0), normal(shape, 9)
    for changed in ({"noise": noise[:1]}, {"noise": None, "seeds": torch.zeros(2, dtype=torch.int64)}):
        with pytest.raises(ValueError, match=r"noise is \(1, 50\) on cpu, the state \(3, 50\)|one seed per sample, \(3,\), got \(2,\)"):
            fused(engine, found, x, STEP, **{"noise": noise, **changed})
    with pytest.raises(ValueError, match=r"outputs is \(3, 49\) on cpu"):
        fused(engine, outputs((3, 49), COMBINATIONS[1]), x, STEP, noise)
    with pytest.raises(ValueError, match=r"gradients is \(3, 1\) on cpu"):
        fused(engine, replace(found, terms=(GradientTerm(noise[:, :1]),)), x, STEP, noise)


def test_the_torch_backend_is_the_old_chain_bit_for_bit():
    """Combination, prediction, mean, noise, rounding, density: the operations of a rollout before there were operators, in their order."""
    shape = (3, 16, 9, 7)
    found, x, noise = outputs(shape, COMBINATIONS["rescale"], "v_prediction", torch.bfloat16), normal(shape, 0), normal(shape, 9)
    got = guided_step(found, x, STEP, noise=noise, storage_dtype=torch.bfloat16, log_prob=True, velocity=True, mean=True, backend="torch")
    prediction = found.prediction(x)
    mean = transition_mean(prediction, STEP)
    after = (mean + STEP.std * noise.to(mean)).to(torch.bfloat16).float()
    assert torch.equal(got.x_next.float(), after)
    assert torch.equal(got.log_prob, log_prob(after, mean, STEP.std))
    assert torch.equal(got.velocity, prediction.velocity)
    assert torch.equal(got.mean, mean)
    assert torch.equal(guided_step(found, x, STEP, noise=noise).x_next, mean + STEP.std * noise)  # auto, on a CPU


def test_wrong_calls_are_refused():
    shape = (2, 5)
    found, x, noise = outputs(shape, COMBINATIONS[1]), normal(shape, 0), normal(shape, 9)
    with pytest.raises(ValueError, match=r"std 0\.3 takes noise or seeds, got neither"):
        guided_step(found, x, STEP)
    with pytest.raises(ValueError, match="got noise and seeds"):
        guided_step(found, x, STEP, noise=noise, seeds=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="std 0 takes no noise, got noise"):
        guided_step(found, x, ODE_STEP, noise=noise)
    with pytest.raises(ValueError, match="has no density"):
        guided_step(found, x, ODE_STEP, log_prob=True)
    with pytest.raises(ValueError, match=r"unknown kernel backend 'gpu'; use auto, cuda, torch"):
        guided_step(found, x, ODE_STEP, backend="gpu")
    with pytest.raises(ValueError, match="kernels='cuda' is not possible here, tensors are on cpu"):
        guided_step(found, x, ODE_STEP, backend="cuda")
