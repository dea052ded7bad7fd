"""Commands about rewards: what samples are worth, and what is learned from that. Their work is in ``visalign/commands``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visalign.cli_app import CallArguments, Overrides, app


@app.command(epilog="Examples:\n\n"
             "  visalign score samples/base -r captions -r '{name: clip, params: {model: playground:clip}}'\n\n"
             "  visalign score photos --prompts captions.txt -r '{name: clip, params: {model: ViT-L-14, pretrained: openai}}'\n\n"
             "  visalign score samples -r my_rewards.py:sharpness       your own function f(media, prompts)")
def score(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Media; with samples.jsonl their prompts are known.")],
    reward: Annotated[list[str] | None, typer.Option("--reward", "-r", help="A name, a path, or {name: ..., params: {...}}.")] = None,
    config: Annotated[str | None, typer.Option("--config", metavar="CONFIG", help="Take rewards and guards from a configuration.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", metavar="SOURCE", help="One prompt per file, in file-name order.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help=
        "Per-sample scores; replaced if it exists. Default FOLDER/scores.jsonl, replaced only by scores of the same rewards.")] = None,
) -> None:
    """Score a folder of media with any rewards: a table, and one row per sample."""
    from visalign.commands import score as command

    command.run(folder, list(reward or []), config=config, source=prompts, out=out)


@app.command(name="eval", epilog="Examples:\n\n"
             "  visalign eval runs/first                               against its own base, by its rewards and guards\n\n"
             "  visalign eval samples/theirs --against samples/ours -r clip        folders that visalign sample made\n\n"
             "  visalign eval runs/first --prompts prompts.txt --judge '{name: pairwise_judge, params: {backend: ...}}'\n\n"
             "  visalign eval runs/first --prompts test_prompts_en.csv -r '{name: testpoint_judge, params: {backend: ...}}'\n\n"
             "  visalign eval runs/first --prompts geneval.jsonl -r '{name: objects, params: {detector: ...}}' --by tag\n\n"
             "The last two are UniGenBench and a GenEval-like table. The same command continues what was stopped: no sample is drawn "
             "again.")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run's folder, a diffusers folder, a hub id, or a folder of samples.")],
    call: CallArguments = None,
    against: Annotated[str | None, typer.Option("--against", metavar="BASE", help=
        "The same kinds of things; default: MODEL without its adapter.", show_default=False)] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="MODEL's adapter folder; a run has its own.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeat for several.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", metavar="SOURCE", help=
        "A .txt, .jsonl (GenEval's too) or UniGenBench's .csv file, playground:heldout. Default: the run's, or the samples'.")] = None,
    num_prompts: Annotated[int | None, typer.Option("--num-prompts", help="The first of them.", show_default=False)] = None,
    reward: Annotated[list[str] | None, typer.Option("--reward", "-r", help=
        "A name, a path, or {name: ..., params: {...}}. Default: the run's rewards and guards.")] = None,
    judge: Annotated[list[str] | None, typer.Option("--judge", metavar="PAIRWISE", help=
        "Compares model and base in both orders, e.g. pairwise_judge.")] = None,
    config: Annotated[str | None, typer.Option("--config", metavar="CONFIG", help="Take rewards and guards from a configuration.")] = None,
    encoder: Annotated[str | None, typer.Option("--encoder", metavar="ENCODER", help=
        "What diversity is measured in, as in visalign exemplars. Default: the first clip among the rewards, or pixels.",
        show_default=False)] = None,
    by: Annotated[list[str] | None, typer.Option("--by", metavar="KEY", help="A table by this metadata key of prompts, e.g. tag.")] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="For every prompt: 0-3 or 1,5,9. Default: 0-3, or those of the samples.",
                                              show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the run's, or float32.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or auto.")] = "auto",
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help=
        "Where samples and results go. Default: within the run's folder, or evaluation.", show_default=False)] = None,
) -> None:
    """Compare a model with a base on the same prompts and seeds: gains, win rates, diversity, distances, with intervals."""
    from visalign.commands import evaluate as command

    command.run(model, list(call or []), against=against, adapter=adapter, texts=list(prompt or []), source=prompts,
                num_prompts=num_prompts, rewards=list(reward or []), judges=list(judge or []), config=config, encoder=encoder,
                by=list(by or []), seeds=seeds, dtype=dtype, device=device, out=out)


@app.command("serve-reward", epilog="Examples:\n\n"
             "  visalign serve-reward -r '{name: clip, params: {model: ViT-L-14, pretrained: openai}}'\n\n"
             "  visalign serve-reward server.yaml --host 0.0.0.0 --token-env REWARD_TOKEN\n\n"
             "  visalign serve-reward -r visalign.rewards.scorers.hpsv3:HPSv3      in an environment of its own, see docs/scorers.md\n\n"
             "A run asks it with:  {name: remote, params: {urls: 'http://HOST:8765', scorer: clip}}")
def serve_reward(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", show_default=False, help=
        "A YAML file with rewards: as in a run, and server: with the options below.")] = None,
    reward: Annotated[list[str] | None, typer.Option("--reward", "-r", help="A name, a path, or {name: ..., params: {...}}.")] = None,
    host: Annotated[str | None, typer.Option("--host", help="Default 127.0.0.1, this machine alone.")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Default 8765; 0 takes a free one.")] = None,
    token_env: Annotated[str | None, typer.Option("--token-env", metavar="NAME", help=
        "Environment variable with the token that requests must bring.")] = None,
    max_batch: Annotated[int | None, typer.Option("--max-batch", help="Samples of one call of a reward; default 32.")] = None,
    max_samples: Annotated[int | None, typer.Option("--max-samples", help="Samples of one request; default 256.")] = None,
    max_mb: Annotated[float | None, typer.Option("--max-mb", help="Mebibytes of one request; default 256.")] = None,
    max_wait_ms: Annotated[float | None, typer.Option("--max-wait-ms", help="How long a call waits for more samples; default 5.")] = None,
    max_waiting: Annotated[int | None, typer.Option("--max-waiting", help="Samples that may wait; default 1024.")] = None,
    queue_timeout: Annotated[float | None, typer.Option("--queue-timeout", help="Seconds a sample may wait; default 60.")] = None,
) -> None:
    """Serve any rewards over HTTP, for runs on other machines or in other environments."""
    from visalign.commands import serve as command

    options = {"host": host, "port": port, "token_env": token_env, "max_batch": max_batch, "max_samples": max_samples, "max_mb": max_mb,
               "max_wait_ms": max_wait_ms, "max_waiting": max_waiting, "queue_timeout": queue_timeout}
    command.run(config, list(reward or []), {name: value for name, value in options.items() if value is not None})


@app.command(epilog="Examples:\n\n"
             "  visalign rewards                         all names, with what each reads\n\n"
             "  visalign rewards pickscore               formula, range, licence, parameters\n\n"
             "  visalign rewards my_rewards.py:sharpness")
def rewards(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False, help="Describe one, by name or path.")] = None,
) -> None:
    """List rewards, or describe one; nothing is downloaded."""
    from visalign.commands import rewards as command

    command.run(name)


@app.command(epilog="Examples:\n\n"
             "  visalign pairs playground:pipeline --prompts playground:train -r captions --out pairs num_inference_steps=8\n\n"
             "  visalign pairs runs/first --prompts prompts.jsonl -r clip --rule all --margin 0.1 --per-prompt 4 --out pairs\n\n"
             "The same command continues what was stopped; with another --rule or --margin it chooses anew from the same samples.")
def pairs(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers folder, a hub id, playground:pipeline, or a run's folder.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The data set's folder.")],
    call: CallArguments = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="A run's adapter folder.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeat for several.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", metavar="SOURCE", help="A .txt or .jsonl file, playground:train.")] = None,
    reward: Annotated[list[str] | None, typer.Option("--reward", "-r", help=
        "A name, a path, or {name: ..., weight: ..., params: {...}}; several are summed with their weights.")] = None,
    group_size: Annotated[int, typer.Option("--group-size", help="Samples per prompt.")] = 8,
    rule: Annotated[str, typer.Option("--rule", help=
        "best_worst, random, all, rso (rejection sampling, then all), or list: whole groups with their scores.")] = "best_worst",
    margin: Annotated[float, typer.Option("--margin", help="The reward gap of a pair must be larger.")] = 0.0,
    per_prompt: Annotated[int | None, typer.Option("--per-prompt", help="Most pairs per prompt.", show_default=False)] = None,
    agree: Annotated[str, typer.Option("--agree", help="With several rewards: combined, majority or unanimous.")] = "combined",
    temperature: Annotated[float, typer.Option("--temperature", help="Of rule rso; towards 0 it takes the best.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the samples and of rules that draw.")] = 0,
    batch: Annotated[int, typer.Option("--batch", help="Samples per denoiser call.")] = 8,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the run's, or float32.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or auto.")] = "auto",
) -> None:
    """Make a preference data set: draw groups, score them, keep pairs with their media, latents and margins."""
    from visalign.commands import pairs as command

    wanted = command.Wanted(rule=rule, margin=margin, per_prompt=per_prompt, agreement=agree,  # type: ignore[arg-type]
                            temperature=temperature)
    command.run(model, list(call or []), adapter=adapter, texts=list(prompt or []), source=prompts, rewards=list(reward or []),
                group_size=group_size, wanted=wanted, seed=seed, batch=batch, dtype=dtype, device=device, out=out)


@app.command(epilog="Examples:\n\n"
             "  visalign exemplars pictures/good --encoder '{reward: clip, model: playground:clip}' --out good.safetensors\n\n"
             "  visalign exemplars music --encoder '{reward: clap, model: laion/larger_clap_music}' --out music.safetensors\n\n"
             "  visalign exemplars clips --encoder '{encoder: hf, path: dinov2, pooling: cls, video_frames: 8}' --out clips.safetensors\n\n"
             "A recipe names the file: {name: kad, params: {encoder: ..., reference: music.safetensors}}; encoders are listed in "
             "visalign.rewards.encoders.")
def exemplars(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Media to resemble.")],
    encoder: Annotated[str, typer.Option("--encoder", metavar="ENCODER", help=
        "{reward: clip, ...}, {reward: clap, ...}, {encoder: hf, ...}, {encoder: hf_audio, ...}, {encoder: inception, ...}, or "
        "package.module:function.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The statistics, .safetensors; replaced if it exists.")],
    unit: Annotated[str, typer.Option("--unit", help=
        "sample for rewards of sets; frame for exemplar_distance on video and sound, whose frames or windows are compared.")] = "sample",
    features: Annotated[int, typer.Option("--features", help=
        "Most features to keep for kernel distances, drawn at random; 0 keeps mean and covariance alone.")] = 5000,
    seed: Annotated[int, typer.Option("--seed", help="Of that draw.")] = 0,
    modality: Annotated[list[str] | None, typer.Option("--modality", help="Kinds of media that a function reads, default image.")] = None,
    batch: Annotated[int, typer.Option("--batch", help="Media in memory at once.")] = 64,
) -> None:
    """Freeze what good media look like to an encoder: the reference of Fréchet and kernel distances."""
    from visalign.commands import exemplars as command

    command.run(folder, encoder, out=out, unit=unit, num_features=features, seed=seed, modality=modality, batch=batch)


@app.command(name="reward-train", epilog="Examples:\n\n"
             "  visalign reward-train reward_embedded_clip --out runs/reward data.path=runs/pairs\n\n"
             "  visalign reward-train my_reward.yaml noise=posterior ensemble.members=4 --out runs/reward\n\n"
             "Then in any recipe: rewards: [{name: trained, params: {path: runs/reward}}]")
def reward_train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A recipe's name (visalign configs) or a YAML file with kind: reward.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The trained reward's folder; it appears when it is whole.")],
    overrides: Overrides = None,
) -> None:
    """Train a reward from preferences; afterwards it is the reward `trained` of any recipe."""
    from visalign.commands import reward_train as command

    command.run(config, list(overrides or []), out=out)
