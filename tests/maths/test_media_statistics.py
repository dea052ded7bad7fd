"""Statistics of media against pictures and sounds whose answers are known."""

import math

import pytest
import torch

from visalign.maths import media_statistics as statistics


def halves(left, right, side=32):
    """Two plain halves, (1, 3, side, side)."""
    picture = torch.empty(1, 3, side, side)
    picture[..., :side // 2] = torch.tensor(left).reshape(3, 1, 1)
    picture[..., side // 2:] = torch.tensor(right).reshape(3, 1, 1)
    return picture


BLACK, WHITE, GREY, RED = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (1.0, 0.0, 0.0)


def test_an_edge_is_two_pixels_wide_and_a_plain_picture_has_none():
    assert float(statistics.edge_density(halves(BLACK, WHITE))) == pytest.approx(2 / 30)
    assert float(statistics.edge_density(halves(GREY, GREY))) == 0


def test_edges_count_from_a_tenth_of_the_range():
    """A step of height d has the gradient d on the pixels at either side."""
    assert float(statistics.edge_density(halves(BLACK, (0.09,) * 3))) == 0
    assert float(statistics.edge_density(halves(BLACK, (0.11,) * 3))) == pytest.approx(2 / 30)


def test_edges_are_alike_in_every_direction():
    picture = halves(BLACK, WHITE)
    assert float(statistics.edge_density(picture.mT)) == float(statistics.edge_density(picture))


def test_luminance_weighs_colours_as_the_eye_does():
    colours = torch.eye(3).reshape(3, 3, 1, 1)
    torch.testing.assert_close(statistics.luminance(colours).flatten(), torch.tensor([0.2126, 0.7152, 0.0722]))


def test_sharpness_of_a_step_is_that_of_its_laplacian():
    """The Laplacian is +1 and -1 on the two sides of the step and 0 elsewhere: variance 2 / 30."""
    assert float(statistics.sharpness(halves(BLACK, WHITE))) == pytest.approx(math.sqrt(2 / 30), rel=1e-5)
    assert float(statistics.sharpness(halves(RED, RED))) == pytest.approx(0, abs=1e-6)


def test_blur_lowers_sharpness_and_edges_but_not_the_mean():
    picture = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(picture, 5, stride=1, padding=2, count_include_pad=False)
    assert (statistics.sharpness(blurred) < 0.3 * statistics.sharpness(picture)).all()
    assert (statistics.edge_density(blurred) < statistics.edge_density(picture)).all()


def test_colour_entropy_counts_colours():
    assert float(statistics.colour_entropy(halves(RED, RED))) == 0
    assert float(statistics.colour_entropy(halves(RED, WHITE))) == pytest.approx(1)
    axis = (torch.arange(8) + 0.5) / 8
    every = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).reshape(1, 3, 16, 32)
    assert float(statistics.colour_entropy(every)) == pytest.approx(9)


def test_saturation_is_none_in_grey_and_full_in_red():
    assert statistics.saturation(torch.cat([halves(GREY, BLACK), halves(RED, RED), halves(RED, WHITE)])).tolist() == [0, 1, 0.5]


def test_motion_is_the_mean_change_between_frames():
    frames = torch.tensor([0.0, 0.25, 0.0]).reshape(3, 1, 1, 1).expand(3, 3, 4, 4)
    assert float(statistics.motion(frames)) == pytest.approx(0.25)
    assert float(statistics.motion(frames[:1])) == 0


def test_flatness_tells_noise_from_a_tone_and_says_nothing_about_silence():
    noise = 0.1 * torch.randn(1, 48_000, generator=torch.Generator().manual_seed(0))
    tone = 0.5 * torch.sin(2 * math.pi * 440 * torch.arange(48_000) / 48_000)[None]
    assert float(statistics.spectral_flatness(noise)) > 0.9
    assert float(statistics.spectral_flatness(tone)) < 1e-3
    assert math.isnan(float(statistics.spectral_flatness(torch.zeros(2, 1000))))
    assert float(statistics.spectral_flatness(3 * noise)) == pytest.approx(float(statistics.spectral_flatness(noise)))


def test_a_spectrogram_holds_the_power_of_its_windows():
    """Parseval: the one-sided spectrum of a windowed segment sums to its energy times the length."""
    audio = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    power = statistics.power_spectrogram(audio, window=64)[..., 0]
    both_sides = 2 * power.sum(dim=1) - power[:, 0] - power[:, -1]
    energy = (audio.double() * torch.hann_window(64, dtype=torch.float64)).square().sum(dim=1)
    torch.testing.assert_close(both_sides / 64, energy)
    assert statistics.power_spectrogram(torch.ones(1, 3)).shape[0] == 1


def test_thumbnails_are_area_means():
    thumbnail = statistics.thumbnails(halves(BLACK, WHITE)).reshape(3, 8, 8)
    assert thumbnail[:, :, :4].abs().max() == 0
    assert (thumbnail[:, :, 4:] == 1).all()


def test_a_picture_without_an_inner_pixel_is_refused():
    with pytest.raises(ValueError, match="3 x 3"):
        statistics.sharpness(torch.zeros(1, 3, 2, 5))
