"""The layering and the house rules, read from the sources: who may import whom, who may know which names."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from optkit.pipeline import Effect, Pass
from optkit.plugins import pass_class, target_files

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"optkit": ROOT / "optkit", "optkit_passes": ROOT / "passes", "optkit_targets": ROOT / "targets"}
PASSES = sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["optkit.passes"])
MOST_LINES, MANY_LINES = 500, 400

# Makers, cores and tools of devices; the names of installed targets are added to them.
DEVICE_WORDS = {
    "adreno",
    "ane",
    "apple",
    "arm64",
    "coreml",
    "cortex",
    "hexagon",
    "htp",
    "iphone",
    "jetson",
    "mali",
    "neon",
}
DEVICE_WORDS |= {"ethos", "qemu", "qnn", "qualcomm", "raspberry", "rpi3", "rpi4", "rpi5", "snapdragon"}


def sources(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def python_files() -> list[Path]:
    folders = [*PACKAGES.values(), ROOT / "tests", ROOT / "examples", ROOT / "benchmarks"]
    return sorted(file for folder in folders if folder.is_dir() for file in folder.rglob("*.py"))


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Yield every module imported anywhere in a file, in functions too; relative imports stay in their package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def literals(tree: ast.Module) -> Iterator[str]:
    """Yield the strings of a file, docstrings left out."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


FORBIDDEN = {
    "optkit": {"optkit_passes", "optkit_targets"},
    "optkit_passes": {"optkit_targets"},
    "optkit_targets": {"optkit_passes"},
}


@pytest.mark.parametrize("package", PACKAGES)
def test_layers(package: str) -> None:
    found = {
        f"{relative(file)} imports {name}"
        for file in sources(package)
        for name in imports(parse(file))
        if name.partition(".")[0] in {*FORBIDDEN[package], "passes", "targets"}
    }
    assert found == set()


def test_the_layering_test_sees_every_way_to_import() -> None:
    tree = ast.parse(
        "import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\n"
        "def f():\n    from g.h import i\n    importlib.import_module('j.k')\n"
    )
    assert sorted(imports(tree)) == ["a.b", "c", "e", "g.h", "j.k"]


def test_the_core_names_no_pass_and_no_device() -> None:
    devices = {name for name in target_files() if name != "host"}
    names = {*PASSES} | devices | DEVICE_WORDS
    found = {
        f"{relative(file)}: {word!r} in {literal!r}"
        for file in sources("optkit")
        for literal in literals(parse(file))
        for word in names & {*re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", literal), *re.findall(r"[a-z0-9]+", literal)}
    }
    assert found == set()


def test_no_file_is_too_long() -> None:
    lengths = {relative(file): len(file.read_text(encoding="utf-8").splitlines()) for file in python_files()}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}
    long = {name: lines for name, lines in lengths.items() if lines > MANY_LINES}
    if long:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn(f"look hard at these, they pass {MANY_LINES} lines: {long}", stacklevel=1)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_docstring(package: str) -> None:
    without = [relative(file) for file in sources(package) if not ast.get_docstring(parse(file))]
    assert without == []


@pytest.mark.parametrize("package", PACKAGES)
def test_init_files_hold_public_names_only(package: str) -> None:
    """No class and no work in an ``__init__``: a docstring, imports, constants, and the lazy ``__getattr__``."""
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.If)
    for file in (file for file in sources(package) if file.name == "__init__.py"):
        for node in parse(file).body:
            lazy = isinstance(node, ast.FunctionDef) and node.name in ("__getattr__", "__dir__")
            entry = relative(file) == "optkit/cli/__init__.py" and isinstance(node, ast.FunctionDef)
            assert lazy or entry or isinstance(node, allowed), f"{relative(file)}:{node.lineno}"


def test_the_public_names_are_there_and_sorted() -> None:
    import optkit

    assert optkit.__all__ == sorted(optkit.__all__)
    for name in optkit.__all__:
        assert getattr(optkit, name) is not None
    with pytest.raises(AttributeError, match=r"^module 'optkit' has no attribute 'nonsense'$"):
        _ = optkit.nonsense


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return {name.partition(".")[0] for name in output.split()}


@pytest.mark.parametrize("statement", ["import optkit", "import optkit.errors", "import optkit.cli"])
def test_importing_is_light(statement: str) -> None:
    heavy = {"numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "pydantic", "ml_dtypes", "jinja2", "PIL"}
    assert loaded_by(statement) & heavy == set()


def test_plugins_are_listed_without_loading_them() -> None:
    assert (
        loaded_by("from optkit.plugins import pass_names; pass_names()") & {"onnx", "onnxruntime", "optkit_passes"}
        == set()
    )


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_says_what_it_does_and_how_far_it_moves_the_outputs(name: str) -> None:
    cls = pass_class(name)
    first = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
    assert first.endswith((".", "..."))
    assert cls.__doc__ != Pass.__doc__
    assert isinstance(cls.effect, Effect)
    for option in cls.model_fields:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", option)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_is_a_file_of_its_own_name_and_an_exact_one_has_a_golden_file(name: str) -> None:
    file = f"{name.replace('-', '_')}"
    cls = pass_class(name)
    assert Path(inspect.getsourcefile(cls) or "").name == f"{file}.py"
    assert cls.effect.kind == "lossy" or (ROOT / "tests" / "passes" / f"{file}.txt").is_file()


def test_nothing_of_this_project_knows_the_machine_it_was_made_on() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    texts = [ROOT / name for name in listed if Path(name).suffix in (".py", ".toml", ".md", ".txt", ".j2", ".yml", "")]
    home = re.compile(r"(?<![\w/])/(?:home|root|work|Users)/\w+")
    found = [
        relative(file)
        for file in texts
        if file.is_file() and file.name != Path(__file__).name and home.search(file.read_text(encoding="utf-8"))
    ]
    assert found == []
