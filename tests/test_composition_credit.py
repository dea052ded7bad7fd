"""Composition on its way through credit, configuration and checkpoints: shape, combine, advantage; nothing invented. float64, seed 0."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests import gaussian_run
from visalign import checkpoint
from visalign.composition.adaptive import Constrained, MaxMin
from visalign.composition.by_prompt import ByPrompt, with_weights
from visalign.composition.fixed import Entropic, Hierarchical, LogTamed, Mean, PowerMean, Uncertainty, Weighted, Worst
from visalign.composition.named import COMBINERS, build_combiner, build_shape
from visalign.composition.shapes import LogSigmoid, PreferenceAsReward, reference_scores
from visalign.composition.table import Table
from visalign.credit import RewardTerm, assign_credit, check_prompts
from visalign.maths.advantages import AdvantageRule
from visalign.maths.composition_weights import arc_directions
from visalign.protocols import Remembers, RewardSpec
from visalign.rewards.function import FunctionReward
from visalign.settings import ConfigError
from visalign.types import Prompt, Scores

RAW = AdvantageRule(scale="none", clip=None)
WEIGHED = AdvantageRule(scale="none", clip=None, level="advantage", whiten=False)


def term(name, direction=1, **options):
    return RewardTerm(name, SimpleNamespace(spec=RewardSpec(name=name, direction=direction), score=None), **options)


def scored(values, direction=1):
    return Scores.from_values(values, direction=direction)


def groups(num_groups, size):
    return torch.arange(num_groups).repeat_interleave(size)


def values_of(num, seed=0):
    return torch.rand(num, generator=torch.Generator().manual_seed(seed)).add(0.1).tolist()


def fresh(name):
    """A combiner of every name, for rewards a and b."""
    return {"weighted": Weighted, "log_tamed": LogTamed, "mean": Mean, "worst": Worst, "uncertainty": Uncertainty, "entropic": Entropic,
            "power_mean": PowerMean, "hierarchical": lambda: Hierarchical(("b", "a"), {"b": 0.2}), "maxmin": MaxMin,
            "constrained": lambda: Constrained({"b": 0.9}, initial=0.5), "by_prompt": ByPrompt}[name]()


PROMPTS = tuple(Prompt(f"p{i}", metadata={"reward_weights": {"a": 1.0, "b": float(i)}}) for i in range(3))


class TestOrder:
    def test_direction_standardisation_shape_combine_advantage(self):
        # Smaller is better: raw 5, 3 -> -5, -3 -> (value + 4) / 2 = -0.5, 0.5 -> sigmoid -> twice that.
        terms = [term("a", direction=-1, weight=2.0, shift=-4.0, scale=2.0, shape=PreferenceAsReward(reference=0.0))]
        credit = assign_credit(terms, {"a": scored([5.0, 3.0], direction=-1)}, groups(1, 2), RAW)
        sigmoid = 1 / (1 + math.exp(-0.5))
        assert credit.reward.tolist() == pytest.approx([2 * (1 - sigmoid), 2 * sigmoid])
        assert credit.advantage.tolist() == pytest.approx([1 - 2 * sigmoid, 2 * sigmoid - 1])

    def test_reference_scores_are_raw_and_take_the_same_way(self):
        prompts = [Prompt("x", metadata={"reference_scores": {"a": [5.0, 3.0]}}), Prompt("y", metadata={"reference_scores": {"a": [4.0]}})]
        one = term("a", direction=-1, shift=-4.0, scale=2.0, shape=PreferenceAsReward())
        credit = assign_credit([one], {"a": scored([5.0, 3.0, 4.0, 4.0], direction=-1)}, groups(2, 2), RAW, prompts=prompts)
        up = 1 / (1 + math.exp(-1))
        assert credit.reward.tolist() == pytest.approx([(0.5 + 1 - up) / 2, (0.5 + up) / 2, 0.5, 0.5])

    def test_lsc_takes_the_quantile_per_prompt(self):
        prompts = [Prompt("x", metadata={"reference_scores": {"a": [0.0, 1.0, 2.0]}})]
        credit = assign_credit([term("a", shape=LogSigmoid(quantile=0.5))], {"a": scored([1.0, 4.0])}, groups(1, 2), RAW, prompts=prompts)
        assert credit.reward.tolist() == pytest.approx([-math.log(2), -math.log(1 + math.exp(-3))])

    def test_lsc_prefers_good_on_all_where_the_sum_prefers_excellent_on_one(self):
        scores = {"a": scored([8.0, 1.0]), "b": scored([-4.0, 1.0])}
        plain = assign_credit([term("a"), term("b")], scores, groups(1, 2), RAW)
        shaped = assign_credit([term(name, shape=LogSigmoid(reference=0.0)) for name in "ab"], scores, groups(1, 2), RAW)
        assert plain.advantage[0] > 0 > shaped.advantage[0]

    def test_advantages_are_weighed_after_shaping(self):
        scores = {"a": scored([0.0, 2.0]), "b": scored([3.0, 0.0])}
        terms = [term("a", weight=2.0, shape=PreferenceAsReward(reference=0.0)), term("b")]
        credit = assign_credit(terms, scores, groups(1, 2), WEIGHED)
        half = 1 / (1 + math.exp(-2)) - 0.5
        assert credit.advantage.tolist() == pytest.approx([-half + 1.5, half - 1.5], rel=1e-5)


@pytest.mark.parametrize("name", list(COMBINERS))
class TestEveryCombiner:
    TERMS = (term("a"), term("b"))

    def credit(self, name, a, b, group_id, rule=RAW, prompts=PROMPTS):
        return assign_credit(self.TERMS, {"a": scored(a), "b": scored(b)}, group_id, rule, fresh(name), prompts)

    def test_an_invalid_sample_changes_nobodys_advantage(self, name):
        a, b = values_of(12), values_of(12, seed=1)
        without = self.credit(name, a, b, groups(3, 4))
        for bad in (None, float("nan"), float("inf")):
            found = self.credit(name, [*a, bad], [*b, 1e6], torch.cat([groups(3, 4), torch.tensor([1])]))
            torch.testing.assert_close(found.advantage[:12], without.advantage)
            assert found.advantage[12] == 0
            assert found.reward[12].isnan()
            assert not found.valid[12]
        assert without.advantage.abs().sum() > 0.1

    def test_an_optional_reward_is_dropped_for_its_whole_group(self, name):
        a, b = values_of(8), values_of(8, seed=1)
        terms = (term("a"), term("b", required=False))
        found = assign_credit(terms, {"a": scored(a), "b": scored([None, *b[1:]])}, groups(2, 4), RAW, fresh(name), PROMPTS[:2])
        alone = assign_credit(terms, {"a": scored(a), "b": scored([None] * 4 + b[4:])}, groups(2, 4), RAW, fresh(name), PROMPTS[:2])
        assert found.valid.all()
        torch.testing.assert_close(found.reward, alone.reward)
        if name != "hierarchical":
            order = torch.tensor(a[:4]).argsort()
            assert torch.equal(found.reward[:4].argsort(), order)

    def test_its_weights_make_up_its_value(self, name):
        a, b = values_of(12), values_of(12, seed=1)
        table = Table(("a", "b"), torch.ones(2, dtype=torch.float64), torch.tensor([a, b], dtype=torch.float64),
                      torch.ones(2, 12, dtype=torch.bool), groups(3, 4), PROMPTS)
        combiner = fresh(name)
        combined = combiner.combine(table)
        assert (combined.weights is not None) == combiner.linear
        if combined.weights is None:
            params = {"order": ["b", "a"], "margins": {}} if name == "hierarchical" else {}
            with pytest.raises(ConfigError, match="is no weighted sum, so that advantages cannot be weighed"):
                build_combiner(name, params, ["a", "b"], [1.0, 1.0], "advantage")
            with pytest.raises(ValueError, match="is no weighted sum"):
                self.credit(name, a, b, groups(3, 4), WEIGHED)
            return
        rest = combined.value - (combined.weights * table.values).sum(dim=0)
        torch.testing.assert_close(rest.reshape(3, 4), rest.reshape(3, 4)[:, :1].expand(3, 4))
        # Without scale, weighed advantages are the advantages of the weighted sum.
        by_reward, by_advantage = self.credit(name, a, b, groups(3, 4), RAW), self.credit(name, a, b, groups(3, 4), WEIGHED)
        torch.testing.assert_close(by_reward.advantage, by_advantage.advantage)

    def test_permuting_samples_permutes_advantages(self, name):
        a, b, group_id = values_of(12), values_of(12, seed=1), groups(3, 4)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
        straight = self.credit(name, a, b, group_id).advantage
        shuffled = self.credit(name, [a[i] for i in order], [b[i] for i in order], group_id[order]).advantage
        torch.testing.assert_close(shuffled, straight[order])


@pytest.mark.parametrize("name", ["constrained", "maxmin"])
def test_a_memory_continues_where_it_was(name, tmp_path):
    terms, group_id = [term("a"), term("b")], groups(2, 4)
    batches = [{"a": scored(values_of(8, seed)), "b": scored(values_of(8, seed + 50))} for seed in range(4)]
    combiner, resumed = fresh(name), fresh(name)
    assert isinstance(combiner, Remembers)
    for scores in batches[:2]:
        assign_credit(terms, scores, group_id, RAW, combiner)
    checkpoint.save(tmp_path, 1, {"reward-_combiner": dict(combiner.state_dict())}, {}, keep=1)
    resumed.load_state_dict(checkpoint.load(checkpoint.latest(tmp_path)).tensors["reward-_combiner"])
    for scores in batches[2:]:
        one, other = (assign_credit(terms, scores, group_id, RAW, each) for each in (combiner, resumed))
        assert torch.equal(one.advantage, other.advantage)
        assert one.metrics == other.metrics


class TestEnsembles:
    SCORES = {"a": scored([1.0, 2.0, 9.0]), "b": scored([1.0, 2.0, -3.0])}  # the members disagree about the last  # noqa: RUF012
    TERMS = (term("a"), term("b"))

    def test_disagreement_is_punished_in_order(self):
        last = [float(assign_credit(self.TERMS, self.SCORES, groups(1, 3), RAW, combiner).reward[2])
                for combiner in (Mean(), Uncertainty(0.05), Entropic(2.0), Worst())]
        assert last == sorted(last, reverse=True)
        assert last == pytest.approx([3.0, 3.0 - 0.05 * 36, -2 * math.log((math.exp(-4.5) + math.exp(1.5)) / 2), -3.0], rel=1e-5)

    def test_members_that_agree_are_believed_and_the_spread_is_logged(self):
        credit = assign_credit(self.TERMS, self.SCORES, groups(1, 3), RAW, Uncertainty(1.0))
        assert credit.reward[:2].tolist() == [1.0, 2.0]
        assert credit.metrics["composition/disagreement"] == pytest.approx(6 / 3)

    def test_negative_weights_mean_nothing_to_an_ensemble(self):
        with pytest.raises(ConfigError, match="reward 'b' has the weight -1"):
            build_combiner("uncertainty", {}, ["a", "b"], [1.0, -1.0])
        build_combiner("weighted", {}, ["a", "b"], [1.0, -1.0])

    def test_log_taming_refuses_what_has_no_logarithm(self):
        with pytest.raises(ValueError, match=r"map the rewards into \[0, 1\]"):
            assign_credit(self.TERMS, self.SCORES, groups(1, 3), RAW, LogTamed())

    def test_the_first_clear_level_decides(self):
        scores = {"safe": scored([1.0, 1.0, 0.0]), "pretty": scored([0.2, 0.9, 5.0])}
        credit = assign_credit([term("pretty"), term("safe")], scores, groups(1, 3), RAW, Hierarchical(("safe", "pretty"), {"safe": 0.5}))
        assert credit.reward.tolist() == [0.5, 1.0, 0.0]
        assert credit.metrics["composition/decided_safe"] == pytest.approx(2 / 3)


class TestConstraints:
    def combine(self, combiner, clip, ocr, size=2):
        return assign_credit([term("clip"), term("ocr")], {"clip": scored(clip), "ocr": scored(ocr)},
                             groups(len(clip) // size, size), RAW, combiner)

    def test_the_multiplier_in_force_is_the_one_from_before_this_batch(self):
        combiner = Constrained({"ocr": 0.8}, rate=1.0, decay=0.0, initial=1.0)
        credit = self.combine(combiner, [1.0, 3.0], [0.5, 0.5])
        assert credit.reward.tolist() == pytest.approx([(1 - 0.3) / 2, (3 - 0.3) / 2])
        assert credit.metrics["composition/multiplier_ocr"] == 1.0
        assert credit.metrics["composition/slack_ocr"] == pytest.approx(-0.3)
        assert float(combiner.state.value) == pytest.approx(1.3)

    def test_a_violated_constraint_takes_over(self):
        # clip prefers the first sample, ocr the second; the constraint fails until its weight turns the order around.
        combiner, preferred = Constrained({"ocr": 0.9}, rate=2.0, decay=0.0, cap=100.0), []
        for _ in range(6):
            preferred.append(int(self.combine(combiner, [1.0, 0.0], [0.0, 0.4]).reward.argmax()))
        assert preferred[0] == 0
        assert preferred[-1] == 1
        assert preferred == sorted(preferred)

    def test_pessimism_sees_a_violation_where_the_mean_does_not(self):
        scores = [0.5, 0.5, 1.5, 1.5, 0.6, 0.6, 1.4, 1.4]  # mean 1.0, prompts differ
        for pessimism, violated in ((None, False), (0.9, True)):
            combiner = Constrained({"ocr": 0.9}, decay=0.0, pessimism=pessimism)
            self.combine(combiner, [1.0, 0.0] * 4, scores)
            assert bool(combiner.state.value > 0) is violated
        with pytest.raises(ValueError, match="at least two prompts per iteration"):
            self.combine(Constrained({"ocr": 0.9}, pessimism=0.9), [1.0, 0.0], [0.0, 1.0])

    def test_held_out_prompts_decide(self):
        combiner = Constrained({"ocr": 0.9}, confidence=0.95)
        assert combiner.held_out({"ocr": torch.tensor([0.95, 0.96, 0.97] * 10)})["ocr"].holds
        assert not combiner.held_out({"ocr": torch.tensor([0.5, 1.5] * 4)})["ocr"].holds

    def test_a_checkpoint_of_other_constraints(self):
        combiner = Constrained({"ocr": 0.9})
        with pytest.raises(ValueError, match="holds 2 constraints, this run has 1"):
            combiner.load_state_dict(Constrained({"ocr": 0.9, "clip": 0.1}).state_dict())


class TestMaxMin:
    def test_the_group_that_is_worst_off_in_expectation_is_served(self):
        combiner = MaxMin(rate=5.0, decay=0.0)
        scores = {"ann": scored([1.0, 0.0]), "bob": scored([-2.0, -1.0])}
        for _ in range(5):
            credit = assign_credit([term("ann"), term("bob")], scores, groups(1, 2), RAW, combiner)
        assert credit.advantage.tolist() == pytest.approx([-0.5, 0.5], abs=1e-3)
        assert credit.metrics["composition/weight_bob"] > 0.999
        assert credit.metrics["composition/average_bob"] == pytest.approx(-1.5)

    def test_steps_add_up(self):
        """Mirror steps on constant averages: after n of them the odds of two groups are exp(n rate gap)."""
        combiner = MaxMin(rate=0.5, decay=0.0)
        scores = {"ann": scored([1.0, 0.0]), "bob": scored([0.0, 0.4])}  # means 0.5 and 0.2
        for n in range(1, 4):
            assign_credit([term("ann"), term("bob")], scores, groups(1, 2), RAW, combiner)
            ann, bob = combiner.state["weights"].tolist()
            assert bob / ann == pytest.approx(math.exp(n * 0.5 * 0.3))

    def test_another_number_of_groups(self):
        combiner = MaxMin()
        combiner.load_state_dict({"weights": torch.tensor([0.2, 0.3, 0.5]), "average": torch.zeros(3)})
        with pytest.raises(ValueError, match="holds 3 user groups, this run has 1"):
            assign_credit([term("a")], {"a": scored([1.0, 2.0])}, groups(1, 2), RAW, combiner)


class TestByPrompt:
    def test_routes(self):
        prompts = [Prompt("a poster", metadata={"reward_weights": "ocr"}), Prompt("a cat", metadata={"reward_weights": {"clip": 0.5}})]
        scores = {"clip": scored([1.0, 2.0, 3.0, 5.0]), "ocr": scored([0.9, 0.1, 0.0, 0.0])}
        credit = assign_credit([term("clip"), term("ocr")], scores, groups(2, 2), RAW, ByPrompt(), prompts)
        assert credit.reward.tolist() == pytest.approx([0.9, 0.1, 1.5, 2.5])

    def test_directions_have_one_scale(self):
        prompts = with_weights([Prompt("a cat")], ["clip", "ocr"], arc_directions(3))
        scores = {"clip": scored([3.0, 0.0] * 3), "ocr": scored([0.0, 3.0] * 3)}
        credit = assign_credit([term("clip"), term("ocr")], scores, groups(3, 2), RAW, ByPrompt(normalise="unit"), prompts)
        half = 3 / 2**0.5
        assert credit.reward.tolist() == pytest.approx([3.0, 0.0, half, half, 0.0, 3.0], abs=1e-6)

    def test_the_prompts_user_may_be_the_direction(self):
        prompts = [Prompt("a cat", metadata={"user": {"clip": 3.0, "ocr": 4.0}})]
        credit = assign_credit([term("clip"), term("ocr")], {"clip": scored([1.0, 0.0]), "ocr": scored([0.0, 1.0])}, groups(1, 2), RAW,
                               ByPrompt(key="user", normalise="unit"), prompts)
        assert credit.reward.tolist() == pytest.approx([0.6, 0.8])

    @pytest.mark.parametrize(("metadata", "options", "message"), [
        ({}, {}, r"prompt 1 \('y'\): metadata 'reward_weights' is None; give finite weights by reward, such as {\"clip\": 1.0}"),
        ({"reward_weights": {"clap": 1.0}}, {}, "weighs 'clap', and the rewards are clip, ocr"),
        ({"reward_weights": {"clip": 1.0}}, {"default": None}, "lacks ocr; add them"),
        ({"reward_weights": {"clip": 0.0}}, {}, "gives every reward weight 0"),
        ({"reward_weights": {"clip": float("nan")}}, {}, "give finite weights"),
    ])
    def test_prompts_are_checked_before_anything_is_generated(self, metadata, options, message):
        good = Prompt("x", metadata={"reward_weights": {"clip": 1.0, "ocr": 1.0}})
        with pytest.raises(ValueError, match=message):
            check_prompts([term("clip"), term("ocr")], ByPrompt(**options), [good, Prompt("y", metadata=metadata)])

    def test_directions_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"3 rewards need directions of shape \(D, 3\), got \(2, 2\)"):
            with_weights([Prompt("x")], ["a", "b", "c"], arc_directions(2))


class TestWhatIsMissing:
    def test_prompts(self):
        scores = {"a": scored([1.0, 2.0]), "b": scored([1.0, 2.0])}
        for terms, combiner in (([term("a")], ByPrompt()), ([term("a", shape=LogSigmoid())], None)):
            with pytest.raises(ValueError, match="reads the prompts; give assign_credit"):
                assign_credit(terms, scores, groups(1, 2), RAW, combiner)
        with pytest.raises(ValueError, match="2 prompts for 1 groups"):
            assign_credit([term("a")], scores, groups(1, 2), RAW, prompts=PROMPTS[:2])

    @pytest.mark.parametrize("given", [None, {}, {"a": []}, {"a": [1.0, float("nan")]}, {"a": 3.0}, [1.0]])
    def test_references(self, given):
        prompts = [Prompt("x", metadata={"reference_scores": {"a": [1.0]}}), Prompt("y", metadata={"reference_scores": given})]
        with pytest.raises(ValueError, match=r"reward 'a', prompt 1 \('y'\).*no list of finite scores"):
            check_prompts([term("a", shape=LogSigmoid())], Weighted(), prompts)
        check_prompts([term("a", shape=LogSigmoid(reference=0.0))], Weighted(), prompts)
        assert reference_scores("a", prompts[:1]).tolist() == [[1.0]]


class TestNames:
    @pytest.mark.parametrize(("name", "params", "message"), [
        ("weigthed", {}, "there is no 'weigthed'; did you mean 'weighted'"),
        ("weighted", {"strength": 1.0}, "combine.strength: unknown key"),
        ("uncertainty", {"strength": -1.0}, "strength must be >= 0"), ("entropic", {"temperature": 0}, "temperature must be > 0"),
        ("hierarchical", {"order": ["a"], "margins": {}}, "put every reward there once: a, b"),
        ("hierarchical", {"order": ["a", "b"], "margins": {"c": 1.0}}, "margins: 'c' is 1.0"),
        ("hierarchical", {"order": ["a", "b"]}, "combine.margins: required"),
        ("constrained", {}, "combine.thresholds: required"),
        ("constrained", {"thresholds": {"c": 1.0}}, "thresholds names c; there are a, b"),
        ("constrained", {"thresholds": {"a": 1.0, "b": 1.0}}, "at least one is maximised"),
        ("constrained", {"thresholds": {"a": 1.0}, "rate": 0.0}, "not both 0"),
        ("constrained", {"thresholds": {"a": 1.0}, "bound": "hoeffding"}, "needs support"),
        ("constrained", {"thresholds": {"a": 1.0}, "pessimism": 0.3}, r"pessimism must lie in \(0.5, 1\)"),
        ("maxmin", {"rate": 0.0}, "rate must be > 0"),
    ])
    def test_mistakes_are_named(self, name, params, message):
        with pytest.raises(ConfigError, match=message):
            build_combiner(name, params, ["a", "b"], [1.0, 1.0])

    def test_user_groups_have_no_weights_of_their_own(self):
        with pytest.raises(ConfigError, match="the weights 1, 2 differ"):
            build_combiner("maxmin", {}, ["a", "b"], [1.0, 2.0])

    def test_shapes(self):
        assert build_shape("lsc", {"quantile": 0.5}, "rewards.0.shape") == LogSigmoid(quantile=0.5)
        assert build_shape("par", {"reference": 0.0}, "rewards.0.shape") == PreferenceAsReward(reference=0.0)
        for name, params, message in (("psc", {}, "rewards.0.shape.name: there is no 'psc'; did you mean"),
                                      ("lsc", {"quantile": 85}, r"quantile must lie in \[0, 1\]")):
            with pytest.raises(ConfigError, match=message):
                build_shape(name, params, "rewards.0.shape")


class TestRuns:
    """Whole runs on the Gaussian oracle policy."""

    def rewards(self):
        def near(target):
            def score(media, prompts):
                return [-abs(float(sample.data.mean()) - target) for sample in media]
            return FunctionReward(score, name="near", modality=["audio"])

        return [RewardTerm("up", near(1.0)), RewardTerm("low", near(0.0))]

    def test_a_resumed_run_has_the_multipliers_it_would_have_had(self, tmp_path):
        def combiner():
            return Constrained({"low": -0.05}, rate=5.0, decay=0.5, proportional=1.0)

        def go(folder, *overrides, resume=False):
            settings = gaussian_run.config("train.schedule=constant", "data.eval_prompts=held_out.txt", *overrides)
            return gaussian_run.go(tmp_path / folder, settings, resume=resume, terms=self.rewards(), combiner=combiner())

        whole = go("whole")
        go("halved", "train.iterations=3")
        resumed = go("halved", resume=True)
        assert torch.equal(resumed.combiner.state.integral, whole.combiner.state.integral)
        assert torch.equal(resumed.combiner.state.average, whole.combiner.state.average)
        for name, weight in whole.policy.named_trainable().items():
            assert torch.equal(resumed.policy.named_trainable()[name], weight)
        assert float(whole.combiner.state.integral) > 0
        logged = (tmp_path / "whole" / "metrics.jsonl").read_text()
        for key in ("composition/multiplier_low", "composition/slack_low", "eval/low_slack", "eval/constraints_hold"):
            assert key in logged

    def test_prompts_that_were_trained_on_show_nothing(self, tmp_path):
        settings = gaussian_run.config("train.iterations=1")
        gaussian_run.go(tmp_path / "run", settings, terms=self.rewards(), combiner=Constrained({"low": -0.05}))
        logged = (tmp_path / "run" / "metrics.jsonl").read_text()
        assert "composition/multiplier_low" in logged
        assert "constraints_hold" not in logged

    def test_prompts_are_refused_before_a_run_starts(self, tmp_path):
        with pytest.raises(ValueError, match=r"combine by_prompt, prompt 0 \('prompt 0'\)"):
            gaussian_run.go(tmp_path / "run", gaussian_run.config(), terms=self.rewards(), combiner=ByPrompt())
        assert not (tmp_path / "run" / "checkpoints").exists()

    def test_the_configuration_says_it(self):
        settings = gaussian_run.config("rewards=[{name: a, shift: 22, scale: 1.5, shape: {name: par, reference: 0}}, {name: b}]",
                                       "combine={name: constrained, thresholds: {b: 0.5}}")
        assert (settings.rewards[0].shift, settings.rewards[0].scale, settings.rewards[0].shape.params) == (22, 1.5, {"reference": 0})
        assert settings.combine.name == "constrained"
        assert gaussian_run.config().combine.name == "weighted"
        assert gaussian_run.config("combine=worst").combine.name == "worst"

    @pytest.mark.parametrize("override", ["combine=worst", "rewards.0.shape={name: par, reference: 0}", "rewards.0.scale=2"])
    def test_gradients_of_rewards_are_not_composed(self, override):
        with pytest.raises(ConfigError, match=r"reward_gradient adds gradients of the rewards' own values"):
            gaussian_run.config("algorithm={name: reward_gradient}", override)
