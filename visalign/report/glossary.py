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
    "eval/kl_per_dim": "KL of whole sampling paths to the reference, nats per latent dimension, under one SDE for all runs.",
    "eval/velocity_gap": "Relative distance of the denoiser's answers from the reference's, on the policy's own samples.",
    "eval/diversity": "Effective number of different evaluation samples; the ruler is that of the samples before training.",
    "media/diversity": "Effective number of different samples among those of one prompt, with the same ruler.",
    "media/edge_density": "Share of pixels on an edge. Text and grid hacking empty or fill pictures.",
    "media/sharpness": "Contrast between neighbouring pixels; noise raises it, blur lowers it.",
    "media/colour_entropy": "How many colours are used, in bits: 0 for one, 9 for all.",
    "media/saturation": "How colourful: 0 for grey. Aesthetic rewards are often won by raising it.",
    "media/motion": "Mean change from frame to frame; 0 is a still. Smoothness rewards are often won by standing still.",
    "media/loudness": "Level in dB below full scale.",
    "media/silence": "Share of silent windows.",
    "media/clipping": "Share of samples at full scale.",
    "media/spectral_flatness": "0 for tones, 1 for noise.",
    "media/slenderness": "Shortest over longest side of the mesh's box.",
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
    "/cyclic_triads": "Share of threes in which each beats the next: no ranking can satisfy them.",
    "/self_agreement": "How often the judge repeats its answer when asked the same again.",
    "/swap_inconsistency": "How much the judge's answer depends on the order of the two samples.",
}


def explain(name: str) -> str:
    """One sentence about a metric, or nothing."""
    if name in _EXACT:
        return _EXACT[name]
    return next((text for ending, text in _ENDINGS.items() if name.endswith(ending)), "")
