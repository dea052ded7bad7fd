"""Files round-trip: exactly where the format is lossless, within one 16-bit step for audio."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from visalign.media import load_media, read_index, save_media, save_samples
from visalign.types import Media, Prompt


def test_image_round_trip_is_exact_and_has_the_right_orientation(tmp_path: Path) -> None:
    data = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = save_media(Media("image", data), tmp_path / "step_0.5")
    assert path.name == "step_0.5.png"
    assert Image.open(path).size == (7, 5)
    assert torch.equal(load_media(path).data, data)


def test_transparency_is_composed_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_media(tmp_path / "clear.png").data == 255).all()


def test_audio_round_trip_keeps_channels_rate_and_full_scale(tmp_path: Path) -> None:
    data = torch.stack([torch.linspace(-1, 1, 100), torch.zeros(100)])
    back = load_media(save_media(Media("audio", data, rate=16000), tmp_path / "tone"))
    assert back.rate == 16000
    assert back.data.shape == (2, 100)
    assert (back.data - data).abs().max() <= 1 / 32767
    assert back.data.abs().max() == 1


def test_mesh_round_trip_and_polygons(tmp_path: Path) -> None:
    mesh = Media("mesh", torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0.1]]), faces=torch.tensor([[0, 1, 2]]))
    back = load_media(save_media(mesh, tmp_path / "m"))
    assert torch.equal(back.data, mesh.data)
    assert back.faces is not None
    assert torch.equal(back.faces, torch.tensor([[0, 1, 2]]))
    (tmp_path / "q.obj").write_text("v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1/1/1 2/2/1 3/3/1 -1\n")
    quad = load_media(tmp_path / "q.obj")
    assert quad.faces is not None
    assert quad.faces.tolist() == [[0, 1, 2], [0, 2, 3]]


def test_video_round_trip_keeps_frames_size_and_rate(tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = torch.stack([torch.full((3, 10, 14), value, dtype=torch.uint8) for value in (10, 120, 240)])
    back = load_media(save_media(Media("video", frames, rate=8), tmp_path / "v"))
    assert back.data.shape == frames.shape
    assert back.rate == 8
    assert (back.data.int() - frames.int()).abs().max() <= 3


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.png: not a readable image"):
        load_media(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=r"unknown suffix '\.txt'"):
        load_media(tmp_path / "x.txt")
    with pytest.raises(ValueError, match=r"has no samples\.jsonl"):
        read_index(tmp_path)


def test_sample_folder_round_trip_drops_missing_scores(tmp_path: Path) -> None:
    media = [Media("image", torch.zeros(3, 2, 2, dtype=torch.uint8)) for _ in range(2)]
    prompts = [Prompt("ein Prüfbild", negative="x", metadata={"target": 1}), Prompt("b")]
    written = save_samples(tmp_path / "s", media, prompts, [5, 6], {"clip": torch.tensor([0.25, float("nan")])})
    assert read_index(tmp_path / "s") == written
    assert [dict(sample.scores) for sample in written] == [{"clip": 0.25}, {}]
