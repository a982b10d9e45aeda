"""Pattern rewriting: rules of ``pattern``, ``check`` and ``rewrite``, with remarks.

The one file that touches onnxscript's matcher. Its rewriter is not used: it folds constants, renames values and removes
nodes beside the rules, drops the node's name, and takes an initializer that a caller may override for a constant.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern as onnxscript_pattern

from optkit.graph import add_constant, cannot_forward, forward, names, remove, unique
from optkit.pipeline import Context

USED_ELSEWHERE = "an intermediate result is used elsewhere too"


class Rule(ABC):
    """Replaces one pattern: ``pattern`` says what is matched, ``check`` refuses with a reason, ``rewrite`` replaces.

    The first line of the docstring is the message of the ``applied`` remark. Example::

        class ReciprocalToDiv(Rule):
            '''Replace ``Mul(x, Reciprocal(y))`` with ``Div(x, y)``.'''

            def pattern(self, op, x, y):
                return op.Mul(x, op.Reciprocal(y))

            def check(self, context, x, y):
                return accept() if x.dtype == y.dtype else refuse("the element types differ")

            def rewrite(self, op, x, y):
                return op.Div(x, y)

    Within ``check``, ``value.const_value`` is set exactly for values that no caller can override.
    """

    pattern: Callable[..., Any]
    rewrite: Callable[..., Any]

    def check(self, context: Any, **values: Any) -> Any:
        """Return ``accept()``, or ``refuse(reason)``; ``values`` are the variables of the pattern."""
        return accept()

    def message(self) -> str:
        """Return the message of the ``applied`` remark."""
        return (type(self).__doc__ or type(self).__name__).strip().splitlines()[0].rstrip(".")


def accept() -> Any:
    """Let a match be rewritten."""
    return onnxscript_pattern.MatchResult()


def refuse(reason: str) -> Any:
    """Leave a match alone; ``reason`` becomes a ``missed`` remark."""
    return onnxscript_pattern.MatchResult().fail(reason)


class _Refusals:
    """What onnxscript reports a match to; keeps the reason of a refusal, ignores everything that is not a match."""

    def __init__(self) -> None:
        self.reason = ""

    def log(self, rule: Any, container: Any, node: ir.Node, match: Any, status: Any) -> None:
        if status in (
            onnxscript_pattern.MatchStatus.CONDITION_FAILED,
            onnxscript_pattern.MatchStatus.REPLACEMENT_FAILED,
        ):
            self.reason = match.reason or "the rule does not apply"
        elif "other uses" in (match.reason or ""):
            self.reason = USED_ELSEWHERE


def rewrite(model: ir.Model, rules: Sequence[Rule | type[Rule]], context: Context) -> None:
    """Apply the rules to every node, bodies included, in order; the first rule that matches a node wins.

    New nodes carry the metadata of the nodes they replace; the one that computes the result keeps the root's name.
    Every rewrite is an ``applied`` remark at the root of its match, every refusal of ``check`` a ``missed`` one.
    """
    instances = [rule() if isinstance(rule, type) else rule for rule in rules]
    compiled = [
        (rule, onnxscript_pattern.RewriteRule(rule.pattern, rule.rewrite, rule.check, name=type(rule).__name__))
        for rule in instances
    ]
    taken = names(model)
    overridable = {value: value.const_value for value in model.graph.inputs if value.is_initializer()}
    for value in overridable:
        value.const_value = None  # a default is no constant
    try:
        for graph in list(model.graphs()):
            for node in list(graph):
                _rewrite_node(model, graph, node, compiled, taken, context)
    finally:
        for value, tensor in overridable.items():
            value.const_value = tensor


def _rewrite_node(
    model: ir.Model,
    graph: ir.Graph,
    node: ir.Node,
    rules: Iterable[tuple[Rule, Any]],
    taken: set[str],
    context: Context,
) -> None:
    for rule, compiled in rules:
        if node.graph is not graph:
            return  # an earlier match took it
        refusals = _Refusals()
        imports = dict(graph.opset_imports)
        delta = compiled.try_rewrite(model, graph, node, tracer=refusals)
        if graph is not model.graph:
            graph.opset_imports.clear()  # bodies have none of their own
            graph.opset_imports.update(imports)
        if delta is not None:
            context.applied(node, rule.message())
            _replace(graph, node, delta, taken)
            return
        if refusals.reason:
            context.missed(node, refusals.reason)


def _replace(graph: ir.Graph, root: ir.Node, delta: Any, taken: set[str]) -> None:
    """Put the replacement in the place of the match: names, metadata, types and graph outputs survive."""
    old_nodes: list[ir.Node] = list(delta.match.nodes)
    old_values: list[ir.Value] = list(delta.match.outputs)
    new_nodes: list[ir.Node] = list(delta.new_nodes)
    new_values: list[ir.Value] = list(delta.new_outputs)
    metadata: dict[str, str] = {}
    for node in old_nodes:
        metadata = {**node.metadata_props, **metadata}
    results = {id(value) for value in new_values}
    constants = [node for node in new_nodes if node.op_type == "Constant" and "value" in node.attributes]
    for node in constants:  # a loaded model has initializers in their place
        new_nodes.remove(node)
        tensor = node.attributes["value"].as_tensor()
        value = add_constant(graph, f"{root.name}/constant", tensor.numpy(), taken)
        node.outputs[0].replace_all_uses_with(value)
    for value in delta.new_initializers:
        value.name = unique(value.name or f"{root.name}/constant", taken)
        graph.register_initializer(value)
    for node in new_nodes:
        is_result = any(id(output) in results for output in node.outputs)
        node.name = root.name if is_result and root.name else unique(f"{root.name}/{node.op_type}", taken)
        node.metadata_props.update({**metadata, **node.metadata_props})
        for output in node.outputs:
            output.name = unique(f"{root.name}/{output.name or node.op_type}", taken)
    graph.insert_after(root, new_nodes)
    for old, new in zip(old_values, new_values, strict=True):
        if cannot_forward(old, new):  # for example a graph input: the output keeps its name through an Identity
            identity = ir.node("Identity", [new], name=unique(f"{root.name}/Identity", taken), num_outputs=1)
            identity.outputs[0].name = unique(f"{old.name}/Identity", taken)
            identity.metadata_props.update(metadata)
            graph.insert_after(new_nodes[-1] if new_nodes else root, identity)
            new_nodes.append(identity)
            new = identity.outputs[0]
        name = old.name
        forward(old, new)
        if new.producer() in new_nodes:
            new.name = name
    remove(old_nodes)
    if len(old_values) > 1:
        graph.sort()  # a match with several results has no one place
