"""`visalign eval` as a user types it: runs, pipelines and folders of samples; what was killed goes on; benchmarks; errors that teach."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.rewards.misbehaving_server import MisbehavingServer
from tests.rewards.playground_judge import DIMENSIONS, pictures, testpoint_prompt, truth
from tests.rewards.tiny_detector import make
from tests.test_pairs_command import trained_adapter
from visalign.cli import app
from visalign.compare.comparison_file import read_result
from visalign.config import dump_config, load_config
from visalign.media import load_media, read_index

CALL = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": 12}
WORDS = [f"{key}={value}" for key, value in CALL.items()]
PROMPTS = ["a red circle", "two blue squares", "a green triangle", "a red circle"]
CLIP = "{name: clip, params: {model: playground:clip}}"
JPEG = ("-r", "jpeg_compressibility")
KILLED = """
import os, signal, sys
from visalign.cli import app
from visalign.compare import pairing
append, calls = pairing.append_index, []
def third(*given):
    append(*given)
    calls.append(1)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
pairing.append_index = third
app(sys.argv[2:])
"""


def visalign(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})


def evaluated(*words: str | Path) -> Result:
    result = visalign("eval", *words)
    assert result.exit_code == 0, result.output + result.stderr
    return result


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: its configuration, and an adapter that is far from nothing."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    folder.mkdir()
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    config = load_config("quickstart", [f"model.call={CALL}", "model.eval_call={}", f"data.eval_prompts={folder / 'prompts.txt'}",
                                        "evaluation.num_prompts=4"])
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("")
    trained_adapter(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def against_base(run: Path) -> Path:
    evaluated(run, "--seeds", "0-1")
    return run / "comparisons" / "base-prompts"


def drawn(model: str | Path, out: Path, *options: str, seeds: str = "0-1") -> Path:
    prompts = [word for prompt in PROMPTS[:3] for word in ("-p", prompt)]
    result = visalign("sample", model, *prompts, "--seeds", seeds, "--out", out, *options)
    assert result.exit_code == 0, result.output + result.stderr
    return out


@pytest.fixture(scope="module")
def folders(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Samples of the base and of the run."""
    out = tmp_path_factory.mktemp("samples")
    return drawn("playground:pipeline", out / "base", *WORDS), drawn(run, out / "model")


def test_a_run_is_compared_with_its_base_by_its_own_rewards_and_guards(against_base: Path) -> None:
    result = read_result(against_base)
    assert (result.model.kind, result.base.kind, result.base.name) == ("run", "pipeline", "playground:pipeline")
    assert (result.prompts, result.pairs, result.seeds) == (3, 8, (2, 4))        # one prompt comes twice, with seeds of its own
    assert list(result.rewards) == ["captions", "clip"]
    assert result.rewards["captions"].whole.gain.samples == 8
    assert result.diversity.measure == "vendi"                                   # of the guard's CLIP
    assert any("3 prompts are few" in note for note in result.notes)


def test_its_samples_are_those_of_the_sample_command(against_base: Path, folders: tuple[Path, Path]) -> None:
    for side, folder in zip(("base", "model"), folders, strict=True):
        ours = {(one.prompt.text, one.seed): one.file.read_bytes() for one in read_index(against_base / "samples" / side)}
        theirs = {(one.prompt.text, one.seed): one.file.read_bytes() for one in read_index(folder)}
        assert {key: ours[key] for key in theirs} == theirs
        assert set(ours) - set(theirs) == {("a red circle", 2), ("a red circle", 3)}


def test_the_runs_report_shows_it(against_base: Path, run: Path) -> None:
    whole, own = (run / "report.html").read_text(encoding="utf-8"), (against_base / "report.html").read_text(encoding="utf-8")
    assert "Evaluation against playground:pipeline" in whole
    for text in (whole, own):
        assert text.count("<figure>") == 3                                       # the first pair of each prompt
        assert not re.search(r"url\(|@import|<script|<link|src=\"(?!data:)", text)
        assert "nan" not in re.sub(r"data:[^\"]*", "", text).lower().split()


def test_what_was_killed_goes_on_and_ends_alike(run: Path, against_base: Path, tmp_path: Path) -> None:
    """Killed after the third sample of the base, and again after two more; what is there is not made again."""
    command = ["eval", str(run), "--seeds", "0-1", "--device", "cpu", "--out", str(tmp_path / "out")]
    made: dict[str, int] = {}
    for calls, total in ((3, 3), (2, 5)):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(calls), *command], check=False, capture_output=True,
                                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        files = {one.file.name: one.file.stat().st_mtime_ns for one in read_index(tmp_path / "out" / "samples" / "base")}
        assert len(files) == total
        assert made.items() <= files.items()
        made = files
    finished = evaluated(*command[1:])
    assert "5 of 8 samples of playground:pipeline are there already" in finished.stderr
    for name in ("pairs.jsonl", "samples/base/samples.jsonl", "samples/model/samples.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (against_base / name).read_bytes()
    assert read_result(tmp_path / "out").rewards == read_result(against_base).rewards
    assert "Evaluation against playground:pipeline <small>out</small>" in (run / "report.html").read_text(encoding="utf-8")


def test_more_seeds_and_rewards_later_cost_only_themselves(run: Path, tmp_path: Path) -> None:
    command = (run, "-p", "a red circle", "-p", "a green triangle", *JPEG, "--out", tmp_path)
    evaluated(*command, "--seeds", "0")
    before = {one.file: one.file.stat().st_mtime_ns for one in read_index(tmp_path / "samples" / "model")}
    evaluated(*command, "--seeds", "0-1", "-r", "captions")
    after = read_index(tmp_path / "samples" / "model")
    assert [(one.prompt.text, one.seed) for one in after] == [
        ("a red circle", 0), ("a green triangle", 0), ("a red circle", 1), ("a green triangle", 1)]
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert list(read_result(tmp_path).rewards) == ["jpeg_compressibility", "captions"]


def test_results_that_would_be_lost_and_samples_of_other_settings_are_refused(run: Path, tmp_path: Path) -> None:
    command = (run, "-p", "a red circle", "--seeds", "0", "--out", tmp_path)
    evaluated(*command, *JPEG)
    lost = visalign("eval", *command, "-r", "captions")
    assert lost.exit_code == 1
    assert "holds jpeg_compressibility, which this command would not make again" in one_line(lost.stderr)
    other = visalign("eval", *command, *JPEG, "num_inference_steps=3")
    assert other.exit_code == 1
    assert "samples of other settings (call: " in one_line(other.stderr)


def test_a_comparison_of_other_sides_is_not_replaced(folders: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = folders
    evaluated(first, "--against", second, *JPEG, "--out", tmp_path)
    kept = (tmp_path / "evaluation.json").read_bytes()
    lost = visalign("eval", second, "--against", first, *JPEG, "--out", tmp_path)
    assert lost.exit_code == 1
    assert f"compares {first} with {second}; give this comparison another --out" in one_line(lost.stderr)
    assert (tmp_path / "evaluation.json").read_bytes() == kept
    evaluated(first, "--against", second, *JPEG, "--out", tmp_path)


def test_folders_of_samples_are_compared_as_they_are(folders: tuple[Path, Path], against_base: Path, tmp_path: Path) -> None:
    base, model = folders
    shown = evaluated(model, "--against", base, "-r", "captions", "--out", tmp_path)
    assert "3 prompts, 2 seeds each" in one_line(shown.output)
    result = read_result(tmp_path)
    assert (result.model.kind, result.base.kind, result.pairs) == ("samples", "samples", 6)
    assert result.diversity.measure == "difference"
    assert not (tmp_path / "samples").exists()
    # The same numbers as from the run itself, pair by pair.
    rows = {(row["prompt"], row["seed"]): row["model"]["scores"]["captions"]
            for row in map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())}
    whole = {(row["prompt"], row["seed"]): row["model"]["scores"]["captions"]
             for row in map(json.loads, (against_base / "pairs.jsonl").read_text().splitlines())}
    assert {key: whole[key] for key in rows} == rows


def test_a_folder_against_a_pipeline_is_drawn_on_the_folders_prompts_and_seeds(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, model = folders
    evaluated(model, "--against", "playground:pipeline", *WORDS, *JPEG, "--out", tmp_path)
    redrawn = {(one.prompt.text, one.seed): one.file.read_bytes() for one in read_index(tmp_path / "samples" / "base")}
    assert redrawn == {(one.prompt.text, one.seed): one.file.read_bytes() for one in read_index(base)}


def test_sides_that_do_not_match_are_refused_by_their_first_difference(folders: tuple[Path, Path], run: Path, tmp_path: Path) -> None:
    other = drawn(run, tmp_path / "other", seeds="0,2")
    refused = visalign("eval", other, "--against", folders[0], *JPEG, "--out", tmp_path / "out")
    assert refused.exit_code == 1
    assert "has no sample 1: prompt 'a red circle' with seed 2; it has seeds 0, 1 for that prompt" in one_line(refused.stderr)
    chosen = evaluated(other, "--against", folders[0], *JPEG, "--seeds", "0", "--out", tmp_path / "out")
    assert "3 prompts, 1 seed each" in one_line(chosen.output)


def test_a_side_against_itself_ties_without_width_or_nan(folders: tuple[Path, Path], tmp_path: Path) -> None:
    set_level = "{name: vendi, params: {encoder: {reward: clip, model: playground:clip}}}"
    evaluated(folders[0], "--against", folders[0], "-r", "captions", "-r", set_level, "--judge",
              "{name: bradley_terry, params: {pointwise: {reward: captions}}}", "--out", tmp_path)
    result = read_result(tmp_path)
    for wins in result.wins.values():
        assert (wins.rate.mean, wins.rate.low, wins.rate.high, wins.ties) == (0.5, 0.5, 0.5, 6)
    assert (result.rewards["captions"].whole.gain.mean, result.rewards["captions"].whole.gain.low) == (0.0, 0.0)
    assert result.sets["vendi"].contrast.gain.mean == 0.0
    assert result.diversity.within.gain.high == 0.0
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()


def test_a_judge_over_http_is_asked_in_both_orders(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """One judge compares brightness, one always says the first, one answers in one order only.

    The first two are asked two of their questions again, which is all they are asked twice and tells that they repeat themselves.
    """
    def brighter(request: dict) -> str:
        first, second = (float(one.float().mean()) for one in pictures(request))
        return "Both images are equally good." if first == second else f"Image {1 if first > second else 2} is better."

    def half(request: dict) -> str:
        return "hm" if brighter(request) == "Image 2 is better." else brighter(request)

    base, model = folders
    means = [[float(load_media(one.file).data.float().mean()) for one in read_index(folder)] for folder in (base, model)]
    wins = sum(b < m for b, m in zip(*means, strict=True))
    shown = [[load_media(one.file).data.numpy().tobytes() for one in read_index(folder)] for folder in (base, model)]
    both_orders = Counter([*zip(*shown, strict=True), *zip(*reversed(shown), strict=True)])
    for name, rule, params, again in (("brighter", brighter, "", 2), ("first", lambda _: "Image 1 is better.", "rechecks: 2, ", 2),
                                      ("half", half, "rechecks: 0, ", 0)):
        with MisbehavingServer([rule]) as server:
            backend = f"{{base_urls: '{server.url}', model: m, retries: 0}}"
            evaluated(model, "--against", base, "--judge",
                      f"{{name: pairwise_judge, params: {{repairs: 0, {params}backend: {backend}}}}}", "--out", tmp_path / name)
        asked = [tuple(one.numpy().tobytes() for one in pictures(request)) for request in server.requests]
        assert Counter(asked[:12]) == both_orders
        assert len(asked[12:]) == again
        assert all(request in server.requests[:12] for request in server.requests[12:])
    found = {name: read_result(tmp_path / name).wins["pairwise_judge"] for name in ("brighter", "first", "half")}
    assert (found["brighter"].wins, found["brighter"].losses) == (wins, 6 - wins)
    assert (found["brighter"].order_agreement, found["brighter"].swap_inconsistency) == (1.0, 0.0)
    assert (found["first"].ties, found["first"].order_agreement, found["first"].swap_inconsistency) == (6, 0.0, 1.0)
    assert (found["brighter"].self_agreement, found["first"].self_agreement, found["half"].self_agreement) == (1.0, 1.0, None)
    assert found["half"].rate is None
    assert found["half"].invalid == {"parse": 6}


def test_unigenbench_from_its_file_to_its_table(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The judge knows the truth, so that every dimension's share is the verifier's mean of that skill."""
    with (tmp_path / "bench.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "prompt_en", "sub_dims_en"])
        for number, text in enumerate(PROMPTS[:3]):
            points = testpoint_prompt(text).metadata["testpoints"]
            writer.writerow([number, text, json.dumps({"Testpoints": [one["dimension"] for one in points],
                                                       "Testpoint Description": [one["description"] for one in points]})])
    base, model = folders
    with MisbehavingServer(["What?", truth]) as server:
        backend = f"{{base_urls: '{server.url}', model: truth, retries: 0, concurrency: 1}}"
        judge = f"{{name: testpoint_judge, params: {{repairs: 0, backend: {backend}}}}}"
        shown = evaluated(model, "--against", base, "--prompts", tmp_path / "bench.csv", "-r", judge, "-r", "captions", "--out",
                          tmp_path / "out")
    result = read_result(tmp_path / "out")
    table = result.dimensions["testpoint_judge"]
    asked = sum(len(testpoint_prompt(text).metadata["testpoints"]) for text in PROMPTS[:3]) * 2
    lost = len(testpoint_prompt(PROMPTS[0]).metadata["testpoints"])
    assert (table.primary.invalid_base, table.primary.invalid_model) == (lost, 0)
    assert table.primary.micro.base.samples == table.detailed.micro.base.samples == asked - lost
    assert list(table.primary.rows) == ["Attribute"]
    assert re.search(r"^  Quantity +\d", shown.output, re.MULTILINE)
    for name, row in table.detailed.rows.items():
        rows = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()][1:]  # the first is invalid
        skill = f"captions/{DIMENSIONS[name]}"
        assert row.model.mean == pytest.approx(sum(one["model"]["scores"][skill] for one in rows) / len(rows))
    assert "points that could not be judged: 3 of base, 0 of model" in one_line(shown.output)
    assert "macro, mean of 1 dimensions" in shown.output
    assert "defines no overall score" in one_line(shown.output)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "testpoint_judge: points fulfilled by dimension" in page
    assert "micro: all points" in page


def test_geneval_prompts_give_a_table_by_tag(run: Path, tmp_path: Path) -> None:
    shown = evaluated(run, "--prompts", "playground:geneval", "--seeds", "0", "-r", "captions", "--by", "tag", "--out", tmp_path)
    table = read_result(tmp_path).by["tag"]
    assert list(table["captions/strict"].rows) == ["colors", "counting", "color_attr", "position"]
    assert "captions/relation" not in table                        # only positions have it, so tags cannot be compared by it
    rows = table["captions/strict"].rows.values()
    assert table["captions/strict"].macro.base.mean == pytest.approx(sum(row.base.mean for row in rows) / 4)
    assert "macro, mean over tags" in shown.output


def test_a_detectors_table_is_called_geneval_like_and_tells_both_verdicts(run: Path, tmp_path: Path) -> None:
    """The detector finds two squares everywhere: correct where one is asked for, strictly right where two are."""
    detector = make(tmp_path / "detector", labels=("circle", "square", "triangle"))
    rows = [{"tag": "single_object", "include": [{"class": "square", "count": 1}], "prompt": "a blue square"},
            {"tag": "counting", "include": [{"class": "square", "count": 2}], "exclude": [{"class": "square", "count": 3}],
             "prompt": "two blue squares"}]
    (tmp_path / "geneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    objects = f"{{name: objects, params: {{detector: {detector}, clip: playground:clip, clip_pretrained: null, device: cpu}}}}"
    shown = evaluated(run, "--prompts", tmp_path / "geneval.jsonl", "--seeds", "0", "-r", objects, "--by", "tag", "--out", tmp_path / "out")
    table = read_result(tmp_path / "out").by["tag"]
    assert {tag: row.model.mean for tag, row in table["objects/correct"].rows.items()} == {"single_object": 1.0, "counting": 1.0}
    assert {tag: row.model.mean for tag, row in table["objects/strict"].rows.items()} == {"single_object": 0.0, "counting": 1.0}
    assert table["objects/strict"].macro.model.mean == 0.5
    assert "'objects' is GenEval-like: its detector" in one_line(shown.output)
    assert "GenEval-like" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(("words", "status", "needle"), [
    (("playground:pipeline", "-p", "a", *JPEG), 1, "has no base of its own; compare it --against BASE"),
    (("RUN", "-p", "a red circle", "-r", "{name: bradley_terry, params: {pointwise: {reward: captions}}}"), 1,
     "'bradley_terry' compares pairs; name it with --judge"),
    (("RUN", "-p", "a red circle", "--judge", "captions"), 1, "--judge 'captions' scores samples and compares nothing; name it with -r"),
    (("RUN", "-p", "a cat"), 1, "reward 'captions', prompt 0: caption 'a cat' is not in the playground's grammar"),
    (("RUN", "--num-prompts", "9"), 1, "--num-prompts 9, but there are 4 prompts"),
    (("RUN", "-p", "a red circle", *JPEG, "num_inference_step=2"), 2, "did you mean 'num_inference_steps'"),
    (("RUN", "-p", "a red circle", *JPEG, "--by", "tag"), 1, "no prompt has 'tag' in its metadata (there is: nothing)"),
    (("RUN", "-p", "a red circle", *JPEG, "--encoder", "nowhere:encode"), 1, "encoder 'nowhere:encode' cannot be imported"),
    (("RUN", "-p", "a red circle", *JPEG, "--out", "RUN"), 1, "is a run's folder, whose own evaluation.json and report.html would be lost"),
    (("SAMPLES", *JPEG), 1, "has no base of its own"),
    (("SAMPLES", "--against", "SAMPLES"), 1, "which rewards?"),
    (("SAMPLES", "--against", "SAMPLES", *JPEG, "height=32"), 1, "nothing is drawn: leave out height=32"),
    (("SAMPLES", "--against", "SAMPLES", *JPEG, "-p", "a dog"), 1, "has no sample of the prompt 'a dog'"),
    (("SAMPLES", "--against", "SAMPLES", *JPEG, "--seeds", "5"), 1, "has no samples with seeds 5"),
    (("SAMPLES", "--against", "SAMPLES", *JPEG, "--num-prompts", "2"), 1, "--num-prompts takes the first of --prompts"),
    (("SAMPLES", "--against", "EMPTY", *JPEG), 1, "has no samples.jsonl, which visalign sample writes")])
def test_mistakes_are_explained(words: tuple[str, ...], status: int, needle: str, run: Path, folders: tuple[Path, Path],
                                tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    names = {"RUN": run, "SAMPLES": folders[0], "EMPTY": tmp_path / "empty"}
    result = visalign("eval", "--out", tmp_path / "out", *(names.get(word, word) for word in words))
    assert result.exit_code == status, result.output + result.stderr
    assert needle in one_line(result.stderr)
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("out/**/*.png"))  # nothing was drawn for it
