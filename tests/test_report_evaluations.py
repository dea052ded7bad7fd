"""The page of a comparison and its section in a run's report: every number that is there, none that is not, and nothing from outside."""

import dataclasses
import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.test_report import _Page, make_run
from visalign.commands.evaluate_table import tables
from visalign.compare.breakdown import Breakdown
from visalign.compare.comparison import Contrast, Estimate, Wins
from visalign.compare.comparison_file import ComparisonResult, DimensionsResult, DiversityResult, RewardResult, Side, write_result
from visalign.compare.set_contrast import SetContrast
from visalign.media import save_samples
from visalign.report import COMPARISONS, write_comparison_report, write_report
from visalign.report.numbers import interval_text, mean_text
from visalign.types import Media, Prompt


def one(mean: float, half: float | None = 0.05, samples: int = 80, prompts: int = 40) -> Estimate:
    return Estimate(mean, None if half is None else mean - half, None if half is None else mean + half, samples, prompts)


def change(base: float, model: float, half: float | None = 0.05, **counts: int) -> Contrast:
    return Contrast(one(base, half, **counts), one(model, half, **counts), one(model - base, half, **counts))


def result(folder: Path) -> ComparisonResult:
    """Invented numbers, each of them different."""
    color, layout, style = "Attribute - Color", "Entity Layout - Two-Dimensional Space", "Style"
    detailed = Breakdown({color: change(0.111, 0.222), layout: change(0.333, 0.444), style: change(0.71, 0.72)}, change(0.61, 0.62),
                         change(0.63, 0.64))
    primary = Breakdown({"Attribute": change(0.111, 0.222), "Entity Layout": change(0.333, 0.444), style: change(0.71, 0.72)},
                        change(0.515, 0.525), change(0.535, 0.545), invalid_base=7, invalid_model=9)
    by = Breakdown({"colors": change(0.811, 0.822, prompts=4), "position": change(0.833, 0.844, half=None)}, change(0.855, 0.866),
                   change(0.877, 0.888))
    return ComparisonResult(
        model=Side("runs/<first>", "run", str(folder / "model")), base=Side("org/base", "pipeline", str(folder / "base")), prompts=40,
        pairs=80, seeds=(2, 2),
        rewards={"captions": RewardResult(1, change(0.5, 0.7), {"colour": change(0.25, 0.26)}, 80, 78, {"timeout": 2}),
                 "size": RewardResult(-1, change(300.0, 280.0, 12.0), {}, 80, 80)},
        wins={"captions": Wins(one(0.7), 50, 12, 16, {"timeout": 2}), "size": Wins(one(0.51), 30, 22, 28),
              "judge": Wins(one(0.62, 0.1), 40, 20, 15, {"parse": 5}, one(0.58), 0.21, 0.81)},
        diversity=DiversityResult("vendi", "clip:/somewhere/clip", change(1.9, 1.7), SetContrast(change(7.5, 7.9), -1.0, -0.9, 64)),
        sets={"frechet_distance": SetContrast(change(-0.12, -0.1), -0.07, -0.06, 64)}, by={"tag": {"captions": by, "captions/shape": by}},
        dimensions={"testpoint_judge": DimensionsResult(primary, detailed)}, notes=("mind the <gap>",))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    prompts = [Prompt(f"a <red> shape number {k // 2}") for k in range(80)]
    for side in ("base", "model"):
        media = [Media("image", (255 * torch.rand(3, 8, 8, generator=generator)).to(torch.uint8)) for _ in prompts]
        save_samples(tmp_path / side, media, prompts, [k % 2 for k in range(80)])
    rows = [{"group": k // 2, "prompt": prompts[k].text, "seed": k % 2,
             **{side: {"file": f"{k:04d}.png", "scores": {"captions": level}} for side, level in (("base", 0.25), ("model", 0.75))},
             "judges": {}} for k in range(80)]
    write_result(tmp_path / "out", result(tmp_path), rows)
    return tmp_path / "out"


def test_the_page_is_self_contained_well_formed_and_escaped(folder: Path) -> None:
    text = write_comparison_report(folder).read_text(encoding="utf-8")
    page = _Page(text)
    assert all(reference.startswith("data:") for reference in page.references)
    assert not re.search(r"url\(|@import|<script|<link", text)
    assert "runs/<first> against org/base" in page.texts
    assert "mind the <gap>" in page.texts
    assert "<gap>" not in text
    assert "nan" not in re.sub(r"data:[^\"]*", "", text).lower().split()


def test_it_shows_every_number(folder: Path) -> None:
    page = _Page(write_comparison_report(folder).read_text(encoding="utf-8"))
    text = " ".join(page.texts)
    for number in ("+0.200", "[+0.150, +0.250]", "+0.010", "0.700", "won 50, tied 12, lost 16", "40 / 20 / 15", "5 parse", "0.810", "0.210",
                   "wins", "62.0%", "80 and 78 of 80; 2 timeout", "-20 ", "(smaller is better)", "80 x 64", "-1, -0.9", "-0.07, -0.06",
                   "mean of 3 dimensions", "7 points of base and 9 of model"):
        assert number in text, number
    assert "vendi, clip, within a prompt" in text
    assert "/somewhere" not in text
    order = [page.texts.index(name) for name in ("Attribute", "Color", "Entity Layout", "Two-Dimensional Space", "Style",
                                                 "micro: all points")]
    assert order == sorted(order)
    assert page.texts.count("Style") == 1                                  # a dimension without parts is not repeated below itself
    assert "0.833" in page.texts or any(cell.startswith("0.833") for cell in page.texts)
    assert page.texts.index("other axes") < page.texts.index("captions/shape")


def test_pictures_are_the_first_pair_of_each_prompt(folder: Path) -> None:
    page = _Page(write_comparison_report(folder).read_text(encoding="utf-8"))
    assert page.count["figure"] == 24
    assert page.count["img"] == 48
    assert [text for text in page.texts if text.startswith("a <red>")] == [f"a <red> shape number {k}" for k in range(24)]
    assert "captions 0.25 → 0.75" in page.texts


def test_coloured_is_what_excludes_no_difference(folder: Path) -> None:
    text = write_comparison_report(folder).read_text(encoding="utf-8")
    assert "<span class=sure>+0.200</span>" in text
    assert "<span class=unsure>+0.010</span>" in text
    assert "<span class=sure>0.700</span>" in text       # a win rate is compared with one half
    assert "<span class=unsure>0.510</span>" in text


def test_a_run_shows_its_evaluations_as_sections(folder: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = _Page(write_report(run).read_text(encoding="utf-8"))
    write_result(run / COMPARISONS / "base-heldout", result(tmp_path), [])
    write_result(run / COMPARISONS / "other", dataclasses.replace(result(tmp_path), base=Side("runs/second", "run", "x")), [])
    page = _Page(write_report(run).read_text(encoding="utf-8"))
    assert "section" not in before.count
    assert page.count["section"] == 2
    headings = [text for text in page.texts if text.startswith("Evaluation against")]
    assert [heading.strip() for heading in headings] == ["Evaluation against org/base", "Evaluation against runs/second"]
    assert page.count["figure"] == before.count["figure"]                  # no pairs, no pictures


def test_the_terminal_fits_80_columns(folder: Path, tmp_path: Path) -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    for table in tables(result(tmp_path)):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert re.search(r"^captions +0\.500 +0\.700 +\+0\.200 \[\+0\.150, \+0\.250\] +0\.700 \[0\.650, 0\.750\]", text, re.MULTILINE)
    assert re.search(r"^judge +0\.62 \[0\.52, 0\.72\] +40/20/15 +5 parse +0\.810 +0\.210", text, re.MULTILINE)
    assert re.search(r"^  Two-Dimensional Space +80 +0\.333 +0\.444", text, re.MULTILINE)
    assert "captions could score 80 of 80 samples of base, 78 of model" in " ".join(text.split())
    assert "1 more axes in the report" in text


@pytest.mark.parametrize(("estimate", "mean", "interval"), [
    (one(0.03612, 0.025), "0.036", "[0.011, 0.061]"), (one(-20.4, 12.2), "-20", "[-33, -8]"), (one(0.5, 0.0), "0.5", "[0.5, 0.5]"),
    (one(1234.5678, 250.0), "1235", "[985, 1485]"), (one(0.25, None), "0.25", ""),
    (one(3e-5, 2e-6), "0.0000300", "[0.0000280, 0.0000320]")])
def test_numbers_have_the_decimals_that_mean_something(estimate: Estimate, mean: str, interval: str) -> None:
    assert mean_text(estimate) == mean
    assert interval_text(estimate) == interval
