"""Data among samples: who is where, the same on every number of processes, and what it is for."""

import pytest
import torch

from tests import gaussian_run
from visalign.algorithms.noising import Times
from visalign.algorithms.pairing import Pairing
from visalign.algorithms.preference import PreferenceOptimisation
from visalign.config import load_config
from visalign.maths.oracle import GaussianWorld
from visalign.maths.preference import bind_loss
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.preferences.candidates import StoredLatent
from visalign.preferences.records import PreferenceDataset, PreferenceRecord
from visalign.preferences.stored import write_latents
from visalign.samplers.dynamics import ODE, FlowSDE
from visalign.samplers.mixed import MixedSampler
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.samplers.rollout import TrajectorySampler
from visalign.samplers.steps import AllSteps, NoSteps
from visalign.settings import ConfigError
from visalign.types import Prompt

PROMPTS = [Prompt(f"prompt {k}") for k in range(8)]


@pytest.fixture
def dataset(tmp_path):
    """Five records of two candidates, all at 0.5 + row / 100."""
    records = []
    for row in range(5):
        path = tmp_path / f"{row}.safetensors"
        write_latents(path, torch.full((2, 2, 3), 0.5 + row / 100), None)
        candidates = tuple(StoredLatent(path, place) for place in range(2))
        records.append(PreferenceRecord(Prompt(f"real {row}"), candidates, (1.0, 0.0), row))
    return PreferenceDataset("real", tuple(records))


def sampler(dataset, fraction=0.25, steps=NoSteps(), dynamics=ODE(), group_size=4):  # noqa: B008 - immutable
    generated = TrajectorySampler(group_size=group_size, dynamics=dynamics, steps=steps, seed=0, microbatch=8)
    return MixedSampler(generated, dataset, fraction, seed=0)


def policy():
    return GaussianPolicy(GaussianWorld(mean=torch.full((2, 3), 0.1), var=0.04), flow_schedule(dance_sigmas(5, 3.0)))


def test_the_last_groups_are_data_under_their_own_prompts(dataset):
    made = sampler(dataset).rollout(policy(), PROMPTS, rows=range(8), iteration=0, first_index=64)
    assert [prompt.text.split()[0] for prompt in made.prompts] == ["prompt"] * 6 + ["real"] * 2
    assert made.sample_index.tolist() == list(range(64, 96))
    for group in (6, 7):
        row = int(made.prompts[group].text.split()[1])
        assert torch.allclose(made.x_final[made.group_id == group], torch.tensor(0.5 + row / 100))
    own = sampler(dataset).generated.rollout(policy(), PROMPTS[:6], rows=range(6), iteration=0, first_index=64)
    assert torch.equal(made.x_final[:24], own.x_final)
    assert len(made.conditioning) == 8


def test_rows_follow_from_the_groups_global_index(dataset):
    whole = sampler(dataset, 0.5).rollout(policy(), PROMPTS, rows=range(8), iteration=0, first_index=0)
    again = sampler(dataset, 0.5).rollout(policy(), PROMPTS, rows=range(8), iteration=3, first_index=0)
    later = sampler(dataset, 0.5).rollout(policy(), PROMPTS, rows=range(8), iteration=1, first_index=32)
    assert [p.text for p in whole.prompts[4:]] == [p.text for p in again.prompts[4:]]
    assert [p.text for p in whole.prompts[4:]] != [p.text for p in later.prompts[4:]]


def test_curated_retraining_stays_near_the_data(dataset, tmp_path):
    """Best-of-group fine-tuning with half the groups real moves the model to the data; on its own samples it hardly moves."""
    settings = gaussian_run.config("sampler.steps={name: none}", "sampler.dynamics={name: ode}", "ema=null", "evaluation.every=0",
                                   "train.iterations=20", "train.groups=4", "train.group_size=4", "train.learning_rate=0.02")
    method = PreferenceOptimisation(bind_loss("sft"), kappa=1.0, pairing=Pairing(keep=1), times=Times(low=0.5))
    own = sampler(dataset).generated
    alone = gaussian_run.go(tmp_path / "own", settings, algorithm=method, sampler=own, prompts=PROMPTS, eval_prompts=PROMPTS).policy
    mixed = gaussian_run.go(tmp_path / "mixed", settings, algorithm=method, sampler=sampler(dataset, 0.5), prompts=PROMPTS,
                            eval_prompts=PROMPTS).policy
    shifts = [float(one.shift.detach().mean()) for one in (alone, mixed)]
    assert shifts[1] > 0.15, shifts
    assert shifts[0] < 0.5 * shifts[1], shifts


@pytest.mark.parametrize(("make", "message"), [
    (lambda d: sampler(d, 0.0), "between 0 and 1"),
    (lambda d: sampler(d, 0.01).rollout(policy(), PROMPTS, rows=range(8), iteration=0, first_index=0), "some must be real"),
    (lambda d: sampler(d, 0.5, AllSteps(), FlowSDE()).rollout(policy(), PROMPTS, rows=range(8), iteration=0, first_index=0), "steps=none")])
def test_what_cannot_be_mixed_is_refused(dataset, make, message):
    with pytest.raises(ValueError, match=message):
        make(dataset)


def test_a_fraction_needs_both_sources():
    with pytest.raises(ConfigError, match="give prompts to generate for and preferences"):
        load_config("embedded_rwr", ["data.real_fraction=0.5"])
    config = load_config("embedded_rwr", ["data.real_fraction=0.5", "data.preferences={path: somewhere}"])
    assert config.data.offline is None
