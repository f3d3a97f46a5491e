"""Train the small Python language model that this repository ships, on a CPU in an hour.

    python examples/train_python_lm.py --minutes 57 --out python-lm

A Llama of seven million parameters reads the interpreter's own standard library. In every epoch
the documents are shuffled anew, joined and cut into windows; tests and generated tables, twice
as long as the rest and dull to read, appear in one epoch of eight. The layers' matrices are
updated by Muon and the rest by AdamW, at a rate that warms up linearly and falls to zero along
a cosine over the *budget*: a number of minutes or a number of steps. ``--resume`` continues an
interrupted run from its last checkpoint, with the batches it would have seen.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path

import torch
from python_corpus import Document, documents
from python_tokens import CONTEXT, VOCABULARY, tokenize, train_tokenizer, windows
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EPOCHS_PER_TEST = 8
STEPS_PER_CHECKPOINT = 200
CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. The budget is ``steps`` where they are given, else ``minutes``."""

    minutes: float = 57.0
    steps: int | None = None
    batch: int = 8
    rate: float = 4e-3
    warmup: float = 0.02
    decay: float = 0.1
    seed: int = 0

    def spent(self, step: int, seconds: float) -> float:
        """Return the part of the budget that is used up, from 0 to 1."""
        return min(1.0, step / self.steps if self.steps else seconds / 60 / self.minutes)

    def rate_at(self, spent: float) -> float:
        """Return the learning rate: a linear warm-up, then half a cosine down to zero."""
        if spent < self.warmup:
            return self.rate * (spent + 1e-3) / (self.warmup + 1e-3)
        return self.rate * math.cos(math.pi / 2 * (spent - self.warmup) / (1 - self.warmup)) ** 2


class Run:
    """A model in training: its weights, moments and clock, which is what a checkpoint holds."""

    def __init__(self, model: LlamaForCausalLM, recipe: Recipe) -> None:
        self.model, self.optimizers = model, optimizers_for(model, recipe)
        self.step, self.seconds, self.loss = 0, 0.0, math.nan

    def save(self, file: Path) -> None:
        """Write a checkpoint, replacing the previous one only when it is complete."""
        part = file.with_suffix(".part")
        moments = [optimizer.state_dict() for optimizer in self.optimizers]
        clock = (self.step, self.seconds, self.loss)
        torch.save({"weights": self.model.state_dict(), "moments": moments, "clock": clock}, part)
        part.replace(file)

    def load(self, file: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(file)
        self.model.load_state_dict(state["weights"])
        for optimizer, moments in zip(self.optimizers, state["moments"], strict=True):
            optimizer.load_state_dict(moments)
        self.step, self.seconds, self.loss = state["clock"]


def new_model(width: int = 256, layers: int = 8) -> LlamaForCausalLM:
    """Return an untrained model; ``width`` is a multiple of 128, for two heads to a key."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def optimizers_for(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices, and AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = set(matrices)
    others = [p for p in model.parameters() if p not in inside]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.rate, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0, fused=True),
    ]


def batches(
    docs: Sequence[Document], tokens: Sequence[Sequence[int]], recipe: Recipe
) -> Iterator[Tensor]:
    """Yield ``[batch, CONTEXT]`` tokens for ever, in an order that the seed alone decides."""
    for epoch in count(recipe.seed):
        order = random.Random(epoch)
        chosen = [
            document
            for doc, document in zip(docs, tokens, strict=True)
            if not doc.is_test_or_table or order.randrange(EPOCHS_PER_TEST) == 0
        ]
        order.shuffle(chosen)
        cut = windows(chosen)
        shuffled = cut[torch.randperm(len(cut), generator=torch.Generator().manual_seed(epoch))]
        yield from shuffled[: len(cut) // recipe.batch * recipe.batch].split(recipe.batch)


def train_step(
    model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], batch: Tensor
) -> float:
    """Learn from ``batch``, ``[sequences, tokens]``; return its loss before, in nats a token."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def train(run: Run, data: Iterator[Tensor], recipe: Recipe, checkpoint: Path) -> None:
    """Train until the budget is spent; the loss that ``run`` keeps is a mean over ~50 steps."""
    model = torch.compile(run.model.train())
    bar = tqdm(islice(data, run.step, None), initial=run.step, total=recipe.steps)
    started = time.monotonic() - run.seconds
    for batch in bar:
        spent = recipe.spent(run.step, run.seconds)
        if spent == 1:
            break
        for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
            group["lr"] = recipe.rate_at(spent)
        loss = train_step(model, run.optimizers, batch)
        run.loss = 0.98 * run.loss + 0.02 * loss if run.step else loss
        run.step += 1
        run.seconds = time.monotonic() - started
        speed = run.step * batch.numel() / run.seconds
        bar.set_postfix_str(f"loss {run.loss:.3f}, {speed:.0f} tokens/s, {spent:.0%} spent")
        if run.step % STEPS_PER_CHECKPOINT == 0:
            run.save(checkpoint)
    run.save(checkpoint)


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, sample: Tensor) -> float:
    """Return the mean loss over ``sample``, ``[windows, tokens]``, in nats a token."""
    losses = [float(model(input_ids=part, labels=part).loss) for part in sample.split(1)]
    return sum(losses) / len(losses)


def finish(
    run: Run, tokenizer: PreTrainedTokenizerFast, out: Path, count: int = 128
) -> dict[str, float]:
    """Write the model to ``out`` in bf16; return its losses on ``count`` held-out windows."""
    held_out = windows(tokenize(documents("heldout"), tokenizer))
    sample = held_out[torch.randperm(len(held_out), generator=torch.manual_seed(0))[:count]]
    fp32 = evaluate(run.model.eval(), sample)
    bf16 = evaluate(run.model.to(torch.bfloat16), sample)
    run.model.save_pretrained(out)
    size = sum(len(text.encode()) for text in tokenizer.batch_decode(sample))
    bits = bf16 * sample.numel() / size / math.log(2)
    return {"heldout_fp32": fp32, "heldout_bf16": bf16, "heldout_bits_per_byte": bits}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=57.0, help="the budget, unless --steps")
    parser.add_argument("--steps", type=int, help="the budget as a number of steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("python-lm"), help="folder of the model")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUT")
    args = parser.parse_args()

    recipe = Recipe(args.minutes, args.steps, seed=args.seed)
    torch.manual_seed(recipe.seed)
    run = Run(new_model(), recipe)
    docs = documents("train")
    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
        run.load(args.out / CHECKPOINT)
    else:
        tokenizer = train_tokenizer(doc.text for doc in docs)
        tokenizer.save_pretrained(args.out)

    data = batches(docs, tokenize(docs, tokenizer), recipe)
    train(run, data, recipe, args.out / CHECKPOINT)
    losses = {"train": run.loss} | finish(run, tokenizer, args.out)
    report = asdict(recipe) | {"steps": run.step, "minutes": run.seconds / 60} | losses
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
