"""A model for lm-evaluation-harness: scores by any call of a model, and writes greedily.

    lm = HarnessModel(sparse, dense, tokenizer, longest=2048)
    lm_eval.simple_evaluate(lm, tasks=["arc_easy"])

The harness' own Hugging Face model loads what it runs and needs accelerate; this one is given what
to call. Requests are sorted by length, padded on the right, and scored by ``score``: one prefill
each. ``generate_until`` prefills by ``score`` and decodes by ``decode``. Sampling is not offered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from amber_compile.errors import OptionError

from .progress import bar

Model = Callable[..., Any]
Scored = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation: their texts, if there are any, and their tokens."""
Request = TypeVar("Request")
WRITTEN = 256
"""Tokens that are written where a task does not say how many, as in the harness."""


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """See the module.

    Args:
        score: what is asked for logits, called as the model is.
        decode: what decodes after a prefill by ``score``.
        tokenizer: of transformers.
        longest: tokens that the model reads at most; of more, the last ones are kept.
        batch: requests at a time.
        progress: show a bar on stderr.
    """

    def __init__(
        self,
        score: Model,
        decode: Model,
        tokenizer: Any,
        *,
        longest: int,
        batch: int = 8,
        device: torch.device | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__()
        self._score = score
        self._decode = decode
        self.tokenizer = tokenizer
        self._longest = longest
        self._batch = batch
        self._device = device
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the start token, if there is one."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer's requests from another one's."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the tokens of ``string``, by default with those that the tokenizer adds."""
        asked = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer(string, verbose=False, **asked)["input_ids"]
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the tokenizer writes it."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    # ---- likelihoods -----------------------------------------------------------------------------

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return log p of each continuation of its context, and whether it is the greedy one."""
        hidden = disable_tqdm or not self._progress
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=hidden)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return log p of each continuation, and whether greedy decoding would write it."""
        order = sorted(range(len(requests)), key=lambda at: -len(requests[at][1] + requests[at][2]))
        found: dict[int, tuple[float, bool]] = {}
        batches = list(_parts(order, self._batch))
        for some in bar(batches, "requests", self._progress and not disable_tqdm):
            pairs = [requests[at][1:] for at in some]
            found.update(zip(some, self._scored(pairs), strict=True))
        return [found[at] for at in range(len(requests))]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Yield log p and greediness of each of a batch of (context, continuation)."""
        inputs = [(context + aim)[-self._longest - 1 :][:-1] for context, aim in pairs]
        tokens = torch.zeros(len(pairs), max(map(len, inputs)), dtype=torch.long)
        for row, ids in zip(tokens, inputs, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        logits = self._score(input_ids=tokens.to(self._device)).logits
        for row, ids, (_, aim) in zip(logits, inputs, pairs, strict=True):
            if len(aim) > len(ids):
                raise OptionError(
                    f"a continuation has {len(aim)} tokens, and the model reads {self._longest}"
                )
            told = row[len(ids) - len(aim) : len(ids)].float().log_softmax(-1).cpu()
            wanted = torch.tensor(aim)
            likely = told.gather(-1, wanted[:, None]).double().sum()
            yield float(likely), bool((told.argmax(-1) == wanted).all())

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log p of whole texts, each token with as much before it as the model reads."""
        windows: list[Scored] = []
        owners: list[int] = []
        for at, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._longest,
                context_len=1,
            )
            for window in map(make_disjoint_window, cut):
                windows.append((("", ""), *window))
                owners.append(at)
        totals = [0.0] * len(requests)
        told = self._loglikelihood_tokens(windows, disable_tqdm)
        for at, (likely, _) in zip(owners, told, strict=True):
            totals[at] += likely
        return totals

    # ---- writing ---------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily until one of its stop texts, without that.

        Raises:
            OptionError: if a task asks for samples.
        """
        asked = [request.args for request in requests]
        shown = self._progress and not disable_tqdm
        return [self._written(text, how) for text, how in bar(asked, "texts", shown)]

    def _written(self, text: str, how: Mapping[str, Any]) -> str:
        if how.get("do_sample"):
            raise OptionError("a task samples its texts (do_sample): only greedy ones are written")
        stops = how.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        most = int(how.get("max_gen_toks") or how.get("max_new_tokens") or WRITTEN)
        room = self._longest - most
        if room < 1:
            raise OptionError(f"a task writes {most} tokens, and the model reads {self._longest}")
        prompt = self.tok_encode(text)[-room:] or [self.prefix_token_id]
        ids: list[int] = []
        for token in self._greedy(prompt, most):
            if token == self.eot_token_id:
                break
            ids.append(token)
            written: str = self.tokenizer.decode(ids)
            if any(stop in written for stop in stops):
                return _before(written, stops)
        return _before(self.tokenizer.decode(ids), stops)

    def _greedy(self, prompt: list[int], most: int) -> Iterator[int]:
        tokens = torch.tensor([prompt], device=self._device)
        output = self._score(input_ids=tokens, use_cache=True)
        for left in range(most, 0, -1):
            tokens = output.logits[:, -1:].argmax(-1)
            yield int(tokens)
            if left > 1:
                cache = output.past_key_values
                output = self._decode(input_ids=tokens, past_key_values=cache, use_cache=True)


def _before(text: str, stops: Iterable[str]) -> str:
    """Return ``text`` up to the first of ``stops`` in it."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def _parts(items: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
