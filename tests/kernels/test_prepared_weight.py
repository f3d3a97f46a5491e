"""A prepared weight is the weight in another layout, and back again."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from amber_compile.errors import OptionError
from amber_compile.kernels.int8_kernel import int8_kernel
from amber_compile.kernels.prepared_weight import prepare_weight, prepared_like, unprepare

CPU = torch.device("cpu")
KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
SIZES = [(1, 1), (32, 64), (33, 65), (70, 203), (0, 5), (5, 0)]


def codes_of(n, k):
    return torch.randint(-127, 128, (n, k), generator=torch.Generator().manual_seed(0)).char()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, sizes):
    codes = codes_of(*sizes).to(KINDS[kind])
    prepared = prepare_weight(codes)
    assert torch.equal(unprepare(prepared, *sizes).view(torch.uint8), codes.view(torch.uint8))
    like = prepared_like(*sizes, kind, CPU)
    assert (like.shape, like.dtype, like.device) == (prepared.shape, prepared.dtype, CPU)


def test_a_transposed_weight_is_prepared():
    codes = codes_of(70, 33)
    assert torch.equal(prepare_weight(codes.T), prepare_weight(codes.T.contiguous()))


def test_four_channels_of_an_output_lie_side_by_side():
    if int8_kernel() == "reference":
        pytest.skip("waits for a C++ compiler")
    codes = codes_of(40, 70)
    prepared = prepare_weight(codes)
    assert prepared.shape == (2, 32 * (128 + 4))
    panel = prepared[0, : 32 * 128].view(32, 32, 4)  # [channels / 4, outputs, 4]
    assert torch.equal(panel[:17].transpose(0, 1).flatten(1), codes[:32, :68])
    assert torch.equal(panel[17, :, :2], codes[:32, 68:])
    assert not panel[17, :, 2:].any()
    assert not panel[18:].any()
    starts = prepared[:, -128:].contiguous().view(torch.int32).flatten()
    assert torch.equal(starts[:40], -128 * codes.sum(1, dtype=torch.int32))
    assert not starts[40:].any()


@pytest.mark.parametrize("threads", [1, 4])
def test_the_number_of_threads_changes_nothing(threads):
    codes = codes_of(300, 130)
    torch.set_num_threads(threads)
    assert torch.equal(unprepare(prepare_weight(codes), 300, 130), codes)


def test_elsewhere_codes_stay_as_they_are():
    like = prepared_like(33, 65, "int8", torch.device("meta"))
    assert (like.shape, like.dtype) == ((33, 65), torch.int8)
    assert prepare_weight(like).shape == (33, 65)


def test_the_twin_of_a_fake_weight_is_fake():
    with FakeTensorMode() as mode:
        like = prepared_like(33, 65, "int8", CPU)
    assert mode.is_our_fake(like)
    assert like.shape == prepare_weight(codes_of(33, 65)).shape


@pytest.mark.parametrize("codes", [torch.ones(3, 4), torch.ones(3, dtype=torch.int8)])
def test_what_is_no_weight_of_codes_is_named(codes):
    with pytest.raises(OptionError, match=r"codes are torch.* \[3.*\]; valid: torch.int8"):
        prepare_weight(codes)


def test_an_unknown_type_is_named():
    with pytest.raises(OptionError, match=r"unknown dtype 'int4'; .*valid: fp8, int8"):
        prepared_like(3, 4, "int4", CPU)


def test_a_weight_of_other_sizes_is_named():
    prepared = prepare_weight(codes_of(33, 65))
    with pytest.raises(OptionError, match=r"valid: \[33, 200\] or \[2, 8320\]"):
        unprepare(prepared, 33, 200)
