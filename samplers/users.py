"""Users as a denoiser sees them: a few tokens each, learned with the model or read from a file, and mixtures of them.

    U = sum_i w_i U_i        (m, d)        the weights of ``visalign.users.mixture_of``

Nobody has no tokens at all, and the denoiser treats such a prompt as if users did not exist: the whole population's model.
Source: PPD, arXiv:2501.06655.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from visalign.users import Mixture


class UserTable(nn.Module):
    """One row of tokens per user.

    Args:
        names: who can be asked for; row ``i`` of the table is ``names[i]``'s.
        tokens: (U, m, d) float32.
        learned: whether they are trained with the model; tokens from elsewhere (a language model's hidden states) usually stay as given.
    Raises:
        ValueError: no users, a name twice, or tokens of another shape.
    """

    def __init__(self, names: Sequence[str], tokens: Tensor, learned: bool = True) -> None:
        super().__init__()
        self.names = tuple(names)
        self.learned = learned
        self._row = {name: row for row, name in enumerate(self.names)}
        if not self.names or len(self._row) != len(self.names):
            raise ValueError(f"{len(self.names)} users, of which {len(self._row)} differ; give every user once, and at least one")
        if tokens.dim() != 3 or len(tokens) != len(self.names) or tokens.numel() == 0:
            raise ValueError(f"tokens of {len(self.names)} users must be (users, tokens, width), got {tuple(tokens.shape)}")
        self.tokens: Tensor
        if learned:
            self.tokens = nn.Parameter(tokens.detach().float().clone())
        else:
            self.register_buffer("tokens", tokens.detach().float().clone())

    @classmethod
    def random(cls, names: Sequence[str], num_tokens: int = 4, width: int = 64, seed: int = 0) -> UserTable:
        """Learned tokens that start as N(0, 1), different for every user."""
        return cls(names, torch.randn(len(names), num_tokens, width, generator=Generator().manual_seed(seed)))

    @classmethod
    def from_file(cls, path: Path, learned: bool = False) -> UserTable:
        """Tokens from a safetensors file with one tensor per user, (m, d) or (d,), all alike.

        Raises:
            ValueError: the file cannot be read, is empty, or its users' tensors differ in shape.
        """
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read user embeddings from {path} ({error}); give a safetensors file with one tensor per "
                             "user") from error
        shapes = {tuple(tensor.shape) for tensor in found.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) not in (1, 2):
            raise ValueError(f"{path} holds tensors of shapes {', '.join(map(str, sorted(shapes))) or 'none'}; give every user (tokens, "
                             "width) or (width,), the same for all")
        rows = [tensor if tensor.dim() == 2 else tensor.unsqueeze(0) for tensor in found.values()]
        return cls(list(found), torch.stack(rows), learned)

    @property
    def width(self) -> int:
        return self.tokens.shape[2]

    def check(self, mixture: Mixture) -> None:
        """Refuse users the table does not have.

        Raises:
            ValueError: names those it has.
        """
        for name, _ in mixture:
            if name not in self._row:
                close = difflib.get_close_matches(name, self.names, n=1)
                known = ", ".join(self.names[:20]) + (f", ... ({len(self.names)} in all)" if len(self.names) > 20 else "")
                raise ValueError(f"unknown user {name!r}{f', did you mean {close[0]!r}?' if close else ''}; known: {known}; leave the user "
                                 "out to ask for nobody's taste")

    def forward(self, mixtures: Sequence[Mixture]) -> tuple[Tensor, Tensor]:
        """Tokens (n, m, d) and who is present, bool (n,); an absent user's tokens are 0."""
        weights = torch.zeros(len(mixtures), len(self.names))
        for row, mixture in enumerate(mixtures):
            self.check(mixture)
            for name, weight in mixture:
                weights[row, self._row[name]] += weight
        present = torch.tensor([bool(mixture) for mixture in mixtures])
        weights, present = weights.to(self.tokens.device), present.to(self.tokens.device)
        # Not under autocast: a user's tokens must not depend on the precision of the denoiser around them.
        with torch.autocast(self.tokens.device.type, enabled=False):
            return torch.einsum("nu,umd->nmd", weights, self.tokens), present
