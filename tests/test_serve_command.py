"""``visalign serve-reward`` as a process of its own: in an environment without model libraries, with a token, to the end of its queue."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from visalign.cli import app
from visalign.plugins import load_reward
from visalign.rewards.remote.rewards import Remote
from visalign.types import Media, Prompt

ROOT = Path(__file__).parents[1]
# What `pip install --no-deps visalign` does not bring; none of it may be needed to serve a reward that does not.
ABSENT = ("accelerate", "datasets", "diffusers", "httpx", "huggingface_hub", "matplotlib", "open_clip", "peft", "soundfile", "timm",
          "tokenizers", "torchvision", "transformers")
SCORES = """
import time
from pathlib import Path


def level(media, prompts, folder="."):
    (Path(folder) / "entered").touch()
    while not (Path(folder) / "gate").exists():
        time.sleep(0.01)
    return [float(one.data.float().mean()) for one in media]
"""


class Server:
    """The command, its address read from its first line."""

    def __init__(self, folder: Path, *words: str, absent: tuple[str, ...] = (), **environment: str) -> None:
        (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n", encoding="utf-8")
        path = os.pathsep.join([str(folder), str(ROOT)])
        self.process = subprocess.Popen([sys.executable, "-m", "visalign", "serve-reward", "--port", "0", *words], cwd=folder, text=True,
                                        env={**os.environ, "PYTHONPATH": path, "NO_COLOR": "1", **environment}, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()
        found = re.search(r"http://\S+", self.said)
        assert found, self.said
        self.url = found[0]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.wait()


def image(level: int) -> Media:
    return Media("image", torch.full((3, 4, 4), level, dtype=torch.uint8))


def test_a_server_starts_without_model_libraries_and_gives_the_same_scores(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("rewards: [{name: jpeg_compressibility}, {name: captions}, {name: 'scores.py:level'}]\n"
                                          "server: {max_batch: 3}\n", encoding="utf-8")
    (tmp_path / "scores.py").write_text(SCORES, encoding="utf-8")
    (tmp_path / "gate").touch()
    media, prompts = [image(level) for level in (1, 2, 3, 4)], [Prompt("a red circle")] * 4
    with Server(tmp_path, "server.yaml", absent=ABSENT) as server:
        assert "jpeg_compressibility (image and video), captions (image), level (image)" in server.said
        for name in ("jpeg_compressibility", "captions"):
            expected = load_reward(name).score(media, prompts, [0] * 4)
            assert torch.equal(Remote(server.url, name).score(media, prompts, [0] * 4).value, expected.value)
        assert Remote(server.url, "level").score(media, prompts, [0] * 4).value.tolist() == [1, 2, 3, 4]
        assert json.loads(urllib.request.urlopen(f"{server.url}/v1/spec").read())["limits"]["max_batch"] == 3


def test_a_reward_that_needs_more_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['open_clip'] = None\n", encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    found = subprocess.run([sys.executable, "-m", "visalign", "serve-reward", "-r", "clip"], env={**os.environ, "PYTHONPATH": path},
                           cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "reward 'clip' needs the module 'open_clip', which is not installed" in " ".join(found.stderr.split())


def test_a_stopped_server_answers_what_it_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM while a call is under way; the token comes from the environment on both sides."""
    (tmp_path / "scores.py").write_text(SCORES, encoding="utf-8")
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    with Server(tmp_path, "-r", "{name: 'scores.py:level', params: {folder: .}}", "--token-env", "REWARD_TOKEN") as server:
        assert "with a token" in server.said
        remote, found = Remote(server.url, "level", token_env="REWARD_TOKEN", retries=0), []
        thread = threading.Thread(target=lambda: found.append(remote.score([image(1)], [Prompt("a")], [0])))
        thread.start()
        pause = threading.Event()
        while not (tmp_path / "entered").exists():
            pause.wait(0.01)
        server.process.send_signal(signal.SIGTERM)
        (tmp_path / "gate").touch()
        thread.join()
        server.process.wait(60)
    assert found[0].value.tolist() == [1]


@pytest.mark.parametrize(("words", "message"), [
    ((), "which rewards?"), (("-r", "jpeg_compressibility", "--host", "0.0.0.0"), "reached by other machines; give --token-env"),
    (("-r", "jpeg_compressibility", "--token-env", "NO_SUCH_TOKEN"), "NO_SUCH_TOKEN is empty"), (("-r", "jpg"), "unknown reward 'jpg'"),
    (("-r", "jpeg_compressibility", "--port", "70000"), "less than or equal to 65535"), (("nowhere.yaml",), "no such file"),
    (("-r", "jpeg_compressibility", "--max-batch", "0"), "greater than or equal to 1"),
    (("-r", "{name: vendi, params: {encoder: 'tests.test_serve_command:encode'}}",), "judges whole sets"),
    (("-r", "jpeg_compressibility", "--host", "no.such.host.invalid"), "give --token-env"),
])
def test_what_cannot_be_served_is_said_at_once(words: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["serve-reward", *words], env={"COLUMNS": "300"})
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.stderr.split())


def encode(media: list[Media]) -> torch.Tensor:
    return torch.stack([one.data.float().flatten()[:2] for one in media])


def test_a_taken_port_and_a_wrong_file_are_told(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("rewards: [{name: jpeg_compressibility}]\nserver: {max_btach: 3}\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["serve-reward", str(tmp_path / "server.yaml")], env={"COLUMNS": "300"})
    assert (result.exit_code, "did you mean 'max_batch'?" in result.stderr) == (2, True)
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve-reward", "-r", "jpeg_compressibility", "--port", port], env={"COLUMNS": "300"})
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr
