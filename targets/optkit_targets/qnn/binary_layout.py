"""The C structures in which libQnnSystem describes a context binary, as far as optkit reads them.

Written by hand: Qualcomm's headers are not free to copy. The names in the docstrings are theirs (QnnSystemContext.h,
QnnSystemInterface.h, QnnTypes.h, QnnHtpSystemContext.h of the QNN SDK, System API 1.x), so that a field can be looked
up. Every structure that has versions begins with its version, and only the versions named here are laid out; sizes are
those of a 64-bit platform, where ctypes pads as C does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

HTP_BACKEND = 6
"""QNN_BACKEND_ID_HTP."""

SYSTEM_API_MAJOR = 1
BINARY_VERSION = GRAPH_VERSION = 3
TENSOR_VERSIONS = (1, 2)
BLOB_VERSION = 1
MEMORY_VERSION = 2

# Of Qnn_Definition_t: the encoding counts. Of Qnn_QuantizationEncoding_t: one scale and offset for the whole tensor.
DEFINED = 1
SCALE_OFFSET = 0

DATA_TYPES: Mapping[int, str] = {
    0x0008: "int8",
    0x0016: "int16",
    0x0032: "int32",
    0x0064: "int64",
    0x0108: "uint8",
    0x0116: "uint16",
    0x0132: "uint32",
    0x0164: "uint64",
    0x0216: "float16",
    0x0226: "bfloat16",
    0x0232: "float32",
    0x0264: "float64",
    0x0304: "sfixed4",
    0x0308: "sfixed8",
    0x0316: "sfixed16",
    0x0332: "sfixed32",
    0x0404: "ufixed4",
    0x0408: "ufixed8",
    0x0416: "ufixed16",
    0x0432: "ufixed32",
    0x0508: "bool",
    0x0608: "string",
}
"""Qnn_DataType_t. ``ufixed8`` is an integer with a scale and an offset, ``uint8`` one without."""


class Version(ctypes.Structure):
    """Qnn_Version_t."""

    _fields_ = (("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("patch", ctypes.c_uint32))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


class ScaleOffset(ctypes.Structure):
    """Qnn_ScaleOffset_t: real = (quantized + offset) * scale."""

    _fields_ = (("scale", ctypes.c_float), ("offset", ctypes.c_int32))


class _Encoding(ctypes.Union):
    # The largest member, Qnn_BwAxisScaleOffset_t, is three 32-bit numbers and two pointers.
    _fields_ = (("scale_offset", ScaleOffset), ("largest", ctypes.c_uint64 * 4))


class QuantizeParams(ctypes.Structure):
    """Qnn_QuantizeParams_t."""

    _fields_ = (("definition", ctypes.c_uint32), ("encoding", ctypes.c_uint32), ("of", _Encoding))


class Tensor(ctypes.Structure):
    """Qnn_Tensor_t with a Qnn_TensorV1_t or V2 inside; they agree up to ``memory``, and V2 gives the size."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("id", ctypes.c_uint32 * 2),  # and the padding before it
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_uint32),
        ("data_format", ctypes.c_uint32),
        ("data_type", ctypes.c_uint32),
        ("quantize_params", QuantizeParams),
        ("rank", ctypes.c_uint32),
        ("dimensions", ctypes.POINTER(ctypes.c_uint32)),
        ("memory_type", ctypes.c_uint32),
        ("memory", ctypes.c_uint64 * 2),
        ("dynamic_dimensions", ctypes.c_void_p),
        ("sparse", ctypes.c_uint32 * 3),
        ("is_produced", ctypes.c_uint8),
    )


class Graph(ctypes.Structure):
    """QnnSystemContext_GraphInfo_t with a QnnSystemContext_GraphInfoV3_t inside."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("input_count", ctypes.c_uint32),
        ("inputs", ctypes.POINTER(Tensor)),
        ("output_count", ctypes.c_uint32),
        ("outputs", ctypes.POINTER(Tensor)),
        ("updatable_count", ctypes.c_uint32),
        ("updatable", ctypes.POINTER(Tensor)),
        ("blob_bytes", ctypes.c_uint32),
        ("blob", ctypes.c_void_p),
        ("first_op", ctypes.c_uint32),
        ("last_op", ctypes.c_uint32),
    )


class Binary(ctypes.Structure):
    """QnnSystemContext_BinaryInfo_t with a QnnSystemContext_BinaryInfoV3_t inside."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("backend", ctypes.c_uint64),  # 32 bits and padding: the union behind the version is aligned to eight bytes
        ("build_id", ctypes.c_char_p),
        ("core_api", Version),
        ("backend_api", Version),
        ("soc_version", ctypes.c_char_p),
        ("blob_version", Version),
        ("blob_bytes", ctypes.c_uint64),
        ("tensor_count", ctypes.c_uint32),
        ("tensors", ctypes.POINTER(Tensor)),
        ("graph_count", ctypes.c_uint32),
        ("graphs", ctypes.POINTER(Graph)),
        ("platform", ctypes.c_void_p),
        ("metadata_bytes", ctypes.c_uint32),
        ("metadata", ctypes.c_void_p),
        ("soc_model", ctypes.c_uint32),
    )


class HtpContext(ctypes.Structure):
    """QnnHtpSystemContext_ContextBlobInfo_t: what the HTP back end keeps about a context."""

    _fields_ = (("version", ctypes.c_uint32), ("dsp_arch", ctypes.c_uint32))


class HtpGraph(ctypes.Structure):
    """QnnHtpSystemContext_GraphBlobInfo_t: how the HTP back end compiled a graph."""

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("spill_fill_bytes", ctypes.c_uint64),
        ("vtcm", ctypes.c_uint32),  # MB up to some SDK of 2025, bytes in SDK 2.51
        ("optimization_level", ctypes.c_uint32),
        ("dlbc", ctypes.c_uint8),
        ("hvx_threads", ctypes.c_uint64),
    )


class HtpGraphMemory(ctypes.Structure):
    """QnnHtpSystemContext_GraphBlobInfoV2_t: what a graph occupies in main memory.

    It lies behind the first structure where the blob is large enough for both.
    """

    _fields_ = (
        ("version", ctypes.c_uint32),
        ("native_key_bytes", ctypes.c_uint64),
        ("native_value_bytes", ctypes.c_uint64),
        ("shares_io", ctypes.c_uint32),
        ("io_bytes", ctypes.c_uint64),
        ("op_data_bytes", ctypes.c_uint64),
        ("constant_bytes", ctypes.c_uint64),
        ("ddr_tensor_bytes", ctypes.c_uint64),
        ("shared_weight_bytes", ctypes.c_uint64),
    )


class Provider(ctypes.Structure):
    """QnnSystemInterface_t: the version, then a table of functions that only grows within a major version."""

    _fields_ = (
        ("backend", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("api", Version),
        ("context_create", ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.POINTER(ctypes.c_void_p))),
        ("context_get_binary_info", ctypes.c_void_p),
        (
            "context_get_metadata",
            ctypes.CFUNCTYPE(
                ctypes.c_uint64,
                ctypes.c_void_p,
                ctypes.c_char_p,
                ctypes.c_uint64,
                ctypes.POINTER(ctypes.POINTER(Binary)),
            ),
        ),
        ("context_free", ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)),
    )
