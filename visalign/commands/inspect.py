"""``visalign inspect``: what capture found inside a pipeline, and the proof that it replays."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from visalign.commands import quiet_libraries
from visalign.commands.pipelines import call_arguments, check_call, load_pipeline
from visalign.samplers.policy import PipelinePolicy


def run(model: str, call: list[str], *, dtype: str, device: str) -> None:
    """Print the table; a pipeline that cannot be captured, or that replays differently, is an error."""
    quiet_libraries()
    arguments = call_arguments(call)
    pipeline = load_pipeline(model, dtype, device)
    check_call(pipeline, arguments)
    found = PipelinePolicy.from_pipeline(pipeline, **arguments).verify()
    table = Table(title=f"{model}: verified", title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for what, finding in found.rows:
        table.add_row(what, finding)
    Console().print(table)
