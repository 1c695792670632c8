"""api_stream.py as a process, asked over real HTTP; answers are compared with transformers' own greedy generation."""

import http.client
import itertools
import json
import select
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sentencepiece
import torch
from helpers.environment import ENVIRONMENT, ROOT
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

HEADER = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
GREEDY = {"temperature": 0, "max_new_tokens": 40}
POISON = "鸟"
"""A character whose embedding is not a number, so that an answer to it fails while it is made."""


class Server:
    """A running api_stream.py."""

    def __init__(self, folder) -> None:
        command = [
            sys.executable,
            "-u",
            "api_stream.py",
            "--base_model",
            str(folder),
            "--lora_weights",
            "",
            "--port",
            "0",
        ]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.log: list[str] = []
        while not self.log or "Ready" not in self.log[-1]:
            assert select.select([self.process.stdout], [], [], 120)[0], "the server did not start"
            line = self.process.stdout.readline()
            assert line, "".join(self.log)
            self.log.append(line)
        self.port = int(self.log[-1].split("127.0.0.1:")[1].split("/")[0])

    def post(self, body: object, content_type: str = "application/json") -> tuple[int, dict]:
        """HTTP status and answer; `body` is sent as it is where it is bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/stream", raw, {"Content-Type": content_type} if content_type else {})
        answer = connection.getresponse()
        content = json.loads(answer.read())
        connection.close()
        return answer.status, content

    def ask(self, **body) -> list[dict]:
        """Every answer until [stop]."""
        answers = []
        while not answers or "[stop]" not in answers[-1]["response"]:
            status, answer = self.post(body)
            assert status == 200, answer
            answers.append(answer)
            assert len(answers) < 5000
        return answers


@pytest.fixture(scope="module")
def model_folder(tiny_model, tmp_path_factory):
    """The tiny model, with the one poisoned embedding."""
    folder = tmp_path_factory.mktemp("api") / "model"
    shutil.copytree(tiny_model, folder)
    tensors = load_file(folder / "model.safetensors")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tensors["model.embed_tokens.weight"][processor.encode("a" + POISON)[-1]] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def server(model_folder):
    server = Server(model_folder)
    yield server
    server.process.terminate()
    server.process.wait(30)
    server.process.stdout.close()


@pytest.fixture(scope="module")
def greedy(tiny_model):
    """Prompt text, in parts between which EOS stands -> the answer that transformers gives."""
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tiny_model / "tokenizer.model"))

    def answer(prompt: str, *after_end: str) -> str:
        ids = [1, *processor.encode(prompt), *(i for text in after_end for i in (2, *processor.encode(text)))]
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            do_sample=False,
            max_new_tokens=40,
            pad_token_id=2,
        )
        # An answer whose last character was cut off goes without it.
        return processor.decode(out[0, len(ids) :].tolist()).rstrip("\ufffd")

    return answer


def test_the_answer_grows_to_what_the_model_says(server, greedy):
    expected = greedy(f"{HEADER}### Instruction:\n你好\n\n### Response:")
    assert len(expected) > 20
    answers = server.ask(prompt="你好", history=[], **GREEDY)
    assert {"response", "history", "status", "time", "session_id"} <= set(answers[0])
    assert answers[-1]["response"] == expected.lstrip("\n") + "[stop]"
    assert answers[-1]["history"] == [["你好", expected]]
    assert {answer["status"] for answer in answers} == {200}
    assert len({answer["session_id"] for answer in answers}) == 1
    for earlier, later in itertools.pairwise(answers):
        assert later["response"].startswith(earlier["response"])
    time.strptime(answers[-1]["time"], "%Y-%m-%d %H:%M:%S")


def test_history_is_part_of_the_prompt(server, greedy):
    expected = greedy(
        f"{HEADER}### Instruction:\n天气\n\n### Response:挺冷。",
        "\n\n### Instruction:\n你好\n\n### Response:",
    )
    assert expected != greedy(f"{HEADER}### Instruction:\n你好\n\n### Response:")
    last = server.ask(prompt="你好", history=[["天气", "挺冷。"]], **GREEDY)[-1]
    assert last["response"] == expected.lstrip("\n") + "[stop]"
    assert last["history"] == [["天气", "挺冷。"], ["你好", expected]]


def test_what_the_model_is_told_before_is_part_of_the_prompt(server, greedy):
    expected = greedy(f"Be brief.\n\n{HEADER}### Instruction:\n你好\n\n### Response:")
    assert expected != greedy(f"{HEADER}### Instruction:\n你好\n\n### Response:")
    assert server.ask(prompt="你好", system="Be brief.", **GREEDY)[-1]["response"] == expected.lstrip("\n") + "[stop]"


def test_clients_with_sessions_have_streams_of_their_own(server):
    """At temperature 1 two draws differ; each client sees one of them, whole, from its first character on."""
    draws = {"prompt": "请写一首诗", "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 60}
    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(lambda name: server.ask(session_id=name, **draws), ["甲", "乙", "甲"]))
    assert [one[-1]["session_id"] for one in answers] == ["甲", "乙", "甲"]
    assert answers[0][-1]["response"] == answers[2][-1]["response"] != answers[1][-1]["response"]
    for one in answers:
        assert all(one[-1]["response"].startswith(answer["response"].removesuffix("[stop]")) for answer in one)


def test_without_sessions_equal_requests_share_a_stream_and_its_end_can_be_asked_for_again(server):
    draws = {"prompt": "春眠不觉晓", "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 60}
    with ThreadPoolExecutor(2) as clients:
        one, other = (future.result() for future in [clients.submit(server.ask, **draws) for _client in range(2)])
    assert one[-1]["response"] == other[-1]["response"]
    assert server.post(draws)[1]["response"] == one[-1]["response"]
    assert server.ask(**draws, session_id=one[-1]["session_id"])[0]["response"] == one[-1]["response"]


def test_the_seed_fixes_an_answer_and_sampling_fields_count(server):
    fields = {"prompt": "数字", "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 20}
    drawn = [
        server.ask(session_id=name, seed=seed, **fields)[-1]["response"]
        for name, seed in (("s1", 1), ("s2", 1), ("s3", 2))
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    likeliest = server.ask(prompt="数字", temperature=0, max_new_tokens=20)[-1]["response"]
    assert server.ask(session_id="s4", **(fields | {"top_k": 1}))[-1]["response"] == likeliest
    assert len(server.ask(prompt="数字", temperature=0, max_new_tokens=3)[-1]["response"]) < len(likeliest)


def test_a_failed_answer_says_why_and_the_server_lives_on(server, greedy):
    answers = server.ask(prompt=f"{POISON}叫", temperature=1.0)
    assert answers[-1]["status"] == 500
    assert "RuntimeError" in answers[-1]["response"]
    assert answers[-1]["response"].endswith("[stop]")
    expected = greedy(f"{HEADER}### Instruction:\n天气\n\n### Response:")
    assert server.ask(prompt="天气", **GREEDY)[-1]["response"] == expected.lstrip("\n") + "[stop]"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "prompt"),
        ({"prompt": 2024}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": "a\ud800"}, "prompt"),
        ({"prompt": "a", "history": "b"}, "history"),
        ({"prompt": "a", "history": [["b"]]}, "history.0"),
        ({"prompt": "a", "history": [["b", "c"], ["d", 1]]}, "history.1.1"),
        ({"prompt": "a", "history": [["b", "\udfff"]]}, "history.0.1"),
        ({"prompt": "a", "session_id": 5}, "session_id"),
        ({"prompt": "a", "session_id": "\ud83d"}, "session_id"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"prompt": "a", "top_p": 0}, "top_p"),
        ({"prompt": "a", "top_k": 1.5}, "top_k"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
        ({"prompt": "a", "max_new_tokens": True}, "max_new_tokens"),
        ({"prompt": "a", "seed": 2**63}, "seed"),
        ({"prompt": "a", "temprature": 0.5}, "body.temprature: no such field; there are prompt, "),
        ([], "body"),
        (b'{"prompt": ', "body"),
        (b'{"prompt": "\xc4\xe3"}', "body"),
        (b"", "body"),
        (b"[" * 100_000, "body"),
    ],
)
def test_malformed_bodies_name_their_field(server, body, field):
    status, answer = server.post(body)
    assert 400 <= status < 500
    assert answer["status"] == status
    assert field in answer["response"]
    assert answer["response"].endswith("[stop]"), "a client that polls must not wait for ever"


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_a_body_that_is_not_sent_as_json_is_told_the_header(server, content_type):
    status, answer = server.post({"prompt": "你好"}, content_type)
    assert (status, answer["status"]) == (415, 415)
    assert "with the header Content-Type: application/json" in answer["response"]
    assert (content_type or "missing") in answer["response"]
    assert answer["response"].endswith("[stop]")


def test_a_prompt_beyond_the_context_is_refused(server):
    for body in ({"prompt": "龘" * 300}, {"prompt": "a", "history": [["你" * 200, "好" * 200]] * 2}):
        status, answer = server.post(body)
        assert (status, answer["status"]) == (413, 413)
        assert "prompt" in answer["response"]
        assert "512" in answer["response"]


def test_many_clients_at_once(server):
    """Every one gets its own answer, whatever the others do."""
    alone = {str(n): server.ask(prompt=f"第{n}个", **GREEDY)[-1]["response"] for n in range(3)}

    def client(number: int) -> bool:
        return (
            server.ask(prompt=f"第{number % 3}个", session_id=f"c{number}", **GREEDY)[-1]["response"]
            == alone[str(number % 3)]
        )

    with ThreadPoolExecutor(6) as clients:
        assert all(clients.map(client, range(12)))


def test_it_is_reachable_from_this_machine_alone_and_says_nothing_while_it_serves(server):
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().split("\n")[1:] if row]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{server.port:04X}")]
    assert listening == [f"0100007F:{server.port:04X}"]
    assert not select.select([server.process.stdout], [], [], 0)[0], server.process.stdout.readline()
