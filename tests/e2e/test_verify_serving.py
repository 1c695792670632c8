"""verify_serving.py against servers that do what servers do: right ones, and those with the common mistakes."""

import contextlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path

import pytest
import uvicorn
from helpers.command_runs import run_script
from helpers.fake_chat_server import FakeChatServer

from configs.errors import NetworkGaveUpError, UserError
from configs.serving import Sampling
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.prompt import PromptTemplate
from inference import verify_serving
from inference.engine import Engine, Statistics
from inference.loading import load_engine
from inference.web.polling import listen, make_app
from inference.web.stream_sessions import StreamSessions

pytestmark = pytest.mark.usefixtures("english")
QUESTIONS = [
    {"prompt": "你好"},
    {"instruction": "春眠不觉晓", "input": "下一句？", "output": "处处闻啼鸟。"},
    {"messages": [{"role": "system", "content": "简短。"}, {"role": "user", "content": "a  b\n\n c"}]},
]


@pytest.fixture(scope="module")
def engine(tiny_model) -> Engine:
    return load_engine(str(tiny_model), "", None)


@pytest.fixture
def verify(tiny_model, tmp_path):
    """Runs the command against a server, and returns what its report file holds."""

    def verify(url: str, base: Path = tiny_model, **more) -> dict:
        prompts, report = tmp_path / "questions.jsonl", tmp_path / "report.json"
        report.unlink(missing_ok=True)
        prompts.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS), encoding="utf-8")
        settings = {"prompts": str(prompts), "max_new_tokens": 12, "lora_weights": "", "report": str(report), **more}
        try:
            found = verify_serving.main(endpoint=url, base_model=str(base), **settings)
        except UserError:
            if not report.exists():
                raise
            found = None
        written = json.loads(report.read_text(encoding="utf-8"))
        assert written["same"] == (found is not None)
        return written

    return verify


def reasons(report: dict) -> list[list[str]]:
    """The likely reasons by question."""
    return [comparison["reasons"] for comparison in report["comparisons"]]


def all_reasons(report: dict) -> set[str]:
    """The likely reasons of all questions."""
    return {*chain(*reasons(report))}


@pytest.mark.parametrize(("kind", "prompt"), [("vllm", "same"), ("llama.cpp", "same"), ("plain", "same number")])
def test_a_server_that_does_all_right(engine, verify, capsys, kind, prompt):
    with FakeChatServer(engine, kind) as server:
        report = verify(server.url + "/v1/", timeout=60)
    assert report["same"] and reasons(report) == [[], [], []]
    assert [comparison["prompt"] for comparison in report["comparisons"]] == [prompt] * 3
    differences = [comparison["logprob_difference"] for comparison in report["comparisons"]]
    assert differences == [None] * 3 if kind == "plain" else max(differences) < 1e-4
    assert server.asked[-1]["messages"] == QUESTIONS[2]["messages"] and server.asked[-1]["temperature"] == 0
    assert server.asked[1]["messages"][-1]["content"] == "春眠不觉晓\n下一句？" or kind == "plain"
    assert "answers as our own engine does: 3 of 3" in capsys.readouterr().out


def test_bos_twice_or_missing(engine, verify):
    for fault, reason in ((lambda ids: [1, *ids], "bos_twice"), (lambda ids: ids[1:], "bos_missing")):
        for kind in ("vllm", "llama.cpp", "plain"):
            with FakeChatServer(engine, kind, fault) as server:
                assert reasons(verify(server.url)) == [[reason]] * 3, kind


def test_the_space_behind_bos_is_lost(engine, verify, capsys):
    def lose(ids: list[int]) -> list[int]:
        piece = engine.tokenizer.spell(ids[1:2])
        assert piece[0] == "▁"
        return [1, *(engine.tokenizer._backend.token_to_id(letter) for letter in piece[1:]), *ids[2:]]

    for kind in ("vllm", "llama.cpp"):
        with FakeChatServer(engine, kind, lose) as server:
            assert reasons(verify(server.url)) == [["spaces"]] * 3
    assert "here '<s>▁Be" in capsys.readouterr().out


def test_another_template(engine, verify, capsys):
    words = PromptTemplate.alpaca(engine.tokenizer)
    other = PromptTemplate("other", words.source.replace("### Response:", "### Answer:"), words.stop_text)
    served = Engine(engine.model, ChatEncoder(other, engine.tokenizer))
    for kind in ("vllm", "llama.cpp"):
        with FakeChatServer(served, kind) as server:
            assert reasons(verify(server.url)) == [["template"]] * 3
        assert "Response:', there '" in capsys.readouterr().out


def test_special_tokens_of_a_user_stand_apart(engine, verify, tmp_path, capsys):
    questions = tmp_path / "own.txt"
    questions.write_text("你好\nWhat is </s>?\n", encoding="utf-8")
    with FakeChatServer(engine, "llama.cpp") as server:
        report = verify(server.url, prompts=str(questions))
    assert report["same"] and reasons(report) == [[], ["special_as_text"]]
    assert [comparison["spells_tokens"] for comparison in report["comparisons"]] == [False, True]
    assert "What is </s>? (apart)" in capsys.readouterr().out


def test_a_server_that_goes_on_after_the_end(engine, tiny_model, verify, tmp_path, capsys):
    """Our model has one more end token, which it comes to in its first answer."""
    statistics = Statistics()
    list(engine.stream(engine.encode_chat("你好"), Sampling(12, temperature=0), statistics))
    ids = statistics.token_ids
    end = next(i for i in ids[4:] if i not in ids[:4])
    folder = shutil.copytree(tiny_model, tmp_path / "ends")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    with FakeChatServer(engine) as server:
        report = verify(server.url, folder)
    assert reasons(report)[0] == ["stop"]
    assert report["comparisons"][0]["finish_reasons"] == ["stop", "length"]


def test_weights_that_are_rounded_or_others(engine, tiny_model, verify):
    with FakeChatServer(load_engine(str(tiny_model), "", "8bit")) as server:
        report = verify(server.url, tolerance=0.0001)
        assert all_reasons(report) == {"quantization"}
        assert verify(server.url, tolerance=1)["same"]
    other = load_engine(str(tiny_model), "", None)
    other.model.lm_head.weight.data.mul_(20)
    with FakeChatServer(other) as server:
        assert all_reasons(verify(server.url)) == {"weights"}


def test_a_server_that_can_not_be_asked(engine, verify):
    with FakeChatServer(engine, key="secret") as server:
        with pytest.raises(UserError, match="--api_key"):
            verify(server.url)
        assert verify(server.url, api_key="secret")["same"]
    with FakeChatServer(engine) as server, pytest.raises(UserError, match="Its models: served"):
        verify(server.url, model="other")
    with FakeChatServer(engine, status=500) as server, pytest.raises(UserError, match="told to fail"):
        verify(server.url)
    with FakeChatServer(engine, status=503) as server, pytest.raises(NetworkGaveUpError, match="told to fail"):
        verify(server.url)
    with pytest.raises(NetworkGaveUpError, match="does not answer"):
        verify(server.url)


@pytest.mark.parametrize(
    "changed",
    [
        {"usage": {"prompt_tokens": "many"}},
        {"choices": [{"message": {"content": 5}}]},
        {"choices": [{"message": {"content": "a"}, "logprobs": {"content": [{"bytes": [999], "logprob": -1.0}]}}]},
        {"choices": [{"message": {"content": "a"}, "logprobs": {"content": [{"token": "a", "logprob": None}]}}]},
    ],
    ids=["count", "text", "bytes", "log-probability"],
)
def test_a_server_whose_answers_have_another_form(engine, verify, monkeypatch, changed):
    complete = FakeChatServer.complete
    monkeypatch.setattr(FakeChatServer, "complete", lambda server, body: complete(server, body) | changed)
    with FakeChatServer(engine) as server, pytest.raises(UserError, match="does not speak OpenAI's protocol"):
        verify(server.url)


def test_half_a_character_of_a_servers_answer_is_told_and_reported(engine, verify, monkeypatch):
    choice = {"message": {"content": "\ud83d"}, "finish_reason": "stop"}
    monkeypatch.setattr(FakeChatServer, "complete", lambda *_arguments: {"choices": [choice]})
    with FakeChatServer(engine) as server:
        assert {each["answer_difference"]["served"] for each in verify(server.url)["comparisons"]} == {"?"}


def test_an_answer_without_an_end_is_not_waited_for(verify, monkeypatch):
    """Neither one that comes drop by drop, nor one that would fill the memory."""

    class Endless(BaseHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # whoever listens goes
                while True:
                    self.wfile.write(b" " * 1000)

    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(NetworkGaveUpError, match=r"an answer without an end for 0\.1 seconds"):
            verify(url, timeout=0.1)
        monkeypatch.setattr("inference.serving_check.endpoint.LONGEST_ANSWER", 10_000)
        with pytest.raises(UserError, match="does not speak OpenAI's protocol"):
            verify(url)
        server.shutdown()


@pytest.mark.parametrize("kind", ["vllm", "plain"])
def test_thoughts_that_a_server_takes_out_of_an_answer_belong_to_it(engine, verify, monkeypatch, kind):
    complete = FakeChatServer.complete

    def take_out(server: FakeChatServer, body: dict) -> dict:
        completion = complete(server, body)
        message = completion["choices"][0]["message"]
        message["reasoning_content"], message["content"] = message["content"][:3], message["content"][3:]
        return completion

    monkeypatch.setattr(FakeChatServer, "complete", take_out)
    with FakeChatServer(engine, kind) as server:
        assert verify(server.url)["same"]


def test_a_proxy_for_the_world_outside_is_not_asked_for_this_machine(engine, verify, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with FakeChatServer(engine) as server:
        assert verify(server.url)["same"]


def test_a_server_that_is_none(engine, verify, monkeypatch):
    monkeypatch.setattr(FakeChatServer, "answer", lambda *_arguments: (404, {}))
    with FakeChatServer(engine) as server, pytest.raises(UserError, match="does not speak OpenAI's protocol"):
        verify(server.url)


@pytest.fixture
def polled(engine):
    """api_stream.py's app over the engine, on a port of its own."""
    listener = listen("127.0.0.1", 0)
    sessions = StreamSessions()
    server = uvicorn.Server(uvicorn.Config(make_app(engine, Sampling(), sessions), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    sessions.close()


def test_our_own_server_by_polling(polled, verify):
    report = verify(polled)
    assert report["same"] and {comparison["prompt"] for comparison in report["comparisons"]} == {"not told"}


def test_the_exit_statuses_of_a_process(engine, tiny_model):
    """With the built-in questions, and one that spells special tokens out."""
    flags = ["--base_model", tiny_model, "--lora_weights", "", "--max_new_tokens", 4]
    with FakeChatServer(engine) as server:
        done = run_script("inference/verify_serving.py", "--endpoint", server.url, *flags)
    assert done.returncode == 0, done.stderr
    assert "12 of 12 questions" in done.stdout and "(apart)" in done.stdout
    with FakeChatServer(engine, fault=lambda ids: [1, *ids]) as server:
        done = run_script("inference/verify_serving.py", "--endpoint", server.url, *flags)
    assert done.returncode == 2 and "12  BOS twice: " in done.stderr
    assert run_script("inference/verify_serving.py", "--endpoint", server.url, *flags).returncode == 3
