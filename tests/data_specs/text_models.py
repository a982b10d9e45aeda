"""Readers for the models in the shared data folder whose inputs are no images; one sample a dictionary.

The folder is named by the environment variable OPTKIT_SHARED, or is ``shared`` beside the checkout. Names: MODEL_eval
yields the labelled evaluation data of a model's README, MODEL_calibration data that is disjoint from it where there is
some.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SHARED = Path(os.environ.get("OPTKIT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
DATA = SHARED / "data"

Sample = dict[str, np.ndarray]

CONTEXT = 128  # characters that relu_lm sees
STORY_TOKENS = 128
SST2_TOKENS = 40  # the most that sst2_relu_encoder takes
PADDING, UNKNOWN, CLS = 0, 1, 2  # ids in sst2/vocab.json
VAD_WINDOW, VAD_OVERLAP = 512, 64  # samples at 16 kHz


def _characters(file: str) -> Iterator[Sample]:
    """Windows of 128 characters that do not overlap; each character's label is the next one."""
    index = {c: i for i, c in enumerate(json.loads((DATA / "relu_lm/vocab.json").read_text(encoding="utf-8")))}
    ids = np.array([index[c] for c in (DATA / "relu_lm" / file).read_text(encoding="utf-8")], np.int64)
    for start in range(0, len(ids) - CONTEXT, CONTEXT):
        yield {"input_ids": ids[None, start : start + CONTEXT], "labels": ids[start + 1 : start + CONTEXT + 1]}


def relu_lm_calibration() -> Iterator[Sample]:
    return _characters("calibration.txt")


def relu_lm_eval() -> Iterator[Sample]:
    return _characters("text.txt")


def _stories(rows: slice) -> Iterator[Sample]:
    """Token ids up to each story's length; labels are the next tokens (metric ``nll:next``)."""
    with np.load(DATA / "stories260k/tokens.npz") as arrays:
        for ids, length in zip(arrays["ids"][rows], arrays["lengths"][rows], strict=True):
            yield {"input_ids": ids[None, :length].astype(np.int64)}


def stories260k_calibration() -> Iterator[Sample]:
    """The last ten stories: there is no other text, leave them out of an evaluation that must be clean."""
    return _stories(slice(-10, None))


def stories260k_eval() -> Iterator[Sample]:
    return _stories(slice(None))


def stories260k_fixed() -> Iterator[Sample]:
    """The first 128 tokens of the stories that have as many, for a device that takes static shapes."""
    for sample in _stories(slice(None)):
        if sample["input_ids"].shape[1] >= STORY_TOKENS:
            yield {"input_ids": sample["input_ids"][:, :STORY_TOKENS]}


def _sentences(file: str) -> Iterator[Sample]:
    vocabulary = json.loads((DATA / "sst2/vocab.json").read_text(encoding="utf-8"))
    index = {word: i for i, word in enumerate(vocabulary)}
    with (DATA / "sst2" / file).open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE):
            words = [index.get(word, UNKNOWN) for word in row["sentence"].lower().split()]
            ids = np.array([[CLS, *words][:SST2_TOKENS]], np.int64)
            yield {"input_ids": ids, "labels": np.int64(row["label"])}


def _padded(samples: Iterator[Sample]) -> Iterator[Sample]:
    """Sentences filled up to 40 tokens, which a device that takes static shapes wants; the model masks the rest."""
    for sample in samples:
        filler = ((0, 0), (0, SST2_TOKENS - sample["input_ids"].shape[1]))
        yield {**sample, "input_ids": np.pad(sample["input_ids"], filler, constant_values=PADDING)}


def sst2_padded_calibration() -> Iterator[Sample]:
    return _padded(_sentences("calibration.tsv"))


def sst2_padded_eval() -> Iterator[Sample]:
    return _padded(_sentences("test.tsv"))


def sst2_calibration() -> Iterator[Sample]:
    return _sentences("calibration.tsv")


def sst2_eval() -> Iterator[Sample]:
    return _sentences("test.tsv")


def magika_eval() -> Iterator[Sample]:
    """Byte tokens 0 to 256 of each file; there is no calibration data of its own."""
    with np.load(DATA / "magika_v3_3/test.npz") as arrays:
        for tokens, label in zip(arrays["bytes"], arrays["labels"], strict=True):
            yield {"bytes": tokens[None].astype(np.int32), "labels": label}


def autoencoder_eval() -> Iterator[Sample]:
    """Windows of one normal machine sound; the label is the window itself, so that ``mse`` is the anomaly score."""
    with np.load(DATA / "ad_autoencoder/golden.npz") as arrays:
        for window in arrays["in:input"]:
            yield {"input": window[None], "labels": window}


def silero_vad_eval() -> Iterator[Sample]:
    """Windows of speech, each with the state that the fp32 model had there; the label is its probability."""
    import onnxruntime as ort

    model = DATA / "silero_vad/silero_vad.onnx"
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    with np.load(DATA / "silero_vad/golden.npz") as arrays:
        audio, probabilities = arrays["audio16k"].astype(np.float32) / 32768, arrays["prob"]
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros(VAD_OVERLAP, np.float32)
    for number, probability in enumerate(probabilities):
        window = audio[number * VAD_WINDOW : (number + 1) * VAD_WINDOW]
        sample = {"input": np.concatenate([context, window])[None], "state": state, "sr": np.array(16000, np.int64)}
        yield {**sample, "labels": np.array([probability], np.float32)}
        _, state = session.run(None, sample)
        context = window[-VAD_OVERLAP:]
