"""The Hopper kernel on NumPy, launched as on a GPU, against the reference of amber::nm_matmul."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install triton")

from instructions import wgmma_places
from numpy_gluon import NumpyKernel

from amber_compile.kernels.cuda import wgmma_sp
from amber_compile.kernels.cuda.wgmma_sp_instruction import Tile
from amber_compile.kernels.cuda.wgmma_sp_store import matrix_layout, wide_layout
from amber_compile.kernels.nm_matmul import nm_matmul_reference
from amber_compile.kernels.two_four import expand, pack_metadata

KINDS = {kind: dtype for dtype, kind in wgmma_sp.KINDS.items()}
SMALL = Tile(columns=8, stages=2)
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
TINY = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-25, torch.float32: 2.0**-149}


@pytest.fixture
def launch(monkeypatch):
    """``launch(arguments, tile, processors)``, on NumPy."""

    def run(arguments, tile=SMALL, processors=2):
        monkeypatch.setattr(wgmma_sp, "choose", lambda *_: tile)
        monkeypatch.setattr(wgmma_sp, "multiprocessors", lambda _: processors)
        return wgmma_sp.launch(*arguments)

    monkeypatch.setattr(wgmma_sp, "wgmma_sp_kernel", NumpyKernel(wgmma_sp.wgmma_sp_kernel))
    monkeypatch.setattr(wgmma_sp, "check_offsets", lambda *_: None)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    yield run
    torch.use_deterministic_algorithms(False)


def elements(kind, generator, *shape):
    if kind == "int8":
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    return torch.randn(shape, generator=generator).to(KINDS[kind])


def operands(kind, tokens, outputs, channels, seed=0):
    """Return values, metadata and weight, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.tensor([0x4, 0x8, 0xC, 0x9, 0xD, 0xE], dtype=torch.uint8)
    nibbles = pairs[torch.randint(6, (tokens, channels // 4), generator=generator)]
    values = elements(kind, generator, tokens, channels // 2)
    metadata = pack_metadata(nibbles, 8 * values.dtype.itemsize)
    return values, metadata, elements(kind, generator, outputs, channels)


def epilogue(tokens, outputs, dtype, which="bias row_scale col_scale"):
    generator = torch.Generator().manual_seed(1)
    vectors = {
        "bias": torch.randn(outputs, generator=generator).mul(9).to(dtype),
        "row_scale": torch.rand(tokens, generator=generator) + 0.5,
        "col_scale": torch.rand(outputs, generator=generator) - 0.5,
    }
    return [vector if name in which.split() else None for name, vector in vectors.items()]


def assert_within_budget(y, values, metadata, weight, bias, row_scale, col_scale, out_dtype):
    """Compare with fp64; budget: fp32 sums of K terms, three fp32 roundings, one to the result."""
    row = 1.0 if row_scale is None else row_scale.double()[:, None]
    col = 1.0 if col_scale is None else col_scale.double()
    add = torch.zeros(()) if bias is None else bias
    dense, weight = expand(values, metadata).double(), weight.double()
    exact = dense @ weight.T * row * col + add.double()
    size = (dense.abs() @ weight.abs().T * row * col).abs() + add.double().abs()
    budget = (dense.shape[1] + 3) * 2.0**-24 * size
    budget = budget + UNIT[y.dtype] * (exact.abs() + budget) + TINY[y.dtype]
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= budget).all()


def check(launch, kind, tokens, outputs, channels, tile=SMALL, processors=2, **options):
    out_dtype = options.pop("out_dtype", torch.bfloat16)
    vectors = epilogue(tokens, outputs, options.pop("bias_dtype", out_dtype), **options)
    arguments = (*operands(kind, tokens, outputs, channels), *vectors, out_dtype)
    assert wgmma_sp.why_not(*arguments) is None
    y = launch(arguments, tile, processors)
    assert y.dtype == out_dtype
    if kind == "int8":
        assert torch.equal(y, nm_matmul_reference(*arguments))
    else:
        assert_within_budget(y, *arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "tile",
    [
        Tile(8, 2),
        Tile(16, 3),
        Tile(32, 4, pair=2),
        Tile(64, 2, pair=2),
        Tile(128, 1),
        Tile(16, 3, strips=2),
        Tile(32, 4, pair=2, strips=2),
    ],
    ids=str,
)
def test_a_product(launch, kind, tile):
    check(launch, kind, 40, tile.columns + 8, 256, tile)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", [1, 2])
@pytest.mark.parametrize("channels", [64, 128, 192, 320])
def test_channels_end_anywhere_in_a_slot(launch, kind, pair, channels):
    check(launch, kind, 24, 16, channels, Tile(16, 4, pair=pair))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_tokens_end_anywhere_in_a_tile(launch, kind, tokens):
    check(launch, kind, tokens, 16, 128)
    check(launch, kind, tokens + 64, 8, 128, Tile(8, 2, strips=2))


@pytest.mark.parametrize("outputs", [8, 24, 40, 64])
@pytest.mark.parametrize("kind", ["fp16", "fp8"])
def test_outputs_end_anywhere_in_a_tile(launch, kind, outputs):
    check(launch, kind, 20, outputs, 128, Tile(32, 2))


@pytest.mark.parametrize("processors", [1, 2, 5, 100])
@pytest.mark.parametrize(
    "tile", [Tile(8, 3, group=2), Tile(16, 4, pair=2), Tile(8, 1), Tile(8, 5)], ids=str
)
def test_a_program_walks_over_many_tiles(launch, tile, processors):
    """7 x 3 tiles and odd numbers of slots: phases wrap within tiles and across them."""
    check(launch, "int8", 300, 7 * tile.columns - 8, 320, tile, processors)


@pytest.mark.parametrize("out_dtype", wgmma_sp.RESULTS)
@pytest.mark.parametrize("which", ["", "bias", "row_scale", "col_scale", "row_scale col_scale"])
@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_every_epilogue(launch, kind, which, out_dtype):
    check(launch, kind, 20, 16, 64, Tile(16, 2), which=which, out_dtype=out_dtype)


@pytest.mark.parametrize("out_dtype", wgmma_sp.RESULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_result_with_all_of_the_epilogue(launch, kind, out_dtype):
    check(launch, kind, 20, 16, 64, Tile(16, 2), out_dtype=out_dtype)
    check(launch, kind, 20, 16, 64, Tile(16, 2), out_dtype=out_dtype, bias_dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_has_a_dtype_of_its_own_accord(launch, kind):
    arguments = operands(kind, 20, 16, 64)
    y = launch(arguments)
    assert y.dtype == (KINDS[kind] if KINDS[kind].itemsize == 2 else torch.bfloat16)
    assert_within_budget(y, *arguments, None, None, None, None)


@pytest.mark.parametrize(("tokens", "outputs"), [(0, 16), (16, 0)])
def test_nothing_to_multiply(launch, tokens, outputs):
    assert launch(operands("bf16", tokens, outputs, 64)).shape == (tokens, outputs)


def test_operands_of_any_strides(launch):
    values, metadata, weight = operands("int8", 20, 16, 128)
    y = launch((values.T.contiguous().T, metadata, weight.T.contiguous().T))
    assert torch.equal(y, nm_matmul_reference(values, metadata, weight))


def test_a_row_whose_scale_is_nan_is_nan(launch):
    values, metadata, weight = operands("int8", 20, 16, 64)
    row_scale = torch.ones(20)
    row_scale[3] = float("nan")
    y = launch((values, metadata, weight, None, row_scale))
    assert y[3].isnan().all()
    assert y.isnan().sum() == 16


# ---- why not -------------------------------------------------------------------------------------


def test_what_the_kernel_declines():
    values, metadata, weight = operands("bf16", 16, 16, 128)
    shifted = torch.empty(values.numel() + 1, dtype=values.dtype)[1:].view(values.shape)
    assert wgmma_sp.why_not(values, metadata, weight) is None
    assert "values does not start at a multiple of 16 bytes" in str(
        wgmma_sp.why_not(shifted, metadata, weight)
    )
    assert "no kernel for torch.float32" in str(
        wgmma_sp.why_not(values.float(), metadata, weight.float())
    )
    assert "no channels" in str(wgmma_sp.why_not(values[:, :0], metadata[:, :0], weight[:, :0]))
    many = torch.empty(8, (1 << 18) + 64, dtype=torch.int8, device="meta")
    assert "may overflow with 262208 channels" in str(
        wgmma_sp.why_not(values.to(torch.int8), metadata, many)
    )


def test_the_largest_int8_sum_does_not_overflow():
    assert (wgmma_sp.LARGEST_INT8_K // 2) * 127 * 128 < 1 << 31


def test_a_tile_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="columns=256, stages=6"):
        Tile(256, 6)
    with pytest.raises(ValueError, match="whole slots"):
        Tile(64, 3, pair=2)


# ---- layouts -------------------------------------------------------------------------------------


def places(layout):
    """Return (rows, columns) [128 threads, registers] of a linear layout: bases are xored."""
    bits = [layout.reg_bases, [*layout.lane_bases, *layout.warp_bases]]
    register, thread = (
        np.array([[0, 0]] if not bases else xor_table(bases), np.int64) for bases in bits
    )
    both = thread[:, None] ^ register[None]
    return both[..., 0], both[..., 1]


def xor_table(bases):
    """Return the xor of the bases of every subset, in the order of its bits."""
    table = [[0, 0]]
    for row, column in bases:
        table += [[r ^ row, c ^ column] for r, c in table]
    return table


@pytest.mark.parametrize("columns", [8, 64])
def test_accumulators_are_where_the_instruction_puts_them(columns):
    for ours, theirs in zip(places(matrix_layout(columns)), wgmma_places(columns), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("columns", [32, 64])
def test_a_thread_stores_16_consecutive_bytes_and_a_quad_64(columns, bits):
    rows, stored = places(wide_layout(columns, bits))
    assert len({*zip(rows.ravel(), stored.ravel(), strict=True)}) == 64 * columns
    run = 128 // bits
    pieces = stored.reshape(32, 4, -1, run)  # quad, thread, piece, element
    assert (pieces - pieces[:, :1, :, :1] == np.arange(4 * run).reshape(4, 1, run)).all()
    assert (pieces[..., 0] % run == 0).all()
    quads = rows.reshape(32, 4, -1, run)
    assert (quads == quads[:, :1, :, :1]).all()
    assert (rows // 16 == np.arange(128)[:, None] // 32).all()  # where matrix_layout has them
