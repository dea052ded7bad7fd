"""Finding and making rewards by name, path and file. Everything found here is real code on a temporary import path."""

import sys
import textwrap

import pytest
import torch

from visalign.plugins import load_reward, reward_names
from visalign.protocols import Reward
from visalign.types import Media, Prompt

SOURCE = """
    from visalign.protocols import RewardSpec
    from visalign.types import Scores

    def mean_level(media, prompts, scale=1.0):
        return [scale * sample.data.float().mean().item() for sample in media]

    def strict_arguments(media, prompts, *, threshold):
        return [float(sample.data.float().mean() > threshold) for sample in media]

    class Constant:
        def __init__(self, constant, repeat=1):
            self.constant = constant * repeat
            self.spec = RewardSpec(name="constant")

        def score(self, media, prompts, group_id):
            return Scores.from_values([self.constant] * len(media))

    ready = Constant(3.0)
    number = 7

    class NotAReward:
        pass
"""
MEDIA = [Media("image", torch.full((3, 2, 2), value, dtype=torch.uint8)) for value in (10, 20)]


def raw(reward):
    return reward.score(MEDIA, [Prompt("a"), Prompt("a")], [0, 0]).raw.tolist()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``plug_pkg`` with ``scores.py`` on the import path, with an installed distribution's metadata beside it."""
    root = tmp_path / "plug_pkg"
    root.mkdir()
    (root / "__init__.py").write_text("")
    (root / "scores.py").write_text(textwrap.dedent(SOURCE))
    (root / "needs_more.py").write_text("import a_module_that_is_not_installed\nclass Heavy: pass\n")
    info = tmp_path / "plug_dist-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-dist\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[visalign.rewards]\nplugged = plug_pkg.scores:Constant\nheavy = plug_pkg.needs_more:Heavy [gpu]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield root
    for name in [name for name in sys.modules if name.partition(".")[0] == "plug_pkg"]:
        del sys.modules[name]


def test_builtin_names_resolve_without_loading_the_others():
    reward = load_reward("jpeg_compressibility", quality=80)
    assert isinstance(reward, Reward)
    assert reward.spec.direction == -1
    assert {"clip", "captions", "jpeg_incompressibility", "win_rate"} <= set(reward_names())


def test_every_builtin_name_has_an_importable_target():
    for point in reward_names().values():
        if point.dist is None:
            assert callable(point.load()), point


def test_entry_point(package):
    assert raw(load_reward("plugged", constant=2.0, repeat=2)) == [4, 4]


@pytest.mark.parametrize("target", ["plug_pkg.scores:Constant", "plug_pkg.scores.Constant"])
def test_dotted_path_to_a_class(package, target):
    assert raw(load_reward(target, constant=5)) == [5, 5]


def test_instance_is_returned_as_it_is(package):
    assert load_reward("plug_pkg.scores:ready") is sys.modules["plug_pkg.scores"].ready
    with pytest.raises(ValueError, match="unknown parameter 'constant'; it takes: no parameters"):
        load_reward("plug_pkg.scores:ready", constant=1)


def test_file_path_to_a_function_with_its_own_and_the_wrappers_parameters(package):
    reward = load_reward(f"{package / 'scores.py'}:mean_level", scale=0.5, direction=-1)
    assert raw(reward) == [5, 10]
    assert reward.spec.name == "mean_level"
    assert reward.score(MEDIA, [Prompt("a")] * 2, [0, 0]).value.tolist() == [-5, -10]
    assert raw(load_reward(f"{package / 'scores.py'}:mean_level", name="level")) == [10, 20]


def test_a_file_is_executed_once(package):
    path = package / "scores.py"
    first, second = load_reward(f"{path}:ready"), load_reward(f"{path}:ready")
    assert first is second


def test_nested_rewards_are_loaded_from_mappings(package):
    (package / "wrapping.py").write_text("def make(media, prompts, inner): return inner.score(media, prompts, [0, 0]).raw + 1\n")
    reward = load_reward("plug_pkg.wrapping:make", inner={"reward": "plug_pkg.scores:mean_level", "scale": 2.0})
    assert raw(reward) == [21, 41]


@pytest.mark.parametrize(("target", "params", "message"), [
    ("clop", {}, r"unknown reward 'clop', did you mean 'clip'\?; known: .*captions, clap, clip, .*path/to/file.py:attribute"),
    ("jpeg_compressibility", {"qualty": 3}, r"'qualty', did you mean 'quality'\?; it takes: quality=95, per_pixel=False"),
    ("plug_pkg.scores:Constant", {"repet": 1}, r"parameter 'repet', did you mean 'repeat'\?; missing parameter 'constant'"),
    ("plug_pkg.scores:mean_level", {"scal": 1}, r"unknown parameter 'scal', did you mean 'scale'\?.*direction"),
    ("plug_pkg.scores:strict_arguments", {}, r"missing parameter 'threshold'"),
    ("plug_pkg.scores:mean_levl", {}, r"no 'mean_levl', did you mean 'mean_level'\?; it defines: mean_level, strict_ar"),
    ("plug_pkg.nowhere:f", {}, r"no module 'plug_pkg.nowhere' on the import path"),
    ("plug_pkg.needs_more:Heavy", {}, r"needs the module 'a_module_that_.*, which is not installed: pip install 'plug_pkg'"),
    ("heavy", {}, r"'a_module_that_is_not_installed', which is not installed: pip install 'plug-dist\[gpu\]'"),
    ("nowhere.py:f", {}, r"no file .*nowhere.py"),
])
def test_errors_teach(package, target, params, message):
    with pytest.raises(ValueError, match=message):
        load_reward(target, **params)


def test_a_file_without_attribute_lists_what_it_defines(package):
    with pytest.raises(ValueError, match=r"Write FILE.py:NAME; it defines: mean_level, strict_arguments, Constant"):
        load_reward(str(package / "scores.py"))


@pytest.mark.parametrize("attribute", ["number", "NotAReward"])
def test_what_is_no_reward_is_a_type_error(package, attribute):
    with pytest.raises(TypeError, match=r"not a reward: it needs `spec`"):
        load_reward(f"plug_pkg.scores:{attribute}")


def test_a_failing_file_is_not_half_loaded(package):
    path = package / "broken.py"
    path.write_text("value = 1\nraise RuntimeError('at import')\n")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="at import"):
            load_reward(f"{path}:f")


def test_two_packages_cannot_claim_one_name(package):
    info = package.parent / "other_dist-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-dist\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[visalign.rewards]\nclip = other_pkg:Clip\n")
    with pytest.raises(ValueError, match=r"'clip' is claimed by other_pkg:Clip and by visalign.rewards.clip:ClipScore"):
        load_reward("clip")
