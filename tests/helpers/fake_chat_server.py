"""A server that speaks OpenAI's protocol over an engine of ours, as vLLM and llama.cpp do, and misbehaves when told."""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import torch

from configs.serving import Sampling
from ft_datasets.conversation import Message
from inference.engine import Engine, Statistics

Fault = Callable[[list[int]], list[int]]
"""What a server makes of the ids that it should be asked with."""


class FakeChatServer:
    """A server on this machine, until it is left.

    Args:
        engine: answers.
        kind: what it tells beyond OpenAI's protocol: vllm = ids of messages, llama.cpp = its template's text, and the
            ids of a text; plain = how many tokens a prompt has, and no log-probabilities.
        fault: changes a prompt's ids.
        key: what it asks for; '' = nothing.
        status: what it answers instead, with an error in OpenAI's form.
    """

    def __init__(
        self,
        engine: Engine,
        kind: Literal["vllm", "llama.cpp", "plain"] = "vllm",
        fault: Fault = list,
        key: str = "",
        status: int = 200,
    ) -> None:
        self.engine, self.kind, self.fault, self.key, self.status = engine, kind, fault, key, status
        self.asked: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "FakeChatServer":
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def answer(self, body: dict[str, Any]) -> None:
                key = self.headers.get("Authorization", "").removeprefix("Bearer ")
                with server.lock:
                    status, content = server.answer(self.path, body, key)
                raw = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def answer(self, path: str, body: dict[str, Any], key: str) -> tuple[int, dict[str, Any]]:
        """Status and content of an answer."""
        if self.key and key != self.key:
            return 401, {"error": {"message": "Invalid API key"}}
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": "served", "object": "model"}]}
        if path == "/v1/chat/completions":
            self.asked.append(body)
            if body.get("model") != "served":
                return 404, {"object": "error", "message": f"The model `{body.get('model')}` does not exist."}
            if self.status != 200:
                return self.status, {"error": {"message": "told to fail"}}
            if self.kind == "plain" and "logprobs" in body:
                return 400, {"error": {"message": "logprobs are not supported"}}
            return 200, self.complete(body)
        if path == "/apply-template" and self.kind == "llama.cpp":
            return 200, {"prompt": self.text_of(body).removeprefix("<s>")}
        if path == "/tokenize" and self.kind == "llama.cpp":
            return 200, {"tokens": self.fault(self.ids_of_text(body["content"])) if "content" in body else []}
        if path == "/tokenize" and self.kind == "vllm":
            ids = self.ids_of(body)
            return 200, {"tokens": ids, "count": len(ids), "max_model_len": 512}
        return 404, {"detail": "Not Found"}

    def text_of(self, body: dict[str, Any]) -> str:
        messages = [Message(message["role"], message["content"]) for message in body["messages"]]
        return self.engine.encoder.render(messages, add_generation_prompt=True).text

    def ids_of_text(self, text: str) -> list[int]:
        """A prompt's ids behind BOS, special tokens in it being read."""
        tokenizer = self.engine.tokenizer
        first, *more = text.split("</s>")
        return [
            *tokenizer.encode(first),
            *(i for part in more for i in (2, *tokenizer.encode_after_special([part])[0])),
        ]

    def ids_of(self, body: dict[str, Any]) -> list[int]:
        if self.kind == "llama.cpp":
            return self.fault(self.ids_of_text(self.text_of(body).removeprefix("<s>")))
        messages = [Message(message["role"], message["content"]) for message in body["messages"]]
        return self.fault(self.engine.encoder.prompt_ids(messages))

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """A chat completion."""
        prompt_ids, statistics = self.ids_of(body), Statistics()
        sampling = Sampling(body["max_tokens"], temperature=body["temperature"])
        text = "".join(self.engine.stream(prompt_ids, sampling, statistics))
        choice: dict[str, Any] = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": statistics.finish_reason,
        }
        if body.get("logprobs"):
            ids = statistics.token_ids
            scores = self.engine.log_probabilities(prompt_ids, ids)
            listed = [
                {**self.described(i, scores[at]), "top_logprobs": self.best(scores[at], body["top_logprobs"])}
                for at, i in enumerate(ids)
            ]
            choice["logprobs"] = {"content": listed}
        return {"object": "chat.completion", "choices": [choice], "usage": {"prompt_tokens": len(prompt_ids)}}

    def best(self, scores: torch.Tensor, count: int) -> list[dict[str, Any]]:
        """The likeliest tokens."""
        return [self.described(i, scores) for i in scores.topk(count).indices.tolist()]

    def described(self, token_id: int, scores: torch.Tensor) -> dict[str, Any]:
        """A token with its log-probability, in OpenAI's form."""
        return {"token": "?", "bytes": [*self.bytes_of(token_id)], "logprob": float(scores[token_id])}

    def bytes_of(self, token_id: int) -> bytes:
        piece = self.engine.tokenizer.spell([token_id]).replace("▁", " ")
        raw = self.engine.tokenizer._backend.id_to_token(token_id) or ""
        return bytes([int(raw[3:5], 16)]) if re.fullmatch("<0x..>", raw) else piece.encode()
