"""Packages on disk: whole or not at all, the same bytes every time, and every file accounted for."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import optkit.package.write
from interruptible import interruptible
from optkit.errors import InputError
from optkit.package.artifact import (
    Difference,
    Package,
    Provenance,
    check_hashes,
    is_package,
    open_package,
    read_remarks,
    seal_package,
    write_remarks,
)
from optkit.package.contract import Artifact
from optkit.package.write import write_package
from optkit.pipeline import Remark

PROVENANCE = Provenance("net.onnx", "ab" * 32, "host", "ort", "w8a8", "cd" * 32, "onnxruntime on this machine")
REMARKS = [
    Remark("applied", "fold-pad", "pad_1", "Pad", "into conv_1"),
    Remark("missed", "fuse", "ü\u2028", "Add", "x"),
]


def build(directory: Path) -> Package:
    (directory / "model").mkdir()
    (directory / "model" / "model.bin").write_bytes(b"weights")
    artifact = Artifact(directory, "model/model.bin", ("model/model.bin",), {"schema_version": "1.0"})
    return seal_package(directory, artifact, {"remarks.jsonl": write_remarks(REMARKS)}, PROVENANCE)


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_package_reads_back_as_it_was_written(tmp_path: Path) -> None:
    write_package(tmp_path / "net", build)
    package = open_package(tmp_path / "net")
    assert package.provenance == PROVENANCE
    assert package.manifest["schema_version"] == "1.0"
    assert set(package.manifest) == {"schema_version", "additional_metadata"}
    assert set(package.files) == {"model/model.bin", "remarks.jsonl"}
    assert package.files["model/model.bin"].bytes == 7
    assert set(package.versions) == {"optkit", "numpy", "onnx", "onnx-ir", "onnxruntime"}
    assert read_remarks(tmp_path / "net") == REMARKS
    assert check_hashes(package) == []
    assert is_package(tmp_path / "net")
    assert not is_package(tmp_path)


def test_two_runs_write_the_same_bytes_and_no_trace_of_the_place(tmp_path: Path) -> None:
    write_package(tmp_path / "a" / "net", build)
    write_package(tmp_path / "b" / "other", build)
    first = tree(tmp_path / "a" / "net")
    assert first == tree(tmp_path / "b" / "other")
    assert str(tmp_path).encode() not in first["manifest.json"]


def test_the_directory_has_ordinary_permissions(tmp_path: Path) -> None:
    write_package(tmp_path / "net", build)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "net").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_changed_missing_and_extra_files_are_named(tmp_path: Path) -> None:
    write_package(tmp_path / "net", build)
    (tmp_path / "net" / "model" / "model.bin").write_bytes(b"weightz")
    (tmp_path / "net" / "remarks.jsonl").unlink()
    (tmp_path / "net" / "notes.txt").write_text("mine")
    (tmp_path / "net" / "dangling").symlink_to("nowhere")
    assert check_hashes(open_package(tmp_path / "net")) == [
        Difference("dangling", "extra"),
        Difference("model/model.bin", "altered"),
        Difference("notes.txt", "extra"),
        Difference("remarks.jsonl", "missing"),
    ]


def test_nothing_is_replaced_without_being_asked(tmp_path: Path) -> None:
    write_package(tmp_path / "net", build)
    before = tree(tmp_path / "net")
    with pytest.raises(InputError) as caught:
        write_package(tmp_path / "net", build)
    assert str(caught.value) == f"{tmp_path / 'net'}: already exists; name another place, or pass --overwrite"
    assert tree(tmp_path / "net") == before


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_replaces_a_package_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:  # a file system that cannot swap two names
        monkeypatch.setattr(optkit.package.write, "_exchange", lambda a, b: False)
    write_package(tmp_path / "net", build)
    (tmp_path / "net" / "stale").write_text("old")
    write_package(tmp_path / "net", build, overwrite=True)
    assert check_hashes(open_package(tmp_path / "net")) == []
    assert names(tmp_path) == ["net"]


def test_overwriting_replaces_nothing_but_packages(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(InputError) as caught:
        write_package(tmp_path / "home", build, overwrite=True)
    assert str(caught.value) == f"{tmp_path / 'home'}: is not a package, so it is not overwritten; remove it yourself"
    write_package(tmp_path / "net", build)
    (tmp_path / "link").symlink_to("net")
    with pytest.raises(InputError, match="is not a package, so it is not overwritten"):
        write_package(tmp_path / "link", build, overwrite=True)
    (tmp_path / "empty").mkdir()
    write_package(tmp_path / "empty", build, overwrite=True)
    assert is_package(tmp_path / "empty")


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_a_failure_or_ctrl_c_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail(directory: Path) -> None:
        build(directory)
        raise error

    with pytest.raises(type(error)):
        write_package(tmp_path / "net", fail)
    assert names(tmp_path) == []
    write_package(tmp_path / "net", build)
    before = tree(tmp_path / "net")
    with pytest.raises(type(error)):
        write_package(tmp_path / "net", fail, overwrite=True)
    assert tree(tmp_path / "net") == before
    assert names(tmp_path) == ["net"]


KILLED = """
import sys, time
from pathlib import Path
from optkit.package.write import write_package

def build(directory):
    (directory / "half").write_bytes(b"written")
    print("writing", flush=True)
    time.sleep(60)

write_package(Path(sys.argv[1]), build)
"""


def start_writer(goal: Path) -> subprocess.Popen[str]:
    command = interruptible([sys.executable, "-c", KILLED, str(goal)])
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def stop(process: subprocess.Popen[str], number: int) -> int:
    process.send_signal(number)
    code = process.wait(30)
    assert process.stdout is not None
    process.stdout.close()
    return code


def test_kill_9_leaves_nothing_at_the_goal_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    goal = tmp_path / "net"
    assert stop(start_writer(goal), signal.SIGKILL) == -signal.SIGKILL
    assert not goal.exists()
    (draft,) = tmp_path.iterdir()
    assert (draft / "half").read_bytes() == b"written"
    write_package(goal, build)
    assert names(tmp_path) == ["net"]
    assert check_hashes(open_package(goal)) == []


def test_ctrl_c_cleans_up(tmp_path: Path) -> None:
    assert stop(start_writer(tmp_path / "net"), signal.SIGINT) == -signal.SIGINT
    assert names(tmp_path) == []


def test_the_draft_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    goal = tmp_path / "net"
    process = start_writer(goal)
    try:
        write_package(goal, build)
        (draft,) = [path for path in tmp_path.iterdir() if path != goal]
        assert (draft / "half").exists()
    finally:
        stop(process, signal.SIGKILL)
    write_package(goal, build, overwrite=True)
    assert names(tmp_path) == ["net"]


def test_a_goal_that_appears_meanwhile_is_not_touched(tmp_path: Path) -> None:
    goal = tmp_path / "net"

    def slow(directory: Path) -> None:
        goal.mkdir()
        (goal / "theirs").write_text("first")

    with pytest.raises(InputError, match="already exists"):
        write_package(goal, slow)
    assert tree(goal) == {"theirs": b"first"}


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    goal = tmp_path / "file" / "net"
    with pytest.raises(InputError) as caught:
        write_package(goal, build)
    assert str(caught.value) == f"{goal}: cannot be written: Not a directory; name a directory that can be written"


def test_a_read_only_directory_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(InputError, match="cannot be written: Permission denied; name a directory that can be written"):
        write_package(tmp_path / "net", build)


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        (directory / "half").write_bytes(b"x")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(InputError, match="cannot be written: No space left on device; free some space"):
        write_package(tmp_path / "net", fill)
    assert names(tmp_path) == []


def test_an_error_of_another_file_is_not_blamed_on_the_goal(tmp_path: Path) -> None:
    def read(directory: Path) -> bytes:
        return (tmp_path / "absent").read_bytes()

    with pytest.raises(FileNotFoundError):
        write_package(tmp_path / "net", read)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: (d / "manifest.json").unlink(), "not a package: it has no manifest.json; name the directory"),
        (lambda d: (d / "manifest.json").write_text("{"), "the manifest cannot be read: "),
        (lambda d: (d / "manifest.json").write_bytes(b"\xff"), "the manifest cannot be read: "),
        (lambda d: (d / "manifest.json").write_text("[1]"), "the manifest was not written by optkit, or is damaged"),
        (lambda d: (d / "manifest.json").write_text("{}"), "the manifest was not written by optkit, or is damaged"),
        (
            lambda d: (d / "manifest.json").write_text(
                (d / "manifest.json").read_text().replace('"remarks.jsonl"', '"../remarks.jsonl"')
            ),
            "the manifest names '../remarks.jsonl', which is outside the package",
        ),
    ],
)
def test_a_damaged_manifest_is_a_sentence(tmp_path: Path, damage: Callable[[Path], object], sentence: str) -> None:
    write_package(tmp_path / "net", build)
    damage(tmp_path / "net")
    with pytest.raises(InputError) as caught:
        open_package(tmp_path / "net")
    assert sentence in str(caught.value)


def test_a_missing_directory_and_damaged_remarks_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such package directory; name the directory that 'optkit compile' wrote"):
        open_package(tmp_path / "nothing")
    write_package(tmp_path / "net", build)
    (tmp_path / "net" / "remarks.jsonl").write_text('{"kind": "applied"}\n')
    with pytest.raises(InputError, match="the remarks cannot be read"):
        read_remarks(tmp_path / "net")
