"""What a sparsified model should compute, written a second time for eager mode.

    with sparsified(model, {"model.layers.0.mlp.down_proj": Settings(2, 4)}):
        logits = model(**inputs).logits

Independent of the package on purpose: forward hooks instead of graphs, a sort instead of kernels.
A site is named as in ``named_modules()``; experts, which hold all their weights in two 3-D
parameters, as in ``named_parameters()`` (``...mlp.experts.gate_up_proj``), and run one by one.
Calls with one token a sequence (decode) stay dense.

Every value is rounded where the definition of the operator rounds it (scores and corrections in
fp32, factors in fp64 and then once), so that a compiled model can be asked for the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

EPSILON = 1e-30
"""Added to both energies of a correction, so that a token of zeros keeps scale 1."""


@dataclass(frozen=True)
class Settings:
    """Keep ``n`` of every ``m`` channels of what a projection reads.

    With ``part="gate"``, only the first half of a fused gate and up projection reads them.
    """

    n: int
    m: int
    score: Literal["magnitude", "weight_norm", "robust_norm"] = "weight_norm"
    correction: Literal["norm", "variance"] | None = None
    dense_prefix: int = 0
    part: Literal["gate"] | None = None


@contextmanager
def sparsified(model: nn.Module, sites: Mapping[str, Settings]) -> Iterator[nn.Module]:
    """Prune the inputs of the named projections of ``model`` while the context lasts."""
    tokens = Tokens()
    experts: dict[str, dict[str, Settings]] = {}
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        note = model.register_forward_pre_hook(tokens.note, with_kwargs=True)
        stack.callback(note.remove)
        for name, settings in sites.items():
            if name not in modules:
                owner, _, parameter = name.rpartition(".")
                experts.setdefault(owner, {})[parameter] = settings
            elif settings.part:
                run = partial(run_halves, modules[name], settings=settings, tokens=tokens)
                stack.enter_context(replaced_forward(modules[name], run))
            else:
                hook = partial(prune_input, settings=settings, tokens=tokens)
                stack.callback(modules[name].register_forward_pre_hook(hook).remove)
        for owner, settings_of in experts.items():
            run = partial(run_experts, modules[owner], settings_of=settings_of, tokens=tokens)
            stack.enter_context(replaced_forward(modules[owner], run))
        yield model


@contextmanager
def replaced_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let ``module`` run ``forward`` while the context lasts."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


class Tokens:
    """The number of tokens per sequence in the current call of the model."""

    count = 0

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read it off the model's input_ids (a forward pre-hook)."""
        self.count = kwargs["input_ids"].shape[1]

    def of_rows(self, x: Tensor) -> Tensor:
        """Return the position in its sequence of each row of ``x[..., channels]``."""
        if x.dim() > 2:
            return torch.arange(x.shape[-2])
        return torch.arange(x.shape[0]) % self.count


def prune_input(
    module: nn.Module, args: tuple[Tensor], settings: Settings, tokens: Tokens
) -> tuple[Tensor] | None:
    """Prune what a module with a 2-D weight reads (a forward pre-hook)."""
    if tokens.count == 1:
        return None
    weight: Tensor = module.get_parameter("weight")
    weight = weight.T if isinstance(module, Conv1D) else weight
    return (prune(args[0], weight, tokens.of_rows(args[0]), settings),)


def run_halves(module: nn.Linear, x: Tensor, *, settings: Settings, tokens: Tokens) -> Tensor:
    """Run a fused gate and up projection whose gate alone reads a pruned input."""
    if tokens.count == 1:
        return nn.functional.linear(x, module.weight, module.bias)
    return project_halves(x, module.weight, module.bias, tokens.of_rows(x), settings)


def project_halves(
    x: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor, settings: Settings
) -> Tensor:
    """Project the pruned ``x`` by the first half of ``weight``, ``x`` itself by the second."""
    gate, up = weight.chunk(2)
    gate_bias, up_bias = (None, None) if bias is None else bias.chunk(2)
    pruned = prune(x, gate, position, settings)
    halves = nn.functional.linear(pruned, gate, gate_bias), nn.functional.linear(x, up, up_bias)
    return torch.cat(halves, dim=-1)


def run_experts(
    module: Any,
    hidden: Tensor,
    expert_of: Tensor,
    share: Tensor,
    *,
    settings_of: Mapping[str, Settings],
    tokens: Tokens,
) -> Tensor:
    """Send each token of ``hidden[tokens, channels]`` through its experts, one expert at a time."""

    def project(x: Tensor, name: str, expert: int, token: Tensor) -> Tensor:
        weight = getattr(module, name)[expert]
        weight = weight.T if module.is_transposed else weight
        bias = getattr(module, name + "_bias")[expert] if module.has_bias else None
        settings = settings_of.get(name) if tokens.count > 1 else None
        position = token % tokens.count
        if settings and settings.part:
            return project_halves(x, weight, bias, position, settings)
        if settings:
            x = prune(x, weight, position, settings)
        y = nn.functional.linear(x, weight)
        return y if bias is None else y + bias

    total = torch.zeros_like(hidden, dtype=torch.float32)
    for expert in range(module.num_experts):
        token, choice = torch.where(expert_of == expert)
        x = module._apply_gate(project(hidden[token], "gate_up_proj", expert, token))
        y = project(x, "down_proj", expert, token) * share[token, choice, None]
        total.index_add_(0, token, y.float())
    return total.to(hidden.dtype)


def prune(x: Tensor, weight: Tensor, position: Tensor, settings: Settings) -> Tensor:
    """Prune ``x[..., K]``, which ``weight[N, K]`` reads, except at the first positions."""
    score = x.float().abs() * factor(weight.detach(), settings.score)
    kept = torch.where(best(score, settings.n, settings.m), x, 0)
    if settings.correction is not None:
        energy = {"norm": mean_square, "variance": variance}[settings.correction]
        kept = kept * ((energy(x) + EPSILON) / (energy(kept) + EPSILON)).sqrt()
    dense = position < settings.dense_prefix
    return torch.where(dense[:, None], x, kept.to(x.dtype))


def best(score: Tensor, n: int, m: int) -> Tensor:
    """Mark the n highest of every m scores; a stable sort leaves ties to the lower channel."""
    groups = score.reshape(*score.shape[:-1], -1, m)
    order = groups.argsort(dim=-1, descending=True, stable=True)
    marks = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, order[..., :n], True)
    return marks.flatten(-2)


def mean_square(x: Tensor) -> Tensor:
    """Return the mean square of each token, in fp32."""
    return x.float().square().mean(-1, keepdim=True)


def variance(x: Tensor) -> Tensor:
    """Return the variance of each token over all its channels, in fp32."""
    return mean_square(x.float() - x.float().mean(-1, keepdim=True))


def factor(weight: Tensor, score: str) -> Tensor:
    """Return what a score multiplies the magnitude of each input channel of ``weight[N, K]`` by."""
    if score == "magnitude":
        return torch.ones(weight.shape[1])
    weight = weight.double()
    if score == "robust_norm":
        low, high = np.percentile(weight.numpy(), [0.5, 99.5])
        inside = (weight >= low) & (weight <= high)
        rest = weight[inside]
        weight = torch.where(inside, (weight - rest.mean()) / rest.std(), 0)
    norm = weight.square().sum(0).sqrt()
    return (norm / norm.min()).float()
