"""Answers: scores as arrays with all their bits, and the head that says what they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from visalign.types import Scores
from visalign.wire.body import Array, WireError, pack, unpack
from visalign.wire.schema import Answer, SpecPart

DETAIL = "details."


def pack_answer(scores: Scores, spec: SpecPart) -> bytes:
    """The scores of a request's rows; probabilities of pairs are scores, too."""
    columns = {"raw": scores.raw, "value": scores.value, **{f"{DETAIL}{axis}": column for axis, column in scores.details.items()}}
    arrays: dict[str, Array] = {name: column.detach().cpu().float().contiguous().numpy() for name, column in columns.items()}
    arrays["valid"] = scores.valid.detach().cpu().contiguous().numpy()
    return pack(Answer(spec=spec, reasons=scores.reasons, axes=tuple(scores.details)), arrays)


def unpack_answer(body: bytes, num_rows: int) -> tuple[Scores, SpecPart]:
    """The scores, and the reward that gave them.

    Raises:
        WireError: not an answer about ``num_rows`` rows; ``VersionError``.
    """
    answer, arrays = unpack(body, Answer)
    details = {axis: _column(arrays, f"{DETAIL}{axis}", num_rows) for axis in answer.axes}
    valid = arrays.get("valid")
    if valid is None or valid.dtype != np.bool_ or valid.shape != (num_rows,) or len(answer.reasons) != num_rows:
        raise WireError(f"expected 'valid' and reasons of {num_rows} rows")
    try:
        scores = Scores(raw=_column(arrays, "raw", num_rows), value=_column(arrays, "value", num_rows),
                        valid=torch.from_numpy(valid.copy()), reasons=answer.reasons, details=details)
    except ValueError as error:
        raise WireError(str(error)) from error
    return scores, answer.spec


def join_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of consecutive rows as one; a detail that a part lacks is NaN there. At least one part."""
    axes = list(dict.fromkeys(axis for part in parts for axis in part.details))
    details = {axis: torch.cat([part.details[axis] if axis in part.details else torch.full_like(part.raw, torch.nan) for part in parts])
               for axis in axes}
    return Scores(raw=torch.cat([part.raw for part in parts]), value=torch.cat([part.value for part in parts]),
                  valid=torch.cat([part.valid for part in parts]), reasons=tuple(reason for part in parts for reason in part.reasons),
                  details=details)


def gather_scores(parts: Sequence[Scores], rows: Sequence[Sequence[int]]) -> Scores:
    """The scores of all rows in their order, ``parts[k]`` being those of ``rows[k]``, which together are 0..n-1."""
    places = {row: place for place, row in enumerate(row for part in rows for row in part)}
    return take_scores(join_scores(parts), [places[row] for row in range(len(places))])


def take_scores(scores: Scores, rows: Sequence[int]) -> Scores:
    """Some rows, in this order."""
    at = torch.tensor(list(rows), dtype=torch.int64)
    return Scores(raw=scores.raw[at], value=scores.value[at], valid=scores.valid[at], reasons=tuple(scores.reasons[row] for row in rows),
                  details={axis: column[at] for axis, column in scores.details.items()})


def _column(arrays: Mapping[str, Array], name: str, num_rows: int) -> Tensor:
    column = arrays.get(name)
    if column is None or column.dtype != np.float32 or column.shape != (num_rows,):
        got = "nothing" if column is None else f"{column.dtype} {column.shape}"
        raise WireError(f"expected '{name}' as float32 ({num_rows},), got {got}")
    return torch.from_numpy(column.copy())
