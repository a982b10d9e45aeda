"""Fail when a Python file grows past what one sitting can read, or the whole past its budget."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_THE_PRODUCT = 46_000  # optkit, passes and targets together; raise it in a commit that says why
PRODUCT = ("optkit/", "passes/", "targets/")

tracked = subprocess.run(["git", "ls-files", "*.py"], check=True, capture_output=True, text=True).stdout.split()
lines = {name: len(Path(name).read_text(encoding="utf-8").splitlines()) for name in tracked}
total = sum(count for name, count in lines.items() if name.startswith(PRODUCT))
long = [
    f"{name}: {count} lines, the most is {MOST_LINES_OF_A_FILE}"
    for name, count in lines.items()
    if count > MOST_LINES_OF_A_FILE
]
if total > MOST_LINES_OF_THE_PRODUCT:
    long.append(f"the product has {total} lines, the most is {MOST_LINES_OF_THE_PRODUCT}")
print(f"{total} lines in {', '.join(PRODUCT)}; the longest file has {max(lines.values(), default=0)}")
sys.exit("\n".join(long) if long else 0)
