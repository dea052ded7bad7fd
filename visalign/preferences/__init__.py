"""Preference data: judgements over K candidates of a prompt, from any source, ready to train on.

    dataset = load_preferences("pickapic/data", ties="skip")                        read and checked, nothing decoded
    cached = cached_latents(policy, dataset, Path("latents"), identity=pipeline_identity(policy), resize=True)
    sampler = ReplaySampler(cached.dataset, microbatch=4)                           a run's sampler; its prompts: cached.dataset.prompts

``records`` and ``candidates`` hold the types, ``jsonl`` our own format, ``layouts`` and ``readers`` everybody else's, ``content`` turns
files into media, ``latents`` and ``stored`` keep what was encoded, ``groups`` makes preferences out of scored samples.
"""

from visalign.preferences.jsonl import write_jsonl
from visalign.preferences.latents import Cached, cached_latents
from visalign.preferences.readers import load_preferences
from visalign.preferences.records import PreferenceDataset, PreferenceError, PreferenceRecord, Problem
from visalign.preferences.stored import load_latents

__all__ = [
    "Cached",
    "PreferenceDataset",
    "PreferenceError",
    "PreferenceRecord",
    "Problem",
    "cached_latents",
    "load_latents",
    "load_preferences",
    "write_jsonl",
]
