"""``visalign inspect``: what capture found inside a pipeline, and the proof that it replays."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from visalign.commands import quiet_libraries
from visalign.commands.pipelines import call_arguments, choose_device, torch_dtype
from visalign.config import resolve_path
from visalign.samplers.policy import PipelinePolicy


def run(model: str, call: list[str], *, dtype: str, device: str) -> None:
    """Print the table; a pipeline that cannot be captured, or that replays differently, is an error."""
    quiet_libraries()
    policy = PipelinePolicy.from_pretrained(str(resolve_path(model)), dtype=torch_dtype(dtype), device=choose_device(device),
                                            **call_arguments(call))
    found = policy.verify()
    table = Table(title=f"{model}: verified", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for what, finding in found.rows:
        table.add_row(what, finding)
    Console().print(table)
