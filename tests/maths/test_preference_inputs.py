"""What a preference loss accepts: names, parameters, inputs; every refusal says what to do."""

import math
import textwrap

import pytest
import torch

from visalign.maths.preference import LOSSES, LossInput, bind_loss, find_loss, preference_loss


def pair(**changes):
    given = {"policy": torch.full((3, 2), 0.1), "reference": torch.full((3, 2), 0.1), "kappa": 10.0}
    return LossInput(**{**given, **changes})


def test_properties():
    given = LossInput(policy=torch.tensor([[0.1, 0.4]]), reference=torch.tensor([[0.3, 0.3]]), kappa=10.0)
    assert given.delta[0].tolist() == pytest.approx([0.2, -0.1])
    assert given.u[0].tolist() == pytest.approx([2.0, -1.0])
    assert float(given.margin) == pytest.approx(3.0)


@pytest.mark.parametrize(("changes", "message"), [
    ({"policy": torch.zeros(3, 2, dtype=torch.bfloat16)}, "float32 or float64"),
    ({"policy": torch.zeros(3)}, r"shape \(P, K\)"),
    ({"policy": torch.zeros(3, 2, 4)}, "one number per sample"),
    ({"kappa": 0.0}, "kappa must be a finite number > 0"),
    ({"kappa": -5.0}, "use the loss 'npo'"),
    ({"kappa": math.nan}, "kappa must be"),
    ({"reference": torch.zeros(2, 2)}, r"reference must have shape \(3, 2\)"),
    ({"weight": torch.ones(3, 2)}, r"weight must have shape \(3,\)"),
    ({"reference": torch.zeros(3, 2, requires_grad=True)}, r"torch\.no_grad"),
])
def test_bad_inputs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        pair(**changes)


@pytest.mark.parametrize(("name", "given", "message"), [
    ("dpo", pair(reference=None), "the loss 'dpo' needs LossInput.reference, got None"),
    ("dpo", pair(policy=torch.zeros(3, 3), reference=torch.zeros(3, 3)), "exactly 2 candidates"),
    ("kto", pair(), "exactly 1 candidate per group"),
    ("plackett_luce", pair(policy=torch.zeros(3, 1), reference=torch.zeros(3, 1)), "at least 2 candidates"),
    ("inpo", pair(), "previous round's policy"),
    ("odpo", pair(), "needs LossInput.reward"),
    ("odpo", pair(reward=torch.tensor([[1.0, 0.0], [math.nan, 0.0], [1.0, 0.0]])), "NaN or infinite"),
    ("rwr", pair(reward=torch.ones(3, 2)), "global statistic 'mean_weight', got None"),
    ("xpo", pair(), "the candidates that the reference generated"),
])
def test_missing_needs_are_refused(name, given, message):
    with pytest.raises(ValueError, match=message):
        bind_loss(name)(given)


@pytest.mark.parametrize("label", [2.0, -1.5, math.nan])
def test_labels_outside_the_range_are_refused(label):
    given = LossInput(policy=torch.zeros(1, 1), kappa=1.0, label=torch.tensor([[label]]))
    with pytest.raises(ValueError, match=r"map 0/1 to -1/\+1"):
        bind_loss("dro")(given)


def test_margin_and_delta_refuse_what_they_cannot_compute():
    with pytest.raises(ValueError, match="groups of 3"):
        _ = LossInput(policy=torch.zeros(1, 3), reference=torch.zeros(1, 3), kappa=1.0).margin
    with pytest.raises(ValueError, match="declare reference=True"):
        _ = LossInput(policy=torch.zeros(1, 2), kappa=1.0).delta


@pytest.mark.parametrize(("name", "message"), [
    ("dopo", "did you mean 'dpo'"),
    ("no_such_package.losses:mine", "No module named 'no_such_package'"),
    ("visalign.maths.preference_pairs:dpoo", "did you mean 'dpo'"),
    ("visalign.maths.preference_pairs:softplus", r"put @preference_loss"),
])
def test_unknown_names_teach(name, message):
    with pytest.raises(ValueError, match=message):
        find_loss(name)


@pytest.mark.parametrize(("name", "parameters", "message"), [
    ("conservative_dpo", {"label_smothing": 0.1}, "did you mean 'label_smoothing'"),
    ("dpo", {"beta": 5000.0}, "it takes none"),
    ("conservative_dpo", {"label_smoothing": 0.5}, "must be >= 0 and < 0.5, got 0.5"),
    ("robust_dpo", {"flip_rate": -0.1}, "must be >= 0"),
    ("mapo", {"eta": 0.0}, "must be > 0"),
    ("rpo", {"sft_weight": math.inf}, "must be >= 0, got inf"),
    ("rpo", {"sft_weight": "1"}, "must be a number, got '1'"),
    ("rpo", {"sft_weight": True}, "must be a number"),
    ("rankdpo", {"rank": "mine"}, "one of 'true', 'policy'"),
    ("smpo", {}, "no default for low, high"),
    ("inpo", {"anchor": 1.2}, "<= 1"),
])
def test_bad_parameters_teach(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        bind_loss(name, **parameters)


def test_parameters_are_checked_without_binding_too():
    with pytest.raises(ValueError, match=r"< 0\.5"):
        LOSSES["conservative_dpo"](pair(), label_smoothing=0.6)
    with pytest.raises(ValueError, match="high > low"):
        bind_loss("smpo", low=1.0, high=0.0)(pair(reward=torch.ones(3, 2)))


def test_bound_losses_hold_their_defaults():
    bound = bind_loss("mapo", eta=1)
    assert dict(bound.parameters) == {"weight": 0.1, "eta": 1, "scale": 1000.0}
    assert (bound.needs.group, bound.needs.reference, bound.needs.label) == ("pair", False, False)
    with pytest.raises(ValueError, match="declares no statistic 'kl'"):
        bound.statistic("kl", pair())


def test_every_loss_is_documented_and_declares_what_it_uses():
    for name, loss in LOSSES.items():
        assert loss.function.__doc__, name
        assert loss.name == ("exo" if name == "dmpo" else name)
    assert LOSSES["dmpo"] is LOSSES["exo"]
    assert find_loss("visalign.maths.preference_pairs:dpo") is LOSSES["dpo"]


def test_a_loss_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(textwrap.dedent('''
        import torch

        from visalign.maths.preference import LossInput, preference_loss


        @preference_loss(group="pair")
        def late_hinge(inputs: LossInput, *, target: float = 0.5) -> torch.Tensor:
            """max(0, target - u)"""
            return torch.relu(target - inputs.margin)
    '''))
    monkeypatch.syspath_prepend(tmp_path)
    loss = bind_loss("own_losses:late_hinge", target=2.0)
    assert loss(pair()).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="did you mean 'target'"):
        bind_loss("own_losses:late_hinge", targt=2.0)


def test_a_loss_must_declare_known_needs():
    with pytest.raises(ValueError, match="unknown statistic 'entropy'"):
        preference_loss(group="pair", statistics=("entropy",))
    with pytest.raises(ValueError, match="unknown group 'triple'"):
        preference_loss(group="triple")


def test_a_weight_needs_its_temperature():
    with pytest.raises(ValueError, match="no parameter 'temperature'"):
        @preference_loss(group="weight", statistics=("mean_weight",))
        def mine(inputs: LossInput) -> torch.Tensor:
            return inputs.policy[:, 0]
