"""Data to calibrate with needs no labels, even where its description names some."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from optkit import InputError
from optkit.dataset.samples import Samples, read_samples
from optkit.model.loading import load_text

TEXT = '<ir_version: 8, opset_import: ["" : 17]> m (float[1,3,4,4] x) => (float[1,3,4,4] y) { y = Relu (x) }'


def test_labels_that_are_named_and_missing_matter_only_where_they_are_wanted(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "preprocess.toml").write_text('labels = "labels.csv"\n')
    model = load_text(TEXT)
    assert read_samples(str(tmp_path), model, inputs_only=True).labels is None
    with pytest.raises(InputError, match="no such labels file"):
        read_samples(str(tmp_path), model)


def test_labels_that_are_there_are_left_out() -> None:
    items = [{"x": np.zeros((1, 3, 4, 4), np.float32)}]
    given = Samples(items, labels=np.array([1]))
    assert read_samples(given, load_text(TEXT), inputs_only=True).labels is None
    assert read_samples({"x": items[0]["x"], "labels": np.array([1])}, load_text(TEXT), inputs_only=True).labels is None
