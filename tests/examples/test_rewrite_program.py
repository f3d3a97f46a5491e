"""The example of rewriting programs: two programs, before and after, that answer the same."""

import sys

import pytest
import rewrite_program


@pytest.mark.parametrize("options", [[], ["--quantize", "int8", "--pattern", "8:16"]])
def test_the_example_runs(monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "argv", ["rewrite_program.py", *options])
    rewrite_program.main()
    output = capsys.readouterr().out
    assert "both programs answer the same, bit for bit" in output
    traced, exported = output.split("torch.export, before")
    for part, derived in ((traced, "amber.derive"), (exported, "amber_weight_norm_0")):
        before, after = part.split("after", 1)
        assert "amber" not in before.split("relative")[0]
        assert derived in after
        assert ("amber.quantized_linear" if options else "amber.nm_select") in after
    assert ("up_proj.weight " in exported) is not bool(options)  # codes take its place
