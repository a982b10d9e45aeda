"""optkit beside other quantizers: size, accuracy, error, time and memory on the same models and the same samples.

    python benchmarks/quantization.py SHARED [--tasks w8a8] [--models NAME ...] [--peers NAME ...] [--quick]
    python benchmarks/quantization.py SHARED --install-peers
    python benchmarks/quantization.py --large

SHARED is the folder that holds data/. Every tool runs as a process of its own, one after the other, and reads the same
calibration samples from disk; peers run in environments of their own, which --install-peers creates. optkit's time
includes the verification of every pass and the run of the finished package.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from comparison.large import time_large
from comparison.methods import CACHE, METHODS, OURS, REQUIREMENTS, TASKS, Method, install, missing
from comparison.models import SUBJECTS, Prepared, prepare, raised
from comparison.processes import measure
from comparison.scoring import score
from comparison.tables import HEADER, LEGEND, Result, heading, markdown_table, row, summarize, text_table


def main() -> None:
    """Run what the command line asks for, and print it."""
    arguments = parse()
    if arguments.large:
        time_large(arguments.timeout)
        return
    if arguments.shared is None:
        sys.exit("give the folder that holds data/")
    if arguments.install_peers:
        install(arguments.peers, arguments.environments)
    absent = missing(arguments.peers, arguments.environments)
    if absent:
        print(f"not installed, left out (--install-peers installs them): {', '.join(absent)}", file=sys.stderr)
    tools = {OURS, *arguments.peers} - set(absent)
    results: list[Result] = []
    sections: list[str] = []
    table = markdown_table if arguments.markdown else text_table
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "calibration").mkdir()
            subject = prepare(name, arguments.shared.resolve(), Path(folder) / "calibration", quick=arguments.quick)
            for task in arguments.tasks:
                methods = [m for m in METHODS if m.task == task and m.tool in tools]
                found = [attempt(m, subject, Path(folder), arguments) for m in methods]
                results += found
                text = table([HEADER, *(row(result, subject) for result in found)])
                sections.append(f"{'### ' if arguments.markdown else ''}{heading(subject, task, found)}\n\n{text}\n")
                if not arguments.json:
                    print(sections[-1], flush=True)
    summary = summarize(results)
    if arguments.json:
        print(json.dumps([result.to_dict() for result in results], indent=1, default=str))
    elif len(summary) > 1:
        print("optkit minus the best peer whose file is no larger; time over that of the fastest peer\n")
        print(table(summary), "\n")
        print(LEGEND if not arguments.markdown else f"```\n{LEGEND}\n```")


def attempt(method: Method, subject: Prepared, folder: Path, arguments: argparse.Namespace) -> Result:
    """Quantize by one method, once more with a newer opset where that failed, and score what came of it."""
    print(f"{subject.name}: {method.task}, {method.tool}, {method.name}", file=sys.stderr, flush=True)
    first: Result | None = None
    for model, newer in candidates(method, subject, folder):
        work = folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        (work / "output").mkdir(parents=True)
        command = method.command(model, subject.calibration, work / "output", arguments.environments)
        cost = measure(command, folder=work, timeout=arguments.timeout)
        result = Result(subject.name, method, cost, None, newer)
        if not cost.error:
            result = scored(result, subject, method.result(work / "output"))
        if result.score is not None:
            return result
        first = first or result
    assert first is not None
    return first


def candidates(method: Method, subject: Prepared, folder: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the model as it is, and in a newer opset for peers that refuse it."""
    yield subject.path, False
    if method.tool != OURS:
        try:
            yield raised(subject.path, method.opset, folder), True
        except Exception as error:  # the converter has gaps of its own: the first failure is what is told
            print(f"  no opset {method.opset}: {str(error).splitlines()[0][:120]}", file=sys.stderr)


def scored(result: Result, subject: Prepared, file: Path | None) -> Result:
    """Return the result with its score, or with the sentence that says why there is none."""
    cost = result.cost
    try:
        if file is None:
            raise RuntimeError("no ONNX file was written")
        return replace(result, score=score(file, subject))
    except Exception as error:  # whatever a peer wrote may not load, run, or have the model's outputs
        sentence = f"its file is unusable: {' '.join(str(error).split())[:160]}"
        return replace(result, cost=replace(cost, error=sentence))


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path, nargs="?", help="the folder that holds data/")
    choose(parser, "--models", list(SUBJECTS))
    choose(parser, "--tasks", list(TASKS))
    choose(parser, "--peers", list(REQUIREMENTS))
    parser.add_argument("--environments", type=Path, default=CACHE, help="where the peers' environments are")
    parser.add_argument("--install-peers", action="store_true", help="create them first; downloads a few hundred MB")
    parser.add_argument("--quick", action="store_true", help="few samples")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one tool on one model")
    parser.add_argument("--json", action="store_true", help="everything as data, on stdout")
    parser.add_argument("--large", action="store_true", help="instead: our int4 on 100 million random parameters")
    parser.add_argument("--markdown", action="store_true", help="tables as Markdown")
    return parser.parse_args()


def choose(parser: argparse.ArgumentParser, option: str, known: Sequence[str]) -> None:
    """Add an option that takes some of the known names; all of them by default."""
    parser.add_argument(option, nargs="*", choices=known, default=known, metavar="NAME", help=", ".join(known))


if __name__ == "__main__":
    main()
