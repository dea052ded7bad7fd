"""The package as it is shipped: an sdist holds everything, and the wheel built from it runs outside the checkout."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*words: str, cwd: Path) -> str:
    found = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """sdist of this tree, and the wheel built from the unpacked sdist."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    # From a copy without build leftovers, so that nothing stale is packed and nothing is written into the checkout.
    tree = tmp_path_factory.mktemp("tree") / "visalign"
    run("git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(tree), cwd=ROOT)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree), cwd=out)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="builds from a git checkout")
class TestArchives:
    def test_sdist_has_sources_tests_and_documents(self, archives: tuple[Path, Path]) -> None:
        with tarfile.open(archives[0]) as archive:
            names = {name.partition("/")[2] for name in archive.getnames()}
        for path in ("visalign/config.py", "rewards/clip.py", "samplers/capture.py", "configs/quickstart.yaml", "tests/test_packaging.py",
                     "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "visalign/py.typed"):
            assert path in names

    def test_wheel_has_the_linked_packages_and_data_and_nothing_else(self, archives: tuple[Path, Path]) -> None:
        names = zipfile.ZipFile(archives[1]).namelist()
        for path in ("visalign/rewards/clip.py", "visalign/samplers/capture.py", "visalign/configs/quickstart.yaml",
                     "visalign/report/style.css", "visalign/py.typed", "visalign/commands/plan.py", "visalign/kernels/elements.h",
                     "visalign/kernels/rows.cuh", "visalign/kernels/guided_step/guided_step.cu",
                     "visalign/rewards/scorers/environments/hpsv3.txt", "visalign/serving/app.py"):
            assert path in names
        assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"visalign"}

    def test_wheel_works_away_from_the_checkout(self, archives: tuple[Path, Path], tmp_path: Path) -> None:
        with zipfile.ZipFile(archives[1]) as wheel:
            wheel.extractall(tmp_path / "site")
        code = ("import sys; sys.path.insert(0, 'site')\n"
                "import visalign, visalign.rewards.jpeg, visalign.samplers.dynamics\n"
                "from visalign.config import load_config, recipe_names\n"
                "print(visalign.__file__, load_config('quickstart').model.path, len(recipe_names()))")
        file, path, count = run(sys.executable, "-I", "-c", code, cwd=tmp_path).split()
        assert Path(file).is_relative_to(tmp_path)
        assert path == "playground:pipeline"
        assert int(count) >= 8


def test_version_is_said_once() -> None:
    import visalign

    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in text
    assert visalign.__version__
    assert f"## {visalign.__version__.partition('.dev')[0]}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_extras_are_those_the_readme_and_errors_name() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in ("audio", "data", "ocr", "serve", "sim3d", "track", "video", "test", "dev"):
        assert f"\n{extra} = [" in text


def test_check_script_is_executable_bash() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    run("bash", "-n", str(script), cwd=ROOT)
