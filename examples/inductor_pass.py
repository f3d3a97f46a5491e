"""Amber as a pass inside plain ``torch.compile``, behind a pass that somebody already has.

    python examples/inductor_pass.py
    python examples/inductor_pass.py --quantize int8

The shipped model's decoder layers are compiled three times: dense, with ``AmberPass`` in one of
Inductor's hooks, and by ``backend="amber"``. Shown are what the pass before it has counted, what
Amber did, and that the pass and the backend answer the same, bit for bit.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph
from transformers import AutoModelForCausalLM, AutoTokenizer

from amber_compile import AmberConfig, Report, last_reports
from amber_compile.integrations.inductor import AmberPass, chain

SHIPPED = Path(__file__).parent / "python-lm"
HOOK = "post_grad_custom_pre_pass"
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
PROMPT = '''class Point:
    """A point in the plane."""

    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __eq__(self, other):
        return self.x == other.x and self.y == other.y
'''


class CountProducts:
    """A pass that was there before: it changes nothing, and notes what it saw."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def __call__(self, graph: Graph) -> None:
        products = [node for node in graph.nodes if node.target in PRODUCTS]
        self.found.append(len(products))


@torch.inference_mode()
def logits_of(model: nn.Module, tokens: Tensor, **compilation: Any) -> Tensor:
    """Compile each decoder layer, and return the logits of ``tokens``.

    The layers look alike, so they share what is generated for the first.
    """
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.compile(**compilation)
    logits: Tensor = model(tokens, use_cache=False).logits
    return logits


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SHIPPED, help="folder or hub name of a causal LM")
    parser.add_argument("--pattern", default="2:4", help="N:M, such as 2:4, 4:8, 8:16")
    parser.add_argument("--quantize", choices=["int8", "fp8"], help="W8A8 as well")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    started = time.perf_counter()
    options = {"pattern": args.pattern, "quantize": args.quantize}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokens = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids

    before = CountProducts()
    both = chain(before, AmberPass(AmberConfig(**options)))
    dense = logits_of(model, tokens)
    own = logits_of(model, tokens, options={HOOK: both})
    report = Report.merge(last_reports())
    backend = logits_of(model, tokens, backend="amber", options=options)

    print(f"the pass before has counted products: {before.found}\n\n{report}\n")
    for name, logits in (("dense", dense), ("AmberPass", own), ("backend='amber'", backend)):
        loss = nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
        print(f"{name:<16} {loss:7.4f} nats a token")
    print(f"AmberPass equals dense: {torch.equal(own, dense)}")
    print(f"AmberPass equals backend='amber', bit for bit: {torch.equal(own, backend)}")
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
