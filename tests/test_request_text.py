"""Requests as text: each kind there and back, the same text in every process."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amber_compile.derivations import (
    Calibrated,
    Matrix,
    Quantized,
    ScaledVector,
    ScoreFactor,
    WeightCodes,
    WeightScale,
)
from amber_compile.errors import PlanError
from amber_compile.plan_tensors import PlanTensors
from amber_compile.quantization import Quantization
from amber_compile.request_text import from_text, keep, to_text

TENSORS = PlanTensors({"layers.0.q": {"smooth": torch.ones(16), "factor": torch.ones(16)}})
SMOOTH = Calibrated("layers.0.q", "smooth", TENSORS, (16,))
SOURCE = Calibrated("layers.0.q", "weight", TENSORS, (8, 16), torch.bfloat16)
INT8 = Quantization("int8", "outstanding", 0.25)
WHOLE = Quantized(INT8, Matrix(True, 4, 8), SMOOTH, SOURCE)
REQUESTS = [
    ScoreFactor("weight_norm"),
    ScoreFactor("robust_norm", Matrix(True, 0, 96)),
    SMOOTH,
    SOURCE,
    WeightCodes(Quantized(Quantization("fp8"))),
    WeightCodes(WHOLE),
    WeightScale(Quantized(Quantization("int8"), Matrix(False, 96))),
    WeightScale(WHOLE, (SMOOTH, SMOOTH)),
    ScaledVector(SMOOTH, 1.0, torch.float16),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda one: type(one).__name__)
def test_there_and_back(request_):
    text = to_text(request_)
    assert from_text(text) == request_
    assert hash(from_text(text)) == hash(request_)
    assert to_text(from_text(text)) == text


def test_other_requests_are_other_texts():
    texts = [to_text(one) for one in REQUESTS]
    assert len(set(texts)) == len(REQUESTS)


matrices = st.builds(Matrix, st.booleans(), st.integers(0, 99), st.none() | st.integers(100, 200))
smoothed = st.builds(Quantization, st.just("int8"), st.just("smoothquant"), st.floats(0, 1))
names = st.text(min_size=1)
shapes = st.lists(st.integers(1, 9), max_size=3).map(tuple)
calibrated = st.builds(Calibrated, names, names, st.just(TENSORS), shapes)
quantized = st.builds(Quantized, smoothed, matrices, st.none() | calibrated, st.none() | calibrated)
scales = st.builds(WeightScale, quantized, st.lists(calibrated, max_size=2).map(tuple))
vectors = st.builds(ScaledVector, calibrated, st.floats(-9, 9), st.just(torch.float32))


@given(st.one_of(scales, vectors, quantized.map(WeightCodes), calibrated))
def test_any_request_is_there_and_back(request_):
    assert from_text(to_text(request_)) == request_


def test_the_text_is_stable():
    assert to_text(ScoreFactor("weight_norm", Matrix(True, 0, 96))) == (
        '{"is":"ScoreFactor","score":"weight_norm",'
        '"matrix":{"is":"Matrix","transposed":true,"start":0,"stop":96}}'
    )
    assert f'"tensors":{{"tensors":"{TENSORS.id}"}}' in to_text(SMOOTH)


# ---- tensors of a plan ---------------------------------------------------------------------------


def test_a_plan_that_is_not_loaded_is_named():
    text = to_text(SMOOTH).replace(TENSORS.id, "0123")
    with pytest.raises(PlanError, match=r"reads the tensors '0123' of a plan .* not loaded; give"):
        from_text(text)
    again = PlanTensors({"layers.0.q": {"smooth": torch.ones(16)}})
    with pytest.raises(PlanError, match="not loaded"):
        from_text(to_text(SMOOTH).replace(TENSORS.id, again.id))
    keep(again)  # what failed before is asked again
    assert from_text(to_text(SMOOTH).replace(TENSORS.id, again.id)).tensors is again


def test_another_process_reads_the_text_of_a_saved_plan(tmp_path):
    TENSORS.write(tmp_path / "plan.safetensors")
    run = """
import sys, torch
from amber_compile.errors import PlanError
from amber_compile.plan_tensors import PlanTensors
from amber_compile.request_text import from_text, keep
try:
    from_text(sys.argv[1])
except PlanError:
    keep(PlanTensors.open(sys.argv[2]))
    print(from_text(sys.argv[1]).compute(torch.ones(8, 16)).sum().item())
"""
    command = [sys.executable, "-c", run, to_text(SMOOTH), str(tmp_path / "plan.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "16.0\n"
