"""The same context binary for the same model: what Qualcomm's compiler leaves uninitialized is cleared.

For Hexagon V79 and later, QNN 2.51 writes structures of its stack into the binary with their padding: addresses and
the process's stack guard, other ones in every run (81 words of 8 bytes in a decoder of 1 M weights). Two processes
compile the model, and the aligned words in which their binaries differ are set to 0. That a word of padding is the same
in both by chance has a probability of 2^-28 or less: addresses are random in 28 bits, the guard in 56.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from optkit.session import CannotRunError


def settle(binary: Path, twin: Path) -> int:
    """Clear the words of a binary in which it differs from one that another process made of the same; return how many.

    Raises:
        CannotRunError: They are of different sizes: the compiler did other work.
    """
    ours, theirs = (np.frombuffer(path.read_bytes(), np.uint8) for path in (binary, twin))
    if ours.size != theirs.size:
        raise CannotRunError(f"the compiler made {ours.size} bytes of the model, and {theirs.size} when asked again")
    different = np.flatnonzero(ours != theirs)
    if not different.size:
        return 0
    words = np.unique(different // 8)
    settled = ours.copy()
    for word in words:
        settled[word * 8 : word * 8 + 8] = 0
    binary.write_bytes(settled.tobytes())
    return len(words)
