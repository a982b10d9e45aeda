"""Weight files and compressed constants: read back as coremltools writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.errors import InputError
from optkit_targets.coreml.interpreter.blob import BlobFile
from optkit_targets.coreml.interpreter.elements import unpack

pytest.importorskip("coremltools")

from mil_programs import normal, saved
from optkit_targets.coreml import toolkit
from optkit_targets.coreml.interpreter import load

WIDTHS = (1, 2, 3, 4, 6)


@given(st.sampled_from(WIDTHS), st.integers(0, 70), st.integers(0, 2**32 - 1))
def test_elements_come_back_from_packed_bits(bits: int, count: int, seed: int) -> None:
    elements = np.random.default_rng(seed).integers(0, 1 << bits, count, dtype=np.uint8)
    # One after another, each from its lowest bit on, bytes filled from their lowest bit on.
    stream = [element >> bit & 1 for element in elements.tolist() for bit in range(bits)]
    packed = np.packbits(np.array(stream, np.uint8), bitorder="little")
    assert (unpack(packed, bits, count) == elements).all()


@given(st.lists(st.integers(-8, 7), max_size=20))
def test_four_bits_in_twos_complement(elements: list[int]) -> None:
    nibbles = [element & 15 for element in elements] + [0]
    packed = np.array([low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=False)], np.uint8)
    found = unpack(packed, 4, len(elements), signed=True)
    assert found.dtype == np.int8
    assert found.tolist() == elements


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="9 elements of 4 bits do not fit in 4 bytes"):
        unpack(np.zeros(4, np.uint8), 4, 9)


@pytest.mark.parametrize("count", [1, 7, 64, 1001])
def test_blobs_are_read_as_coremltools_writes_them(tmp_path: Path, count: int) -> None:
    toolkit.coremltools()
    from coremltools.libmilstoragepython import _BlobStorageWriter as Writer

    generator = np.random.default_rng(count)
    path = tmp_path / "weight.bin"
    writer = Writer(str(path))
    written: list[tuple[int, str, np.ndarray]] = []
    half = generator.standard_normal(count).astype(np.float16)
    written.append((writer.write_fp16_data(half.view(np.uint16)), "FLOAT16", half))
    single = generator.standard_normal(count).astype(np.float32)
    written.append((writer.write_float_data(single), "FLOAT32", single))
    for kind in ("int8", "uint8", "int16", "uint16", "int32", "uint32"):
        limits = np.iinfo(kind)
        array = generator.integers(limits.min, limits.max, count, dtype=np.int64, endpoint=True).astype(kind)
        written.append((getattr(writer, f"write_{kind}_data")(array), kind.upper(), array))
    signed = generator.integers(-8, 8, count).astype(np.int8)
    written.append((writer.write_int4_data(signed), "INT4", signed))
    for bits in WIDTHS:
        array = generator.integers(0, 1 << bits, count).astype(np.uint8)
        written.append((getattr(writer, f"write_uint{bits}_data")(array), f"UINT{bits}", array))
    del writer  # which completes the file

    file = BlobFile(path)
    assert file.count == len(written)
    for offset, name, array in written:
        blob = file.read(offset)
        assert blob.element.name == name
        assert blob.stored_bytes == -(-count * blob.element.bits // 8)
        np.testing.assert_array_equal(blob.values, array)


def test_damaged_weight_files_are_sentences(tmp_path: Path) -> None:
    package = saved(tmp_path, lambda mb, x: {"y": mb.linear(x=x, weight=normal(8, 4))}, {"x": normal(2, 4)})
    path = package / "Data/com.apple.CoreML/weights/weight.bin"
    whole = path.read_bytes()
    cases = {
        whole[:40]: "has 40 bytes, less than its header of 64",
        whole[:100]: "ends before the blob at offset 64",
        whole[:150]: "ends within the blob at offset 64",
        whole[:64] + bytes(4) + whole[68:]: "no blob begins at offset 64",
        whole[:4] + bytes([9]) + whole[5:]: "has version 9, not 2",
        whole[:68] + bytes([5]) + whole[69:]: "elements of type BFLOAT16",
        whole[:68] + bytes([3]) + whole[69:]: "is FLOAT32, and the weight file has UINT8",
        whole[:72] + bytes([64, 0]) + whole[74:]: "has 16 elements, which do not make its shape",
        b"": "has 0 bytes",
    }
    for damaged, sentence in cases.items():
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=sentence):
            load(package)
    path.unlink()
    with pytest.raises(InputError, match="the weight file cannot be read: No such file"):
        load(package)


def _network(mb: Any, x: Any) -> dict[str, Any]:
    hidden = mb.relu(x=mb.conv(x=x, weight=normal(16, 8, 3, 3), pad_type="same", name="first"))
    flat = mb.reduce_mean(x=hidden, axes=[2, 3], keep_dims=False)
    return {"y": mb.linear(x=flat, weight=normal(32, 16, seed=1), name="second")}


def _configurations(deployment: int) -> dict[str, list[tuple[str, Any]]]:
    """Return compressions as lists of coremltools' functions with their configurations."""
    cto = toolkit.coremltools().optimize.coreml
    small = {"weight_threshold": 64}

    def palettes(bits: int, **options: Any) -> tuple[str, Any]:
        return "palettize_weights", cto.OpPalettizerConfig(mode="uniform", nbits=bits, **small, **options)

    def integers(**options: Any) -> tuple[str, Any]:
        return "linear_quantize_weights", cto.OpLinearQuantizerConfig(**small, **options)

    pruned = ("prune_weights", cto.OpMagnitudePrunerConfig(target_sparsity=0.6, **small))
    found = {
        "symmetric": [integers(mode="linear_symmetric")],
        "asymmetric": [integers(mode="linear")],
        "pruned": [pruned],
        **{f"palettes of {bits} bits": [palettes(bits)] for bits in (1, 2, 4, 6, 8)},
    }
    if deployment < 18:
        return found
    blocks = {"granularity": "per_block", "block_size": 4}
    grouped = {"granularity": "per_grouped_channel", "group_size": 4}
    return found | {
        "int4 per block": [integers(mode="linear_symmetric", dtype="int4", **blocks)],
        "uint4 per block": [integers(mode="linear", dtype="uint4", **blocks)],
        "per tensor": [integers(mode="linear", dtype="int8", granularity="per_tensor")],
        "grouped palettes": [palettes(3, **grouped)],
        "palettes with scales": [palettes(4, enable_per_channel_scale=True, **grouped)],
        "palettes of vectors": [
            (
                "palettize_weights",
                cto.OpPalettizerConfig(mode="kmeans", nbits=2, cluster_dim=2, weight_threshold=64),
            )
        ],
        "pruned palettes": [pruned, palettes(4)],
        "pruned integers": [pruned, integers(mode="linear_symmetric", dtype="int8")],
        "palettes of integers": [
            palettes(4),
            integers(mode="linear_symmetric", dtype="int8", granularity="per_tensor"),
        ],
    }


@pytest.mark.parametrize(("deployment", "half"), [(16, False), (18, True)])
def test_compressed_constants_expand_as_coremltools_expands_them(tmp_path: Path, deployment: int, half: bool) -> None:
    ct = toolkit.coremltools()
    cto = ct.optimize.coreml
    package = saved(tmp_path, _network, {"x": normal(1, 8, 6, 6)}, deployment=deployment, half=half)
    x = {"x": normal(1, 8, 6, 6, seed=2)}
    original = ct.models.MLModel(str(package), skip_model_load=True)
    for name, steps in _configurations(deployment).items():
        model = original
        with toolkit.quiet():
            for index, (function, configuration) in enumerate(steps):
                joint = {"joint_compression": True} if index else {}
                model = getattr(cto, function)(model, cto.OptimizationConfig(configuration), **joint)
            dense = cto.decompress_weights(model)
        paths = [tmp_path / f"{name} {kind}.mlpackage" for kind in ("compressed", "dense")]
        for each, path in zip((model, dense), paths, strict=True):
            each.save(str(path))
        compressed, expanded = (load(path) for path in paths)
        forms = {weight.op_type for weight in compressed.weights() if weight.elements >= 64}
        assert forms, name
        assert all(form.startswith("constexpr_") for form in forms), name
        assert {weight.op_type for weight in expanded.weights()} == {"const"}, name
        np.testing.assert_array_equal(compressed.run(x)["y"], expanded.run(x)["y"], err_msg=name)
        sizes = [sum(weight.stored_bytes for weight in each.weights()) for each in (compressed, expanded)]
        # Scaled palettes are one for each input channel and tap: more than these small weights save.
        assert sizes[0] < sizes[1] or name == "palettes with scales", name


@pytest.mark.parametrize(("deployment", "bits"), [(16, 8), (18, 4)])
def test_weights_tell_their_form_and_what_they_take(tmp_path: Path, deployment: int, bits: int) -> None:
    cto = toolkit.coremltools().optimize.coreml
    package = saved(tmp_path, _network, {"x": normal(1, 8, 6, 6)}, deployment=deployment, half=True)
    model = toolkit.coremltools().models.MLModel(str(package), skip_model_load=True)
    options = {"dtype": "int4", "granularity": "per_block", "block_size": 8} if bits == 4 else {"dtype": "int8"}
    configuration = cto.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=1000, **options)
    with toolkit.quiet():
        model = cto.linear_quantize_weights(model, cto.OptimizationConfig(configuration))
    model.save(str(tmp_path / "small.mlpackage"))
    first, second = sorted(load(tmp_path / "small.mlpackage").weights(), key=lambda weight: -weight.elements)[:2]
    elements = 16 * 8 * 3 * 3
    assert (first.bits, first.elements) == (bits, elements)
    if bits == 4:  # one scale, float16, for a block of eight input channels
        assert first.op_type == "constexpr_blockwise_shift_scale"
        assert first.stored_bytes == elements // 2 + 2 * 16
    else:  # one scale, float16, and one zero point, int8, for an output channel
        assert first.op_type == "constexpr_affine_dequantize"
        assert elements + 2 * 16 <= first.stored_bytes <= elements + 3 * 16 + 4
    assert (second.op_type, second.bits, second.elements, second.stored_bytes) == ("const", 16, 512, 1024)
