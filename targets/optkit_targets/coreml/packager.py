"""Packages for Apple devices: an ML Program that Xcode and Core ML load, and the network that it was made from.

manifest.json              optkit's own keys
README.md                  the lines of Swift and Python that load it
model.mlpackage/           what the device loads
network/model.onnx         the same network as ONNX, to look into
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

import optkit
from optkit.errors import InputError
from optkit.graph import is_constant
from optkit.model.loading import graph_inputs, infer_shapes, save
from optkit.package.contract import Artifact, Executor, Fact, Packager, Placement
from optkit.target import Target
from optkit_targets.coreml import program, toolkit
from optkit_targets.coreml.deployment import MACOS, deployments
from optkit_targets.coreml.executors import Interpreted
from optkit_targets.coreml.features import FlexibleDim, ImageInput, flexible_shape
from optkit_targets.coreml.legalize.keep_float32 import FLOAT_KEY
from optkit_targets.coreml.lowering.scope import identifier
from optkit_targets.coreml.placement import place
from optkit_targets.coreml.readme import readme

ENTRY, NETWORK = "model.mlpackage", "network/model.onnx"
FLOAT32 = "computed in float32, so never on the Neural Engine, whose time the predicted one is"
MOVING = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


class CoremlPackager(Packager):
    """Writes ML Programs; which iOS they need is the oldest that has every form in use, or what the user names."""

    name = "coreml"
    options = frozenset({"deployment_target", "image", "class_labels", "flexible"})

    def package(self, model: ir.Model, target: Target, directory: Path, also: Sequence[Target] = ()) -> Artifact:
        """Write the package.

        Raises:
            InputError: A node has no lowering, or none for the deployment target; or an option does not fit.
            MissingDependencyError: coremltools is not installed.
        """
        flexible = [FlexibleDim.parse(text) for text in target.options.get("flexible", ())]
        known = _typed(model)
        deployment, made = lowered(known, deployments(target), flexible)
        half = _halved(known)
        images = [ImageInput.parse(text) for text in target.options.get("image", ())]
        labels = read_labels(target.options.get("class_labels"))
        shapes = {identifier(value.name or ""): flexible_shape(value, flexible) for value in graph_inputs(model)}
        package = program.save(
            made,
            deployment,
            directory / ENTRY,
            half=half,
            metadata=_metadata(model),
            images=images,
            class_labels=labels,
            shapes=shapes if flexible else None,
        )
        network = directory / NETWORK
        network.parent.mkdir()
        save(model, network)
        floats = _floats(known, half=half)
        text = readme(
            model,
            chip=target.summary,
            entry=ENTRY,
            deployment=deployment,
            macos=MACOS[deployment],
            floats=floats,
            images={each.name for each in images},
            labels=bool(labels),
        )
        (directory / "README.md").write_text(text, encoding="utf-8")
        files = sorted(path.relative_to(directory).as_posix() for path in package.rglob("*") if path.is_file())
        facts = (
            Fact(target.name, "made by", toolkit.name()),
            Fact(target.name, "needs", f"iOS {deployment}, {MACOS[deployment]}"),
            Fact(target.name, "computes floats in", " and ".join(floats) or "none"),
        )
        notices = (FLOAT32,) if model.metadata_props.get(FLOAT_KEY) == "float32" else ()
        return Artifact(directory, ENTRY, tuple(files), {}, facts=facts, notices=notices, network=NETWORK)

    def open(self, directory: Path, manifest: Mapping[str, Any]) -> Artifact:
        """Find the ML Program of a package.

        Raises:
            InputError: It, or the network that it was made from, is missing.
        """
        for path in (directory / ENTRY / "Manifest.json", directory / NETWORK):
            if not path.is_file():
                raise InputError("the package lacks a file", where=str(path))
        package = directory / ENTRY
        files = sorted(path.relative_to(directory).as_posix() for path in package.rglob("*") if path.is_file())
        return Artifact(directory, ENTRY, tuple(files), {}, network=NETWORK)

    def executors(self, target: Target) -> list[Executor]:
        """Return the interpreter: nothing else on this machine runs Core ML."""
        return [Interpreted()]

    def placement(self, model: ir.Model, target: Target) -> list[Placement]:
        """Return where Core ML is likely to run each node, by rules with their sources."""
        return place(_typed(model), target)


def _typed(model: ir.Model) -> ir.Model:
    """Return a model in which values have the types and shapes that a pruned one leaves out."""
    known = model.clone()
    for graph in known.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and value.type is None:
                value.type, value.shape = (
                    ir.TensorType(value.const_value.dtype),
                    ir.Shape(value.const_value.shape.numpy()),
                )
    infer_shapes(known)
    return known


def _floats(model: ir.Model, *, half: bool) -> list[str]:
    """Return the types of floats in which a model is computed, beyond what is moved, cast, or known before it runs."""
    if half:
        return ["float16"]
    computing = [node for node in model.graph if node.op_type not in MOVING and not all(map(is_constant, node.inputs))]
    kinds = {value.dtype.name for node in computing for value in node.outputs if value.dtype is not None}
    return [name for key, name in (("FLOAT16", "float16"), ("FLOAT", "float32")) if key in kinds]


def _metadata(model: ir.Model) -> dict[str, str]:
    """Return what the model says of itself, and which optkit wrote it; optkit's marks for its own passes stay here."""
    own = {key: text for key, text in model.metadata_props.items() if not key.startswith(("optkit.", "onnx."))}
    text = model.doc_string or model.graph.doc_string
    return {**({"description": text} if text else {}), **own, "optkit": optkit.__version__}


def _halved(model: ir.Model) -> bool:
    """Whether coremltools is to turn every float into float16: not where the passes decided on types themselves."""
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    typed = any(value.dtype == ir.DataType.FLOAT16 for value in values)
    return not typed and model.metadata_props.get(FLOAT_KEY) != "float32"


def lowered(model: ir.Model, tried: Sequence[int], flexible: Sequence[FlexibleDim]) -> tuple[int, Any]:
    """Return the program for the first deployment target that has every form it needs.

    Raises:
        InputError: None has; the reasons are those of the newest.
    """
    refusal: InputError | None = None
    for deployment in tried:
        try:
            return deployment, program.lower(model, deployment, flexible, settle=len(tried) == 1)
        except InputError as error:
            refusal = error
    assert refusal is not None
    raise refusal


def read_labels(path: str | None) -> list[str]:
    """Read class labels, one a line.

    Raises:
        InputError: The file cannot be read.
    """
    if path is None:
        return []
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the class labels cannot be read: {error}", where=str(path)) from error
