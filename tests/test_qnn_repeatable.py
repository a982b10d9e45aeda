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
def test_only_the_words_that_differ_are_cleared(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("binaries")
    places = data.draw(st.sets(st.integers(0, len(content) - 1), max_size=5))
    other = bytes(byte ^ 0x5A if index in places else byte for index, byte in enumerate(content))
    a, b = write(folder, "a", content), write(folder, "b", other)
    words = {place // 8 for place in places}
    assert settle(a, b) == len(words)
    expected = bytes(0 if index // 8 in words else byte for index, byte in enumerate(content))
    assert a.read_bytes() == expected


def test_different_sizes_are_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path, "a", b"12"), write(tmp_path, "b", b"123")
    with pytest.raises(CannotRunError, match="the compiler made 2 bytes of the model, and 3 when asked again"):
        settle(a, b)


@pytest.mark.emulator
@pytest.mark.skipif(bool(runtime.missing()), reason="needs onnxruntime-qnn, the extra [qnn]")
@pytest.mark.parametrize("name", ["snapdragon-8gen2-npu", "snapdragon-8gen3-npu", "snapdragon-8-elite-npu"])
def test_a_chip_gets_the_same_binary_every_time(name: str) -> None:
    target, seen = load_target(name), set()
    for _ in range(2):
        with runtime.compiled(encoder(), target) as made:
            seen.add(tuple(path.read_bytes() for path in made.binaries))
    assert len(seen) == 1
