"""Einsum: products over named axes, as transposes, reshapes and one matrix product for each further operand.

``bhid,bhjd->bhij``: letters in both operands and the result are batches, those in both operands alone are summed by
the matrix product, those of one operand alone are its rows or columns, or are summed first if nothing wants them.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from optkit_targets.coreml.lowering.forms import (
    broadcast,
    check_rank,
    dims,
    dtype,
    is_float,
    label,
    reshaped,
    transposed,
    volume,
)
from optkit_targets.coreml.lowering.scope import CannotLower, Scope
from optkit_targets.coreml.lowering.table import lowers

# What MIL computes in one operation on the ANE's own layout: products over channels, "nchw,nwhu->nchu".
OWN = {("abcd", "adce", "abce"): "nchw,nwhu->nchu", ("abc", "cbd", "abd"): "chw,whr->chr"}


@dataclass(frozen=True)
class Term:
    """An operand and the letters of its axes."""

    letters: str
    value: Any

    def sizes(self) -> dict[str, int]:
        """Return the length of every axis."""
        return dict(zip(self.letters, dims(self.value), strict=True))


@lowers("Einsum")
def einsum(scope: Scope, node: ir.Node) -> Any:
    """Write a sum of products over axes."""
    operands = [scope.input(node, index) for index in range(len(node.inputs))]
    terms, result = _parse(str(node.attributes.get_string("equation", "")), [len(dims(x)) for x in operands])
    check_rank(len(result))
    own = _own(scope, node, terms, result, operands)
    if own is not None:
        return own
    parts = [_distinct(scope, letters, value) for letters, value in zip(terms, operands, strict=True)]
    while len(parts) > 1:
        wanted = set(result).union(*(term.letters for term in parts[2:]))
        parts = [_product(scope, parts[0], parts[1], wanted), *parts[2:]]
    last = _summed(scope, parts[0], set(result))
    return transposed(scope, last.value, [last.letters.index(letter) for letter in result], name=label(scope, node))


def _parse(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """Return the letters of every operand and of the result; an ellipsis becomes letters that nothing else has."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    terms, widest = [], 0
    for term, rank in zip(left.split(","), ranks, strict=True):
        hidden = rank - len(term.replace("...", ""))
        widest = max(widest, hidden if "..." in term else 0)
        terms.append((term, hidden))
    rest = "".join(free[:widest])
    letters = [term.replace("...", rest[widest - hidden :]) for term, hidden in terms]
    if not arrow:  # numpy's rule: what appears once, in alphabetical order, behind the ellipsis
        once = sorted(letter for letter in set(left) - set(",.") if left.count(letter) == 1)
        right = "..." * ("..." in left) + "".join(once)
    return letters, right.replace("...", rest)


def _own(scope: Scope, node: ir.Node, terms: list[str], result: str, operands: list[Any]) -> Any | None:
    """Return MIL's einsum where it has the equation."""
    order = {letter: string.ascii_letters[place] for place, letter in enumerate(dict.fromkeys("".join(terms)))}
    key = tuple("".join(order[letter] for letter in term) for term in [*terms, result] if set(term) <= set(order))
    if key not in OWN or not all(is_float(value) for value in operands):
        return None
    return scope.mb.einsum(values=operands, equation=OWN[key], name=label(scope, node))


def _distinct(scope: Scope, letters: str, value: Any) -> Term:
    """Return an operand with every letter once: a repeated one is the diagonal, as a sum against the identity."""
    for letter in dict.fromkeys(letters):
        while letters.count(letter) > 1:
            first, second = letters.index(letter), letters.rindex(letter)
            size = dims(value)[first]
            shape = [size if place in (first, second) else 1 for place in range(len(letters))]
            if not is_float(value):
                raise CannotLower(f"axis '{letter}' appears twice in an operand of integers")
            kind = np.float16 if dtype(value) == "fp16" else np.float32
            eye = np.eye(size, dtype=kind).reshape(shape)
            value = scope.mb.reduce_sum(x=scope.mb.mul(x=value, y=eye), axes=[second], keep_dims=False)
            letters = letters[:second] + letters[second + 1 :]
    return Term(letters, value)


def _summed(scope: Scope, term: Term, wanted: set[str]) -> Term:
    """Return a term summed over the letters that nothing wants."""
    gone = [place for place, letter in enumerate(term.letters) if letter not in wanted]
    if not gone:
        return term
    left = "".join(letter for letter in term.letters if letter in wanted)
    return Term(left, scope.mb.reduce_sum(x=term.value, axes=gone, keep_dims=False))


def _product(scope: Scope, x: Term, y: Term, wanted: set[str]) -> Term:
    """Return two terms as one: ``[batch, rows, sum] @ [batch, sum, columns]``."""
    x, y = _summed(scope, x, wanted | set(y.letters)), _summed(scope, y, wanted | set(x.letters))
    shared = [letter for letter in x.letters if letter in y.letters]
    sizes = {letter: max(x.sizes().get(letter, 1), y.sizes().get(letter, 1)) for letter in x.letters + y.letters}
    batch = [letter for letter in shared if letter in wanted]
    summed = [letter for letter in shared if letter not in wanted]
    rows = [letter for letter in x.letters if letter not in shared]
    columns = [letter for letter in y.letters if letter not in shared]
    counts = [volume([sizes[letter] for letter in part]) for part in (batch, rows, summed, columns)]
    left = _matrix(scope, x, [batch, rows, summed], sizes, [counts[0], counts[1], counts[2]])
    right = _matrix(scope, y, [batch, summed, columns], sizes, [counts[0], counts[2], counts[3]])
    product = scope.mb.matmul(x=left, y=right)
    letters = "".join(batch + rows + columns)
    check_rank(len(letters), "a product on the way")
    return Term(letters, reshaped(scope, product, [sizes[letter] for letter in letters]))


def _matrix(scope: Scope, term: Term, parts: list[list[str]], sizes: dict[str, int], shape: list[int]) -> Any:
    """Return a term's axes in the order of ``parts``, each part one axis."""
    order = [letter for part in parts for letter in part]
    value = transposed(scope, term.value, [term.letters.index(letter) for letter in order])
    return reshaped(scope, broadcast(scope, value, [sizes[letter] for letter in order]), shape)
