"""Raise the version of the default operator set."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import onnx.defs
import onnx_ir as ir
from onnx.helper import OP_SET_ID_VERSION_MAP  # noqa: TID251  # onnx_ir has no table of IR versions

from optkit.graph import names
from optkit.model.check_graph import EXPERIMENTAL_OPS
from optkit.pipeline import Context, Effect, Pass
from optkit_passes.cleanup.opset_adapters import ADAPTERS, NEWEST, CannotAdaptError, Editor


class RaiseOpset(Pass):
    """Raise the default operator set to at least ``opset``, where the model's is older.

    Nodes whose operator was redefined in between are rewritten, bodies included; names, metadata, weights and the
    operator sets of other domains stay. The IR version rises only as far as the opset needs. Where a node has no
    equivalent in the newer opset the whole model stays as it is.
    """

    effect: ClassVar[Effect] = Effect.reassociate(1e-5)

    opset: int = 13  # the oldest that what follows can work with; 13 is the first with one scale per channel

    def run(self, model: ir.Model, context: Context) -> None:
        """Try on a copy, which shares the weights; then do the same to the model."""
        version, where = model.opset_imports.get(""), model.graph.name or "model"
        if version is None or version >= self.opset:
            return
        newest = min(NEWEST, onnx.defs.onnx_opset_version())
        if self.opset > newest:
            context.missed(where, f"opset {self.opset} is newer than {newest}, the newest that is known here")
            return
        trial, taken = model.clone(), names(model)
        for node in list(trial.graph.all_nodes()):
            try:
                _adapt(node, version, self.opset, taken)
            except CannotAdaptError as reason:
                context.missed(node, f"opset {version} cannot become {self.opset}: {reason}")
                return
        taken = names(model)
        for node in list(model.graph.all_nodes()):
            if _adapt(node, version, self.opset, taken):
                context.applied(node, f"adapted to opset {self.opset}")
        model.opset_imports[""] = self.opset
        message = f"raised opset {version} to {self.opset}, the oldest that the passes after it work with"
        needed = OP_SET_ID_VERSION_MAP["ai.onnx", self.opset]
        if model.ir_version < needed:
            message += f", and IR version {model.ir_version} to {needed}"
            model.ir_version = needed
        context.applied(where, message)


@cache
def _definitions() -> dict[str, dict[int, Any]]:
    """Return every definition of every standard operator: name, then the opset that introduced it."""
    found: dict[str, dict[int, Any]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            found.setdefault(schema.name, {})[schema.since_version] = schema
    return found


def _adapt(node: ir.Node, version: int, goal: int, taken: set[str]) -> bool:
    """Take a node through every redefinition of its operator after ``version``; return whether it was edited.

    Raises:
        CannotAdaptError: It has no equivalent.
    """
    if node.domain:
        return False
    edited = False
    while True:
        definitions = _definitions().get(node.op_type, {})
        old = definitions.get(max((since for since in definitions if since <= version), default=0))
        if node.op_type in EXPERIMENTAL_OPS or old is None:
            raise CannotAdaptError(f"{node.op_type} is no standard operator of opset {version}")
        version = min((since for since in definitions if version < since <= goal), default=goal + 1)
        if version > goal:
            return edited
        adapter = ADAPTERS.get((node.op_type, version))
        if adapter is None:
            _check_compatible(node, old, definitions[version])
        else:
            before = _signature(node)
            adapter(Editor(node, taken))
            edited |= _signature(node) != before


def _signature(node: ir.Node) -> tuple[object, ...]:
    return node.op_type, dict(node.attributes), tuple(node.inputs), len(node.outputs)


def _check_compatible(node: ir.Node, old: Any, new: Any) -> None:
    """Refuse a redefinition that this node would notice and that no adapter knows."""
    change = f"{node.op_type} changed in opset {new.since_version}"
    if new.deprecated:
        raise CannotAdaptError(f"{node.op_type} was removed in opset {new.since_version}")
    for name in node.attributes:
        if name in old.attributes and name not in new.attributes:
            raise CannotAdaptError(f"{change}: it has no '{name}' any more")
    for name, attribute in new.attributes.items():
        was = old.attributes.get(name)
        changed = was is not None and was.default_value != attribute.default_value
        if name not in node.attributes and (changed or (was is None and attribute.required)):
            raise CannotAdaptError(f"{change}: '{name}' has another default, or none")
    for index, (before, after) in enumerate(zip(old.inputs, new.inputs, strict=False)):
        value = node.inputs[index] if index < len(node.inputs) else None
        dropped = set(before.types) - set(after.types)
        if dropped and value is not None and (value.dtype is None or f"tensor({_type_name(value.dtype)})" in dropped):
            raise CannotAdaptError(f"{change}: it does not take {value.dtype} any more")


def _type_name(dtype: ir.DataType) -> str:
    return {ir.DataType.DOUBLE: "double", ir.DataType.FLOAT: "float"}.get(dtype, dtype.name.lower())
