"""``visalign exemplars``: a folder of media becomes the frozen statistics that set-level rewards compare with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from visalign.commands import quiet_libraries
from visalign.config import resolve_path
from visalign.media import load_media
from visalign.rewards.encoders import Encoder, as_encoder
from visalign.rewards.exemplars import NUM_FEATURES, Exemplars, Unit, folder_media, reference_statistics, save_exemplars
from visalign.settings import parse_yaml
from visalign.types import Media, MediaKind

FEW_PER_DIMENSION = 10  # covariances from fewer rows carry a bias that every distance to them keeps
KID_SUBSET = 1000


def run(folder: Path, encoder: str, *, out: Path, unit: str, num_features: int, seed: int, modality: list[str] | None, batch: int) -> None:
    if unit not in ("sample", "frame"):
        raise ValueError(f"--unit {unit}: neither sample nor frame")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files = folder_media(folder)
    quiet_libraries()
    kinds: list[MediaKind] | None = modality or None  # type: ignore[assignment]
    built = parse_encoder(encoder, kinds)
    console = Console(stderr=True)
    media = (load_media(file) for file in track(files, description="encode", console=console, disable=not console.is_terminal))
    write(media, built, out, unit=unit, num_features=num_features, seed=seed, batch=batch)  # type: ignore[arg-type]


def parse_encoder(text: str, modality: list[MediaKind] | None = None) -> Encoder:
    """The encoder that ``--encoder`` names: a YAML mapping or ``package.module:function``.

    Raises:
        ValueError: not YAML, or no encoder.
    """
    try:
        settings = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"--encoder '{text}': {error}") from None
    return as_encoder(resolve_path(settings), modality)


def write(media: Iterable[Media], encoder: Encoder, out: Path, *, unit: Unit = "sample", num_features: int = NUM_FEATURES, seed: int = 0,
          batch: int = 64) -> Exemplars:
    """Compute, save, and say what was made and what it is too small for."""
    found = reference_statistics(media, encoder, unit, batch, num_features, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_exemplars(found, out)
    console = Console()
    console.print(table(found))
    for caveat in caveats(found):
        console.print(f"[yellow]note:[/] {caveat}", highlight=False, soft_wrap=True)
    console.print(f"statistics: {out}", highlight=False, soft_wrap=True)
    return found


def table(exemplars: Exemplars) -> Table:
    """What the statistics are of."""
    shown = Table(show_header=False, title="exemplars", title_justify="left")
    kept = 0 if exemplars.features is None else len(exemplars.features)
    for name, value in (
        ("media", f"{exemplars.num_media:,}"), (f"{exemplars.unit}s", f"{exemplars.count:,}"),
        ("dimensions", f"{len(exemplars.gaussian.mean):,}"), ("encoder", exemplars.encoder), ("encoder hash", exemplars.hash[:12]),
        ("features kept", f"{kept:,}"), ("bandwidth", "-" if exemplars.bandwidth is None else f"{exemplars.bandwidth:.6g}"),
    ):
        shown.add_row(name, value)
    return shown


def caveats(exemplars: Exemplars) -> list[str]:
    """What these statistics are too few for."""
    count, dims = exemplars.count, len(exemplars.gaussian.mean)
    kept = 0 if exemplars.features is None else len(exemplars.features)
    found = []
    if count <= dims:
        found.append(f"{count} {exemplars.unit}s cannot fill {dims} dimensions: the covariance is singular and Fréchet distances are "
                     f"mostly bias. Use kad, kid or cmmd, or gather {FEW_PER_DIMENSION * dims:,}.")
    elif count < FEW_PER_DIMENSION * dims:
        found.append(f"{count} {exemplars.unit}s are few for {dims} dimensions: every Fréchet distance to them keeps their bias, also "
                     f"extrapolated ones. {FEW_PER_DIMENSION * dims:,} would be better; kad, kid and cmmd are unbiased.")
    if 0 < kept < KID_SUBSET:
        found.append(f"{kept} features are fewer than KID's subsets of {KID_SUBSET}: it is then one estimate, without a spread.")
    return found
