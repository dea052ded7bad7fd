"""What each number of a run means, in one sentence; shown under its curve."""

from __future__ import annotations

_EXACT = {
    "credit/reward_mean": "Weighted sum of the rewards, mean over the samples of an iteration. Prompts differ from one to the next.",
    "credit/advantage_std": "Spread of the advantages. Towards 0 there is nothing left to learn from.",
    "credit/zero_spread_fraction": "Groups whose samples all got the same reward; they teach nothing.",
    "credit/valid_rate": "Samples that could be scored. The others are left out of every statistic.",
    "credit/dropped_group_fraction": "Groups left out because too few of their samples could be scored.",
    "credit/clipped_fraction": "Advantages cut off at the largest allowed value.",
    "grpo/loss": "Surrogate plus KL. Its value says little: its gradient does the work.",
    "grpo/ratio": "Mean probability ratio, per dimension, of the updated to the sampling policy; 1 at the first update.",
    "grpo/clip_fraction": "Samples outside the trust region, whose gradient is cut. 0 throughout: the range never binds.",
    "grpo/approx_kl": "Distance between updated and sampling policy (k3 estimate, per dimension).",
    "grpo/kl_old": "Exact KL, per dimension, between updated and sampling policy.",
    "grpo/kl_reference": "Exact KL, per dimension, to the base model. How far the run has moved.",
    "policy/ratio_deviation": "Largest distance of a ratio from 1 within an iteration.",
    "policy/ratio_deviation_first": "The same at the first update, where it must be 0 up to rounding.",
    "policy/output_gap": "Largest relative gap of the raw model output between sampling and training.",
    "policy/output_gap_first": "The same at the first update: sampling and training run the same computation.",
    "policy/kl_reference_max": "Largest single KL to the base model.",
    "train/grad_norm": "Norm of the gradient before clipping.",
    "train/learning_rate": "Learning rate of the last optimiser step.",
    "train/skipped": "Steps refused because the loss or a gradient was not finite, so far.",
}
_ENDINGS = {
    "/mean": "Mean over the samples of an iteration, on the reward's own scale.",
    "/std": "Standard deviation over the samples of an iteration.",
    "/group_std": "Mean spread among the samples of one prompt: what the update can tell apart.",
    "/valid_rate": "Samples this reward could score.",
    "/tie_rate": "Comparisons that ended in a tie.",
    "/swap_inconsistency": "How much the judge's answer depends on the order of the two samples.",
}


def explain(name: str) -> str:
    """One sentence about a metric, or nothing."""
    if name in _EXACT:
        return _EXACT[name]
    return next((text for ending, text in _ENDINGS.items() if name.endswith(ending)), "")
