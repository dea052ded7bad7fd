"""Commands about pipelines and runs. Their work is in ``visalign/commands``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visalign.cli_app import CallArguments, Overrides, app


@app.command(epilog="Examples:\n\n"
             "  visalign train sd35_flow_grpo --plan                        what it would do and need, nothing is loaded\n\n"
             "  visalign train my.yaml train.groups=16 --out runs/first     run it\n\n"
             "  visalign train --resume runs/first                          continue it, exactly where it stopped\n\n"
             "  torchrun --nproc_per_node 8 -m visalign train my.yaml --out runs/first     on several GPUs")
def train(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", show_default=False,
                                                 help="A YAML file, or a recipe's name (visalign configs).")] = None,
    overrides: Overrides = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show batch geometry, forwards and estimated memory; load no weights.")] = False,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Continue the run in this folder.")] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run's folder; default runs/NAME-DATE.")] = None,
) -> None:
    """Align a pipeline with rewards; leaves a run folder with an adapter and a report."""
    from visalign.commands import train as command

    command.run(config, list(overrides or []), plan=plan, resume=resume, out=out)


@app.command(epilog="Examples:\n\n"
             "  visalign sample playground:pipeline -p 'a red circle' --out samples/base\n\n"
             "  visalign sample runs/first -p 'a red circle' --seeds 0-7          the run's model with its adapter\n\n"
             "  visalign sample org/model --adapter runs/first/adapter --prompts prompts.txt num_inference_steps=28\n\n"
             "  visalign sample org/model --negative runs/npo/adapter -p 'a red circle' guidance_scale=5\n\n"
             "  visalign sample playground:pipeline -p 'a red circle' --guide '{name: clip, params: {model: playground:clip}}=100'")
def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers folder, a hub id, playground:pipeline, or a run's folder.")],
    call: CallArguments = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", "--positive", metavar="DIR", help="A run's adapter folder.")] = None,
    negative: Annotated[Path | None, typer.Option("--negative", metavar="DIR", help=
        "An adapter trained on reversed preferences (Diffusion-NPO): it makes the predictions that guidance subtracts.")] = None,
    merge_alpha: Annotated[float | None, typer.Option("--merge-alpha", help=
        "How much of --adapter the negative weights hold, 0 to 1; default 1.")] = None,
    merge_beta: Annotated[float | None, typer.Option("--merge-beta", help=
        "How much of --negative the negative weights hold, 0 to 1; default 1.")] = None,
    guide: Annotated[list[str] | None, typer.Option("--guide", metavar="REWARD=WEIGHT", help=
        "Follow the gradient of a differentiable reward, or of a reward head's .safetensors file, while sampling; repeat for several. "
        "The weight is in nats per unit of reward.")] = None,
    guide_max_ratio: Annotated[float | None, typer.Option("--guide-max-ratio", help=
        "Cap of sigma / alpha, by which a gradient is multiplied; default 4.")] = None,
    guide_skip: Annotated[int | None, typer.Option("--guide-skip", help="First steps without --guide.")] = None,
    guide_through_denoiser: Annotated[bool, typer.Option("--guide-through-denoiser", help=
        "Differentiate the denoiser too: slower and exact in more cases.")] = False,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeat for several.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", metavar="SOURCE", help="A .txt or .jsonl file, playground:heldout.")] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="For every prompt: 0-3 or 1,5,9.")] = "0",
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; default: the run's, or float32.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or auto.")] = "auto",
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the samples go.")] = Path("samples"),
) -> None:
    """Generate with a pipeline and, if given, a trained adapter: PNG, MP4 or WAV files and their index."""
    from visalign.commands import sample as command
    from visalign.commands.guided import GuidanceOptions

    guidance = GuidanceOptions(rewards=tuple(guide or ()), negative=negative, merge_alpha=merge_alpha, merge_beta=merge_beta,
                               max_ratio=guide_max_ratio, skip_first=guide_skip, through_denoiser=guide_through_denoiser)
    command.run(model, list(call or []), adapter=adapter, texts=list(prompt or []), source=prompts, seeds=seeds, dtype=dtype,
                device=device, out=out, guidance=guidance)


@app.command(epilog="Examples:\n\n"
             "  visalign inspect playground:pipeline\n\n"
             "  visalign inspect org/model num_inference_steps=8 guidance_scale=4.5 height=256 width=256")
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers folder, a hub id, or playground:pipeline.")],
    call: CallArguments = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or auto.")] = "auto",
) -> None:
    """Show what was found inside a pipeline, and whether replaying it gives the pipeline's own result."""
    from visalign.commands import inspect as command

    command.run(model, list(call or []), dtype=dtype, device=device)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, finished or not.")]) -> None:
    """Write a run's report.html: one self-contained file with curves, before/after pictures and settings."""
    from visalign.report import write_report

    typer.echo(write_report(run))


@app.command()
def env() -> None:
    """Versions and devices, ready to paste into a bug report."""
    from visalign.versions import describe

    typer.echo(describe())


@app.command(epilog="Example:\n\n  visalign configs sd35_flow_grpo > my.yaml")
def configs(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", show_default=False, help="Print this recipe's YAML.")] = None,
) -> None:
    """List the recipes with their sources and what was verified; or print one."""
    from visalign.commands import configs as command

    command.run(name)


@app.command(epilog="Examples:\n\n  visalign quickstart\n\n  visalign quickstart --seed 1 train.iterations=100 --out runs/longer")
def quickstart(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the run; evaluation prompts and noise stay the same.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run's folder; default runs/quickstart-DATE.")] = None,
) -> None:
    """Align the embedded text-to-image pipeline on this machine, and show before and after."""
    from visalign.quickstart import run

    run(list(overrides or []), seed=seed, out=out)
