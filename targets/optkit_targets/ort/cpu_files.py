"""The files of ``/proc`` and ``/sys`` that describe a CPU, for software that reads them under user-mode emulation.

onnxruntime chooses its kernels by the core's part number and features, which it reads there; without them it sees those
of the machine that emulates.
"""

from __future__ import annotations

from pathlib import Path

from optkit.errors import InputError, did_you_mean
from optkit.target import Target

V8_0 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
V8_2 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp ssbs"

# Primary part number (MIDR_EL1[15:4], the cores' Technical Reference Manuals) and features by qemu's name of the CPU.
CPUS = {
    "cortex-a35": ("0xd04", V8_0),
    "cortex-a53": ("0xd03", V8_0),
    "cortex-a55": ("0xd05", V8_2),
    "cortex-a57": ("0xd07", V8_0),
    "cortex-a72": ("0xd08", V8_0),
    "cortex-a76": ("0xd0b", V8_2),
    "neoverse-n1": ("0xd0c", V8_2),
}
DEFAULT_L1_BYTES, DEFAULT_L2_BYTES = 32 << 10, 512 << 10


def part_and_features(target: Target) -> tuple[str, str]:
    """Return the part number and the features of the target's core; ``executor.part`` and ``.features`` come first.

    Raises:
        InputError: The core is not known and the target does not say.
    """
    cpu, table = str(target.executor["cpu"]), target.executor
    part, features = CPUS.get(cpu, (table.get("part"), table.get("features")))
    part, features = table.get("part", part), table.get("features", features)
    if part is None or features is None:
        raise InputError(
            f"the part number and features of the CPU '{cpu}' are not known",
            where=f"target '{target.name}'",
            hint=f"set executor.part and executor.features as in /proc/cpuinfo, or {did_you_mean(cpu, CPUS)}",
        )
    return str(part), str(features)


def write_cpu_files(target: Target, root: Path) -> None:
    """Write ``proc/cpuinfo`` and ``sys/devices/system/cpu`` of the target below ``root``."""
    part, features = part_and_features(target)
    cores = int(target.cores.value)
    every = f"0-{cores - 1}" if cores > 1 else "0"
    files = {"proc/cpuinfo": "".join(_cpuinfo(core, part, features) for core in range(cores))}
    cpu = "sys/devices/system/cpu"
    files |= {f"{cpu}/{name}": every for name in ("possible", "present", "online")}
    files[f"{cpu}/kernel_max"] = str(cores - 1)
    kilohertz = int(target.clock_hz.value / 1e3)
    for core in range(cores):
        own = f"{cpu}/cpu{core}"
        lists = ("core_siblings_list", "cluster_cpus_list", "package_cpus_list")
        files |= {f"{own}/topology/{name}": every for name in lists}
        files |= {f"{own}/topology/core_siblings": f"{(1 << cores) - 1:x}", f"{own}/topology/core_id": str(core)}
        files |= {f"{own}/topology/physical_package_id": "0"}
        files |= {f"{own}/cpufreq/cpuinfo_{end}_freq": str(kilohertz) for end in ("min", "max")}
        for index, (level, size, shared) in enumerate(_caches(target, core, every)):
            kind = {"level": str(level), "size": f"{size >> 10}K", "shared_cpu_list": shared}
            files |= {f"{own}/cache/index{2 * index}/{name}": text for name, text in kind.items()}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if text.endswith("\n") else text + "\n", encoding="ascii")


def _cpuinfo(core: int, part: str, features: str) -> str:
    return (
        f"processor\t: {core}\nBogoMIPS\t: 100.00\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 4\n\n"
    )


def _caches(target: Target, core: int, every: str) -> list[tuple[int, int, str]]:
    """Return (level, bytes, cores that share it) of the data caches."""
    found = []
    for level, default, shared in ((1, DEFAULT_L1_BYTES, str(core)), (2, DEFAULT_L2_BYTES, every)):
        memory = target.memory.get(f"l{level}")
        size = memory.bytes.value if memory is not None and memory.bytes is not None else default
        found.append((level, int(size), shared))
    return found
