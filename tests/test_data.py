"""Prompt sources and the group sampler: identities, bad lines with their numbers, resume."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from visalign.config import DatasetConfig
from visalign.data import GroupSampler, PromptError, load_prompts
from visalign.types import Prompt


def test_text_file_keeps_order_duplicates_and_case(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa cat\n\nA cat\r\na cat\n".encode())
    assert [p.text for p in load_prompts(path)] == ["a cat", "A cat", "a cat"]


def test_jsonl_reads_every_field_and_keeps_other_keys_as_metadata(tmp_path: Path) -> None:
    (tmp_path / "dog.png").write_bytes(b"png")
    row = {"prompt": "a sign", "negative_prompt": "blurry", "images": ["dog.png"],
           "tag": "ocr", "metadata": {"target_text": "SALE"}}
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps({"text": "plain"}), encoding="utf-8")
    first, second = load_prompts(str(path))
    assert (first.text, first.negative, first.images) == ("a sign", "blurry", (str(tmp_path / "dog.png"),))
    assert first.metadata == {"target_text": "SALE", "tag": "ocr"}
    assert (second.text, second.negative, second.metadata) == ("plain", None, {})


def test_every_bad_line_is_reported_at_once_with_its_number(tmp_path: Path) -> None:
    lines = ['{"prompt": "good"}', '{"prompt": "good"', "[1]", '{"promt": "x"}', '{"prompt": ""}', '{"prompt": "x", "text": "y"}',
             '{"prompt": "x", "negative_promt": "y"}', '{"prompt": "x", "images": ["missing.png"]}',
             '{"prompt": "x", "metadata": 3}']
    path = tmp_path / "p.jsonl"
    path.write_bytes("\n".join(lines).encode() + b"\n{\xff}")
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [f"line {n}" for n in range(2, 11)]
    message = str(caught.value)
    assert "did you mean 'negative_prompt'?" in message
    assert "missing.png" in message
    assert "not UTF-8" in message


@pytest.mark.parametrize(("name", "content", "needle"),
                         [("e.txt", "\n\n", "no prompts"), ("b.txt", "a\x00b", "line 1: control characters")])
def test_unusable_text_files_are_refused(tmp_path: Path, name: str, content: str, needle: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(PromptError, match=needle):
        load_prompts(tmp_path / name)


def test_unknown_sources_say_what_is_possible(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.txt, \.jsonl or UniGenBench's \.csv"):
        load_prompts("prompts.parquet")
    with pytest.raises(ValueError, match="no such file"):
        load_prompts(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="it has train, heldout"):
        load_prompts("playground:tests")


def test_genevals_lines_are_prompts_with_their_request_as_metadata(tmp_path: Path) -> None:
    row = {"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", "count": 4}],
           "prompt": "a photo of three cups"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row) + "\n")
    (prompt,) = load_prompts(tmp_path / "evaluation_metadata.jsonl")
    assert prompt == Prompt("a photo of three cups", metadata={key: row[key] for key in ("tag", "include", "exclude")})


def test_playground_sets_do_not_overlap() -> None:
    train, heldout = ([p.text for p in load_prompts(f"playground:{name}")] for name in ("train", "heldout"))
    assert len(heldout) >= 256
    assert not set(train) & set(heldout)


class _Table:
    """As much of a Hugging Face dataset as is used: columns and rows."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def select_columns(self, names: list[str]) -> list[dict[str, Any]]:
        return [{name: row[name] for name in names} for row in self.rows]


def test_dataset_columns_become_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _Table([{"caption": "a", "bad": "b", "target": 1}, {"caption": "c", "bad": "d", "target": 2},
                    {"caption": " ", "bad": "", "target": 3}])
    module = ModuleType("datasets")
    module.load_dataset = lambda name, split: table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = DatasetConfig(dataset="org/name", column="caption", negative_column="bad", metadata_columns=("target",), limit=2)
    loaded = [(p.text, p.negative, dict(p.metadata)) for p in load_prompts(source)]
    assert loaded == [("a", "b", {"target": 1}), ("c", "d", {"target": 2})]
    with pytest.raises(PromptError, match="row 2: the prompt must be a non-empty string"):
        load_prompts(source.model_copy(update={"limit": None}))
    with pytest.raises(ValueError, match="no column prompt; it has caption, bad, target"):
        load_prompts(DatasetConfig(dataset="org/name"))


@pytest.mark.parametrize(("num_prompts", "groups"), [(10, 3), (7, 7), (5, 4), (12, 4), (1, 1)])
def test_each_epoch_visits_every_prompt_once_and_no_iteration_repeats_one(num_prompts: int, groups: int) -> None:
    sampler = GroupSampler(num_prompts, groups, seed=0)
    iterations = [sampler.next() for _ in range(num_prompts * 6)]
    assert all(len(set(batch)) == groups for batch in iterations)
    stream = [index for batch in iterations for index in batch]
    epochs = [stream[i:i + num_prompts] for i in range(0, len(stream) - num_prompts + 1, num_prompts)]
    assert all(Counter(epoch) == Counter(range(num_prompts)) for epoch in epochs)


def test_shuffles_depend_on_seed_and_epoch_only() -> None:
    a, b, c = (GroupSampler(50, 50, seed) for seed in (0, 0, 1))
    first, second = a.next(), a.next()
    assert first != second
    assert [b.next(), b.next()] == [first, second]
    assert c.next() != first


def test_state_survives_json_and_continues_in_the_middle_of_an_epoch() -> None:
    sampler = GroupSampler(11, 4, seed=3)
    for _ in range(3):
        sampler.next()
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = [sampler.next() for _ in range(9)]
    resumed = GroupSampler(11, 4, seed=3)
    resumed.load_state_dict(state)
    assert [resumed.next() for _ in range(9)] == expected


def test_state_of_another_run_is_refused() -> None:
    state = GroupSampler(11, 4, seed=3).state_dict()
    with pytest.raises(ValueError, match="num_prompts 11, this run has 12"):
        GroupSampler(12, 4, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"train\.groups=2"):
        GroupSampler(2, 4, seed=0)
