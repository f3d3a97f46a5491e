"""examples/inductor_pass.py, run on a small model with the tokenizer of the shipped one."""

import sys
from pathlib import Path

import pytest
import torch
from hf_models import SHIPPED, new_llama
from transformers import AutoTokenizer

LAYERS = 2


@pytest.mark.parametrize("arguments", [[], ["--quantize", "int8", "--pattern", "1:4"]])
def test_what_the_example_prints(tmp_path: Path, inductor, monkeypatch, capsys, arguments):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    tokenizer.save_pretrained(tmp_path)
    new_llama(LAYERS, vocab_size=len(tokenizer))[0].save_pretrained(tmp_path)
    monkeypatch.syspath_prepend(SHIPPED.parent)
    monkeypatch.setattr(sys, "argv", ["inductor_pass.py", "--model", str(tmp_path), *arguments])
    import inductor_pass  # found from here on

    assert SHIPPED == inductor_pass.SHIPPED
    with torch.random.fork_rng():
        inductor_pass.main()
    shown = capsys.readouterr().out
    assert "the pass before has counted products: [7]" in shown
    assert "3 of 7 projections sparse" in shown
    assert ("quantised" in shown) is bool(arguments)
    assert "equals dense: False" in shown
    assert "bit for bit: True" in shown
