"""From a configuration to a folder: the one path, top to bottom.

    config.yaml            the resolved configuration
    metrics.jsonl          one row per member and epoch
    evaluation.json        held-out accuracy, calibration and log-loss with intervals
    reward.safetensors     what the reward ``trained`` reads
    report.html            reliability and curves

The folder appears when it is whole; the same command after a kill takes up the members that were finished, and gives the same folder.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.maths.seeds import derive_seed
from visalign.preferences import load_preferences
from visalign.reward_models.adapter import EncoderAdapter, LoraSettings
from visalign.reward_models.blocks import check_blocks, possible_blocks
from visalign.reward_models.encoder import AdaptableEncoder, FeatureEncoder
from visalign.reward_models.heads import Shape
from visalign.reward_models.stored import StoredReward
from visalign.reward_training.config import RewardTrainingConfig
from visalign.reward_training.evaluation import check_prompts, encoder_odds, finite, gain_over, judge, temperature_of
from visalign.reward_training.examples import Corpus, Examples, build_corpus
from visalign.reward_training.features import Embeddings, embed
from visalign.reward_training.fit import Fitting, Member, Rows
from visalign.reward_training.objectives import Targets
from visalign.reward_training.parts import Parts, build_parts
from visalign.reward_training.sources import AdaptedSource, FrozenSource
from visalign.reward_training.splitting import Split, hash_order, split
from visalign.reward_training.treatments import Treated
from visalign.reward_training.workfolder import WorkFolder, refuse_used

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


def train_reward(config: RewardTrainingConfig, encoder: FeatureEncoder, folder: Path,
                 progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Train, evaluate and write ``folder``; returns what ``evaluation.json`` holds.

    Args:
        encoder: of ``config.encoder``; with ``config.lora`` an adapter is put into it and stays there.
        progress: called with (what, done, of how many).
    Raises:
        ConfigError: parts that do not exist or do not go together.
        ValueError: a folder with something in it, data that cannot be used, or an encoder that cannot be adapted.
    """
    refuse_used(folder)
    parts = build_parts(config)
    data = config.data
    dataset = load_preferences(data.path, format=data.format, ties=data.ties, broken=data.broken, folder=data.folder, split=data.split,
                               limit=data.limit, content="media")
    logger.info("%s: %s", data.path, dataset.summary())
    corpus = build_corpus(dataset, parts.objective.rated, data.gold, data.broken)
    cache = Path(config.features.cache).expanduser() if config.features.cache else Path.home() / ".cache" / "visalign" / "embeddings"
    corpus, embeddings = embed(encoder, corpus, cache, batch=config.features.batch, broken=data.broken,
                               progress=lambda done, total: progress("embeddings", done, total))
    judgements = split(config, corpus, parts.objective.lists)
    for what, label in _labels(judgements.heldout).items():  # before hours of training, not after
        check_prompts(label, judgements.heldout.cluster, what)
    fitting = _fitting(config, parts, encoder, corpus, embeddings, judgements)
    work = WorkFolder(folder, config, corpus, encoder.hash)
    treated = _treat(config, parts, fitting, judgements.train, corpus, progress)
    members: list[Member] = []
    rows: Rows = []
    notes: list[str] = []
    for k in range(config.ensemble.members):
        progress("members", k, config.ensemble.members)
        member, own, note = work.take(k) or _member(config, fitting, treated, judgements, corpus, k)
        work.keep(k, _stored(config, encoder, [member]), own, note)
        members.append(member)
        rows += own
        notes.append(note)
    progress("members", len(members), len(members))
    evaluation = _evaluate(fitting, members, notes, judgements, embeddings, treated, corpus)
    work.finish(_stored(config, encoder, members), rows, evaluation)
    return evaluation


def _fitting(config: RewardTrainingConfig, parts: Parts, encoder: FeatureEncoder, corpus: Corpus, embeddings: Embeddings,
             judgements: Split) -> Fitting:
    media_dim, text_dim = embeddings.media.shape[1], 0 if embeddings.text is None else embeddings.text.shape[1]
    blocks = config.features.blocks or possible_blocks(media_dim, text_dim)
    check_blocks(blocks, media_dim, text_dim)
    shape = Shape(media_dim, text_dim, blocks, parts.hidden.width, parts.hidden.depth, parts.hidden.dropout)
    frozen = FrozenSource(embeddings, encoder.device)
    if config.lora is None:
        return Fitting(shape, parts.objective, frozen, frozen, config.optimization, None, judgements.calibration)
    if not isinstance(encoder, AdaptableEncoder):
        raise ValueError(f"lora: {encoder.name} has no network to adapt; use {{reward: clip, ...}} or {{reward: clap, ...}}, or leave "
                         "lora out")
    adapter = EncoderAdapter(encoder.network, _lora(config))
    source = AdaptedSource(encoder, adapter, corpus, encoder.device, shape.reads_text)
    return Fitting(shape, parts.objective, source, frozen, config.optimization, config.lora, judgements.calibration)


def _lora(config: RewardTrainingConfig) -> LoraSettings:
    assert config.lora is not None, "only asked where there is an adapter"
    return LoraSettings(config.lora.rank, config.lora.alpha, config.lora.target_modules)


def _treat(config: RewardTrainingConfig, parts: Parts, fitting: Fitting, train: Examples, corpus: Corpus, progress: Progress) -> Treated:
    """The noise treatment of the training pairs, by models of other prompts where it asks for them."""
    if not parts.objective.treatable:
        return Treated(Targets.of(torch.zeros(len(train))))
    clusters, prompt = train.cluster.unique(return_inverse=True)
    present = [corpus.keys[cluster] for cluster in clusters.tolist()]

    def crossfit(folds: int, repetition: int) -> Tensor:
        if len(present) < folds:
            raise ValueError(f"noise: {len(present)} training prompts make no {folds} folds; lower noise.folds, or give more judgements")
        place = torch.empty(len(present), dtype=torch.int64)
        place[hash_order(present, derive_seed(config.seed, 2, repetition))] = torch.arange(len(present))
        fold, odds = (place % folds)[prompt], torch.empty(len(train), dtype=torch.float64)
        for k in range(folds):
            progress(f"models of other prompts, round {repetition + 1}", k, folds)
            mine = fold != k
            member, _ = fitting.fit(train.select(mine), Targets.of(train.label[mine]), derive_seed(config.seed, 1, repetition, k))
            odds[~mine] = fitting.log_odds(member, train.select(~mine))
        progress(f"models of other prompts, round {repetition + 1}", folds, folds)
        return odds

    return parts.treatment.treat(train, crossfit)


def _member(config: RewardTrainingConfig, fitting: Fitting, treated: Treated, judgements: Split, corpus: Corpus,
            k: int) -> tuple[Member, Rows, str]:
    """One member with its temperature, its metrics, and why it has no temperature if so."""
    seed = derive_seed(config.seed, 0, k)
    train = judgements.train
    clusters = train.cluster.unique().tolist()
    drawn = hash_order([corpus.keys[cluster] for cluster in clusters], seed)[:max(1, round(config.ensemble.fraction * len(clusters)))]
    mine = torch.isin(train.cluster, torch.tensor([clusters[row] for row in drawn]))
    member, rows = fitting.fit(train.select(mine), treated.targets.select(mine), seed, treated.co_filter)
    odds = fitting.log_odds(member, judgements.calibration)
    temperature, note = temperature_of(odds, judgements.calibration.label, treated.flip_rate)
    if note:
        logger.warning("member %d keeps temperature 1: %s", k, note)
    member.head.temperature.fill_(temperature)
    return member, [{"member": float(k), **row} for row in rows], note


def _evaluate(fitting: Fitting, members: list[Member], notes: list[str], judgements: Split, embeddings: Embeddings, treated: Treated,
              corpus: Corpus) -> dict[str, Any]:
    pairs, train = judgements.heldout, judgements.train
    each = torch.stack([fitting.log_odds(member, pairs) for member in members])
    odds, own = each.mean(dim=0), encoder_odds(embeddings, pairs)
    labels = _labels(pairs)
    found: dict[str, Any] = {"data": judgements.counts(), "left_out": dict(corpus.dataset.dropped)}
    found |= {name: judge(odds, label, pairs.cluster).as_json() for name, label in labels.items()}
    if own is not None:
        found["encoder"] = {name: judge(own, label, pairs.cluster).statistics["accuracy"] for name, label in labels.items()}
        found["encoder"]["gain"] = gain_over(own, odds, labels.get("gold", pairs.label), pairs.cluster)
    alone = [judge(one, pairs.label, pairs.cluster) for one in each]
    found["members"] = [{"temperature": float(member.head.temperature), "accuracy": one.statistics["accuracy"]["value"],
                         "ece": one.statistics["ece"]["value"], **({"note": note} if note else {})}
                        for member, one, note in zip(members, alone, notes, strict=True)]
    found["noise"] = dict(treated.metrics)
    if "gold" in labels and bool((treated.targets.prob != 0.5).any()):  # where labels are what is learnt from
        known = (train.gold_label != 0) & (train.label != 0)
        found["noise"] |= {f"noise/labels_right_{when}": float((torch.sign(sign) == train.gold_label)[known].double().mean())
                           for when, sign in (("before", train.label), ("after", treated.targets.prob - 0.5))}
    return finite(found)


def _labels(pairs: Examples) -> dict[str, Tensor]:
    """What held-out pairs are compared with: their labels, and the second opinion where there is one."""
    return {"heldout": pairs.label} | ({"gold": pairs.gold_label} if bool((pairs.gold_label != 0).any()) else {})


def _stored(config: RewardTrainingConfig, encoder: FeatureEncoder, members: list[Member]) -> StoredReward:
    spec = dict(config.encoder) if isinstance(config.encoder, dict) else config.encoder
    lora = None if config.lora is None else _lora(config)
    return StoredReward(config.objective.name, spec, encoder.hash, tuple(member.head for member in members), lora,
                        () if lora is None else tuple(member.adapter for member in members))
