"""``visalign``: the command line. Each command is a few lines here and its work in ``visalign/commands``.

Errors a user can act on (a wrong configuration, a missing file, a full disk) end with one message and exit status 1 or 2;
``visalign --debug ...`` shows the traceback. Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperGroup

from visalign import __version__
from visalign.settings import ConfigError

errors = Console(stderr=True)


class TeachingGroup(TyperGroup):
    """Turns expected errors into one message; the only place that does."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # click's own, and subclasses of RuntimeError
            raise
        except KeyboardInterrupt:
            trains = ctx.invoked_subcommand in ("train", "quickstart")
            errors.print("\n[yellow]stopped.[/]" + trains * " A run continues from its last checkpoint with: visalign train --resume RUN")
            raise typer.Exit(130) from None
        except (ValueError, OSError, RuntimeError) as error:
            origin = _origin(error)
            if ctx.params.get("debug") or (isinstance(error, RuntimeError) and origin.startswith("torch") and not _out_of_memory(error)):
                raise
            errors.print("[bold red]error:[/] ", end="")
            errors.print(str(error) or type(error).__name__, markup=False, highlight=False, soft_wrap=True)
            if _out_of_memory(error):
                errors.print("Out of memory: halve train.microbatch or evaluation.batch, set train.gradient_checkpointing=true, or use "
                             "trainable.mode=lora; visalign train CONFIG --plan shows what takes the space.", soft_wrap=True)
            elif not origin.startswith("visalign"):
                errors.print(f"[dim]raised in {origin}; visalign --debug shows the traceback[/]", soft_wrap=True)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


def _origin(error: BaseException) -> str:
    """Name of the module that raised: ours wrote the message for users, another's may not have."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))


def _out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)


app = typer.Typer(
    cls=TeachingGroup, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Align any diffusion or rectified-flow generator with any preference signal.",
    epilog="Start here:  [bold]visalign quickstart[/]  (minutes on a laptop CPU, nothing to download)\n\n"
           "Then:  [bold]visalign configs[/]  to see the recipes,  [bold]visalign train RECIPE --plan[/]  to see what one would do.",
)

Overrides = Annotated[list[str] | None, typer.Argument(
    metavar="[KEY=VALUE]...", show_default=False,
    help="Changes to the configuration, e.g. train.learning_rate=1e-4 rewards.0.weight=2 'rewards.+={name: jpeg_compressibility}'.")]
CallArguments = Annotated[list[str] | None, typer.Argument(
    metavar="[KEY=VALUE]...", show_default=False,
    help="Arguments of the pipeline's call, e.g. num_inference_steps=28 guidance_scale=4.5 height=512.")]


def _version(show: bool) -> None:
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    handler = RichHandler(console=errors, show_path=False, show_time=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("visalign").setLevel(logging.DEBUG if debug else logging.INFO)
    for noisy in ("httpx", "PIL", "diffusers", "transformers", "accelerate", "huggingface_hub", "root"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


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


def main() -> None:
    app(prog_name="visalign")


if __name__ == "__main__":
    main()
