"""A run's ``report.html``: one file with everything inside, readable in a browser without network, in light and dark.

Reads only what a run folder holds: ``config.yaml``, ``metrics.jsonl``, ``evaluation.json``, ``evaluations/``, ``samples/``,
``comparisons/``. Whatever is not there yet is left out, so that a report can be written while a run goes on.
"""

from visalign.report.evaluations import COMPARISONS, write_comparison_report
from visalign.report.page import write_report

__all__ = ["COMPARISONS", "write_comparison_report", "write_report"]
