"""How fast are the matrix instructions themselves?  Dense and sparse, from registers or shared
memory, with nothing else in the loop.

The kernels are CUDA C++, compiled by NVRTC through PyTorch. Every multiprocessor gets one block,
the operands are pseudo-random (a constant operand draws less power and so runs faster), and the
rate of a sparse instruction counts the zeros it skips: "dense-equivalent".

    mma.sync       16 warps, 8 independent accumulators each, operands in registers
    wgmma          two warpgroups, m64n256, both operands in shared memory, 4 instructions a wait

The ratio sparse : dense of one row bounds what any 2:4 kernel of that instruction can gain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timing import Clock, Time, in_turns, reason
from torch.utils import cpp_extension
from tqdm import tqdm

ARCHITECTURE = "90a"
MMA_WARPS, MMA_CHAINS, MMA_LOOPS = 16, 8, 20_000
WGMMA_GROUPS, WGMMA_LOOPS, WGMMA_UNROLL = 2, 4_000, 4
SHARED_BYTES = 64 * 1024
METADATA = "  unsigned metadata = 0x44444444u;"  # keep channels 0 and 1 of every group

# Pseudo-random operand bits: (bits kept, bits set). Finite for every kind, signs included.
BITS = {
    "bf16": ("0x807f807fu", "0x3f803f80u"),
    "fp16": ("0x83ff83ffu", "0x3c003c00u"),
    "int8": ("0xffffffffu", "0u"),
    "fp8": ("0xbfbfbfbfu", "0u"),
}
TYPES = {
    "bf16": ("f32", "bf16.bf16"),
    "fp16": ("f32", "f16.f16"),
    "int8": ("s32", "s8.s8"),
    "fp8": ("f32", "e4m3.e4m3"),
}
DEPTH = {"bf16": 16, "fp16": 16, "int8": 32, "fp8": 32}  # K of one dense instruction


@dataclass(frozen=True)
class Instruction:
    """One matrix instruction: ``mma`` or ``wgmma``, a kind of operand, dense or 2:4."""

    family: str
    kind: str
    sparse: bool

    @property
    def name(self) -> str:
        """The name of its kernel, which is also how reports name it."""
        return f"{self.family}{'_sp' if self.sparse else ''}_{self.kind}"

    @property
    def accumulator(self) -> str:
        return "int" if self.kind == "int8" else "float"

    @property
    def depth(self) -> int:
        """K of one instruction, zeros counted."""
        return DEPTH[self.kind] * (2 if self.sparse else 1)

    def operations(self, multiprocessors: int) -> int:
        """Return the dense-equivalent operations of one launch."""
        if self.family == "mma":
            count, product = MMA_WARPS * MMA_CHAINS * MMA_LOOPS, 16 * 8
        else:
            count, product = WGMMA_GROUPS * WGMMA_UNROLL * WGMMA_LOOPS, 64 * 256
        return 2 * multiprocessors * count * product * self.depth

    def source(self) -> str:
        """Return its kernel."""
        return _mma_source(self) if self.family == "mma" else _wgmma_source(self)


INSTRUCTIONS = tuple(
    Instruction(family, kind, sparse)
    for family, kinds in (("wgmma", ("bf16", "int8", "fp8")), ("mma", ("bf16", "fp16", "int8")))
    for kind in kinds
    for sparse in (False, True)
)

# ---- sources -------------------------------------------------------------------------------------

HASH = """
__device__ unsigned bits(unsigned seed) {
  seed ^= seed >> 16; seed *= 0x7feb352du; seed ^= seed >> 15; seed *= 0x846ca68bu;
  return ((seed ^ seed >> 16) & %s) | %s;
}
"""


def _registers(first: int, count: int) -> str:
    return "{" + ",".join(f"%{first + i}" for i in range(count)) + "}"


def _mma_source(it: Instruction) -> str:
    """Write a kernel of ``MMA_CHAINS`` independent chains of products from registers."""
    result, operands = TYPES[it.kind]
    words = 4 if it.sparse else 2  # of B
    opcode = (
        f"mma{'.sp::ordered_metadata' if it.sparse else ''}.sync.aligned."
        f"m16n8k{it.depth}.row.col.{result}.{operands}.{result}"
    )
    places = f"{_registers(0, 4)},{_registers(4, 4)},{_registers(8, words)},{_registers(0, 4)}"
    inputs = [f'"r"(a[{i}])' for i in range(4)] + [f'"r"(b[{i}])' for i in range(words)]
    if it.sparse:
        places += f",%{8 + words},0x0"
        inputs.append('"r"(metadata)')
    letter = "r" if it.kind == "int8" else "f"
    metadata = METADATA if it.sparse else ""
    chains = "\n".join(
        f'    asm volatile("{opcode} {places};" : '
        + ",".join(f'"+{letter}"(d[{chain}][{i}])' for i in range(4))
        + f" : {','.join(inputs)});"
        for chain in range(MMA_CHAINS)
    )
    return f"""{HASH % BITS[it.kind]}
extern "C" __global__ void {it.name}({it.accumulator}* out, int loops) {{
  {it.accumulator} d[{MMA_CHAINS}][4] = {{}}, sum = 0;
  unsigned a[4], b[4];{metadata}
  for (int i = 0; i < 4; i++) {{
    a[i] = bits(8 * threadIdx.x + i); b[i] = bits(8 * threadIdx.x + 4 + i);
  }}
  for (int loop = 0; loop < loops; loop++) {{
{chains}
  }}
  for (int j = 0; j < {MMA_CHAINS}; j++) for (int i = 0; i < 4; i++) sum += d[j][i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}}
"""


def _wgmma_source(it: Instruction) -> str:
    """Write a kernel of two warpgroups that multiply m64n256 tiles of shared memory.

    A descriptor is address / 16, a row group of 1,024 bytes, and 128-byte swizzling.
    """
    result, operands = TYPES[it.kind]
    opcode = (
        f"wgmma.mma_async{'.sp' if it.sparse else ''}.sync.aligned."
        f"m64n256k{it.depth}.{result}.{operands}"
    )
    tail = {"bf16": ",1,1,0,0", "fp16": ",1,1,0,0", "int8": "", "fp8": ",1,1"}[it.kind]
    letter = "r" if it.kind == "int8" else "f"
    metadata = METADATA if it.sparse else ""
    outputs = ",".join(f'"+{letter}"(d[{i}])' for i in range(128))
    places = "%128,%129,%130,0,1" if it.sparse else "%128,%129,1"
    inputs = '"l"(a), "l"(b)' + (', "r"(metadata)' if it.sparse else "")
    one = (
        f'    asm volatile("{opcode} {_registers(0, 128)},{places}{tail};" : {outputs} : {inputs});'
    )
    many = "\n".join([one] * WGMMA_UNROLL)
    return f"""{HASH % BITS[it.kind]}
__device__ unsigned long long descriptor(unsigned address) {{
  return (address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}}
extern "C" __global__ void __launch_bounds__({128 * WGMMA_GROUPS}, 1)
{it.name}({it.accumulator}* out, int loops) {{
  extern __shared__ __align__(1024) unsigned shared[];
  for (int i = threadIdx.x; i < {SHARED_BYTES // 4}; i += blockDim.x) shared[i] = bits(i);
  __syncthreads();
  asm volatile("fence.proxy.async;");
  unsigned base = ((unsigned)__cvta_generic_to_shared(shared) + 1023) & ~1023u;
{metadata}
  unsigned long long a = descriptor(base + (threadIdx.x >> 7) * 8192), b = descriptor(base + 16384);
  {it.accumulator} d[128] = {{}}, sum = 0;
  for (int loop = 0; loop < loops; loop++) {{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
{many}
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }}
  for (int i = 0; i < 128; i++) sum += d[i];
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}}
"""


# ---- measurement ---------------------------------------------------------------------------------


def launcher(it: Instruction, out: torch.Tensor, multiprocessors: int) -> Callable[[], None]:
    """Compile the kernel of ``it`` and return its launch."""
    cpp_extension.CUDA_HOME = (
        cpp_extension.CUDA_HOME or ""
    )  # no header is included, so none is missed
    kernel: Any = torch.cuda._compile_kernel(it.source(), it.name, compute_capability=ARCHITECTURE)
    if it.family == "mma":
        threads, loops, shared = 32 * MMA_WARPS, MMA_LOOPS, 0
    else:
        threads, loops, shared = 128 * WGMMA_GROUPS, WGMMA_LOOPS, SHARED_BYTES
        kernel.set_shared_memory_config(shared)

    def launch() -> None:
        kernel((multiprocessors, 1, 1), (threads, 1, 1), [out, loops], shared_mem=shared)

    return launch


def rates(clock: Clock, device: torch.device) -> Iterator[dict[str, object]]:
    """Yield one row per instruction: dense-equivalent T(FL)OP/s."""
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    out = torch.empty(1024 * multiprocessors, device=device)
    for it in tqdm(INSTRUCTIONS, desc="instruction rates", leave=False):
        row: dict[str, object] = {"family": it.family, "kind": it.kind, "sparse": it.sparse}
        try:
            launch = launcher(it, out, multiprocessors)
            found = in_turns(clock, {it.name: [launch]}, rounds=5)[it.name]
        except Exception as error:
            found = reason(error)
        yield row | rate(it, found, multiprocessors)


def rate(it: Instruction, found: Time | str, multiprocessors: int) -> dict[str, object]:
    """Return the columns of a row that come from its time."""
    if isinstance(found, str):
        return {"error": found}
    return {
        "teraops": it.operations(multiprocessors) / found.median / 1e12,
        "seconds": found.median,
        "spread": found.spread,
    }
