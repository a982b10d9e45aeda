"""The command line as a user meets it: results on stdout, sentences on stderr, exit codes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import Cli

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
MODEL, CALIBRATION, TEST = (str(DIGITS / name) for name in ("digits.onnx", "calibration.npz", "test.npz"))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model compiled once, with everything that a report can hold."""
    import optkit

    goal = tmp_path_factory.mktemp("packages") / "digits"
    optkit.compile(MODEL, target="cortex-a53", calibration=CALIBRATION, evaluation=TEST, output=goal)
    return goal


def test_help_answers_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "optkit", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "compile" in done.stdout
    assert "Exit codes" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.8  # twice the goal: no timing test


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, optkit.cli.app as a; sys.argv = ['optkit', '--help']\ntry: a.main()\nexcept SystemExit: pass\n"
    code += "print([m for m in ('numpy', 'onnx', 'onnx_ir', 'onnxruntime') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")


def test_version(cli: Cli) -> None:
    import optkit

    assert cli("--version").out.strip() == f"optkit {optkit.__version__}"


def test_compile_prints_what_python_returns(cli: Cli, package: Path, tmp_path: Path) -> None:
    done = cli("compile", MODEL, "-t", "cortex-a53", "--calibration", CALIBRATION, "--eval", TEST, "-o",
               str(tmp_path / "digits"), "--json")  # fmt: skip
    assert done.code == 0
    assert done.json == json.loads((package / "report.json").read_text())
    assert {p.name for p in (tmp_path / "digits").iterdir()} == {
        "manifest.json", "model", "recipe.lock.toml", "remarks.jsonl", "report.html", "report.json"
    }  # fmt: skip


def test_two_compilations_are_the_same_bytes(cli: Cli, package: Path, tmp_path: Path) -> None:
    goal = tmp_path / "digits"
    cli("compile", MODEL, "-t", "cortex-a53", "--calibration", CALIBRATION, "--eval", TEST, "-o", str(goal))
    files = sorted(p.relative_to(package) for p in package.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(goal) for p in goal.rglob("*") if p.is_file())
    for name in files:
        assert (goal / name).read_bytes() == (package / name).read_bytes(), name


def test_the_lock_is_a_recipe_that_gives_the_same_model(cli: Cli, package: Path, tmp_path: Path) -> None:
    goal = tmp_path / "again"
    lock = str(package / "recipe.lock.toml")
    done = cli("compile", MODEL, "-t", "cortex-a53", "--recipe", lock, "--calibration", CALIBRATION, "-o", str(goal))
    assert done.code == 0, done.err
    name = "model/cpu/model.onnx"
    assert (goal / name).read_bytes() == (package / name).read_bytes()


def test_several_targets(cli: Cli, tmp_path: Path) -> None:
    done = cli("compile", MODEL, "-t", "cortex-a53:cores=2", "-t", "host", "--precision", "fp32", "-o",
               str(tmp_path / "out"), "--json")  # fmt: skip
    assert [report["target"] for report in done.json] == ["cortex-a53", "host"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"cortex-a53", "host"}


def test_terminal_report_names_the_executor_and_the_package(cli: Cli, tmp_path: Path) -> None:
    done = cli("compile", MODEL, "-t", "cortex-a53", "--calibration", CALIBRATION, "--eval", TEST, "-o",
               str(tmp_path / "d"), "--executor", "simulated")  # fmt: skip
    assert done.code == 0
    assert "quantized values in float" in done.out
    assert "top1" in done.out
    assert "n = 450" in done.out or "n = " in done.out
    assert str(tmp_path / "d") in done.out.replace("\n", "")


def test_static_quantization_without_data_says_what_to_pass(cli: Cli, tmp_path: Path) -> None:
    done = cli("compile", MODEL, "-t", "cortex-a53", "-o", str(tmp_path / "d"))
    assert done.code == 2
    assert "--calibration" in done.err
    assert not (tmp_path / "d").exists()


def test_random_calibration_is_stamped(cli: Cli, tmp_path: Path) -> None:
    done = cli("compile", MODEL, "-t", "cortex-a53", "--calibration", "random", "-o", str(tmp_path / "d"))
    assert done.code == 0
    assert "RANDOM" in done.out
    assert "RANDOM" in (tmp_path / "d" / "report.html").read_text()


def test_existing_goal_is_kept_unless_overwritten(cli: Cli, tmp_path: Path) -> None:
    arguments = ("compile", MODEL, "-t", "host", "--precision", "fp32", "-o", str(tmp_path / "d"))
    assert cli(*arguments).code == 0
    again = cli(*arguments)
    assert again.code == 2
    assert "already exists" in again.err
    assert cli(*arguments, "--overwrite").code == 0


def test_a_gate_that_is_missed_is_exit_1_and_keeps_the_package(cli: Cli, tmp_path: Path) -> None:
    done = cli("compile", MODEL, "-t", "host", "--precision", "fp32", "--max-size", "1KB", "-o", str(tmp_path / "d"))
    assert done.code == 1
    assert "not within the limit: host: size" in done.err
    assert (tmp_path / "d" / "manifest.json").is_file()


def test_rules_keep_nodes_in_float(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[rule]]\nop = "Gemm"\nprecision = "fp32"\n')
    done = cli("compile", MODEL, "-t", "cortex-a53", "--calibration", CALIBRATION, "--recipe", str(recipe), "-o",
               str(tmp_path / "d"), "--json")  # fmt: skip
    assert done.code == 0, done.err
    ops = done.json["compiled"]["ops"]
    assert ops["Gemm"] == 1
    reasons = [
        g["message"] for g in done.json["remarks"] if g["pass_name"] == "quantize-int8" and g["kind"] == "missed"
    ]
    assert any("rule" in reason for reason in reasons)


SENTENCES = [
    (("compile", MODEL, "-t", "cortex-a5"), 2, "no target 'cortex-a5'; did you mean 'cortex-a53'"),
    (("compile", MODEL, "-t", "host", "--precision", "w8a9"), 2, "target 'host' has no precision 'w8a9'"),
    (("compile", "absent.onnx", "-t", "host"), 2, "absent.onnx: no such file"),
    (("compile", MODEL, "-t", "host", "--dim", "N"), 2, "--dim takes NAME=SIZE, not 'N'"),
    (("compile", MODEL, "-t", "host", "--dim", "batchh=1"), 2, "no dynamic dimension 'batchh'"),
    (("compile", MODEL, "-t", "host", "--max-size", "big"), 2, "--max-size takes a value such as 8MB, not 'big'"),
    (("compile", MODEL, "-t", "host", "--max-latency", "3 days"), 2, "--max-latency takes a value such as 30ms"),
    (("compile", MODEL, "-t", "host", "--max-drop", "1%"), 2, "--max-drop needs labelled data; pass --eval DATA"),
    (("compile", MODEL, "-t", "host", "--set", "nonsense"), 2, "--set takes PASS.OPTION=VALUE, not 'nonsense'"),
    (
        ("compile", MODEL, "-t", "host", "--set", "quantize-int8.nope=1"),
        2,
        "pass 'quantize-int8': no option 'nope'",
    ),
    (("compile", MODEL, "-t", "host", "--set", "no-pass.x=1"), 2, "'no-pass.x' concerns no pass of this pipeline"),
    (("compile", MODEL, "-t", "host", "--recipe", "none.toml"), 2, "none.toml: not a readable recipe"),
    (("compile", MODEL), 2, "Missing option"),
    (("compille", MODEL), 2, "No such command 'compille'"),
    (("compile", MODEL, "-t", "host", "--calibratoin", "x"), 2, "No such option"),
    (("compile", MODEL, "-t", "host", "--precision", "fp32", "--executor", "emulated"), 5, "no emulated executor"),
    (("passes", "fold-constant"), 2, "no pass 'fold-constant'; did you mean 'fold-constants'"),
    (("targets", "hosst"), 2, "no target 'hosst'; did you mean 'host'"),
    (("setup", "host"), 2, "target 'host' needs no set-up"),
    (("run", str(DIGITS), "-i", "random"), 2, "not a package: it has no manifest.json"),
    (("verify", "nowhere"), 2, "nowhere: no such package directory"),
]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"), SENTENCES, ids=[" ".join(s[0][:1]) + str(n) for n, s in enumerate(SENTENCES)]
)
def test_errors_are_sentences(
    cli: Cli, arguments: tuple[str, ...], code: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(*arguments)
    assert sentence in done.err
    assert done.code == code
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not list(tmp_path.iterdir())


def test_errors_as_json(cli: Cli) -> None:
    done = cli("inspect", "absent.onnx", "--json")
    assert done.code == 2
    assert done.json == {"error": "no such file", "where": "absent.onnx", "hint": "", "exit_code": 2}


def test_debug_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from optkit import InputError
    from optkit.cli import main

    monkeypatch.setattr(sys, "argv", ["optkit", "inspect", "absent.onnx", "--debug"])
    with pytest.raises(InputError):
        main()


def test_interrupt_is_exit_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("optkit.model.loading.load", interrupted)
    done = cli("inspect", MODEL)
    assert done.code == 130
    assert "interrupted" in done.err


def test_inspect(cli: Cli) -> None:
    found = cli("inspect", MODEL, "--json").json
    assert found["opsets"] == {"ai.onnx": 17}
    assert found["macs"] > 1_000_000
    assert sum(found["ops"].values()) == found["nodes"]
    assert "Conv" in cli("inspect", MODEL).out


def test_check_passes_what_runs_and_fails_what_does_not(cli: Cli, tmp_path: Path) -> None:
    assert cli("check", MODEL, "-t", "cortex-a53").code == 0
    strange = tmp_path / "strange.onnx"
    import onnx.parser

    text = '<ir_version: 8, opset_import: ["" : 17, "acme" : 1]> m (float[2] x) => (float[2] y) { y = acme.Spin (x) }'
    strange.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    done = cli("check", str(strange), "-t", "cortex-a53")
    assert done.code == 1
    assert "Spin" in done.err


def test_cost_is_the_sum_of_its_layers(cli: Cli) -> None:
    found = cli("cost", MODEL, "-t", "cortex-a53", "--json").json
    assert found["seconds"] == pytest.approx(sum(node["seconds"] for node in found["nodes"]))
    assert found["macs"] == sum(node["macs"] for node in found["nodes"])
    assert found["low_seconds"] < found["seconds"] < found["high_seconds"]
    assert len(cli("cost", MODEL, "-t", "cortex-a53", "--per-layer").out.splitlines()) > len(found["nodes"])


def test_run_writes_outputs(cli: Cli, package: Path, tmp_path: Path) -> None:
    import numpy as np

    done = cli(
        "run", str(package), "-i", TEST + "[:5]", "-o", str(tmp_path / "y.npz"), "--executor", "simulated", "--json"
    )
    assert done.code == 0, done.err
    assert done.json["samples"] == 5
    assert done.json["kind"] == "simulated"
    with np.load(tmp_path / "y.npz") as outputs:
        assert outputs[done.json["outputs"][0]["name"]].shape[0] == 5


def test_diff_ranks_tensors_worst_first(cli: Cli, package: Path) -> None:
    found = cli("diff", MODEL, str(package), "-i", TEST + "[:4]", "--json").json
    values = [row["sqnr_db"] for row in found if row["sqnr_db"] is not None]
    assert values == sorted(values)
    assert values[0] > 20
    same = cli("diff", MODEL, MODEL, "-i", TEST + "[:2]", "--json").json
    assert all(row["sqnr_db"] is None and row["max_error"] == 0 for row in same)


def test_explain_tells_what_happened_to_a_node(cli: Cli, package: Path) -> None:
    everything = cli("explain", str(package), "*", "--json").json
    assert {remark["kind"] for remark in everything} >= {"applied"}
    node = everything[0]["node"]
    assert all(remark["node"] == node for remark in cli("explain", str(package), node, "--json").json)
    done = cli("explain", str(package), "no such node")
    assert done.code == 2
    assert "no remark is about a node 'no such node'" in done.err


def test_verify_finds_an_altered_file(cli: Cli, package: Path, tmp_path: Path) -> None:
    import shutil

    assert cli("verify", str(package)).code == 0
    copy = tmp_path / "copy"
    shutil.copytree(package, copy)
    with (copy / "report.html").open("a") as page:
        page.write(" ")
    done = cli("verify", str(copy))
    assert done.code == 4
    assert "report.html is altered" in done.out


def test_passes_lists_and_describes(cli: Cli) -> None:
    listed = cli("passes", "--json").json
    assert not listed["broken"]
    for row in listed["passes"]:
        described = cli("passes", row["name"], "--json").json
        assert described["help"].startswith(row["summary"])
    assert "Options" in cli("passes", "quantize-static").out


def test_targets_lists_and_describes_with_sources(cli: Cli) -> None:
    names = cli("targets", "--json").json["targets"]
    assert {"host", "cortex-a53", "cortex-a72", "cortex-a76"} <= set(names)
    for name in names:
        assert cli("targets", name).code == 0
        assert cli("targets", "test", name).code == 0


def test_custom_operators_are_kept_with_a_remark(cli: Cli, tmp_path: Path) -> None:
    import onnx.parser

    text = """<ir_version: 8, opset_import: ["" : 17, "acme" : 1]> m (float[2] x) => (float[2] y)
    { a = Identity (x)  b = acme.Spin <turns = 3> (a)  y = Relu (b) }"""
    model = tmp_path / "strange.onnx"
    model.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    done = cli("compile", str(model), "-t", "host", "--precision", "fp32", "-o", str(tmp_path / "d"), "--json")
    assert done.code == 0, done.err
    assert done.json["compiled"]["ops"] == {"Relu": 1, "acme::Spin": 1}
    assert any("not run" in notice for notice in done.json["notices"])
    remarks = cli("explain", str(tmp_path / "d"), "*Spin*", "--json").json
    assert [remark["message"] for remark in remarks] == ["an operator of the custom domain 'acme': kept as it is"]
