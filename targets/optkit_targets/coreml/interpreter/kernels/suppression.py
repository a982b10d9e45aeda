"""Non-maximum suppression."""

from __future__ import annotations

import numpy as np

from optkit_targets.coreml.interpreter.kernels.table import executes

Array = np.ndarray
TRANSPOSED = 17  # deployment target from which boxes are [n, 4, B] and scores [n, K, B]


@executes("non_maximum_suppression")
def non_maximum_suppression(
    boxes: Array,
    scores: Array,
    iou_threshold: Array,
    max_boxes: Array,
    deployment: int,
    score_threshold: Array | float = -np.inf,
    per_class_suppression: Array | bool = False,
) -> tuple[Array, ...]:
    """Return the boxes (centre x, centre y, width, height) that no better one overlaps, best first.

    A box counts by its best class. Where fewer than ``max_boxes`` are left, boxes and scores are padded with 0 and
    indices with -1; where none reaches the threshold, the best one is kept (apple/coremltools, tests of the operator).

    Returns:
        Boxes, scores, indices [n, max_boxes], and up to iOS 16 their count [n].
    """
    swapped = deployment >= TRANSPOSED
    if swapped:
        boxes, scores = np.swapaxes(boxes, 1, 2), np.swapaxes(scores, 1, 2)
    count = int(max_boxes)
    kept_boxes = np.zeros((len(boxes), count, 4), boxes.dtype)
    kept_scores = np.zeros((len(boxes), count, scores.shape[2]), scores.dtype)
    indices = np.full((len(boxes), count), -1, np.int32)
    counts = np.zeros(len(boxes), np.int32)
    for sample, (box, score) in enumerate(zip(boxes, scores, strict=True)):
        kept = _kept(box, score, float(iou_threshold), float(score_threshold), bool(per_class_suppression))[:count]
        counts[sample] = len(kept)
        kept_boxes[sample, : len(kept)] = box[kept]
        kept_scores[sample, : len(kept)] = score[kept]
        indices[sample, : len(kept)] = kept
    if swapped:
        return np.swapaxes(kept_boxes, 1, 2), np.swapaxes(kept_scores, 1, 2), indices
    return kept_boxes, kept_scores, indices, counts


def _kept(boxes: Array, scores: Array, iou_threshold: float, score_threshold: float, by_class: bool) -> list[int]:
    best, classes = scores.max(axis=1), scores.argmax(axis=1)
    overlaps = _overlaps(boxes)
    kept: list[int] = []
    order = np.argsort(-best, kind="stable")
    for index in order:
        rivals = [other for other in kept if not by_class or classes[other] == classes[index]]
        if best[index] > score_threshold and not any(overlaps[index, other] > iou_threshold for other in rivals):
            kept.append(int(index))
    return kept or [int(order[0])]


def _overlaps(boxes: Array) -> Array:
    """Return the intersection over union of every pair, [B, B]; 0 for boxes without an area."""
    centre, size = boxes[:, :2], boxes[:, 2:]
    low, high = centre - size / 2, centre + size / 2
    sides = np.minimum(high[:, None], high[None]) - np.maximum(low[:, None], low[None])
    shared = np.prod(np.maximum(sides, 0), axis=-1)
    areas = np.prod(size, axis=-1)
    union = areas[:, None] + areas[None] - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 0)
