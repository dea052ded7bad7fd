"""Levels in closed form; what opens and what closes the gate."""

import math

import pytest
import torch

from visalign.maths.loudness import clipped_fraction, rms_dbfs, silent_fraction
from visalign.rewards.loudness import LoudnessGate
from visalign.scoring import score as score_all
from visalign.types import Media, Prompt

RATE = 8000


def sine(amplitude=1.0, seconds=1.0):
    return amplitude * torch.sin(2 * math.pi * 440 * torch.arange(round(RATE * seconds)) / RATE)[None]


def gate(reward, *audio):
    media = [Media("audio", one, rate=RATE) for one in audio]
    return score_all({"gate": reward}, media, [Prompt("x")] * len(audio), range(len(audio)))["gate"]


def test_levels_of_known_signals():
    assert rms_dbfs(sine()) == pytest.approx(10 * math.log10(0.5), abs=1e-4)  # -3.01
    assert rms_dbfs(sine(0.1)) == pytest.approx(10 * math.log10(0.5) - 20, abs=1e-4)
    assert rms_dbfs(torch.ones(2, 100)) == 0
    assert rms_dbfs(torch.zeros(2, 100)) == -math.inf
    assert rms_dbfs(torch.cat([sine(), torch.zeros(1, RATE)])) == pytest.approx(10 * math.log10(0.25), abs=1e-4)
    assert rms_dbfs(torch.full((1, 10), 1e-30)) == pytest.approx(-600, abs=1e-3)


def test_silence_and_clipping_are_shares():
    half = torch.cat([sine(0.5), torch.zeros(1, RATE)], dim=1)
    assert silent_fraction(half, RATE) == 0.5
    assert silent_fraction(sine(1e-4), RATE, silence=-60) == 1
    assert silent_fraction(sine(1e-4), RATE, silence=-90) == 0
    assert silent_fraction(torch.zeros(1, 10), RATE) == 1
    assert clipped_fraction(torch.tensor([[0.0, 1.0, -1.0, 0.5]])) == 0.5


def test_the_gate_is_one_inside_and_zero_outside():
    quiet, normal, loud = sine(0.005), sine(0.2), torch.full((1, RATE), 0.9)
    found = gate(LoudnessGate(), quiet, normal, loud, torch.zeros(1, RATE))
    assert found.value.tolist() == [0, 1, 0, 0]
    assert found.valid.all()
    assert found.details["rms_dbfs"][3] == -math.inf


def test_a_margin_makes_it_linear_in_decibels():
    level = 10 * math.log10(0.5)
    amplitudes = [10 ** ((target - level) / 20) for target in (-40, -43, -46, -50, -56)]
    found = gate(LoudnessGate(margin=10), *(sine(amplitude) for amplitude in amplitudes))
    torch.testing.assert_close(found.value, torch.tensor([1, 0.7, 0.4, 0, 0]), atol=1e-4, rtol=0)


def test_too_much_silence_or_clipping_closes_it():
    short = torch.cat([sine(0.9), torch.zeros(1, 9 * RATE)], dim=1)
    clipped = (3 * sine()).clamp(-1, 1) * torch.cat([torch.ones(1, RATE // 20), torch.full((1, RATE - RATE // 20), 0.3)], dim=1)
    assert clipped_fraction(clipped) == pytest.approx(0.04, abs=0.005)
    assert gate(LoudnessGate(), short, clipped).value.tolist() == [0, 0]
    assert gate(LoudnessGate(max_silent=0.95, max_clipped=0.05), short, clipped).value.tolist() == [1, 1]


def test_what_is_not_finite_is_invalid():
    found = LoudnessGate().score([Media("audio", sine() / 0, rate=RATE), Media("audio", sine(0.2), rate=RATE)], [Prompt("x")] * 2, [0, 0])
    assert found.valid.tolist() == [False, True]
    assert found.reasons == ("nonfinite", None)


def test_wrong_settings_and_a_missing_rate_are_named():
    with pytest.raises(ValueError, match=r"low 0 must be below high -6.0; margin -1 .*; max_silent 2 must lie in"):
        LoudnessGate(low=0, margin=-1, max_silent=2)
    with pytest.raises(ValueError, match="without a rate"):
        LoudnessGate().score([Media("audio", sine())], [Prompt("x")], [0])
