"""A language model that calibrates in a second: two gated layers on a vocabulary of 24."""

from __future__ import annotations

import torch
from torch import Tensor, nn

VOCABULARY, WIDTH, INNER = 24, 16, 32


class Layer(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        self.gate_proj = nn.Linear(WIDTH, INNER, bias=bias)
        self.up_proj = nn.Linear(WIDTH, INNER, bias=bias)
        self.down_proj = nn.Linear(INNER, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q_proj(nn.functional.layer_norm(x, (WIDTH,))).cumsum(1) / 8
        y = nn.functional.layer_norm(x, (WIDTH,))
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


class Toy(nn.Module):
    """Tokens [B, S] -> {"logits": [B, S, V]}."""

    def __init__(self, seed: int = 0, bias: bool = False, logits: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Layer(bias), Layer(bias)])
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.logits = logits
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.25 if parameter.dim() == 2 else 0.1)
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.lm_head(x)} if self.logits else {"last_hidden_state": x}


def text(batches: int = 8, seed: int = 1) -> list[Tensor]:
    """Return batches of tokens [2, 12]."""
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (2, 12), generator=drawn) for _ in range(batches)]


SITES = [f"layers.{layer}.{name}_proj" for layer in (0, 1) for name in ("q", "gate", "up", "down")]


def calibrate_as_rank(rank: int, ranks: int, folder: str) -> None:
    """Calibrate the toy as one of several processes, and save what this rank decides.

    Then once more, with a batch that rank 1 alone reads and cannot: write down what is said.
    """
    import torch.distributed as dist

    from amber_compile.calibration import calibrate

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=ranks, rank=rank)
    try:
        plan = calibrate(Toy(), text(7), coverage=0.5, progress=False)
        plan.save(f"{folder}/{rank}.plan")
        batches = text(4)
        order = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()
        batches[order[2]] = torch.full((2, 12), VOCABULARY)  # the first is held out
        calibrate(Toy(), batches, coverage=0.5, progress=False)
    except Exception as error:
        with open(f"{folder}/{rank}.txt", "w") as file:
            file.write(f"{type(error).__name__}: {error}")
    finally:
        dist.destroy_process_group()


def calibrate_and_die(folder: str, batches: int) -> None:
    """Calibrate the toy, and be killed after so many batches were read."""
    import os
    import signal

    from amber_compile.calibration import calibrate, reading

    torch.set_num_threads(1)
    reading.KEPT_EVERY = 0.0
    model, read = Toy(), 0

    class Mortal(Toy):
        def forward(self, *args: Tensor) -> dict[str, Tensor]:
            nonlocal read
            read += not torch.compiler.is_compiling()
            if read > batches:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().forward(*args)

    mortal = Mortal()
    mortal.load_state_dict(model.state_dict())
    calibrate(mortal, text(), coverage=0.5, progress=False, resume=folder)


def tune_as_rank(rank: int, ranks: int, folder: str) -> None:
    """Tune the toy as one of several processes and save what this rank has found."""
    import torch.distributed as dist

    from amber_compile.calibration.observe import weights_of
    from amber_compile.calibration.reading import Reader
    from amber_compile.calibration.resume import Checkpoint
    from amber_compile.calibration.selection import Sparse
    from amber_compile.calibration.tuning import Tuning, tune
    from amber_compile.settings import Settings

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=ranks, rank=rank)
    try:
        model, case = Toy(), dict.fromkeys(SITES, Sparse(Settings("2:4", "magnitude")))
        reader = Reader(model, Checkpoint(None, {}), progress=False)
        batches = list(enumerate(text()))
        found = tune(reader, weights_of(model, SITES), case, batches, Tuning(steps=4, tokens=48))
        torch.save({name: dict(one.tensors) for name, one in found.items()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
