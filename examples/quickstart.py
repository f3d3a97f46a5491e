"""Prefill a language model sparsely, and see what that costs.

    python examples/quickstart.py
    python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M --pattern 8:16

The model reads held-out Python documents and a prompt twice: as it is, then with its decoder layers
compiled by ``backend="amber"``. Shown are what was sparsified and why the rest was not, perplexity
dense and sparse, and what the model writes after a dense and after a sparse prefill. Only prefill
is sparse: new tokens come one at a time, and decode is dense.
"""

import argparse
import os
import shutil
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from python_corpus import documents
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import amber_compile

SHIPPED = Path(__file__).parent / "python-lm"
WINDOW = 512  # tokens read of each document
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer packs into one, so that a window is filled

PROMPT = '''class Point:
    """A point in the plane."""

    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __eq__(self, other):
'''


def encode(tokenizer, text: str, limit: int | None = None) -> Tensor:
    """Return the tokens of ``text``, ``[1, S]``, behind the start token if there is one."""
    text = (tokenizer.bos_token or "") + text
    cut = {"truncation": True, "max_length": limit} if limit else {}
    return torch.tensor([tokenizer(text, add_special_tokens=False, **cut).input_ids])


def held_out(tokenizer, count: int, length: int) -> list[Tensor]:
    """Return the first ``length`` tokens, ``[1, length]``, of ``count`` documents from all over."""
    texts = [document.text for document in documents("heldout") if not document.is_test_or_table]
    openings = (encode(tokenizer, text[: CHARACTERS_PER_TOKEN * length], length) for text in texts)
    windows = [tokens for tokens in openings if tokens.shape[1] == length]
    return windows[:: max(1, len(windows) // count)][:count]


# ---- the model, dense or compiled ----------------------------------------------------------------


def largest_list(model: nn.Module) -> Sequence[nn.Module]:
    """Return the modules of the largest list in ``model``, its decoder layers; or none."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda one: sum(p.numel() for p in one.parameters()), default=[])


def compile_prefill(model: nn.Module, whole: bool, backend: str, options: Mapping) -> None:
    """Compile the decoder layers one by one, or the whole model as one graph.

    Layers that look alike share their code, so that eight cost little more than one. Dynamo keeps
    a graph for each layer of the cache: past its limit of eight, further layers would run dense.
    """
    layers = largest_list(model)
    torch._dynamo.config.recompile_limit = 8 + len(layers)
    amber_compile.register_model(model)
    for part in [model] if whole or not layers else layers:
        part.compile(backend=backend, dynamic=True, options=dict(options))


def prefill(model: nn.Module, tokens: Tensor) -> tuple[Tensor, DynamicCache]:
    """Return the logits of ``tokens`` ``[1, S]`` and the cache that decoding goes on from."""
    cache = DynamicCache(config=model.config)
    return model(tokens, past_key_values=cache, use_cache=True).logits, cache


@torch.inference_mode()
def losses(model: nn.Module, windows: Sequence[Tensor], label: str) -> Tensor:
    """Return the mean loss on each window, in nats a token."""
    means = []
    for tokens in tqdm(windows, desc=f"{label:<28}", unit="documents"):
        logits, _ = prefill(model, tokens)
        means.append(nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]))
    return torch.stack(means).double()


@torch.inference_mode()
def write(model: nn.Module, tokenizer, prompt: str, count: int) -> str:
    """Return the likeliest continuation of ``prompt``: prefilled by ``model``, decoded dense."""
    tokens = encode(tokenizer, prompt)
    _, cache = prefill(model, tokens[:, :-1])
    with torch.compiler.set_stance("force_eager"):  # decode is dense, compiled or not
        written = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=cache,
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)


# ---- what is shown -------------------------------------------------------------------------------


def show_report(model: nn.Module) -> None:
    """Print every projection of the compiled parts, then what lies outside them."""
    report = amber_compile.Report.merge(amber_compile.last_reports())
    print(f"\n{report}")
    reported = {site.name for site in report.sites}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if outside := [name for name in linears if name not in reported]:
        print(f"\nOutside the compiled layers, so dense: {', '.join(outside)}")


def show_perplexities(dense: Tensor, sparse: Tensor, tokens: int) -> None:
    """Print both perplexities, and the difference with its standard error over documents."""
    difference = sparse - dense
    error = difference.std() / len(difference) ** 0.5
    print(f"\nHeld-out perplexity, {len(dense)} documents of {tokens} tokens")
    print(f"  dense   {dense.mean().exp():8.3f}")
    print(f"  sparse  {sparse.mean().exp():8.3f}")
    print(f"  loss    {difference.mean():+8.4f} ± {error:.4f} nats a token (standard error)\n")


def why_no_inductor() -> str | None:
    """Return what this machine lacks to compile what Inductor generates for a CPU, or None."""
    compiler = os.environ.get("CXX", "g++")
    if not (shutil.which(compiler) or shutil.which("clang++")):
        return f"no C++ compiler ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python headers (Python.h)"
    return None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SHIPPED, help="folder or hub name of a causal LM")
    parser.add_argument("--pattern", default="2:4", help="N:M, such as 2:4, 4:8, 8:16")
    parser.add_argument("--preset", default="amber", help="amber or paper")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=24, help="how many to write")
    parser.add_argument("--documents", type=int, default=12, help="how many to read")
    parser.add_argument("--backend", choices=["amber", "amber_eager"], help="amber, if it can be")
    parser.add_argument("--whole", action="store_true", help="compile the model as one graph")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    lacking = why_no_inductor()
    backend = args.backend or ("amber_eager" if lacking else "amber")
    if lacking and not args.backend:
        print(f"{lacking}: nothing is generated, the rewritten graphs run as they are")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    # float32: the two runs differ by what is dropped, not by how a compiler rounds
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    length = min(WINDOW, getattr(model.config, "max_position_embeddings", WINDOW))
    windows = held_out(tokenizer, args.documents, length)

    dense = losses(model, windows, "dense")
    dense_text = write(model, tokenizer, args.prompt, args.tokens)
    options = {"pattern": args.pattern, "preset": args.preset}
    compile_prefill(model, args.whole, backend, options)
    sparse = losses(model, windows, "sparse (compiles at first)")
    sparse_text = write(model, tokenizer, args.prompt, args.tokens)

    show_report(model)
    show_perplexities(dense, sparse, length)
    for label, text in (("dense", dense_text), ("sparse", sparse_text)):
        print(f"── written after a {label} prefill ──\n{args.prompt}{text}\n")
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
