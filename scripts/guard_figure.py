"""Draw docs/overoptimisation.svg from the rows of ``benchmarks/overoptimisation.py``.

python -m scripts.guard_figure        needs pip install -e ".[docs]"
"""

from __future__ import annotations

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from scripts.guard_tables import ORDER, Run, common_end, guard_runs
from scripts.results import ROOT

FIGURE = ROOT / "docs" / "overoptimisation.svg"
GOLD, PROXY, STOP = "#1f5fa8", "#b0771c", "#c0392b"
COLOURS = dict(zip(ORDER, (GOLD, "#2e8b57", "#7d3c98", "#d35400", "#777777"), strict=True))


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "overoptimisation", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    found = guard_runs()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    proxy_arm(left, found["clip"], found.get("guarded", {}))
    all_arms(right, found)
    figure.savefig(FIGURE, metadata={"Date": None})


def proxy_arm(axes: Axes, runs: dict[int, Run], guarded: dict[int, Run]) -> None:
    """Proxy and gold of the runs that nothing ends, and where the guard ends them."""
    for number, run in enumerate(runs.values()):
        at = [row["iteration"] for row in run]
        axes.plot(at, [row["proxy"] for row in run], color=PROXY, lw=1, label="proxy, trained on: CLIP" * (number == 0) or None)
        axes.plot(at, [row["gold"][1] for row in run], color=GOLD, lw=1, label="gold: the exact verifier" * (number == 0) or None)
    for number, run in enumerate(run for run in guarded.values() if run[-1]["why"]):
        axes.plot(run[-1]["iteration"], run[-1]["gold"][1], "o", color=STOP, ms=6, label="guards end the run" * (number == 0) or None)
    axes.set(xlabel="iteration", ylabel="mean over held-out prompts", title=f"GRPO on CLIP, {len(runs)} seeds")
    axes.legend(frameon=False)


def all_arms(axes: Axes, found: dict[str, dict[int, Run]]) -> None:
    """Gold by what is trained on: single seeds thin, their mean thick."""
    end = common_end(found)
    for arm in ORDER:
        runs = [[row for row in run if row["iteration"] <= end] for run in found.get(arm, {}).values()]
        for run in runs:
            axes.plot([row["iteration"] for row in run], [row["gold"][1] for row in run], color=COLOURS[arm], lw=0.6, alpha=0.4)
        if runs:
            mean = [sum(values) / len(runs) for values in zip(*([row["gold"][1] for row in run] for run in runs), strict=True)]
            axes.plot([row["iteration"] for row in runs[0]], mean, color=COLOURS[arm], lw=2, label=arm)
    axes.set(xlabel="iteration", ylabel="gold", title="gold by what is trained on")
    axes.legend(frameon=False)


if __name__ == "__main__":
    main()
