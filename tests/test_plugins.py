"""Plugins of others: a broken one is listed with its traceback, and harms nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from optkit import plugins
from optkit.errors import InputError
from optkit.plugins import PASSES, broken_plugins, packager, pass_class, pass_names, target_files

GOOD = """
    import onnx_ir as ir
    from optkit import Context, Pass

    class ShoutLouder(Pass):
        '''Leave everything as it is.'''

        volume: int = 11

        def run(self, model: ir.Model, context: Context) -> None:
            context.missed('graph', 'already loud')
"""


def install(site: Path, distribution: str, entry_points: str, metadata: bool = True, **modules: str) -> None:
    """Lay a distribution out as an installer does: its modules beside a .dist-info folder."""
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "entry_points.txt").write_text(dedent(entry_points), encoding="utf-8")
    if metadata:
        text = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        (info / "METADATA").write_text(text, encoding="utf-8")
    for name, source in modules.items():
        (site / f"{name}.py").write_text(dedent(source), encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder on the path whose distributions are looked up afresh, and forgotten afterwards."""
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    forget()


def forget() -> None:
    plugins._entries.cache_clear()
    target_files.cache_clear()
    plugins._broken.clear()


def sentence(load: Callable[[str], Any], name: str) -> str:
    """Return the module of what loads, or the sentence of why it does not."""
    try:
        return str(load(name).__module__)
    except InputError as error:
        return str(error)


def run(site: Path, *arguments: str) -> Any:
    """Run the command line in a process that finds the site's distributions, and return what it prints as JSON."""
    command = [sys.executable, "-c", "from optkit.cli import main; main()", *arguments, "--json"]
    env = {**os.environ, "PYTHONPATH": str(site)}
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


def broken() -> dict[str, str]:
    return {plugin.name: plugin.traceback for plugin in broken_plugins()}


def test_a_good_plugin_is_found(site: Path) -> None:
    install(site, "acme-passes", "[optkit.passes]\nshout-louder = acme:ShoutLouder", acme=GOOD)
    assert pass_class("shout-louder").model_fields["volume"].default == 11
    assert {"shout-louder", "fold-constants"} <= set(pass_names())
    assert broken() == {}


@pytest.mark.parametrize(
    ("source", "problem", "listed"),
    [
        ("import not_installed_anywhere", "does not load: ModuleNotFoundError: ", "line 1, in <module>"),
        ("def broken(:", "does not load: SyntaxError: ", "SyntaxError"),
        ("1 / 0", "does not load: ZeroDivisionError: division by zero", "ZeroDivisionError"),
        ("import sys; sys.exit(3)", "does not load: SystemExit: 3", "SystemExit"),
        ("class Other: pass", "does not load: AttributeError: ", "AttributeError"),
        ("class ShoutLouder: pass", "is not a subclass of optkit.pipeline.Pass", "is not a subclass"),
        ("ShoutLouder = 3", "is not a subclass of optkit.pipeline.Pass", "3 is not a subclass"),
        ("from optkit import Pass\nclass ShoutLouder(Pass): pass", "does not define 'run'", "does not define 'run'"),
        (GOOD.replace("class ShoutLouder", "class ShoutLouder2"), "does not load: AttributeError", "AttributeError"),
        (
            dedent(GOOD).replace("class ShoutLouder", "class Whisper") + "\nShoutLouder = Whisper",
            "calls itself 'whisper': its class and its entry point need one name",
            "calls itself 'whisper'",
        ),
    ],
)
def test_a_broken_pass_is_listed_and_harms_nobody(source: str, problem: str, listed: str, site: Path) -> None:
    install(site, "acme-passes", "[optkit.passes]\nshout-louder = acme:ShoutLouder", acme=source)
    said = sentence(pass_class, "shout-louder")
    assert said.startswith("the pass 'shout-louder' of the plugin 'acme-passes' " + problem)
    assert set(broken()) == {"shout-louder"}
    assert listed in broken()["shout-louder"]
    if "does not load" in problem:
        assert said.endswith("; 'optkit passes' shows its traceback")
        assert broken()["shout-louder"].startswith("Traceback")
    assert sentence(pass_class, "eliminate-no-ops").startswith("optkit_passes.")
    assert "cortex-a53" in target_files()


def test_the_command_line_lists_it_and_goes_on(tmp_path: Path) -> None:
    install(tmp_path, "acme-passes", "[optkit.passes]\nshout-louder = acme:ShoutLouder", acme="1 / 0")
    answer = run(tmp_path, "passes")
    assert [(p["name"], p["origin"]) for p in answer["broken"]] == [("shout-louder", "acme-passes")]
    assert "ZeroDivisionError" in answer["broken"][0]["traceback"]
    assert "eliminate-no-ops" in [row["name"] for row in answer["passes"]]


def test_of_two_with_one_name_optkit_stays_and_the_other_is_listed(site: Path) -> None:
    install(site, "acme-passes", "[optkit.passes]\neliminate-no-ops = acme:ShoutLouder", acme=GOOD)
    assert sentence(pass_class, "eliminate-no-ops").startswith("optkit_passes.")
    assert broken() == {"eliminate-no-ops (acme-passes)": "the name 'eliminate-no-ops' is already taken by 'optkit'"}


def test_of_two_strangers_with_one_name_the_first_by_distribution_stays(site: Path) -> None:
    install(site, "zebra", "[optkit.passes]\nshout-louder = zebra_passes:ShoutLouder", zebra_passes=GOOD)
    install(site, "acme", "[optkit.passes]\nshout-louder = acme_passes:ShoutLouder", acme_passes=GOOD)
    assert sentence(pass_class, "shout-louder") == "acme_passes"
    assert broken() == {"shout-louder (zebra)": "the name 'shout-louder' is already taken by 'acme'"}


def test_a_plugin_that_prints_does_not_reach_stdout(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = "print('Welcome to Acme!')\n" + dedent(GOOD)
    install(site, "acme-passes", "[optkit.passes]\nshout-louder = acme:ShoutLouder", acme=source)
    assert sentence(pass_class, "shout-louder") == "acme"
    assert capsys.readouterr() == ("", "Welcome to Acme!\n")


def test_a_distribution_without_metadata_or_with_a_malformed_entry(site: Path) -> None:
    install(site, "ghost", "[optkit.passes]\nshout-louder = acme:ShoutLouder", metadata=False, acme=GOOD)
    install(site, "crooked", "[optkit.passes]\ncrooked = not a module!")
    assert sentence(pass_class, "shout-louder") == "acme"
    assert sentence(pass_class, "crooked").startswith("the pass 'crooked' of the plugin 'crooked' does not load: ")


def test_targets_of_a_plugin_and_what_can_be_wrong_with_them(site: Path) -> None:
    install(site, "acme-targets", "[optkit.targets]\nacme = acme_devices\nnowhere = acme_nowhere")
    devices = site / "acme_devices"
    devices.mkdir()
    (devices / "__init__.py").touch()
    (devices / "acme-board.toml").write_text('inherits = "cortex-a53"\nsummary = "A board"\n', encoding="utf-8")
    (devices / "cortex-a53.toml").write_text('inherits = "host"\n', encoding="utf-8")
    (devices / "torn.toml").write_text("name = \n", encoding="utf-8")
    assert target_files()["acme-board"] == devices / "acme-board.toml"
    assert "optkit_targets" in str(target_files()["cortex-a53"])
    assert "torn" not in target_files()
    reasons = broken()
    assert reasons["cortex-a53 (acme-targets)"] == "the name 'cortex-a53' is already taken by another plugin"
    assert reasons["torn (acme-targets)"].startswith("torn.toml is not a readable TOML file: ")
    assert "ModuleNotFoundError" in reasons["nowhere"]
    assert run(site, "targets")["targets"]["acme-board"] == "A board"


def test_broken_packagers(site: Path) -> None:
    source = "from optkit.package.contract import Packager\nclass Half(Packager): name = 'half'\nWrong = 3"
    install(site, "acme", "[optkit.packagers]\nhalf = acme:Half\nwrong = acme:Wrong\ngone = gone:X", acme=source)
    assert {name: sentence(packager, name) for name in ("half", "wrong", "gone", "ort")} == {
        "half": "the packager 'half' of the plugin 'acme' does not define "
        "'executors' and 'open' and 'package' and 'placement'",
        "wrong": "the packager 'wrong' of the plugin 'acme' is not a subclass of optkit.package.contract.Packager",
        "gone": "the packager 'gone' of the plugin 'acme' does not load: ModuleNotFoundError: No module named 'gone'; "
        "--debug shows its traceback",
        "ort": "optkit_targets.ort.packager",
    }
    assert set(broken()) == {"half", "wrong", "gone"}


@pytest.mark.parametrize(
    ("load", "name", "beginning"),
    [
        (pass_class, "fold-constant", "no pass 'fold-constant'; did you mean 'fold-constants'"),
        (packager, "otr", "no packager 'otr'; did you mean 'ort'?"),
    ],
)
def test_did_you_mean(load: Callable[[str], Any], name: str, beginning: str) -> None:
    assert sentence(load, name).startswith(beginning)


def test_an_unlike_name_lists_what_there_is() -> None:
    with pytest.raises(InputError, match=r"^no pass 'zzz'; known: avoid-fallbacks, .*eliminate-dead-code"):
        pass_class("zzz")


def test_what_comes_with_optkit_is_whole() -> None:
    assert broken_plugins() == []
    assert broken_plugins(PASSES) == []
    assert all(pass_class(name).name() == name for name in pass_names())
    assert {"host", "cortex-a53"} <= target_files().keys()
