"""Media and files: images as PNG, videos as MP4, audio as WAV, meshes as OBJ; and folders of samples with their index.

A sample folder holds one file per sample and ``samples.jsonl``, one row per file: what ``visalign sample`` writes, what
evaluations leave under ``samples/``, and what ``visalign score`` and the report read.
"""

from __future__ import annotations

import json
import math
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from visalign.types import Media, MediaKind, Prompt

SUFFIX: Mapping[MediaKind, str] = {"image": ".png", "video": ".mp4", "audio": ".wav", "mesh": ".obj"}
KIND: Mapping[str, MediaKind] = {".png": "image", ".jpg": "image", ".jpeg": "image", ".webp": "image", ".bmp": "image",
                                 ".mp4": "video", ".mov": "video", ".webm": "video", ".wav": "audio", ".flac": "audio",
                                 ".obj": "mesh", ".ply": "mesh", ".glb": "mesh", ".stl": "mesh"}
INDEX = "samples.jsonl"


@dataclass(frozen=True)
class Sample:
    """One row of a sample folder.

    Attributes:
        file: of the sample, inside the folder.
        prompt: what it was made for.
        seed: what it was made from; the same prompt and seed under two sets of weights make a before/after pair.
        scores: larger is better, by reward name; a sample that could not be scored has no entry.
    """

    file: Path
    prompt: Prompt
    seed: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


def evenly_spaced(length: int, num_frames: int) -> Tensor:
    """Indices of at most ``num_frames`` of ``length`` frames, the first and the last among them."""
    return torch.linspace(0, length - 1, min(num_frames, length)).round().long()


def save_media(media: Media, stem: Path) -> Path:
    """Write ``stem`` with the kind's suffix and return that path.

    Raises:
        ValueError: a video, and PyAV is not installed.
    """
    path = stem.with_name(stem.name + SUFFIX[media.kind])
    if media.kind == "image":
        Image.fromarray(media.data.permute(1, 2, 0).contiguous().cpu().numpy()).save(path)
    elif media.kind == "video":
        _save_video(media, path)
    elif media.kind == "audio":
        _save_audio(media, path)
    else:
        _save_mesh(media, path)
    return path


def load_media(path: Path) -> Media:
    """Read one file; the suffix says what it is. Alpha channels are composed over white.

    Raises:
        ValueError: an unknown suffix, an unreadable file, a video without PyAV, audio other than 16-bit
            WAV without soundfile, or a mesh other than OBJ without trimesh.
    """
    kind = KIND.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: unknown suffix '{path.suffix}'; expected {', '.join(sorted(KIND))}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return {"image": _load_image, "video": _load_video, "audio": _load_audio, "mesh": _load_mesh}[kind](path)
    except (OSError, EOFError, wave.Error, IndexError) as error:
        raise ValueError(f"{path}: not a readable {kind} file ({error})") from error


def save_samples(folder: Path, media: Sequence[Media], prompts: Sequence[Prompt], seeds: Sequence[int],
                 scores: Mapping[str, Tensor] | None = None) -> list[Sample]:
    """Write one file per sample and the folder's index.

    Args:
        media, prompts, seeds: one entry per sample.
        scores: by reward name, float (n,), larger is better; NaN where a sample has no score.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digits = max(4, len(str(len(media) - 1)))
    samples = []
    for i, (one, prompt, seed) in enumerate(zip(media, prompts, seeds, strict=True)):
        values = {name: float(column[i]) for name, column in (scores or {}).items()}
        samples.append(Sample(file=save_media(one, folder / f"{i:0{digits}d}"), prompt=prompt, seed=int(seed),
                              scores={name: value for name, value in values.items() if math.isfinite(value)}))
    write_index(folder, samples)
    return samples


def write_index(folder: Path, samples: Sequence[Sample]) -> None:
    """Write ``samples.jsonl``."""
    (folder / INDEX).write_text("".join(map(_row, samples)), encoding="utf-8")


def append_index(folder: Path, sample: Sample) -> None:
    """Add one row to ``samples.jsonl``, so that the folder is whole after every sample."""
    with (folder / INDEX).open("a", encoding="utf-8") as file:
        file.write(_row(sample))


def _row(sample: Sample) -> str:
    row = {"file": sample.file.name, "prompt": sample.prompt.text, "negative_prompt": sample.prompt.negative,
           "images": list(sample.prompt.images), "metadata": dict(sample.prompt.metadata),
           "seed": sample.seed, "scores": dict(sample.scores)}
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_index(folder: Path) -> list[Sample]:
    """The samples of a folder, in the order of its index.

    Raises:
        ValueError: there is no index, or a row is not one.
    """
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} has no {INDEX}; it is written by visalign sample and by evaluations")
    return index_rows(folder, path.read_text(encoding="utf-8").rstrip("\n").split("\n"))


def index_rows(folder: Path, lines: Sequence[str]) -> list[Sample]:
    """The samples that lines of an index name.

    Raises:
        ValueError: a line is not a row.
    """
    samples = []
    for number, line in enumerate(lines, start=1):
        try:
            row: dict[str, Any] = json.loads(line)
            prompt = Prompt(text=row["prompt"], negative=row.get("negative_prompt"), images=tuple(row.get("images", ())),
                            metadata=row.get("metadata", {}))
            samples.append(Sample(file=folder / row["file"], prompt=prompt, seed=row.get("seed"), scores=row.get("scores", {})))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder / INDEX}, line {number}: not a sample row ({error!r}); it needs 'file' and 'prompt'") from error
    return samples


def _load_image(path: Path) -> Media:
    with Image.open(path) as file:
        image: Image.Image = file
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
        pixels = np.asarray(image.convert("RGB"))
    return Media(kind="image", data=torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous())


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise ValueError("video files need PyAV: pip install 'visalign[video]'") from None
    return av


def _save_video(media: Media, path: Path) -> None:
    from fractions import Fraction

    with _av().open(str(path), "w") as container:
        frames = media.data.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        stream = container.add_stream("libx264", rate=Fraction(media.rate or 8.0).limit_denominator(1001))
        # 4:4:4 keeps odd sizes and colours; crf 12 is visually lossless.
        stream.height, stream.width, stream.pix_fmt, stream.options = frames.shape[1], frames.shape[2], "yuv444p", {"crf": "12"}
        for frame in frames:
            container.mux(stream.encode(_av().VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _load_video(path: Path) -> Media:
    with _av().open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        rate = float(stream.average_rate)
    return Media(kind="video", data=torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), rate=rate)


def _save_audio(media: Media, path: Path) -> None:
    samples = (media.data.clamp(-1, 1).cpu() * 32767).round().to(torch.int16)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[0])
        file.setsampwidth(2)
        file.setframerate(round(media.rate or 44100))
        file.writeframes(samples.T.contiguous().numpy().tobytes())


def _load_audio(path: Path) -> Media:
    """16-bit WAV needs no package; FLAC and WAV of other sample formats are read by soundfile. Floats beyond [-1, 1] are clipped."""
    try:
        with wave.open(str(path), "rb") as file:
            if file.getsampwidth() == 2:
                flat = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float32) / 32767
                data = torch.from_numpy(flat.reshape(-1, file.getnchannels()).T.copy()).clamp(-1, 1)
                return Media(kind="audio", data=data, rate=float(file.getframerate()))
    except wave.Error:
        pass  # not PCM
    try:
        import soundfile
    except ImportError:
        raise ValueError(f"{path}: audio other than 16-bit WAV needs soundfile: pip install 'visalign[audio]'") from None
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path}: not a readable audio file ({error})") from error
    return Media(kind="audio", data=torch.from_numpy(samples.T.copy()).clamp(-1, 1), rate=float(rate))


def _save_mesh(media: Media, path: Path) -> None:
    faces = torch.zeros(0, 3, dtype=torch.int64) if media.faces is None else media.faces
    lines = [f"v {x:.9g} {y:.9g} {z:.9g}" for x, y, z in media.data.tolist()]
    lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in faces.tolist()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _load_mesh(path: Path) -> Media:
    return _load_obj(path) if path.suffix.lower() == ".obj" else _load_through_trimesh(path)


def _load_through_trimesh(path: Path) -> Media:
    """All triangles of a file, those of a scene at their places in it; axes and unit stay the file's."""
    try:
        import trimesh
    except ImportError:
        raise ValueError(f"{path}: {path.suffix} files need trimesh: pip install 'visalign[sim3d]'") from None
    try:
        mesh: Any = trimesh.load(path, force="mesh", process=False)
    except Exception as error:  # each format's parser raises its own
        raise ValueError(f"{path}: not a readable mesh file ({error!r})") from error
    if not len(mesh.faces):
        raise ValueError(f"{path}: not a readable mesh file (it has no triangles)")
    return Media(kind="mesh", data=torch.tensor(mesh.vertices, dtype=torch.float32), faces=torch.tensor(mesh.faces, dtype=torch.int64))


def _load_obj(path: Path) -> Media:
    """Vertices and triangles; polygons are cut into fans, texture and normal indices are ignored."""
    vertices: list[list[float]] = []
    faces: list[list[int]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        kind, *words = line.split() or [""]
        if kind == "v":
            vertices.append([float(word) for word in words[:3]])
        elif kind == "f":
            corners = [int(word.split("/")[0]) for word in words]
            corners = [corner - 1 if corner > 0 else len(vertices) + corner for corner in corners]
            faces += [[corners[0], corners[i], corners[i + 1]] for i in range(1, len(corners) - 1)]
    return Media(kind="mesh", data=torch.tensor(vertices, dtype=torch.float32).reshape(-1, 3),
                 faces=torch.tensor(faces, dtype=torch.int64).reshape(-1, 3))
