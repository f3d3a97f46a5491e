"""Amber under Hugging Face: generate, a pipeline, and a LoRA adapter, attached and merged.

    python examples/huggingface.py
    python examples/huggingface.py --model HuggingFaceTB/SmolLM2-135M --backend amber

The model reads a prompt sparsely and goes on from there densely, called in the three ways that
people call it. Then it gets an adapter, which stays dense around its sparse base layers until it is
merged into them. By default nothing is generated for the machine (``amber_eager``): the numbers are
the same, and the example takes seconds.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from amber_compile import last_reports

SHIPPED = Path(__file__).parent / "python-lm"
PROMPT = '''class Point:
    """A point in the plane."""

    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __eq__(self, other):
'''


def show(title: str, text: str) -> None:
    print(f"── {title} ──\n{text}\n")


def graphs(since: int) -> str:
    """Return a line for each graph that was compiled after the first ``since``."""
    lines = []
    for report in last_reports()[since:]:
        sparse = sum(site.decision.sparse for site in report.sites)
        lines.append(
            f"{report.graphs[0].phase}: {sparse} of {len(report.sites)} projections sparse"
        )
    return "\n".join(lines) or "no new graph"


def generate_and_pipeline(model: Any, tokenizer: Any, count: int) -> None:
    """Let the compiled model write, by ``generate`` and by a pipeline."""
    inputs = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": tokenizer.eos_token_id}
    written = model.generate(
        inputs.input_ids, attention_mask=torch.ones_like(inputs.input_ids), **options
    )
    show("generate", tokenizer.decode(written[0, inputs.input_ids.shape[1] :]))
    show("what was compiled", graphs(0))
    before = len(last_reports())
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (result,) = write(PROMPT, return_full_text=False, **options)
    show("pipeline", result["generated_text"])
    show("what was compiled for it", graphs(before))


@torch.inference_mode()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the logits of the last token."""
    return model(input_ids=tokens).logits[0, -1].float()


def adapt(model: Any, tokens: Tensor) -> None:
    """Attach an adapter, switch it off, merge it, and say what each does to the next token."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()  # random: it stands for a trained one
    plain = None
    for state in ("switched off", "attached", "merged"):
        if state == "merged":
            adapted.merge_adapter()
        before = len(last_reports())
        if state == "switched off":
            with adapted.disable_adapter():
                result = plain = logits(adapted, tokens)
        else:
            result = logits(adapted, tokens)
        moved = (result - plain).norm() / plain.norm()
        show(f"adapter {state}", f"{graphs(before)}\nthe logits moved by {moved:.3f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SHIPPED, help="folder or hub name of a causal LM")
    parser.add_argument("--backend", default="amber_eager", choices=["amber", "amber_eager"])
    parser.add_argument("--tokens", type=int, default=24, help="how many to write")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    torch._dynamo.config.recompile_limit = 32  # a graph for each state of the adapter
    model.compile(backend=args.backend)  # not torch.compile(model): generate would not run it
    generate_and_pipeline(model, tokenizer, args.tokens)
    adapt(model, tokenizer(PROMPT, return_tensors="pt").input_ids)


if __name__ == "__main__":
    main()
