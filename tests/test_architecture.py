"""Who may import whom, read from the syntax tree: the core knows no leaf, leaves do not know each other, there are no cycles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = ("visalign.algorithms", "visalign.samplers", "visalign.rewards")
# The only places where leaves meet: the command line and the builder.
ROOTS = ("visalign.build", "visalign.build_algorithm", "visalign.cli", "visalign.cli_app", "visalign.cli_runs", "visalign.cli_rewards",
         "visalign.commands", "visalign.quickstart", "visalign.__main__")


def sources() -> dict[str, Path]:
    """Module name -> file, following the package's links."""
    files = {}
    for path in sorted((ROOT / "visalign").rglob("*.py", **({"recurse_symlinks": True} if sys.version_info >= (3, 13) else {}))):
        files[name_of(path.relative_to(ROOT))] = path
    for folder in ("rewards", "samplers", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            files[name_of(Path("visalign") / path.relative_to(ROOT))] = path
    return files


def name_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(name: str, path: Path, static_only: bool = True) -> set[str]:
    """Modules of this package that a module imports: at import time, or anywhere in it."""
    tree, known, found = ast.parse(path.read_text(encoding="utf-8")), MODULES, set()
    typing_only = {id(node) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
                   for node in ast.walk(block)}
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
              for node in ast.walk(function)}
    for node in ast.walk(tree):
        if id(node) in typing_only or (static_only and id(node) in inside):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively; write the full name"
            base = node.module or ""
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base for alias in node.names}
    return {module for module in found if module.partition(".")[0] in ("visalign", "rewards", "samplers", "configs")}


MODULES = sources()


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def leaf_of(name: str) -> str | None:
    return next((leaf for leaf in LEAVES if inside(name, leaf)), None)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_the_right_way(name: str) -> None:
    for target in imports(name, MODULES[name]):
        assert inside(target, "visalign"), f"{name} imports {target}: import visalign.{target}"
        if inside(name, *ROOTS):
            continue
        assert not inside(target, *ROOTS), f"{name} imports {target}, which stands above it"
        if leaf_of(name) is None:
            assert leaf_of(target) is None, f"{name} is core and imports the leaf {target}"
        else:
            assert leaf_of(target) in (None, leaf_of(name)), f"the leaves {name} and {target} know each other"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if inside(name, "visalign.maths", "visalign.types", "visalign.protocols")))
def test_the_bottom_knows_only_itself(name: str) -> None:
    allowed = {"visalign.types": (), "visalign.protocols": ("visalign.types",)}
    below = allowed.get(name, ("visalign.maths", "visalign.types", "visalign.protocols"))
    for target in imports(name, MODULES[name], static_only=False):
        assert inside(target, *below), f"{name} imports {target}"


@pytest.mark.parametrize("name", sorted(name for name in MODULES if inside(name, "visalign.kernels")))
def test_operators_stand_on_the_bottom_alone(name: str) -> None:
    for target in imports(name, MODULES[name], static_only=False):
        assert inside(target, "visalign.kernels", "visalign.maths", "visalign.types", "visalign.protocols"), f"{name} imports {target}"


def test_there_are_no_import_cycles() -> None:
    graph = {name: {target for target in imports(name, path) if target in MODULES and target != name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name):], name])}"
        if name not in done:
            for target in graph[name]:
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("folder", ["rewards", "samplers"])
def test_the_top_level_folders_cannot_be_imported_twice(folder: str) -> None:
    found = subprocess.run([sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert f"import visalign.{folder}" in found.stderr


@pytest.mark.parametrize("folder", ["rewards", "samplers", "configs"])
def test_the_package_links_to_the_top_level_folders(folder: str) -> None:
    link = ROOT / "visalign" / folder
    if not link.is_symlink():
        pytest.skip("an unpacked archive holds copies")
    assert not Path(link.readlink()).is_absolute()
    assert link.resolve() == (ROOT / folder).resolve()


def test_importing_the_command_line_is_quick_and_loads_no_model_library() -> None:
    code = "import sys, visalign.cli; print(sorted({'torch', 'diffusers', 'transformers', 'open_clip'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
