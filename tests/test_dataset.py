"""Samples from arrays: names, labels, element types, lengths, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from dataset_models import PAIR, TOKENS, VECTOR, model_of, rows, save
from optkit.dataset.samples import read_samples
from refusals import refused

# --- arrays ---


@pytest.mark.parametrize("save_arrays", [np.savez, np.savez_compressed])
def test_npz_gives_samples_with_a_leading_axis_and_labels(tmp_path, save_arrays):
    save_arrays(tmp_path / "x.npz", x=rows(3), labels=np.array([2, 0, 1], np.uint8))
    samples = read_samples(str(tmp_path / "x.npz"), VECTOR)
    assert len(samples) == 3
    assert [list(sample) for sample in samples] == [["x"]] * 3
    np.testing.assert_array_equal(samples[1]["x"], rows(3)[1:2])
    np.testing.assert_array_equal(samples.labels, [2, 0, 1])
    assert samples.source == str(tmp_path / "x.npz")
    assert not samples.random


def test_stored_arrays_are_mapped_not_read(tmp_path):
    from optkit.dataset.arrays import load_npz

    np.savez(
        tmp_path / "x.npz", a=rows(3), scalar=np.float32(2), empty=np.zeros((0, 4)), fortran=np.asfortranarray(rows(3))
    )
    arrays = load_npz(tmp_path / "x.npz")
    assert isinstance(arrays["a"], np.memmap)
    np.testing.assert_array_equal(arrays["a"], rows(3))
    np.testing.assert_array_equal(arrays["fortran"], rows(3))
    assert arrays["scalar"] == 2
    assert arrays["scalar"].shape == ()
    assert arrays["empty"].shape == (0, 4)


def test_a_single_npy_file_needs_no_name(tmp_path):
    np.save(tmp_path / "anything.npy", rows(3))
    samples = read_samples(tmp_path / "anything.npy", VECTOR)
    np.testing.assert_array_equal(samples[2]["x"], rows(3)[2:])


def test_the_only_array_is_taken_whatever_its_name_and_the_source_says_so(tmp_path):
    spec = save(tmp_path, data=rows(2), y=np.array([0, 1]), files=np.array(["a", "b"]))
    samples = read_samples(spec, VECTOR)
    assert len(samples) == 2
    assert samples.source == f"{spec} ('data' as input 'x')"


def test_a_model_without_batch_axis_takes_one_axis_less(tmp_path):
    samples = read_samples(save(tmp_path, x=rows(3)), model_of("float[4] x"))
    assert samples[0]["x"].shape == (4,)
    state = np.zeros((3, 2, 1, 4), np.float32)
    assert read_samples(save(tmp_path, x=state), model_of("float[2,N,4] x"))[0]["x"].shape == (2, 1, 4)


def test_an_array_without_axes_is_the_same_for_all_samples(tmp_path):
    model = model_of("float[N,4] x", "int64 rate")
    samples = read_samples(save(tmp_path, x=rows(3), rate=np.array(16000, np.int32)), model)
    assert [int(sample["rate"]) for sample in samples] == [16000] * 3
    assert samples[0]["rate"].dtype == np.int64


def test_lengths_trim_padded_sequences_and_their_labels():
    ids = np.array([[5, 6, 7, 0], [8, 9, 0, 0]], np.int16)
    samples = read_samples({"ids": ids, "lengths": np.array([3, 2]), "labels": ids + 1}, TOKENS)
    assert [sample["ids"].tolist() for sample in samples] == [[[5, 6, 7]], [[8, 9]]]
    assert [label.tolist() for label in samples.labels] == [[6, 7, 8], [9, 10]]
    assert [label.tolist() for label in samples[1:].labels] == [[9, 10]]


def test_lengths_leave_fixed_axes_alone():
    model = model_of("int64[N,T] ids", "float[N,4] x")
    samples = read_samples({"ids": np.ones((2, 4), int), "x": rows(2), "lengths": np.array([1, 2])}, model)
    assert samples[0]["ids"].shape == (1, 1)
    assert samples[0]["x"].shape == (1, 4)


@pytest.mark.parametrize(
    ("lengths", "sentence"),
    [
        (np.array([1, 5]), "'lengths' goes from 1 to 5 for sequences of 4"),
        (np.array([0, 1]), "'lengths' goes from 0 to 1 for sequences of 4"),
        (np.array([1.0, 2.0]), "'lengths' is float64 [2] where one integer per sample is expected"),
    ],
)
def test_lengths_must_fit(lengths, sentence):
    with refused(sentence):
        read_samples({"ids": np.ones((2, 4), int), "lengths": lengths}, TOKENS)


def test_labels_by_key_and_from_files(tmp_path):
    spec = save(tmp_path, x=rows(2), score=np.array([0.5, 0.25]))
    assert read_samples(spec, VECTOR, labels="score").labels.tolist() == [0.5, 0.25]
    (tmp_path / "t.csv").write_text("class,weight\n1,2.5\n0,3\n")
    np.save(tmp_path / "t.npy", np.array([7, 8]))
    assert read_samples(spec, VECTOR, labels=f"{tmp_path}/t.csv").labels.tolist() == [1, 0]
    assert read_samples(spec, VECTOR, labels=f"{tmp_path}/t.csv:weight").labels.tolist() == [2.5, 3]
    assert read_samples(spec, VECTOR, labels=f"{tmp_path}/t.npy").labels.tolist() == [7, 8]


def test_an_input_called_label_is_an_input():
    samples = read_samples({"x": rows(2), "label": np.array([1, 2])}, model_of("float[N,4] x", "int64[N] label"))
    assert samples.labels is None
    assert samples[1]["label"].tolist() == [2]


# --- element types, shapes ---


@pytest.mark.parametrize(
    ("given", "declared"),
    [
        ("float64", "float"),
        ("float32", "float16"),
        ("int16", "int64"),
        ("int64", "int32"),
        ("uint8", "float"),
        ("int64", "bool"),
        ("bool", "float"),
    ],
)
def test_element_types_change_without_loss(given, declared):
    model = model_of(f"{declared}[N,4] x")
    array = np.array([[0, 1, 1, 0]]).astype(given)
    sample = read_samples({"x": array}, model)[0]["x"]
    assert sample.dtype == model.graph.inputs[0].dtype.numpy()
    np.testing.assert_array_equal(sample.astype(given), array)


@pytest.mark.parametrize(
    ("values", "declared", "sentence"),
    [
        (np.array([[0.5]]), "int64[N,1]", "the model takes int64 where the data holds float64"),
        (np.array([[1.0]], "f4"), "bool[N,1]", "the model takes bool where the data holds float32"),
        (np.array([[300]]), "uint8[N,1]", "the model takes uint8 where the data holds int64 from 300 to 300"),
        (np.array([[-1]]), "uint64[N,1]", "the model takes uint64 where the data holds int64 from -1 to -1"),
        (np.array([[2**24 + 1]]), "float[N,1]", "the model takes float32 where the data holds int64 from 16777217"),
        (np.array([["a"]]), "float[N,1]", "the model takes float32 where the data holds <U1"),
        (np.array([[1j]]), "float[N,1]", "the model takes float32 where the data holds complex128"),
        (np.array([[np.nan]]), "float[N,1]", "the data holds NaN or infinity as float32"),
        (np.array([[np.inf]]), "float[N,1]", "the data holds NaN or infinity as float32"),
        (np.array([[1e300]]), "float[N,1]", "the data holds NaN or infinity as float32"),
        (np.array([[70000.0]], "f4"), "float16[N,1]", "the data holds NaN or infinity as float16"),
        (np.zeros((1, 5), "f4"), "float[N,4]", "one sample has shape [5] where the model takes [N, 4]"),
        (np.zeros((9, 4), "f4"), "float[8,4]", "one sample has shape [4] where the model takes [8, 4]"),
        (np.zeros((2, 3, 4, 5), "f4"), "float[N,4]", "one sample has shape [3, 4, 5] where the model takes [N, 4]"),
    ],
)
def test_what_does_not_fit_is_refused(values, declared, sentence):
    with refused(f"memory: sample 0: input 'x': {sentence}"):
        read_samples({"x": values}, model_of(f"{declared} x"))


def test_later_samples_are_checked_when_they_are_read():
    broken = rows(3)
    broken[2, 0] = np.nan
    samples = read_samples({"x": broken}, VECTOR)
    assert samples[1]["x"][0, 0] == 4
    with refused(
        "memory: sample 2: input 'x': the data holds NaN or infinity as float32; remove or repair that sample"
    ):
        list(samples)


def test_strings_feed_string_inputs():
    samples = read_samples({"x": np.array([["ab", "c"]])}, model_of("string[N,2] x"))
    assert samples[0]["x"].tolist() == [["ab", "c"]]


# --- refusals ---


def test_names_are_suggested(tmp_path):
    spec = save(tmp_path, x=rows(2), kinds=np.array([0, 1]))
    with refused(f"{spec}: no array 'kind'; did you mean 'kinds'?"):
        read_samples(spec, PAIR)
    with refused(f"{spec}: no labels 'kynds'; did you mean 'kinds'?"):
        read_samples(spec, VECTOR, labels="kynds")
    with refused("no such data; did you mean 'x.npz'?"):
        read_samples(str(tmp_path / "y.npz"), VECTOR)


def test_numbers_of_samples_must_agree(tmp_path):
    with refused("the arrays hold different numbers of samples: 'x' 2, 'kind' 3"):
        read_samples({"x": rows(2), "kind": np.array([0, 1, 2])}, PAIR)
    with refused("memory: 3 labels for 2 samples"):
        read_samples({"x": rows(2), "labels": np.array([0, 1, 2])}, VECTOR)
    with refused("memory: 1 labels for 2 samples"):
        read_samples({"x": rows(2), "labels": np.array(0)}, VECTOR)
    with refused("labels are numbers, not <U1"):
        read_samples({"x": rows(2), "labels": np.array(["a", "b"])}, VECTOR)
    with refused("memory: there is no sample in it"):
        read_samples({"x": rows(0)}, VECTOR)


def test_python_objects_are_never_unpickled(tmp_path):
    ragged = np.array([[1, 2], [3]], object)
    spec = save(tmp_path, ids=ragged)
    with refused(f"{spec}: array 'ids': not a readable .npz file: it holds Python objects, which are never unpickled"):
        read_samples(spec, TOKENS)
    np.savez_compressed(tmp_path / "z.npz", ids=ragged)
    with refused("array 'ids': not a readable .npz file: Object arrays cannot be loaded"):
        read_samples(str(tmp_path / "z.npz"), TOKENS)
    with refused("memory: the array 'ids' holds Python objects; sequences of different lengths are padded"):
        read_samples({"ids": ragged}, TOKENS)


@pytest.mark.parametrize("name", ["x.npz", "x.npy"])
def test_broken_files_are_refused(tmp_path, name):
    path = tmp_path / name
    if name == "x.npz":
        np.savez(path, x=rows(100))
    else:
        np.save(path, rows(100))
    whole = path.read_bytes()
    for content in (b"", b"not an array", whole[:-200], whole[:100]):
        path.write_bytes(content)
        with refused(f"{path}: not a readable .{name[-3:]} file: "):
            read_samples(str(path), VECTOR)


def test_a_corrupt_compressed_array_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).standard_normal((100, 4)))
    content = bytearray(path.read_bytes())
    content[300:400] = bytes(100)
    path.write_bytes(content)
    with refused(f"{path}: array 'x': not a readable .npz file: "):
        read_samples(str(path), VECTOR)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("1,2")
    with refused(
        "'.csv' is not a form of data that is read; give x.npz, a folder of .npy or images, or module:function"
    ):
        read_samples(str(tmp_path / "x.csv"), VECTOR)
    with refused("nowhere/data: no such data; give x.npz, a folder of .npy or images, or module:function"):
        read_samples("nowhere/data", VECTOR)
