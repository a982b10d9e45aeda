"""Images: how pixels become inputs, where their labels are found, and what each refusal says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from optkit.dataset.images import Preprocess, read_preprocess
from optkit.dataset.samples import read_samples
from optkit.model.loading import load_text
from refusals import refused


def model_of(*inputs: str):
    """A model that passes its inputs through, as ``float[N,4] x`` and so on."""
    names = [declared.split()[-1] for declared in inputs]
    outputs = [declared.replace(f" {name}", f" {name}_out") for declared, name in zip(inputs, names, strict=True)]
    body = " ".join(f"{name}_out = Identity({name})" for name in names)
    return load_text(
        f'<ir_version: 10, opset_import: ["": 21]> main ({", ".join(inputs)}) => ({", ".join(outputs)}) {{ {body} }}'
    )


IMAGE = model_of("float[N,3,4,6] image")


def save(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "x.npz", **arrays)
    return str(folder / "x.npz")


def picture(folder: Path, name: str, width: int = 6, height: int = 4, seed: int = 0) -> np.ndarray:
    """Write an image and return its pixels, [height, width, 3]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(pixels).save(folder / name)
    return pixels


def preprocess(folder: Path, text: str) -> Path:
    (folder / "preprocess.toml").write_text(text)
    return folder / "preprocess.toml"


def test_images_become_inputs_by_scale_mean_and_std(tmp_path):
    pixels = picture(tmp_path, "a.png").astype(np.float64)
    preprocess(tmp_path, 'scale = "1/255"\nmean = [0.5, 0.25, 0.125]\nstd = [0.5, 1, 2]')
    samples = read_samples(str(tmp_path), IMAGE)
    expected = (pixels / 255 - [0.5, 0.25, 0.125]) / [0.5, 1, 2]
    assert samples[0]["image"].dtype == np.float32
    np.testing.assert_array_equal(samples[0]["image"], expected.transpose(2, 0, 1)[None].astype(np.float32))


def test_bgr_and_nhwc(tmp_path):
    pixels = picture(tmp_path, "a.bmp")
    preprocess(tmp_path, 'channels = "BGR"\nlayout = "NHWC"\nmean = [104, 117, 123]')
    sample = read_samples(str(tmp_path), model_of("float[N,4,6,3] image"))[0]["image"]
    np.testing.assert_array_equal(sample[0], pixels[..., ::-1].astype(np.float32) - [104, 117, 123])


def test_grey_images_without_a_channel_axis(tmp_path):
    grey = np.arange(24, dtype=np.uint8).reshape(4, 6)
    Image.fromarray(grey).save(tmp_path / "a.png")
    preprocess(tmp_path, 'channels = "L"\nlayout = "NHW"')
    np.testing.assert_array_equal(read_samples(str(tmp_path), model_of("float[N,4,6] x"))[0]["x"][0], grey)
    preprocess(tmp_path, 'channels = "L"')
    np.testing.assert_array_equal(read_samples(str(tmp_path), model_of("float[1,1,4,6] x"))[0]["x"][0, 0], grey)


def test_integer_inputs_take_whole_numbers_only(tmp_path):
    pixels = picture(tmp_path, "a.png").astype(int)
    preprocess(tmp_path, "mean = 128")
    sample = read_samples(str(tmp_path), model_of("int8[N,3,4,6] x"))[0]["x"]
    np.testing.assert_array_equal(sample[0], pixels.transpose(2, 0, 1) - 128)
    preprocess(tmp_path, "mean = 127")
    with refused("preprocess.toml: 'scale', 'mean' and 'std' give -127 to 128, which int8 does not hold"):
        read_samples(str(tmp_path), model_of("int8[N,3,4,6] x"))
    preprocess(tmp_path, "scale = 0.3")
    with refused("give 0 to 76.5, which uint8 does not hold"):
        read_samples(str(tmp_path), model_of("uint8[N,3,4,6] x"))


def test_resize_and_crop(tmp_path):
    pixels = picture(tmp_path, "a.png", 12, 16)
    model = model_of("float[N,3,H,W] x")

    def shape(text: str) -> tuple[int, ...]:
        preprocess(tmp_path, text)
        return read_samples(str(tmp_path), model)[0]["x"].shape[2:]

    assert shape("resize = [5, 7]") == (7, 5)
    assert shape("resize_short = 6") == (8, 6)
    assert shape("resize_long = 8") == (8, 6)
    assert shape('resize = 3\nresample = "nearest"') == (3, 3)
    assert shape("crop = [4, 6]") == (6, 4)
    sample = read_samples(str(tmp_path), model)[0]["x"]
    np.testing.assert_array_equal(sample[0], pixels[5:11, 4:8].transpose(2, 0, 1))


def test_pad_surrounds_small_images(tmp_path):
    pixels = picture(tmp_path, "a.png", 2, 8)
    model = model_of("float[N,3,4,6] x")
    preprocess(tmp_path, "crop = [6, 4]")
    with refused(
        f"{tmp_path / 'a.png'}: the image is 2x8, smaller than the crop of 6x4; set 'resize_short', or 'pad' to fill"
    ):
        read_samples(str(tmp_path), model)
    preprocess(tmp_path, "crop = [6, 4]\npad = 7")
    sample = read_samples(str(tmp_path), model)[0]["x"][0]
    np.testing.assert_array_equal(sample[:, :, 2:4], pixels[2:6].transpose(2, 0, 1))
    assert (sample[:, :, :2] == 7).all()
    assert (sample[:, :, 4:] == 7).all()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("chanels = 'RGB'", "no key 'chanels'; did you mean 'channels' or 'labels'?"),
        ("channels = 'RBG'", "'channels' = 'RBG': input should be 'RGB', 'BGR' or 'L'"),
        ("scale = '1/0'", "'scale' = '1/0': not a number or a quotient such as '1/255'"),
        ("scale = 'small'", "'scale' = 'small': not a number or a quotient such as '1/255'"),
        ("std = 0", "'std' must not be 0"),
        ("mean = [1, 2]", "'mean' has 2 numbers for 3 channels"),
        ("resize = 3\nresize_short = 3", "give only one of 'resize', 'resize_short' and 'resize_long'"),
        ("pad = 3", "'pad' surrounds images that are smaller than 'crop', which is not set"),
        ("crop = 4\npad = 300", "'pad' = 300: input should be less than or equal to 255"),
        ("layout = 'NHW'", "layout 'NHW' needs channels = 'L'"),
        ("crop = 0", "'crop' = 0: input should be greater than 0"),
        ("mean = nan", "'mean' = nan: input should be a finite number"),
        ("crop = ", "not a readable TOML file: "),
        ("input = 'imag'", "'imag' is none of the model's inputs; did you mean 'image'?"),
    ],
)
def test_what_preprocess_toml_cannot_say(tmp_path, text, sentence):
    picture(tmp_path, "a.png")
    preprocess(tmp_path, text)
    with refused(sentence):
        read_samples(str(tmp_path), IMAGE)


def test_images_need_a_preprocess_toml(tmp_path):
    picture(tmp_path / "images", "a.png")
    with refused(
        "a folder of images needs a preprocess.toml that says how they become the model's input; put one there"
    ):
        read_samples(str(tmp_path / "images"), IMAGE)
    file = preprocess(tmp_path, "")
    assert len(read_samples(str(tmp_path / "images"), IMAGE, preprocess=file)) == 1
    with refused(f"{tmp_path / 'none.toml'}: not a readable TOML file: "):
        read_samples(str(tmp_path / "images"), IMAGE, preprocess=tmp_path / "none.toml")


def test_a_model_with_several_inputs_needs_the_images_input_named(tmp_path):
    picture(tmp_path, "a.png")
    preprocess(tmp_path, "")
    with refused("preprocess.toml: the key 'input' is missing; known: image, size"):
        read_samples(str(tmp_path), model_of("float[N,3,4,6] image", "int64[2] size"))


@pytest.mark.parametrize("content", [b"", b"not a png", None])
def test_an_unreadable_image_names_the_file(tmp_path, content):
    picture(tmp_path, "a.png", 64, 64)
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
    preprocess(tmp_path, "")
    with refused(f"{tmp_path / 'a.png'}: not a readable image: "):
        read_samples(str(tmp_path), IMAGE)


def test_sixteen_bit_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(tmp_path / "a.png")
    preprocess(tmp_path, "")
    with refused("pixels of mode 'I;16' are not 8-bit"):
        read_samples(str(tmp_path), IMAGE)


def test_wrong_size_names_file_and_shapes(tmp_path):
    picture(tmp_path, "a.jpg", 5, 5)
    preprocess(tmp_path, "")
    with refused(
        f"{tmp_path / 'a.jpg'}: input 'image': one sample has shape [3, 5, 5] where the model takes [N, 3, 4, 6]"
    ):
        read_samples(str(tmp_path), IMAGE)


def test_uint8_arrays_are_images_too(tmp_path):
    pixels = np.stack([picture(tmp_path / "other", "a.png", seed=seed) for seed in range(3)])
    file = preprocess(tmp_path, 'array = "photos"\nscale = "1/255"')
    expected = (pixels[1].astype(np.float64) / 255).transpose(2, 0, 1)[None].astype(np.float32)
    samples = read_samples(save(tmp_path, photos=pixels, labels=np.arange(3)), IMAGE)
    np.testing.assert_array_equal(samples[1]["image"], expected)
    file.write_text('array = "photos"\narray_layout = "NCHW"\nscale = "1/255"')
    samples = read_samples(save(tmp_path, photos=pixels.transpose(0, 3, 1, 2)), IMAGE)
    np.testing.assert_array_equal(samples[1]["image"], expected)
    file.write_text('array = "photo"\narray_layout = "HWC"\nscale = "1/255"')
    samples = read_samples(save(tmp_path, photo=pixels[1], other=pixels), IMAGE)
    assert len(samples) == 1
    np.testing.assert_array_equal(samples[0]["image"], expected)


def test_npy_files_can_hold_uint8_images(tmp_path):
    pixels = picture(tmp_path / "other", "a.png")
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.save(folder / "a.npy", pixels)
    preprocess(folder, "")
    np.testing.assert_array_equal(read_samples(str(folder), IMAGE)[0]["image"][0], pixels.transpose(2, 0, 1))


def test_arrays_that_are_no_such_images(tmp_path):
    file = preprocess(tmp_path, "")
    floats = np.zeros((2, 3, 4, 6), np.float32)
    assert len(read_samples(save(tmp_path, image=floats), IMAGE)) == 2  # what lies beside is for other data
    with refused("preprocess.toml applies to uint8 images, and the data for 'image' is float32"):
        read_samples(save(tmp_path, image=floats), IMAGE, preprocess=file)
    with refused("images have 6 channels where channels = 'RGB' needs 3; set 'array_layout' or 'channels'"):
        read_samples(save(tmp_path, image=floats.astype(np.uint8)), IMAGE)
    with refused("shape [2, 72] has 2 axes where array_layout 'NHWC' has 4; set 'array_layout'"):
        file.write_text('array_layout = "NHWC"')
        read_samples(save(tmp_path, image=floats.astype(np.uint8).reshape(2, -1)), IMAGE)
    with refused("no array 'photos' for the model's input 'image'; known: image"):
        file.write_text('array = "photos"')
        read_samples(save(tmp_path, image=floats.astype(np.uint8)), IMAGE)


# --- labels of images ---


def test_labels_csv_is_joined_on_the_file_names(tmp_path):
    for number, name in enumerate(("b", "a", "c")):
        picture(tmp_path / "images", f"{name}.png", seed=number)
    preprocess(tmp_path, "")
    (tmp_path / "labels.csv").write_text("file,label\nimages/c.png,2\nimages/a.png,0\nimages/b.png,1\nimages/z.png,9\n")
    assert read_samples(str(tmp_path), IMAGE).labels.tolist() == [0, 1, 2]
    file = preprocess(tmp_path / "images", "")
    samples = read_samples(str(tmp_path / "images"), IMAGE, preprocess=file, labels=f"{tmp_path}/labels.csv:label")
    assert samples.labels.tolist() == [0, 1, 2]
    (tmp_path / "labels.csv").write_text("file,label\nimages/c.png,2\nimages/a.png,0\n")
    with refused(f"{tmp_path / 'labels.csv'}: no row for 'b.png' in the column 'file'"):
        read_samples(str(tmp_path), IMAGE)


def test_labels_in_another_folder_are_joined_on_names_that_occur_once(tmp_path):
    picture(tmp_path / "images", "a.png")
    preprocess(tmp_path / "images", 'labels = "t.csv"\nlabel_column = "kind"')
    (tmp_path / "images" / "t.csv").write_text("filename,kind\nelsewhere/a.png,4\n")
    assert read_samples(str(tmp_path / "images"), IMAGE).labels.tolist() == [4]
    (tmp_path / "images" / "t.csv").write_text("filename,kind\nelsewhere/a.png,4\nthere/a.png,5\n")
    with refused("no row for 'a.png'"):
        read_samples(str(tmp_path / "images"), IMAGE)


def test_labels_beside_preprocess_toml_when_the_data_cannot_be_written(tmp_path):
    picture(tmp_path / "data", "a.png")
    file = preprocess(tmp_path, 'labels = "t.csv"')
    (tmp_path / "t.csv").write_text("image,label\na.png,3\n")
    assert read_samples(str(tmp_path / "data"), IMAGE, preprocess=file).labels.tolist() == [3]


def test_labels_csv_that_cannot_be_used(tmp_path):
    picture(tmp_path, "a.png")
    preprocess(tmp_path, "")
    csv = tmp_path / "labels.csv"
    csv.write_text("file,kind\na.png,4\n")
    with refused(f"{csv}: no column is named 'label'; name one of file, kind as labels.csv:COLUMN"):
        read_samples(str(tmp_path), IMAGE)
    with refused(f"{csv}: no column 'knd'; did you mean 'kind'?"):
        read_samples(str(tmp_path), IMAGE, labels=f"{csv}:knd")
    with refused("t.csv: no such labels file; give file.csv, file.csv:column or file.npy"):
        read_samples(str(tmp_path), IMAGE, labels="t.csv:kind")
    csv.write_text("file,label\na.png,cat\n")
    with refused(f"{csv}: the column 'label' is not numeric: could not convert string to float: 'cat'"):
        read_samples(str(tmp_path), IMAGE)
    csv.write_text("label\n1\n2\n")
    with refused(f"{csv}: 2 labels for 1 samples"):
        read_samples(str(tmp_path), IMAGE)
    csv.write_bytes(b"\xff\xfe\x00")
    with refused(f"{csv}: not a readable csv file: "):
        read_samples(str(tmp_path), IMAGE)


def test_a_folder_for_each_class(tmp_path):
    preprocess(tmp_path, "")
    for name in ("dog/1.png", "cat/1.png", "cat/2.png"):
        picture(tmp_path, name)
    assert read_samples(str(tmp_path), IMAGE).labels.tolist() == [0, 0, 1]
    (tmp_path / "classes.txt").write_text("bird a bird\ncat a cat\ndog a dog\n")
    assert read_samples(str(tmp_path), IMAGE).labels.tolist() == [1, 1, 2]
    (tmp_path / "classes.txt").write_text("bird\ncat\n")
    with refused(f"{tmp_path / 'classes.txt'}: no line begins with the class folder's name 'dog'"):
        read_samples(str(tmp_path), IMAGE)


def test_class_folders_named_by_number(tmp_path):
    preprocess(tmp_path, "")
    for name in ("10/1.png", "2/1.png"):
        picture(tmp_path, name)
    assert read_samples(str(tmp_path), IMAGE).labels.tolist() == [10, 2]


def test_one_sub_folder_is_no_class(tmp_path):
    preprocess(tmp_path, "")
    picture(tmp_path, "images/1.png")
    assert read_samples(str(tmp_path), IMAGE).labels is None


# --- documentation ---


def test_the_documentation_lists_every_key_and_its_examples_are_valid(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    table = text[text.index("| key |") : text.index("## Labels")]
    named = {key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1] if row else "")}
    assert named == set(Preprocess.model_fields)
    examples = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        assert read_preprocess(preprocess(tmp_path, example)).crop == (224, 224)
