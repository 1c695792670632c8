"""generate.py as a person and as a script use it; answers are compared with transformers' own greedy generation."""

import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time

import pytest
import sentencepiece
import torch
from helpers.command_runs import call_main, run_script
from helpers.environment import ENVIRONMENT, ROOT
from transformers import LlamaForCausalLM

import generate
from configs.errors import UserError
from configs.serving import Sampling
from inference.terminal.chat import Chat

HEADER = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
TOKENS = 20


@pytest.fixture(scope="module")
def model_folder(tiny_model, tmp_path_factory):
    """The tiny model with a long context, so that an answer can take a while."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20_000}))
    return folder


@pytest.fixture(scope="module")
def greedy(model_folder):
    """A question after earlier turns -> the answer that transformers gives, of TOKENS tokens."""
    model = LlamaForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_folder / "tokenizer.model"))

    def answer(question: str, *history: tuple[str, str]) -> str:
        turns = "".join(f"### Instruction:\n{q}\n\n### Response:{a}\n\n" for q, a in history)
        ids = [1, *processor.encode(f"{HEADER}{turns}### Instruction:\n{question}\n\n### Response:")]
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            do_sample=False,
            max_new_tokens=TOKENS,
            pad_token_id=2,
        )
        return processor.decode(out[0, len(ids) :].tolist()).rstrip("\ufffd")

    return answer


def flags(model_folder, *more: str) -> list[str]:
    return ["--base_model", str(model_folder), "--lora_weights", "", "--temperature", "0", *more]


@pytest.mark.parametrize("question", ["2024", "[你好]", "a # b", "--你好", "你好, 世界", "None", "--help"])
def test_any_text_is_a_question(model_folder, greedy, question, capsys):
    call_main(generate.main, *flags(model_folder, "--max_new_tokens", str(TOKENS), "--prompt", question))
    captured = capsys.readouterr()
    assert captured.out == greedy(question) + "\n"
    assert re.fullmatch(rf"\[{TOKENS} tokens, [\d.]+ tokens/s\] \(cut off at the length limit\)\n", captured.err)


def test_the_base_model_answers_differently_from_question_to_question(greedy):
    """Otherwise these tests could not tell whether the question arrived."""
    assert len({greedy(question) for question in ("2024", "[你好]", "a # b", "--你好", "None")}) == 5


def test_one_question_in_a_process_of_its_own(model_folder, greedy):
    done = run_script(
        "generate.py", *flags(model_folder, "--max_new_tokens", str(TOKENS), "--top_k", "1", "--prompt", "--你好")
    )
    assert (done.returncode, done.stdout) == (0, greedy("--你好") + "\n")
    assert re.fullmatch(r"\[20 tokens, .*\n", done.stderr), "nothing but the speed, no library's noise"


def test_questions_from_a_pipe(model_folder, greedy):
    lines = [
        "你好",
        "再见",
        "/undo",
        "[你好]",
        "/new",
        "/undo",
        "再见",
        "",
        "/params top_p 2",
        "/params top_k=5",
        "/params top_k",
        "/parms",
        "/ 再见",
        "/exit",
        "x",
    ]
    done = run_script(
        "generate.py", *flags(model_folder, "--max_new_tokens", str(TOKENS)), input="\n".join(lines) + "\n"
    )
    first = ("你好", greedy("你好"))
    expected = [
        first[1],
        greedy("再见", first),
        "Taken back: 再见",
        greedy("[你好]", first),
        "A new conversation.",
        "Nothing to undo.",
        greedy("再见"),
        "top_p 2: top_p 2.0: must be above 0 and at most 1",
        "max_new_tokens=20  temperature=0.0  top_p=0.9  top_k=5  repetition_penalty=1.0  seed=None",
        "top_k=5",
        "There is no command /parms; /help lists those that there are.",
        "There is no command /; /help lists those that there are.",
    ]
    assert greedy("再见", first) != greedy("再见"), "the history must matter for this to prove anything"
    assert done.returncode == 0
    assert done.stdout == re.sub("\r\n?", "\n", "\n".join(expected) + "\n")
    assert done.stderr.count("20 tokens, ") == 4


def test_the_base_model_is_found_in_the_adapters_record(tmp_path, monkeypatch):
    fixture = ROOT / "tests" / "fixtures" / "first_format"
    expected = json.loads((fixture / "expected.json").read_text(encoding="utf-8"))
    monkeypatch.chdir(shutil.copytree(fixture, tmp_path / "run"))  # whose record says `base`
    settings = {"temperature": 0, "repetition_penalty": 1.6, "max_new_tokens": 24, "load_8bit": True}
    ask = {"prompt": expected["question"], "lora_weights": "finished", **settings}
    assert generate.main(**ask) == generate.main(**ask, base_model="base") == expected["answer"]
    shutil.move("base", "moved")
    with pytest.raises(UserError, match="adapter in finished was trained over base, and there is no such folder"):
        generate.main(**ask)
    assert generate.main(**ask, base_model="moved") == expected["answer"]


def test_help_names_every_command_and_a_space_makes_a_question_of_one(model_folder, greedy, monkeypatch, capsys):
    lines = "/help\n /parms\n/etc/passwd\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
    call_main(generate.main, *flags(model_folder, "--max_new_tokens", str(TOKENS)))
    said, speeds = capsys.readouterr()
    source = (ROOT / "inference/terminal/chat.py").read_text(encoding="utf-8")
    commands = set(re.findall(r'command == "(/\w+)"', source)) - {"/help"}
    assert set(re.findall(r"^/\w+", said.partition("Ctrl-C")[0], re.MULTILINE)) == commands >= {"/new", "/exit"}
    assert f"before it.\n{greedy(' /parms')}\n" in said
    assert speeds.count("20 tokens, ") == 2


def test_a_pipe_that_ends_without_exit_and_bytes_that_are_no_text(model_folder, greedy, monkeypatch, capsys):
    arguments = flags(model_folder, "--max_new_tokens", str(TOKENS))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好".encode()), encoding="utf-8"))
    call_main(generate.main, *arguments)
    assert capsys.readouterr().out == greedy("你好") + "\n"
    gbk = io.TextIOWrapper(io.BytesIO("你好\n".encode("gbk")), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", gbk)
    with pytest.raises(UserError, match="not UTF-8"):
        call_main(generate.main, *arguments)


def test_an_impatient_second_ctrl_c_ends_the_answer_and_not_the_conversation(monkeypatch, capsys):
    class Engine:
        def recent_turns(self, question, history, room, system):
            return history

        def encode_chat(self, question, turns, system):
            return question

        def stream(self, question, sampling, statistics):
            yield f"to {question}"
            raise KeyboardInterrupt

    def press_again(_statistics):
        raise KeyboardInterrupt

    monkeypatch.setattr("inference.terminal.chat._print_speed", press_again)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    chat = Chat(Engine(), Sampling())
    chat.run()
    assert chat.history == [("one", "to one"), ("two", "to two")]
    assert capsys.readouterr().out == "to one\nto two\n"


class Terminal:
    """A program on a terminal of its own, with a person who types and reads."""

    LAUNCH = "import os, sys; os.login_tty(int(sys.argv[1])); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"

    def __init__(self, *arguments: str) -> None:
        self.master, slave = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.LAUNCH, str(slave), *arguments],
            cwd=ROOT,
            env={**ENVIRONMENT, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
            pass_fds=[slave],
        )
        os.close(slave)
        self.raw = b""
        self.seen = 0

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def read_until(self, pattern: str, timeout: float = 40) -> str:
        """What came since the last call, without colours and cursor movements, up to `pattern`."""
        deadline = time.monotonic() + timeout
        while True:
            text = re.sub(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[()][AB0]|[=>78])", "", self.raw.decode(errors="replace"))
            if found := re.search(pattern, text[self.seen :]):
                since = text[self.seen : self.seen + found.end()]
                self.seen += found.end()
                return since
            assert time.monotonic() < deadline, f"no {pattern!r} in {text[self.seen :]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                self.raw += os.read(self.master, 65536)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(model_folder):
    terminal = Terminal("generate.py", *flags(model_folder, "--max_new_tokens", "12"))
    yield terminal
    terminal.close()


def test_a_conversation_in_a_terminal(terminal):
    backspace, left, up, interrupt = "\x7f", "\x1b[D", "\x1b[A", "\x03"
    assert "/new /undo /params /exit" in terminal.read_until(">")

    # Editing moves over whole characters, two columns wide or not.
    terminal.type(
        f"你们好吗{backspace}{left}的{left}{left}{backspace}我\r"
    )  # 你们好 -> 你们的好 -> 你|们的好 -> 我们的好
    terminal.read_until(r"\[12 tokens, [\d.]+ tokens/s\]")
    terminal.read_until(">")
    terminal.type("/undo\r")
    terminal.read_until("Taken back: 我们的好\r\n")
    terminal.type("/undo\r")
    terminal.read_until("Nothing to undo")

    # An earlier line can be called back.
    terminal.type(f"{up}{up}{up}\r")
    terminal.read_until(r"\[12 tokens")
    terminal.type("/undo\r")
    terminal.read_until("Taken back: 我们的好")

    # Several lines are one question: pasted, after Alt-Enter, and between quotes.
    for keys in ("\x1b[200~天\n气\x1b[201~\r", "天\x1b\r气\r", '"""天\r气"""\r'):
        terminal.read_until(">")
        terminal.type(keys)
        terminal.read_until(r"\[12 tokens")
        terminal.read_until(">")
        terminal.type("/undo\r")
        terminal.read_until("Taken back: 天\r\n气\r\n")

    # Ctrl-C clears a line; during an answer it ends that answer, and what came of it stays in the conversation.
    terminal.read_until(">")
    terminal.type(f"不要了{interrupt}")
    terminal.type("/params max_new_tokens 19000\r")
    terminal.read_until("max_new_tokens=19000")
    terminal.type("讲个故事\r")
    terminal.read_until("讲个故事\r*\n")
    terminal.read_until(r"(?s).{80}")  # it streams: the whole answer would take far longer than this test
    terminal.type(interrupt)
    tokens = int(re.search(r"\[(\d+) tokens", terminal.read_until(r"tokens/s\] \(stopped\)", timeout=20))[1])
    assert 0 < tokens < 19000
    terminal.type("/undo\r")
    terminal.read_until("Taken back: 讲个故事")
    terminal.type("/new\r")
    terminal.read_until("A new conversation")
    terminal.read_until(">")
    terminal.type("/exit\r")
    assert terminal.process.wait(30) == 0
