"""Rewritten programs of torch.export: saved, loaded, and run where there is no Amber."""

import io

import pytest
import torch
from aot_model import Model, exported, prompts, torch_warnings
from torch_only import operator_library, run_torch_only

from amber_compile import AmberConfig, rewrite
from amber_compile.errors import OptionError

RUN = """
import warnings
warnings.filterwarnings("ignore", "`isinstance", FutureWarning)  # torch.export's own, 2.13
warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # 2.11
library, folder, *names = sys.argv[1:]
prompts = torch.load(f"{folder}/prompts.pt")

def answer(name):
    try:
        program = torch.export.load(f"{folder}/{name}.pt2").module()
        return [program(ids) for ids in prompts]
    except RuntimeError as error:
        return f"{error} {error.__cause__}"

assert "deserializing" in answer(names[0])  # without the library
torch.ops.load_library(library)
torch.save({name: answer(name) for name in names}, f"{folder}/answers.pt")
"""
KINDS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {"pattern": "8:16", "dense_prefix": 3, "min_tokens": 20}),
    "int8": (torch.bfloat16, {"quantize": "int8"}),
    "fp8": (torch.bfloat16, {"quantize": "fp8"}),
}


@torch.no_grad()
def rewritten(kind):
    """Return the rewritten program of a kind, and the model that it comes from."""
    dtype, options = KINDS[kind]
    model = Model(dtype)
    with torch_warnings():
        program, report = rewrite(exported(model), AmberConfig(**options))
    assert any(site.decision.settings for site in report.sites)
    return program, model


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What saved programs answer in a process without Amber, or why they do not."""
    library, folder = operator_library(), tmp_path_factory.mktemp("programs")
    programs = {kind: rewritten(kind)[0] for kind in KINDS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMBER_CPU_KERNEL", "reference")
        programs["unpacked"] = rewritten("int8")[0]
    torch.save(prompts(), folder / "prompts.pt")
    with torch_warnings():
        for name, program in programs.items():
            torch.export.save(program, folder / f"{name}.pt2")
    log = run_torch_only(RUN, library, folder, *programs)
    return torch.load(folder / "answers.pt") | {"log": log}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_a_saved_program_answers_like_the_backend_without_amber(kind, answers):
    dtype, options = KINDS[kind]
    compiled = torch.compile(Model(dtype), backend="amber_eager", dynamic=True, options=options)
    for logits, ids in zip(answers[kind], prompts(), strict=True):
        assert torch.equal(logits, compiled(ids))


@torch.no_grad()
def test_a_process_with_amber_loads_it_without_the_library():
    (program, _), file = rewritten("int8"), io.BytesIO()
    with torch_warnings():
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
    ids = prompts()[0]
    assert torch.equal(loaded.module()(ids), program.module()(ids))
    codes = [name for name, one in loaded.state_dict.items() if one.dtype == torch.int8]
    assert len(codes) == 14
    assert not [name for name in loaded.state_dict if name.endswith("_proj.weight")]


# ---- what does not work --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fp8", "dtype 'fp8' has no codes in this library; valid: int8"),
        ("unpacked", "weight [64, 64] is not packed; valid: [2, 2176]"),
    ],
)
def test_what_does_not_run_says_why(name, message, answers):
    assert isinstance(answers[name], str)
    assert message in answers[name]


def test_without_the_library_the_log_names_the_operator(answers):
    assert "failed to resolve torch.ops.amber.nm_select" in answers["log"]


def test_a_weight_on_another_device_is_named():
    program, name = exported(Model()), "layers.0.q_proj.weight"
    program.state_dict[name] = torch.nn.Parameter(program.state_dict[name].to("meta"))
    with pytest.raises(OptionError, match=rf"{name} lies on meta, its graph records cpu"):
        rewrite(program)
