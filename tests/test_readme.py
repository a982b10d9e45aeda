"""The README holds: its commands run, they print what it shows, its snippets work, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import optkit
from optkit.authoring.conformance import check_class
from optkit.errors import InputError
from optkit.model.loading import load, load_text, save
from optkit.pipeline import Context, Pipeline
from optkit.target import Target, load_target
from optkit_targets.coreml import toolkit
from optkit_targets.ort.packager import OrtPackager
from optkit_targets.qnn import runtime as qnn_runtime

EXTRAS = {"snapdragon-8gen3-npu": qnn_runtime.missing(), "apple-a17-ane": toolkit.missing()}  # what a target needs
ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str, str]] = re.findall(
    r"^(?:<!-- (\w+) -->\n)?```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL
)  # mark, language, text
MARKED = {mark: text for mark, _, text in BLOCKS if mark}
SESSIONS = [text for mark, _, text in BLOCKS if not mark and text.startswith("$ ")]


@dataclass(frozen=True)
class Step:
    """A command of a session, and the lines that the README shows below it."""

    words: list[str]
    shown: list[str]


def steps() -> list[Step]:
    """The command of the first block with the report shown after it, then every ``$ `` command in order."""
    compile_ = MARKED["example"].rpartition(" && ")[2].replace(".venv/bin/optkit", "optkit")
    report = next(text for _, _, text in BLOCKS if text.startswith("digits.onnx for "))
    found = [Step(shlex.split(compile_), report.splitlines())]
    for session in SESSIONS:
        for part in re.split(r"^\$ ", session, flags=re.MULTILINE)[1:]:
            command, _, shown = part.replace("\\\n", " ").partition("\n")
            words = shlex.split(re.split(r" {5,}(?=[a-z])", command)[0])
            found.append(Step(words, [line for line in shown.splitlines() if line]))
    return found


def shape(line: str) -> str:
    """A line without what may differ between machines and versions: figures, instruction sets, column widths."""
    line = re.sub(r"\(x86_64\)|\(aarch64\)|\(arm64\)", "(#)", line)
    return re.sub(r"\s+", " ", re.sub(r"-?\d[\d.]*(e[+-]?\d+)?|\binf\b", "#", line)).strip()


def optkit_(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optkit", *words[1:]]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with what the commands name: the examples, and a user's model, images and recipe."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    model = load(ROOT / "examples" / "digits" / "digits.onnx")
    next(node for node in model.graph if node.op_type == "Gemm").name = "/head/Gemm"
    save(model, tmp_path / "model.onnx")
    (tmp_path / "images").mkdir()
    with np.load(ROOT / "examples" / "digits" / "test.npz") as test:
        for number, image in enumerate(test["image"][:300]):
            np.save(tmp_path / "images" / f"{number:03}.npy", image)
        np.save(tmp_path / "images" / "labels.npy", test["labels"][:300])
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_tour_runs_and_prints_what_the_readme_shows(
    desk: Path, packager: OrtPackager, a53: Target
) -> None:
    emulated = packager.executors(a53)[0].kind == "emulated"
    ran = []
    for step in steps():
        if step.words[0] == "cat":
            (desk / step.words[1]).write_text("\n".join(step.shown))
            continue
        assert step.words[0] == "optkit"
        if any(name in step.words and lacks for name, lacks in EXTRAS.items()):
            continue
        done = optkit_(step.words, desk)
        assert done.returncode == 0, (step.words, done.stderr)
        ran.append(step.words[1])
        shown = [
            line
            for line in step.shown
            if line != "..." and (emulated or not re.search("under qemu|\\(emulated\\)", line))
        ]
        if step.words[1] == "diff":  # which tensors are the worst is the library's business
            shown = [shown[0], shown[-1]]
        printed = {shape(line) for line in (done.stdout + done.stderr).splitlines()}
        assert [line for line in shown if shape(line) not in printed] == [], done.stdout
    assert set(ran) == {"compile", "inspect", "check", "cost", "explain", "diff", "run", "verify"}


def test_the_commands_are_found() -> None:
    commands = [step.words[1] for step in steps() if step.words[0] == "optkit"]
    tour = ["compile", "inspect", "check", "cost", "explain", "diff", "run", "verify"]
    assert commands == [*tour, "compile", "compile", "compile"]
    assert [step.words for step in steps() if step.words[0] != "optkit"] == [["cat", "recipe.toml"]]


@pytest.mark.slow
def test_the_line_of_python_compiles(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = re.findall(r"`(report = optkit\.compile\(.*?\))`", README)
    monkeypatch.chdir(desk)
    names = {"optkit": optkit}
    exec(line, names)
    assert isinstance(names["report"], optkit.Report)
    assert (desk / "model-cortex-a53" / "manifest.json").is_file()


def test_there_are_two_commands_to_set_up() -> None:
    assert sorted(MARKED) == ["example", "test"]
    assert re.findall(r"<!-- (.*?) -->", README) == ["example", "test"]
    for command in MARKED.values():
        assert len(command.splitlines()) == 1
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert "pip install -q . && .venv/bin/optkit compile examples/digits/digits.onnx" in MARKED["example"]
    assert MARKED["test"].endswith(".venv/bin/pytest -n auto\n")


def test_ci_finds_the_command_for_the_tests() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    (inner,) = re.findall(r'^command=\$\((.*)\)\neval "\$command"$', script, flags=re.MULTILINE)
    found = subprocess.run(["bash", "-c", inner], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.strip() == MARKED["test"].strip()


def test_the_device_of_one_file_loads_and_a_number_without_a_source_is_refused(tmp_path: Path) -> None:
    (snippet,) = (text for _, _, text in BLOCKS if text.startswith("inherits = "))
    (tmp_path / "my-board.toml").write_text(snippet)
    board, base = load_target(str(tmp_path / "my-board.toml")), load_target("cortex-a53")
    assert (board.name, board.clock_hz.value, board.kernel) == ("my-board", 1.5e9, base.kernel)
    (tmp_path / "no-source.toml").write_text(re.sub(r"\{ value = (\S+), source = .*\}", r"\1", snippet))
    with pytest.raises(InputError, match="'clock_hz' has no source"):
        load_target(str(tmp_path / "no-source.toml"))


def written_pass(folder: Path) -> ModuleType:
    (source,) = (text for _, language, text in BLOCKS if language == "python")
    assert len([line for line in source[source.index("class ") :].splitlines() if line]) <= 20
    (folder / "halve_divisions.py").write_text(source)
    spec = importlib.util.spec_from_file_location("halve_divisions", folder / "halve_divisions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pass_in_20_lines_does_what_it_says_and_passes_the_conformance_kit(tmp_path: Path) -> None:
    cls = written_pass(tmp_path).HalveDivisions
    model = load_text(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[3] x) => (float[3] y)
        <float two = {2}, float three = {3}> { a = Div (x, two)  y = Div (a, three) }"""
    )
    context = Context()
    sample = {"x": np.array([1, -3, 1e-3], np.float32)}
    Pipeline([cls()], strict=True).run(model, context, [sample])
    assert [node.op_type for node in model.graph] == ["Mul", "Div"]
    assert [(remark.kind, remark.message) for remark in context.remarks] == [
        ("applied", "a product with 1/2"),
        ("missed", "the divisor is not the constant 2"),
    ]
    assert [result.problem for result in check_class(cls) if result.problem] == []


def test_every_link_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
