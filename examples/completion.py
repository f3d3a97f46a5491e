"""Complete prompts with a compiled model: prefill in one call, then token by token.

    prompt ids [1, S] ── prefill graph: sparse ──►  logits, KV cache
         token [1, 1] ── decode graph: dense ────►  logits, the cache one token longer, and so on

Both graphs take any length, so prompts of all lengths share them. A prompt of one token, and the
step behind it, have a graph each: PyTorch compiles sizes of one apart. Requests are served one
after another, in the order they came: nothing a request computes depends on another.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from quickstart import encode
from torch import Tensor
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import amber_compile

BACKENDS = ("amber", "amber_eager", "inductor", "eager")
BEHIND = 6  # tokens before the first new one that say how it is spelled
COLD = 1e-5  # temperatures that float32 logits cannot be divided by
HALF = "\ufffd"  # what a character decodes to while its last bytes are missing


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop; a temperature of 0 takes the likeliest."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class Piece:
    """The text that one token adds, possibly none; the last has a reason: stop or length."""

    text: str
    finish: str | None = None


def options_of(text: str, plan: str | None = None) -> dict[str, Any]:
    """Return ``pattern=2:4,quantize=int8`` as options; numbers, true and false are JSON.

    Raises:
        AmberError: for an unknown option or value, or a plan that cannot be read.
    """
    options: dict[str, Any] = {"plan": plan} if plan else {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            options[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            options[name.strip()] = value.strip()
    amber_compile.AmberConfig.from_options(None, options)  # an error before a model is loaded
    return options


class Completer:
    """A model, its tokenizer, and the one thread that runs them."""

    def __init__(
        self,
        folder: str | Path,
        backend: str = "amber",
        options: Mapping[str, Any] | None = None,
        context: int | None = None,
    ) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name = Path(folder).resolve().name
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval().to(device)
        longest = getattr(self.model.config, "max_position_embeddings", None) or 2048
        self.context = min(longest, context or longest)
        ends = self.model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        self.run: Any = self.model
        if backend != "eager":
            named = {} if backend == "inductor" else {"options": dict(options or {})}
            self.run = torch.compile(self.model, backend=backend, dynamic=True, **named)
        if plan := (options or {}).get("plan"):
            amber_compile.permute_channels(self.model, amber_compile.Plan.load(plan))
        self.worker = ThreadPoolExecutor(1, "completer")

    @property
    def graphs(self) -> int:
        """How many graphs were compiled."""
        return int(counters["stats"]["unique_graphs"])

    def warm_up(self, lengths: Sequence[int] = (8, 24, 96)) -> None:
        """Compile what requests will need, in the thread that will serve them."""
        sampling = Sampling(3, temperature=0, ignore_eos=True)
        for length in tqdm(lengths, desc="compiling", unit=" prompts"):
            prompt = [0] * min(length, self.context - sampling.max_tokens)
            self.worker.submit(list, self._complete(prompt, sampling)).result()

    @property
    def vocabulary(self) -> int:
        return int(self.model.get_input_embeddings().num_embeddings)

    def tokens(self, prompt: str) -> list[int]:
        """Return the tokens of ``prompt``, behind the start token if there is one."""
        return encode(self.tokenizer, prompt)[0].tolist()

    async def complete(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling
    ) -> AsyncIterator[tuple[int, Piece]]:
        """Yield the pieces of each completion with the place of its prompt, one after another."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue()
        left = threading.Event()

        def work() -> None:
            try:
                for place, prompt in enumerate(prompts):
                    for piece in _timed(self._complete(prompt, sampling), len(prompt)):
                        if left.is_set():
                            return
                        loop.call_soon_threadsafe(arrived.put_nowait, (place, piece))
                loop.call_soon_threadsafe(arrived.put_nowait, None)
            except Exception as error:  # the client's to know, the next request's not
                loop.call_soon_threadsafe(arrived.put_nowait, error)

        self.worker.submit(work)
        try:
            while (found := await arrived.get()) is not None:
                if isinstance(found, Exception):
                    raise found
                yield found
        finally:  # also where the client went away
            left.set()

    @torch.inference_mode()
    def _complete(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[Piece]:
        """Yield a piece for every new token."""
        text = Text(self.tokenizer, prompt, sampling.stop)
        for count, token in enumerate(self._tokens(prompt, sampling), 1):
            ended = token in self.ends and not sampling.ignore_eos
            last = ended or count == sampling.max_tokens
            added, stopped = text.add([] if ended else [token], last)
            reason = "stop" if ended or stopped else "length" if last else None
            yield Piece(added, reason)
            if reason:
                return

    def _tokens(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Yield new tokens without end."""
        device = self.model.device
        generator = torch.Generator(device)
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        cache = DynamicCache(config=self.model.config)
        tokens = torch.tensor([prompt], device=device)
        while True:
            out = self.run(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = choose(out.logits[0, -1].float(), sampling, generator)
            yield int(token)
            if tokens.shape[1] > 1:
                lay_out_as_decode_does(cache)
            tokens = token.view(1, 1)


def _timed(pieces: Iterator[Piece], read: int) -> Iterator[Piece]:
    """Yield the pieces, then print how long the first took, and how fast the others came."""
    began = first = time.perf_counter()
    count = 0
    for count, piece in enumerate(pieces, 1):
        if count == 1:
            first = time.perf_counter()
        yield piece
    rate = (count - 1) / (time.perf_counter() - first)
    wait = 1e3 * (first - began)
    print(f"{read} tokens read in {wait:.1f} ms, {count} written at {rate:.1f}/s", flush=True)


def lay_out_as_decode_does(cache: DynamicCache) -> None:
    """Copy what prefill left, row after row: laid out otherwise, it would need a graph more."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            if isinstance(held := getattr(layer, name, None), Tensor):
                setattr(layer, name, held.contiguous())


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Draw a token: of the likeliest ones that together have ``top_p``, by their probability."""
    if sampling.temperature < COLD:
        return logits.argmax(-1)
    likely, tokens = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    likely[likely.cumsum(-1) - likely >= sampling.top_p] = 0
    return tokens[torch.multinomial(likely, 1, generator=generator)]


class Text:
    """What new tokens spell, as far as it is settled.

    Kept back are characters whose last bytes are missing, and what may be the start of a stop
    string. Tokens are decoded together with a few before them: some tokenizers spell the first
    word of a text without its space.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens = list(prompt[-BEHIND:])
        self.before, self.read = 0, len(self.tokens)
        self.kept = ""

    def add(self, tokens: Sequence[int], last: bool = False) -> tuple[str, bool]:
        """Return what is settled, all of it if ``last``, and whether a stop string ended it."""
        self.tokens += tokens
        self.kept += self._spelled(last)
        found = [at for at in map(self.kept.find, self.stop) if at >= 0]
        end = min(found) if found else len(self.kept) - (0 if last else self._open())
        settled, self.kept = self.kept[:end], self.kept[end:]
        return settled, bool(found)

    def _spelled(self, last: bool) -> str:
        known = self._decode(self.tokens[self.before : self.read])
        both = self._decode(self.tokens[self.before :])
        if both.endswith(HALF) and not last:
            return ""
        self.before, self.read = self.read, len(self.tokens)
        return both[len(known) :]

    def _open(self) -> int:
        """Return how long an end of the text is that a stop string starts with."""
        sizes = range(1, 1 + max(map(len, self.stop), default=0))
        starts = [n for n in sizes if any(s.startswith(self.kept[-n:]) for s in self.stop)]
        return min(max(starts, default=0), len(self.kept))

    def _decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
