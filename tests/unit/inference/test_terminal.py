"""What a conversation says beside the answers, with an engine that is told what to answer."""

import pytest

from configs.serving import Sampling
from inference.engine import Statistics
from inference.terminal.chat import Chat, answer_once

pytestmark = pytest.mark.usefixtures("english")


class ToldEngine:
    """Answers everything with two pieces; keeps so many earlier turns."""

    def __init__(self, turns: int = 99, finish_reason: str = "stop") -> None:
        self.turns, self.finish_reason, self.asked = turns, finish_reason, []

    def recent_turns(self, _prompt, history, room):
        assert room == 7
        return history[max(0, len(history) - self.turns) :]

    def encode_chat(self, prompt, history=()):
        self.asked.append((prompt, list(history)))
        return [1]

    def stream(self, _prompt_ids, _sampling, statistics: Statistics):
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
