"""The same context binary for the same model: what Qualcomm's compiler leaves uninitialized is cleared.

For Hexagon V79 and later, QNN 2.51 writes structures of its stack into the binary with their padding: addresses and
the process's stack guard, other ones in every run (81 words of 8 bytes in a decoder of 1 M weights). Two processes
compile the model; where their binaries differ a third one does, and the aligned words on which no two agree are set to
0. That padding is the same by chance has a probability of 2^-28 or less: addresses are random in 28 bits, the guard in
56. On a loaded machine a few words of other memory were seen to differ once in ten runs: there the two that agree win.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from optkit.session import CannotRunError

WORD = 8  # bytes


def settle(binary: Path, second: Path, third: Path) -> int:
    """Make a binary what two of three processes agree on, word by word; return how many words none agree on.

    Those are cleared. A word that one process wrote otherwise, of memory that another thread was not done with, is what
    the two others wrote.

    Raises:
        CannotRunError: They are of different sizes: the compiler did other work.
    """
    contents = [path.read_bytes() for path in (binary, second, third)]
    sizes = {len(content) for content in contents}
    if len(sizes) > 1:
        raise CannotRunError(
            f"the compiler made binaries of {' and '.join(map(str, sorted(sizes)))} bytes of one model"
        )
    a, b, c = (np.frombuffer(content + bytes(-len(content) % WORD), np.uint64) for content in contents)
    agreed = np.where((a == b) | (a == c), a, np.where(b == c, b, 0))
    binary.write_bytes(agreed.astype(np.uint64).tobytes()[: len(contents[0])])
    return int(((a != b) & (a != c) & (b != c)).sum())
