"""The main path: collect -> score -> credit -> update -> log -> save. Read this file first, top to bottom.

Every process runs the same loop on its own groups. What must agree between them (advantages, denominators, gradients) is gathered or
summed through ``distributed``; what must be the same after a resume (everything) is in ``state``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from visalign import checkpoint, invariants, scoring
from visalign.assessment import Assessed, Assessment
from visalign.config import Config
from visalign.credit import CircuitBreaker, Credit, asked, assign_credit, check_prompts, judge_sets
from visalign.data import GroupSampler
from visalign.distributed import Processes
from visalign.ema import EMA
from visalign.geometry import Geometry, assign_updates
from visalign.guards.watch import Alarm, Watch
from visalign.maths.advantages import AdvantageRule
from visalign.maths.seeds import derive_seed
from visalign.optimization import Optimization, Step, step_metrics
from visalign.parts import Parts
from visalign.progress import Callback, Silent
from visalign.protocols import Remembers
from visalign.runfolder import AFTER, BEFORE, RunFolder, evaluation_label
from visalign.state import State
from visalign.tally import Tally, concatenate_scores
from visalign.types import Batch, Experience, Media, Scores, Trajectory

logger = logging.getLogger(__name__)

PERMUTATION, MICROBATCHES = 2, 3  # what a seed is for: derive_seed(seed, number, PERMUTATION)
COMBINER = "_combiner"  # the combiner's memory among those of rewards


def train(config: Config, run_dir: Path | str, resume: bool = False, callback: Callback | None = None) -> Path:
    """Run ``config`` in ``run_dir`` (or continue the run that is there) and return the folder: the result.

    Raises:
        ValueError: something in the configuration does not fit; before anything is generated.
        RewardFailureError, InvariantError, TrainingStoppedError, CheckpointError: the run cannot go on; the message says what to do.
    """
    from visalign.build import build  # the composition root imports every leaf; this file needs none of them

    processes = Processes.start(config.model.device)
    geometry(config, processes)  # before weights are loaded
    return run(build(config, processes), config, Path(run_dir), processes, resume=resume, callback=callback or Silent())


def run(parts: Parts, config: Config, run_dir: Path, processes: Processes, *, resume: bool = False,
        callback: Callback | None = None) -> Path:
    """The loop, for parts that are already built."""
    loop = Loop(parts, config, run_dir, processes, callback if callback is not None and processes.is_main else Silent())
    try:
        loop.start(resume)
        loop.callback.on_start(loop.state.iteration, config.train.iterations)
        while loop.state.iteration < config.train.iterations and loop.alarm is None:
            loop.iterate()
        loop.finish()
    finally:
        loop.callback.on_end()
        loop.folder.close()
    return run_dir


def geometry(config: Config, processes: Processes) -> Geometry:
    """Batch geometry of this launch."""
    train = config.train
    return Geometry(train.groups, train.group_size, train.updates, train.microbatch, processes.world)


class Loop:
    """One run: its parts, its state, its folder."""

    def __init__(self, parts: Parts, config: Config, run_dir: Path, processes: Processes, callback: Callback) -> None:
        self.parts, self.config, self.processes, self.callback = parts, config, processes, callback
        self.folder = RunFolder(run_dir, writes=processes.is_main)
        self.geometry = geometry(config, processes)
        if parts.algorithm.needs_reference and not parts.policy.has_role("reference"):
            raise ValueError("the algorithm compares with a reference (kl_weight > 0, or a loss that needs one), and the policy has none; "
                             "train an adapter, or use kl_weight 0 and a loss without reference")
        trained = asked(parts.terms)
        scoring.admit(trained, parts.prompts)
        check_prompts(parts.terms, parts.combiner, parts.prompts)
        scoring.admit({**trained, **parts.guards}, parts.eval_prompts)
        scoring.admit_latents({**trained, **parts.guards}, parts.latents)
        trainable = parts.policy.named_trainable()
        self.state = State(iteration=0, optimization=Optimization(trainable, config.train, processes.device),
                           ema=None if config.ema is None else EMA(trainable, config.ema.decay),
                           data=GroupSampler(len(parts.prompts), config.train.groups, config.train.seed),
                           breaker=CircuitBreaker(config.train.max_failed),
                           memories={**{term.name: term.reward for term in parts.terms if isinstance(term.reward, Remembers)},
                                     **({COMBINER: parts.combiner} if isinstance(parts.combiner, Remembers) else {})})
        self.assessment = Assessment(parts, config, self.folder, processes, Watch(parts, config.stopping, self.folder, processes))
        self.alarm: Alarm | None = None  # why the run ends before its last iteration
        self.timings: dict[str, float] = {}
        self.moved = False  # whether this process has changed the weights yet

    def iterate(self) -> None:
        """One iteration, from prompts to a checkpoint."""
        self.timings = {}
        with self.phase("sample"):
            trajectory = self.collect()
        with self.phase("score"):
            scores, seen = self.score(trajectory)
        experience, credit = self.credit(trajectory, scores)
        with self.phase("update"):
            metrics = {**credit.metrics, **seen, **self.update(experience)}
        iteration, self.state.iteration = self.state.iteration, self.state.iteration + 1
        done = self.state.iteration == self.config.train.iterations
        standing: float | None = None  # only evaluated weights can be the best
        if done or self.due(self.config.evaluation.every):
            found = self.evaluated(AFTER if done else evaluation_label(self.state.iteration))
            metrics, standing, self.alarm = {**metrics, **found.metrics}, found.standing, self.heeded(found.alarm)
        self.folder.log(iteration, metrics, self.timings)
        if done or self.due(self.config.checkpoint.every) or standing is not None:
            self.save(standing)
        self.callback.on_iteration(iteration, metrics)

    def save(self, standing: float | None) -> None:
        self.callback.on_phase("save", 0, 1)
        self.state.save(self.parts.policy, self.folder, self.config, self.processes, score=standing)

    def heeded(self, alarm: Alarm | None) -> Alarm | None:
        """An alarm that ends the run: there must be evaluated checkpoints to choose the result from."""
        return alarm if self.config.stopping.stop and self.config.evaluation.every else None

    def due(self, every: int) -> bool:
        return every > 0 and self.state.iteration % every == 0

    def collect(self) -> Trajectory:
        """This process's groups: P_local prompts, G samples each."""
        drawn = self.state.data.next()
        mine = self.processes.share(len(drawn))
        rows = [drawn[i] for i in mine]
        first = (self.state.iteration * self.geometry.groups + mine.start) * self.geometry.group_size
        self.parts.algorithm.begin(self.parts.train_policy, self.state.iteration)
        with self.state.optimization.autocast(cache=True):
            trajectory = self.parts.sampler.rollout(self.parts.policy, [self.parts.prompts[row] for row in rows], rows=rows,
                                                    iteration=self.state.iteration, first_index=first,
                                                    role=self.parts.algorithm.rollout_role)
        invariants.check_groups(trajectory, self.geometry.group_size)
        return trajectory

    def score(self, trajectory: Trajectory) -> tuple[dict[str, Scores], dict[str, float]]:
        """Scores of this process's samples by reward name, each (N_local,), and what all samples look like; a data set has its scores."""
        if trajectory.scores:
            return dict(trajectory.scores), {}
        rewards, prompts = asked(self.parts.terms), [trajectory.prompts[g] for g in trajectory.group_id.tolist()]
        needed = scoring.spaces(rewards.values())
        media: list[Media] = []
        latents: list[Media] = []
        with torch.no_grad():
            if "latent" in needed and self.parts.latents is not None:
                latents = scoring.latent_media(trajectory.x_final, prompts, self.parts.latents, rewards.values())
            for part in trajectory.x_final.split(self.geometry.microbatch) if "media" in needed else ():
                media += self.parts.policy.decode(part.to(self.processes.device), prompts[len(media):len(media) + len(part)])
                self.callback.on_phase("score", len(media), trajectory.num_samples)
        seen = self.assessment.watch.of_samples(media, trajectory.group_id) if media else {}
        seconds: dict[str, float] = {}
        scores = scoring.score(rewards, media, prompts, trajectory.group_id.tolist(), latents, seconds)
        self.timings |= {f"reward/{name}/seconds": value for name, value in seconds.items()} | scoring.telemetry(rewards)
        return scores, seen

    def credit(self, trajectory: Trajectory, scores: Mapping[str, Scores]) -> tuple[Experience, Credit]:
        """Advantages from the statistics of all processes' samples; this process keeps its own rows."""
        group_id = torch.arange(self.geometry.samples) // self.geometry.group_size
        everyone = judge_sets(self.parts.terms, concatenate_scores(self.processes.gather_objects(dict(scores))), group_id)
        self.state.breaker.update({term.name: everyone[term.name] for term in self.parts.terms if term.required})
        prompts = [prompt for part in self.processes.gather_objects(list(trajectory.prompts)) for prompt in part]
        credit = assign_credit(self.parts.terms, everyone, group_id, AdvantageRule(**self.config.algorithm.advantage.model_dump()),
                               self.parts.combiner, prompts)
        invariants.check_advantages(credit.advantage, everyone, group_id)
        share = self.processes.share(self.geometry.samples)
        own = slice(share.start, share.stop)
        advantage = credit.advantage[own].unsqueeze(1).expand(-1, max(len(trajectory.transitions), 1))
        made = Experience(trajectory, advantage.to(trajectory.log_prob), credit.valid[own], self.state.iteration, credit.reward[own])
        return made, credit

    def update(self, experience: Experience) -> dict[str, float]:
        """``updates`` optimizer steps, each on its share of every group; returns metrics over all of them."""
        optimization, algorithm = self.state.optimization, self.parts.algorithm
        self.parts.policy.train(True)
        with optimization.autocast():
            experience = algorithm.prepare(self.parts.train_policy, experience, self.geometry.microbatch)
        assignment = self.assignment(experience.trajectory)
        whole, steps = Tally(), list[Step]()
        for update in range(self.geometry.updates):
            rows = (assignment == update).nonzero().squeeze(1)
            denominator = self.processes.sum([float(experience.valid[rows].sum())])[0]
            if denominator == 0:
                continue  # not one valid sample anywhere; the circuit breaker stops a run in which this persists
            tally = self.accumulate(Batch(experience, rows, denominator, self.processes.sum), update).over(self.processes)
            if not tally.sums:
                continue  # nothing to compare anywhere, such as ties alone: momentum must not move the weights
            if update == 0:
                invariants.check_reference(tally.maxima, moved=self.moved, iteration=experience.iteration)
                invariants.check_first_update(tally.maxima, iteration=experience.iteration, num_dims=experience.trajectory.num_dims,
                                              dtype=invariants.coarser(self.config.model.dtype, self.config.train.precision))
                whole.maxima |= {f"{name}_first": value for name, value in tally.maxima.items()}
            steps.append(optimization.step(tally.loss, self.processes))
            if self.state.ema is not None and steps[-1].applied:
                self.state.ema.step(self.parts.policy.named_trainable())
            whole.merge(tally)
            self.callback.on_phase("update", update + 1, self.geometry.updates)
        self.moved = self.moved or any(step.moved for step in steps)
        return {**whole.metrics(), **step_metrics(steps), "train/skipped": float(optimization.num_skipped)}

    def accumulate(self, batch: Batch, update: int) -> Tally:
        """Gradients of one optimizer step on this process: a sum over micro-batches, already over the global denominator."""
        optimization, tally = self.state.optimization, Tally()
        seed = derive_seed(self.config.train.seed, batch.experience.iteration, update, MICROBATCHES)
        policy, algorithm = self.parts.train_policy, self.parts.algorithm
        for microbatch in algorithm.microbatches(policy, batch, self.geometry.microbatch, seed):
            with optimization.autocast():
                terms = algorithm.loss(policy, microbatch)
            optimization.backward(terms.loss)
            tally.add(terms)
        return tally

    def assignment(self, trajectory: Trajectory) -> Tensor:
        """Which optimizer step each sample belongs to, int64 (N_local,): a random equal share of every group, or whole groups in turn.

        Members are permuted per group by the group's global index, so the answer is the same on any number of processes."""
        if self.parts.algorithm.whole_groups:
            return trajectory.sample_index // self.geometry.group_size % self.geometry.updates
        firsts = trajectory.sample_index[::self.geometry.group_size].tolist()
        generators = [torch.Generator().manual_seed(derive_seed(self.config.train.seed, first, PERMUTATION)) for first in firsts]
        members = torch.stack([torch.randperm(self.geometry.group_size, generator=generator) for generator in generators])
        return assign_updates(members, self.geometry.updates)

    def evaluated(self, label: str) -> Assessed:
        """The current weights (their average, if there is one) on the evaluation prompts; kept under ``label``."""
        autocast = self.state.optimization.autocast
        with self.phase("evaluate"), self.averaged_weights():
            return self.assessment.assess(label, self.state.iteration, lambda: autocast(cache=True),
                                          lambda done, total: self.callback.on_phase("evaluate", done, total))

    def start(self, resume: bool) -> None:
        """Take up the newest checkpoint, or start with an evaluation of the weights as they are."""
        newest = checkpoint.latest(self.folder.checkpoints)
        if newest is not None and not resume:
            raise ValueError(f"{self.folder.path} already holds a run; continue it with visalign train --resume {self.folder.path}, "
                             "or choose another folder")
        saved = None if newest is None else checkpoint.load(newest)
        if saved is not None:
            self.state.restore(self.parts.policy, saved, self.processes)
            logger.info("resuming from %s", newest)
        self.folder.open(self.config, saved)
        if saved is None:
            # Row -1: what the weights give before iteration 0.
            self.folder.log(-1, self.evaluated(BEFORE).metrics, self.timings)
            if self.config.stopping.stop and self.config.evaluation.every:
                self.save(0.0)  # the start may turn out to be the best
            return
        self.assessment.watch.begin()
        self.alarm = self.heeded(self.assessment.watch.recall(self.state.iteration, self.config.train.iterations))

    def finish(self) -> None:
        """Leave the result: the adapter (with averaged weights, if there are any), before against after, the report.

        After an alarm the result is that of the best evaluation."""
        if self.alarm is not None:
            self.state.take_weights(self.parts.policy, checkpoint.load(self.folder.checkpoints / f"{self.alarm.best:06d}"))
        self.folder.settle(self.alarm, self.config.train.iterations)
        if self.processes.is_main:
            with self.averaged_weights():
                self.parts.save_adapter(self.folder.adapter)
            self.folder.conclude()

    def averaged_weights(self) -> AbstractContextManager[None]:
        """The moving average in place of the weights, if the run keeps one."""
        return nullcontext() if self.state.ema is None else self.state.ema.swapped(self.parts.policy.named_trainable())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the iteration."""
        started = time.perf_counter()
        self.callback.on_phase(name, 0, 1)
        yield
        self.timings[f"time/{name}"] = time.perf_counter() - started
