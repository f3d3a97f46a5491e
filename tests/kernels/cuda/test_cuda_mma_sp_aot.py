"""What Triton and ptxas make of the mma.sp kernel, for each architecture it is meant for."""

import re

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from aot import SHARED_MEMORY, compile_for

from amber_compile.kernels.cuda import mma_sp
from amber_compile.kernels.cuda.mma_sp_layout import CONFIGURATIONS, choose

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_120")
KINDS = {"bf16": "HMMA.SP.16832.F32.BF16", "fp16": "HMMA.SP.16832.F32", "int8": "IMMA.SP.16864"}
POINTERS = {torch.bfloat16: "*bf16:16", torch.float16: "*fp16:16", torch.float32: "*fp32:16"}
LARGEST, *_, SMALLEST = CONFIGURATIONS


def compiled(target, kind, tile, dtype=torch.bfloat16, followed=True):
    """Compile as ``launch`` does; with scales and a bias if sums are ``followed`` by them."""
    types = dict.fromkeys(["values_ptr", "weight_ptr", "metadata_ptr"], "*i32:16")
    types |= {"y_ptr": POINTERS[dtype], "tokens": "i32", "octets": "i32", "blocks": "i32"}
    constants = mma_sp.constants(tile, kind, dtype)
    epilogue = dict.fromkeys(["bias_ptr", "row_scale_ptr", "col_scale_ptr"], "*fp32:16")
    if followed:
        types |= epilogue
    else:
        constants |= dict.fromkeys(epilogue)
    kernel = mma_sp.mma_sp_kernel
    return compile_for(target, kernel, types, constants, **mma_sp.options(tile))


def check(program, kind, tile):
    """Assert what must hold of every compilation."""
    rows, columns = tile.rows // 16 // tile.warps_m, tile.columns // 8 // tile.warps_n
    instructions = tile.words // 8  # per stage and accumulator tile
    assert program.count(KINDS[kind]) == rows * columns * instructions
    assert program.count(KINDS[kind]) == program.count("HMMA") + program.count("IMMA"), "dense"
    assert program.spills == program.spilled_bytes == 0
    assert program.registers <= 255
    assert not program.warnings
    # fragments and metadata come by ldmatrix, and no thread needs what another one has loaded
    loop = program.ptx[program.ptx.index("cp.async.wait_group") : program.ptx.rindex("mma.sp")]
    assert program.count("LDSM") >= (rows + columns) * instructions
    assert "ld.shared" not in loop
    assert loop.count("bar.sync") <= 2, "one is ours; Triton 3.6 adds one after the copies"
    assert program.count("SHFL") == 0
    # 16 bytes a thread from and to global memory
    assert set(re.findall(r"cp\.async\.\S+ .*?\], (0x\w+)", program.ptx)) == {"0x10"}
    assert program.wide_stores == program.count("STG") > 0
    # the epilogue reuses the memory of the stages
    assert program.shared == tile.shared_memory(kind) <= SHARED_MEMORY[program.target]


@pytest.mark.parametrize(
    ("target", "kind"),
    [(target, kind) for target in TARGETS for kind in KINDS if target == "sm_80" or kind != "fp16"],
)
def test_what_large_products_use(target, kind):
    tile = choose(kind, 8192, 4096, SHARED_MEMORY[target])
    assert (tile.rows, tile.columns) == (128, 128)
    check(compiled(target, kind, tile), kind, tile)


@pytest.mark.parametrize("tile", CONFIGURATIONS[2:], ids=lambda t: f"{t.rows}x{t.columns}")
@pytest.mark.parametrize(("target", "kind"), [("sm_80", "bf16"), ("sm_120", "int8")])
def test_smaller_tiles(target, kind, tile):
    check(compiled(target, kind, tile), kind, tile)


@pytest.mark.parametrize("dtype", POINTERS, ids=str)
def test_every_result_type_alone(dtype):
    program = compiled("sm_86", "fp16", SMALLEST, dtype, followed=False)
    check(program, "fp16", SMALLEST)
    assert program.count("LDG") == 0, "all operands come by cp.async"


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_hopper_runs_it_too(kind):
    check(compiled("sm_90", kind, LARGEST), kind, LARGEST)


def test_results_are_rounded_one_by_one():
    assert compiled("sm_80", "int8", SMALLEST).count("FFMA") == 0


def test_sizes_are_not_specialised():
    """One compilation serves all sizes: Triton would make others for 1 and multiples of 16."""
    specialised = [p.name for p in mma_sp.mma_sp_kernel.params if not p.do_not_specialize]
    assert not {"tokens", "octets", "blocks"} & {*specialised}
