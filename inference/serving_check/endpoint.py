"""A server of someone else's, asked what our own engine is asked: by OpenAI's protocol, or by polling POST /stream."""

import contextlib
import json
import time
import uuid
from typing import Any

import httpx2

from configs.errors import NetworkGaveUpError, UserError
from configs.messages import _
from inference.serving_check.comparison import Answer, Token
from inference.serving_check.questions import Question
from inference.web.stream_sessions import STOP
from utils.download.http import make_client, origin

PASSING = (502, 503, 504)
"""What a server says while it loads its model, or a proxy before a server that is not there."""
POLL_SECONDS = 0.05
LONGEST_ANSWER = 2**26
"""Bytes; no server that is asked for a few tokens says so much."""


class Endpoint(contextlib.AbstractContextManager["Endpoint"]):
    """A server with a model; leaving it closes the connection.

    Args:
        url: with or without /v1 at its end.
        model: the name that the server knows it by; '' = the first that it lists.
        api_key: '' = none.
        timeout: seconds to wait for an answer.

    Raises:
        UserError: it is no such server, or does not take the key.
        NetworkGaveUpError: nothing answers.
    """

    def __init__(self, url: str, model: str, api_key: str, timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout = timeout
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy for the world outside knows nothing of this machine.
        is_here = httpx2.URL(self.url).host in ("localhost", "127.0.0.1", "::1")
        self._client = (
            httpx2.Client(timeout=timeout, trust_env=False)
            if is_here
            else make_client({origin(self.url): api_key}, timeout)
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._client)
            self.models = self._list_models()
            self.is_polled = not self.models and self._has("/stream") and not self._has("/v1/chat/completions")
            self._stack = stack.pop_all()
        self.model = model or next(iter(self.models), "")
        self._gives_logprobs = True

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def ask(self, question: Question, max_new_tokens: int) -> Answer:
        """The server's answer, always of the likeliest token.

        Raises:
            UserError: it refuses the question.
            NetworkGaveUpError: it does not answer.
        """
        if self.is_polled:
            return self._poll(question, max_new_tokens)
        messages = [{"role": message.role, "content": message.text} for message in question.messages]
        body: dict[str, Any] = {"model": self.model, "messages": messages, "max_tokens": max_new_tokens}
        # Some servers take other values from the model's generation_config.json.
        body |= {"temperature": 0, "repetition_penalty": 1.0}
        status, answer = self._post("/v1/chat/completions", body | self._logprobs())
        if status in (400, 422, 501) and self._gives_logprobs:
            self._gives_logprobs = False
            status, answer = self._post("/v1/chat/completions", body)
        self._check(status, answer)
        try:
            choice = answer["choices"][0]
            counted = (answer.get("usage") or {}).get("prompt_tokens")
            message, tokens = choice["message"], _tokens((choice.get("logprobs") or {}).get("content") or [])
            thought = message.get("reasoning_content") or ""  # which some servers take out of the answer
            text = tokens[-1].text if thought and tokens else thought + (message["content"] or "")
            counted = None if counted is None else int(counted)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._not_a_server() from error
        ids, prompt_text = self._prompt(messages)
        if ids is not None and counted not in (None, len(ids)):
            ids = None  # what it tokenizes when it is asked to is not what it answered
        return Answer(text, choice.get("finish_reason") or "", ids, counted or (ids and len(ids)), prompt_text, tokens)

    def _logprobs(self) -> dict[str, Any]:
        return {"logprobs": True, "top_logprobs": 5} if self._gives_logprobs else {}

    def _prompt(self, messages: list[dict[str, str]]) -> tuple[tuple[int, ...] | None, str | None]:
        """The ids and the text of a prompt, as far as the server tells them: llama.cpp both, vLLM the ids."""
        status, answer = self._post("/apply-template", {"messages": messages})
        text = answer.get("prompt") if status == 200 else None
        if isinstance(text, str):
            body: dict[str, Any] = {"content": text, "add_special": True, "parse_special": True}
        else:
            text, body = None, {"model": self.model, "messages": messages, "add_generation_prompt": True}
        status, answer = self._post("/tokenize", body)
        ids = answer.get("tokens") if status == 200 else None
        if isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
            return tuple(ids), text
        return None, text

    def _poll(self, question: Question, max_new_tokens: int) -> Answer:
        body: dict[str, Any] = {"prompt": question.prompt, "history": question.history, "temperature": 0}
        body |= {"max_new_tokens": max_new_tokens, "repetition_penalty": 1.0, "session_id": uuid.uuid4().hex}
        if question.system:
            body["system"] = question.system
        text, grown = "", time.monotonic()
        while not text.endswith(STOP):
            status, answer = self._post("/stream", body)
            self._check(status, answer)
            if not isinstance(answer.get("response"), str):
                raise self._not_a_server()
            if answer.get("status", 200) != 200:
                raise self._refusal(answer["status"], {"detail": answer["response"]})
            if answer["response"] != text:
                text, grown = answer["response"], time.monotonic()
            elif time.monotonic() - grown > self.timeout:
                raise self._silence(_("no more of an answer for {seconds} seconds", seconds=f"{self.timeout:g}"))
            time.sleep(POLL_SECONDS)
        return Answer(text.removesuffix(STOP))

    def _list_models(self) -> list[str]:
        status, answer = self._request("GET", "/v1/models")
        if status in (401, 403):
            raise self._refusal(status, answer)
        listed = answer.get("data")
        names = [each.get("id") for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
        return [name for name in names if isinstance(name, str)]

    def _has(self, path: str) -> bool:
        return self._post(path, {})[0] not in (404, 405)

    def _post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        return self._request("POST", path, body)

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer; {} where it is none."""
        try:
            with self._client.stream(method, self.url + path, json=body, headers=self._headers) as response:
                content = self._read(response)
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise self._silence(str(error) or type(error).__name__) from error
        try:
            # Half characters, which JSON can spell, could be neither printed nor written to a report.
            answer = json.loads(json.dumps(json.loads(content), ensure_ascii=False).encode(errors="replace"))
        except (ValueError, RecursionError):
            answer = {}
        if response.status_code in PASSING:
            raise self._silence(_reason_of(answer) or f"HTTP {response.status_code}")
        return response.status_code, answer if isinstance(answer, dict) else {}

    def _read(self, response: httpx2.Response) -> bytes:
        """The whole of an answer, which need not have an end."""
        content, began = bytearray(), time.monotonic()
        for piece in response.iter_bytes():
            content += piece
            if time.monotonic() - began > self.timeout:
                raise self._silence(_("an answer without an end for {seconds} seconds", seconds=f"{self.timeout:g}"))
            if len(content) > LONGEST_ANSWER:
                raise self._not_a_server()
        return bytes(content)

    def _check(self, status: int, answer: dict[str, Any]) -> None:
        if status != 200:
            raise self._refusal(status, answer)

    def _refusal(self, status: int, answer: dict[str, Any]) -> UserError:
        reason = _reason_of(answer)
        if status in (401, 403):
            advice = _("Give its key with --api_key.")
        elif status == 404 and self.models and self.model not in self.models:
            advice = _("Its models: {names}. Name one with --model.", names=", ".join(self.models))
        elif status == 404:
            return self._not_a_server()
        else:
            advice = ""
        told = _("{url} refuses (HTTP {status}): {reason}", url=self.url, status=status, reason=reason or "-")
        return UserError(f"{told}\n{advice}".strip())

    def _not_a_server(self) -> UserError:
        return UserError(
            _(
                "{url} does not speak OpenAI's protocol (POST /v1/chat/completions), nor that of api_stream.py (POST "
                "/stream). Give the address of a server that does.",
                url=self.url,
            )
        )

    def _silence(self, reason: str) -> NetworkGaveUpError:
        return NetworkGaveUpError(
            _(
                "{url} does not answer ({reason}). See that the server runs and has loaded its model, then give the "
                "same command again; --timeout waits longer.",
                url=self.url,
                reason=reason,
            )
        )


def _reason_of(answer: Any) -> str:
    """What a server says it has against a question; OpenAI's way, vLLM's and FastAPI's."""
    for key in ("error", "message", "detail"):
        if isinstance(answer, dict) and answer.get(key):
            answer = answer[key]
    return answer if isinstance(answer, str) else ""


def _tokens(listed: list[dict[str, Any]]) -> tuple[Token, ...]:
    """The tokens of an answer; their bytes tell characters that are cut between two of them."""
    tokens, raw = [], b""
    for each in listed:
        others = [(raw + _bytes(other), float(other["logprob"])) for other in each.get("top_logprobs") or []]
        raw += _bytes(each)
        texts = tuple((text.decode(errors="replace"), logprob) for text, logprob in others)
        tokens.append(Token(raw.decode(errors="replace"), float(each["logprob"]), texts))
    return tuple(tokens)


def _bytes(token: dict[str, Any]) -> bytes:
    given = token.get("bytes")
    return bytes(given) if isinstance(given, list) else token["token"].encode(errors="replace")
