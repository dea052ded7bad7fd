"""Media in numbers: what each kind is described by, diversity with a fixed ruler, and media with nothing to measure."""

import math

import pytest
import torch

from visalign.guards.observe import MAX_SIDE, group_diversity, observe
from visalign.maths import media_statistics as statistics
from visalign.types import Media


def image(seed, side=32, level=None):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (3, side, side), generator=generator) if level is None else torch.full((3, side, side), level)
    return Media("image", pixels.to(torch.uint8))


def video(seed, frames=12, moving=True):
    first = image(seed).data
    return Media("video", torch.stack([first.roll(shift, dims=-1) if moving else first for shift in range(frames)]), rate=8.0)


def tone(hertz, amplitude=0.5, rate=8000.0):
    return Media("audio", amplitude * torch.sin(2 * math.pi * hertz * torch.arange(8000) / rate)[None], rate=rate)


def box(x, y, z):
    corners = torch.tensor([[i, j, k] for i in (0, x) for j in (0, y) for k in (0, z)], dtype=torch.float32)
    return Media("mesh", corners, faces=torch.tensor([[0, 1, 2], [1, 3, 2]]))


@pytest.mark.parametrize(("media", "names"), [
    ([image(0), image(1)], {"edge_density", "sharpness", "colour_entropy", "saturation"}),
    ([video(0), video(1)], {"edge_density", "sharpness", "colour_entropy", "saturation", "motion"}),
    ([tone(440), tone(880)], {"loudness", "silence", "clipping", "spectral_flatness"}),
    ([box(1, 1, 1), box(1, 2, 4)], {"vertices", "faces", "slenderness"}),
])
def test_every_kind_has_numbers_and_different_samples_differ(media, names):
    seen = observe(media)
    assert set(seen.statistics) == names
    for values in seen.statistics.values():
        assert (values.shape, values.dtype) == ((2,), torch.float64)
        assert torch.isfinite(values).all()
    assert seen.features.dtype == torch.float64
    assert float((seen.features[0] - seen.features[1]).norm()) > 0


def test_the_numbers_are_those_of_the_formulas():
    picture = image(3)
    seen = observe([picture]).statistics
    assert float(seen["edge_density"]) == pytest.approx(float(statistics.edge_density(picture.data[None].float() / 255)))
    moving, still = observe([video(0), video(0, moving=False)]).statistics["motion"].tolist()
    assert moving > 0.1
    assert still == 0
    assert observe([tone(440)]).statistics["loudness"].item() == pytest.approx(-9.03, abs=0.01)
    assert observe([box(1, 2, 4)]).statistics["slenderness"].item() == pytest.approx(0.25)


def test_large_pictures_are_looked_at_from_further_away():
    large, small = image(0, side=2 * MAX_SIDE), image(0, side=MAX_SIDE)
    assert observe([large]).statistics["sharpness"].item() < observe([small]).statistics["sharpness"].item()
    flat = image(0, side=2 * MAX_SIDE, level=80)
    assert observe([flat]).statistics["edge_density"].item() == 0


def test_diversity_counts_samples_that_differ_with_a_ruler_made_once():
    start = observe([image(seed) for seed in range(8)])
    ruler = start.bandwidth()
    assert 6 < start.diversity(ruler) <= 8
    assert observe([image(0)] * 8).diversity(ruler) == pytest.approx(1)
    collapsed = observe([image(0)] * 4 + [image(1)] * 4).diversity(ruler)
    assert 1.5 < collapsed <= 2


def test_groups_are_measured_apart():
    media = [image(0), image(0), image(1), image(2)]
    ruler = observe([image(seed) for seed in range(8)]).bandwidth()
    same, different = group_diversity(observe(media), torch.tensor([7, 7, 9, 9]), ruler)
    assert same == pytest.approx(1)
    assert different > 1.5
    torch.testing.assert_close(torch.tensor(group_diversity(observe([media[i] for i in (0, 2, 1, 3)]), torch.tensor([7, 9, 7, 9]), ruler)),
                               torch.tensor([same, different]))


def test_what_cannot_be_measured_is_nan_and_hurts_nobody():
    silence = Media("audio", torch.zeros(1, 100), rate=8000.0)
    seen = observe([silence, tone(440)])
    assert seen.statistics["loudness"].tolist()[0] == -120
    assert math.isnan(seen.statistics["spectral_flatness"][0])
    empty = Media("mesh", torch.zeros(0, 3), faces=torch.zeros(0, 3, dtype=torch.int64))
    meshes = observe([empty, box(1, 1, 1), box(1, 2, 4)])
    assert math.isnan(meshes.statistics["slenderness"][0])
    assert math.isfinite(meshes.diversity(1.0))
    tiny = observe([Media("image", torch.zeros(3, 1, 1, dtype=torch.uint8))])
    assert set(tiny.statistics) == {"colour_entropy", "saturation"}
    assert math.isnan(tiny.diversity(tiny.bandwidth()))  # one sample has no ruler


def test_kinds_are_not_mixed():
    with pytest.raises(ValueError, match="audio, image"):
        observe([image(0), tone(440)])
