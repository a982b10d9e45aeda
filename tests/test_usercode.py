"""Data from the user's own functions: what is called, what is kept, and what their errors become."""

from __future__ import annotations

import pytest

from optkit.dataset.samples import read_samples
from optkit.model.loading import load_text
from refusals import refused

VECTOR = load_text('<ir_version: 10, opset_import: ["": 21]> main (float[N,4] x) => (float[N,4] y) { y = Identity(x) }')
TOKENS = load_text('<ir_version: 10, opset_import: ["": 21]> main (int64[N,T] ids) => (int64[N,T] y) { y = Abs(ids) }')


CODE = """
import numpy as np

def good():
    for i in range(4):
        yield {"x": [float(i)] * 4, "labels": i}

def endless():
    while True:
        yield {"x": np.zeros((1, 4)), "extra": None}

def ragged():
    yield {"ids": np.array([1, 2]), "labels": np.array([2, 3])}
    yield {"ids": np.array([[4]]), "labels": np.array([5])}

def fails():
    yield {"x": np.zeros(4)}
    raise ValueError("no more")

def some_labels():
    yield {"x": np.zeros(4), "labels": 1}
    yield {"x": np.zeros(4)}

def arrays():
    yield np.zeros(4)

def misnamed():
    yield {"xs": np.zeros(4)}

def nothing():
    return None

def late():
    import beside
    yield {"x": np.zeros(4)}
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    (tmp_path / "readers_of_test_dataset.py").write_text(CODE)
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "broken_of_test_dataset.py").write_text("1 / 0")
    (tmp_path / "needs_of_test_dataset.py").write_text("import not_installed_anywhere")
    monkeypatch.chdir(tmp_path)
    return "readers_of_test_dataset"


def test_a_function_of_a_module_in_the_current_folder(code):
    samples = read_samples(f"{code}:good", VECTOR)
    assert [sample["x"].tolist() for sample in samples] == [[[float(i)] * 4] for i in range(4)]
    assert [sample["x"].tolist() for sample in samples] == [[[float(i)] * 4] for i in range(4)]  # a second time
    assert samples.labels.tolist() == [0, 1, 2, 3]
    assert samples.source == f"{code}:good"
    assert len(read_samples(f"{code}:late", VECTOR)) == 1


def test_a_function_of_a_file(code, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    assert len(read_samples(f"{tmp_path}/{code}.py:good", VECTOR)) == 4


def test_an_endless_function_is_asked_only_for_what_is_needed(code):
    assert len(read_samples(f"{code}:endless", VECTOR, limit=3)) == 3
    assert len(read_samples(f"{code}:endless[2:8:2]", VECTOR)) == 3
    assert len(read_samples(f"{code}:endless[2::2]", VECTOR, limit=4)) == 4


def test_labels_of_different_lengths_are_kept_apart(code):
    samples = read_samples(f"{code}:ragged", TOKENS)
    assert [label.tolist() for label in samples.labels] == [[2, 3], [5]]
    assert [sample["ids"].shape for sample in samples] == [(1, 2), (1, 1)]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("readers_of_test_dataset:fails", "the function 'readers_of_test_dataset:fails' raised ValueError: no more"),
        ("readers_of_test_dataset:nothing", "raised TypeError: 'NoneType' object is not iterable"),
        ("readers_of_test_dataset:some_labels", "sample 1: some samples have labels and some have none"),
        (
            "readers_of_test_dataset:arrays",
            "sample 0: ndarray where a dictionary of arrays by input name is expected",
        ),
        ("readers_of_test_dataset:misnamed", "sample 0: the model's input 'x' is missing; did you mean 'xs'?"),
        ("readers_of_test_dataset:god", "no 'god' in 'readers_of_test_dataset'; did you mean 'good'?"),
        ("no_such_module:good", "no module 'no_such_module'; modules are looked for in the current folder"),
        ("broken_of_test_dataset:good", "importing 'broken_of_test_dataset' raised ZeroDivisionError"),
        ("needs_of_test_dataset:good", "importing 'needs_of_test_dataset' raised ModuleNotFoundError"),
        ("nowhere.py:good", "nowhere.py: no such file"),
    ],
)
def test_errors_in_the_users_code_are_sentences(code, name, sentence):
    with refused(sentence):
        read_samples(name, VECTOR)
