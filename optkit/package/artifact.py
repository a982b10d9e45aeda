"""Packages on disk: sealing one with its manifest, reading it back, and checking every file's hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import optkit
from optkit.errors import InputError
from optkit.package.contract import Artifact
from optkit.pipeline import Remark

MANIFEST, REMARKS = "manifest.json", "remarks.jsonl"
METADATA = "additional_metadata"  # the only place where a loader of the artifact must accept keys it does not know
RECORDED_VERSIONS = ("numpy", "onnx", "onnx-ir", "onnxruntime")


@dataclass(frozen=True)
class Provenance:
    """How a package came to be. Nothing in it depends on the time, the place or the user.

    Attributes:
        source: Name of the model's file or folder, without directories.
        source_sha256: Digest over it and its external data.
        target: Name of the target.
        packager: Name of the packager that wrote the artifact, which also opens it.
        precision: The precision compiled, as ``w8a8``.
        recipe_sha256: Digest of the resolved recipe.
        executor: What the package was verified on, in full, or why it was not.
        also: Further targets that the package serves.
    """

    source: str
    source_sha256: str
    target: str
    packager: str
    precision: str
    recipe_sha256: str
    executor: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileRecord:
    """Digest and size of one file of a package."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Package:
    """A package as its manifest describes it.

    Attributes:
        directory: Its folder.
        manifest: The whole manifest, parsed; the packager finds its own keys there.
        provenance: How it came to be.
        versions: Versions of optkit and of the libraries that wrote it.
        files: Every file but the manifest, by path relative to the folder.
    """

    directory: Path
    manifest: Mapping[str, Any]
    provenance: Provenance
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]


@dataclass(frozen=True)
class Difference:
    """A file that is not as the manifest says."""

    path: str
    kind: Literal["missing", "altered", "extra"]


def seal_package(directory: Path, artifact: Artifact, files: Mapping[str, bytes], provenance: Provenance) -> Package:
    """Write the given files and the manifest over everything in the directory.

    Args:
        directory: Folder that already holds the artifact.
        artifact: The artifact; its own manifest keys stand beside ours.
        files: Reports, remarks and the like, by name.
        provenance: How the package came to be.

    Returns:
        The package, as ``open_package`` reads it.
    """
    for name, content in files.items():
        (directory / name).write_bytes(content)
    records = {path: asdict(_record(directory / path)) for path in _paths(directory)}
    versions = {"optkit": optkit.__version__, **{name: version(name) for name in RECORDED_VERSIONS}}
    ours = {**asdict(provenance), "versions": versions, "files": records}
    manifest = {**artifact.manifest, METADATA: {**artifact.manifest.get(METADATA, {}), "optkit": ours}}
    text = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    return open_package(directory)


def is_package(directory: Path) -> bool:
    """Whether the directory is a package that optkit wrote."""
    try:
        open_package(directory)
    except InputError:
        return False
    return True


def open_package(directory: str | Path) -> Package:
    """Read a package's manifest.

    Raises:
        InputError: The directory is not a package written by optkit, or its manifest is damaged.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "not a package: it has no manifest.json" if directory.is_dir() else "no such package directory"
        raise InputError(what, where=str(directory), hint="name the directory that 'optkit compile' wrote") from error
    except (OSError, ValueError) as error:
        raise InputError(f"the manifest cannot be read: {error}", where=str(path)) from error
    try:
        ours = manifest[METADATA]["optkit"]
        names = [name for name in Provenance.__dataclass_fields__ if name != "also"]
        also = tuple(str(name) for name in ours.get("also", ()))
        provenance = Provenance(**{name: str(ours[name]) for name in names}, also=also)
        files = {str(name): FileRecord(str(f["sha256"]), int(f["bytes"])) for name, f in ours["files"].items()}
        versions = {str(name): str(number) for name, number in ours["versions"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("the manifest was not written by optkit, or is damaged", where=str(path)) from error
    for name in files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"the manifest names '{name}', which is outside the package", where=str(path))
    return Package(directory, manifest, provenance, versions, files)


def check_hashes(package: Package) -> list[Difference]:
    """Return every file that is missing, altered, or not in the manifest, by path; empty when all is as written."""
    present = set(_paths(package.directory))
    found = [Difference(path, "extra") for path in present - set(package.files)]
    for path, record in package.files.items():
        if path not in present:
            found.append(Difference(path, "missing"))
        elif _record(package.directory / path) != record:
            found.append(Difference(path, "altered"))
    return sorted(found, key=lambda difference: difference.path)


def write_remarks(remarks: Iterable[Remark]) -> bytes:
    """Return remarks as the content of ``remarks.jsonl``: one JSON object a line, in order."""
    return "".join(json.dumps(asdict(remark), ensure_ascii=False) + "\n" for remark in remarks).encode()


def read_remarks(directory: Path) -> list[Remark]:
    """Return the remarks of a package.

    Raises:
        InputError: The directory is no package, or its remarks are missing or damaged.
    """
    path = open_package(directory).directory / REMARKS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        return [Remark(**json.loads(line)) for line in lines if line]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"the remarks cannot be read: {error}", where=str(path)) from error


def _paths(directory: Path) -> list[str]:
    """Return every file below the directory but the manifest, relative, sorted."""
    paths = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir())
    return sorted(path for path in paths if path != MANIFEST)


def _record(path: Path) -> FileRecord:
    if not path.is_file():  # a dangling link
        return FileRecord("", 0)
    with path.open("rb") as stream:
        return FileRecord(hashlib.file_digest(stream, "sha256").hexdigest(), path.stat().st_size)
