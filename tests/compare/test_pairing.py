"""Jobs, their seeds, folders that are aligned or refuse to be, and folders that grow."""

import json
import re

import pytest
import torch

from visalign.compare.pairing import SETTINGS, Job, SampleFolder, chosen, jobs_in, jobs_of, matched, read_samples
from visalign.media import INDEX, Sample, read_index, save_media, save_samples
from visalign.types import Media, Prompt

A, B = Prompt("a"), Prompt("b", metadata={"tag": "colors"})


def picture(level):
    return Media("image", torch.full((3, 4, 4), level, dtype=torch.uint8))


def folder(path, jobs):
    save_samples(path, [picture(k) for k in range(len(jobs))], [prompt for prompt, _ in jobs], [seed for _, seed in jobs])
    return read_samples(path)


def draw(prompt, seed):
    return picture(10 * (prompt.text == "b") + seed)


def test_a_prompt_that_comes_again_has_the_next_seeds():
    jobs = jobs_of([A, B, A, A], [2, 3, 5])
    assert [(job.prompt.text, job.seed) for job in jobs] == [
        *(("a", s) for s in (2, 3, 5)), *(("b", s) for s in (2, 3, 5)), *(("a", s) for s in (6, 7, 9)), *(("a", s) for s in (10, 11, 13))]
    assert len({job.key for job in jobs}) == len(jobs)


def test_prompts_differ_by_everything_they_hold():
    variants = [A, Prompt("a", negative="x"), Prompt("a", images=("i.png",)), Prompt("a", metadata={"tag": 1})]
    assert len({Job(prompt, 0).key for prompt in variants}) == len(variants)


def test_order_and_folder_do_not_matter_to_what_belongs_together(tmp_path):
    jobs = jobs_in(folder(tmp_path / "model", [(A, 0), (A, 1), (B, 0), (B, 1)]))
    base = folder(tmp_path / "base", [(B, 1), (A, 0), (B, 0), (A, 1)])
    found = matched(jobs, base, "base", exactly=True)
    assert [(one.prompt, one.seed) for one in found] == [(A, 0), (A, 1), (B, 0), (B, 1)]
    assert [one.file.name for one in found] == ["0001.png", "0003.png", "0002.png", "0000.png"]


@pytest.mark.parametrize(("held", "problem"), [
    ([(A, 0), (B, 0)], "base has no sample 1: prompt 'a' with seed 1; it has seeds 0 for that prompt"),
    ([(A, 0), (A, 1)], "base has no sample 2: prompt 'b' with seed 0"),
    ([(A, 0), (A, 1), (Prompt("b"), 0)], "its prompt of that text has metadata {} instead of {'tag': 'colors'}"),
    ([(A, 0), (A, 1), (B, 0), (B, 7)], "base alone has prompt 'b' with seed 7 (1 samples in all)")])
def test_the_first_difference_is_named(held, problem, tmp_path):
    jobs = [Job(A, 0), Job(A, 1), Job(B, 0)]
    with pytest.raises(ValueError, match=re.escape(problem)):
        matched(jobs, folder(tmp_path, held), "base", exactly=True)


def test_more_than_was_asked_for_is_fine_where_somebody_asked(tmp_path):
    held = folder(tmp_path, [(A, 0), (A, 1), (B, 0), (B, 1)])
    jobs = chosen(jobs_in(held), [B], [1])
    assert [(job.prompt, job.seed) for job in jobs] == [(B, 1)]
    assert matched(jobs, held, "base", exactly=False)[0].file.name == "0003.png"


def test_samples_of_unknown_seeds_are_told_apart_by_their_number(tmp_path):
    held = [Sample(tmp_path / f"{k}.png", A) for k in range(3)]
    assert [(job.seed, job.number) for job in jobs_in(held)] == [(None, 0), (None, 1), (None, 2)]
    assert matched(jobs_in(held), held, "base", exactly=True) == held


def test_files_named_by_prompt_and_number_need_no_index(tmp_path):
    for name in ("0_0", "0_1", "1_0", "10_0"):
        save_media(picture(1), tmp_path / name)
    prompts = [Prompt(f"p{k}") for k in range(11)]
    found = read_samples(tmp_path, prompts)
    assert [(one.prompt.text, one.seed) for one in found] == [("p0", 0), ("p0", 1), ("p1", 0), ("p10", 0)]
    with pytest.raises(ValueError, match="files of prompt 10, but there are 10 prompts"):
        read_samples(tmp_path, prompts[:10])
    with pytest.raises(ValueError, match="name the files"):
        read_samples(tmp_path)
    save_media(picture(1), tmp_path / "cat")
    with pytest.raises(ValueError, match="name the files"):
        read_samples(tmp_path, prompts)


def test_prompts_given_beside_a_folder_bring_its_missing_metadata(tmp_path):
    folder(tmp_path, [(A, 0), (Prompt("b"), 0)])
    assert [one.prompt for one in read_samples(tmp_path, [B])] == [A, B]
    other = Prompt("b", metadata={"tag": "position"})
    folder(tmp_path / "own", [(other, 0)])
    assert read_samples(tmp_path / "own", [B])[0].prompt == other  # what the folder says is not overruled, and will not match


def test_a_folder_grows_and_is_found_again(tmp_path):
    jobs = jobs_of([A, B], [0, 1])
    first = SampleFolder(tmp_path, {"model": "m"})
    first.fill(jobs[:3], draw)
    again = SampleFolder(tmp_path, {"model": "m"})
    assert [job.key for job in again.missing(jobs)] == [jobs[3].key]
    before = {one.file.name: one.file.stat().st_mtime_ns for one in again.samples()}
    again.fill(again.missing(jobs), draw)
    assert again.missing(jobs) == []
    assert {one.file.name: one.file.stat().st_mtime_ns for one in again.samples()[:3]} == before
    assert [(one.prompt.text, one.seed) for one in again.samples()] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    more = jobs_of([A, B], [0, 1, 2])  # later more is asked for
    assert [(job.prompt.text, job.seed) for job in again.missing(more)] == [("a", 2), ("b", 2)]


@pytest.mark.parametrize("moment", ["within the row", "within the file"])
def test_what_a_killed_writer_left_is_made_again(moment, tmp_path):
    jobs = jobs_of([A], [0, 1, 2])
    kept = SampleFolder(tmp_path, {"model": "m"})
    kept.fill(jobs[:2], draw)
    if moment == "within the row":
        with (tmp_path / INDEX).open("a") as file:
            file.write('{"file": "00002.png", "pro')
    else:
        (tmp_path / "00002.png").write_bytes(b"\x89PNG")
    again = SampleFolder(tmp_path, {"model": "m"})
    assert [job.seed for job in again.missing(jobs)] == [2]
    again.fill(again.missing(jobs), draw)
    assert [(one.file.name, one.seed) for one in read_index(tmp_path)] == [("00000.png", 0), ("00001.png", 1), ("00002.png", 2)]


def test_a_file_that_is_gone_is_made_again(tmp_path):
    jobs = jobs_of([A], [0, 1])
    kept = SampleFolder(tmp_path, {"model": "m"})
    kept.fill(jobs, draw)
    (tmp_path / "00000.png").unlink()
    assert [job.seed for job in kept.missing(jobs)] == [0]
    kept.fill(kept.missing(jobs), draw)
    assert kept.missing(jobs) == []


def test_samples_of_something_else_are_not_continued(tmp_path):
    SampleFolder(tmp_path, {"model": "m", "call": {"steps": 4}}).fill(jobs_of([A], [0]), draw)
    with pytest.raises(ValueError, match=r"samples of other settings \(call: {'steps': 4} there, {'steps': 8} now\)"):
        SampleFolder(tmp_path, {"model": "m", "call": {"steps": 8}})
    (tmp_path / SETTINGS).unlink()
    with pytest.raises(ValueError, match=r"holds samples but no sampled\.json"):
        SampleFolder(tmp_path, {"model": "m"})


def test_a_job_without_a_seed_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="prompt 'a' has no seed to draw from"):
        SampleFolder(tmp_path, {}).fill([Job(A, None)], draw)


def test_texts_with_line_separators_stay_one_row(tmp_path):
    """JSON leaves U+2028 and U+0085 as they are, and splitlines would cut there."""
    odd = Prompt("two\u2028lines\x85of text")
    SampleFolder(tmp_path, {}).fill(jobs_of([odd], [0]), draw)
    assert [one.prompt for one in SampleFolder(tmp_path, {}).samples()] == [odd]
    assert [one.prompt for one in read_index(tmp_path)] == [odd]
    assert json.loads((tmp_path / INDEX).read_text(encoding="utf-8"))["prompt"] == odd.text
