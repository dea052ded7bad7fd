"""The report is one file, shows what the run folder holds, and nothing it does not hold."""

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from visalign.config import dump_config, make_config
from visalign.evaluation import Evaluation, write_comparison
from visalign.guards.alarm import Alarm
from visalign.media import save_samples
from visalign.report import write_report
from visalign.report.charts import Line, label, line_chart, ticks
from visalign.report.glossary import explain
from visalign.tracking import JsonlTracker
from visalign.types import Media, Prompt

NUM_PROMPTS = 6


def make_run(folder: Path, finished: bool = True) -> Path:
    """A run folder as the loop leaves it, with invented numbers: rewards rise, the guard falls."""
    config = make_config({
        "model": {"path": "org/model"}, "data": {"prompts": "playground:train"}, "train": {"iterations": 20},
        "rewards": [{"name": "captions"}], "guards": [{"name": "jpeg"}], "recipe": {"description": "a run with <b>markup</b> & more"}})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    prompts = [Prompt(f"a <red> shape number {i}") for i in range(NUM_PROMPTS)]

    def evaluate(label: str, level: float) -> Evaluation:
        captions = (level + 0.2 * torch.rand(NUM_PROMPTS, generator=generator)).double()
        values = {"captions": captions, "captions/strict": (captions > 0.6).double(), "jpeg": 3 - captions}
        media = [Media("image", (255 * torch.rand(3, 32, 32, generator=generator)).to(torch.uint8)) for _ in prompts]
        save_samples(folder / "samples" / label, media, prompts, range(NUM_PROMPTS), {"captions": captions.float()})
        found = Evaluation(values=values, seeds=tuple(range(NUM_PROMPTS)))
        found.write(folder / "evaluations" / f"{label}.json")
        return found

    metrics, times = JsonlTracker(folder / "metrics.jsonl"), JsonlTracker(folder / "timings.jsonl")
    before = evaluate("before", 0.4)
    metrics.log(-1, before.metrics())
    for i in range(20 if finished else 7):
        row = {"reward/captions/valid_rate": 1 - 0.01 * i, "reward/other/valid_rate": 1.0,
               "reward/captions/mean": 0.5 + 0.3 * (1 - math.exp(-i / 8)), "grpo/ratio": 1 + 1e-5 * i, "train/grad_norm": 0.3,
               "policy/ratio_deviation": 1e-4 * math.sin(i), "credit/zero_spread_fraction": 0.1, "grpo/kl_reference": float("nan")}
        if i % 5 == 4:
            row |= evaluate(f"iteration-{i + 1:06d}", 0.4 + 0.02 * i).metrics()
        metrics.log(i, row)
        times.log(i, {"time/sample": 1.0, "time/update": 2.0, "reward/captions/seconds": 0.5 + 0.01 * i, "judge/captions/calls": 9.0,
                      "judge/captions/latency_p50": 0.1, "judge/captions/latency_p95": 0.3 + 0.01 * i})
    if finished:
        write_comparison(folder / "evaluation.json", before, evaluate("after", 0.7))
    return folder


class _Page(HTMLParser):
    """Tags, references and text of a page; an unclosed element is an error."""

    VOID = ("meta", "img", "br", "line", "circle", "polyline", "polygon")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_report_is_self_contained_well_formed_and_escaped(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    page = _Page(text)
    assert page.references
    assert all(reference.startswith("data:") for reference in page.references)
    assert not re.search(r"url\(|@import|<script|<link", text)
    assert "script" not in page.count
    assert "a <red> shape number 0" in page.texts
    assert "<b>markup</b>" not in text
    assert "nan" not in re.sub(r"data:[^\"]*", "", text).lower().split()


def test_report_shows_the_same_prompts_before_and_after(tmp_path: Path) -> None:
    page = _Page(write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8"))
    assert page.count["figure"] == NUM_PROMPTS
    assert page.count["img"] == 2 * NUM_PROMPTS
    assert [text for text in page.texts if text.startswith("a <red>")] == [f"a <red> shape number {i}" for i in range(NUM_PROMPTS)]


def test_report_numbers_come_from_the_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    text = write_report(run).read_text(encoding="utf-8")
    gain = json.loads((run / "evaluation.json").read_text())["captions"]["gain"]
    assert f"{gain['mean']:+.3g}" in text
    assert f"[{gain['low']:+.3g}, {gain['high']:+.3g}]" in text
    assert "class=sure>+" in text
    assert "guard, not trained on" in text


def test_numbers_that_do_not_move_share_a_table_instead_of_flat_charts(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run")).read_text(encoding="utf-8")
    assert "<h3>policy/ratio_deviation</h3>" in text
    assert "<h3>credit/zero_spread_fraction</h3>" not in text
    assert "<tr><td>credit/zero_spread_fraction</td><td>0.1</td>" in text


def test_the_time_of_every_reward_and_the_latency_of_servers_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    page = _Page(write_report(run).read_text(encoding="utf-8"))
    for title in ("seconds per iteration", "seconds per call of a reward", "latency of single requests", "valid samples"):
        assert title in page.texts
    assert {"captions p50", "captions p95"} <= set(page.texts)
    assert "other" not in page.texts  # never failed
    (run / "timings.jsonl").write_text('{"iteration": 0, "time/sample": 1.0}\n{"iteration": 1, "time/sample": 2.0}\n', encoding="utf-8")
    assert "latency of single requests" not in write_report(run).read_text(encoding="utf-8")


def test_further_evaluations_stand_beside_as_references(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    Evaluation(values={"captions": torch.tensor([0.5, 0.75])}, seeds=(0, 1)).write(run / "evaluations" / "base with guidance 3.json")
    page = _Page(write_report(run).read_text(encoding="utf-8"))
    assert "base with guidance 3" in page.texts
    assert "0.625" in page.texts


def test_a_running_run_has_a_report_with_its_latest_evaluation(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path / "run", finished=False)).read_text(encoding="utf-8")
    assert "7 of 20 iterations" in text
    assert "at iteration-000005" in text
    assert "What changed" not in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.yaml"):
        write_report(tmp_path)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-6, 4e-6), (17, 17), (0, 0), (-250, 1300), (0.899, 0.9001),
                                          (0.3, 0.30000000000000004)])
def test_ticks_cover_the_range_with_few_round_numbers(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low + 1e-9 * abs(low)
    assert found[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(found) <= 8
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in itertools.pairwise(found)}
    assert steps == {1.0}


def test_charts_leave_gaps_for_missing_values_and_draw_nothing_for_none() -> None:
    assert line_chart([Line("a", [0, 1], [math.nan, math.nan])]) == ""
    drawn = line_chart([Line("a", [0, 1, 2, 3, 4], [1.0, 2.0, math.nan, 3.0, 4.0])])
    assert drawn.count("<polyline") == 2
    assert "nan" not in drawn


def test_neighbouring_ticks_never_read_the_same() -> None:
    for low, high in ((1.0, 1.00002), (0.5, 0.8), (999.1, 999.4), (1e-7, 3e-7)):
        found = ticks(low, high)
        assert len({label(tick, found[1] - found[0]) for tick in found}) == len(found)


def test_metrics_are_explained() -> None:
    assert "rounding" in explain("policy/ratio_deviation_first")
    assert explain("reward/anything/mean")
    assert explain("unheard/of") == ""


def test_a_model_card_stands_beside_the_adapter_with_the_measured_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "adapter").mkdir()
    (run / "adapter" / "loading.json").write_text('{"transformer": "pipe.load_lora_weights(ADAPTER)"}')
    write_report(run)
    card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    gain = json.loads((run / "evaluation.json").read_text())["captions"]["gain"]
    assert card.startswith("---\nbase_model: org/model\n")
    assert "pipe.load_lora_weights(" in card
    assert "the message is harmless" in card
    assert f"{gain['mean']:+.3g} [{gain['low']:+.3g}, {gain['high']:+.3g}]" in card
    assert (run / "adapter" / "config.yaml").read_text() == (run / "config.yaml").read_text()


def test_a_run_that_its_guards_ended_says_so_first(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    assert "Stopped by its guards" not in write_report(run).read_text(encoding="utf-8")
    Alarm(7, "hacking", ("guard 'jpeg' fell by 0.3 sd <since> iteration 5",), best=5).write(run / "stopping.json")
    text = write_report(run).read_text(encoding="utf-8")
    assert text.index("Stopped by its guards at iteration 7: hacking") < text.index("What it looks like")
    assert "fell by 0.3 sd &lt;since&gt; iteration 5" in text
    assert "those of iteration 5" in text
    _Page(text)


def test_what_the_guards_saw_is_drawn_with_a_sentence_each(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    metrics, times = JsonlTracker(run / "metrics.jsonl"), JsonlTracker(run / "timings.jsonl")
    for i in range(7, 10):
        metrics.log(i, {"media/edge_density": 0.1 * i, "eval/media/edge_density": 0.2, "media/diversity": 3.0 - 0.1 * i,
                        "eval/kl_per_dim": 1e-3 * i, "guard/jpeg_drop": 0.1 * i, "reward/captions/swap_inconsistency": 0.2,
                        "eval/captions_win_rate": 0.5, "eval/captions_win_rate_low": 0.4, "eval/captions_win_rate_high": 0.6})
        times.log(i, {"judge/captions/self_agreement": 0.9})
    section = write_report(run).read_text(encoding="utf-8").split("<h2>Guards</h2>")[1].split("<h2>")[0]
    for title in ("Fall from the peak", "captions, win rate", "Edge density", "Diversity within groups", "Distance from the reference, KL",
                  "Judges: swap inconsistency", "Judges: self agreement"):
        chart = section.split(f"<h3>{title}</h3>")[1].split("</div>")[0]
        assert re.match(r"<p>[A-Z].{20,}\.</p><svg", chart), title
