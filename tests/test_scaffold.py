from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from optkit.authoring import scaffold
from optkit.authoring.conformance import check_class
from optkit.authoring.scaffold import new_pass, new_target
from optkit.errors import InputError
from optkit.pipeline import Pass
from optkit.plugins import pass_names
from optkit.target import load_target, target_names
from optkit.testing import check_golden, read_golden

Make = Callable[[str, Path], list[Path]]
LONG = "replace-every-division-by-powers-of-two0"  # as long as a name may be


def load_pass(folder: Path, package: str, class_name: str) -> type[Pass]:
    spec = importlib.util.spec_from_file_location(package, folder / "src" / package / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[package] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[package]
    found = getattr(module, class_name)
    assert isinstance(found, type)
    assert issubclass(found, Pass)
    return found


def install(folder: Path, site: Path) -> dict[str, str]:
    """Declare the plugin's entry points as an installer does, and return an environment that finds it."""
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "src"), str(site)])}


def execute(folder: Path, environment: dict[str, str], *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_pass_is_complete(tmp_path: Path) -> None:
    files = new_pass("turn-division", tmp_path)
    assert files == sorted(file for file in (tmp_path / "turn-division").rglob("*") if file.is_file())
    assert {str(file.relative_to(tmp_path / "turn-division")) for file in files} == {
        "README.md",
        "pyproject.toml",
        "src/turn_division/__init__.py",
        "src/turn_division/py.typed",
        "tests/golden.txt",
        "tests/test_golden.py",
    }
    project = tomllib.loads((tmp_path / "turn-division" / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["optkit.passes"] == {"turn-division": "turn_division:TurnDivision"}
    assert [path.name for path in tmp_path.iterdir()] == ["turn-division"]


def test_a_new_pass_has_the_name_it_is_registered_under(tmp_path: Path) -> None:
    new_pass("scale-x4-blocks", tmp_path)
    cls = load_pass(tmp_path / "scale-x4-blocks", "scale_x4_blocks", "ScaleX4Blocks")
    assert cls.name() == "scale-x4-blocks"


def test_a_new_pass_agrees_with_its_golden_file(tmp_path: Path) -> None:
    new_pass("turn-division", tmp_path)
    cls = load_pass(tmp_path / "turn-division", "turn_division", "TurnDivision")
    cases = read_golden(tmp_path / "turn-division" / "tests" / "golden.txt")
    assert len(cases) == 6
    for case in cases:
        check_golden(case, cls)


def test_a_new_pass_conforms(tmp_path: Path) -> None:
    new_pass("turn-division", tmp_path)
    results = check_class(load_pass(tmp_path / "turn-division", "turn_division", "TurnDivision"))
    assert {result.check: result.problem for result in results if result.problem} == {}
    assert "loop-body" in results[-1].detail


@pytest.mark.slow
def test_a_new_pass_passes_its_own_tests(tmp_path: Path) -> None:
    new_pass("turn-division", tmp_path)
    folder = tmp_path / "turn-division"
    output = execute(folder, install(folder, tmp_path / "site"), "pytest", "-q", "-p", "no:cacheprovider")
    assert "7 passed" in output


@pytest.mark.slow
def test_a_new_target_passes_its_own_tests(tmp_path: Path) -> None:
    new_target("my-board", tmp_path)
    folder = tmp_path / "my-board"
    output = execute(folder, install(folder, tmp_path / "site"), "pytest", "-q", "-p", "no:cacheprovider")
    assert "2 passed" in output


@pytest.mark.parametrize("make", [new_pass, new_target])
def test_what_is_generated_is_formatted(make: Make, tmp_path: Path) -> None:
    for name in ("a", LONG):
        make(name, tmp_path)
        execute(tmp_path / name, dict(os.environ), "ruff", "check", "--no-cache", ".")
        execute(tmp_path / name, dict(os.environ), "ruff", "format", "--no-cache", "--check", ".")


@pytest.mark.slow
@pytest.mark.parametrize("make", [new_pass, new_target])
def test_what_is_generated_is_typed(make: Make, tmp_path: Path) -> None:
    make("turn-division", tmp_path)
    folder = tmp_path / "turn-division"
    environment = {**os.environ, "MYPYPATH": "src"}
    execute(folder, environment, "mypy", "--cache-dir", str(tmp_path / "cache"), "src", "tests")


def test_a_new_target_loads_with_a_source_for_every_number(tmp_path: Path) -> None:
    new_target("my-board", tmp_path)
    target = load_target(str(tmp_path / "my-board" / "src" / "my_board" / "my-board.toml"))
    base = load_target(next(name for name in target_names() if not load_target(name).detect))
    assert target.name == "my-board"
    assert (target.clock_hz.value, target.cores.value) == (base.clock_hz.value, base.cores.value)
    assert target.memory.keys() == base.memory.keys()
    assert target.precisions.keys() == base.precisions.keys()
    assert target.activations == base.activations
    numbers = [target.clock_hz, target.cores, *target.macs_per_cycle.values()]
    numbers += [level.bytes_per_second for level in target.memory.values() if level.bytes_per_second is not None]
    for number in numbers:
        assert number.status == "unverified"
        assert number.source.startswith(f"copied from '{base.name}': ")


@pytest.mark.parametrize("name", ["", "FuseGelu", "fuse_gelu", "fuse--gelu", "-fuse", "fuse-2d", "../fuse", "f" * 41])
def test_a_pass_name_must_be_kebab_case(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        new_pass(name, tmp_path)
    assert str(caught.value) == (
        f"'{name}' is not a name for a pass; write at most 40 lower-case letters and digits, words joined by '-', "
        "such as 'fuse-swish'"
    )
    assert not list(tmp_path.iterdir())


def test_a_target_name_must_be_kebab_case(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^'My Board' is not a name for a target; write at most 40 lower-case"):
        new_target("My Board", tmp_path)


def test_a_registered_name_is_taken(tmp_path: Path) -> None:
    name = pass_names()[0]
    with pytest.raises(InputError, match=f"^the pass '{name}' exists already; 'optkit passes' lists the names that"):
        new_pass(name, tmp_path)
    name = next(iter(target_names()))
    with pytest.raises(InputError, match=f"^the target '{name}' exists already; 'optkit targets' lists the names"):
        new_target(name, tmp_path)


@pytest.mark.parametrize("name", ["json", "numpy", "class"])
def test_a_python_name_is_taken(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        new_pass(name, tmp_path)
    assert str(caught.value) == (
        f"the pass '{name}' would be the Python package '{name}', and that name is taken; choose another name"
    )


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "turn-division").mkdir()
    with pytest.raises(
        InputError, match=r"turn-division: it exists already; remove it, or choose another name or --into"
    ):
        new_pass("turn-division", tmp_path)
    assert not list((tmp_path / "turn-division").iterdir())


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"turn-division: cannot be written: "):
        new_pass("turn-division", tmp_path / "file")


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(InputError, match=r"turn-division: cannot be written: No space left on device$"):
        new_pass("turn-division", tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_target_there_is_nothing_to_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaffold, "target_names", dict)
    with pytest.raises(InputError, match=r"^no target is installed that a new one could start from; reinstall optkit$"):
        new_target("my-board", tmp_path)
    assert not list(tmp_path.iterdir())
