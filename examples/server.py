"""Serve a language model over HTTP as OpenAI's completions are served, prefilled by Amber.

    python examples/server.py                       the model in examples/python-lm
    python examples/server.py FOLDER --options quantize=int8
    curl localhost:8000/v1/completions -H 'content-type: application/json' \\
      -d '{"prompt": "def add(a, b):\\n", "max_tokens": 16, "temperature": 0, "stream": true}'

GET /v1/models, POST /v1/completions, GET /health, GET /v1/amber/report (a page to look at).
Not served: chat, log-probabilities, several requests at once (they wait for one another), keys.
"""

import argparse
import json
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from completion import BACKENDS, Completer, Piece, Sampling, options_of
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from quickstart import SHIPPED, why_no_inductor

import amber_compile
from amber_compile.errors import AmberError

FORMS = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists; none empty",
    "stop": "a text or up to four, none empty",
}
"""What parameters of more than one type may be."""


def unicode(text: str) -> str:
    """Return ``text``, which half a surrogate pair makes an error."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(unicode)]
Stop = Annotated[Text, Field(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]

# ---- what a client sends -------------------------------------------------------------------------


class StreamOptions(BaseModel):
    include_usage: bool = False


class CompletionRequest(BaseModel):
    """OpenAI's parameters, as far as they are served; any other value or name is an error."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Text | Ids | Annotated[list[Text] | list[Ids], Field(min_length=1)]
    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False  # not OpenAI's: go on to max_tokens, to measure
    user: str = ""
    n: Literal[1] = 1
    best_of: Literal[1] = 1
    echo: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def null_is_the_default(cls, given: Any) -> Any:
        """Drop nulls: clients send them for what they leave open."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class BadRequest(Exception):
    """A request that cannot be served, with the parameter at fault."""

    def __init__(self, message: str, param: str | None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


def error(message: str, param: str | None, status: int, code: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": body}, status)


def explained(first: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return what is wrong with a request's body, and the parameter at fault."""
    named = [part for part in first["loc"] if part != "body"]
    if not named or not isinstance(named[0], str):
        return f"the body is not a JSON object of parameters: {first['msg']}", None
    param = named[0]
    if first["type"] == "extra_forbidden" and len(named) == 1:
        valid = ", ".join(CompletionRequest.model_fields)
        return f"{param} is not served here; valid: {valid}", param
    wrong = f"must be {FORMS[param]}" if param in FORMS else first["msg"]
    return f"{param}: {wrong}", param


def prompts_of(asked: CompletionRequest, completer: Completer) -> list[list[int]]:
    """Return the tokens of every prompt."""
    many = isinstance(asked.prompt, list) and not isinstance(asked.prompt[0], int)
    prompts = asked.prompt if many else [asked.prompt]
    found = [completer.tokens(one) if isinstance(one, str) else one for one in prompts]
    for tokens in found:
        if not tokens:
            raise BadRequest("prompt is empty, and the model has no start token", "prompt")
        if max(tokens) >= completer.vocabulary:
            message = f"prompt: token {max(tokens)}; valid: 0 to {completer.vocabulary - 1}"
            raise BadRequest(message, "prompt")
        room = completer.context - len(tokens)
        if room < (asked.max_tokens or 1):
            raise BadRequest(
                f"the model's context is {completer.context} tokens; the prompt has {len(tokens)}, "
                f"which leaves {max(room, 0)}: max_tokens={asked.max_tokens or 1}",
                "max_tokens" if room > 0 else "prompt",
            )
    return found


def sampling_of(asked: CompletionRequest, completer: Completer, longest: int) -> Sampling:
    """Return how to sample; without ``max_tokens`` 16 tokens, or what the context has room for."""
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    return Sampling(
        max_tokens=asked.max_tokens or min(16, completer.context - longest),
        temperature=asked.temperature,
        top_p=asked.top_p,
        seed=asked.seed,
        stop=stop,
        ignore_eos=asked.ignore_eos,
    )


# ---- what it gets back ---------------------------------------------------------------------------


class Answer:
    """One completion, in one body or as a stream of chunks."""

    def __init__(self, asked: CompletionRequest, completer: Completer) -> None:
        if asked.model not in (None, completer.name):
            message = f"model={asked.model!r} is not served here; valid: {completer.name!r}"
            raise BadRequest(message, "model", 404)
        self.asked = asked
        self.prompts = prompts_of(asked, completer)
        sampling = sampling_of(asked, completer, max(map(len, self.prompts)))
        self.pieces = completer.complete(self.prompts, sampling)
        self.written = 0
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": completer.name,
        }

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        async for index, piece in self.pieces:
            self.written += 1
            yield index, piece

    def _usage(self) -> dict[str, int]:
        read = sum(map(len, self.prompts))
        return {
            "prompt_tokens": read,
            "completion_tokens": self.written,
            "total_tokens": read + self.written,
        }

    async def whole(self) -> dict[str, Any]:
        choices = [_choice(index, "", None) for index in range(len(self.prompts))]
        async for index, piece in self._pieces():
            text = choices[index]["text"] + piece.text
            choices[index] = _choice(index, text, piece.finish)
        return {**self.head, "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Yield a server-sent event for every token, then the usage if asked for, then the end."""
        try:
            async for index, piece in self._pieces():
                yield _event({**self.head, "choices": [_choice(index, piece.text, piece.finish)]})
            if self.asked.stream_options.include_usage:
                yield _event({**self.head, "choices": [], "usage": self._usage()})
        except Exception as failure:  # the status is sent already
            yield _event({"error": {"message": str(failure), "type": "server_error"}})
        yield "data: [DONE]\n\n"


def _choice(index: int, text: str, finish: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


def _event(body: Any) -> str:
    return f"data: {json.dumps(body)}\n\n"


# ---- the application -----------------------------------------------------------------------------


def refuse_as_openai_does(app: FastAPI) -> None:
    """Give every error OpenAI's form."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, failure: RequestValidationError) -> Response:
        return error(*explained(failure.errors()[0]), 400)

    @app.exception_handler(BadRequest)
    async def bad(_: Request, failure: BadRequest) -> Response:
        code = "model_not_found" if failure.status == 404 else None
        return error(str(failure), failure.param, failure.status, code)

    @app.exception_handler(Exception)
    async def failed(_: Request, failure: Exception) -> Response:
        return error(f"{type(failure).__name__}: {failure}", None, 500)


def application(completer: Completer) -> FastAPI:
    app = FastAPI(title="Amber")
    refuse_as_openai_does(app)

    @app.post("/v1/completions", response_model=None)
    async def completions(asked: CompletionRequest) -> Response | dict[str, Any]:
        answer = Answer(asked, completer)
        if asked.stream:
            return StreamingResponse(answer.stream(), media_type="text/event-stream")
        return await answer.whole()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        only = {"id": completer.name, "object": "model", "created": 0, "owned_by": "local"}
        return {"object": "list", "data": [only]}

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "graphs": completer.graphs}

    @app.get("/v1/amber/report", response_class=HTMLResponse)
    def report() -> str:
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder, "report.html")
            merged = amber_compile.Report.merge(amber_compile.last_reports())
            merged.to_html(page, f"{completer.name}, as it is served")
            return page.read_text(encoding="utf-8")

    return app


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default=SHIPPED, help="folder or hub name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--backend", choices=BACKENDS, help="amber, if it can be")
    parser.add_argument("--options", default="", help="such as pattern=2:4,quantize=int8")
    parser.add_argument("--plan", help="file of a plan")
    parser.add_argument("--context", type=int, help="tokens of prompt and completion together")
    args = parser.parse_args()
    try:
        args.options = options_of(args.options, args.plan)
    except AmberError as wrong:
        parser.error(str(wrong))
    return args


def main() -> None:
    args = arguments()
    lacking = why_no_inductor()
    backend = args.backend or ("amber_eager" if lacking else "amber")
    if lacking and not args.backend:
        print(f"{lacking}: nothing is generated, the rewritten graphs run as they are")
    completer = Completer(args.model, backend, args.options, args.context)
    completer.warm_up()
    print(f"{completer.name} by {backend}: {completer.graphs} graphs")
    for report in amber_compile.last_reports():
        print(f"  {report.summary()}")
    print(f"http://{args.host}:{args.port}/v1/completions", flush=True)
    uvicorn.run(application(completer), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
