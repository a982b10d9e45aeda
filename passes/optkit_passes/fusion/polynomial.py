"""Scalar formulas as polynomials, so that one comparison reads every order in which a formula can be written."""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose

import onnx_ir as ir

from optkit_passes.fusion.matching import is_operator, number

Polynomial = Mapping[tuple[int, int], float]  # (power of x, power of t) -> coefficient

X: Polynomial = {(1, 0): 1.0}
T: Polynomial = {(0, 1): 1.0}
ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "Neg")
HIGHEST_DEGREE = 3
DEEPEST = 8  # operators between a value and the variables; the longest formula that is looked for has six


def polynomial(
    value: ir.Value | None, known: Mapping[ir.Value, Polynomial], rank: int, depth: int = DEEPEST
) -> Polynomial | None:
    """Return a value as a polynomial in the known ones; None where it is none of a degree up to 3.

    Args:
        value: The value.
        known: The variables: x, and where there is one, t.
        rank: The number of axes of x: a constant with more would add axes to the result.
        depth: How many operators may stand between them.
    """
    if value is None or value in known:
        return None if value is None else known[value]
    constant = number(value, rank)
    if constant is not None:
        return {(0, 0): constant}
    node = value.producer()
    if node is None or depth == 0 or not is_operator(node, *ARITHMETIC):
        return None
    if node.op_type == "Pow":
        base, exponent = polynomial(node.inputs[0], known, rank, depth - 1), number(node.inputs[1], rank)
        return None if base is None or exponent not in (1, 2, 3) else _power(base, int(exponent))
    terms = [polynomial(operand, known, rank, depth - 1) for operand in node.inputs]
    first, second = terms[0], terms[-1]
    if first is None or second is None:
        return None
    if node.op_type == "Neg":
        return _times(first, {(0, 0): -1.0})
    if node.op_type == "Mul":
        return _times(first, second)
    if node.op_type == "Div":
        divisor = second.get((0, 0), 0.0)
        return _times(first, {(0, 0): 1 / divisor}) if len(second) == 1 and divisor else None
    sign = 1.0 if node.op_type == "Add" else -1.0
    return {power: first.get(power, 0.0) + sign * second.get(power, 0.0) for power in {*first, *second}}


def _times(a: Polynomial, b: Polynomial) -> Polynomial | None:
    product: dict[tuple[int, int], float] = {}
    for (i, j), left in a.items():
        for (k, n), right in b.items():
            product[i + k, j + n] = product.get((i + k, j + n), 0.0) + left * right
    return product if all(i + j <= HIGHEST_DEGREE for i, j in product) else None


def _power(base: Polynomial, exponent: int) -> Polynomial | None:
    result: Polynomial | None = base
    for _ in range(exponent - 1):
        result = _times(result, base) if result is not None else None
    return result


def agree(a: Polynomial | None, b: Polynomial, rtol: float) -> bool:
    """Return whether two polynomials have the same coefficients, but for constants that were rounded."""
    return a is not None and all(
        isclose(a.get(power, 0.0), b.get(power, 0.0), rel_tol=rtol, abs_tol=rtol * 1e-3) for power in {*a, *b}
    )
