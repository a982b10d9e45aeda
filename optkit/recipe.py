"""Recipes: which passes run in which order, with which options, and which nodes keep which precision."""

from __future__ import annotations

import fnmatch
import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tomli_w
from pydantic import Field, ValidationError

from optkit.errors import InputError, did_you_mean
from optkit.pipeline import Pass
from optkit.plugins import pass_class
from optkit.target import Frozen, PassSpec, Target

PRECISION_KEY = "optkit.precision"  # node.metadata_props: the precision that a rule demands
FLOAT = "fp32"


class Rule(Frozen):
    """Demands a precision for the nodes whose name matches a glob and whose operator is ``op``; last match wins."""

    match: str = "*"
    op: str | None = None
    precision: str

    def matches(self, node: ir.Node) -> bool:
        """Whether the rule speaks about this node."""
        return (self.op is None or node.op_type == self.op) and fnmatch.fnmatchcase(node.name or "", self.match)

    def __str__(self) -> str:
        op = f", op '{self.op}'" if self.op else ""
        return f"match '{self.match}'{op}"


class Recipe(Frozen):
    """What to do with a model.

    Attributes:
        precision: The precision by name; None: the target's default.
        min_coverage: The share of the weights that must be in it, 0 to 1; None: as `optkit.compile` has it.
        passes: Passes in order; None: the target's own for the precision.
        rules: Which nodes keep which precision.
    """

    precision: str | None = None
    min_coverage: float | None = Field(default=None, ge=0, le=1)
    passes: tuple[PassSpec, ...] | None = None
    rules: tuple[Rule, ...] = Field(default=(), alias="rule")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from TOML.

    Raises:
        InputError: The file is missing, is not TOML, or has a key or a pass that is not known.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"not a readable recipe: {error}", where=str(path)) from error
    table.pop("lock", None)  # a lock file is a recipe, with what it was resolved against
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise InputError(_sentence(error, Recipe), where=str(path)) from error


def build_passes(specs: Sequence[PassSpec], options: Mapping[str, Any] | None = None) -> list[Pass]:
    """Return the passes that the specs name.

    Args:
        specs: Passes by name with their options, in order.
        options: More options, as ``{"pass-name.option": value}``; each must concern a pass of the pipeline.

    Raises:
        InputError: An unknown pass or option, a value the option does not take, or an option that reached no pass.
    """
    unused = dict(options or {})
    passes = []
    for spec in specs:
        extra = {key.partition(".")[2]: value for key, value in (options or {}).items() if _names(key, spec.pass_)}
        for key in [key for key in unused if _names(key, spec.pass_)]:
            del unused[key]
        passes.append(build_pass(spec.pass_, {**spec.options, **extra}))
    if unused:
        key = next(iter(unused))
        hint = did_you_mean(key.partition(".")[0], {spec.pass_ for spec in specs})
        raise InputError(f"the option '{key}' concerns no pass of this pipeline", hint=hint)
    return passes


def _names(key: str, pass_name: str) -> bool:
    return key.partition(".")[0] == pass_name


def build_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """Return one pass with its options validated."""
    cls = pass_class(name)
    try:
        return cls.model_validate(dict(options))
    except ValidationError as error:
        raise InputError(f"pass '{name}': {_sentence(error, cls)}") from error


def _sentence(error: ValidationError, cls: type[Any]) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in cls.model_fields.items()]
        return f"no option '{key}'; {did_you_mean(key, known) or 'it has none'}"
    if first["type"] == "missing":
        return f"the key '{key}' is missing"
    return f"option '{key}' = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def apply_rules(model: ir.Model, rules: Sequence[Rule], target: Target) -> None:
    """Write each node's demanded precision on the node itself, where every later pass finds it.

    Raises:
        InputError: A rule matches no node, or names a precision that the target does not have.
    """
    nodes = list(model.graph.all_nodes())
    for number, rule in enumerate(rules, 1):
        if rule.precision != FLOAT:
            try:
                target.precision(rule.precision)
            except InputError as error:
                hint = did_you_mean(rule.precision, [FLOAT, *target.precisions])
                what = f"rule {number} names the unknown precision '{rule.precision}': {error.what}"
                raise InputError(what, hint=hint) from error
        matched = [node for node in nodes if rule.matches(node)]
        if not matched:
            known = {node.name or "" for node in nodes} if rule.match != "*" else {node.op_type for node in nodes}
            wanted = rule.match if rule.match != "*" else rule.op or ""
            hint = (
                did_you_mean(wanted, known) if len(known) < 20 else did_you_mean(wanted, known).partition("known:")[0]
            )
            raise InputError(f"rule {number} ({rule}) matches none of the {len(nodes)} nodes", hint=hint)
        for node in matched:
            node.metadata_props[PRECISION_KEY] = rule.precision


def lock(recipe: Recipe, passes: Sequence[Pass], target: Target, precision: str, facts: Mapping[str, Any]) -> bytes:
    """Return the resolved recipe as TOML: every pass with every option, the rules, and what it was resolved against.

    Reading it back as a recipe runs the same passes with the same options.
    """
    table = {
        "precision": precision,
        **({} if recipe.min_coverage is None else {"min_coverage": recipe.min_coverage}),
        "passes": [
            {"pass": p.name(), **({"options": _present(p.model_dump(mode="json"))} if p.model_dump() else {})}
            for p in passes
        ],
        "rule": [_present(rule.model_dump()) for rule in recipe.rules],
        "lock": {"target": target.name, **facts},
    }
    return tomli_w.dumps(table).encode()


def _present(options: Mapping[str, Any]) -> dict[str, Any]:
    """TOML has no null: an absent key is the default."""
    return {key: value for key, value in options.items() if value is not None}


def digest(content: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
