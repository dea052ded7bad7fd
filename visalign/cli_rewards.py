"""Commands about rewards: what samples are worth, and what is learned from that. Their work is in ``visalign/commands``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visalign.cli_app import CallArguments, app


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
