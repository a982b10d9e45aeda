"""What the weights of a package take, and in which form they are stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from optkit_targets.coreml.interpreter.constants import Constant
from optkit_targets.coreml.interpreter.program import Block, Operation

COMPRESSED = "constexpr_"
# The parameter that holds an element of each weight, by preference; the others are scales, palettes and masks.
PAYLOADS = ("quantized_data", "data", "indices", "indices_nonzero_data", "nonzero_data", "source_val")


@dataclass(frozen=True)
class Weight:
    """One weight.

    Attributes:
        name: The variable that holds it.
        op_type: ``const``, or the operation that expands it.
        bits: Width of what is stored for an element: an index, an integer, a float.
        elements: Its elements, expanded.
        stored_bytes: What it takes with its scales, palettes and masks; 0 where another weight has the same bytes.
    """

    name: str
    op_type: str
    bits: int
    elements: int
    stored_bytes: int


@dataclass
class _Form:
    """What is known of a weight that may be part of another."""

    name: str
    op_type: str
    bits: int
    elements: int
    constants: list[Constant] = field(default_factory=list)


def weights_of(block: Block) -> tuple[Weight, ...]:
    """Return the compressed weights of a program, and those that lie in its weight file as they are."""
    forms: dict[str, _Form] = {}
    inner: set[int] = set()
    for operation in block.walk():
        if not operation.type.startswith(COMPRESSED) and operation.type != "const":
            continue
        form = _form(operation, forms)
        inner |= {id(forms[name]) for name in _names(operation) if name in forms}
        for output in operation.outputs:
            forms[output.name] = form
    counted: set[str] = set()
    found = []
    for form in {id(form): form for form in forms.values()}.values():
        stored = form.op_type != "const" or any(constant.origin for constant in form.constants)
        if stored and id(form) not in inner:
            taken = sum(_taken(constant, counted) for constant in form.constants)
            found.append(Weight(form.name, form.op_type, form.bits, form.elements, taken))
    return tuple(found)


def _form(operation: Operation, forms: dict[str, _Form]) -> _Form:
    output = operation.outputs[-1]
    elements = 0 if output.type is None else math.prod(output.type.sizes)
    form = _Form(output.name, operation.type, 0, elements)
    for bindings in operation.inputs.values():
        form.constants += [constant for constant in bindings if isinstance(constant, Constant)]
    for name in _names(operation):
        form.constants += forms[name].constants if name in forms else []
    form.bits = _bits(operation, forms)
    return form


def _bits(operation: Operation, forms: dict[str, _Form]) -> int:
    if operation.type == "constexpr_lut_to_dense" and "shape" in operation.inputs:  # bytes of packed indices
        lut = operation.inputs["lut"][0]
        return int(lut.value.size - 1).bit_length() if isinstance(lut, Constant) else 0
    for parameter in ("val", *PAYLOADS):
        for binding in operation.inputs.get(parameter, ()):
            if isinstance(binding, str):
                return forms[binding].bits if binding in forms else 0
            return binding.element.bits if binding.element is not None else 0
    return 0


def _names(operation: Operation) -> Iterator[str]:
    for bindings in operation.inputs.values():
        yield from (binding for binding in bindings if isinstance(binding, str))


def _taken(constant: Constant, counted: set[str]) -> int:
    if constant.origin in counted:
        return 0
    if constant.origin:
        counted.add(constant.origin)
    return constant.stored_bytes
