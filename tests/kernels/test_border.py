"""Finding and choosing the native library, and what is said where there is none; that it can be built for other processors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from herd.kernels import border, native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc"

needs_library = pytest.mark.skipif(native.isa() is None, reason=native.missing() or "")


def asked(isa: str) -> list[str]:
    """What a fresh process with HERD_ISA=`isa` says: the instruction set, and why there is none."""
    code = "from herd.kernels.border import loaded; print(*loaded()[1:], sep=chr(10))"
    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HERD_ISA": isa}, text=True, capture_output=True, check=True
    )
    return run.stdout.splitlines()


@needs_library
def test_the_environment_chooses() -> None:
    assert asked("scalar") == ["scalar", "None"]
    assert asked("none") == ["None", "HERD_ISA=none switches the native kernels off"]
    isa, why = asked("mmx")
    assert isa == "None"
    assert why.startswith("HERD_ISA=mmx: ")
    assert "scalar" in why


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process that has not looked for the library yet; what the test finds is forgotten after it."""
    monkeypatch.setattr(border, "loaded", border.cache(border.loaded.__wrapped__))
    return monkeypatch


def test_no_library(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(border.herd.kernels, "__path__", [str(tmp_path)])
    library, isa, why = border.loaded()
    assert library is None
    assert isa is None
    assert "C++20 compiler" in (why or "")


def test_a_file_that_is_no_library(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("libherd.so", "libherd.dylib", "libherd.dll"):
        (tmp_path / name).write_bytes(b"\x7fELF and nothing more")
    fresh.setattr(border.herd.kernels, "__path__", [str(tmp_path)])
    assert (border.loaded()[2] or "").startswith("the native kernels cannot be loaded: ")


@needs_library
def test_a_library_of_other_sources(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(border, "VERSION", border.VERSION + 1)
    assert "other sources" in (border.loaded()[2] or "")


def test_versions_agree() -> None:
    assert f"constexpr int VERSION = {border.VERSION};" in (SOURCES / "abi.h").read_text()


@needs_library
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("nm"), reason="g++ or nm is not installed")
@pytest.mark.skipif(not (SOURCES / "isa_avx512.cpp").exists(), reason="the sources are not here")
def test_nothing_compiled_for_a_newer_processor_can_be_linked_for_an_older_one(tmp_path: Path) -> None:
    out = tmp_path / "scalar.o"
    flags = ["-O2", "-std=c++20", "-fPIC", "-fopenmp"]
    subprocess.run(["g++", *flags, "-c", str(SOURCES / "isa_scalar.cpp"), "-o", str(out)], check=True)
    names = subprocess.run(["nm", "-C", str(out)], text=True, capture_output=True, check=True).stdout.splitlines()
    shared = [line for line in names if line[17:18] in "WVu" and "herd::scalar::" not in line and "DW.ref" not in line]
    # The vectors' own header is not shared with the other paths, so only what comes from elsewhere counts.
    assert shared == []


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="no compiler for ARM")
@pytest.mark.parametrize("source", ["isa_neon", "isa_scalar", "library", "pack", "scratch"])
def test_compiles_for_arm(tmp_path: Path, source: str) -> None:
    flags = ["-O2", "-std=c++20", "-fPIC", "-fopenmp", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    if source == "isa_neon":
        flags.append("-march=armv8.2-a+dotprod")
    subprocess.run(
        ["aarch64-linux-gnu-g++", *flags, "-c", str(SOURCES / f"{source}.cpp"), "-o", str(tmp_path / "x.o")], check=True
    )
