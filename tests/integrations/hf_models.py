"""What the Hugging Face tests share: small models, and what became of their projections."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from emulate import Settings
from torch import Tensor, nn
from zoo import WIDE, Model

from amber_compile import Report, last_reports

SHIPPED = Path(__file__).parents[2] / "examples" / "python-lm"
OPTIONS = {"correction": None}
SPARSE = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")


def new_llama(layers: int = 1, **config: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return a model, with an attention that computes the same when it is not compiled."""
    model, inputs = Model("llama", WIDE | {"num_hidden_layers": layers} | config).build()
    model.set_attn_implementation("eager")
    return model, inputs


def planned(model: nn.Module, n: int = 2) -> dict[str, Settings]:
    """Return how the emulation prunes the linears that the rule prunes, adapters around or not."""
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return {
        name: Settings(n, 4)
        for name in linears
        if name.removesuffix(".base_layer").endswith(SPARSE)
    }


def sparse_names(reports: Iterable[Report] | None = None) -> set[str]:
    """Return the names of the sites that some graph sparsifies."""
    reports = last_reports() if reports is None else reports
    return {site.name for one in reports for site in one.sites if site.decision.sparse}


def reasons() -> set[str | None]:
    """Return why the sites of all graphs stay dense; None for those that are sparse."""
    return {site.decision.reason for one in last_reports() for site in one.sites}


def phases(since: int = 0) -> list[tuple[str, bool]]:
    """Return each graph's phase, and whether anything in it is sparse."""
    return [(one.graphs[0].phase, one.coverage > 0) for one in last_reports()[since:]]


def tokens(batch: int = 1, length: int = 24) -> Tensor:
    """Return random tokens of any of the models."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, 96, (batch, length), generator=generator)
