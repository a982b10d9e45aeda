"""The program of a saved package: its operations with their constants, as they lie in its files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs are published with it

from optkit.errors import InputError
from optkit_targets.coreml import toolkit
from optkit_targets.coreml.interpreter.blob import ANOTHER_PACKAGE
from optkit_targets.coreml.interpreter.constants import Constant, ConstantReader, TensorType, tensor_type

OPSET_PREFIX = "CoreML"  # opset CoreML5 came with iOS 15, CoreML8 with iOS 18
OLDEST_OPSET, OLDEST_DEPLOYMENT = 5, 15


@dataclass(frozen=True)
class Output:
    """What an operation computes: a name, and its type, None for what is no tensor."""

    name: str
    type: TensorType | None


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        type: MIL's operator (``conv``).
        name: Its own name.
        inputs: By parameter, what it reads: names of variables, and constants. Most parameters have one.
        outputs: What it computes.
        blocks: Bodies of control flow.
    """

    type: str
    name: str
    inputs: dict[str, tuple[str | Constant, ...]]
    outputs: tuple[Output, ...]
    blocks: tuple[Block, ...]

    @property
    def where(self) -> str:
        """What errors call it: its first output, which is what the source calls it too."""
        return self.outputs[0].name if self.outputs else self.name


@dataclass(frozen=True)
class Block:
    """Operations in the order of their execution; bodies of loops have inputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operations: tuple[Operation, ...]

    def walk(self) -> Iterator[Operation]:
        """Yield every operation, bodies included."""
        for operation in self.operations:
            yield operation
            for block in operation.blocks:
                yield from block.walk()


@dataclass(frozen=True)
class Function:
    """The function that a package runs.

    Attributes:
        inputs: Its inputs' types by name.
        states: The same of its states, which keep their values from run to run.
        block: Its operations.
        deployment: The deployment target whose operators it has: 15 for iOS 15, 18 for iOS 18.
        description: The model's interface (``ModelDescription``).
    """

    inputs: dict[str, TensorType]
    states: dict[str, TensorType]
    block: Block
    deployment: int
    description: Any


def read_program(package: Path, function: str = "") -> Function:
    """Return a function of a package.

    Args:
        package: An ``.mlpackage`` with an ML Program.
        function: Its name; by default the one the package names, or ``main``.

    Raises:
        InputError: The package is missing, damaged, or no ML Program, or lacks the function.
        MissingDependencyError: coremltools, whose messages read the specification, is not installed.
    """
    path = specification(package)
    proto = toolkit.proto()
    model = proto.Model()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, OSError) as error:
        raise InputError("the specification cannot be read", where=str(path), hint=ANOTHER_PACKAGE) from error
    if model.WhichOneof("Type") != "mlProgram":
        what = f"the package holds a {model.WhichOneof('Type') or 'model without content'}, no ML Program"
        raise InputError(what, where=str(package))
    functions = model.mlProgram.functions
    name = function or model.description.defaultFunctionName or "main"
    if name not in functions:
        what = f"the package has no function '{name}'"
        raise InputError(what, where=str(package), hint=f"it has: {', '.join(sorted(functions))}")
    chosen = functions[name]
    block = chosen.block_specializations.get(chosen.opset)
    if block is None or not chosen.opset.removeprefix(OPSET_PREFIX).isdigit():
        raise InputError(f"the function '{name}' has no block for its opset '{chosen.opset}'", where=str(path))
    described = {each.name: each for each in model.description.functions}
    reader = ConstantReader(path.parent)
    types = {value.name: tensor_type(value.type, value.name) for value in chosen.inputs}
    states = {value.name for value in chosen.inputs if value.type.WhichOneof("type") == "stateType"}
    return Function(
        inputs={name: type_ for name, type_ in types.items() if name not in states},
        states={name: type_ for name, type_ in types.items() if name in states},
        block=_block(block, reader),
        deployment=int(chosen.opset.removeprefix(OPSET_PREFIX)) - OLDEST_OPSET + OLDEST_DEPLOYMENT,
        description=described.get(name, model.description),
    )


def specification(package: Path) -> Path:
    """Return the file of the specification, which the package's manifest names.

    Raises:
        InputError: The package, its manifest or the file is missing or damaged.
    """
    manifest = package / "Manifest.json"
    try:
        entries = json.loads(manifest.read_text(encoding="utf-8"))
        relative = entries["itemInfoEntries"][entries["rootModelIdentifier"]]["path"]
        path = package / "Data" / str(relative)
    except OSError as error:
        what = "it has no Manifest.json, so it is no .mlpackage" if package.is_dir() else "the package is missing"
        raise InputError(what, where=str(package)) from error
    except (ValueError, KeyError, TypeError) as error:
        what = "the manifest does not say which file is the model"
        raise InputError(what, where=str(manifest), hint=ANOTHER_PACKAGE) from error
    if not path.is_file() or not path.resolve().is_relative_to(package.resolve()):
        raise InputError(f"the manifest names '{relative}', which is missing", where=str(package), hint=ANOTHER_PACKAGE)
    return path


def _block(block: Any, reader: ConstantReader) -> Block:
    return Block(
        inputs=tuple(value.name for value in block.inputs),
        outputs=tuple(block.outputs),
        operations=tuple(_operation(operation, reader) for operation in block.operations),
    )


def _operation(operation: Any, reader: ConstantReader) -> Operation:
    attributes = dict(operation.attributes)
    names = attributes.pop("name").immediateValue.tensor.strings.values if "name" in attributes else ()
    name = next(iter(names), "")
    inputs: dict[str, tuple[str | Constant, ...]] = {
        # Constants have their value here, and the compressed ones of iOS 16 all of their parameters.
        parameter: (reader.read(value, name or parameter),)
        for parameter, value in attributes.items()
    }
    for parameter, argument in operation.inputs.items():
        inputs[parameter] = tuple(
            binding.name if binding.WhichOneof("binding") == "name" else reader.read(binding.value, name or parameter)
            for binding in argument.arguments
        )
    outputs = tuple(Output(value.name, _type(value)) for value in operation.outputs)
    blocks = tuple(_block(block, reader) for block in operation.blocks)
    return Operation(operation.type, name, inputs, outputs, blocks)


def _type(value: Any) -> TensorType | None:
    """Return an output's type; strings, lists and dictionaries have none here."""
    try:
        return tensor_type(value.type, value.name)
    except InputError:
        return None
