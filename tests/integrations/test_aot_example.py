"""The example of exporting runs as its page says, and the package predicts what it should."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch_only import operator_library

EXAMPLE = Path(__file__).parents[2] / "examples" / "export.py"
# What a float32 sum over the model's channels may change by, if its order does.
CHANNELS, EPSILON, LARGEST = 256, 2**-23, 25  # the last is a bound of its logits


@pytest.fixture
def model(tmp_path):
    """The folder of the shipped model, with two of its layers."""
    folder = shutil.copytree(EXAMPLE.parent / "python-lm", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    return folder


@pytest.mark.slow
def test_the_example_runs(model, tmp_path):
    operator_library()  # or skip
    kept = tmp_path / "package"
    command = [sys.executable, str(EXAMPLE), "--model", str(model), "--folder", str(kept)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 of 15 projections sparse" in done.stdout
    assert {"model.pt2", "libamber_ops.so"} <= {path.name for path in kept.iterdir()}
    off = [float(number) for number in re.findall(r"-> .*   (\S+)$", done.stdout, re.MULTILINE)]
    assert len(off) == 2
    assert max(off) < CHANNELS * EPSILON * LARGEST
