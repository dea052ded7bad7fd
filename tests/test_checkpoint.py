"""Checkpoints appear whole or not at all, are read back bit for bit, and a run killed at any moment continues as if it had not been."""

import errno
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from tests import gaussian_run
from visalign import checkpoint
from visalign.checkpoint import CheckpointError, PickleRefusedError

SCRIPT = Path(gaussian_run.__file__)
TENSORS = {"weights": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.bfloat16)}}


def save(root, iteration, keep=10, score=None, tensors=TENSORS):
    return checkpoint.save(root, iteration, tensors, {"note": iteration}, keep=keep, score=score)


def test_round_trip_is_bit_exact(tmp_path):
    base = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    tensors = {"weights": {"x": base.t(), "tied": base[0], "scalar": torch.tensor(3)}}  # views and shared storage
    found = checkpoint.load(save(tmp_path, 7, tensors=tensors))
    assert found.state == {"note": 7, "iteration": 7}
    for name, tensor in tensors["weights"].items():
        assert torch.equal(found.tensors["weights"][name], tensor)
        assert found.tensors["weights"][name].dtype == tensor.dtype
    assert found.tensors["weights"]["scalar"].shape == ()


def test_keeps_the_last_and_the_best(tmp_path):
    for iteration, score in enumerate([0.1, 0.9, 0.3, 0.2, None], start=1):
        save(tmp_path, iteration, keep=2, score=score)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000002", "000004", "000005"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing", "no manifest", "manifest"])
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, caplog, damage):
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    weights = bad / "weights.safetensors"
    if damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(bytes(content))
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-3])
    elif damage == "missing":
        weights.unlink()
    elif damage == "no manifest":
        (bad / "manifest.json").unlink()
    else:
        (bad / "manifest.json").write_text('{"files": ')
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == good
    assert "000002" in caplog.text
    with pytest.raises(CheckpointError):
        checkpoint.load(bad)


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    path = save(tmp_path / "root", 1)
    (tmp_path / "root" / "other.json").write_text("{}")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../other.json"] = {"sha256": checkpoint._sha256(tmp_path / "root" / "other.json"), "bytes": 2}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"\.\./other"):
        checkpoint.load(path)


def test_a_pickle_is_refused_not_read(tmp_path):
    path = save(tmp_path, 1)
    torch.save({"x": 1}, path / "optimizer.pt")
    with pytest.raises(PickleRefusedError, match=r"optimizer\.pt.*never opens pickles"):
        checkpoint.latest(tmp_path)
    with pytest.raises(PickleRefusedError):
        checkpoint.load(path)


def test_state_that_is_not_json_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        checkpoint.save(tmp_path, 1, TENSORS, {"loss": float("nan")}, keep=1)
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Disk quota exceeded"),
    # As safetensors words it, seen on a full tmpfs.
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")])
@pytest.mark.parametrize("where", ["save_file", "_sync"])
def test_a_full_disk_says_what_to_do_and_keeps_the_last_good_one(tmp_path, monkeypatch, error, where):
    good = save(tmp_path, 1, keep=1)

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(checkpoint, where, full)
    with pytest.raises(CheckpointError, match=rf"no space left.*Free space.*{good.name}"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    assert checkpoint.load(good).state["note"] == 1


def test_other_errors_are_not_called_a_full_disk(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(PermissionError):
        save(tmp_path, 1)


def test_optimizer_state_survives_bit_for_bit():
    def make():
        generator = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(3, 2, generator=generator)), torch.nn.Parameter(torch.randn(5, generator=generator))]
        return weights, torch.optim.AdamW(weights, lr=0.1, betas=(0.8, 0.95), weight_decay=0.1)

    def step(weights, optimizer):
        sum(((w - 1) ** 4).sum() for w in weights).backward()
        optimizer.step()
        optimizer.zero_grad()

    weights, optimizer = make()
    for _ in range(3):
        step(weights, optimizer)
    tensors, state = checkpoint.flatten_optimizer(optimizer)
    tensors, state = {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(state))
    others, other = make()
    with torch.no_grad():
        for mine, theirs in zip(others, weights, strict=True):
            mine.copy_(theirs)
    checkpoint.restore_optimizer(other, tensors, state)
    for _ in range(3):
        step(weights, optimizer)
        step(others, other)
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


def test_generators_continue_where_they_were():
    checkpoint.seed_everything(3)
    random.gauss(0, 1)  # leaves a cached second value behind, as numpy's does
    np.random.randn()
    tensors, state = checkpoint.rng_state()
    tensors, state = {k: v.clone() for k, v in tensors.items()}, json.loads(json.dumps(state))

    def draw():
        return [*torch.rand(3).tolist(), *np.random.randn(3), random.random(), random.gauss(0, 1)]

    first = draw()
    assert draw() != first
    checkpoint.restore_rng(tensors, state)
    assert draw() == first


def test_a_log_is_cut_back_but_never_invented(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("one\ntwo\nthr")
    checkpoint.truncate(log, 4)
    assert log.read_text() == "one\n"
    with pytest.raises(CheckpointError, match="has 4 bytes, but had 8"):
        checkpoint.truncate(log, 8)


# --- kill -9 ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    gaussian_run.go(folder, gaussian_run.config(), reward=gaussian_run.drawn)
    return folder


def assert_same_run(one, two):
    """Equal manifests are equal sha256 of every file: weights, optimizer, EMA, generators and all numbers of the state."""
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    for name in ("000005", "000006"):
        assert (one / "checkpoints" / name / "manifest.json").read_text() == (two / "checkpoints" / name / "manifest.json").read_text()
    for name in ("before.json", "iteration-000004.json", "after.json"):
        assert (one / "evaluations" / name).read_text() == (two / "evaluations" / name).read_text()


def killed_run(folder, moment, count):
    """Run in a child process until it kills itself with SIGKILL; if something else ends it, the assertion's message says what.

    Not in a fork of this process: autograd refuses to work in the fork of a process in which it has threads, and it has them wherever
    there is a GPU, or where its first backward pass came after torch had pretended one (FakeTensorMode: ``torch.compile``, ``opcheck``).
    The children are forks of a server that only imports.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([gaussian_run.__name__])
    message = folder.with_name("child.txt")
    child = context.Process(target=gaussian_run.go_until_killed, args=(folder, moment, count, message))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL, message.read_text() if message.exists() else f"ended with {child.exitcode}, without a word"


FILES = 5  # hashed per checkpoint: weights, optimizer, ema, rng, state


@pytest.mark.parametrize(("moment", "count"), [
    ("evaluate", 1), ("collect", 1), ("backward", 1), ("collect", 4), ("backward", 6), ("evaluate", 3), ("logged", 1), ("logged", 4),
    ("writing", 1), ("writing", 3 * FILES + 2), ("written", 3 * 8 + 1), ("written", 3 * 8 + 8), ("pruning", 4), ("logged", 6)])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, uninterrupted, moment, count):
    killed_run(tmp_path / "run", moment, count)
    gaussian_run.go(tmp_path / "run", gaussian_run.config(), resume=True, reward=gaussian_run.drawn)
    assert_same_run(tmp_path / "run", uninterrupted)
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))


def test_a_process_killed_from_outside_and_twice(tmp_path, uninterrupted):
    """Another interpreter, killed by its parent without warning, resumed, killed again, resumed."""
    folder = tmp_path / "run"
    command = [sys.executable, str(SCRIPT), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    for lines, extra in ((3, []), (5, ["--resume"])):
        process = subprocess.Popen(command + extra, env=environment)
        log = folder / "metrics.jsonl"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= lines):
            time.sleep(0.001)
        process.kill()
        process.wait()
    gaussian_run.go(folder, gaussian_run.config(), resume=True, reward=gaussian_run.drawn)
    assert_same_run(folder, uninterrupted)


def test_resume_falls_back_to_the_checkpoint_before_a_damaged_one(tmp_path, uninterrupted, caplog):
    killed_run(tmp_path / "run", "collect", 5)
    weights = tmp_path / "run" / "checkpoints" / "000004" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        gaussian_run.go(tmp_path / "run", gaussian_run.config(), resume=True, reward=gaussian_run.drawn)
    assert "skipping" in caplog.text
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, uninterrupted):
    with pytest.raises(ValueError, match="--resume"):
        gaussian_run.go(uninterrupted, gaussian_run.config())
    with pytest.raises(ValueError, match=r"written with groups 2, this run has 4"):
        gaussian_run.go(uninterrupted, gaussian_run.config("train.groups=4"), resume=True)
