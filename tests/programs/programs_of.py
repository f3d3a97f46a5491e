"""What these tests rewrite: programs of a stack or of a model of the zoo, and what they compare."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from stack import MIDDLE, WIDTH
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

from amber_compile import Plan, Settings
from amber_compile.plan import PlannedSite
from amber_compile.plan_tensors import PlanTensors
from amber_compile.quantization import Quantization

X = torch.randn(2, 8, WIDTH, generator=torch.Generator().manual_seed(0))
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {"preset": "paper", "pattern": "8:16"},
    "first tokens dense": {"dense_prefix": 3, "min_tokens": 6},
    "int8": {"quantize": "int8"},
}
FULL = Settings(score="calibrated", output_scale=True, output_bias=True, updated_weight=True)
SMOOTH = Quantization("int8", "outstanding")


class Biased(nn.Module):
    """A gated MLP with biases, its gate and up projection in one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.gate_up_proj = nn.Linear(WIDTH, 2 * MIDDLE)
        self.down_proj = nn.Linear(MIDDLE, WIDTH)

    def forward(self, x):  # without annotations: torch.fx could not pickle its graph
        gate, up = self.gate_up_proj(self.norm(x)).chunk(2, -1)
        return x + self.down_proj(nn.functional.silu(gate) * up)


class Logits(nn.Module):
    """A language model that is called with token ids alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Return [B, S, vocabulary]."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


@torch.no_grad()
def exported(model: nn.Module, x: Tensor = X, least: int | None = 2) -> ExportedProgram:
    """Export ``model`` with any sequence length from ``least``; without it, with that of ``x``."""
    length = {1: Dim("length", min=least, max=512)} if least else None
    return export(model.eval(), (x,), dynamic_shapes=(length,))


@contextmanager
def torch_warnings() -> Iterator[None]:
    """Let PyTorch use what PyTorch warns of: whoever copies a program, or (2.11) loads one, is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
        yield


@torch.no_grad()
def decomposed(program: ExportedProgram) -> ExportedProgram:
    """Return a functional program of ATen's core operators."""
    with torch_warnings():
        return program.run_decompositions()


@torch.no_grad()
def compiled(model: nn.Module, x: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Return what the backend makes of ``model(x)``."""
    torch._dynamo.reset()
    answer: Tensor = torch.compile(model, backend="amber_eager", options=dict(options))(x)
    return answer


def plan_of(model: nn.Module, settings: Settings | str = FULL, smooth: bool = True) -> Plan:
    """Return a plan that has every tensor, other ones for each projection."""
    torch.manual_seed(1)
    sites, tensors = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        outputs, channels = module.weight.shape
        sparse = isinstance(settings, Settings) and not name.endswith(".up_proj")
        how = SMOOTH if smooth else None
        sites[name] = PlannedSite((outputs, channels), settings if sparse else "dense", how)
        tensors[name] = {"smooth": _drawn(channels)} if smooth else {}
        if sparse:
            tensors[name] |= {"factor": _drawn(channels), "output_scale": _drawn(outputs)}
            tensors[name] |= {"output_bias": _drawn(outputs), "weight": _drawn(outputs, channels)}
    return Plan(sites, {}, tensors=PlanTensors(tensors))


def _drawn(*shape: int) -> Tensor:
    return torch.rand(*shape) + 0.5
