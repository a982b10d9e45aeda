"""Slices, folders, iterables and real data as samples."""

from __future__ import annotations

import numpy as np
import pytest

from dataset_models import PAIR, TOKENS, VECTOR, rows, save
from optkit.dataset.arrays import SPOOL_BYTES, Spool
from optkit.dataset.samples import Samples, random_samples, read_samples
from optkit.model.loading import load
from real_models import SPECS
from refusals import refused

# --- slices and samples ---


@pytest.mark.parametrize("text", ["[:3]", "[7:]", "[::3]", "[-2:]", "[2:8:2]", "[::-1]", "[5:5]"])
def test_slices_are_pythons(tmp_path, text):
    spec = save(tmp_path, x=rows(10), labels=np.arange(10))
    expected = eval(f"list(range(10)){text}")
    if not expected:
        with refused("there is no sample in it"):
            read_samples(spec + text, VECTOR)
        return
    samples = read_samples(spec + text, VECTOR)
    assert [int(sample["x"][0, 0]) // 4 for sample in samples] == expected
    assert samples.labels.tolist() == expected
    assert samples.source == spec + text


def test_limit_comes_after_the_slice(tmp_path):
    spec = save(tmp_path, x=rows(10))
    samples = read_samples(spec + "[::2]", VECTOR, limit=3)
    assert [int(sample["x"][0, 0]) // 4 for sample in samples] == [0, 2, 4]


def test_a_slice_of_step_zero_is_refused(tmp_path):
    with refused("has step 0"):
        read_samples(save(tmp_path, x=rows(2)) + "[::0]", VECTOR)


def test_a_folder_whose_name_looks_like_a_slice_is_a_folder(tmp_path):
    folder = tmp_path / "data[1:2]"
    folder.mkdir()
    np.save(folder / "0.npy", rows(1)[0])
    assert len(read_samples(str(folder), VECTOR)) == 1


def test_samples_are_a_sequence(tmp_path):
    samples = read_samples({"x": rows(5)}, VECTOR)
    assert samples[-1]["x"][0, 0] == 16
    assert len(samples[1:][1:]) == 3
    with pytest.raises(IndexError):
        samples[5]
    assert read_samples(samples, VECTOR, limit=2)[1]["x"][0, 0] == 4
    assert len(Samples([{"x": rows(1)}])) == 1


def test_random_samples_are_stamped_and_reproducible():
    samples = read_samples("random", PAIR)
    assert samples.random
    assert samples.source == "random"
    assert len(samples) == 8
    assert len(read_samples("random", PAIR, limit=3)) == len(read_samples("random[:3]", PAIR)) == 3
    for a, b in zip(samples, random_samples(PAIR, 8), strict=True):
        np.testing.assert_array_equal(a["x"], b["x"])
    assert samples[0]["x"].shape == (1, 4)
    assert set(np.concatenate([sample["kind"] for sample in samples])) == {0, 1}
    assert random_samples(TOKENS, 1)[0]["ids"].shape == (1, 16)


# --- folders of .npy ---


def test_a_folder_of_npy_files_in_sorted_order(tmp_path):
    for index in (2, 0, 1):
        np.save(tmp_path / f"{index}.npy", rows(3)[index : index + (index + 1 if index == 0 else 1)].squeeze())
    np.save(tmp_path / "labels.npy", np.array([5, 6, 7]))
    samples = read_samples(str(tmp_path), VECTOR)
    assert [sample["x"].tolist() for sample in samples] == [[row] for row in rows(3).tolist()]
    assert samples.labels.tolist() == [5, 6, 7]


def test_sub_folders_by_input(tmp_path):
    for name, arrays in (("x", rows(2)), ("kind", [np.array([3]), np.array([4])])):
        (tmp_path / name).mkdir()
        for index, array in enumerate(arrays):
            np.save(tmp_path / name / f"{index:03}.npy", array)
    samples = read_samples(str(tmp_path), PAIR)
    assert [int(sample["kind"][0]) for sample in samples] == [3, 4]
    (tmp_path / "kind" / "001.npy").rename(tmp_path / "kind" / "007.npy")
    with refused("'001.npy' is not in both 'x' and 'kind'"):
        read_samples(str(tmp_path), PAIR)
    (tmp_path / "kind").rename(tmp_path / "kinds")
    with refused("no sub-folder 'kind' with .npy files; did you mean 'kinds'?"):
        read_samples(str(tmp_path), PAIR)


def test_an_empty_folder_is_refused(tmp_path):
    with refused(f"{tmp_path}: the folder holds neither images nor .npy files"):
        read_samples(str(tmp_path), VECTOR)


def test_a_misfit_in_a_folder_names_the_file(tmp_path):
    np.save(tmp_path / "0.npy", np.zeros(5, np.float32))
    with refused(f"{tmp_path / '0.npy'}: input 'x': one sample has shape [5] where the model takes [N, 4]"):
        read_samples(str(tmp_path), VECTOR)


# --- iterables ---


def test_an_iterable_of_dictionaries(tmp_path):
    samples = read_samples(({"x": row, "y": i} for i, row in enumerate(rows(3))), VECTOR)
    assert [int(sample["x"][0, 0]) for sample in samples] == [0, 4, 8]
    assert samples.labels.tolist() == [0, 1, 2]
    assert samples.source == "memory"


def test_large_streams_go_to_a_temporary_file():
    spool = Spool()
    block = np.arange(SPOOL_BYTES // 32, dtype=np.float64)
    for number in range(5):  # 5/4 of what is held in memory
        spool.append({"x": block + number, "empty": np.zeros((0, 3)), "scalar": np.array(number)})
    assert spool._file._rolled
    for number in (4, 0, 2):
        np.testing.assert_array_equal(spool[number]["x"], block + number)
        assert spool[number]["empty"].shape == (0, 3)
        assert spool[number]["scalar"] == number


# --- real data ---


@pytest.mark.parametrize(
    ("model", "data", "spec", "count"),
    [
        ("mobilenet_v1_075/mobilenet_v1_075.onnx", "imagenet_sample", "mobilenet_v1_075.toml", 500),
        ("squeezenet1_1/squeezenet1_1.onnx", "imagenet_sample/images", "squeezenet1_1.toml", 500),
        ("ultraface_rfb320/ultraface_rfb320.onnx", "ultraface_rfb320/golden.npz", "ultraface_rfb320.toml", 6),
        ("fns_candy/fns_candy.onnx", "fns_candy/golden.npz", "fns_candy.toml", 1),
        ("mnist/mnist_cntk8.onnx", "mnist/calibration.npz", "mnist_cntk8.toml", 1000),
        ("magika_v3_3/magika_v3_3.onnx", "magika_v3_3/test.npz", None, 76),
    ],
)
def test_real_data_is_read_a_sample_at_a_time(shared, model, data, spec, count):
    loaded = load(shared / "data" / model)
    labels = str(shared / "data/imagenet_sample/labels.csv:class_index") if data.endswith("images") else None
    samples = read_samples(shared / "data" / data, loaded, preprocess=spec and SPECS / spec, labels=labels)
    assert len(samples) == count
    assert {name: array.shape[0] for name, array in samples[count - 1].items()} == dict.fromkeys(samples[0], 1)
    assert samples.labels is None or len(samples.labels) == count
