"""Ahead-of-time compilation for GPUs that are not there, and what their machine code shows."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(nvidia.__file__).parent / "bin"
CACHE = Path(__file__).resolve().parents[2] / "build" / "triton"


@dataclass(frozen=True)
class Const:
    """A compile-time constant; any other argument is named by its type, like ``*bf16``."""

    value: Any


@dataclass(frozen=True)
class Code:
    """Resources of a compiled kernel.

    Attributes:
        registers: per thread.
        spills: instructions that load or store local memory (SASS LDL, STL).
        shared: bytes of shared memory.
        sass: the disassembly.
    """

    registers: int
    spills: int
    shared: int
    sass: str

    def count(self, instruction: str) -> int:
        """How often an instruction occurs, by a regular expression for the start of its name."""
        return len(re.findall(rf"\b{instruction}", self.sass))


def compile_kernel(
    kernel: Any, arguments: Mapping[str, str | Const], capability: int, **options: Any
) -> Code:
    """Compile a ``triton.jit`` function as a launch with these arguments would.

    Pointers and integers ending in ``:16`` count as divisible by 16, as Triton specialises them.
    """
    signature: dict[str, Any] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, name in enumerate(kernel.arg_names):
        argument = arguments[name]
        if isinstance(argument, Const):
            signature[name] = "constexpr"
            constants[(i,)] = argument.value
            continue
        if isinstance(argument, tuple):
            signature[name] = argument
            continue
        signature[name] = argument.removesuffix(":16")
        if argument.startswith("*") or argument.endswith(":16"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options["enable_fp_fusion"] = True
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(CACHE)
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = _tool("nvdisasm", "-c", "-ndf", file.name)  # the data flow is nobody's concern
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return Code(int(registers[1]), spills, compiled.metadata.shared, sass)


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA tools that come with Triton."""
    command = [os.fspath(TOOLS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
