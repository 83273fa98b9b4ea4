"""The kernels of other processors, compiled across and run in an emulator where both are installed."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc"
CROSS, QEMU = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
FLAGS = (
    "-std=c++20",
    "-O2",
    "-fopenmp",
    "-static",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror",
)
"""As in CMakeLists.txt, but -O1, and no warnings."""
CLOSE = 1e-6
"""Of the largest result: both add 512 products in float32, plain weights in another order."""
PROGRAMS = ("cross", "cross_train")
FORMATS = 8
STEPS, ROUNDED = 16, 2.0**-8
"""What cross_train.cpp prints for each way of storing numbers; where it is bfloat16, one place of eight bits at a border."""


def build(folder: Path, compiler: str, sources: dict[str, list[str]], *flags: str) -> Path:
    """The library with cross.cpp, and with cross_train.cpp, in a folder; `sources` are what is compiled with flags of its own."""
    objects = []
    for name in ("library", "pack", "scratch", "values", "isa_scalar", *sources, *PROGRAMS):
        source = (HERE if name in PROGRAMS else SOURCES) / f"{name}.cpp"
        objects.append(str(folder / f"{name}.o"))
        arguments = [*FLAGS, *flags, *sources.get(name, []), f"-I{SOURCES}", "-c", str(source), "-o", objects[-1]]
        subprocess.run([compiler, *arguments], check=True)
    shared = objects[: -len(PROGRAMS)]
    for name in PROGRAMS:
        linked = [*shared, str(folder / f"{name}.o"), "-o", str(folder / name)]
        subprocess.run([compiler, *FLAGS, *flags, *linked], check=True)
    return folder


def said(*command: str) -> list[list[str]]:
    """The words of each line."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [line.split() for line in ran.stdout.splitlines()]


def differences(
    folder: Path, *names: str, emulator: tuple[str, ...] = ()
) -> tuple[list[float], dict[str, list[float]]]:
    """The largest of each format, and of each step of training by how numbers are stored."""
    products = [float(words[1]) for words in said(*emulator, str(folder / "cross"), *names)]
    assert len(products) == FORMATS
    steps: dict[str, list[float]] = {"float32": [], "bfloat16": []}
    for _, kind, worst in said(*emulator, str(folder / "cross_train"), *names):
        steps[kind].append(float(worst))
    assert [len(found) for found in steps.values()] == [STEPS, STEPS]
    return products, steps


@pytest.mark.slow
@pytest.mark.skipif(CROSS is None, reason="no aarch64-linux-gnu-g++")
def test_neon_multiplies_and_trains_as_the_plain_code_does(tmp_path: Path) -> None:
    assert CROSS is not None
    build(tmp_path, CROSS, {"isa_neon": ["-march=armv8.2-a+dotprod"]}, "-static")
    if QEMU is None:
        pytest.skip("compiled; no qemu-aarch64 to run it")
    products, steps = differences(tmp_path, "neon", "scalar", emulator=(QEMU,))
    assert max(products) <= CLOSE
    assert max(steps["float32"]) <= CLOSE
    assert max(steps["bfloat16"]) <= ROUNDED


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="no g++ for x86-64")
def test_tiles_give_the_bits_of_vectors(tmp_path: Path) -> None:
    """What surrounds AMX's tiles (unpacking, offsets, scales), with the tiles themselves emulated; the real ones compile."""
    vectors = ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    real = subprocess.run(
        [
            "g++",
            *FLAGS,
            *vectors,
            "-mamx-tile",
            "-mamx-int8",
            "-c",
            str(SOURCES / "isa_amx.cpp"),
            "-o",
            str(tmp_path / "real.o"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unrecognized command-line option" in real.stderr:
        pytest.skip("this g++ does not know AMX")
    assert real.returncode == 0, real.stderr
    sources = {
        "isa_avx2": ["-mavx2", "-mfma", "-mf16c"],
        "isa_avx512": vectors,
        "isa_avx512bf16": vectors,
        "isa_amx": vectors,
    }
    build(tmp_path, "g++", sources, "-DHERD_AMX", "-DHERD_TILES_EMULATED")
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("compiled; this processor cannot run it")
    products, steps = differences(tmp_path, "amx", "avx512bf16")
    assert products == [0.0] * FORMATS
    assert max(max(found) for found in steps.values()) == 0, "training has no tiles of its own"
