"""The reward `trained` against its heads by hand, on the playground's CLIP: members, pairs, groups, gradients, refusals."""

import pytest
import torch

from visalign.build import build_rewards
from visalign.config import load_config
from visalign.credit import RewardTerm, assign_credit
from visalign.playground import clip_path, render, sample_scene
from visalign.playground.world import parse
from visalign.plugins import load_reward
from visalign.protocols import DifferentiableReward, PairwiseReward, Reward
from visalign.reward_models.heads import GatedHead, PreferenceHead, ScalarHead, Shape
from visalign.reward_models.stored import FILE, StoredReward, save_reward
from visalign.rewards.feature_encoders import as_feature_encoder, load_encoder
from visalign.scoring import score as score_all
from visalign.types import Media, Prompt

CLIP = {"reward": "clip", "model": "playground:clip"}
SHAPE = Shape(64, 64, ("media", "text", "product"), width=16, depth=1)
TEXTS = ["a red circle", "a blue square", "a small white triangle"]


@pytest.fixture(scope="module")
def encoder():
    return load_encoder(CLIP)


def heads(make, num, seed=0):
    made = []
    for k in range(num):
        torch.manual_seed(seed + k)
        head = make().eval()
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.normal_(std=0.4)
            head.temperature.fill_(1.0 + k)
        made.append(head)
    return tuple(made)


def folder(path, encoder, make=lambda: ScalarHead(SHAPE), num=3, **changes):
    path.mkdir(exist_ok=True)
    stored = {"objective": "bradley_terry", "encoder": CLIP, "encoder_hash": encoder.hash, "members": heads(make, num), **changes}
    save_reward(path / FILE, StoredReward(**stored))
    return str(path)


def samples(num=6, seed=0):
    import random

    rng = random.Random(seed)
    scenes = [sample_scene(parse(TEXTS[k % 3]), rng) for k in range(num)]
    return [Media("image", image) for image in render(scenes)], [Prompt(TEXTS[k % 3]) for k in range(num)]


def by_hand(encoder, head, media, prompts):
    with torch.no_grad():
        return head(encoder.media(media), encoder.texts([prompt.text for prompt in prompts])).squeeze(-1)


class TestPointwise:
    def test_scores_are_the_mean_of_the_members_heads(self, encoder, tmp_path):
        reward = load_reward("trained", path=folder(tmp_path / "r", encoder))
        media, prompts = samples()
        found = score_all({"r": reward}, media, prompts, range(6))["r"]
        each = torch.stack([by_hand(encoder, head, media, prompts) for head in heads(lambda: ScalarHead(SHAPE), 3)])
        torch.testing.assert_close(found.raw, each.mean(dim=0))
        torch.testing.assert_close(found.details["member_1"], each[1])
        torch.testing.assert_close(found.details["disagreement"], each.std(dim=0, correction=0))
        assert reward.spec.arity == "pointwise"
        assert reward.spec.requires == {"prompt"}
        assert isinstance(reward, Reward)

    def test_one_member_is_asked_alone(self, encoder, tmp_path):
        path = folder(tmp_path / "r", encoder)
        media, prompts = samples()
        alone = load_reward("trained", path=path, member=2).score(media, prompts, range(6))
        torch.testing.assert_close(alone.raw, by_hand(encoder, heads(lambda: ScalarHead(SHAPE), 3)[2], media, prompts))
        assert not alone.details

    @pytest.mark.parametrize("size", [1, 4])
    def test_the_batch_changes_nothing(self, encoder, tmp_path, size):
        reward = load_reward("trained", path=folder(tmp_path / "r", encoder))
        media, prompts = samples()
        whole = reward.score(media, prompts, range(6)).raw
        parts = [reward.score(media[i:i + size], prompts[i:i + size], range(len(media[i:i + size]))).raw for i in range(0, 6, size)]
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)

    def test_gradients_reach_the_pixels_and_are_those_of_the_scores(self, encoder, tmp_path):
        reward = load_reward("trained", path=folder(tmp_path / "r", encoder))
        assert reward.spec.differentiable
        assert isinstance(reward, DifferentiableReward)
        media, prompts = samples()
        pixels = torch.stack([one.data for one in media]).float().div(255).requires_grad_()
        values = reward.score_tensor(pixels, prompts)
        torch.testing.assert_close(values, reward.score(media, prompts, range(6)).raw, atol=1e-4, rtol=1e-4)
        values.sum().backward()
        direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ahead, behind = (reward.score_tensor(pixels + step * direction, prompts).sum() for step in (1e-3, -1e-3))
            slope = (ahead - behind) / 2e-3
        assert float((pixels.grad * direction).sum()) == pytest.approx(float(slope), rel=0.02)

    def test_gated_rewards_tell_their_ratings(self, encoder, tmp_path):
        def make():
            return GatedHead(SHAPE, ["colour", "shape"])

        reward = load_reward("trained", path=folder(tmp_path / "r", encoder, make, num=2, objective="ratings"))
        media, prompts = samples()
        details = reward.score(media, prompts, range(6)).details
        with torch.no_grad():
            given = encoder.media(media), encoder.texts([prompt.text for prompt in prompts])
            expected = torch.stack([head.ratings(*given) for head in heads(make, 2)]).mean(dim=0)
        torch.testing.assert_close(torch.stack([details["colour"], details["shape"]], dim=1), expected)


class TestPairs:
    def test_a_scalar_reward_compares_by_its_differences(self, encoder, tmp_path):
        reward = load_reward("trained", path=folder(tmp_path / "r", encoder))
        assert isinstance(reward, PairwiseReward)
        media, prompts = samples()
        prompts = [prompts[0]] * 6
        answer = reward.compare(media[:3], media[3:], prompts[:3])
        raw = reward.score(media, prompts, range(6)).raw
        torch.testing.assert_close(answer.prob_first, torch.sigmoid(raw[:3] - raw[3:]))
        torch.testing.assert_close(reward.compare(media[3:], media[:3], prompts[:3]).prob_first, 1 - answer.prob_first)

    def test_win_rates_of_it_are_those_of_its_bradley_terry_judge(self, encoder, tmp_path):
        path = folder(tmp_path / "r", encoder)
        media, _ = samples()
        prompts = [Prompt(TEXTS[0])] * 6
        direct = load_reward("win_rate", judge={"reward": "trained", "path": path})
        lifted = load_reward("win_rate", judge={"reward": "bradley_terry", "pointwise": {"reward": "trained", "path": path}})
        torch.testing.assert_close(direct.score(media, prompts, [0] * 6).raw, lifted.score(media, prompts, [0] * 6).raw)

    def test_a_general_preference_is_a_judge_of_pairs_and_groups_but_no_pointwise_reward(self, encoder, tmp_path):
        path = folder(tmp_path / "r", encoder, lambda: PreferenceHead(SHAPE, planes=2), num=2, objective="general_preference")
        reward = load_reward("trained", path=path)
        assert reward.spec.arity == "groupwise"
        assert not reward.spec.differentiable
        media, _ = samples(8)
        prompts, groups = [Prompt(TEXTS[0])] * 5 + [Prompt(TEXTS[1])] * 3, [0] * 5 + [1] * 3
        found = reward.score(media, prompts, groups)
        wins = load_reward("win_rate", judge={"reward": "trained", "path": path}).score(media, prompts, groups)
        torch.testing.assert_close(found.raw, wins.raw, atol=1e-5, rtol=1e-5)
        assert wins.details["swap_inconsistency"].abs().max() < 1e-5
        alone = reward.score(media[:1], prompts[:1], [0])
        assert not alone.valid[0]
        assert alone.reasons == ("no comparison",)
        with pytest.raises(ValueError, match="lifts pointwise rewards only"):
            load_reward("bradley_terry", pointwise={"reward": "trained", "path": path})
        with pytest.raises(ValueError, match="it compares samples and scores none"):
            reward.score_tensor(torch.rand(1, 3, 32, 32), prompts[:1])


class TestRecipes:
    def test_members_of_an_ensemble_combine_as_separate_rewards(self, encoder, tmp_path):
        path = folder(tmp_path / "r", encoder)
        entries = ", ".join(f"{{name: trained, params: {{path: {path}, member: {k}}}}}" for k in range(3))
        config = load_config("embedded_grpo", [f"rewards=[{entries}]", "combine={name: uncertainty, strength: 0.5}"])
        terms = build_rewards(config)[0]
        assert [term.name for term in terms] == ["trained", "trained_2", "trained_3"]
        media, _ = samples()
        prompts = [Prompt(TEXTS[0])] * 6
        scores = score_all({term.name: term.reward for term in terms}, media, prompts, [0] * 6)
        from visalign.composition.named import build_combiner

        combiner = build_combiner("uncertainty", {"strength": 0.5}, [t.name for t in terms], [1.0] * 3)
        credit = assign_credit(terms, scores, torch.zeros(6, dtype=torch.int64), combiner=combiner)
        each = torch.stack([scores[term.name].raw for term in terms]).double()
        torch.testing.assert_close(credit.reward.double(), each.mean(dim=0) - 0.5 * each.var(dim=0, correction=0), atol=1e-5, rtol=1e-5)
        assert isinstance(terms[0], RewardTerm)


class TestRefusals:
    def test_other_weights_and_other_encoders_are_refused(self, encoder, tmp_path):
        path = folder(tmp_path / "r", encoder)
        other = load_reward("clip", model=str(clip_path()))
        with torch.no_grad():
            other.model.visual.proj.add_(1e-3)
        with pytest.raises(ValueError, match="has other weights or preprocessing"):
            load_reward("trained", path=path, encoder=other)
        with pytest.raises(ValueError, match="has other weights or preprocessing"):
            load_reward("trained", path=path, encoder={"reward": "clip", "model": str(clip_path()), "video_frames": 4})
        # The same weights under another path are the same encoder.
        assert load_reward("trained", path=path, encoder={"reward": "clip", "model": str(clip_path())}).spec.arity == "pointwise"

    def test_members_that_are_not_there_and_folders_without_a_reward(self, encoder, tmp_path):
        with pytest.raises(ValueError, match=r"member 3 of .*, which has 3"):
            load_reward("trained", path=folder(tmp_path / "r", encoder), member=3)
        with pytest.raises(ValueError, match="no trained reward at"):
            load_reward("trained", path=str(tmp_path))

    def test_versions_differ_with_the_weights(self, encoder, tmp_path):
        path = folder(tmp_path / "r", encoder)
        versions = {load_reward("trained", path=path, member=k).spec.version for k in range(3)}
        assert len(versions) == 3


class TestEncoders:
    def test_hashes_follow_weights_text_side_and_preprocessing(self, encoder):
        again = load_encoder(CLIP)
        assert again.hash == encoder.hash
        changed = load_reward("clip", model=str(clip_path()))
        with torch.no_grad():
            changed.model.text_projection.add_(1e-3)
        assert as_feature_encoder(changed).hash != encoder.hash
        assert load_encoder({**CLIP, "resize_mode": "longest"}).hash != encoder.hash

    def test_embeddings_are_those_of_the_score(self, encoder):
        media, prompts = samples()
        cosines = (encoder.media(media) * encoder.texts([prompt.text for prompt in prompts])).sum(dim=1)
        clip = load_reward("clip", model=str(clip_path()))
        torch.testing.assert_close(cosines, clip.score(media, prompts, range(6)).raw)

    def test_functions_see_no_prompt(self):
        plain = load_encoder("tests.reward_training.worlds:colour")
        assert not plain.has_text
        media, _ = samples(2)
        torch.testing.assert_close(plain.media(media)[0], media[0].data.float().mean(dim=(1, 2)) / 255)
        with pytest.raises(ValueError, match="embeds no text"):
            plain.texts(["x"])

    @pytest.mark.parametrize(("spec", "message"), [({"model": "x"}, "write {reward: clip"), ("no.such:thing", "cannot be imported"),
                                                   ({"reward": "jpeg_compressibility"}, "is not known; give")])
    def test_specifications_without_embeddings_are_refused(self, spec, message):
        with pytest.raises(ValueError, match=message):
            load_encoder(spec)
