"""Context binaries with the same bytes: what two processes write differently is cleared."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.session import CannotRunError
from optkit.target import load_target
from optkit_targets.qnn import runtime
from optkit_targets.qnn.repeatable import settle
from transformer_models import encoder


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@given(content=st.binary(min_size=1, max_size=64), data=st.data())
def test_two_of_three_decide_each_word(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("binaries")
    places = [data.draw(st.sets(st.integers(0, len(content) - 1), max_size=4)) for _ in range(3)]
    versions = [
        bytes(byte ^ (version + 1) if index in changed else byte for index, byte in enumerate(content))
        for version, changed in enumerate(places)
    ]
    paths = [write(folder, str(number), version) for number, version in enumerate(versions)]
    cleared = settle(*paths)
    expected, none = b"", 0
    for start in range(0, len(content), 8):
        words = [version[start : start + 8] for version in versions]
        agreed = [word for word in words if words.count(word) > 1]
        none += not agreed
        expected += agreed[0] if agreed else bytes(len(words[0]))
    assert paths[0].read_bytes() == expected
    assert cleared == none


def test_different_sizes_are_refused(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path, str(number), bytes(number)) for number in (2, 3, 3))
    with pytest.raises(CannotRunError, match="the compiler made binaries of 2 and 3 bytes of one model"):
        settle(a, b, c)


@pytest.mark.emulator
@pytest.mark.skipif(bool(runtime.missing()), reason="needs onnxruntime-qnn, the extra [qnn]")
@pytest.mark.parametrize("name", ["snapdragon-8gen2-npu", "snapdragon-8gen3-npu", "snapdragon-8-elite-npu"])
def test_a_chip_gets_the_same_binary_every_time(name: str) -> None:
    target, seen = load_target(name), set()
    for _ in range(2):
        with runtime.compiled(encoder(), target) as made:
            seen.add(tuple(path.read_bytes() for path in made.binaries))
    assert len(seen) == 1
