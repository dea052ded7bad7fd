"""The adapters: a reward or a judge of another process, declared as there and asked over HTTP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from visalign.protocols import ALL_MEDIA, RewardSpec
from visalign.rewards.remote.client import RewardClient
from visalign.types import Comparisons, Media, Prompt, Scores
from visalign.wire.rows import PairRow, ScoreRow


class _Remote:
    """What both adapters share: the client, and the server's declaration of the reward as their own."""

    task: ClassVar[str]
    spec: RewardSpec

    def __init__(self, urls: str | Sequence[str], scorer: str, *, token_env: str | None = None, timeout: float = 60.0,
                 batch_timeout: float = 1800.0, retries: int = 3, pause: float = 0.5, concurrency: int = 4,
                 cache_dir: str | Path | None = None, compress: bool = True, startup_timeout: float = 30.0,
                 name: str | None = None) -> None:
        """
        Args:
            urls: of servers with the same reward, each http://HOST:PORT.
            scorer: the reward's name there.
            token_env: environment variable that holds their token, if they want one.
            timeout: seconds for one request.
            batch_timeout: seconds for all requests about the samples of one call, retries included.
            retries: further attempts for a request after the first.
            pause: seconds before the first retry, doubled for each further one, with jitter; a server's Retry-After goes first.
            concurrency: requests under way at once.
            cache_dir: keeps every valid score by content; what is there is not asked again. ``None`` keeps none. Not of groupwise rewards.
            compress: send pictures as PNG and 16-bit sound as FLAC; ``False`` saves their encoding where the network is fast.
            startup_timeout: seconds to wait for the first server, which may still be loading its model.
            name: by default the reward's own.
        Raises:
            ValueError: an argument is out of range, no server answers, or the set-up is wrong (token, name, version).
        """
        self.client = RewardClient(urls, scorer, token_env=token_env, timeout=timeout, batch_timeout=batch_timeout, retries=retries,
                                   pause=pause, concurrency=concurrency, cache_dir=cache_dir, compress=compress,
                                   startup_timeout=startup_timeout)
        self.spec = self.client.spec if name is None else replace(self.client.spec, name=name)
        if (self.spec.arity == "pairwise") != (self.task == "compare"):
            raise ValueError(f"'{scorer}' compares pairs: {{name: win_rate, params: {{judge: {{reward: remote_judge, urls: ..., scorer: "
                             f"{scorer}}}}}}}" if self.task == "score" else f"'{scorer}' scores samples: {{name: remote, params: {{urls: "
                             f"..., scorer: {scorer}}}}}")

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """As the reward does, at the server.

        Raises:
            ValueError: its message.
        """
        self.client.check_prompts(prompts)

    def telemetry(self) -> Mapping[str, float]:
        """Of the latest call: samples, cached, calls, valid rate, share of each failure, latency of requests."""
        return dict(self.client.telemetry)


class Remote(_Remote):
    """Scores samples, pointwise or by groups, of media or of latents.

    What a server could not be asked about is invalid: "timeout", "connection", "garbage" or "http CODE"; what its reward could not score
    has the reward's own reason, or "raised ERROR".
    """

    task = "score"
    spec = RewardSpec(name="remote", modality=ALL_MEDIA)  # or of latents, as its server says

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """Scores as the reward gives them there, bit for bit.

        Raises:
            ValueError: the server refuses the samples, or serves another reward by now.
        """
        numbers = {group: number for number, group in enumerate(dict.fromkeys(group_id))}  # ids may be negative, numbers on the wire not
        return self.client.ask([ScoreRow(sample, prompt, numbers[group])
                                for sample, prompt, group in zip(media, prompts, group_id, strict=True)], self.task)


class RemoteJudge(_Remote):
    """Compares pairs; ``win_rate`` makes a reward of it. Failures as in ``Remote``."""

    task = "compare"
    spec = RewardSpec(name="remote_judge", arity="pairwise", modality=ALL_MEDIA)

    def compare(self, first: Sequence[Media], second: Sequence[Media], prompts: Sequence[Prompt]) -> Comparisons:
        """Probabilities as the judge gives them there, in the order given.

        Raises:
            ValueError: as ``Remote.score``.
        """
        scores = self.client.ask([PairRow(a, b, prompt) for a, b, prompt in zip(first, second, prompts, strict=True)], self.task)
        return Comparisons(prob_first=scores.raw, valid=scores.valid, reasons=scores.reasons)
