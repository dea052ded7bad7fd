"""The command line as a user meets it: help that teaches, tables, files, and errors without tracebacks."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from visalign.cli import app
from visalign.commands import pipelines
from visalign.commands.pipelines import call_arguments, choose_device, load_pipeline, output_media
from visalign.commands.plan import memory, read_headers
from visalign.commands.sample import parse_seeds
from visalign.config import load_config, recipe_names, resolve_path
from visalign.evaluation import Evaluation, write_comparison
from visalign.media import read_index, save_media, save_samples
from visalign.quickstart import GUIDED, ROWS
from visalign.quickstart import table as quickstart_table
from visalign.types import Media, Prompt

COMMANDS = ("train", "sample", "score", "eval", "pairs", "rewards", "reward-train", "inspect", "report", "env", "configs", "quickstart",
            "exemplars")


def visalign(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_help_lists_every_command_and_where_to_start() -> None:
    text = visalign("--help").output
    assert all(re.search(rf"\b{command}\b", text) for command in COMMANDS)
    assert "visalign quickstart" in text


@pytest.mark.parametrize("command", ["train", "sample", "score", "eval", "rewards", "reward-train", "inspect", "configs", "quickstart",
                                     "exemplars"])
def test_help_of_each_command_has_an_example_that_could_be_typed(command: str) -> None:
    result = visalign(command, "--help")
    assert result.exit_code == 0
    assert f"visalign {command}" in result.output.split("Example")[1]


def test_configs_lists_recipes_with_their_verification_and_prints_one() -> None:
    listed = visalign("configs").output
    assert all(name in listed for name in recipe_names())
    assert "verified on" in listed
    narrow = CliRunner().invoke(app, ["configs"], env={"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}).output
    assert all(name in narrow for name in recipe_names())
    printed = visalign("configs", "sdxl_ddpo")
    assert "# DDPO on Stable Diffusion XL" in printed.output
    assert "verified_by: " in printed.output


def test_env_is_ready_to_paste() -> None:
    text = visalign("env").output
    assert "kernel cache" in text
    assert re.search(rf"^torch +{re.escape(torch.__version__.split('+')[0])}", text, re.M)
    assert re.search(r"^cpu +\d+ cores", text, re.M)


@pytest.mark.parametrize(("words", "status", "needle"), [
    (("train",), 1, "which configuration?"),
    (("train", "nope"), 2, "no such recipe"),
    (("train", "sd35_flow_grpo", "train.group=3", "rewards.0.wight=1"), 2, "did you mean 'weight'"),
    (("train", "sd35_flow_grpo", "--train.groups=3"), 2, "No such option"),
    (("train", "--resume", "nowhere"), 1, "no config.yaml"),
    (("train", "sd35_flow_grpo", "sampler.dynamics={name: flow_sde, nose: 1}", "--plan"), 1, "it takes noise, guard"),
    (("sample", "nowhere"), 1, "nothing to draw"),
    (("sample", "./nowhere", "-p", "a cat"), 1, "not a diffusers pipeline"),
    (("sample", "x", "-p", "a cat", "--seeds", "3-1"), 1, "both ends included"),
    (("score", "nowhere", "-r", "jpeg_compressibility"), 1, "no such folder"),
    (("score", "nowhere"), 1, "which rewards?"),
    (("score", "nowhere", "-r", "{name: clip, parms: 1}"), 2, "did you mean 'params'"),
    (("inspect", "./nowhere"), 1, "no model_index.json in"),
    (("inspect", "playground:pipeline", "num_inference_step=4"), 2, "did you mean 'num_inference_steps'"),
    (("inspect", "playground:pipeline", "--device", "gpu"), 1, "--device 'gpu': use cpu, cuda, cuda:N or auto"),
    (("train", "quickstart", "model.device=gpu", "--out", "nowhere"), 1, "model.device 'gpu': use cpu"),
    (("report", "nowhere"), 1, "no config.yaml"),
    (("configs", "quickstar"), 2, "did you mean 'quickstart'"),
])
def test_errors_are_one_message_with_a_status_and_no_traceback(words: tuple[str, ...], status: int, needle: str) -> None:
    result = visalign(*words)
    assert result.exit_code == status
    assert needle in one_line(result.output + result.stderr)
    assert "Traceback" not in result.output + result.stderr


@pytest.mark.parametrize(("word", "status", "needle"), [
    ("num_inference_step=4", 2, "did you mean 'num_inference_steps'"),
    ("zzz=4", 2, "it takes prompt, "),
    ("num_inference_steps=abc", 1, "StableDiffusion3Pipeline cannot be called with num_inference_steps='abc'"),
])
def test_a_mistake_in_the_call_is_explained(word: str, status: int, needle: str, tmp_path: Path) -> None:
    result = visalign("sample", "playground:pipeline", "-p", "a cat", word, "--out", tmp_path)
    assert result.exit_code == status
    assert needle in one_line(result.stderr)


def test_devices_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match="sees no GPU"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="sees 2 GPUs"):
        choose_device("cuda:2")


def test_an_unreachable_model_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Cannot load model. Please refer to the stack trace")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", offline)
    monkeypatch.setattr(pipelines, "model_folder", lambda _: None)
    with pytest.raises(ValueError, match="'org/name' is not on disk and could not be fetched") as caught:
        load_pipeline("org/name", "float32", "cpu")
    assert "stack trace" not in str(caught.value)


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_damaged_weights_are_named(component: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve_path("playground:pipeline"), tmp_path / "m"))
    weights = next((folder / component).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(ValueError, match=re.escape(f"weights file {weights} is damaged")):
        load_pipeline(str(folder), "float32", "cpu")


@pytest.mark.parametrize(("command", "resumes"), [("train", True), ("quickstart", True), ("env", False)])
def test_stopping_names_resume_only_where_there_is_a_run(command: str, resumes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for target in ("visalign.commands.train.run", "visalign.quickstart.run", "visalign.versions.describe"):
        monkeypatch.setattr(target, stop)
    result = visalign(command)
    assert result.exit_code == 130
    assert "stopped." in result.stderr
    assert ("train --resume" in result.stderr) is resumes


def test_samples_made_before_an_interruption_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def third_stops(_: object, prompt: Prompt, seed: int, __: object) -> Media:
        if seed == 2:
            raise KeyboardInterrupt
        return Media("image", torch.full((3, 4, 4), seed, dtype=torch.uint8))

    monkeypatch.setattr("visalign.commands.models.call_pipeline", third_stops)
    result = visalign("sample", "playground:pipeline", "-p", "a cat", "--seeds", "0-3", "--out", tmp_path / "s")
    assert result.exit_code == 130
    assert "2 of 4 samples" in result.stderr
    assert [(one.file.name, one.seed) for one in read_index(tmp_path / "s")] == [("0000.png", 0), ("0001.png", 1)]
    assert all(one.file.is_file() for one in read_index(tmp_path / "s"))


def test_both_mistakes_of_a_command_line_are_reported() -> None:
    text = visalign("train", "sd35_flow_grpo", "train.group=3", "rewards.0.wight=1").stderr
    assert "train.group: unknown key; did you mean 'groups'?" in text
    assert "rewards.0.wight: unknown key; did you mean 'weight'?" in text


def test_debug_keeps_the_exception() -> None:
    result = visalign("--debug", "train")
    assert isinstance(result.exception, ValueError)


def test_a_used_folder_is_never_mixed_with_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("x")
    result = visalign("train", "sd35_flow_grpo", "--out", tmp_path)
    assert result.exit_code == 1
    assert f"--resume {tmp_path}" in one_line(result.stderr)


def test_several_processes_must_agree_on_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = visalign("train", "sd35_flow_grpo")
    assert result.exit_code == 1
    assert "give --out" in result.stderr


def fake_model(folder: Path) -> Path:
    """A pipeline folder with headers and configurations only: what a plan may look at."""
    for name, tensors in {"transformer": {"blocks.0.attn.to_q.weight": (8, 4), "blocks.0.attn.to_out.0.weight": (4, 8),
                                          "blocks.0.norm.weight": (4,)}, "vae": {"conv.weight": (10,)}}.items():
        (folder / name).mkdir(parents=True)
        save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, folder / name / "model.safetensors")
    (folder / "transformer" / "config.json").write_text(json.dumps(
        {"num_attention_heads": 2, "attention_head_dim": 3, "num_layers": 5, "patch_size": 2, "sample_size": 16, "in_channels": 16}))
    (folder / "vae" / "config.json").write_text(json.dumps({"latent_channels": 16, "block_out_channels": [1, 1, 1, 1]}))
    return folder


def test_plan_counts_the_work_and_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    text = one_line(visalign("train", "sd35_flow_grpo", f"model.path={fake_model(tmp_path / 'm')}", "--plan").output)
    assert "samples per iteration │ 1152" in text
    assert "10, of which 9 stochastic and trained" in text
    assert "11520 per iteration" in text                       # 1152 samples x 10 steps
    assert "20736 per iteration, 10368 of them with" in text    # policy and reference, 1152 x 9 each
    assert "per process" in text


def test_planned_memory_follows_headers_and_arithmetic(tmp_path: Path) -> None:
    folder = fake_model(tmp_path / "m")
    config = load_config("sd35_flow_grpo", [f"model.path={folder}", "trainable.rank=2", "model.dtype=float32"])
    assert read_headers(folder / "transformer").num_params == 68
    rows = dict(memory(config, folder, world=1))
    assert rows["training state"].startswith("0.0 MiB (4.8e-05M trained")    # (8 + 4) x 2 for each of two layers
    shape, stored = (16, 64, 64), 1152 * 16 * 64 * 64 * (2 * 9 * 4 + 4 * 10)
    assert rows["trajectories"] == f"{stored / 2**30:.2f} GiB (1152 samples x 9 steps of {' x '.join(map(str, shape))})"


def test_score_writes_a_table_and_a_row_per_sample(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    media = [Media("image", torch.randint(0, 256, (3, 16, 16), generator=generator, dtype=torch.uint8)) for _ in range(4)]
    save_samples(tmp_path, media, [Prompt("a"), Prompt("a"), Prompt("b"), Prompt("b")], range(4))
    (tmp_path / "mine.py").write_text("def brightness(media, prompts):\n"
                                      "    values = [float(one.data.float().mean()) for one in media]\n"
                                      "    return [None if p.text == 'b' else value for value, p in zip(values, prompts)]\n")
    result = visalign("score", tmp_path, "-r", "jpeg_compressibility", "-r", f"{tmp_path}/mine.py:brightness")
    assert result.exit_code == 0, result.output
    assert "4 samples of 2 prompts" in result.output
    assert re.search(r"brightness .* 2/4", result.output)
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert rows[0]["brightness"]["raw"] == pytest.approx(float(media[0].data.float().mean()))
    assert "invalid" in rows[2]["brightness"]


def test_score_refuses_prompts_and_pictures_by_the_rewards_name(tmp_path: Path) -> None:
    wide = Media("image", torch.zeros(3, 8, 12, dtype=torch.uint8))
    save_samples(tmp_path, [wide, wide], [Prompt("a red circle"), Prompt("a dream")], [0, 1])
    (tmp_path / "picky.py").write_text("from visalign.rewards.function import FunctionReward\n"
                                       "class Picky(FunctionReward):\n"
                                       "    def __init__(self):\n"
                                       "        super().__init__(lambda media, prompts: [1.0] * len(media), name='picky')\n"
                                       "    def check_prompts(self, prompts):\n"
                                       "        raise ValueError(f'picky, prompt {len(prompts) - 1}: no dreams')\n")
    refused = visalign("score", tmp_path, "-r", f"{tmp_path}/picky.py:Picky")
    assert refused.exit_code == 1
    assert "picky, prompt 1: no dreams" in one_line(refused.stderr)
    save_samples(tmp_path, [wide], [Prompt("a red circle")], [0])
    refused = visalign("score", tmp_path, "-r", "captions")
    assert refused.exit_code == 1
    assert "while reward 'captions' scored 1 samples" in one_line(refused.stderr)
    unmade = visalign("score", tmp_path, "-r", "{name: jpeg_compressibility, params: {quality: 200}}")
    assert "while reward 'jpeg_compressibility' was made" in one_line(unmade.stderr)


def test_a_reward_of_sets_has_one_number_for_the_folder_and_none_for_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=generator, dtype=torch.uint8)
    for k, image in enumerate(images):
        save_media(Media("image", image), tmp_path / f"{k}")
    (tmp_path / "colour_of_sets.py").write_text(
        "import torch\nfrom visalign.protocols import RewardSpec\n"
        "def mean_colour(media):\n    return torch.stack([one.data.double().mean(dim=(1, 2)) for one in media])\n"
        "class CreditAlone:\n"
        "    spec = RewardSpec(name='alone', arity='set')\n"
        "    def features(self, media, prompts):\n        return mean_colour(media)\n"
        "    def credit(self, features, group_id):\n        return features[:, 0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    vendi = "{name: vendi, params: {encoder: 'colour_of_sets:mean_colour'}}"
    result = visalign("score", tmp_path, "-r", vendi)
    assert result.exit_code == 0, result.stderr
    unit = torch.nn.functional.normalize(images.double().mean(dim=(2, 3)), dim=1)
    share = torch.linalg.eigvalsh(unit @ unit.T / 4).clamp(min=1e-300)
    expected = f"{float(torch.exp(-(share * share.log()).sum())):.4g}"
    assert re.search(rf"vendi\W+{re.escape(expected)}\W+of the whole set\W+4/4", one_line(result.output))
    assert not (tmp_path / "scores.jsonl").exists()
    assert visalign("score", tmp_path, "-r", vendi, "-r", "jpeg_compressibility").exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row.keys() for row in rows] == [{"file", "prompt", "seed", "jpeg_compressibility"}] * 4
    alone = visalign("score", tmp_path, "-r", "colour_of_sets:CreditAlone", "--out", tmp_path / "alone.jsonl")
    assert alone.exit_code == 1
    assert "judges whole sets" in one_line(alone.stderr)
    assert not (tmp_path / "alone.jsonl").exists()


def test_score_says_where_prompts_can_come_from(tmp_path: Path) -> None:
    save_media(Media("image", torch.zeros(3, 32, 32, dtype=torch.uint8)), tmp_path / "a")
    refused = visalign("score", tmp_path, "-r", "captions")
    assert refused.exit_code == 1
    assert "captions reads prompts" in one_line(refused.stderr)
    assert "--prompts FILE" in one_line(refused.stderr)
    (tmp_path / "a.txt").write_text("a red circle")
    assert visalign("score", tmp_path, "-r", "captions").exit_code == 0


def test_scores_of_other_rewards_are_not_lost_and_out_may_be_in_a_new_folder(tmp_path: Path) -> None:
    save_samples(tmp_path, [Media("image", torch.zeros(3, 8, 8, dtype=torch.uint8))], [Prompt("a")], [0])
    (tmp_path / "mine.py").write_text("def one(media, prompts):\n    return [1.0 for _ in media]\n")
    jpeg, mine = ("-r", "jpeg_compressibility"), ("-r", f"{tmp_path}/mine.py:one")
    assert [visalign("score", tmp_path, *jpeg).exit_code for _ in range(2)] == [0, 0]
    refused = visalign("score", tmp_path, *mine)
    assert refused.exit_code == 1
    assert "scores of jpeg_compressibility" in refused.stderr
    assert visalign("score", tmp_path, *jpeg, *mine).exit_code == 0
    assert visalign("score", tmp_path, *mine, "--out", tmp_path / "new" / "mine.jsonl").exit_code == 0
    assert (tmp_path / "new" / "mine.jsonl").is_file()


def test_score_matches_files_and_prompts_or_refuses(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_media(Media("image", torch.zeros(3, 8, 8, dtype=torch.uint8)), tmp_path / name)
    (tmp_path / "three.txt").write_text("1\n2\n3\n")
    result = visalign("score", tmp_path, "-r", "jpeg_compressibility", "--prompts", tmp_path / "three.txt")
    assert result.exit_code == 1
    assert "2 files" in result.stderr
    (tmp_path / "a.txt").write_text("a caption")
    assert "have no caption" in visalign("score", tmp_path, "-r", "jpeg_compressibility").stderr


def test_seeds_and_call_arguments() -> None:
    assert parse_seeds("0-3") == [0, 1, 2, 3]
    assert parse_seeds("7,1-2") == [7, 1, 2]
    assert call_arguments(["guidance_scale=3e0", "negative_prompt=blurry", "output_size=[1, 2]"]) == {
        "guidance_scale": 3.0, "negative_prompt": "blurry", "output_size": [1, 2]}
    with pytest.raises(ValueError, match="flat"):
        call_arguments(["a.b=1"])


def test_pipeline_outputs_become_media() -> None:
    class Output:
        pass

    video, audio = Output(), Output()
    video.frames = [[torch.full((4, 6, 3), 0.5).numpy()] * 5]  # type: ignore[attr-defined]
    audio.audios = [torch.linspace(-1, 1, 10).repeat(2, 1)]    # type: ignore[attr-defined]
    assert output_media(video, rate=8).data.shape == (5, 3, 4, 6)
    assert int(output_media(video, rate=8).data.max()) == 128
    assert output_media(audio, rate=16000).data.shape == (2, 10)
    with pytest.raises(ValueError, match="without images, frames or audios"):
        output_media(Output())


def test_the_quick_starts_table_fits_a_terminal_of_80_columns(tmp_path: Path) -> None:
    before = {name: torch.rand(256, generator=torch.Generator().manual_seed(0)).double() for name in ROWS}
    write_comparison(tmp_path / "evaluation.json", Evaluation(before, tuple(range(256))),
                     Evaluation({name: values - 0.25 for name, values in before.items()}, tuple(range(256))))
    Evaluation(before, tuple(range(256))).write(tmp_path / "evaluations" / f"{GUIDED}.json")
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(quickstart_table(tmp_path))
    text = console.export_text()
    assert "…" not in text
    assert all(title.strip() in text for title in ROWS.values())
    assert re.search(r"gold mean +0\.\d{3} \[\.\d\d, \.\d\d\] +0\.\d{3} \[\.\d\d, \.\d\d\] +-0\.250 \[-\.25, -\.25\] +0\.\d{3}", text)
