"""What every command of ``visalign`` shares: the application, its options, and errors that end in one message.
"""

from __future__ import annotations

import logging
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
            for note in getattr(error, "__notes__", ()):
                errors.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)
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
