"""The main job: load, rewrite, package, verify, report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from optkit import plugins
from optkit.dataset.samples import Samples, random_samples, read_samples
from optkit.evaluate.assess import assess, choose_executors
from optkit.model.loading import load, model_file, source_files, source_sha256
from optkit.package.artifact import Provenance, seal_package, write_remarks
from optkit.package.checking import require_static
from optkit.package.sharing import load_targets, require_shareable
from optkit.package.write import write_package
from optkit.pipeline import Context, Pipeline, remark_custom
from optkit.recipe import Recipe, apply_rules, build_passes, digest, lock, read_recipe
from optkit.report.contents import Report
from optkit.report.html import render_html
from optkit.report.summary import Gates, summarize
from optkit.target import Target

Data = str | Path | Mapping[str, Any] | Iterable[Mapping[str, np.ndarray]] | Samples
VERIFICATION_SAMPLES = 2  # run after every pass


def compile(
    model: str | Path,
    *,
    target: str | Target | Sequence[str | Target],
    output: str | Path | None = None,
    precision: str | None = None,
    recipe: str | Path | Recipe | None = None,
    options: Mapping[str, Any] | None = None,
    calibration: Data | None = None,
    evaluation: Data | None = None,
    preprocess: str | Path | None = None,
    labels: str | None = None,
    metrics: Sequence[str] = (),
    dims: Mapping[str, int] | None = None,
    fixed: Mapping[str, float] | None = None,
    gates: Gates | None = None,
    executor: str | None = None,
    overwrite: bool = False,
    strict: bool = False,
    packaging: Mapping[str, Any] | None = None,
    track: Callable[..., Any] | None = None,
) -> Report:
    """Compile a model for a device into a package, and return the report that the command line prints.

    Args:
        model: The ONNX file, or a folder that holds one.
        target: A target's name, TOML file or ``name:key=value`` form, or a loaded target; several where one package
            can serve them (see `optkit.package.sharing`): the first is the one that the report is about.
        output: The folder to write; ``<model>-<target>`` in the working directory by default.
        precision: For instance ``w8a8``, ``w4a16-b64`` or ``fp32`` (see `optkit.precision`); the recipe's, else the
            target's default.
        recipe: A recipe, or its file, with passes and rules of its own.
        options: Options of passes, as ``{"pass-name.option": value}``.
        calibration: Calibration data in any form that `optkit.dataset.samples.read_samples` takes.
        evaluation: Labelled data to measure accuracy on, in the same forms.
        preprocess: How images become inputs (a TOML file), for data that does not say so itself.
        labels: Where the labels of ``evaluation`` are, if not where they are looked for.
        metrics: Metrics by name; the one that suits the labels by default.
        dims: Sizes for dynamic dimensions.
        fixed: Values of inputs that are to be constants.
        gates: Limits on size, latency, memory, accuracy and coverage that the result is held against.
        executor: ``native``, ``emulated`` or ``simulated``; every available one by default.
        overwrite: Replace a package that is already there.
        strict: Fail on a pass that changes the model without a remark.
        packaging: Options of the target's packager, as ``{"context_binary": False}``: 'optkit targets NAME' lists them.
        track: Wraps iterables in a progress display: ``track(items, description, total)``.

    Returns:
        The report; its ``package`` names the folder.

    Raises:
        InputError: Something given cannot be used.
        VerificationError: A pass or the package does not agree with the original; nothing is written.
        MissingDependencyError: The executor that was asked for is not installed.
    """
    path = model_file(Path(model))
    devices = load_targets([target] if isinstance(target, (str, Target)) else target, packaging)
    device, also = devices[0], devices[1:]
    wanted = recipe if isinstance(recipe, Recipe) else read_recipe(Path(recipe)) if recipe else Recipe()
    chosen = device.precision(precision or wanted.precision)
    demanded = wanted.passes is None or bool(precision or wanted.precision)
    passes = build_passes(device.recipe_for(chosen) if wanted.passes is None else wanted.passes, options)
    toolchain = plugins.packager(device.packager)
    require_shareable(devices, chosen)
    available = {each.name: each for one in devices for each in toolchain.executors(one)}
    executors = choose_executors(sorted(available.values(), key=lambda each: each.kind == "simulated"), executor)

    original = load(path, dims, fixed)
    require_static(original, device)
    context = Context(device)
    if track is not None:
        context.track = track
    if calibration is not None:
        context.calibration = read_samples(calibration, original, preprocess=preprocess, inputs_only=True)
    if evaluation is not None:
        samples = read_samples(evaluation, original, preprocess=preprocess, labels=labels)
    elif context.calibration is not None:
        samples = context.calibration  # without labels: what ranges were fitted to is no test of accuracy
    else:
        samples = random_samples(original, VERIFICATION_SAMPLES)

    remark_custom(original, context)
    compiled = original.clone()
    apply_rules(compiled, wanted.rules, device)
    result = Pipeline(passes, strict=strict).run(compiled, context, list(samples[:VERIFICATION_SAMPLES]))

    limits = gates or Gates()
    if limits.min_coverage is None and wanted.min_coverage is not None:
        limits = replace(limits, min_coverage=wanted.min_coverage)
    goal = Path(output) if output is not None else Path(f"{path.stem}-{device.name}")
    sha256 = source_sha256(path)

    def build(folder: Path) -> Report:
        artifact = toolchain.package(compiled, device, folder, also)
        assessment = assess(original, artifact, executors, samples, context, metrics, repeatable=not result.unverified)
        report = summarize(
            name=path.name,
            sha256=sha256,
            source_bytes=sum(file.stat().st_size for file in source_files(path)),
            artifact=artifact,
            package=goal.name,
            target=device,
            toolchain=toolchain,
            precision=chosen,
            original=original,
            compiled=compiled,
            context=context,
            result=result,
            assessment=assessment,
            gates=limits,
            sample=samples[0],
            demanded=demanded,
            also=also,
        )
        locked = lock(wanted, passes, device, str(chosen), {"model": path.name, "model_sha256": sha256})
        files = {
            "report.json": report.to_json(),
            "report.html": render_html(report),
            "remarks.jsonl": write_remarks(context.remarks),
            "recipe.lock.toml": locked,
        }
        ran = "; ".join(execution.executor for execution in report.executions) or "nothing: it does not run here"
        served = tuple(each.name for each in also)
        provenance = Provenance(
            path.name, sha256, device.name, device.packager, str(chosen), digest(locked), ran, served
        )
        seal_package(folder, artifact, files, provenance)
        return report

    return write_package(goal, build, overwrite=overwrite)
