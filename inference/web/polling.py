"""The HTTP interface: POST /stream, by which clients poll for the engine's answer."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import datetime
from typing import Annotated, Any, get_type_hints

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr, create_model
from starlette.exceptions import HTTPException

from configs.command_line import field_docs
from configs.errors import UserError
from configs.messages import _
from configs.serving import Sampling
from configs.text import has_half_character
from ft_datasets.conversation import Turn
from inference.engine import Engine, PromptRefused, PromptTooLong
from inference.web.stream_sessions import STOP, StreamSessions


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be empty")
    return text


def _encodable(text: str) -> str:
    if has_half_character(text):
        raise ValueError("holds half a character (a lone surrogate)")
    return text


Text = Annotated[StrictStr, AfterValidator(_encodable)]


class Conversation(BaseModel):
    """What is asked, and what was said before."""

    prompt: Annotated[Text, AfterValidator(_not_blank)] = Field(description="The question.")
    history: list[tuple[Text, Text]] | None = Field(None, description="Earlier turns: [question, answer] each.")
    session_id: Text | None = Field(None, description="The client's own name for this stream, or one from an answer.")


def _sampling_fields() -> dict[str, Any]:
    """The fields of Sampling for pydantic: each may be left out; ranges and meanings are Sampling's own."""
    kinds, docs = get_type_hints(Sampling), field_docs(Sampling)
    return {
        each.name: (
            kinds[each.name] | None,
            # A whole number is not to be read from a text, nor from true.
            Field(None, description=docs[each.name], strict=kinds[each.name] is not float, **each.metadata["bounds"]),
        )
        for each in fields(Sampling)
    }


SamplingFields = create_model("SamplingFields", **_sampling_fields())


class StreamRequest(SamplingFields, Conversation):
    """The body of POST /stream; sampling fields that are left out take the server's defaults."""

    model_config = ConfigDict(extra="forbid")

    system: Text | None = Field(None, description="What the model is told before the conversation.")


class StreamResponse(BaseModel):
    """The answer so far; `response` ends in [stop] once nothing more will come."""

    response: str
    history: list[Turn]
    status: int
    time: str
    session_id: str


def make_app(engine: Engine, defaults: Sampling, sessions: StreamSessions) -> FastAPI:
    """The application: POST /stream, and a description of it under /docs."""
    app = FastAPI(title="llama2-chinese", description="Poll POST /stream until `response` ends in [stop].")

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        given = request.headers.get("content-type", "")
        if "json" not in given:  # curl -d alone says that it sends a form
            wanted = "the body must be sent with the header Content-Type: application/json"
            return _refusal(415, f"{wanted} (its Content-Type is {given or 'missing'})")
        return _refusal(422, "; ".join(map(_describe, error.errors())))

    @app.exception_handler(HTTPException)
    async def refuse_unreadable(_request: Request, error: HTTPException) -> JSONResponse:
        return _refusal(error.status_code, str(error.detail))

    @app.post("/stream")
    def stream(body: StreamRequest, request: Request) -> StreamResponse:
        names = (each.name for each in fields(Sampling))
        given = {name: value for name in names if (value := getattr(body, name)) is not None}
        sampling = replace(_plain(defaults), **given)
        history = [tuple(turn) for turn in body.history or []]
        system = body.system or ""
        prompt_ids = engine.encode_chat(body.prompt, history, system)

        def generate(cancel: threading.Event) -> Iterator[str]:
            return engine.stream(prompt_ids, sampling, cancel=cancel)

        key = (system, body.prompt, tuple(history), repr(sampling))
        address = request.client.host if request.client else ""
        answer = sessions.poll(address, body.session_id, key, generate)
        text = answer.text + (f"\n{answer.error}" if answer.error else "")
        return StreamResponse(
            response=text.lstrip("\n") + (STOP if answer.ended else ""),
            history=[*history, (body.prompt, answer.text)],
            status=500 if answer.error else 200,
            time=datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
            session_id=answer.session_id,
        )

    @app.exception_handler(PromptTooLong)
    async def too_long(_request: Request, error: PromptTooLong) -> JSONResponse:
        return _refusal(413, f"prompt: {error}")

    @app.exception_handler(PromptRefused)
    async def refused(_request: Request, error: PromptRefused) -> JSONResponse:
        return _refusal(422, f"prompt: {error}")

    return app


def _describe(problem: dict[str, Any]) -> str:
    """Where a body is wrong, and what is wrong with it."""
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        return f"{place}: no such field; there are {', '.join(StreamRequest.model_fields)}"
    return f"{place}: {problem['msg']}"


def _refusal(status: int, reason: str) -> JSONResponse:
    body: dict[str, Any] = {"response": reason + STOP, "history": [], "status": status, "detail": reason}
    body["time"] = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return JSONResponse(body, status_code=status)


def _plain(sampling: Sampling) -> Sampling:
    """The sampling settings alone, of a configuration that holds more."""
    return Sampling(**{each.name: getattr(sampling, each.name) for each in fields(Sampling)})


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        UserError: the address can't be used.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            _(
                "Can't listen on {host}:{port} ({error}). Choose another --port.",
                host=host,
                port=port,
                error=error.strerror,
            )
        ) from error


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        server.run(sockets=[listener])
        return
    # A notebook runs its cells within an event loop, so that the server's own needs another thread.
    with ThreadPoolExecutor(1, thread_name_prefix="serve") as executor:
        serving = executor.submit(server.run, [listener])
        try:
            serving.result()
        finally:
            server.should_exit = True
