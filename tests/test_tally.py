"""Scores of several parts become those of one."""

import torch

from visalign.tally import concatenate_scores
from visalign.types import Scores


def test_a_detail_that_a_part_lacks_is_unknown_there_and_kept_elsewhere():
    first = Scores.from_values([1.0, None], details={"colour": torch.tensor([1.0, 0.0]), "size": torch.tensor([0.5, 0.5])})
    second = Scores.from_values([3.0], details={"colour": torch.tensor([0.0]), "shape": torch.tensor([1.0])})
    found = concatenate_scores([{"r": first}, {"r": second}])["r"]
    assert found.valid.tolist() == [True, False, True]
    assert found.reasons == (None, "no score", None)
    assert found.details["colour"].tolist() == [1.0, 0.0, 0.0]
    assert found.details["size"][:2].tolist() == [0.5, 0.5]
    assert found.details["size"].isnan().tolist() == [False, False, True]
    assert found.details["shape"].isnan().tolist() == [True, True, False]
