"""Scalars read off the formulas are the closed forms of the literature."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.cases import COMBINATIONS, KINDS, LEVEL, STEP, end_points, normal, outputs
from visalign.kernels.formula import StepFormula, mean_and_velocity, obstacle, training_obstacle
from visalign.maths.combination import Combination
from visalign.maths.gaussian import state_coefficients
from visalign.maths.outputs import Outputs


def scalars(combination=COMBINATIONS[1], kind="flow", num_terms=0, step=STEP):
    return mean_and_velocity(StepFormula.of(outputs((1, 2), combination, kind, num_terms=num_terms), step))


def test_a_flow_step_is_state_plus_velocity():
    mean, velocity = scalars(COMBINATIONS[2])
    c_x, c_v = state_coefficients(LEVEL, STEP)
    assert mean.x == pytest.approx(c_x, abs=1e-15)
    assert mean.outputs == pytest.approx((-3.5 * c_v, 4.5 * c_v), abs=1e-15)
    assert (velocity.x, velocity.outputs) == (pytest.approx(0.0, abs=1e-15), pytest.approx((-3.5, 4.5), abs=1e-14))


def test_epsilon_and_sample_steps_have_their_textbook_scalars():
    mean, velocity = scalars(kind="epsilon")  # x0 = (x - sigma e) / alpha
    assert (mean.x, *mean.outputs) == pytest.approx((0.75 / 0.6, 0.5 - 0.75 * 0.8 / 0.6), abs=1e-15)
    assert (velocity.x, *velocity.outputs) == pytest.approx((-1 / 0.6, 1 + 0.8 / 0.6), abs=1e-15)
    mean, _ = scalars(kind="sample")  # x1 = (x - alpha x0) / sigma
    assert (mean.x, *mean.outputs) == pytest.approx((0.5 / 0.8, 0.75 - 0.5 * 0.6 / 0.8), abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_moves_by_c_v_times_the_velocity_for_every_kind(kind):
    mean, velocity = scalars(COMBINATIONS[3], kind)
    c_x, c_v = state_coefficients(LEVEL, STEP)
    assert mean.x == pytest.approx(c_x + c_v * velocity.x, abs=1e-13)
    assert mean.outputs == pytest.approx(tuple(c_v * value for value in velocity.outputs), abs=1e-13)


def test_a_gradient_enters_with_its_bounded_factor():
    _, velocity = scalars(num_terms=2)  # bounds 0.5 and 9: sigma / alpha = 4 / 3
    assert velocity.terms == pytest.approx((-1.4 * 0.5, -1.4 * 4 / 3), abs=1e-14)


def test_end_points_are_weighted_by_the_transition_itself():
    mean, velocity = mean_and_velocity(StepFormula.of(end_points((1, 2), normal((1, 2), 0)), STEP))
    assert (mean.x, mean.outputs) == (0.0, (STEP.A, STEP.B))
    assert (velocity.x, velocity.outputs) == (0.0, (-1.0, 1.0))


def test_the_correction_leaves_the_state_alone():
    """With a factor only the outputs are multiplied: m = F sum w o + s x."""
    plain = Combination((-3.5, 4.5), state_weight=0.25)
    corrected = replace(plain, correction="rescale", conditional=1, strength=0.7)
    assert scalars(plain) == scalars(corrected)


def test_outputs_without_weight_are_left_out_unless_a_correction_reads_them():
    def used(combination):
        return StepFormula.of(outputs((1, 2), combination), STEP).used

    assert used(Combination((0.0, 2.0, 0.0, 1.0))) == (1, 3)
    assert used(Combination((0.0, 2.0), correction="rescale", conditional=0)) == (0, 1)
    assert len(scalars(Combination((0.0, 2.0, 0.0, 1.0)))[0].outputs) == 2


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_formula_survives_its_flat_form(name):
    formula = StepFormula.of(outputs((1, 2), COMBINATIONS[name], "edm", num_terms=2), STEP)
    assert StepFormula.from_flat(*formula.flat()) == formula
    ends = StepFormula.of(end_points((1, 2), normal((1, 2), 0)), STEP)
    assert StepFormula.from_flat(*ends.flat()) == ends


@pytest.mark.parametrize(("combination", "why"), [
    (Combination((1.0, 1.0), axis=1, profile=((1.0, 0.5), (0.0, 0.5))), "differ along an axis"),
    (Combination((1.0, 1.0), correction="token norm"), "'token norm' is not fused"),
    (Combination((1.0, 1.0), correction="norm cap"), "'norm cap' is not fused"),
    (Combination((1.0,) * 9), "combines 9 outputs")])
def test_what_cannot_be_fused_says_why(combination, why):
    assert why in obstacle(outputs((1, 2), combination))
    assert obstacle(outputs((1, 2), COMBINATIONS["rescale"])) is None


def test_outputs_of_several_dtypes_cannot_be_fused():
    mixed = Outputs((normal((1, 2), 0), normal((1, 2), 0, torch.bfloat16)), 0.5, 0.5)
    assert "several dtypes" in obstacle(mixed)
    alike = Outputs((normal((1, 2), 0),) * 2, 0.5, 0.5)
    assert training_obstacle(alike, alike) is None
    assert "several dtypes" in training_obstacle(alike, mixed)
