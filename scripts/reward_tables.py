"""Rewards trained from preferences, as markdown: a sentence for the README and the tables of docs/rewards.md."""

from __future__ import annotations

from typing import Any

from scripts.results import rows

HEADS = {"regularised": "The recipe's head: dropout 0.5, weight decay 1",
         "free": "A head free to learn by heart: dropout 0.1, weight decay 0.1"}
LABELS = {"clean": "gold labels", "none": "a quarter flipped, no treatment", "best epoch": "the epoch of smallest calibration loss"}
ESTIMATE = ("flip_corrected, estimated rate", "posterior", "voting", "co_filter")
RELABEL = ("posterior", "voting")
Seeds = list[dict[str, Any]]


def reward_rows() -> dict[tuple[str, str], Seeds]:
    """Seeds of every head and method in their order, the last row of each."""
    last = {(row["head"], row["method"], row["seed"]): row for row in rows("reward_training")}
    found: dict[tuple[str, str], Seeds] = {}
    for (head, method, _), row in sorted(last.items(), key=lambda item: item[0][2]):
        found.setdefault((head, method), []).append(row)
    return found


def mean(seeds: Seeds, name: str) -> float:
    """Of a statistic's values over seeds."""
    return sum(row[name][1] for row in seeds) / len(seeds)


def reward_sentence() -> str:
    found = {method: seeds for (head, method), seeds in reward_rows().items() if head == "regularised"}
    if not {"clean", "none"} < found.keys():
        return ""
    clean, none = found.pop("clean"), found.pop("none")
    best = max(found, key=lambda method: mean(found[method], "accuracy"))
    return (f"**Rewards from preferences on the embedded world**, {len(none)} seeds, held-out prompts, gold labels ([all treatments]"
            "(docs/rewards.md), `python benchmarks/reward_training.py`): the proxy CLIP ranks "
            f"{_own(clean):.1%} of pairs right, a head on it trained on gold pairs {mean(clean, 'accuracy'):.1%}. "
            f"With 25 % of the labels flipped it ranks {mean(none, 'accuracy'):.1%}, "
            f"with `{best}` against them {mean(found[best], 'accuracy'):.1%}.")


def reward_tables() -> str:
    """Every head and method with its seeds, and the game that goes in circles."""
    found = reward_rows()
    parts = [_table(title, {method: seeds for (of, method), seeds in found.items() if of == head}) for head, title in HEADS.items()
             if (head, "none") in found]
    if clean := found.get(("regularised", "clean")):
        gains = "; ".join("{1:+.1f} [{0:+.1f}, {2:+.1f}]".format(*(100 * end for end in row["gain_over_encoder"])) for row in clean)
        parts.append(f"**Over the encoder's own score**, which ranks {_own(clean):.1%} of the held-out pairs right, the recipe's head on "
                     f"gold labels gains, in points per seed with 95 % intervals over prompts: {gains}.")
    circles = {method: seeds for (head, method), seeds in found.items() if head.startswith("rock")}
    if circles:
        told = "; ".join(f"`{method}` {_listed(seeds, 'accuracy')}" for method, seeds in circles.items())
        parts.append("**Circles beat squares, squares beat triangles, triangles beat circles**: 1,500 pairs of renders, held-out accuracy "
                     f"per seed: {told}. No reward orders three things in a circle; of evenly drawn pairs it gets two thirds at most.")
    if found:
        row = next(iter(found.values()))[-1]
        parts.append(f"CPU seconds are process seconds of one thread on a shared machine ({row['hardware']}, torch {row['torch']}), "
                     f"embeddings already made; commit {row['commit']}.")
    return "\n\n".join(parts)


def _own(seeds: Seeds) -> float:
    return sum(row["encoder_accuracy"] for row in seeds) / len(seeds)


def _table(title: str, methods: dict[str, Seeds]) -> str:
    headings = ("labels and treatment", "ranking accuracy", "change", "calibration error", "log-loss", "flip rate found",
                "labels right after", "CPU s")
    lines = [f"**{title}**", "", f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    before = {row["seed"]: row["accuracy"][1] for row in methods["none"]}
    for method, seeds in methods.items():
        change = [100 * (row["accuracy"][1] - before[row["seed"]]) for row in seeds] if method != "none" else []
        seconds = sum(row["cpu_s"] for row in seeds) / len(seeds)
        cells = [LABELS.get(method, method), f"{mean(seeds, 'accuracy'):.3f} ({_listed(seeds, 'accuracy')})", _change(change),
                 f"{mean(seeds, 'ece'):.3f}", f"{mean(seeds, 'log_loss'):.3f}", _listed(seeds, "flip_rate") if method in ESTIMATE else "",
                 _listed(seeds, "labels_right_after") if method in RELABEL else "", f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _change(points: list[float]) -> str:
    """Mean and single seeds, bold where all agree on the sign."""
    if not points:
        return ""
    listed = ", ".join(f"{one:+.1f}" for one in points)
    told = f"{sum(points) / len(points):+.1f} ({listed})"
    return f"**{told}**" if min(points) > 0 or max(points) < 0 else told


def _listed(seeds: Seeds, name: str) -> str:
    values = [row[name][1] if isinstance(row[name], list) else row[name] for row in seeds if name in row]
    return ", ".join(f"{value:.3f}" for value in values)
