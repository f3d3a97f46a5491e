"""What a machine can run, told for machines that are not here."""

import json

import pytest
import torch

from amber_compile.cli.env import describe
from amber_compile.environment import environment
from amber_compile.kernels.cuda import device


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to have one GPU of a compute capability whose self-tests end as given."""

    def pretend(capability, failures=None, triton=None):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(device, "_known", {})
        monkeypatch.setattr(device, "why_no_triton", lambda: triton)
        monkeypatch.setattr("amber_compile.environment.why_no_triton", lambda: triton)
        monkeypatch.setattr(
            "amber_compile.kernels.cuda.self_test.why_wrong",
            lambda device, kind: (failures or {}).get(kind),
        )

    return pretend


def test_without_a_gpu_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in environment().no_gpu
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = environment()
    assert "finds no CUDA device" in found.no_gpu
    assert "GPU    none: torch" in describe(found)


@pytest.mark.parametrize(
    ("capability", "products"),
    [
        ((9, 0), dict.fromkeys(("bf16", "fp16", "int8", "fp8"), "wgmma.sp")),
        ((8, 0), {**dict.fromkeys(("bf16", "fp16", "int8"), "mma.sp"), "fp8": None}),
        ((12, 0), {**dict.fromkeys(("bf16", "fp16", "int8"), "mma.sp"), "fp8": None}),
        ((10, 0), dict.fromkeys(("bf16", "fp16", "int8", "fp8"))),
        ((7, 5), dict.fromkeys(("bf16", "fp16", "int8", "fp8"))),
    ],
)
def test_each_capability_has_its_instruction_or_a_reason(gpu, capability, products):
    gpu(capability)
    (found,) = environment().gpus
    assert found.products == products
    assert set(found.reasons) == {kind for kind, product in products.items() if product is None}
    assert all(found.reasons.values())
    assert found.capability == f"{capability[0]}.{capability[1]}"


def test_a_failed_self_test_is_said_aloud_once_and_told(gpu):
    gpu((9, 0), {"int8": "nm_matmul is wrong at 7 of 9"})
    with pytest.warns(UserWarning, match="wgmma.sp for int8 fails its self-test on cuda:0"):
        (found,) = environment().gpus
    assert found.products["bf16"] == "wgmma.sp"
    assert found.products["int8"] is None
    assert "wrong at 7 of 9" in found.reasons["int8"]
    assert "wrong at 7 of 9" in describe(environment())  # and no second warning


def test_without_triton_nothing_is_tested(gpu):
    gpu((9, 0), {"bf16": "must not be asked"}, triton="Triton is not installed")
    (found,) = environment().gpus
    assert set(found.reasons.values()) == {"Triton is not installed"}
    assert found.selection == "Triton is not installed"


def test_json_is_plain(gpu):
    gpu((9, 0))
    (found,) = json.loads(json.dumps(environment().to_json()))["gpus"]
    assert found["products"]["fp8"] == "wgmma.sp"


def test_a_capture_is_not_disturbed_and_not_remembered(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    reason = device.why_no_sparse_product(torch.device("cuda", 0), "bf16")
    assert "CUDA graph capture" in reason
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert device.why_no_sparse_product(torch.device("cuda", 0), "bf16") is None


@pytest.mark.parametrize(
    ("found", "reason"), [("3.5.1", "older than 3.6"), ("3.6.0", None), ("4.0.0+git1", None)]
)
def test_an_old_triton_is_refused(monkeypatch, found, reason):
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(device, "version", lambda name: found)
    device._why_no_triton_here.cache_clear()
    try:
        told = device.why_no_triton()
    finally:
        device._why_no_triton_here.cache_clear()
    assert told is None if reason is None else reason in told


# ---- a GPU that is not here ----------------------------------------------------------------------


def test_a_capability_can_be_assumed(monkeypatch):
    monkeypatch.setattr(device, "_why_no_triton_here", lambda: "Triton is not installed")
    cuda = torch.device("cuda")
    with device.assumed((9, 0)):
        assert device.why_no_triton() is None
        assert device.why_no_sparse_product(cuda, "fp8") is None
        assert device.device_instruction(cuda) is device.WGMMA_SP
        with device.assumed((8, 9)):
            assert device.why_no_sparse_product(cuda, "fp8") == "mma.sp has no kernel for fp8"
        with device.assumed((7, 5)):
            assert "compute capability 7.5" in device.why_no_sparse_product(cuda, "bf16")
        assert device.device_instruction(cuda) is device.WGMMA_SP
    assert device.why_no_triton() == "Triton is not installed"


def test_without_a_gpu_nothing_is_assumed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "_known", {})
    reason = device.why_no_sparse_product(torch.device("cuda"), "bf16")
    assert reason == "there is no CUDA device here"
