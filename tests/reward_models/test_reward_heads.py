"""Heads on embeddings: what they see, antisymmetry, temperature, gates; and their way through a file."""

import json

import pytest
import torch
from safetensors.torch import save_file

from visalign.reward_models.adapter import LoraSettings
from visalign.reward_models.blocks import check_blocks, possible_blocks
from visalign.reward_models.heads import GatedHead, PreferenceHead, ScalarHead, Shape, build_head, compose, head_kind
from visalign.reward_models.stored import FILE, StoredReward, load_reward_file, save_reward

SHAPE = Shape(media_dim=6, text_dim=6, blocks=("media", "text", "product"), width=16, depth=1)
HEADS = [lambda: ScalarHead(SHAPE), lambda: PreferenceHead(SHAPE, planes=3), lambda: GatedHead(SHAPE, ["a", "b", "c"], nuisance="b")]


def given(num=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 6, generator=generator), torch.randn(num, 6, generator=generator)


def seeded(make):
    torch.manual_seed(0)
    head = make().eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.5)
        head.mean.normal_()
        head.temperature.fill_(1.5)
    return head


class TestBlocks:
    def test_the_product_holds_the_encoders_own_score(self):
        media, text = given()
        features = compose(("media", "text", "product"), media, text)
        torch.testing.assert_close(features[:, 12:].sum(dim=1), (media * text).sum(dim=1))
        torch.testing.assert_close(features[:, :6], media)

    @pytest.mark.parametrize(("dims", "blocks"), [((6, 6), ("media", "text", "product")), ((6, 4), ("media", "text")),
                                                  ((6, 0), ("media",))])
    def test_all_that_an_encoder_can_fill(self, dims, blocks):
        assert possible_blocks(*dims) == blocks
        check_blocks(blocks, *dims)

    @pytest.mark.parametrize(("blocks", "dims", "message"), [
        (("text",), (6, 6), "not text alone"), (("media", "media"), (6, 6), "once each"), ((), (6, 6), "once each"),
        (("media", "text"), (6, 0), "embeds no text"), (("product",), (6, 4), "no product")])
    def test_blocks_that_cannot_be_filled_are_refused(self, blocks, dims, message):
        with pytest.raises(ValueError, match=message):
            check_blocks(blocks, *dims)


class TestHeads:
    @pytest.mark.parametrize("make", HEADS)
    def test_log_odds_are_antisymmetric_and_divided_by_the_temperature(self, make):
        head, (media, text) = seeded(make), given()
        with torch.no_grad():
            first, second = head(media, text), head(media.flip(0), text)
            odds = head.log_odds(first, second)
            torch.testing.assert_close(head.log_odds(second, first), -odds)
            head.temperature.fill_(4.5)
            torch.testing.assert_close(head.log_odds(head(media, text), head(media.flip(0), text)), odds / 3)
        assert float(odds.abs().max()) > 0.1

    @pytest.mark.parametrize("make", HEADS)
    def test_further_axes_in_front_change_nothing(self, make):
        head, (media, text) = seeded(make), given()
        with torch.no_grad():
            torch.testing.assert_close(head(media.reshape(2, 4, 6), text.reshape(2, 4, 6)).flatten(0, 1), head(media, text))

    def test_standardised_features_have_mean_0_and_variance_1_and_constant_ones_stay_finite(self):
        head = ScalarHead(Shape(3, 0, ("media",)))
        data = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        data = data * torch.tensor([5.0, 0.01, 0.0]) + torch.tensor([1.0, 2.0, 0.1])
        head.standardise((part, None) for part in data.split(64))
        seen = head.features(data, None)
        torch.testing.assert_close(seen.mean(dim=0), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(seen[:, :2].std(dim=0, correction=0), torch.ones(2), atol=1e-4, rtol=0)
        assert float(seen[:, 2].abs().max()) < 1e-5

    def test_a_preference_weighs_its_planes_by_the_prompt(self):
        head, (media, text) = seeded(HEADS[1]), given()
        with torch.no_grad():
            other = text + torch.randn(text.shape, generator=torch.Generator().manual_seed(9))
            ratios = head(media, text) / head(media, other)
        head.shape = SHAPE
        assert head.scale_of_text is not None
        assert float((ratios - 1).abs().max()) > 1e-3

    def test_gates_see_the_prompt_alone_and_never_want_less_of_an_aspect(self):
        head, (media, text) = seeded(HEADS[2]), given()
        with torch.no_grad():
            weights = head.gate_weights(text)
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(8))
            assert weights.shape == (8, 2)
            assert float((weights[0] - weights[1]).abs().max()) > 1e-3
            rated = head.standard_ratings(media, text)[:, head.weighed]
            expected = head.log_scale.exp() * (weights * rated).sum(dim=-1) / head.temperature
            torch.testing.assert_close(head(media, text).squeeze(-1), expected)

    def test_a_nuisance_is_taken_out_of_the_others(self):
        head, (media, text) = seeded(HEADS[2]), given()
        with torch.no_grad():
            before = head(media, text)
            head.dependence.copy_(torch.tensor([0.5, 1.0, -0.25]))
            rated = head.standard_ratings(media, text)
            taken = rated[:, [0, 2]] - torch.tensor([0.5, -0.25]) * rated[:, [1]]
            expected = head.log_scale.exp() * (head.gate_weights(text) * taken).sum(dim=-1) / head.temperature
            torch.testing.assert_close(head(media, text).squeeze(-1), expected)
        assert not torch.allclose(head(media, text), before)

    def test_ratings_are_on_the_scale_they_were_given_on(self):
        head, (media, text) = seeded(HEADS[2]), given()
        head.rating_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
        head.rating_std.copy_(torch.tensor([0.1, 1.0, 10.0]))
        with torch.no_grad():
            torch.testing.assert_close(head.ratings(media, text), head.rating_mean + head.rating_std * head.standard_ratings(media, text))


class TestFiles:
    @pytest.mark.parametrize("make", HEADS)
    def test_members_come_back_as_they_were(self, make, tmp_path):
        members = tuple(seeded(make) for _ in range(2))
        with torch.no_grad():
            members[1].temperature.fill_(0.5)
        adapters = ({"layer.lora_A": torch.randn(2, 3)}, {"layer.lora_A": torch.randn(2, 3)})
        stored = StoredReward("bradley_terry", {"reward": "clip", "model": "m"}, "abc", members, LoraSettings(4, None, ("c_fc",)), adapters)
        save_reward(tmp_path / FILE, stored)
        found = load_reward_file(tmp_path)
        media, text = given()
        with torch.no_grad():
            for mine, theirs in zip(members, found.members, strict=True):
                assert torch.equal(mine(media, text), theirs(media, text))
                assert head_kind(mine) == head_kind(theirs)
                assert not theirs.training
                assert not any(parameter.requires_grad for parameter in theirs.parameters())
        assert found.lora == stored.lora
        assert all(torch.equal(a["layer.lora_A"], b["layer.lora_A"]) for a, b in zip(found.adapters, adapters, strict=True))
        assert (found.objective, found.encoder, found.encoder_hash) == ("bradley_terry", {"reward": "clip", "model": "m"}, "abc")

    def test_arguments_are_json(self):
        for make in HEADS:
            head = make()
            again = build_head(head_kind(head), json.loads(json.dumps(head.arguments())))
            assert {name: value.shape for name, value in again.state_dict().items()} == {n: v.shape for n, v in head.state_dict().items()}

    def test_files_that_hold_something_else_say_so(self, tmp_path):
        with pytest.raises(ValueError, match="finished by the same command"):
            load_reward_file(tmp_path)
        (tmp_path / FILE).write_bytes(b"no tensors")
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            load_reward_file(tmp_path)
        save_file({"x": torch.zeros(1)}, tmp_path / FILE)
        with pytest.raises(ValueError, match="holds no trained reward"):
            load_reward_file(tmp_path / FILE)

    def test_another_encoder_is_refused(self):
        stored = StoredReward("bradley_terry", {"reward": "clip"}, "abc", (ScalarHead(SHAPE),))
        stored.check_encoder("clip", "abc")
        with pytest.raises(ValueError, match="other weights or preprocessing"):
            stored.check_encoder("clip", "abd")
