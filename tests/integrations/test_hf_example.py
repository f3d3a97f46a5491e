"""examples/huggingface.py, run on a small model with the tokenizer of the shipped one."""

import re
import sys
from pathlib import Path

import pytest
from hf_models import SHIPPED, new_llama
from transformers import AutoTokenizer

LAYERS = 2


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    tokenizer.save_pretrained(tmp_path)
    new_llama(LAYERS, vocab_size=len(tokenizer))[0].save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_what_the_example_prints(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SHIPPED.parent)
    monkeypatch.setattr(sys, "argv", ["huggingface.py", "--model", str(tiny), "--tokens", "4"])
    import huggingface  # found from here on

    assert huggingface.arguments().model == str(tiny)
    assert SHIPPED == huggingface.SHIPPED
    huggingface.main()
    shown = dict(re.findall(r"── (.*?) ──\n(.*?)\n\n", capsys.readouterr().out, re.DOTALL))
    linears, adapters = 7 * LAYERS + 1, 4 * LAYERS
    sparse = f"{3 * LAYERS} of {linears} projections sparse"
    compiled = shown["what was compiled"].splitlines()
    assert compiled[0] == f"prefill: {sparse}"
    assert set(compiled[1:]) == {f"decode: 0 of {linears} projections sparse"}
    assert shown["what was compiled for it"] == "no new graph"
    assert shown["pipeline"] == shown["generate"]
    moved = {}
    for state, more in (("switched off", 0), ("attached", adapters), ("merged", 0)):
        graph, moves = shown[f"adapter {state}"].splitlines()
        assert graph == f"prefill: {3 * LAYERS} of {linears + more} projections sparse"
        moved[state] = float(moves.rpartition(" ")[2])
    assert moved["switched off"] == 0 < moved["merged"]
    assert moved["attached"] > 0
