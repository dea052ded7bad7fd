"""``visalign sample`` with guidance: the captured pipeline's own loop, tilted by rewards or held against a negative model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visalign.commands.pipelines import load_pipeline
from visalign.protocols import DifferentiableReward
from visalign.reward_entries import load, parse_reward
from visalign.samplers.guidance import GuidanceReward, GuidedPolicy, MediaReward, Tilt
from visalign.samplers.negative import ask_against, give_negative
from visalign.samplers.offsets import read_offset
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.reward_head import HeadReward, RewardHead, pooled_prompts
from visalign.samplers.rollout import generate
from visalign.samplers.user_attention import SETTINGS, load_users
from visalign.types import Media, Prompt


@dataclass(frozen=True)
class GuidanceOptions:
    """What the command line says about guidance.

    Attributes:
        rewards: ``REWARD=WEIGHT`` each; a reward is what ``visalign score -r`` takes, or the .safetensors file of a reward head.
        negative: a folder whose weights make the predictions that classifier-free guidance subtracts.
        merge_alpha, merge_beta: how much of the adapter and of ``negative`` those weights hold, 1 by default.
        max_ratio, skip_first, through_denoiser: see `visalign.samplers.guidance`.
    Raises:
        ValueError: an option without the one it belongs to.
    """

    rewards: Sequence[str] = ()
    negative: Path | None = None
    merge_alpha: float | None = None
    merge_beta: float | None = None
    max_ratio: float | None = None
    skip_first: int | None = None
    through_denoiser: bool = False

    def __post_init__(self) -> None:
        if self.negative is None and (self.merge_alpha is not None or self.merge_beta is not None):
            raise ValueError("--merge-alpha and --merge-beta weigh what --negative holds; give --negative ADAPTER")
        if not self.rewards and (self.max_ratio is not None or self.skip_first is not None or self.through_denoiser):
            raise ValueError("--guide-max-ratio, --guide-skip and --guide-through-denoiser limit --guide; give --guide REWARD=WEIGHT")

    @property
    def wanted(self) -> bool:
        return bool(self.rewards) or self.negative is not None


def guided_draw(model: str, dtype: str, device: str, adapter: Path | None, arguments: Mapping[str, Any], probe: Prompt,
                options: GuidanceOptions) -> Callable[[Prompt, int], Media]:
    """One guided sample per call. It is the pipeline's noise for the seed, followed by the deterministic sampler of the same levels.

    Raises:
        ValueError: a reward without gradients, a folder that does not fit, or a pipeline that has no place for the guidance.
    """
    rewards = [_parse(text) for text in options.rewards]
    pipeline = load_pipeline(model, dtype, device, adapter if options.negative is None else None)
    rate = float(arguments.get("frame_rate") or arguments.get("fps") or 8.0)
    policy = PipelinePolicy(pipeline, arguments, rate=rate, probe=probe)
    ask = None
    if options.negative is not None:
        eta = None if adapter is None else read_offset(policy, _adapter(adapter))
        give_negative(policy, read_offset(policy, _adapter(options.negative)), eta,
                      a=1.0 if options.merge_alpha is None else options.merge_alpha,
                      b=1.0 if options.merge_beta is None else options.merge_beta)
        ask = ask_against(policy)
    if adapter is not None and (adapter / SETTINGS).is_file():
        policy.roles.add_users(load_users(policy.denoisers, adapter))
    tilt = None
    if rewards:
        tilt = Tilt([(_guidance(name, policy, options), weight) for name, weight in rewards],
                    max_ratio=Tilt.max_ratio if options.max_ratio is None else options.max_ratio, skip_first=options.skip_first or 0)
    guided = GuidedPolicy(policy, tilt, ask)

    def draw(prompt: Prompt, seed: int) -> Media:
        return policy.decode(generate(guided, [prompt], [seed]), [prompt])[0]

    return draw


def _parse(text: str) -> tuple[str, float]:
    name, _, weight = text.rpartition("=")
    try:
        if name:
            return name, float(weight)
        raise ValueError("no name")
    except ValueError:
        raise ValueError(f"--guide '{text}': write REWARD=WEIGHT, such as clip=100 or '{{name: clip, params: {{model: ...}}}}=100'"
                         ) from None


def _guidance(name: str, policy: PipelinePolicy, options: GuidanceOptions) -> GuidanceReward:
    if name.endswith(".safetensors"):
        head = RewardHead.load(Path(name)).to(policy.device)
        if head.latent_shape != policy.latent_shape:
            raise ValueError(f"--guide {name}: the head was trained on latents {head.latent_shape}, this call makes {policy.latent_shape}; "
                             "use the height, width and number of frames it was trained with")
        return HeadReward(head, pooled_prompts(policy) if head.prompt_dim else None)
    reward = load(parse_reward(name))
    if not isinstance(reward, DifferentiableReward) or not reward.spec.differentiable:
        raise ValueError(f"--guide {name}: this reward has no gradient (no score_tensor), so it cannot guide; clip can")
    return MediaReward(reward, policy.decode_tensor, options.through_denoiser)


def _adapter(folder: Path) -> Path:
    """The adapter's own folder; a run's is RUN/adapter."""
    return folder / "adapter" if (folder / "config.yaml").is_file() else folder
