"""What is sent is what arrives, bit for bit; what is no request is refused with a reason, never with a crash."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load, save

from visalign.media import load_media
from visalign.protocols import RewardSpec
from visalign.types import Media, Prompt, Scores
from visalign.wire.answers import gather_scores, join_scores, pack_answer, unpack_answer
from visalign.wire.body import HEAD, TooLargeError, VersionError, WireError, pack, unpack
from visalign.wire.media import decode, encode, encodings, size_of
from visalign.wire.rows import PairRow, ScoreRow, cut, pack_prompts, pack_rows, row_bytes, unpack_prompts, unpack_rows
from visalign.wire.schema import MediaPart, PromptPart, Request, SpecPart

ALL = ("raw", "png", "flac")
GENERATOR = torch.Generator().manual_seed(0)


def noise(*shape):
    return torch.randint(256, shape, generator=GENERATOR, dtype=torch.uint8)


def sixteen_bit(channels=2, samples=100):
    return torch.randint(-32768, 32768, (channels, samples), generator=GENERATOR).float() / 32768


SAMPLES = {
    "image": Media("image", noise(3, 17, 23)),
    "video": Media("video", noise(5, 3, 8, 6), rate=24000 / 1001),
    "sound of a model": Media("audio", torch.rand(2, 501, generator=GENERATOR) * 2 - 1, rate=44100.0),
    "sound of a file": Media("audio", sixteen_bit(), rate=16000.0),
    "mesh": Media("mesh", torch.randn(7, 3, generator=GENERATOR), faces=torch.randint(7, (5, 3), generator=GENERATOR)),
    "empty mesh": Media("mesh", torch.zeros(0, 3), faces=torch.zeros(0, 3, dtype=torch.int64)),
    "latent": Media("latent", torch.randn(4, 3, 5, generator=GENERATOR), convention="tiny vae",
                    prompt_embeds=torch.randn(6, generator=GENERATOR)),
    "a view": Media("image", noise(2, 3, 4, 4)[1].permute(0, 2, 1)),
}


def same(one: Media, other: Media) -> bool:
    tensors = [(getattr(one, name), getattr(other, name)) for name in ("data", "faces", "prompt_embeds")]
    return (one.kind, one.rate, one.convention) == (other.kind, other.rate, other.convention) and all(
        a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in tensors)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("allowed", [ALL, ("raw",)])
def test_every_kind_arrives_bit_for_bit(name, allowed, tmp_path):
    rows = [ScoreRow(SAMPLES[name], Prompt("a"), 3),
            ScoreRow(SAMPLES[name], Prompt("b", negative="c", metadata={"n": [1, {"x": None}]}), 4)]
    found = unpack_rows(pack_rows(rows, allowed), False, 2**20, tmp_path)
    assert [row.group for row in found] == [3, 4]
    assert all(same(row.media, SAMPLES[name]) for row in found)
    assert found[0].media is found[1].media  # sent once
    assert [row.prompt for row in found] == [row.prompt for row in rows]


@pytest.mark.parametrize(("name", "encoding"), [("image", "png"), ("video", "raw"), ("sound of a model", "raw"),
                                                ("sound of a file", "flac"), ("mesh", "raw"), ("latent", "raw")])
def test_encodings_are_smaller_and_only_where_they_are_exact(name, encoding):
    assert encodings() == ALL  # soundfile is here
    part, _ = encode(SAMPLES[name], "x", ALL)
    assert part.encoding == encoding
    flat = Media("image", torch.full((3, 64, 64), 7, dtype=torch.uint8))
    assert encode(flat, "x", ALL)[1]["x"].nbytes < 0.1 * size_of(flat)


def test_full_scale_and_odd_rates_are_sent_raw():
    """+1.0 has no 16-bit sample, and FLAC has whole rates only."""
    for media in (Media("audio", torch.tensor([[1.0, 0.0]]), rate=8000.0), Media("audio", torch.zeros(1, 4), rate=0.5)):
        assert encode(media, "x", ALL)[0].encoding == "raw"


def test_pairs_share_samples_and_prompts(tmp_path):
    a, b, prompt = SAMPLES["image"], SAMPLES["a view"], Prompt("a")
    found = unpack_rows(pack_rows([PairRow(a, b, prompt), PairRow(b, a, prompt)], ALL), True, 2**20, tmp_path)
    assert found[0].first is found[1].second
    assert found[0].prompt is found[1].prompt
    assert same(found[0].first, a)
    assert same(found[0].second, b)


def test_condition_images_travel_with_their_prompts(tmp_path):
    """The paths differ, the pixels do not."""
    source = tmp_path / "here.png"
    Image.fromarray(noise(9, 7, 3).numpy()).save(source)
    (there := tmp_path / "there").mkdir()
    prompts = [Prompt("edit it", images=(str(source),)), Prompt("again", images=(str(source), str(source)))]
    found = unpack_prompts(pack_prompts(prompts, ALL), 2**20, there)
    assert [len(prompt.images) for prompt in found] == [1, 2]
    assert torch.equal(load_media(Path(found[1].images[1])).data, load_media(source).data)
    assert len({*found[0].images, *found[1].images}) == 1
    assert Path(found[0].images[0]).parent == there


@pytest.mark.parametrize("metadata", [{"x": float("nan")}, {"x": float("inf")}, {"x": object()}, {"x": (1, 2)}, {1: "x"}])
def test_metadata_that_would_arrive_otherwise_is_refused(metadata):
    with pytest.raises(WireError, match="prompt 'a long day': its metadata cannot be sent as JSON"):
        pack_prompts([Prompt("a long day", metadata=metadata)], ALL)


# --- versions, sizes, nonsense -----------------------------------------------------------------------------------------------------


def request(**changes):
    """A good request's body with its head's keys replaced."""
    arrays = load(pack_rows([ScoreRow(SAMPLES["image"], Prompt("a"), 0)], ALL))
    head = {**json.loads(arrays.pop(HEAD).tobytes()), **changes}
    return save({HEAD: np.frombuffer(json.dumps(head).encode(), np.uint8), **arrays})


@pytest.mark.parametrize(("version", "told"), [(2, "2"), (None, "None"), ("1", "'1'")])
def test_another_version_names_both(version, told, tmp_path):
    """The rest of the head may look otherwise in it, so that nothing else is looked at."""
    with pytest.raises(VersionError, match=rf"speaks version 1 of the reward protocol, the other side {told}"):
        unpack_rows(request(version=version, rows="another shape", news=1), False, 2**20, tmp_path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"rows": [[0, 1, 0]]}, "names a sample or prompt beyond the 1 and 1"), ({"rows": [[-1, 0, 0]]}, "rows.0.0: "),
    ({"rows": [[0, 0]]}, "rows.0.2: "), ({"news": 1}, "news: "), ({"media": [{"kind": "image"}]}, "media.0.encoding"),
    ({"media": [{"kind": "image", "encoding": "pickle", "rate": None, "convention": ""}]}, "media.0.encoding"),
    ({"media": [{"kind": "image", "encoding": "png", "rate": None, "convention": ""}] * 2}, "array 'media.1', which the body lacks"),
    ({"prompts": [{"text": "a", "negative": None, "images": [5], "metadata": {}}]}, "media.5 as its condition image"),
])
def test_what_does_not_fit_is_named(changes, message, tmp_path):
    with pytest.raises(WireError, match=message):
        unpack_rows(request(**changes), False, 2**20, tmp_path)


@pytest.mark.parametrize("head", [b"", b"[]", b"{", b'{"version": NaN}', b'{"version": 1, "x": Infinity}', b"[" * 100_000, b"\xff\xfe"])
def test_heads_that_are_no_json_objects(head):
    with pytest.raises(WireError, match="the head is no JSON"):
        unpack(save({HEAD: np.frombuffer(head, np.uint8)}), Request)


@pytest.mark.parametrize("body", [b"", b"{}", b"\x80\x04\x95", save({}), save({"x": np.zeros(3, np.float32)}),
                                  save({HEAD: np.zeros(3, np.float32)}), (2**62).to_bytes(8, "little") + b"{}"])
def test_bodies_that_are_none(body):
    with pytest.raises(WireError, match="the body"):
        unpack(body, Request)


def test_damaged_bodies_are_refused_and_nothing_else(tmp_path):
    """2000 bodies with a byte changed, cut or added anywhere, seed 0: a request as it was meant, or a WireError."""
    rng = random.Random(0)
    whole = pack_rows([ScoreRow(SAMPLES[name], Prompt("a", metadata={"k": 1}), 0) for name in ("image", "sound of a file", "mesh")], ALL)
    refused = 0
    for _ in range(2000):
        body, at = bytearray(whole), rng.randrange(len(whole))
        what = rng.randrange(3)
        if what == 0:
            body[at] = rng.randrange(256)
        elif what == 1:
            del body[at:at + rng.randrange(1, 50)]
        else:
            body[at:at] = rng.randbytes(rng.randrange(1, 50))
        try:
            unpack_rows(bytes(body), False, 2**20, tmp_path)
        except WireError:
            refused += 1
    assert refused > 1000


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_a_large_picture_is_found_before_it_is_decoded(tmp_path):
    """12 000 x 12 000 pixels of one colour are 432 MB and half a megabyte as PNG."""
    file = tmp_path / "bomb.png"
    Image.new("RGB", (12_000, 12_000)).save(file)
    array = np.frombuffer(file.read_bytes(), np.uint8)
    assert array.nbytes < 2**20
    with pytest.raises(TooLargeError, match="432000000 bytes once decoded, and 1048576 are left"):
        decode(MediaPart(kind="image", encoding="png", rate=None, convention=""), "x", {"x": array}, 2**20)
    import soundfile

    silence = tmp_path / "silence.flac"
    soundfile.write(silence, np.zeros(10_000_000, np.int16), 48000, subtype="PCM_16")
    with pytest.raises(TooLargeError, match="40000000 bytes once decoded"):
        decode(MediaPart(kind="audio", encoding="flac", rate=48000.0, convention=""), "x",
               {"x": np.frombuffer(silence.read_bytes(), np.uint8)}, 2**20)


def test_samples_of_one_request_share_its_limit(tmp_path):
    rows = [ScoreRow(Media("image", torch.full((3, 32, 32), level, dtype=torch.uint8)), Prompt("a"), 0) for level in range(5)]
    assert len(unpack_rows(pack_rows(rows, ALL), False, 5 * 3072, tmp_path)) == 5
    with pytest.raises(TooLargeError):
        unpack_rows(pack_rows(rows, ALL), False, 5 * 3072 - 1, tmp_path)


@pytest.mark.parametrize(("encoding", "content"), [("png", b"GIF89a"), ("png", b"\x89PNG\r\n\x1a\n junk"), ("flac", b"fLaC junk")])
def test_files_that_are_not_what_they_say(encoding, content):
    with pytest.raises(WireError, match=f"no readable {encoding.upper()} file"):
        decode(MediaPart(kind="image", encoding=encoding, rate=None, convention=""), "x", {"x": np.frombuffer(content, np.uint8)}, 2**20)


def test_grey_and_transparent_pictures_are_refused(tmp_path):
    Image.new("RGBA", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(WireError, match="mode RGBA; expected 8-bit RGB"):
        decode(MediaPart(kind="image", encoding="png", rate=None, convention=""), "x",
               {"x": np.frombuffer((tmp_path / "x.png").read_bytes(), np.uint8)}, 2**20)


# --- answers, specs, cuts ----------------------------------------------------------------------------------------------------------


def scored():
    raw = torch.tensor([0.1, float("nan"), -3e-42, 1e38])
    return Scores(raw=raw, value=-raw, valid=torch.tensor([True, False, True, True]), reasons=(None, "parse", None, None),
                  details={"axis": torch.tensor([1 / 3, float("nan"), float("inf"), 0.0])})


def test_answers_arrive_bit_for_bit():
    """Subnormal numbers, NaN and infinity among them; and not one as a JSON number."""
    spec = SpecPart.of(RewardSpec(name="r", direction=-1, raw_range=(0.0, float("inf"))))
    body = pack_answer(scored(), spec)
    found, told = unpack_answer(body, 4)
    for name in ("raw", "value"):
        assert torch.equal(getattr(found, name).view(torch.int32), getattr(scored(), name).view(torch.int32))
    assert torch.equal(found.details["axis"].view(torch.int32), scored().details["axis"].view(torch.int32))
    assert (found.reasons, found.valid.tolist(), told) == (scored().reasons, [True, False, True, True], spec)
    head = load(body)[HEAD].tobytes().decode()
    assert "NaN" not in head
    assert "Infinity" not in head


def test_answers_to_something_else_are_refused():
    spec = SpecPart.of(RewardSpec(name="r"))
    body = pack_answer(scored(), spec)
    arrays = load(body)
    with pytest.raises(WireError, match="reasons of 3 rows"):
        unpack_answer(pack_answer(Scores.from_values([1.0]), spec), 3)
    with pytest.raises(WireError, match=r"expected 'details.axis' as float32 \(3,\)"):
        unpack_answer(body, 3)
    with pytest.raises(WireError, match="expected 'raw' as float32"):
        unpack_answer(save({**arrays, "raw": arrays["raw"].astype(np.float64)}), 4)
    with pytest.raises(WireError, match="non-finite value as valid"):
        unpack_answer(save({**arrays, "valid": np.ones(4, bool)}), 4)
    with pytest.raises(WireError, match="cannot be written as JSON"):
        pack(PromptPart(text="a", negative=None, images=(), metadata={"x": float("nan")}), {})


@pytest.mark.parametrize("spec", [
    RewardSpec(name="a", modality=frozenset({"image", "video"}), requires=frozenset({"prompt", "fps"}), model_ids=("x", "y"),
               licence="MIT"),
    RewardSpec(name="b", arity="groupwise", direction=-1, raw_range=(0.0, 1.0), deterministic=False, version="7"),
    RewardSpec(name="c", modality=frozenset({"latent"}), convention="tiny vae", raw_range=(float("-inf"), 0.0)),
])
def test_specs_arrive_as_they_are_but_for_gradients(spec):
    part = SpecPart.model_validate_json(SpecPart.of(replace(spec, differentiable=True)).model_dump_json())
    assert part.spec() == spec


def test_scores_are_put_together_in_their_order():
    one, two = Scores.from_values([1.0, None], details={"a": torch.tensor([5.0, 6.0])}), Scores.from_values([3.0], direction=-1)
    found = gather_scores([one, two], [[2, 0], [1]])
    assert found.raw[1:].tolist() == [3.0, 1.0]
    assert found.reasons == ("no score", None, None)
    assert found.value[1] == -3.0
    assert found.details["a"][torch.tensor([0, 2])].tolist() == [6.0, 5.0]
    assert torch.isnan(found.details["a"][1])
    assert join_scores([one, two]).valid.tolist() == [True, False, True]


def rows_of_groups(*groups, size=4):
    media = Media("image", torch.zeros(3, size, size, dtype=torch.uint8))
    return [ScoreRow(media, Prompt("a"), group) for group in groups]


def test_cuts_keep_order_size_and_groups():
    rows = rows_of_groups(0, 1, 0, 1, 2)
    assert cut(rows, False, 2) == [[0, 1], [2, 3], [4]]
    assert cut(rows, True, 2) == [[0, 2], [1, 3], [4]]
    assert cut(rows, True, 4) == [[0, 2, 1, 3], [4]]
    assert cut(rows, True, 1) == [[0, 2], [1, 3], [4]]  # a group stays whole, whatever its size
    assert cut(rows, False, 9, max_bytes=2 * row_bytes(rows[0])) == [[0, 1], [2, 3], [4]]
    assert cut([], False, 3) == []
