"""CLAP scores of a tiny random model through the real feature extractor and tokenizer: windows, silence, determinism."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("soxr")

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerFast

from visalign.protocols import Reward
from visalign.rewards.clap import ClapScore
from visalign.rewards.encoders import as_encoder
from visalign.scoring import score as score_all
from visalign.types import Media, Prompt

RATE = 8000
WORDS = ["a", "dog", "barks", "rain", "on", "tin", "roof", *(f"word{i}" for i in range(40))]
TEXTS = ["a dog barks", "rain on a tin roof", "a tin dog"]


def save_model(folder, words=WORDS, fused=False):
    """One second of 8 kHz is a window of 51 frames of 16 mel bands."""
    audio = {"spec_size": 32, "num_mel_bins": 16, "window_size": 2, "patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1],
             "num_attention_heads": [1, 2], "num_hidden_layers": 2, "enable_fusion": fused,
             "fusion_type": "aff_2d" if fused else None, "aff_block_r": 2}
    text = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
            "max_position_embeddings": 34}
    torch.manual_seed(0)
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=12))
    for parameter in model.parameters():  # the default initialisation leaves every embedding the same
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    ClapFeatureExtractor(feature_size=16, sampling_rate=RATE, hop_length=160, max_length_s=1, fft_window_size=512, frequency_max=4000,
                         truncation="fusion" if fused else "rand_trunc").save_pretrained(folder)
    ids = {word: row for row, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>",
                            unk_token="<unk>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("clap"))


@pytest.fixture(scope="module")
def clap(folder):
    return ClapScore(folder)


def sound(seconds, seed=0, rate=RATE, channels=1):
    """Band-limited noise with a slow envelope."""
    time = torch.arange(round(seconds * rate)) / rate
    generator = torch.Generator().manual_seed(seed)
    frequencies, phases = 100 + 2500 * torch.rand(8, 1, generator=generator), 6 * torch.rand(8, 1, generator=generator)
    wave = (0.1 * torch.sin(2 * math.pi * frequencies * time + phases)).sum(0) * (0.6 + 0.4 * torch.sin(3 * time + seed))
    return Media("audio", wave.expand(channels, -1).contiguous(), rate=rate)


def values(clap, media, texts=None):
    prompts = [Prompt(text) for text in texts or [TEXTS[i % 3] for i in range(len(media))]]
    return score_all({"clap": clap}, media, prompts, range(len(media)))["clap"]


def test_the_score_is_the_cosine_that_the_model_itself_gives(folder, clap):
    assert isinstance(clap, Reward)
    media = [sound(1.0, seed) for seed in range(3)]
    found = values(clap, media)
    model = ClapModel.from_pretrained(folder).eval()
    mel = clap.extractor([one.data[0].numpy() for one in media], sampling_rate=RATE, return_tensors="pt")["input_features"]
    tokens = clap.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], input_features=mel.float())
    torch.testing.assert_close(found.raw, (out.audio_embeds * out.text_embeds).sum(-1), atol=1e-5, rtol=0)
    assert found.raw.std() > 1e-2
    assert found.raw.abs().max() <= 1  # the logit scale (14.3 at initialisation) is not in it


def test_scores_do_not_depend_on_the_batch_or_on_chance(folder, clap):
    media = [sound(seconds, seed) for seed, seconds in enumerate((0.4, 1.0, 3.3, 2.0, 0.7))]
    together = values(clap, media)
    np.random.seed(7)  # what the extractor crops with
    assert torch.equal(values(clap, media).raw, together.raw)
    alone = torch.cat([values(clap, [one], [TEXTS[i % 3]]).raw for i, one in enumerate(media)])
    torch.testing.assert_close(alone, together.raw, atol=1e-5, rtol=0)
    torch.testing.assert_close(values(ClapScore(folder, batch_size=2), media).raw, together.raw, atol=1e-5, rtol=0)


def test_every_window_counts_by_its_length(clap):
    """Two and a quarter windows: the mean of three unit embeddings with weights 1, 1 and 1/4, made a unit again."""
    long = sound(2.25)
    parts = [Media("audio", long.data[:, start:start + RATE], rate=RATE) for start in (0, RATE, 2 * RATE)]
    rows = torch.cat(clap.encode(parts))
    mean = (rows * torch.tensor([1, 1, 0.25])[:, None]).sum(0)
    text = clap.embed_texts([TEXTS[0]])[0].double()
    assert values(clap, [long]).raw.item() == pytest.approx(float(mean @ text / mean.norm()), abs=1e-5)
    torch.testing.assert_close(clap.encode([long])[0], rows, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("seconds", "hop", "windows"), [(0.3, None, 1), (1.0, None, 1), (1.001, None, 2), (3.0, None, 3), (3.0, 0.5, 5),
                                                         (2.9, 0.5, 5)])
def test_windows_cover_the_sound_to_its_end(folder, seconds, hop, windows):
    cut = ClapScore(folder, hop_seconds=hop)._windows(sound(seconds))
    assert len(cut) == windows
    assert all(0 < len(window) <= RATE for window in cut)
    start = round((hop or 1.0) * RATE) * (windows - 1)
    assert start + len(cut[-1]) == round(seconds * RATE)


def test_padding_by_repeats_fills_the_window(folder, clap):
    """0.7 of a window: "repeatpad" leaves 0.3 of silence, "repeat" equals a sound that is itself repeated to the full window."""
    short = sound(0.7)
    full = Media("audio", torch.cat([short.data, short.data], dim=1)[:, :RATE], rate=RATE)
    assert values(ClapScore(folder, padding="repeat"), [short]).raw.item() == pytest.approx(values(clap, [full]).raw.item(), abs=1e-5)
    assert abs(values(clap, [short]).raw - values(clap, [full]).raw) > 1e-3


def test_channels_are_averaged_and_every_sample_has_its_own_rate(clap):
    left, right = sound(1.0).data, sound(1.0, seed=1).data
    stereo, mono = Media("audio", torch.cat([left, right]), rate=RATE), Media("audio", (left + right) / 2, rate=RATE)
    assert values(clap, [stereo]).raw.item() == pytest.approx(values(clap, [mono]).raw.item(), abs=1e-5)
    mixed = [sound(1.0), sound(1.0, rate=16000), sound(1.0, rate=44100)]
    alone = torch.cat([values(clap, [one], TEXTS[:1]).raw for one in mixed])
    torch.testing.assert_close(values(clap, mixed, TEXTS[:1] * 3).raw, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(alone, alone[:1].expand(3), atol=0.02, rtol=0)  # one sound at three rates
    with pytest.raises(ValueError, match="audio without a rate"):
        clap.score([Media("audio", left)], [Prompt("a")], [0])


def test_rate_and_channels_do_not_matter(clap):
    original = values(clap, [sound(1.0)]).raw.item()
    assert values(clap, [sound(1.0, channels=2)]).raw.item() == pytest.approx(original, abs=1e-5)
    assert values(clap, [sound(1.0, rate=44100)]).raw.item() == pytest.approx(original, abs=0.02)
    misread = Media("audio", sound(1.0, rate=44100).data, rate=RATE)
    assert abs(values(clap, [misread]).raw.item() - original) > 0.05


def test_it_is_frozen_and_in_evaluation_mode(clap):
    assert not clap.model.training
    assert not any(parameter.requires_grad for parameter in clap.model.parameters())


def test_silence_is_invalid_or_what_was_declared(folder, clap):
    cancelling = Media("audio", torch.cat([sound(1.0).data, -sound(1.0).data]), rate=RATE)
    media = [sound(1.0), Media("audio", torch.zeros(1, RATE), rate=RATE), cancelling]
    found = values(clap, media)
    assert found.valid.tolist() == [True, False, False]
    assert found.reasons == (None, "silent", "silent")
    declared = values(ClapScore(folder, silence_value=-0.5), media)
    assert declared.valid.all()
    assert declared.value[1:].tolist() == [-0.5, -0.5]
    assert not values(clap, media[1:]).valid.any()


def test_a_model_with_feature_fusion_is_deterministic(tmp_path):
    clap = ClapScore(save_model(tmp_path, fused=True))
    media = [sound(1.0), sound(2.5, seed=1)]
    first = values(clap, media)
    assert first.valid.all()
    # Fused models were trained on other mel filters than the rest: the extractor's own for "fusion".
    model = ClapModel.from_pretrained(tmp_path).eval()
    mel = clap.extractor(media[0].data[0].numpy(), sampling_rate=RATE, truncation="fusion", return_tensors="pt")["input_features"]
    tokens = clap.tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.no_grad():
        out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], input_features=mel.float(),
                    is_longer=torch.zeros(1, 1, dtype=torch.bool))
    torch.testing.assert_close(first.raw[:1], (out.audio_embeds * out.text_embeds).sum(-1), atol=1e-5, rtol=0)
    for seed in range(3):
        np.random.seed(seed)  # what the extractor marks a random clip as longer with
        assert torch.equal(values(clap, media).raw, first.raw)
    torch.testing.assert_close(values(clap, media[:1]).raw, first.raw[:1], atol=1e-5, rtol=0)


def test_window_embeddings_are_features_with_a_hash(folder, clap):
    assert as_encoder(clap) is clap
    rows = clap.encode([sound(2.5), sound(0.5)])
    assert [row.shape for row in rows] == [(3, 12), (1, 12)]
    assert rows[0].dtype == torch.float64
    torch.testing.assert_close(rows[0].norm(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)
    assert clap.hash == ClapScore(folder).hash
    assert clap.hash != ClapScore(folder, hop_seconds=0.5).hash


def test_distinct_prompts_are_encoded_once_and_long_ones_refused(folder):
    clap, rows = ClapScore(folder), []
    clap.model.text_model.register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    values(clap, [sound(1.0, seed) for seed in range(6)], [TEXTS[i // 3] for i in range(6)])
    assert rows == [2]
    with pytest.raises(ValueError, match=r"prompt 1 \('dog dog.*33 tokens, and the model reads 32"):
        clap.check_prompts([Prompt("dog " * 30), Prompt("dog " * 31)])


def test_wrong_models_and_settings_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"is empty \(4 entries\)"):
        ClapScore(save_model(tmp_path / "empty", words=[]))
    with pytest.raises(ValueError, match=r"has 84 entries, its model 64"):
        ClapScore(save_model(tmp_path / "large", words=[f"word{i}" for i in range(80)]))
    with pytest.raises(ValueError, match="not beyond a window of 1 s"):
        ClapScore(folder, hop_seconds=2)
    with pytest.raises(ValueError, match="'pad' is neither"):
        ClapScore(folder, padding="pad")
    with pytest.raises(ValueError, match="silence_value 3 is no cosine"):
        ClapScore(folder, silence_value=3)
    with pytest.raises(ValueError, match=r"reward 'clap': no folder .*nowhere; give the folder of a model"):
        ClapScore(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"reward 'clap': no nobody/clap here, and the hub does not give it; .* hf download nobody/clap"):
        ClapScore("nobody/clap", cache_dir=str(tmp_path))


def test_an_incomplete_checkpoint_is_refused(folder, tmp_path):
    model = ClapModel.from_pretrained(folder)
    state = {key: value for key, value in model.state_dict().items() if key != "audio_projection.linear2.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of a ClapModel \(the first is audio_projection\.linear2\.weight"):
        ClapScore(str(tmp_path))
