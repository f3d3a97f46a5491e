"""The self-test of the sparse kernels, run on references in their place: what it must notice."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from amber_compile.kernels.cuda import self_test
from amber_compile.kernels.cuda.self_test import QUANTIZED, why_wrong
from amber_compile.kernels.nm_compress import nm_compress_reference
from amber_compile.kernels.nm_matmul import nm_matmul_reference

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    compress_by(monkeypatch, nm_compress_reference)
    multiply_by(monkeypatch, nm_matmul_reference)


def compress_by(monkeypatch, launch):
    monkeypatch.setattr(self_test, "nm_compress", SimpleNamespace(launch=launch))


def multiply_by(monkeypatch, launch):
    kernel = SimpleNamespace(launch=launch)
    monkeypatch.setattr(self_test, "sparse_kernel", lambda device: kernel)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_right_kernels_pass(kind):
    assert why_wrong(CPU, kind) is None


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("part", ["values", "metadata", "scales"])
def test_one_wrong_number_of_the_compressed_form_is_noticed(monkeypatch, kind, part):
    def wrong(*arguments):
        values, metadata, scale = (one.clone() for one in nm_compress_reference(*arguments))
        if part == "values":
            values.view(torch.uint8)[-1, -1] ^= 1
        elif part == "metadata":
            metadata[0, 0, 0] ^= 0b1101  # 4 becomes 9, or 14 becomes 3
        else:
            scale[7] *= 1.001
        return values, metadata, scale

    compress_by(monkeypatch, wrong)
    assert why_wrong(CPU, kind) == f"nm_compress returns wrong {part}"


def _shifted_column(y):
    return y.roll(1, dims=1)


def _row_missing(y):
    y[-1] = 0
    return y


def _one_nan(y):
    y[5, 6] = torch.nan
    return y


def _scaled(y):
    return y * 1.02


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("fault", [_shifted_column, _row_missing, _one_nan, _scaled])
def test_a_wrong_product_is_noticed(monkeypatch, kind, fault):
    multiply_by(monkeypatch, lambda *a: fault(nm_matmul_reference(*a)))
    assert why_wrong(CPU, kind).startswith("nm_matmul is wrong at ")


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("missing", [3, 4, 5], ids=["bias", "row_scale", "col_scale"])
def test_a_missing_vector_is_noticed(monkeypatch, kind, missing):
    def without(*arguments):
        left = (*arguments[:missing], None, *arguments[missing + 1 :])
        return nm_matmul_reference(*left)

    multiply_by(monkeypatch, without)
    assert why_wrong(CPU, kind).startswith("nm_matmul is wrong at ")


@pytest.mark.parametrize("kind", [kind for kind, quantized in QUANTIZED.items() if quantized])
def test_smoothing_is_looked_at(monkeypatch, kind):
    compress_by(monkeypatch, lambda *a: nm_compress_reference(*a[:4]))
    assert why_wrong(CPU, kind) == "nm_compress returns wrong values"


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_product_that_leaves_out_the_last_channels_is_noticed(monkeypatch, kind):
    def short(values, metadata, weight, *rest):
        weight = weight.clone()
        weight[:, -16:] = 0
        return nm_matmul_reference(values, metadata, weight, *rest)

    multiply_by(monkeypatch, short)
    assert why_wrong(CPU, kind).startswith("nm_matmul is wrong at ")


def test_a_kernel_that_does_not_compile_is_a_reason(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("PTXAS\nerror")

    multiply_by(monkeypatch, fail)
    assert why_wrong(CPU, "bf16") == "RuntimeError: PTXAS error"


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_defaults_of_the_process_do_not_matter(monkeypatch, kind):
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            assert why_wrong(CPU, kind) is None
        finally:
            torch.set_default_dtype(torch.float32)
