"""The folder a reward is trained into: it appears by one rename when it is whole, and what was finished before a kill is taken up again."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visalign.preferences.jsonl import write_lines
from visalign.reward_models.stored import FILE, StoredReward, load_reward_file, save_reward
from visalign.reward_training.config import RewardTrainingConfig
from visalign.reward_training.examples import Corpus
from visalign.reward_training.fit import Member, Rows
from visalign.reward_training.report import write_report
from visalign.settings import dump_yaml

logger = logging.getLogger(__name__)

METRICS, EVALUATION, CONFIG = "metrics.jsonl", "evaluation.json", "config.yaml"
_IDENTITY = "identity.txt"


class WorkFolder:
    """``.NAME.partial`` beside the folder, until ``finish`` renames it.

    Raises:
        ValueError: the folder exists and is not empty.
    """

    def __init__(self, folder: Path, config: RewardTrainingConfig, corpus: Corpus, encoder_hash: str) -> None:
        refuse_used(folder)
        self.folder, self.config = folder, dump_yaml(config)
        self.title = config.recipe.description or folder.resolve().name
        self.partial = folder.resolve().parent / f".{folder.resolve().name}.partial"
        self.identity = _identity(self.config, corpus, encoder_hash)
        held = self.partial / _IDENTITY
        if self.partial.exists() and not (held.is_file() and held.read_text(encoding="ascii").strip() == self.identity):
            logger.warning("%s was begun with another configuration, data or encoder; starting anew", self.partial)
            shutil.rmtree(self.partial)

    def take(self, number: int) -> tuple[Member, Rows, str] | None:
        """A member that was finished before, with its metrics and note."""
        about = self.partial / f"member-{number}.json"
        if not about.is_file():
            return None
        stored, said = load_reward_file(self.partial / f"member-{number}.safetensors"), json.loads(about.read_text(encoding="utf-8"))
        logger.info("member %d was finished before", number)
        return Member(stored.members[0], stored.adapters[0] if stored.adapters else {}), said["rows"], said["note"]

    def keep(self, number: int, stored: StoredReward, rows: Rows, note: str) -> None:
        """A finished member; the second file says that the first is whole."""
        write_lines(self.partial / _IDENTITY, [self.identity])
        save_reward(self.partial / f"member-{number}.safetensors", stored)
        write_lines(self.partial / f"member-{number}.json", [json.dumps({"rows": rows, "note": note})])

    def finish(self, stored: StoredReward, rows: Sequence[Mapping[str, float]], evaluation: Mapping[str, Any]) -> None:
        """Write everything and put the folder in its place."""
        save_reward(self.partial / FILE, stored)
        (self.partial / CONFIG).write_text(self.config, encoding="utf-8")
        write_lines(self.partial / METRICS, [json.dumps(row) for row in rows])
        (self.partial / EVALUATION).write_text(json.dumps(evaluation, indent=1), encoding="utf-8")
        write_report(self.partial, self.title, self.config, evaluation, rows)
        for file in [self.partial / _IDENTITY, *self.partial.glob("member-*")]:
            file.unlink()
        self.partial.rename(self.folder)


def refuse_used(folder: Path) -> None:
    """
    Raises:
        ValueError: the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; choose another --out")


def _identity(config: str, corpus: Corpus, encoder_hash: str) -> str:
    """Of everything that decides the members but the content of the media, which the embeddings' cache follows."""
    digest = hashlib.sha256("\n".join([config, encoder_hash, *corpus.texts, *(str(one.stamp()) for one in corpus.media)]).encode())
    for tensor in vars(corpus.examples).values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
