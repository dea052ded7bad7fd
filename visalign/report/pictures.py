"""Before and after side by side: the same prompt and seed under two sets of weights, as data inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from visalign.media import INDEX, Sample, load_media, read_index
from visalign.types import Media

SIDE = 384          # longest side of an embedded picture, pixels
PIXEL_ART = 96      # pictures up to this size are magnified without smoothing
NUM_PAIRS = 24


def pairs(run_dir: Path, limit: int = NUM_PAIRS) -> list[tuple[Sample, Sample]]:
    """The first ``limit`` samples of the evaluation before training, each with its counterpart after (or the latest so far)."""
    latest = latest_label(run_dir)
    if latest is None or not (run_dir / "samples" / "before" / INDEX).is_file():
        return []
    before, after = (read_index(run_dir / "samples" / label) for label in ("before", latest))
    same = [(b, a) for b, a in zip(before, after, strict=False) if (b.prompt, b.seed) == (a.prompt, a.seed)]
    return same[:limit]


def latest_label(run_dir: Path) -> str | None:
    """The newest evaluation with samples besides ``before``."""
    folder = run_dir / "samples"
    if (folder / "after" / INDEX).is_file():
        return "after"
    found = sorted(path.parent.name for path in folder.glob(f"iteration-*/{INDEX}"))
    return found[-1] if found else None


def figure(before: Sample, after: Sample, rewards: Sequence[str]) -> str:
    """One pair with its prompt below, and what the given rewards (larger is better) said about both."""
    sides = "".join(f"<div>{element(load_media(one.file))}</div>" for one in (before, after))
    scores = [f"{escape(name)} {before.scores[name]:.3g} &rarr; {after.scores[name]:.3g}" for name in rewards
              if name in before.scores and name in after.scores]
    return (f"<figure><div class=pair>{sides}</div><figcaption>{escape(before.prompt.text)}"
            f"<div class=score>{'<br>'.join(scores)}</div></figcaption></figure>")


def element(media: Media) -> str:
    """An HTML element that shows one sample: a picture, the middle frame of a video, a player for sound."""
    if media.kind == "audio":
        return f'<audio controls src="{_uri(_wave(media), "audio/wav")}"></audio>'
    if media.kind == "mesh":
        return f"<div class=score>mesh, {media.data.shape[0]} vertices</div>"
    pixels = media.data if media.kind == "image" else media.data[media.data.shape[0] // 2]
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    small = max(picture.size) <= PIXEL_ART
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if small:  # compresses well without loss; photographs do not
        picture.save(buffer, format="PNG", optimize=True)
        return f'<img class=small alt="" src="{_uri(buffer.getvalue(), "image/png")}">'
    picture.save(buffer, format="JPEG", quality=88)
    return f'<img alt="" src="{_uri(buffer.getvalue(), "image/jpeg")}">'


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _wave(media: Media) -> bytes:
    from tempfile import TemporaryDirectory

    from visalign.media import save_media

    with TemporaryDirectory() as folder:
        return save_media(media, Path(folder) / "sound").read_bytes()
