"""Remote rewards: the scores are those of the reward itself, bit for bit; what goes wrong is said, nothing is invented, nothing is asked
twice. Servers of ours, and one that misbehaves, on loopback.
"""

import random
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save

from tests.rewards.misbehaving_server import CLOSE, DRIP, GARBAGE, HALF, HANG, HTML
from tests.rewards.serving import LIMITS, SPEC, Serving, catalogue, mean_answer, misbehaving, rows_of
from tests.rewards.test_latent_head import head_file
from tests.rewards.test_latent_head import samples as latents
from visalign import playground
from visalign.media import load_media, save_media
from visalign.plugins import load_reward
from visalign.protocols import PairwiseReward, Reward, RewardSpec
from visalign.reward_entries import load, parse_reward
from visalign.rewards.captions import CaptionVerifier
from visalign.rewards.clip import ClipScore
from visalign.rewards.function import FunctionReward
from visalign.rewards.jpeg import JpegCompressibility
from visalign.rewards.latent_head import LatentHead
from visalign.rewards.loudness import LoudnessGate
from visalign.rewards.pairwise import BradleyTerry, WinRate
from visalign.rewards.remote.rewards import Remote, RemoteJudge
from visalign.rewards.stability import SimulatorStability
from visalign.scoring import admit, check_inputs
from visalign.types import Media, Prompt, Scores
from visalign.wire.answers import pack_answer

GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [Prompt("a red circle"), Prompt("two blue squares")]


def images(count, size=16):
    return [Media("image", torch.randint(256, (3, size, size), generator=GENERATOR, dtype=torch.uint8)) for _ in range(count)]


def sounds(count):
    return [Media("audio", 0.2 * torch.randn(2, 4000, generator=GENERATOR).clamp(-4, 4), rate=16000.0) for _ in range(count)]


def videos(count):
    return [Media("video", torch.randint(256, (4, 3, 16, 16), generator=GENERATOR, dtype=torch.uint8), rate=8.0) for _ in range(count)]


def meshes(count):
    corner = torch.tensor([[x, y, z] for x in (0.0, 1.0) for y in (0.0, 1.0) for z in (0.0, 1.0)])
    quads = torch.tensor([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    faces = torch.cat([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    return [Media("mesh", corner * torch.tensor([1.0, 1.0, 0.5 + k]), faces=faces) for k in range(count)]


def both(reward, media, prompts=None, group_id=None, **options):
    """Scores in this process, and through a server and back."""
    prompts = prompts or [PROMPTS[0]] * len(media)
    group_id = group_id or [0] * len(media)
    with Serving({"it": reward}) as server:
        remote = Remote(server.url, "it", **options)
        return reward.score(media, prompts, group_id), remote.score(media, prompts, group_id), remote


def assert_same(here: Scores, there: Scores):
    assert here.valid.any()
    assert torch.equal(here.valid, there.valid)
    assert here.reasons == there.reasons
    assert list(here.details) == list(there.details)
    columns = [(here.raw, there.raw), (here.value, there.value), *((here.details[axis], there.details[axis]) for axis in here.details)]
    for one, other in columns:
        assert torch.equal(one.float().view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize(("make", "media"), [
    (JpegCompressibility, images), (CaptionVerifier, lambda count: images(count, 32)), (LoudnessGate, sounds),
    (JpegCompressibility, videos), (lambda: SimulatorStability("z"), meshes),
    (lambda: ClipScore(str(playground.clip_path())), lambda count: images(count, 32)),
], ids=["image", "verifier", "sound", "video", "mesh", "clip"])
def test_scores_are_those_of_the_reward_itself(make, media, compress):
    here, there, _ = both(make(), media(5), compress=compress)
    assert_same(here, there)


def test_latents_are_scored_with_their_prompts_embeddings(tmp_path):
    reward = LatentHead(head_file(tmp_path, prompt_dim=3), level=0.3)
    here, there, remote = both(reward, latents(5, embeds=3))
    assert_same(here, there)
    assert (remote.spec.space, remote.spec.convention) == ("latent", "tiny vae")
    with pytest.raises(ValueError, match="it reads latents 'tiny vae', not 'sdxl'"):
        check_inputs(remote.spec, [replace(one, convention="sdxl") for one in latents(1, embeds=3)], [PROMPTS[0]])


def test_invalid_samples_stay_invalid_with_their_reasons():
    def moody(media, prompts):
        return [None if one.data.float().mean() < 100 else float("nan") if one.data.float().mean() > 200 else 1.0 for one in media]

    media = [Media("image", torch.full((3, 4, 4), level, dtype=torch.uint8)) for level in (50, 150, 250)]
    here, there, remote = both(FunctionReward(moody), media)
    assert_same(here, there)
    assert there.reasons == ("no score", None, "nonfinite")
    assert remote.telemetry()["failed/no_score"] == pytest.approx(1 / 3)


def test_groups_are_seen_whole_and_apart():
    """A reward that ranks within groups, interleaved groups with odd ids, and a server that takes four samples at once."""
    class Ranks:
        spec = RewardSpec(name="ranks", arity="groupwise")

        def score(self, media, prompts, group_id):
            values = [float(one.data.float().mean()) for one in media]
            return Scores.from_values([sum(values[j] < value for j, other in enumerate(group_id) if other == group)
                                       for value, group in zip(values, group_id, strict=True)])

    media, group_id = images(9), [-5, 2**40, 7, -5, 2**40, 7, -5, 2**40, 7]
    here = Ranks().score(media, [PROMPTS[0]] * 9, group_id)
    with Serving({"it": Ranks()}, max_batch=4) as server:
        remote = Remote(server.url, "it")
        assert_same(here, remote.score(media, [PROMPTS[0]] * 9, group_id))
        assert remote.spec.arity == "groupwise"
        assert server.server.batchers["it"].num_calls == 3


def test_pairs_and_their_win_rates():
    judge, media = BradleyTerry(JpegCompressibility()), images(6)
    with Serving({"it": judge}) as server:
        remote = RemoteJudge(server.url, "it")
        assert isinstance(remote, PairwiseReward)
        assert not isinstance(remote, Reward)
        here, there = (WinRate(one).score(media, [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3, [0] * 3 + [1] * 3) for one in (judge, remote))
        assert_same(here, there)
        assert WinRate(remote).telemetry()["valid_rate"] == 1.0
        nested = load(parse_reward(f"{{name: win_rate, params: {{judge: {{reward: remote_judge, urls: '{server.url}', scorer: it}}}}}}"))
        assert_same(here, nested.score(media, [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3, [0] * 3 + [1] * 3))


def test_the_wrong_adapter_says_which_is_right():
    with Serving({"judge": BradleyTerry(JpegCompressibility()), "size": JpegCompressibility()}) as server:
        with pytest.raises(ValueError, match=r"'judge' compares pairs: \{name: win_rate, params: \{judge: \{reward: remote_judge"):
            load_reward("remote", urls=server.url, scorer="judge")
        with pytest.raises(ValueError, match=r"'size' scores samples: \{name: remote"):
            load_reward("remote_judge", urls=server.url, scorer="size")


def test_names_with_spaces_and_slashes():
    with Serving({"my reward/v2 ü": JpegCompressibility()}) as server:
        assert Remote(server.url, "my reward/v2 ü", name="mine").score(images(1), PROMPTS[:1], [0]).valid.all()


# --- admission --------------------------------------------------------------------------------------------------------------------


def test_the_declaration_is_the_servers_but_for_gradients():
    reward = ClipScore(str(playground.clip_path()))
    with Serving({"clip": reward}) as server:
        remote = Remote(server.url, "clip")
    assert reward.spec.differentiable
    assert remote.spec == replace(reward.spec, differentiable=False)
    assert not hasattr(remote, "score_tensor")


def test_prompts_are_checked_before_anything_is_generated_in_requests_of_the_servers_size():
    """Nine prompts to a server that takes four at once; the bad one is the last."""
    prompts = [Prompt("a red circle")] * 8 + [Prompt("the meaning of life")]
    with Serving({"captions": CaptionVerifier(), "size": JpegCompressibility()}, max_samples=4) as server:
        captions = Remote(server.url, "captions")
        admit({"captions": captions, "size": Remote(server.url, "size")}, prompts[:8])
        with pytest.raises(ValueError, match="the meaning of life"):
            admit({"captions": captions}, prompts)


def test_condition_images_reach_the_reward(tmp_path):
    """The file is read there from another path; its pixels are the same."""
    def against_source(media, prompts):
        return [float((one.data.float() - load_media(Path(prompt.images[0])).data.float()).abs().mean())
                for one, prompt in zip(media, prompts, strict=True)]

    source = save_media(images(1)[0], tmp_path / "source")
    here, there, _ = both(FunctionReward(against_source), images(3), [Prompt("edit", images=(str(source),))] * 3)
    assert_same(here, there)


def test_a_refused_sample_ends_the_run_with_the_admission_checks_message():
    with Serving({"it": JpegCompressibility()}) as server:
        remote = Remote(server.url, "it")
        with pytest.raises(ValueError, match=r"answers 422: reward 'it', sample 0: it reads image and video, not audio"):
            remote.score(sounds(1), PROMPTS[:1], [0])


# --- requests ---------------------------------------------------------------------------------------------------------------------


def test_requests_hold_as_much_as_the_server_takes_and_the_order_stays():
    """Ten samples of 768 bytes; four to a call, and two to a request of 3300 bytes, half of it for samples."""
    media = images(10)
    expected = JpegCompressibility().score(media, [PROMPTS[0]] * 10, [0] * 10)
    for settings, calls in (({"max_batch": 4}, 3), ({"max_mb": 3300 / 2**20}, 5)):
        with Serving({"it": JpegCompressibility()}, max_wait_ms=0, **settings) as server:
            remote = Remote(server.url, "it", compress=False)
            assert torch.equal(remote.score(media, [PROMPTS[0]] * 10, [0] * 10).value, expected.value)
            assert remote.telemetry()["calls"] == calls
            assert server.server.batchers["it"].num_rows == 10


def test_no_samples_are_no_request():
    with misbehaving([500]) as server:
        assert len(Remote(server.url, "mean").score([], [], []).valid) == 0
        assert server.requests == []


# --- failures: the server misbehaves -----------------------------------------------------------------------------------------------


def truncated(body):
    return mean_answer(body)[:-5]


def short(body):
    """A good answer to fewer samples."""
    return pack_answer(Scores.from_values([1.0] * (len(rows_of(body)) - 1)), SPEC)


def client(*servers, **options):
    return Remote([one if isinstance(one, str) else one.url for one in servers], "mean", **{"pause": 0.01, "startup_timeout": 0, **options})


def ask(remote, count=4):
    media = images(count)
    expected = torch.tensor([float(one.data.float().mean()) for one in media])
    return remote.score(media, PROMPTS[:1] * count, [0] * count), expected


@pytest.fixture(scope="module")
def nobody():
    """The address of a server that has died."""
    with misbehaving([mean_answer]) as server:
        pass
    return server.url


@pytest.mark.parametrize("trouble", [500, 502, 503, 429, 408, (429, 0), CLOSE, HALF, GARBAGE, HTML, truncated, short, b""])
def test_what_passes_is_retried(trouble):
    with misbehaving([trouble, mean_answer]) as server:
        scores, expected = ask(remote := client(server))
    assert torch.equal(scores.raw, expected)
    assert len(server.requests) == remote.telemetry()["calls"] == 2


@pytest.mark.parametrize(("trouble", "reason"), [(500, "http 500"), ((429, 0), "http 429"), (CLOSE, "connection"), (HALF, "connection"),
                                                 (GARBAGE, "garbage"), (HTML, "garbage"), (truncated, "garbage"), (short, "garbage"),
                                                 (HANG, "timeout"), (DRIP, "timeout")])
def test_what_stays_has_a_reason_and_no_score(trouble, reason, caplog):
    with misbehaving([trouble]) as server:
        scores, _ = ask(remote := client(server, retries=1, timeout=0.5 if reason == "timeout" else 60))
        assert len(server.requests) == 2
    assert not scores.valid.any()
    assert scores.raw.isnan().all()
    assert scores.reasons == (reason,) * 4
    told = remote.telemetry()
    assert (told["valid_rate"], told[f"failed/{reason.replace(' ', '_')}"]) == (0.0, 1.0)
    assert told["latency_p50"] > 0
    assert f"1 of 1 requests were not answered, the first: {reason}" in caplog.text


def test_a_failed_request_takes_no_other_with_it():
    """Ten samples are three requests; one of them fails for good."""
    def picky(body):
        return 500 if len(rows_of(body)) == 2 else mean_answer(body)

    with misbehaving([picky]) as server:
        scores, expected = ask(client(server, retries=0), 10)
    assert scores.valid.tolist() == [True] * 8 + [False] * 2
    assert torch.equal(scores.raw[:8], expected[:8])


def test_a_server_that_asks_for_a_moment_gets_it():
    with misbehaving([(503, 0.3), mean_answer]) as server:
        started = time.monotonic()
        scores, _ = ask(client(server))
    assert scores.valid.all()
    assert time.monotonic() - started >= 0.3


def test_the_batch_ends_when_its_time_does():
    with misbehaving([HANG]) as server:
        started = time.monotonic()
        scores, _ = ask(client(server, concurrency=1, batch_timeout=0.4), 12)
    assert set(scores.reasons) == {"timeout"}
    assert time.monotonic() - started < 10


def test_one_dead_replica_of_two_loses_nothing(nobody):
    with misbehaving([mean_answer]) as server:
        scores, expected = ask(client(nobody, server), 20)
    assert torch.equal(scores.raw, expected)
    assert len(server.requests) == 5


def test_a_replica_that_dies_between_two_batches_loses_nothing():
    with misbehaving([mean_answer]) as server:
        with misbehaving([mean_answer]) as mortal:
            remote = client(mortal, server)
            assert ask(remote)[0].valid.all()
        scores, expected = ask(remote, 20)
    assert torch.equal(scores.raw, expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_in_a_storm_every_score_is_its_samples_own(seed, nobody):
    trouble = random.Random(seed)

    def stormy(body):
        what = trouble.choice([500, CLOSE, HALF, GARBAGE, truncated, short, (429, 0), 503, None, None, None, None])
        return mean_answer(body) if what is None else what(body) if callable(what) else what

    with misbehaving([stormy]) as one, misbehaving([stormy]) as other:
        scores, expected = ask(client(one, nobody, other, concurrency=8, retries=4, pause=0.001), 100)
    assert torch.equal(scores.raw[scores.valid], expected[scores.valid])
    assert int(scores.valid.sum()) > 50
    assert all((reason is None) == ok for reason, ok in zip(scores.reasons, scores.valid.tolist(), strict=True))


@pytest.mark.parametrize(("status", "match"), [(400, "answers 400: told to"), (401, "token_env"), (403, "not this server's"),
                                               (404, "compare scorer"), (413, "--max-mb"), (422, "answers 422: told to")])
def test_a_wrong_set_up_stops_the_run(status, match):
    with misbehaving([status]) as server, pytest.raises(ValueError, match=match):
        ask(client(server))
    assert len(server.requests) == 1


# --- the start --------------------------------------------------------------------------------------------------------------------


def test_a_token_is_brought_and_a_missing_one_told(monkeypatch):
    with Serving({"it": JpegCompressibility()}, token="s3cret") as server:
        with pytest.raises(ValueError, match=r"answers 401: this server wants a token.*token_env"):
            Remote(server.url, "it")
        monkeypatch.setenv("REWARD_TOKEN", "wrong")
        with pytest.raises(ValueError, match="answers 403"):
            Remote(server.url, "it", token_env="REWARD_TOKEN")
        monkeypatch.setenv("REWARD_TOKEN", "s3cret\n")
        assert Remote(server.url, "it", token_env="REWARD_TOKEN").score(images(1), PROMPTS[:1], [0]).valid.all()
        monkeypatch.setenv("REWARD_TOKEN", "s3crét")
        with pytest.raises(ValueError, match="printable ASCII"):
            Remote(server.url, "it", token_env="REWARD_TOKEN")


def test_nobody_there(nobody):
    with pytest.raises(ValueError, match=r"no reward server answers: .*Start visalign serve-reward"):
        client(nobody)


def test_a_server_that_is_still_loading_is_waited_for():
    with misbehaving([mean_answer], page=[503, CLOSE, catalogue()]) as server:
        assert ask(client(server, startup_timeout=30))[0].valid.all()
    assert server.pages_asked == 3


@pytest.mark.parametrize(("page", "match"), [
    (catalogue(name="other"), "serves no 'mean'; it serves other"),
    (catalogue(version=2), r"this side speaks version 1 of the reward protocol, the other side 2"),
    (b"<html>hello</html>", "is no reward server of this version: the head is no JSON"), (catalogue(news=1), "news: "),
    (catalogue(rewards={"mean": {}}), "rewards.mean.spec: "), (404, "answers 404"),
])
def test_servers_of_another_kind_are_refused_at_the_start(page, match):
    with misbehaving([mean_answer], page=page) as server, pytest.raises(ValueError, match=match):
        client(server)


def test_a_server_of_another_version_is_refused_in_the_middle():
    def newer(body):
        arrays = load_arrays(mean_answer(body))
        head = arrays["head"].tobytes().replace(b'"version": 1, "spec"', b'"version": 2, "spec"')
        return save({**arrays, "head": np.frombuffer(head, np.uint8)})

    with misbehaving([newer]) as server, pytest.raises(ValueError, match="version 1 of the reward protocol, the other side 2"):
        ask(client(server))


def test_replicas_must_be_equal():
    other = catalogue(spec=SPEC.model_copy(update={"version": "2"}))
    with (misbehaving([mean_answer]) as one, misbehaving([mean_answer], page=other) as two,
          pytest.raises(ValueError, match="serve different rewards as 'mean'")):
        client(one, two)


def test_the_smaller_limits_of_two_replicas_hold():
    small = catalogue(limits=LIMITS.model_copy(update={"max_batch": 2}))
    with misbehaving([mean_answer]) as one, misbehaving([mean_answer], page=small) as two:
        assert ask(remote := client(one, two), 8)[0].valid.all()
    assert remote.telemetry()["calls"] == 4


def test_a_reward_that_changes_under_a_run_stops_it():
    """A server restarted with another version of its reward would mix two scales."""
    changed = SPEC.model_copy(update={"version": "2"})
    with misbehaving([lambda body: mean_answer(body, changed)]) as server, pytest.raises(ValueError, match="serves another 'mean' than"):
        ask(client(server))


@pytest.mark.parametrize(("options", "match"), [({"urls": []}, "urls"), ({"urls": "localhost:8765"}, "http://HOST:PORT"),
                                                ({"concurrency": 0}, "concurrency 0"), ({"timeout": 0}, "timeout 0"),
                                                ({"retries": -1}, "retries -1"), ({"startup_timeout": -1}, "startup_timeout -1"),
                                                ({"token_env": "NO_SUCH_TOKEN"}, "NO_SUCH_TOKEN"),
                                                ({"scorers": 1}, "did you mean 'scorer'")])
def test_bad_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        load_reward("remote", **{"urls": "http://127.0.0.1:1", "scorer": "m", "startup_timeout": 0, **options})


# --- the cache --------------------------------------------------------------------------------------------------------------------


def test_nothing_is_asked_twice(tmp_path):
    media = images(6)
    with misbehaving([mean_answer]) as server:
        first = client(server, cache_dir=tmp_path).score(media[:3], PROMPTS[:1] * 3, [0] * 3)
        again = client(server, cache_dir=tmp_path)
        both = again.score(media, PROMPTS[:1] * 6, [9] * 6)
        assert [len(rows_of(body)) for body in server.requests] == [3, 3]
        assert torch.equal(both.raw[:3], first.raw)
        assert again.telemetry()["cached"] == 3
        again.score(media[::-1], PROMPTS[:1] * 6, range(6))
        assert len(server.requests) == 2
        assert again.telemetry() == {"samples": 6.0, "cached": 6.0, "calls": 0.0, "valid_rate": 1.0}


def test_cached_scores_are_the_same_to_the_last_bit(tmp_path):
    reward, media = CaptionVerifier(), images(4, 32)
    with Serving({"it": reward}) as server:
        asked = Remote(server.url, "it", cache_dir=tmp_path).score(media, PROMPTS[:1] * 4, [0] * 4)
        kept = Remote(server.url, "it", cache_dir=tmp_path)
        assert_same(asked, kept.score(media, PROMPTS[:1] * 4, [0] * 4))
        assert kept.telemetry()["calls"] == 0


def test_failures_are_not_kept(tmp_path):
    media = images(2)
    with misbehaving([500, GARBAGE, mean_answer]) as server:
        remote = client(server, cache_dir=tmp_path, retries=0)
        reasons = [remote.score(media, PROMPTS[:1] * 2, [0, 0]).reasons[0] for _ in range(3)]
    assert reasons == ["http 500", "garbage", None]

    def moody(media, prompts):
        return [None] * len(media)

    with Serving({"it": FunctionReward(moody)}) as server:
        remote = Remote(server.url, "it", cache_dir=tmp_path / "moody")
        for _ in range(2):
            assert not remote.score(media, PROMPTS[:1] * 2, [0, 0]).valid.any()
        assert server.server.batchers["it"].num_calls == 2


def test_what_is_asked_decides_not_where_or_from_which_file(tmp_path):
    """Another picture, rate, text, negative, metadata, condition image, reward or version is another question; a group id is not."""
    sound, prompt = sounds(1)[0], Prompt("a", metadata={"k": 1})
    here, there = tmp_path / "a.png", tmp_path / "b.png"
    save_media(images(1)[0], here.with_suffix(""))
    there.write_bytes(here.read_bytes())
    with misbehaving([mean_answer]) as one, misbehaving([mean_answer]) as two:
        def calls(media, prompt, server=two, group=0):
            before = len(server.requests)
            client(server, cache_dir=tmp_path / "cache").score([media], [prompt], [group])
            return len(server.requests) - before

        pictured = Prompt("a", images=(str(here),))
        assert [calls(sound, prompt, one), calls(sound, pictured, one)] == [1, 1]
        assert [calls(sound, prompt), calls(sound, prompt, group=7), calls(sound, Prompt("a", images=(str(there),)))] == [0, 0, 0]
        others = [(replace(sound, data=-sound.data), prompt), (replace(sound, rate=8000.0), prompt),
                  (sound, Prompt("b", metadata={"k": 1})), (sound, Prompt("a", negative="b", metadata={"k": 1})),
                  (sound, Prompt("a", metadata={"k": 2})), (sound, Prompt("a"))]
        assert [calls(*question) for question in others] == [1] * 6
        save_media(images(1)[0], here.with_suffix(""))  # the same path, other pixels
        assert calls(sound, pictured) == 1
    newer = SPEC.model_copy(update={"version": "2"})
    with misbehaving([lambda body: mean_answer(body, newer)], page=catalogue(spec=newer)) as server:
        client(server, cache_dir=tmp_path / "cache").score([sound], [prompt], [0])
        assert len(server.requests) == 1


def test_the_order_of_a_pair_is_part_of_the_question(tmp_path):
    a, b = images(2)
    with Serving({"it": BradleyTerry(JpegCompressibility())}) as server:
        remote = RemoteJudge(server.url, "it", cache_dir=tmp_path)
        for first, second in ((a, b), (b, a), (a, b)):
            remote.compare([first], [second], PROMPTS[:1])
        assert server.server.batchers["it"].num_calls == 2


def test_groupwise_answers_are_never_kept(tmp_path):
    reward = WinRate(BradleyTerry(JpegCompressibility()))
    media = images(2)
    with Serving({"it": reward}) as server:
        remote = Remote(server.url, "it", cache_dir=tmp_path / "cache")
        for _ in range(2):
            remote.score(media, PROMPTS[:1] * 2, [0, 0])
        assert server.server.batchers["it"].num_calls == 2
    assert not (tmp_path / "cache").exists()


def test_a_spoilt_cache_file_is_asked_again(tmp_path, caplog):
    media = images(1)
    with misbehaving([mean_answer]) as server:
        for spoilt in ('{"format": 1, "te', '{"format": 1, "raw": "x", "value": 1, "details": {}}', '{"format": 1}', '{"format": 9}'):
            client(server, cache_dir=tmp_path).score(media, PROMPTS[:1], [0])
            path, = tmp_path.rglob("*.json")
            path.write_text(spoilt)
        scores = client(server, cache_dir=tmp_path).score(media, PROMPTS[:1], [0])
        assert len(server.requests) == 5
    assert scores.valid.all()
    assert "is no answer" in caplog.text


def test_nothing_is_asked_twice_after_a_kill(tmp_path):
    """The process dies while its third request is under way; the two before it are there."""
    script = """if True:
        import sys, torch
        from visalign.rewards.remote.rewards import Remote
        from visalign.types import Media, Prompt
        url, folder = sys.argv[1:]
        media = [Media("image", torch.full((3, 2, 2), level, dtype=torch.uint8)) for level in range(20)]
        Remote(url, "mean", cache_dir=folder, concurrency=1).score(media, [Prompt("a")] * 20, [0] * 20)
    """
    processes = []

    def kill(body):
        processes[0].kill()
        return CLOSE

    media = [Media("image", torch.full((3, 2, 2), level, dtype=torch.uint8)) for level in range(20)]
    with misbehaving([mean_answer, mean_answer, kill, mean_answer]) as server:
        processes.append(subprocess.Popen([sys.executable, "-c", script, server.url, str(tmp_path)]))
        assert processes[0].wait(600) != 0
        remote = client(server, cache_dir=tmp_path, concurrency=1)
        scores = remote.score(media, [Prompt("a")] * 20, [0] * 20)
        assert scores.raw.tolist() == list(range(20))
        assert (remote.telemetry()["cached"], remote.telemetry()["calls"]) == (8.0, 3.0)
        assert len(server.requests) == 3 + 3


def test_several_clients_share_calls_and_get_their_own_scores():
    """Eight threads with one sample each; the first call is held until all of them wait."""
    class Slow:
        spec = RewardSpec(name="slow")

        def __init__(self):
            self.gate, self.sizes = threading.Event(), []

        def score(self, media, prompts, group_id):
            self.sizes.append(len(media))
            assert self.gate.wait(60)
            return Scores.from_values([float(one.data.float().mean()) for one in media])

    reward, found = Slow(), {}
    with Serving({"it": reward}, max_batch=16, max_wait_ms=0) as server:
        def one(level):
            remote = Remote(server.url, "it")
            found[level] = remote.score([Media("image", torch.full((3, 2, 2), level, dtype=torch.uint8))], PROMPTS[:1], [0]).raw.item()

        threads = [threading.Thread(target=one, args=(level,)) for level in range(8)]
        for thread in threads:
            thread.start()
        pause = threading.Event()
        while server.server.batchers["it"].waiting + sum(reward.sizes) < 8:
            pause.wait(0.002)
        reward.gate.set()
        for thread in threads:
            thread.join()
    assert found == {level: float(level) for level in range(8)}
    assert len(reward.sizes) == 2  # whoever was first, and all the others
