"""Operators of the interpreter that move, select, make and resample elements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from mil_programs import close, normal, onnx, run

Array = np.ndarray


def test_shapes_and_slices(tmp_path: Path) -> None:
    x = normal(2, 3, 4)
    cases: dict[str, tuple[Any, Array]] = {
        "reshape": (lambda mb, x: mb.reshape(x=x, shape=[4, -1]), x.reshape(4, 6)),
        # From iOS 17 on, a 0 is the dimension as far from the end: 2 and 4 here.
        "zeros": (lambda mb, x: mb.reshape(x=x, shape=[1, 0, -1, 0]), x.reshape(1, 2, 3, 4)),
        "transpose": (lambda mb, x: mb.transpose(x=x, perm=[2, 0, -2]), x.transpose(2, 0, 1)),
        "expand": (lambda mb, x: mb.expand_dims(x=x, axes=[0, -1]), x[None, ..., None]),
        "squeeze": (lambda mb, x: mb.squeeze(x=mb.expand_dims(x=x, axes=[1]), axes=[1]), x),
        "flatten": (lambda mb, x: mb.flatten2d(x=x, axis=-1), x.reshape(6, 4)),
        "concat": (lambda mb, x: mb.concat(values=(x, x), axis=1), np.concatenate([x, x], 1)),
        "turns": (
            lambda mb, x: mb.concat(values=(x, mb.exp(x=x)), axis=1, interleave=True),
            np.stack([x, np.exp(x)], 2).reshape(2, 6, 4),
        ),
        "stack": (lambda mb, x: mb.stack(values=(x, x), axis=1), np.stack([x, x], 1)),
        "split": (lambda mb, x: mb.split(x=x, split_sizes=[1, 3], axis=2)[1], x[..., 1:]),
        "halves": (lambda mb, x: mb.split(x=x, num_splits=2, axis=0)[1], x[1:]),
        "backwards": (
            lambda mb, x: mb.slice_by_index(
                x=x,
                begin=[0, 2, -1],
                end=[0, 0, 0],
                stride=[1, -1, -2],
                end_mask=[True, False, True],
            ),
            x[:, 2:0:-1, -1::-2],
        ),
        "indexed": (
            lambda mb, x: mb.slice_by_index(
                x=x,
                begin=[0, -1, 1],
                end=[2, 0, 3],
                begin_mask=[True, False, False],
                squeeze_mask=[False, True, False],
            ),
            x[:, -1, 1:3],
        ),
        "sized": (lambda mb, x: mb.slice_by_size(x=x, begin=[0, 1, 1], size=[-1, 2, 2]), x[:, 1:3, 1:3]),
        "tile": (lambda mb, x: mb.tile(x=x, reps=[1, 2, 3]), np.tile(x, (1, 2, 3))),
        "reverse": (lambda mb, x: mb.reverse(x=x, axes=[0, 2]), x[::-1, :, ::-1]),
        "windows": (
            lambda mb, x: mb.sliding_windows(x=x, axis=2, size=2, stride=2),
            np.stack([x[..., :2], x[..., 2:]], 2),
        ),
        "crop": (lambda mb, x: mb.crop(x=x, crop_height=[1, 0], crop_width=[1, 2]), x[:, 1:, 1:2]),
        "pad": (
            lambda mb, x: mb.pad(x=x, pad=[1, 0, 2, 1], mode="constant", constant_val=7.0),
            np.pad(x, [(0, 0), (1, 0), (2, 1)], constant_values=7),
        ),
        "mirror": (
            lambda mb, x: mb.pad(x=x, pad=[1, 0, 2, 1], mode="reflect"),
            np.pad(x, [(0, 0), (1, 0), (2, 1)], "reflect"),
        ),
        "edge": (
            lambda mb, x: mb.pad(x=x, pad=[1, 0, 2, 1], mode="replicate"),
            np.pad(x, [(0, 0), (1, 0), (2, 1)], "edge"),
        ),
        "band": (lambda mb, x: mb.band_part(x=x, lower=0, upper=1), np.triu(x) - np.triu(x, 2)),
        "sequences": (
            lambda mb, x: mb.reverse_sequence(x=x, lengths=[1, 3], seq_axis=1, batch_axis=0),
            np.stack([x[0], x[1, ::-1]]),
        ),
        "like": (lambda mb, x: mb.fill_like(ref_tensor=x, value=2.0), np.full((2, 3, 4), 2, np.float32)),
        "cumsum": (
            lambda mb, x: mb.cumsum(x=x, axis=2, exclusive=True, reverse=True),
            onnx("CumSum", x, np.array(2), exclusive=1, reverse=1)[0],
        ),
    }
    found = run(tmp_path, lambda mb, x: {f"y_{name}": case[0](mb, x) for name, case in cases.items()}, {"x": x})
    for name, (_, expected) in cases.items():
        close(found[f"y_{name}"], expected)


def test_updates_of_slices(tmp_path: Path) -> None:
    x, update = normal(3, 4), normal(2, 2, seed=1)

    def build(mb: Any, x: Any, u: Any) -> dict[str, Any]:
        return {"y": mb.slice_update(x=x, update=u, begin=[1, 0], end=[3, 4], stride=[1, 2])}

    expected = x.copy()
    expected[1:3, ::2] = update
    close(run(tmp_path, build, {"x": x, "u": update}, deployment=18)["y"], expected)


def test_space_channels_and_samples(tmp_path: Path) -> None:
    x = normal(4, 8, 4, 6)

    def build(mb: Any, x: Any) -> dict[str, Any]:
        batched = mb.space_to_batch(x=x, block_shape=[2, 3], paddings=[[1, 1], [0, 0]])
        return {
            "depth_to_space": mb.depth_to_space(x=x, block_size=2),
            "space_to_depth": mb.space_to_depth(x=x, block_size=2),
            "pixel_shuffle": mb.pixel_shuffle(x=x, upscale_factor=2),
            "pixel_unshuffle": mb.pixel_unshuffle(
                x=mb.pixel_shuffle(x=x, upscale_factor=2), downscale_factor=np.uint32(2)
            ),
            "batched": batched,
            "back": mb.batch_to_space(x=batched, block_shape=[2, 3], crops=[[1, 1], [0, 0]]),
        }

    found = run(tmp_path, build, {"x": x})
    close(found["depth_to_space"], onnx("DepthToSpace", x, blocksize=2, mode="DCR")[0])
    close(found["space_to_depth"], onnx("SpaceToDepth", x, blocksize=2)[0])
    close(found["pixel_shuffle"], onnx("DepthToSpace", x, blocksize=2, mode="CRD")[0])
    close(found["pixel_unshuffle"], x)
    # TensorFlow's space_to_batch_nd: sample (i * 3 + j) * 4 + n is what lies at row i, column j of the blocks of n.
    padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (0, 0)])
    close(found["batched"], np.concatenate([padded[:, :, i::2, j::3] for i in range(2) for j in range(3)]))
    close(found["back"], x)


def test_gathering(tmp_path: Path) -> None:
    x = normal(2, 3, 4)
    rows = np.array([[2, 0], [1, 1]], np.int32)
    along = np.array([[[0, 1, 2, 0]], [[2, 2, 1, 0]]], np.int32)
    places = np.array([[0, 2], [1, 0]], np.int32)

    def build(mb: Any, x: Any, rows: Any, along: Any, places: Any) -> dict[str, Any]:
        return {
            "gather": mb.gather(x=x, indices=rows, axis=1),
            "batched": mb.gather(x=x, indices=rows, axis=1, batch_dims=1),
            "elements": mb.gather_along_axis(x=x, indices=along, axis=1),
            "nd": mb.gather_nd(x=x, indices=places),
            "nd_batched": mb.gather_nd(x=x, indices=mb.expand_dims(x=places, axes=[1]), batch_dims=1),
        }

    found = run(tmp_path, build, {"x": x, "rows": rows, "along": along, "places": places})
    wide = {name: array.astype(np.int64) for name, array in {"rows": rows, "along": along, "places": places}.items()}
    close(found["gather"], onnx("Gather", x, wide["rows"], axis=1)[0])
    close(found["batched"], np.stack([x[0, rows[0]], x[1, rows[1]]]))
    close(found["elements"], onnx("GatherElements", x, wide["along"], axis=1)[0])
    close(found["nd"], onnx("GatherND", x, wide["places"])[0])
    close(found["nd_batched"], onnx("GatherND", x, wide["places"][:, None], batch_dims=1)[0])


@pytest.mark.parametrize("mode", ["update", "add", "sub", "mul", "div", "max", "min"])
def test_scattering(tmp_path: Path, mode: str) -> None:
    x, updates = normal(4, 3), normal(2, 3, seed=1) + 3
    rows, places = np.array([3, 1], np.int32), np.array([[0, 2], [3, 1], [0, 0]], np.int32)
    along = np.array([[0, 1, 3], [2, 2, 0]], np.int32)

    def build(mb: Any, x: Any, u: Any) -> dict[str, Any]:
        flat = mb.reduce_sum(x=mb.transpose(x=u, perm=[1, 0]), axes=[1], keep_dims=False)
        return {
            "rows": mb.scatter(data=x, indices=rows, updates=u, axis=0, mode=mode),
            "along": mb.scatter_along_axis(data=x, indices=along, updates=u, axis=0, mode=mode),
            "nd": mb.scatter_nd(data=x, indices=places, updates=flat, mode=mode),
        }

    def changed(index: Any, values: Array) -> Array:
        expected = x.copy()
        old = x[index]
        new = {"add": old + values, "sub": old - values, "mul": old * values, "div": old / values, "update": values}
        new |= {"max": np.maximum(old, values), "min": np.minimum(old, values)}
        expected[index] = new[mode]
        return expected

    found = run(tmp_path, build, {"x": x, "u": updates})
    close(found["rows"], changed(rows, updates))
    close(found["along"], changed((along, np.arange(3)), updates))
    close(found["nd"], changed((places[:, 0], places[:, 1]), updates.sum(0)))


def test_adding_twice_to_one_place(tmp_path: Path) -> None:
    def build(mb: Any, x: Any) -> dict[str, Any]:
        return {"y": mb.scatter(data=x, indices=[1, 1], updates=np.array([2.0, 3.0], np.float32), mode="add")}

    close(run(tmp_path, build, {"x": np.zeros(2, np.float32)})["y"], np.array([0, 5], np.float32))


def test_sorting_and_selecting(tmp_path: Path) -> None:
    x = np.array([[3, 1, 2, 3, 0], [0, 0, 5, 4, 4]], np.float32)

    def build(mb: Any, x: Any) -> dict[str, Any]:
        values, places = mb.topk(x=x, k=3, axis=1)
        low, first = mb.topk(x=x, k=2, axis=-1, ascending=True)
        return {
            "values": values,
            "places": places,
            "low": low,
            "first": first,
            "sorted": mb.argsort(x=x, axis=1, ascending=True),
            "sorted_down": mb.argsort(x=x, axis=1),
            "there": mb.non_zero(x=x),
            "hot": mb.one_hot(
                indices=mb.cast(x=x, dtype="int32"), one_hot_vector_size=4, axis=1, on_value=2.0, off_value=-1.0
            ),
        }

    found = run(tmp_path, build, {"x": x})
    values, places = onnx("TopK", x, np.array([3]), axis=1, outputs=2)
    close(found["values"], values)
    close(found["places"], places)
    low, first = onnx("TopK", x, np.array([2]), axis=1, largest=0, outputs=2)
    close(found["low"], low)
    close(found["first"], first)
    assert (found["sorted"] == np.argsort(x, 1, kind="stable")).all()
    assert found["sorted_down"].tolist() == [[0, 3, 2, 1, 4], [2, 3, 4, 0, 1]]
    assert (found["there"] == np.argwhere(x)).all()
    hot = np.where(x[:, None] == np.arange(4)[:, None], 2.0, -1.0).astype(np.float32)
    close(found["hot"], hot)


def test_making_tensors(tmp_path: Path) -> None:
    def build(mb: Any, x: Any, n: Any) -> dict[str, Any]:
        size = mb.squeeze(x=n, axes=[0])
        return {
            "range": mb.range_1d(start=1, end=size, step=3),
            "floats": mb.range_1d(start=0.5, end=mb.cast(x=size, dtype="fp32"), step=2.0),
            "fill": mb.fill(shape=n, value=3.0),
            "shape": mb.shape(x=mb.fill(shape=n, value=1)),
            "where": mb.non_zero(x=mb.greater(x=x, y=0.0)),
        }

    x = np.array([[-1, 2], [3, -4]], np.float32)
    found = run(tmp_path, build, {"x": x, "n": np.array([8], np.int32)})
    assert found["range"].tolist() == [1, 4, 7]
    assert found["floats"].tolist() == [0.5, 2.5, 4.5, 6.5]
    close(found["fill"], np.full(8, 3, np.float32))
    assert found["shape"].tolist() == [8]
    assert found["where"].tolist() == [[0, 1], [1, 0]]


RESIZES = {"UNALIGN_CORNERS": "half_pixel", "DEFAULT": "asymmetric", "STRICT_ALIGN_CORNERS": "align_corners"}


@pytest.mark.parametrize("size", [(7, 3), (2, 10)])
def test_resizing(tmp_path: Path, size: tuple[int, int]) -> None:
    x = normal(1, 2, 5, 4)
    target = {"target_size_height": size[0], "target_size_width": size[1]}
    scales = {"scale_factor_height": size[0] / 5 + 1e-4, "scale_factor_width": size[1] / 4 + 1e-4}

    def build(mb: Any, x: Any) -> dict[str, Any]:
        made = {
            mode.lower(): mb.resize_bilinear(x=x, sampling_mode=mode, **target) for mode in (*RESIZES, "OFFSET_CORNERS")
        }
        made["nearest"] = mb.resize_nearest_neighbor(x=x, **target)
        made["floor"] = mb.upsample_nearest_neighbor(x=x, **scales)
        made["corners"] = mb.upsample_bilinear(x=x, align_corners=True, **scales)
        made["centres"] = mb.upsample_bilinear(x=x, align_corners=False, **scales)
        shape = [0, *size]
        made["general"] = mb.resize(x=x, shape=shape, resized_dims=np.uint32(2), sampling_mode="UNALIGN_CORNERS")
        made["general_nearest"] = mb.resize(
            x=x, shape=shape, resized_dims=np.uint32(2), interpolation_mode="NEAREST_NEIGHBOR"
        )
        return made

    found = run(tmp_path, build, {"x": x})
    sizes = np.array([1, 2, *size])

    def resized(coordinates: str, **options: Any) -> Array:
        return onnx("Resize", x, None, None, sizes, coordinate_transformation_mode=coordinates, **options)[0]

    for mode, name in RESIZES.items():
        close(found[mode.lower()], resized(name, mode="linear"))
    close(found["corners"], found["strict_align_corners"])
    close(found["centres"], found["unalign_corners"])
    close(found["general"], found["unalign_corners"])
    nearest = resized("half_pixel", mode="nearest", nearest_mode="round_prefer_ceil")
    close(found["nearest"], nearest)
    close(found["general_nearest"], nearest)
    close(found["floor"], resized("asymmetric", mode="nearest", nearest_mode="floor"))
    # OFFSET_CORNERS: a cell is max(1, in - 1) / out long, and sampled in its middle.
    column = x[0, 0, :, 0]
    places = (np.arange(size[0]) + 0.5) * 4 / size[0]
    rows = np.interp(places, np.arange(5), column)
    width = (np.arange(size[1]) + 0.5) * 3 / size[1]
    assert found["offset_corners"].shape == (1, 2, *size)
    first = np.interp(width[0], [0, 1], [0, 1])
    other = np.interp(places, np.arange(5), x[0, 0, :, 1])
    close(found["offset_corners"][0, 0, :, 0], (rows * (1 - first) + other * first).astype(np.float32))


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("sampling", ["bilinear", "nearest"])
def test_resampling(tmp_path: Path, sampling: str, align: bool) -> None:
    x = normal(2, 3, 5, 6)
    grid = np.random.default_rng(1).uniform(-1.6, 1.6, (2, 4, 3, 2)).astype(np.float32)
    paddings = {"constant": "zeros", "border": "border", "reflection" if align else "symmetric": "reflection"}

    def build(mb: Any, x: Any, grid: Any) -> dict[str, Any]:
        return {
            name: mb.resample(
                x=x,
                coordinates=grid,
                sampling_mode=sampling,
                padding_mode=name,
                padding_value=0.0,
                coordinates_mode="normalized_minus_one_to_one",
                align_corners=align,
            )
            for name in paddings
        }

    found = run(tmp_path, build, {"x": x, "grid": grid})
    mode = "linear" if sampling == "bilinear" else "nearest"
    for name, padding in paddings.items():
        expected = onnx("GridSample", x, grid, mode=mode, padding_mode=padding, align_corners=int(align))[0]
        close(found[name], expected, 1e-4)


def test_affine_transformations(tmp_path: Path) -> None:
    x, matrix = normal(2, 3, 5, 6), np.array([[0.5, 0.1, 0.2, -0.3, 0.8, 0.0]], np.float32)

    def build(mb: Any, x: Any) -> dict[str, Any]:
        options = {"sampling_mode": "bilinear", "padding_mode": "constant", "padding_value": 0.0, "align_corners": True}
        options |= {"output_height": 4, "output_width": 3, "coordinates_mode": "normalized_minus_one_to_one"}
        return {"y": mb.affine(x=x, transform_matrix=matrix, **options)}

    both = np.repeat(matrix.reshape(1, 2, 3), 2, axis=0)
    grid = onnx("AffineGrid", both, np.array([2, 3, 4, 3]), align_corners=1)[0]
    expected = onnx("GridSample", x, grid, mode="linear", padding_mode="zeros", align_corners=1)[0]
    close(run(tmp_path, build, {"x": x})["y"], expected, 1e-4)


@pytest.mark.parametrize("deployment", [16, 17])
def test_boxes_of_images(tmp_path: Path, deployment: int) -> None:
    x = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)
    box = [1.0, 1.0, 2.0, 2.0]

    def build(mb: Any, x: Any) -> dict[str, Any]:
        new, old = {"boxes": np.array([box], np.float32)}, {"roi": np.reshape(np.float32(box), (1, 1, 4, 1, 1))}
        where = old if deployment == 16 else new
        beyond = {name: (value - 2).astype(np.float32) for name, value in where.items()}
        options = {"target_height": 2, "target_width": 2, "sampling_mode": "ALIGN_CORNERS", "pad_value": 7.0}
        return {"y": mb.crop_resize(x=x, **where, **options), "z": mb.crop_resize(x=x, **beyond, **options)}

    found = run(tmp_path, build, {"x": x}, deployment=deployment)
    assert found["y"].ravel().tolist() == [6, 7, 10, 11]
    assert found["z"].ravel().tolist() == [7, 7, 7, 1]
    assert found["y"].ndim == (5 if deployment == 16 else 4)


@pytest.mark.parametrize("deployment", [16, 17])
def test_suppression(tmp_path: Path, deployment: int) -> None:
    generator = np.random.default_rng(3)
    boxes = np.concatenate([generator.uniform(0, 4, (1, 12, 2)), generator.uniform(1, 3, (1, 12, 2))], 2).astype(
        np.float32
    )
    scores = generator.uniform(0, 1, (1, 12, 1)).astype(np.float32)

    def build(mb: Any, b: Any, s: Any) -> dict[str, Any]:
        if deployment == 17:
            turn = {"perm": [0, 2, 1]}
            b, s = mb.transpose(x=b, **turn), mb.transpose(x=s, **turn)
            made = mb.non_maximum_suppression(boxes=b, scores=s, iou_threshold=0.3, max_boxes=10)
            return {"boxes": mb.transpose(x=made[0], **turn), "indices": made[2]}
        made = mb.non_maximum_suppression(
            boxes=b, scores=s, iou_threshold=0.3, score_threshold=0.0, max_boxes=10, per_class_suppression=False
        )
        return {"boxes": made[0], "indices": made[2], "count": made[3]}

    found = run(tmp_path, build, {"b": boxes, "s": scores}, deployment=deployment)
    limits = (np.array([10]), np.float32([0.3]), np.float32([0.0]))
    kept = onnx("NonMaxSuppression", boxes, scores.transpose(0, 2, 1), *limits, center_point_box=1)[0][:, 2]
    assert 1 < len(kept) < 10
    assert found["indices"][0].tolist() == [*kept.tolist(), *[-1] * (10 - len(kept))]
    close(found["boxes"][0], np.concatenate([boxes[0, kept], np.zeros((10 - len(kept), 4), np.float32)]))
    if deployment == 16:
        assert found["count"].tolist() == [len(kept)]
