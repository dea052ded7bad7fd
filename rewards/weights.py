"""Weights of rewards: found on disk or on the hub, read without unpickling anything but tensors; hashed; chains of linear layers folded."""

from __future__ import annotations

import hashlib
import itertools
import pickle
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from visalign import tensorfile


@contextmanager
def fetching(owner: str, location: str, command: str | None = None) -> Iterator[None]:
    """What cannot be read from ``location``, a path or a name on the hub, is one message of ours.

    Args:
        owner: whom it is for.
        command: what fetches it where there is a network; ``None`` is the hub's own for ``location``.
    Raises:
        ValueError: instead of the libraries' own errors; says what was wanted, for whom, and what to do.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "Failed to download" not in str(error):  # open_clip's way to say it
            raise
        why = " ".join(str(error).split())[:200]
        if Path(location).expanduser().exists():
            raise ValueError(f"{owner}: {location} does not hold what is needed: {why}") from error
        if location.startswith(("/", ".", "~")):
            raise ValueError(f"{owner}: no folder {location}; give the folder of a model, or ORG/REPO on the hub") from error
        raise ValueError(f"{owner}: no {location} here, and the hub does not give it; give the path of a local copy, or fetch it once "
                         f"where there is a network, with {command or f'hf download {location}'} ({why})") from error


def weights_file(location: str, *, reward: str, cache_dir: str | None = None) -> Path:
    """The file that ``location`` names: a path, or ``ORG/REPO/FILE`` on the hub, which is downloaded once.

    Raises:
        ValueError: neither a file nor of that form.
    """
    path = Path(location).expanduser()
    if path.is_file():
        return path
    parts = location.split("/")
    if len(parts) < 3 or not all(re.fullmatch(r"[A-Za-z0-9][\w.-]*", part) for part in parts):
        raise ValueError(f"reward '{reward}': no file {path}; give the path of the weights, or ORG/REPO/FILE on the hub")
    from huggingface_hub import hf_hub_download

    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    with fetching(f"reward '{reward}'", f"{repository} {file}"):
        return Path(hf_hub_download(repository, file, cache_dir=cache_dir))


@contextmanager
def tensors_alone(path: str | Path) -> Iterator[None]:
    """Around a ``torch.load`` with ``weights_only``: what it refuses is one message of ours.

    Raises:
        ValueError: the checkpoint holds Python objects, which would run as code; or the file is none (a web page, a Git LFS pointer).
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        if (what := _no_checkpoint(Path(path))) is not None:
            raise ValueError(f"{path} is no torch checkpoint: {what}") from error
        raise ValueError(f"{path} holds more than tensors, and loading it could run code; convert it where you trust it: "
                         "safetensors.torch.save_file(torch.load(FILE, weights_only=False), 'weights.safetensors')") from error


def _no_checkpoint(path: Path) -> str | None:
    """What a file is that no version of torch wrote; ``None`` for a zip archive, a pickle, or where there is no such file to look at."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; fetch what it stands for with git lfs pull"
    if start.startswith((b"PK\x03\x04", b"\x80")):  # a zip archive; a pickle of protocol 2 or later
        return None
    return f"it begins with {start[:24]!r}; download it again"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or a torch checkpoint, on the CPU; what is under "state_dict" where there is such a key.

    Raises:
        ValueError: the file is damaged, holds Python objects, which would run as code, or something that is not a tensor.
    """
    if path.suffix == ".safetensors":
        return tensorfile.read_tensors(path)[0]
    try:
        with tensors_alone(path):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, IndexError, struct.error) as error:  # the last two: a pickle that ends in the middle of a number
        raise ValueError(f"{path} is no torch checkpoint ({error or 'it is empty or cut off'}); copy it again") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds {type(content).__name__}; expected tensors by name (a state dict)")
    return dict(content)


def fold_linear_layers(tensors: Mapping[str, Tensor], prefix: str = "layers.") -> tuple[Tensor, Tensor]:
    """Weight (d,) and bias (), float64, of the one affine map that a chain of linear layers ``{prefix}{index}.weight/bias`` is.

        W_n (... (W_1 x + b_1) ...) + b_n  =  w . x + b

    That the folded map is the same is asserted.

    Raises:
        ValueError: no such layers, shapes that do not chain, or more than one output.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.weight")
    order = sorted(int(match[1]) for key in tensors if (match := pattern.fullmatch(key)))
    missing = [f"{prefix}{index}.bias" for index in order if f"{prefix}{index}.bias" not in tensors]
    if not order or missing:
        raise ValueError(f"expected linear layers {prefix}0.weight, {prefix}0.bias, ...; the file has "
                         f"{', '.join(sorted(tensors)[:8]) or 'no tensors'}" + (f" and lacks {', '.join(missing)}" if missing else ""))
    layers = [(tensors[f"{prefix}{index}.weight"].double(), tensors[f"{prefix}{index}.bias"].double()) for index in order]
    shapes = [tuple(weight.shape) for weight, _ in layers]
    chained = all(len(shape) == 2 for shape in shapes) and all(a[0] == b[1] for a, b in itertools.pairwise(shapes))
    if not chained or shapes[-1][0] != 1:
        raise ValueError(f"linear layers of shapes {shapes} (out, in) do not chain to one number")
    weight, bias = torch.ones(1, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for layer_weight, layer_bias in reversed(layers):
        bias = bias + weight @ layer_bias
        weight = weight @ layer_weight

    assert_affine(layers, weight, bias)
    return weight, bias


def assert_affine(layers: Sequence[tuple[Tensor, Tensor]], weight: Tensor, bias: Tensor) -> None:
    """The layers, run on zero and on every basis vector, which determines an affine map, are ``w . x + b``.

    Raises:
        AssertionError: they are not.
    """
    probes = torch.cat([torch.zeros(1, len(weight), dtype=torch.float64), torch.eye(len(weight), dtype=torch.float64)])
    through = probes
    for layer_weight, layer_bias in layers:
        through = through @ layer_weight.T + layer_bias
    torch.testing.assert_close(probes @ weight + bias, through[:, 0], rtol=1e-9, atol=1e-9)


def weights_hash(declared: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of what is declared about preprocessing and of every tensor's name and bytes."""
    digest = hashlib.sha256(declared.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
