"""The kernels that measure instruction rates: counted operations, and what they compile to."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import gpu_rates
import pytest


def test_the_operations_of_an_instruction():
    dense, sparse = (gpu_rates.Instruction("wgmma", "bf16", sparse) for sparse in (False, True))
    assert sparse.operations(132) == 2 * dense.operations(132)
    assert dense.operations(1) == 2 * 2 * 4 * 4000 * 64 * 256 * 16
    assert [it.name for it in gpu_rates.INSTRUCTIONS][:2] == ["wgmma_bf16", "wgmma_sp_bf16"]


def tool(name: str) -> str:
    """Return a tool of the CUDA toolkit, or of Triton."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin or "").parent / "backends/nvidia/bin" if triton else Path()
    path = f"{bundled}:/usr/local/cuda/bin"
    found = shutil.which(name) or shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


@pytest.mark.parametrize(
    ("instruction", "opcode"),
    [
        (("wgmma", "bf16", True), "HGMMA.SP.64x256x32.F32.BF16"),
        (("wgmma", "int8", True), "IGMMA.SP.64x256x64.S8.S8"),
        (("wgmma", "fp8", True), "QGMMA.SP.64x256x64.F32.E4M3.E4M3"),
        (("wgmma", "bf16", False), "HGMMA.64x256x16.F32.BF16"),
        (("mma", "bf16", True), "HMMA.SP.16832.F32.BF16"),
        (("mma", "int8", True), "IMMA.SP.16864.S8.S8"),
    ],
)
def test_the_loop_of_a_rate_kernel_holds_its_instruction(tmp_path, instruction, opcode):
    it = gpu_rates.Instruction(*instruction)
    source, binary = tmp_path / "kernel.cu", tmp_path / "kernel.cubin"
    source.write_text(it.source())
    target = ["-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v"]
    compiled = subprocess.run(
        [tool("nvcc"), *target, str(source), "-o", str(binary)], capture_output=True, text=True
    )
    assert compiled.returncode == 0, compiled.stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in compiled.stderr
    assert "warning" not in compiled.stderr
    listing = subprocess.run(
        [tool("cuobjdump"), "-sass", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    lines = [line for line in listing.splitlines() if ";" in line]
    places = [i for i, line in enumerate(lines) if f" {opcode} " in line]
    each = gpu_rates.WGMMA_UNROLL if it.family == "wgmma" else gpu_rates.MMA_CHAINS
    assert len(places) >= each
    jumps = [i for i, line in enumerate(lines) if "BRA" in line and i > places[each - 1]]
    assert jumps, "the loop does not go back"
