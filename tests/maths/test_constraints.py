"""Multipliers against closed forms and a problem with a known solution; confidence bounds against tables and their promise."""

import math

import pytest
import torch

from visalign.maths.confidence import judge_constraints, lower_bound, student_quantile
from visalign.maths.constraints import Controller, Multipliers, follow, lagrangian, lagrangian_weights

NAN = float("nan")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def solve(controller, steps=4000, learning_rate=0.05):
    """Gradient ascent on E[r_0] = -(x - 2)^2 subject to -x >= -1: the optimum is x = 1 with multiplier 2."""
    x, state, trace = 0.0, Multipliers.start(tensor(0.0)), []
    for _ in range(steps):
        multiplier = float(state.value)
        x += learning_rate * (-2 * (x - 2) - multiplier) / (1 + multiplier)
        state = follow(state, tensor(-x), tensor(-1.0), controller)
        trace.append(x)
    return x, float(state.value), torch.tensor(trace)


class TestMultipliers:
    def test_one_step_of_each_part(self):
        # violated by 0.5: the integral grows by rate * 0.5, the proportional part adds 2 * 0.5
        state = follow(Multipliers.start(tensor(1.0)), tensor(0.5), tensor(1.0), Controller(rate=0.1, proportional=2.0))
        assert (float(state.integral), float(state.value)) == pytest.approx((1.05, 2.05))
        # in log space the integral is multiplied
        state = follow(Multipliers.start(tensor(1.0)), tensor(0.5), tensor(1.0), Controller(rate=0.1, space="log"))
        assert float(state.value) == pytest.approx(math.exp(0.05))

    def test_the_integral_sees_the_running_mean_the_proportional_part_the_current_one(self):
        controller = Controller(rate=1.0, proportional=1.0, decay=0.5, cap=100)
        state = follow(Multipliers.start(tensor(0.0)), tensor(-1.0), tensor(0.0), controller)  # average -1
        state = follow(state, tensor(1.0), tensor(0.0), controller)                             # average 0
        assert float(state.average) == 0
        assert float(state.integral) == 1
        assert float(state.value) == 0                                                         # 1 + (0 - 1)

    def test_multipliers_stay_between_nothing_and_the_cap(self):
        controller = Controller(rate=1.0, decay=0.0, cap=2.0)
        state = follow(Multipliers.start(tensor(0.0, 0.0)), tensor(-10.0, 10.0), tensor(0.0, 0.0), controller)
        assert state.value.tolist() == [2.0, 0.0]

    def test_without_an_observation_nothing_moves(self):
        state = Multipliers.start(tensor(0.7, 0.7))
        moved = follow(state, tensor(NAN, 0.0), tensor(1.0, 1.0), Controller(rate=0.5, decay=0.0))
        assert moved.value.tolist() == pytest.approx([0.7, 1.2])
        assert moved.average[0].isnan()
        again = follow(moved, tensor(0.0, NAN), tensor(1.0, 1.0), Controller(rate=0.5, decay=0.0))
        assert again.value.tolist() == pytest.approx([1.2, 1.2])

    @pytest.mark.parametrize("space", ["linear", "log"])
    def test_the_constrained_optimum_is_found(self, space):
        x, multiplier, _ = solve(Controller(rate=0.05, decay=0.0, space=space))
        assert x == pytest.approx(1.0, abs=1e-3)
        assert multiplier == pytest.approx(2.0, abs=1e-2)

    def test_the_proportional_part_dampens_the_oscillation(self):
        overshoot = [float((solve(Controller(rate=0.05, proportional=p, decay=0.0), steps=600)[2][200:] - 1).abs().mean())
                     for p in (0.0, 1.0)]
        assert overshoot[1] < 0.5 * overshoot[0]

    def test_a_constraint_that_holds_anyway_costs_nothing(self):
        state = Multipliers.start(tensor(0.5))
        for _ in range(100):
            state = follow(state, tensor(2.0), tensor(1.0), Controller(rate=0.1))
        assert float(state.value) == 0

    @pytest.mark.parametrize(("options", "message"), [
        ({"rate": 0.0}, "not both 0"), ({"rate": -1.0}, ">= 0"), ({"decay": 1.0}, r"\[0, 1\)"), ({"cap": 0.0}, "cap be above"),
        ({"space": "sqrt"}, "'linear' or 'log'")])
    def test_bad_controllers(self, options, message):
        with pytest.raises(ValueError, match=message):
            Controller(**options)
        with pytest.raises(ValueError, match="multipliers are >= 0"):
            Multipliers.start(tensor(-1.0))


class TestLagrangian:
    def test_closed_form(self):
        reward = lagrangian(tensor(1.0, 2.0), torch.stack([tensor(0.5, 1.5)]), torch.ones(1, 2, dtype=torch.bool), tensor(3.0), tensor(1.0))
        assert reward.tolist() == pytest.approx([(1 + 3 * -0.5) / 4, (2 + 3 * 0.5) / 4])

    def test_without_multipliers_it_is_the_objective(self):
        objective = tensor(1.0, 2.0)
        constraints, everywhere = torch.randn(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool)
        assert torch.equal(lagrangian(objective, constraints, everywhere, tensor(0.0, 0.0), tensor(1.0, 1.0)), objective)

    def test_the_scale_does_not_grow_with_the_multiplier(self):
        everywhere = torch.ones(1, 3, dtype=torch.bool)
        for multiplier in (0.0, 1.0, 1e3, 1e9):
            found = lagrangian(tensor(1.0, 2.0, 4.0), torch.stack([tensor(0.0, 1.0, 3.0)]), everywhere, tensor(multiplier), tensor(0.0))
            assert float(found.max() - found.min()) == pytest.approx(3.0)
            torch.testing.assert_close(lagrangian_weights(everywhere, tensor(multiplier)).sum(dim=0), torch.ones(3, dtype=torch.float64))

    def test_an_absent_constraint_is_neither_read_nor_counted(self):
        present = torch.tensor([[True, False], [True, True]])
        constraints = torch.stack([tensor(0.0, NAN), tensor(1.0, 1.0)])
        reward = lagrangian(tensor(5.0, 5.0), constraints, present, tensor(1.0, 2.0), tensor(0.0, 0.0))
        assert reward.tolist() == pytest.approx([7 / 4, 7 / 3])

    def test_shapes_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"1 multipliers need constraints and present of shape \(K, N\) = \(1, 2\)"):
            lagrangian(tensor(1.0, 2.0), torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bool), tensor(1.0), tensor(0.0))


class TestConfidence:
    @pytest.mark.parametrize(("probability", "degrees", "expected"), [
        (0.95, 1, 6.313751514675041), (0.95, 9, 1.8331129326536337), (0.975, 30, 2.0422724563012373), (0.99, 4, 3.7469473879791965),
        (0.95, 100_000, 1.644868864889), (0.05, 9, -1.8331129326536337), (0.5, 3, 0.0)])
    def test_student_quantiles_are_those_of_the_tables(self, probability, degrees, expected):
        assert student_quantile(probability, degrees) == pytest.approx(expected, abs=1e-7)

    def test_closed_forms(self):
        values = tensor(0.2, 0.4, 0.6, 0.8)   # mean 0.5, s^2 = 0.2 / 3
        s = math.sqrt(0.2 / 3)
        assert lower_bound(values) == pytest.approx(0.5 - 2.3533634348 * s / 2)
        assert lower_bound(values, 0.9, "hoeffding", (0, 1)) == pytest.approx(0.5 - math.sqrt(math.log(10) / 8))
        assert lower_bound(values, 0.9, "bernstein", (0, 1)) == pytest.approx(
            0.5 - s * math.sqrt(2 * math.log(20) / 4) - 7 * math.log(20) / 9)

    def test_bernstein_is_sharper_where_the_spread_is_small(self):
        values = 0.5 + 0.01 * torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert lower_bound(values, 0.95, "bernstein", (0, 1)) > lower_bound(values, 0.95, "hoeffding", (0, 1))

    @pytest.mark.parametrize(("method", "support"), [("student", None), ("hoeffding", (0.0, 1.0)), ("bernstein", (0.0, 1.0))])
    def test_the_promise_is_kept(self, method, support):
        # 500 draws of 40 uniform values: the bound may exceed the true mean 1/2 in 10 % of them (and Hoeffding's far less often).
        draws = torch.rand(500, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        wrong = sum(lower_bound(values, 0.9, method, support) > 0.5 for values in draws) / 500
        assert wrong <= 0.1 + 3 * math.sqrt(0.09 / 500)
        if method == "student":
            assert wrong >= 0.1 - 3 * math.sqrt(0.09 / 500)

    def test_too_little_evidence_shows_nothing(self):
        for values in ([], [1.0], [1.0, NAN]):
            assert lower_bound(torch.tensor(values)) == -math.inf
        verdict = judge_constraints({"clip": torch.tensor([0.9])}, {"clip": 0.1})["clip"]
        assert not verdict.holds
        assert verdict.mean == pytest.approx(0.9)

    def test_constraints_share_the_risk(self):
        values = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        verdicts = judge_constraints({"a": torch.cat([values, tensor(NAN)]), "b": values}, {"a": -1.0, "b": 0.5}, confidence=0.9)
        assert verdicts["a"].bound == verdicts["b"].bound == lower_bound(values, 0.95)
        assert (verdicts["a"].holds, verdicts["b"].holds) == (True, False)
        assert (verdicts["a"].count, verdicts["a"].count_invalid, verdicts["b"].count_invalid) == (30, 1, 0)

    def test_breaking_policies_pass_rarely_together(self):
        # Three constraints exactly at their thresholds: all three bounds must hold at once with probability 0.9.
        generator = torch.Generator().manual_seed(1)
        wrong = 0
        for _ in range(300):
            values = {name: torch.randn(25, generator=generator, dtype=torch.float64) for name in "abc"}
            wrong += any(verdict.holds for verdict in judge_constraints(values, dict.fromkeys("abc", 0.0), 0.9).values())
        assert wrong / 300 <= 0.1 + 3 * math.sqrt(0.09 / 300)

    @pytest.mark.parametrize(("call", "message"), [
        (lambda: lower_bound(tensor(1.0, 2.0), 0.4), r"\(0.5, 1\), got 0.4"),
        (lambda: lower_bound(tensor(1.0, 2.0), method="wald"), "got 'wald'"),
        (lambda: lower_bound(tensor(1.0, 2.0), method="hoeffding"), r"needs support=\(a, b\)"),
        (lambda: lower_bound(tensor(1.0, 2.0), method="bernstein", support=(0, 1)), "that holds every value"),
        (lambda: student_quantile(1.0, 3), r"\(0, 1\)"),
        (lambda: judge_constraints({"a": tensor(1.0)}, {"b": 0.0}), "no held-out values for b; there are values for a"),
        (lambda: judge_constraints({}, {}), "no held-out values for any constraint"),
    ])
    def test_bad_input(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()
