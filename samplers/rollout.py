"""Policy + dynamics + prompts -> a grouped ``Trajectory``.

Two properties make the update exact. A sample depends on its global index alone, so one process or eight, with any micro-batch, draw the
same samples. And what is stored is what was used: a state is rounded to the storage dtype *before* the log-probability is taken and
*before* the next step sees it, so the update recomputes the same density from the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from visalign.kernels.ask import outputs_of
from visalign.kernels.backend import Backend
from visalign.kernels.guided_step import guided_step
from visalign.maths.seeds import derive_seed
from visalign.protocols import Conditioning, Dynamics, Policy
from visalign.samplers.dynamics import ODE, Mixed
from visalign.samplers.steps import StepSelection
from visalign.types import Prompt, Role, Trajectory, Transition

INITIAL, STEP = 0, 1  # what a seed is for: derive_seed(seed, sample index, INITIAL) or (..., STEP + step)
NoiseSource = Literal["generator", "philox"]


def rollout(policy: Policy, prompts: Sequence[Prompt], group_size: int, dynamics: Dynamics, steps: StepSelection, *, seed: int,
            iteration: int = 0, first_index: int = 0, same_initial_noise: bool = False, storage_dtype: torch.dtype = torch.float32,
            microbatch: int | None = None, keep_prediction: bool = True, storage_device: torch.device | str | None = None,
            role: Role = "policy", noise: NoiseSource = "generator", backend: Backend = "auto") -> Trajectory:
    """Sample ``group_size`` times per prompt, without gradients, in evaluation mode and under the caller's autocast.

    Args:
        prompts: P prompts; each is encoded once and its row repeated ``group_size`` times.
        dynamics: followed on the selected steps; all others are ODE steps.
        steps: which steps are stored in this ``iteration``; they follow the dynamics, or the ODE too if ``steps.stochastic`` is false.
        first_index: global index of the first sample; sample k has index ``first_index + k`` and its seeds follow from it.
        same_initial_noise: the samples of one group share ``x`` at the first level (groups never share).
        storage_dtype: of ``x`` and ``x_next``.
        microbatch: samples per denoiser call, ``None`` for all at once; changes memory, not the samples.
        keep_prediction: store the velocity at the stored steps.
        storage_device: where the trajectory is kept, ``None`` for the policy's device; ``"cpu"`` saves accelerator memory.
        role: whose weights sample.
        noise: of the steps: PyTorch's ``generator`` on the CPU, one per sample, or ``philox`` (`maths.philox`), which the device itself
            makes. Both depend on the sample's index and the step alone; they are other samples of one distribution.
        backend: of the operators, see `visalign.kernels`.
    Returns:
        N = P * group_size samples, group by group.
    Raises:
        ValueError: nothing to sample, or a step that should be stochastic is deterministic.
    """
    if not prompts or group_size < 1:
        raise ValueError(f"a rollout needs at least one prompt and group_size >= 1, got {len(prompts)} prompts and group_size {group_size}")
    levels = policy.schedule.levels
    stored = steps.select(policy.schedule.num_steps, iteration, seed)
    stochastic = stored if steps.stochastic else ()
    mixed = Mixed(dynamics, stochastic)
    transitions = tuple(mixed.transition(levels, step) for step in range(policy.schedule.num_steps))
    _check_stochastic(transitions, stochastic, dynamics)
    if same_initial_noise and not stochastic and group_size > 1:
        raise ValueError("same_initial_noise with no stochastic step makes every sample of a group the same; set "
                         "sampler.same_initial_noise=false, or select stochastic steps (sampler.steps)")

    num_samples = len(prompts) * group_size
    device = policy.device if storage_device is None else storage_device
    group_id = torch.arange(num_samples) // group_size
    sample_index = torch.arange(first_index, first_index + num_samples)
    noise_index = first_index + group_id * group_size if same_initial_noise else sample_index

    def storage(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty((num_samples, *shape), dtype=dtype, device=device)

    x, x_next = (storage(storage_dtype, len(stored), *policy.latent_shape) for _ in range(2))
    velocity = storage(torch.float32, len(stored), *policy.latent_shape) if keep_prediction else None
    log_probs, x_final = storage(torch.float32, len(stored)).zero_(), storage(torch.float32, *policy.latent_shape)

    policy.train(False)
    with torch.no_grad():
        conditioning = policy.encode(prompts)
        for rows in torch.arange(num_samples).split(microbatch or num_samples):
            at = slice(int(rows[0]), int(rows[-1]) + 1)
            chunk = conditioning.select(group_id[at].tolist())
            state = policy.initial_latents([derive_seed(seed, index, INITIAL) for index in noise_index[at].tolist()])
            for step, transition in enumerate(transitions):
                kept, noisy = step in stored, transition.std > 0
                if kept:
                    state = _round(state, storage_dtype)
                drawn, seeds = _draw(noise, [derive_seed(seed, index, STEP + step) for index in sample_index[at].tolist()], state, noisy)
                made = guided_step(outputs_of(policy, state, step, chunk, role), state, transition, noise=drawn, seeds=seeds,
                                   storage_dtype=storage_dtype if noisy else None, log_prob=noisy, velocity=kept and keep_prediction,
                                   backend=backend)
                if kept:
                    entry = stored.index(step)
                    x[at, entry], x_next[at, entry] = state.to(x), made.x_next.to(x_next)
                    if made.log_prob is not None:
                        log_probs[at, entry] = made.log_prob.to(log_probs)
                    if velocity is not None and made.velocity is not None:
                        velocity[at, entry] = made.velocity.to(velocity)
                state = made.x_next.float() if noisy else made.x_next
            x_final[at] = state.to(x_final)

    return Trajectory(x=x, x_next=x_next, x_final=x_final, step_index=torch.tensor(stored, dtype=torch.int64),
                      transitions=tuple(transitions[step] for step in stored), log_prob=log_probs, prediction=velocity,
                      group_id=group_id, prompt_index=group_id.clone(), sample_index=sample_index, prompts=tuple(prompts),
                      conditioning=conditioning)


def generate(policy: Policy, prompts: Sequence[Prompt], seeds: Sequence[int], *, dynamics: Dynamics | None = None,
             microbatch: int | None = None, role: Role = "policy", backend: Backend = "auto") -> Tensor:
    """Clean latents (n, *latent_shape), float32: one sample per prompt and seed, by the ODE unless ``dynamics`` says otherwise.

    The seed is handed to the pipeline's own noise as it is, so the pipeline called with it makes the same sample.

    Raises:
        ValueError: the numbers of prompts and seeds differ.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"generate takes one seed per prompt, got {len(prompts)} prompts and {len(seeds)} seeds")
    dynamics = dynamics or ODE()
    levels = policy.schedule.levels
    transitions = [dynamics.transition(levels, step) for step in range(policy.schedule.num_steps)]
    policy.train(False)
    finals = []
    size = microbatch or len(prompts)
    with torch.no_grad():
        for start in range(0, len(prompts), size):
            at = slice(start, start + size)
            chunk: Conditioning = policy.encode(prompts[at])
            state = policy.initial_latents(seeds[at])
            for step, transition in enumerate(transitions):
                noise, _ = _draw("generator", [derive_seed(seed, STEP + step) for seed in seeds[at]], state, transition.std > 0)
                state = guided_step(outputs_of(policy, state, step, chunk, role), state, transition, noise=noise, backend=backend).x_next
            finals.append(state.float())
    return torch.cat(finals) if finals else torch.empty(0, *policy.latent_shape)


def standard_normal(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """N(0, I) of shape (len(seeds), *shape), float32 on the CPU: row k depends on ``seeds[k]`` alone, on every kind of device."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@dataclass(frozen=True)
class TrajectorySampler:
    """``rollout`` and ``generate`` with a run's settings, as ``protocols.Sampler``; attributes are the arguments of ``rollout``."""

    group_size: int
    dynamics: Dynamics
    steps: StepSelection
    seed: int
    microbatch: int
    same_initial_noise: bool = False
    storage_dtype: torch.dtype = torch.float32
    storage_device: torch.device | str | None = None
    keep_prediction: bool = True
    noise: NoiseSource = "generator"
    backend: Backend = "auto"

    def rollout(self, policy: Policy, prompts: Sequence[Prompt], *, rows: Sequence[int], iteration: int, first_index: int,
                role: Role = "policy") -> Trajectory:
        return rollout(policy, prompts, self.group_size, self.dynamics, self.steps, seed=self.seed, iteration=iteration,
                       first_index=first_index, same_initial_noise=self.same_initial_noise, storage_dtype=self.storage_dtype,
                       microbatch=self.microbatch, keep_prediction=self.keep_prediction, storage_device=self.storage_device, role=role,
                       noise=self.noise, backend=self.backend)

    def generate(self, policy: Policy, prompts: Sequence[Prompt], seeds: Sequence[int], role: Role = "policy") -> Tensor:
        return generate(policy, prompts, seeds, microbatch=self.microbatch, role=role, backend=self.backend)


def _draw(source: NoiseSource, seeds: Sequence[int], like: Tensor, wanted: bool) -> tuple[Tensor | None, Tensor | None]:
    """A step's noise, or the seeds that it is made of where the step is taken; ``None`` for both where none is wanted."""
    if not wanted:
        return None, None
    if source == "philox":
        return None, torch.tensor(seeds, dtype=torch.int64, device=like.device)
    return standard_normal(seeds, like.shape[1:]).to(like.device), None


def _round(state: Tensor, dtype: torch.dtype) -> Tensor:
    return state.to(dtype).float()


def _check_stochastic(transitions: Sequence[Transition], stored: Sequence[int], dynamics: Dynamics) -> None:
    if transitions[-1].std != 0:
        raise ValueError(f"{dynamics} adds noise (std {transitions[-1].std:.3g}) in the last step, which would stay in every sample; "
                         "a dynamics must make its last step deterministic")
    for step in stored:
        if not transitions[step].std > 0:
            raise ValueError(f"step {step} is selected for training but {dynamics} is deterministic there (std 0), so it has no density; "
                             "select other steps (sampler.steps), or give the dynamics noise (sampler.dynamics)")
