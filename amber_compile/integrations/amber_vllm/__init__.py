"""The pass by name, for vLLM's command line.

    "inductor_passes": {"post_grad_custom_post_pass": "amber_vllm.prefill"}

vLLM looks a name up in the top-level package that it begins with, and nowhere below. So this file
is installed as ``amber_vllm``, a package of its own. Its options are those of ``AmberConfig``, as a
JSON object in the environment variable ``AMBER_VLLM``: ``AMBER_VLLM='{"min_tokens": 2048}'``.
"""

from __future__ import annotations

import json
import os

from amber_compile.config import AmberConfig
from amber_compile.errors import OptionError
from amber_compile.integrations.vllm import AmberVllmPass

VARIABLE = "AMBER_VLLM"


def pass_of(text: str) -> AmberVllmPass:
    """Return the pass that has the options in ``text``.

    Raises:
        OptionError: if it is no JSON object, or holds an unknown option or value.
    """
    try:
        options = json.loads(text)
    except json.JSONDecodeError as cause:
        raise OptionError(f"{VARIABLE}={text!r} is no JSON ({cause})") from cause
    if not isinstance(options, dict):
        raise OptionError(f"{VARIABLE}={text!r}; valid: a JSON object of AmberConfig's options")
    return AmberVllmPass(AmberConfig.from_options(None, options))


prefill = pass_of(os.environ.get(VARIABLE, "{}"))
