"""Half precision: weights stored, and where the target can, products computed, in float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Hashable
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field

from optkit.graph import constant, opset
from optkit.pipeline import LOSSY, Context, Effect, Pass

from ._extremes import Extremes, observe_extremes
from ._float_types import FLOAT, largest
from ._half_forms import PRODUCT_OPS, HalfForm, half_form, reads_values, takes
from ._half_writer import HalfWriter, unfit
from ._masks import hidden_values
from ._min_cut import fewest_cuts

OUTSIDE = "outside"  # what feeds the model and reads its outputs: float32


class ConvertFloat16(Pass):
    """Convert float32 weights and computations to half precision, with as few Casts as there can be.

    Convolutions, matrix products and recurrences are converted wherever values fit, and what lies between them where
    that saves Casts. In float32 stay operators whose ONNX schema has no half-precision form, those that add up many
    values, raise to powers, exponentiate or choose, values that calibration saw beyond ``65504 / margin``, and
    constants that half precision makes 0 or infinite. Masks (-1e9, -3.4e38) on their way to a Softmax become -16376.
    Weights that a float32 operator reads are stored in half precision all the same, with a Cast behind them.

    The model's inputs and outputs keep their type.

    Attributes:
        dtype: ``float16`` (11 significant bits, up to 65504) or ``bfloat16`` (8 bits, the range of float32).
        storage_only: Convert no computation, only what is stored: a Cast to float32 stands behind every weight. Half
            the file at the speed of before, for runtimes without half arithmetic. ``auto``: where the target does not
            list the type among its ``dtypes``.
        margin: How far below the largest half-precision value everything that calibration saw must stay.
    """

    effect: ClassVar[Effect] = LOSSY

    dtype: Literal["float16", "bfloat16"] = "float16"
    storage_only: bool | Literal["auto"] = "auto"
    margin: float = Field(default=2.0, ge=1)

    def run(self, model: ir.Model, context: Context) -> None:
        """Convert the model in place."""
        dtype = ir.DataType[self.dtype.upper()]
        if not takes("Cast", opset(model), dtype):
            context.missed(model.graph.name or "model", f"opset {opset(model)} has no Cast to {self.dtype}")
            return
        storage_only = self.storage_only
        if storage_only == "auto":
            storage_only = context.target is not None and self.dtype not in context.target.dtypes
        writer = HalfWriter(model, dtype, context)
        if not storage_only:
            choice = _Choice(model, dtype, self.margin, context)
            writer.compute(choice.forms(), choice.hidden)
        writer.store()


class _Choice:
    """Decides which nodes of a model's main graph compute in half precision."""

    def __init__(self, model: ir.Model, dtype: ir.DataType, margin: float, context: Context) -> None:
        self.model, self.dtype, self.context = model, dtype, context
        self.limit = largest(dtype) / margin
        self.hidden: set[ir.Value] = set()

    def forms(self) -> dict[ir.Node, HalfForm]:
        """Return the nodes that compute in half precision, and remark on those that do not."""
        possible, reasons = self._possible()
        vertices: dict[Hashable, bool | None] = {OUTSIDE: False}
        for node in self.model.graph:
            if node in possible:
                vertices[node] = True if node.op_type in PRODUCT_OPS else None
            else:
                vertices[node] = False
        chosen = fewest_cuts(vertices, self._links(possible))
        for node, reason in reasons.items():
            self.context.missed(node, reason)
        for node in possible:
            if node not in chosen:
                self.context.missed(node, "in float32 like what is around it: another type would cost Casts")
        return {node: form for node, form in possible.items() if node in chosen}

    def _possible(self) -> tuple[dict[ir.Node, HalfForm], dict[ir.Node, str]]:
        """Return the nodes that can compute in half precision, and why each other one that reads floats cannot."""
        seen = self._observe()
        for value in self.model.graph.initializers.values():
            array = constant(value) if value.dtype == FLOAT else None
            if array is not None and _low(array) < -self.limit and array.max(initial=0.0) <= self.limit:
                self.hidden |= hidden_values(value) or set()
        possible: dict[ir.Node, HalfForm] = {}
        reasons: dict[ir.Node, str] = {}
        for node in self.model.graph:
            form = half_form(node, opset(self.model), self.dtype, seen)
            if isinstance(form, HalfForm):
                read, made = (node.inputs[i] for i in form.inputs), (node.outputs[i] for i in form.outputs)
                values = [value for value in (*read, *made) if value is not None]
                form = next(filter(None, (self._misfit(value, seen) for value in values)), form)
            if isinstance(form, HalfForm):
                possible[node] = form
            elif form is not None:
                reasons[node] = form
        return possible, reasons

    def _observe(self) -> dict[str, Extremes]:
        if self.context.calibration is None:
            what = f"none was given, so that no value was compared with the largest {self.dtype.name.lower()}"
            self.context.missed("calibration", what)
            return {}
        values = [value for node in self.model.graph for value in (*node.inputs, *node.outputs)]
        floats = [v for v in values if v is not None and v.dtype == FLOAT and not v.is_initializer()]
        named = dict.fromkeys(v.name for v in floats if v.name and v.graph is self.model.graph)
        return observe_extremes(self.model, named, self.context.calibration, track=self.context.track)

    def _misfit(self, value: ir.Value, seen: dict[str, Extremes]) -> str:
        """Return why a value does not fit in half precision; empty if it does, as far as is known."""
        array = constant(value)
        if array is not None:
            return "" if value in self.hidden else unfit(array, value.name or "", self.dtype)
        extremes = seen.get(value.name or "")
        if extremes is None:
            return ""
        if extremes.nan:
            return f"'{value.name}' has NaN values in calibration"
        size = extremes.high if value in self.hidden else max(extremes.high, -extremes.low)
        return (
            "" if size <= self.limit else f"'{value.name}' reaches {size:.4g} in calibration, beyond {self.limit:.4g}"
        )

    def _links(self, possible: dict[ir.Node, HalfForm]) -> list[tuple[Hashable, list[Hashable]]]:
        """Return which nodes each computed or fed value joins: the one that makes it and those that read it."""
        links: list[tuple[Hashable, list[Hashable]]] = []
        computed = [(node, index, value) for node in self.model.graph for index, value in enumerate(node.outputs)]
        for maker, index, value in [*((None, 0, fed) for fed in self.model.graph.inputs), *computed]:
            if value.dtype != FLOAT:
                continue
            source: Hashable = maker if maker in possible and index in possible[maker].outputs else OUTSIDE
            readers: list[Hashable] = [
                use.node if use.node in possible and use.idx in possible[use.node].inputs else OUTSIDE
                for use in value.uses()
                if reads_values(use.node)
            ]
            links.append((source, [*readers, OUTSIDE] if value.is_graph_output() else readers))
        return links


def _low(array: np.ndarray) -> float:
    """Return the smallest finite value, at most 0."""
    return float(array.min(initial=0.0, where=np.isfinite(array)))
