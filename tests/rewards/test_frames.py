"""Which frames of a video are looked at."""

import pytest

from visalign.media import evenly_spaced
from visalign.rewards.frames import at_rate


@pytest.mark.parametrize(("length", "num", "rows"), [(9, 3, [0, 4, 8]), (2, 5, [0, 1]), (1, 4, [0]), (10, 4, [0, 3, 6, 9]), (7, 1, [0])])
def test_the_ends_are_among_them(length, num, rows):
    assert evenly_spaced(length, num).tolist() == rows


@pytest.mark.parametrize(("length", "fps", "rate", "count"), [
    (48, 24, 2, 4), (240, 24, 2, 20), (250, 24, 2, 20), (64, 16, 2, 8), (24, 24, 2, 4), (3, 24, 2, 2), (1, 24, 2, 1), (81, 16, 2, 10)])
def test_frames_per_second_are_an_even_number_of_at_least_four(length, fps, rate, count):
    rows = at_rate(length, fps, rate)
    assert len(rows) == count
    assert rows[0] == 0
    assert rows[-1] == (length - 1 if count > 1 else 0)
