"""The tensors of a plan: a value, mapped from its file, and refused where it does not fit."""

import builtins
import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from amber_compile.errors import PlanError
from amber_compile.plan_tensors import DTYPES, KINDS, PlanTensors

SHAPES = {"mlp.down_proj": (8, 16), "mlp.experts": (2, 8, 16), "": (4, 16)}


def made() -> dict[str, dict[str, torch.Tensor]]:
    return {
        "mlp.down_proj": {
            "factor": torch.rand(16),
            "absmax": torch.rand(16),
            "output_scale": torch.rand(8),
            "output_bias": torch.rand(8),
            "weight": torch.rand(8, 16).bfloat16(),
            "permutation": torch.randperm(16).int(),
            "first_row": torch.rand(16).bfloat16(),
        },
        "mlp.experts": {"factor": torch.rand(2, 16), "output_scale": torch.rand(2, 8)},
        "": {"factor": torch.rand(16)},
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tensors.safetensors"


@pytest.fixture
def saved(path):
    tensors = PlanTensors(made())
    tensors.write(path)
    return tensors


def same(one: PlanTensors, other: PlanTensors) -> bool:
    left, right = one.to_dict(), other.to_dict()
    names = {site: set(own) for site, own in left.items()}
    if names != {site: set(own) for site, own in right.items()}:
        return False
    pairs = [(left[s][n], right[s][n]) for s, own in left.items() for n in own]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# ---- a value ----


def test_what_was_given_is_found():
    given = made()
    tensors = PlanTensors(given)
    assert torch.equal(tensors.get("mlp.experts", "factor"), given["mlp.experts"]["factor"])
    assert tensors.get("mlp.experts", "weight") is None
    assert tensors.get("nobody", "factor") is None
    assert tensors.sites == ("mlp.down_proj", "mlp.experts", "")
    assert tensors.names("mlp.experts") == ("factor", "output_scale")
    assert tensors.names("nobody") == ()
    assert len(tensors) == 10
    sizes = [one.numel() * one.element_size() for own in given.values() for one in own.values()]
    assert tensors.nbytes == sum(sizes)
    assert tensors.bytes_of("weight") == 8 * 16 * 2
    assert tensors.words("mlp.down_proj", "permutation") == "I32 [16]"
    assert tensors.words("mlp.experts", "permutation") is None


def test_it_comes_back_from_its_file(path, saved):
    assert same(PlanTensors.open(path), saved)
    assert PlanTensors.open(path).file == path
    assert saved.file is None


def test_equality_is_by_the_save():
    first, second = PlanTensors(made()), PlanTensors(made())
    assert first == first
    assert first != second
    assert first != made()
    assert PlanTensors() == PlanTensors({}) != first
    assert len({first, second, PlanTensors(), PlanTensors({})}) == 3


def test_two_loads_of_one_file_are_equal(path, saved):
    one, two = PlanTensors.open(path), PlanTensors.open(path)
    assert one == two == saved
    assert hash(one) == hash(two) == hash(saved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_and_pickles_are_equal(path, saved, copied):
    for tensors in (saved, PlanTensors.open(path)):
        again = copied(tensors)
        assert again == tensors
        assert same(again, tensors)


def test_a_pickle_of_a_large_file_is_small(path, saved):
    PlanTensors({"q": {"weight": torch.zeros(1000, 1000)}}).write(path)
    assert len(pickle.dumps(PlanTensors.open(path))) < 1000


def test_a_pickle_whose_file_was_replaced(path, saved):
    pickled = pickle.dumps(PlanTensors.open(path))
    PlanTensors(made()).write(path)
    with pytest.raises(PlanError, match="was replaced by those of another plan"):
        pickle.loads(pickled)


def test_what_the_caller_changes_later_has_no_effect():
    given = made()
    tensors = PlanTensors(given)
    given["mlp.experts"].clear()
    given.clear()
    assert len(tensors) == 10
    tensors.to_dict()["mlp.experts"].clear()
    assert len(tensors) == 10
    with pytest.raises(AttributeError):
        tensors.id = "another"


def test_a_write_in_place_is_noticed(path, saved):
    for tensors in (saved, PlanTensors.open(path)):
        assert tensors.get("", "factor") is tensors.get("", "factor")
        tensors.get("", "factor").zero_()
        with pytest.raises(PlanError, match="site '': tensor 'factor' of the plan was written to"):
            tensors.get("", "factor")
        assert tensors.get("mlp.experts", "factor") is not None
    assert not torch.equal(PlanTensors.open(path).get("", "factor"), torch.zeros(16))


def test_it_is_kept_plain():
    turned = torch.rand(16, 8).t()
    with torch.inference_mode():
        inference = torch.rand(16)
        tensors = PlanTensors(
            {"q": {"weight": turned, "factor": inference, "absmax": torch.ones(1).expand(16)}}
        )
    for name in ("weight", "factor", "absmax"):
        kept = tensors.get("q", name)
        assert kept.is_contiguous()
        assert not kept.is_inference()
        assert not kept.requires_grad
    assert torch.equal(tensors.get("q", "weight"), turned)
    needs_grad = PlanTensors({"q": {"factor": torch.rand(16, requires_grad=True)}})
    assert not needs_grad.get("q", "factor").requires_grad


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode, torch.no_grad])
def test_reading_under_any_mode_gives_the_plain_tensor(path, saved, mode):
    tensors = PlanTensors.open(path)
    with mode():
        read = tensors.get("mlp.down_proj", "factor")
    assert type(read) is torch.Tensor
    assert not read.is_inference()
    assert torch.equal(read, saved.get("mlp.down_proj", "factor"))


# ---- what does not fit ----


def test_what_fits_passes():
    PlanTensors(made()).check(SHAPES)
    PlanTensors().check({})


@pytest.mark.parametrize("name", KINDS)
def test_another_size_is_told(name):
    dimensions, dtypes = KINDS[name]
    dtype = next(dtype for dtype, known in DTYPES.items() if known == dtypes[0])
    wrong = torch.ones([7] * len(dimensions), dtype=dtype)
    with pytest.raises(PlanError) as caught:
        PlanTensors({"mlp.down_proj": {name: wrong}}).check(SHAPES)
    wanted = [{"N": 8, "K": 16}[one] for one in dimensions]
    assert f"its tensor {name!r} is" in str(caught.value)
    assert f"for a weight [8, 16] it must be {' or '.join(dtypes)} {wanted}" in str(caught.value)


def test_another_dtype_is_told():
    with pytest.raises(PlanError, match=r"'factor' is F64 \[16\]; .* it must be F32 \[16\]"):
        PlanTensors({"": {"factor": torch.rand(16).double()}}).check(SHAPES)


def test_experts_need_one_each():
    with pytest.raises(PlanError, match=r"'factor' is F32 \[16\]; .* it must be F32 \[2, 16\]"):
        PlanTensors({"mlp.experts": {"factor": torch.rand(16)}}).check(SHAPES)


def test_an_unknown_site_and_an_unknown_name():
    factor = torch.rand(16)
    with pytest.raises(PlanError, match=r"unknown site of a tensor 'mlp\.down'; did you mean"):
        PlanTensors({"mlp.down": {"factor": factor}}).check(SHAPES)
    with pytest.raises(PlanError, match=r"site '': unknown tensor 'factors'; did you mean 'fac"):
        PlanTensors({"": {"factors": factor}}).check(SHAPES)


def test_what_is_no_tensor_of_a_plan():
    with pytest.raises(PlanError, match="site 'q': 'factor' is a list, no tensor"):
        PlanTensors({"q": {"factor": [1.0]}})
    with pytest.raises(PlanError, match=r"site 'q': unknown dtype of 'factor' 'torch\.int64'"):
        PlanTensors({"q": {"factor": torch.arange(4)}})


# ---- files ----


def test_a_file_cut_short_anywhere(path, saved):
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(PlanError, match="is cut short or damaged"):
            PlanTensors.open(path)


def test_a_missing_file_and_a_directory(path, tmp_path):
    for other in (path, tmp_path):
        with pytest.raises(PlanError, match=f"tensors file '{other}' cannot be read"):
            PlanTensors.open(other)


def test_a_checkpoint_is_no_plan(path):
    import safetensors.torch

    safetensors.torch.save_file({"q.weight": torch.ones(4)}, path)
    with pytest.raises(PlanError, match="holds no plan's tensors"):
        PlanTensors.open(path)


def test_a_file_that_is_gone_can_still_be_read(path, saved):
    tensors = PlanTensors.open(path)
    os.unlink(path)
    assert same(tensors, saved)


def test_without_safetensors_the_error_names_the_extra(path, saved, monkeypatch):
    real = builtins.__import__

    def fail(name, *rest):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)
    for step in (lambda: PlanTensors.open(path), lambda: saved.write(path)):
        with pytest.raises(PlanError, match=r"needs safetensors: pip install 'amber-compile\[cali"):
            step()
    assert len(PlanTensors({"q": {"factor": torch.rand(4)}})) == 1  # in memory nothing is needed


FULL = """
import resource, sys, torch
from pathlib import Path
from amber_compile.plan_tensors import PlanTensors
tensors = PlanTensors({"q": {"factor": torch.zeros(100_000)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    tensors.write(Path(sys.argv[1]))
except OSError as error:
    print(error)
"""


def test_a_disk_that_takes_no_more_is_an_os_error(path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"tensors file '{path}' cannot be written: ")
