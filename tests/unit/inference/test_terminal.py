"""What a conversation says beside the answers, with an engine that is told what to answer."""

import io
import json

import pytest

from configs.serving import Sampling
from inference.engine import PromptRefused, Statistics
from inference.terminal.chat import Chat, answer_once

pytestmark = pytest.mark.usefixtures("english")


class ToldEngine:
    """Answers everything with two pieces; keeps so many earlier turns."""

    def __init__(self, turns: int = 99, finish_reason: str = "stop") -> None:
        self.turns, self.finish_reason, self.asked = turns, finish_reason, []
        self.systems, self.seeds = [], []

    def recent_turns(self, _prompt, history, room, _system):
        assert room == 7
        return history[max(0, len(history) - self.turns) :]

    def encode_chat(self, prompt, history=(), system=""):
        if "refuse" in system + prompt:
            raise PromptRefused("not taken")
        if prompt != "?":  # with which a system message is tried
            self.asked.append((prompt, list(history)))
            self.systems.append(system)
        return [1]

    def stream(self, _prompt_ids, sampling, statistics: Statistics):
        self.seeds.append(sampling.seed)
        statistics.new_tokens, statistics.seconds, statistics.finish_reason = 11, 2.0, self.finish_reason
        yield from ("an ", "answer")


@pytest.fixture
def talk(monkeypatch):
    def talk(engine: ToldEngine, *lines: str) -> None:
        monkeypatch.setattr("inference.terminal.chat._lines", lambda: iter(lines))
        Chat(engine, Sampling(max_new_tokens=7)).run()

    return talk


@pytest.mark.parametrize(
    ("reason", "told"), [("stop", ""), ("length", " (cut off at the length limit)"), ("cancelled", " (stopped)")]
)
def test_why_an_answer_ended_and_how_fast_it_came(talk, capsys, reason, told):
    assert answer_once(ToldEngine(finish_reason=reason), "a", Sampling()) == "an answer"
    assert capsys.readouterr() == ("an answer\n", f"[11 tokens, 5.0 tokens/s]{told}\n")
    talk(ToldEngine(finish_reason=reason), "a")
    assert capsys.readouterr() == ("an answer\n", f"[11 tokens, 5.0 tokens/s]{told}\n")


def test_turns_that_no_longer_fit_are_left_out_told_and_not_forgotten(talk, capsys):
    engine = ToldEngine(turns=1)
    talk(engine, "a", "b", "c", "d", "/undo", "/undo", "/undo", "e")
    assert engine.asked == [
        (question, [(turn, "an answer") for turn in turns])
        for question, turns in (("a", ""), ("b", "a"), ("c", "b"), ("d", "c"), ("e", "a"))
    ]
    told = [line for line in capsys.readouterr().err.splitlines() if "turns" in line]
    assert told == [f"(The first {count} turns no longer fit and are left out.)" for count in (1, 2)]


def test_the_system_message_is_set_shown_kept_and_taken_away(talk, capsys):
    engine = ToldEngine()
    talk(
        engine, "/system", "/system Be  brief. ", "a", "/new", "b", "/system", "/system refuse", "c", "/system ''", "d"
    )
    assert engine.systems == ["Be  brief.", "Be  brief.", "Be  brief.", ""]
    assert capsys.readouterr().out.splitlines() == [
        "There is no system message.",
        "Be  brief.",
        "an answer",
        "A new conversation.",
        "an answer",
        "Be  brief.",
        "not taken",
        "an answer",
        "There is no system message.",
        "an answer",
    ]


def test_the_system_message_of_the_command_line(capsys):
    engine = ToldEngine()
    answer_once(engine, "a", Sampling(), "Be brief.")
    assert engine.systems == ["Be brief."]
    assert Chat(engine, Sampling(), "Be brief.").system == "Be brief."


def test_a_question_asked_again_has_another_seed_and_its_answer_the_place_of_the_last_one(talk, monkeypatch, capsys):
    engine = ToldEngine()
    monkeypatch.setattr(
        "inference.terminal.chat._lines", lambda: iter(["/retry", "a", "b", "/retry", "/retry", "c", "/retry"])
    )
    chat = Chat(engine, Sampling(max_new_tokens=7, seed=2**63 - 2))
    chat.run()
    a, b, c = (("a", "an answer"), ("b", "an answer"), ("c", "an answer"))
    assert engine.asked == [("a", []), *[("b", [a])] * 3, *[("c", [a, b])] * 2]
    assert engine.seeds == [2**63 - 2, 2**63 - 2, 2**63 - 1, 0, 2**63 - 2, 2**63 - 1]
    assert chat.history == [a, b, c]
    assert capsys.readouterr().out.startswith("Nothing to ask again.\n")


def test_a_question_that_can_not_be_asked_again_stays_with_its_answer(monkeypatch, capsys):
    class Forgetful(ToldEngine):
        def encode_chat(self, prompt, history=(), system=""):
            if self.asked:
                raise PromptRefused("not taken")
            return super().encode_chat(prompt, history, system)

    monkeypatch.setattr("inference.terminal.chat._lines", lambda: iter(["a", "/retry"]))
    chat = Chat(Forgetful(), Sampling(max_new_tokens=7, temperature=0))
    chat.run()
    assert chat.history == [("a", "an answer")]
    said = capsys.readouterr()
    assert said.out == "an answer\nnot taken\n" and "At temperature 0" in said.err


def test_lines_between_quotes_are_one_question(monkeypatch, capsys):
    engine = ToldEngine()
    lines = '''"""
/new

  one"""
"""two"""
""""""
/system """
Be brief.
In Chinese."""
three "quoted"
"""not ended
four
'''
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
    Chat(engine, Sampling(max_new_tokens=7)).run()
    questions = [question for question, _history in engine.asked]
    assert questions == ["/new\n\n  one", "two", 'three "quoted"', "not ended\nfour"]
    assert engine.systems == ["", "", "Be brief.\nIn Chinese.", "Be brief.\nIn Chinese."]


def test_files_in_the_users_own_folder_and_names_that_no_file_can_have(talk, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    talk(ToldEngine(), "a", "/save ~/talk.jsonl", "/save a\0b.jsonl", "/save ~nobody-of-that-name/talk.jsonl")
    said = [line for line in capsys.readouterr().out.splitlines() if ".jsonl" in line]
    assert said[0] == f"Saved in {tmp_path / 'talk.jsonl'} (one more record for chat_dataset)."
    assert len(said) == 3 and all("can't be written" in line for line in said[1:])
    assert len((tmp_path / "talk.jsonl").read_text().splitlines()) == 1


def test_a_conversation_is_saved_as_a_record(talk, tmp_path, capsys):
    file = tmp_path / "talk of today.jsonl"
    talk(
        ToldEngine(),
        f"/save {file}",
        "a",
        "/save",
        f"/save {file}",
        "/system s",
        "b",
        f"/save {file}",
        "/save /x/y.jsonl",
    )
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "There is nothing to save." and told[2] == "Name a file: /save talk.jsonl"
    assert told[-1] == "/x/y.jsonl can't be written: No such file or directory."
    a, b = (
        [{"role": "user", "content": question}, {"role": "assistant", "content": "an answer"}]
        for question in ("a", "b")
    )
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"messages": a},
        {"messages": [{"role": "system", "content": "s"}, *a, *b]},
    ]
