"""What guards and other rewards do against over-optimisation, as markdown: docs/guards.md and a sentence of the README."""

from __future__ import annotations

from typing import Any

from scripts.results import rows

FRESH = "overoptimisation_elsewhere"

Run = list[dict[str, Any]]
ORDER = ("clip", "clip, PAR", "clip, win rates", "ensemble, UWO", "one member")


def guard_runs() -> dict[str, dict[int, Run]]:
    """Evaluations by arm and seed, in the order of iterations; of rows made twice, the last."""
    last = {(row["arm"], row["seed"], row["iteration"]): row for row in rows("overoptimisation") if row["op"] != FRESH}
    found: dict[str, dict[int, Run]] = {}
    for (arm, seed, _), row in sorted(last.items(), key=lambda item: item[0]):
        found.setdefault(arm, {}).setdefault(seed, []).append(row)
    return found


def peak(run: Run) -> dict[str, Any]:
    """The evaluation of highest gold."""
    return max(run, key=lambda row: row["gold"][1])


def lost(run: Run) -> float:
    """How far gold stands below its peak at the end, in points."""
    return 100 * float(peak(run)["gold"][1] - run[-1]["gold"][1])


def guard_tables() -> str:
    """The tables of docs/guards.md."""
    found = guard_runs()
    if not found:
        return ""
    return "\n\n".join([*_stopped(found), *_arms(found)])


def fresh() -> dict[int, dict[str, Any]]:
    """By seed, gold at the peak and at the end of a guarded run, on prompts and noise that it never saw."""
    return {row["seed"]: row for row in rows("overoptimisation") if row["op"] == FRESH}


def _stopped(found: dict[str, dict[int, Run]]) -> list[str]:
    elsewhere = fresh()
    lines = ["| seed | gold, start | at its peak | where the run ends | lost | on 1,024 other prompts | without guards: lowest since |",
             "|---|---|---|---|---|---|---|"]
    for seed, run in found.get("guarded", {}).items():
        end, free = run[-1], found["clip"][seed]
        low = min((row for row in free if row["iteration"] >= peak(run)["iteration"]), key=lambda row: row["gold"][1])
        ends = [100 * value for value in elsewhere[seed]["lost"]]
        lines.append(f"| {seed} | {run[0]['gold'][1]:.3f} | {_at(peak(run))} | {_at(end)}: {end['why'] or 'its last'} | {lost(run):.1f} | "
                     f"{ends[1]:.1f} [{ends[0]:.1f}, {ends[2]:.1f}] | {_at(low)} of {free[-1]['iteration']} |")
    return ["**Guarded runs**, 512 held-out prompts, an evaluation every 4 iterations, losses in points; the result of a run is its peak's "
            "checkpoint",
            "\n".join(lines)] if len(lines) > 2 else []


def _at(row: dict[str, Any]) -> str:
    return f"{row['gold'][1]:.3f}, iteration {row['iteration']}"


def common_end(found: dict[str, dict[int, Run]]) -> int:
    """The last iteration that every unguarded run has."""
    return int(min(run[-1]["iteration"] for arm in ORDER for run in found.get(arm, {}).values()))


def _arms(found: dict[str, dict[int, Run]]) -> list[str]:
    shortest = common_end(found)
    lines = ["| trained on | gold, start | peak | last | lost | strict, last | CLIP, last | KL per dimension, last |",
             "|---|---|---|---|---|---|---|---|"]
    for arm in ORDER:
        runs = [[row for row in run if row["iteration"] <= shortest] for run in found.get(arm, {}).values()]
        if runs:
            lines.append(f"| {arm} | {_mean(runs, lambda run: run[0]['gold'][1])} | {_mean(runs, lambda run: peak(run)['gold'][1])} | "
                         f"{_mean(runs, lambda run: run[-1]['gold'][1])} | {_mean(runs, lost, 1)} | "
                         f"{_mean(runs, lambda run: run[-1]['strict'])} | {_mean(runs, lambda run: run[-1]['proxy'])} | "
                         f"{_mean(runs, lambda run: run[-1]['kl_per_dim'], 2)} |")
    return [f"**What is trained on**, the same {shortest} iterations, no run ended; mean and single seeds", "\n".join(lines)]


def _mean(runs: list[Run], number: Any, digits: int = 3) -> str:
    values = [number(run) for run in runs]
    single = f" ({', '.join(f'{value:.{digits}f}' for value in values)})" if len(values) > 1 else " (one seed)"
    return f"{sum(values) / len(values):.{digits}f}{single}"


def guard_sentence() -> str:
    """For the README."""
    runs = guard_runs().get("guarded", {})
    if not runs:
        return ""
    ended = [lost(run) for run in runs.values() if run[-1]["why"]]
    elsewhere = [100 * row["lost"][1] for row in fresh().values()]
    return (f"**Guards on the embedded world**, GRPO that pushes the proxy CLIP too hard, {len(runs)} seeds "
            f"([curves and what else helps](docs/guards.md), `python benchmarks/overoptimisation.py`): guards ended {len(ended)} of "
            f"{len(runs)} runs, with gold {', '.join(f'{one:.1f}' for one in ended)} points below its peak ("
            f"{', '.join(f'{one:.1f}' for one in elsewhere)} on other prompts), whose checkpoint is the result.")
