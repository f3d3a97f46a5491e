"""Run a whole vLLM engine on a CPU, in a process of its own: ``vllm_engine.py MODEL``.

``AMBER_HOW`` says how the pass is given: ``object`` or ``name``. Printed is a line of JSON: for
each batch the log probability of every token of every prompt, and what was generated.

On a CPU vLLM compiles without its own backend, and packs weights into handles of oneDNN, where no
pass sees them. Both are changed here, so that the engine takes the way that it takes on a GPU:
``VllmBackend`` with pieces, ranges and passes, and ``linear`` with its weight in the graph.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: what is changed here holds there
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

MIN_TOKENS, LONG, SHORT, NEW = 32, 64, 10, 4
PROMPTS = list(range(3, 3 + LONG)), list(range(40, 40 + SHORT))
BATCHES = {"long": PROMPTS[:1], "short": PROMPTS[1:], "together": PROMPTS}


def as_on_a_gpu() -> None:
    """Let vLLM's CPU platform compile as its others do."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils
    from vllm.platforms.cpu import CpuPlatform

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False
    update = CpuPlatform.check_and_update_config

    def keep_mode(config: Any) -> None:
        mode = config.compilation_config.mode
        update(config)
        config.compilation_config.mode = mode

    CpuPlatform.check_and_update_config = staticmethod(keep_mode)


def configuration(how: str) -> dict[str, Any]:
    """Return vLLM's ``compilation_config`` with the pass in it."""
    from amber_compile import AmberConfig
    from amber_compile.integrations.vllm import HOOK, compilation_config

    common = {"mode": 3, "cudagraph_mode": "NONE", "compile_sizes": []}
    if how == "object":
        return common | compilation_config(AmberConfig(min_tokens=MIN_TOKENS))
    ends = {"compile_ranges_endpoints": [MIN_TOKENS - 1]}
    return common | {"inductor_passes": {HOOK: "amber_vllm.prefill"}} | ends


def main() -> None:
    """Run the batches."""
    as_on_a_gpu()
    from vllm import LLM, SamplingParams

    from amber_compile import last_reports

    engine = LLM(
        sys.argv[1],
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        max_num_batched_tokens=256,
        enable_prefix_caching=False,
        compilation_config=configuration(os.environ["AMBER_HOW"]),
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    found: dict[str, Any] = {}
    for name, batch in BATCHES.items():
        prompts = [{"prompt_token_ids": prompt} for prompt in batch]
        found[name] = [answer(one) for one in engine.generate(prompts, sampling, use_tqdm=False)]
    sites = [[site.name for site in one.sites if site.decision.settings] for one in last_reports()]
    print(json.dumps({"answers": found, "sites": sites}))


def answer(output: Any) -> dict[str, Any]:
    """Return the log probabilities of a prompt's tokens but the first, and the tokens behind it."""
    scored = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    scores = [row[token].logprob for token, row in scored]
    return {"scores": scores, "tokens": list(output.outputs[0].token_ids)}


if __name__ == "__main__":
    main()
