"""The polling contract, with a clock that the test moves and generators that the test feeds."""

import queue
import threading
import time

import pytest

from inference.web.stream_sessions import ABANDONED_SECONDS, REPLAY_SECONDS, StreamSessions

END = object()


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Model:
    """Generates what the test feeds to it; counts how often it was started."""

    def __init__(self) -> None:
        self.started = 0
        self.feeds: list[queue.Queue] = []
        self.cancels: list[threading.Event] = []

    def __call__(self, cancel: threading.Event):
        self.started += 1
        feed: queue.Queue = queue.Queue()
        self.feeds.append(feed)
        self.cancels.append(cancel)
        while (item := feed.get(timeout=20)) is not END:
            if isinstance(item, Exception):
                raise item
            yield item


def eventually(condition) -> None:
    """Wait until another thread has done its part."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def sessions(clock, model):
    sessions = StreamSessions(workers=2, clock=clock)
    yield sessions
    for feed in model.feeds:
        feed.put(END)
    sessions.close()


def finish(model, poll, text: str = "好") -> None:
    """Let the latest answer be `text`, and poll it to its end."""
    started = model.started
    eventually(lambda: len(model.feeds) == max(started, 1))
    model.feeds[-1].put(text)
    model.feeds[-1].put(END)
    eventually(lambda: poll().ended)


def test_repeated_polls_see_one_answer_grow(sessions, model):
    def poll():
        return sessions.poll("here", None, "你好", model)

    first = poll()
    assert (first.text, first.ended) == ("", False)
    eventually(lambda: model.started == 1)
    model.feeds[0].put("您")
    eventually(lambda: poll().text == "您")
    assert not poll().ended
    model.feeds[0].put("好")
    model.feeds[0].put(END)
    eventually(lambda: poll().ended)
    last = poll()
    assert (last.text, last.error, last.session_id) == ("您好", "", first.session_id)
    assert model.started == 1


def test_two_clients_with_the_same_prompt_and_sessions_of_their_own(sessions, model):
    sessions.poll("here", "a", "你好", model)
    sessions.poll("here", "b", "你好", model)
    eventually(lambda: model.started == 2)
    model.feeds[0].put("一")
    model.feeds[1].put("二")
    for feed in model.feeds:
        feed.put(END)
    eventually(lambda: all(sessions.poll("here", name, "你好", model).ended for name in "ab"))
    texts = {sessions.poll("here", name, "你好", model).text for name in "ab"}
    assert texts == {"一", "二"}
    assert sessions.poll("elsewhere", "a", "你好", model).text == sessions.poll("here", "a", "你好", model).text
    assert model.started == 2


def test_addresses_and_requests_are_told_apart(sessions, model):
    for address, request in (("here", "你好"), ("there", "你好"), ("here", "再见"), ("here", "你好")):
        sessions.poll(address, None, request, model)
    for feed_number in range(3):
        eventually(lambda number=feed_number: model.started > number)
        model.feeds[feed_number].put(END)
    eventually(lambda: sessions.poll("here", None, "再见", model).ended)
    assert model.started == 3


def test_whoever_goes_on_with_the_given_id_stays_with_the_stream(sessions, model):
    given = sessions.poll("here", None, "你好", model).session_id
    eventually(lambda: model.started == 1)
    model.feeds[0].put("您好")
    eventually(lambda: sessions.poll("behind a proxy", given, "你好", model).text == "您好")
    assert sessions.poll("here", None, "你好", model).session_id == given
    assert model.started == 1


def test_an_ended_answer_is_replayed_for_a_while_and_then_made_anew(sessions, model, clock):
    def poll():
        return sessions.poll("here", None, "你好", model)

    poll()
    finish(model, poll, "第一次")
    for _repeat in range(2):
        clock.now += REPLAY_SECONDS / 2
        assert (poll().text, poll().ended) == ("第一次", True)
    clock.now += 0.1
    fresh = poll()
    assert (fresh.text, fresh.ended) == ("", False)
    eventually(lambda: model.started == 2)
    finish(model, poll, "第二次")
    assert poll().text == "第二次"


def test_an_answer_whose_end_nobody_saw_yet_waits(sessions, model, clock):
    sessions.poll("here", "a", "你好", model)
    eventually(lambda: model.started == 1)
    model.feeds[0].put("好")
    model.feeds[0].put(END)
    clock.now += REPLAY_SECONDS * 3
    eventually(lambda: sessions.poll("here", "a", "你好", model).ended)
    assert sessions.poll("here", "a", "你好", model).text == "好"
    assert model.started == 1


def test_a_failure_is_told_and_the_next_answer_works(sessions, model, clock):
    def poll():
        return sessions.poll("here", None, "你好", model)

    poll()
    eventually(lambda: model.started == 1)
    model.feeds[0].put("半")
    model.feeds[0].put(RuntimeError("out of memory"))
    eventually(lambda: poll().ended)
    assert (poll().text, poll().error) == ("半", "RuntimeError: out of memory")
    clock.now += REPLAY_SECONDS + 1
    poll()
    eventually(lambda: model.started == 2)
    finish(model, poll)
    assert (poll().text, poll().error) == ("好", "")


def test_an_abandoned_answer_is_cancelled_even_if_nobody_comes_any_more(sessions, model, clock):
    sessions.poll("here", None, "你好", model)
    eventually(lambda: model.started == 1)
    clock.now += ABANDONED_SECONDS - 1
    model.feeds[0].put("一")
    eventually(lambda: model.feeds[0].empty())
    time.sleep(0.01)
    assert not model.cancels[0].is_set()
    clock.now += 2
    model.feeds[0].put("二")
    eventually(model.cancels[0].is_set)


def test_an_abandoned_answer_is_cancelled_when_another_client_comes(sessions, model, clock):
    sessions.poll("here", None, "你好", model)
    sessions.poll("here", None, "再见", model)
    eventually(lambda: model.started == 2)
    clock.now += ABANDONED_SECONDS - 1
    sessions.poll("here", None, "再见", model)
    clock.now += 2
    sessions.poll("here", None, "再见", model)
    assert sorted(cancel.is_set() for cancel in model.cancels) == [False, True]
    sessions.poll("here", None, "你好", model)
    for feed in list(model.feeds):
        feed.put(END)
    eventually(lambda: model.started == 3)


def test_what_waits_for_its_turn_is_never_started_once_abandoned(clock, model):
    sessions = StreamSessions(workers=1, clock=clock)
    sessions.poll("here", None, "first", model)
    eventually(lambda: model.started == 1)
    sessions.poll("here", None, "second", model)
    clock.now += ABANDONED_SECONDS + 1
    sessions.poll("here", None, "third", model)
    model.feeds[0].put(END)
    eventually(lambda: model.started == 2)
    model.feeds[1].put("三")
    model.feeds[1].put(END)
    eventually(lambda: sessions.poll("here", None, "third", model).ended)
    assert sessions.poll("here", None, "third", model).text == "三"
    sessions.close()
    assert model.started == 2


def test_closing_cancels_what_runs_and_what_waits(clock, model):
    sessions = StreamSessions(workers=1, clock=clock)
    sessions.poll("here", None, "first", model)
    eventually(lambda: model.started == 1)
    sessions.poll("here", None, "second", model)
    threading.Thread(target=lambda: (model.cancels[0].wait(20), model.feeds[0].put(END))).start()
    sessions.close()
    assert model.cancels[0].is_set()
    assert model.started == 1
