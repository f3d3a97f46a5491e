"""The HTTP example: a server of its own process, asked by the openai client and without one."""

import json
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

pytest.importorskip("fastapi")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "benchmarks")]
import completion  # noqa: E402  # found in the folders above
import serve  # noqa: E402

PROMPTS = ("def add(a, b):\n", "import os\n\n\nclass Tree:\n", "x = [1, 2, 3]\n" * 12)
LIKELIEST = {"temperature": 0, "max_tokens": 24}
DRAWN = {"temperature": 1.0, "seed": 7, "max_tokens": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model, sure enough of itself to be told from another, and a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=serve.VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,
        eos_token_id=0,
    )
    found = tmp_path_factory.mktemp("served") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(found)
    AutoTokenizer.from_pretrained(serve.SHIPPED).save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def log(folder: Path) -> Path:
    """Return the file that the server prints to."""
    return folder.parent / "log"


@pytest.fixture(scope="module")
def address(folder: Path, log: Path) -> Iterator[str]:
    with log.open("w") as file, serve.served(folder, "amber_eager", "pattern=2:4", file) as found:
        yield found


def answer(address: str, path: str, body: Any = None) -> tuple[int, str]:
    """Return status and text of a GET, or of a POST of ``body``."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read().decode()


def complete(address: str, prompt: Any, **sampling: Any) -> dict[str, Any]:
    status, text = answer(address, "/v1/completions", {"prompt": prompt, **sampling})
    assert status == 200, text
    return json.loads(text)


def text_of(address: str, prompt: Any, **sampling: Any) -> str:
    return complete(address, prompt, **sampling)["choices"][0]["text"]


def events(address: str, prompt: Any, **sampling: Any) -> list[dict[str, Any]]:
    """Return what a stream says, up to its end."""
    body = {"prompt": prompt, "stream": True, **sampling}
    _, text = answer(address, "/v1/completions", body)
    *found, end, nothing = text.split("\n\n")
    assert (end, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in found]


def graphs(address: str) -> int:
    return json.loads(answer(address, "/health")[1])["graphs"]


# ---- what is written -----------------------------------------------------------------------------


def generated(folder: Path, backend: str | None) -> list[list[int]]:
    """Return the new tokens of ``generate``, compiled or not."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if backend:
        model.compile(backend=backend, dynamic=True, options={"pattern": "2:4"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        tokens = completion.encode(tokenizer, prompt)
        mask = torch.ones_like(tokens)
        out = model.generate(tokens, attention_mask=mask, max_new_tokens=24, do_sample=False)
        found.append(out[0, tokens.shape[1] :].tolist())
    return found


def test_completions_are_those_of_generate_with_a_sparse_prefill(
    address: str, folder: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sparse, dense = generated(folder, "amber_eager"), generated(folder, None)
    assert all(one != other for one, other in zip(sparse, dense, strict=True))
    found = complete(address, list(PROMPTS), **LIKELIEST)
    for choice, tokens in zip(found["choices"], sparse, strict=True):
        assert choice["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
        assert choice["finish_reason"] == ("stop" if tokens[-1] == 0 else "length")
    read = [completion.encode(tokenizer, prompt).shape[1] for prompt in PROMPTS]
    assert found["usage"]["prompt_tokens"] == sum(read)
    assert found["usage"]["completion_tokens"] == sum(map(len, sparse))
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]


def test_a_prompt_may_be_tokens(address: str, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [completion.encode(tokenizer, prompt)[0].tolist() for prompt in PROMPTS[:2]]
    texts = complete(address, list(PROMPTS[:2]), **DRAWN)["choices"]
    assert complete(address, ids, **DRAWN)["choices"] == texts
    assert complete(address, ids[0], **DRAWN)["choices"] == texts[:1]


def test_an_empty_prompt_is_the_start_token(address: str) -> None:
    assert text_of(address, "", **LIKELIEST) == text_of(address, [0], **LIKELIEST)


def test_a_seed_repeats_and_another_differs(address: str) -> None:
    seeded = text_of(address, PROMPTS[0], **DRAWN)
    assert text_of(address, PROMPTS[0], **DRAWN) == seeded
    assert text_of(address, PROMPTS[0], **DRAWN | {"seed": 8}) != seeded
    free = {text_of(address, PROMPTS[0], max_tokens=24) for _ in range(3)}
    assert len(free) == 3


def test_the_smallest_nucleus_is_the_likeliest_token(address: str) -> None:
    likeliest = text_of(address, PROMPTS[1], **LIKELIEST)
    assert text_of(address, PROMPTS[1], **DRAWN, top_p=1e-6) == likeliest
    assert text_of(address, PROMPTS[1], **DRAWN | {"temperature": 1e-300}) == likeliest
    assert text_of(address, PROMPTS[1], **DRAWN) != likeliest


def test_a_stop_string_ends_the_text_before_it(address: str) -> None:
    whole = text_of(address, PROMPTS[0], **DRAWN)
    stop = whole[len(whole) // 2 :][:5]
    for stops in (stop, ["never written", stop]):
        choice = complete(address, PROMPTS[0], **DRAWN, stop=stops)["choices"][0]
        assert choice["text"] == whole[: whole.index(stop)]
        assert choice["finish_reason"] == "stop"
        pieces = events(address, PROMPTS[0], **DRAWN, stop=stops)
        assert "".join(one["choices"][0]["text"] for one in pieces) == choice["text"]
    missed = complete(address, PROMPTS[0], **DRAWN, stop=stop + "\0")["choices"][0]
    assert (missed["text"], missed["finish_reason"]) == (whole, "length")


def test_a_stream_has_an_event_for_every_token(address: str) -> None:
    whole = complete(address, PROMPTS[2], **DRAWN)
    found = events(address, PROMPTS[2], **DRAWN, stream_options={"include_usage": True})
    *pieces, last = found
    assert "".join(one["choices"][0]["text"] for one in pieces) == whole["choices"][0]["text"]
    reasons = [one["choices"][0]["finish_reason"] for one in pieces]
    assert reasons == [None] * 23 + ["length"]
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert len({one["id"] for one in found}) == 1
    assert "usage" not in events(address, PROMPTS[2], **DRAWN)[-1]


# ---- many clients --------------------------------------------------------------------------------


def test_requests_at_once_are_answered_as_one_by_one_by_few_graphs(address: str) -> None:
    text_of(address, [5], max_tokens=3)  # its graphs are compiled when one comes
    lengths = (1, 2, 3, 17, 64, 100, 255, 500)
    asked = [([length % 7 + 2] * length, DRAWN | {"seed": length}) for length in lengths]
    before = graphs(address)
    one_by_one = [text_of(address, prompt, **sampling) for prompt, sampling in asked]
    with ThreadPoolExecutor(8) as pool:
        at_once = pool.map(lambda one: text_of(address, one[0], **one[1]), asked * 2)
        assert list(at_once) == one_by_one * 2
    assert graphs(address) == before <= 8


def test_a_client_that_goes_away_frees_the_server(address: str, log: Path) -> None:
    body = {"prompt": [9] * 77, "max_tokens": 900, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/v1/completions", data)
    request.add_header("content-type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as response:
        assert response.readline().startswith(b"data: {")
    text_of(address, [9] * 78, max_tokens=2, ignore_eos=True)
    assert re.search(r"^78 tokens read in \d+\.\d ms, 2 written at ", log.read_text(), re.M)
    assert "77 tokens read" not in log.read_text()  # it was not written to its end


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "param", "says"),
    [
        ({}, "prompt", "a list of texts"),
        ({"prompt": []}, "prompt", "none empty"),
        ({"prompt": ["a", 5]}, "prompt", "a list of texts"),
        ({"prompt": [[]]}, "prompt", "none empty"),
        ({"prompt": [5, -1]}, "prompt", "token ids"),
        ({"prompt": [5, 4096]}, "prompt", "valid: 0 to 4095"),
        ({"prompt": [5] * 1024}, "prompt", "1024 tokens"),
        ({"prompt": [5] * 1000, "max_tokens": 25}, "max_tokens", "leaves 24"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"prompt": "a", "temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature", "finite"),
        ({"prompt": "a", "top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": "a", "seed": 2**70}, "seed", ""),
        ({"prompt": "a", "stop": ["x"] * 5}, "stop", "up to four"),
        ({"prompt": "a", "stop": ""}, "stop", "none empty"),
        ({"prompt": "a", "n": 2}, "n", "1"),
        ({"prompt": "a", "echo": True}, "echo", "False"),
        ({"prompt": "a", "stream": "perhaps"}, "stream", "boolean"),
        ({"prompt": "a", "logprobs": 3}, "logprobs", "valid: prompt, model, max_tokens"),
        ({"prompt": "\ud800"}, "prompt", "a text"),
        (b'{"prompt": ', None, "not a JSON object"),
        ([1], None, "not a JSON object"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    address: str, wrong: Any, param: str | None, says: str
) -> None:
    status, text = answer(address, "/v1/completions", wrong)
    error = json.loads(text)["error"]
    assert (status, error["type"]) == (400, "invalid_request_error"), text
    assert error["param"] == param
    assert says in error["message"]
    assert error["message"].startswith(param or "the body") or "context" in error["message"]


def test_another_model_is_not_found(address: str) -> None:
    status, text = answer(address, "/v1/completions", {"prompt": "a", "model": "gpt-4"})
    error = json.loads(text)["error"]
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'tiny-llama'" in error["message"]


def test_nulls_are_defaults_and_the_context_may_be_filled(address: str) -> None:
    nulls = dict.fromkeys(("stop", "n", "echo", "seed", "user", "stream"))
    found = complete(address, [5] * 1020, max_tokens=None, ignore_eos=True, **nulls)
    assert found["usage"]["completion_tokens"] == 4


def test_options_are_checked_before_anything_is_loaded() -> None:
    options = completion.options_of("pattern=4:8,min_tokens=16,strict=true, quantize=int8")
    expected = {"pattern": "4:8", "min_tokens": 16, "strict": True, "quantize": "int8"}
    assert options == expected
    with pytest.raises(ValueError, match="patern"):
        completion.options_of("patern=2:4")


# ---- the other addresses, and the client ---------------------------------------------------------


def test_model_list_and_report(address: str) -> None:
    models = json.loads(answer(address, "/v1/models")[1])
    assert [model["id"] for model in models["data"]] == ["tiny-llama"]
    status, page = answer(address, "/v1/amber/report")
    assert status == 200
    assert "<title>tiny-llama, as it is served</title>" in page
    assert "model.layers.1.mlp.down_proj" in page


def test_the_openai_client(address: str) -> None:
    openai = pytest.importorskip("openai")
    expected = text_of(address, PROMPTS[0], **DRAWN)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        name = client.models.list().data[0].id
        asked = {"model": name, "prompt": PROMPTS[0], **DRAWN}
        assert client.completions.create(**asked).choices[0].text == expected
        pieces = list(client.completions.create(**asked, stream=True))
        assert "".join(piece.choices[0].text for piece in pieces) == expected
        with pytest.raises(openai.BadRequestError, match="max_tokens") as refused:
            client.completions.create(**asked | {"max_tokens": -1})
        assert refused.value.param == "max_tokens"


# ---- text, and the benchmark ---------------------------------------------------------------------


def test_text_waits_for_whole_characters_and_possible_stops(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("x🙂y END z", add_special_tokens=False).input_ids
    text = completion.Text(tokenizer, [], ["END"])
    pieces = [text.add([token])[0] for token in ids]
    assert "".join(pieces) == "x🙂y "
    assert "" in pieces
    assert all(completion.HALF not in piece for piece in pieces)
    half = completion.Text(tokenizer, [])
    known = [half.add([token])[0] for token in ids[:2]]
    assert known == ["x", ""]
    assert half.add([], last=True) == (completion.HALF, False)
    open_end = completion.Text(tokenizer, [], ["yz"])
    assert open_end.add(tokenizer("xy", add_special_tokens=False).input_ids) == ("x", False)
    assert open_end.add([], last=True) == ("y", False)


def test_the_benchmark_measures_both_servers_in_turns(address: str) -> None:
    started = time.perf_counter()
    rows = serve.in_turns({"dense": address, "amber": address}, [8, 24], 4, 2)
    pairs = [(row["tokens"], row["server"]) for row in rows]
    assert pairs == [(8, "amber"), (8, "dense"), (24, "amber"), (24, "dense")]
    for row in rows:
        assert 0 < row["first"] < time.perf_counter() - started
        assert row["rate"] > 0


def test_ratios_above_one_are_in_favour_of_amber() -> None:
    rows = [
        {"tokens": 128, "server": "dense", "first": 0.3, "rate": 10.0},
        {"tokens": 128, "server": "amber", "first": 0.2, "rate": 20.0},
    ]
    shown = serve.table(rows, "a model")
    cells = [next(iter(column.cells)) for column in shown.columns]
    assert cells == ["128", "300.0", "200.0", "1.50", "10.0", "20.0", "2.00"]
