"""Which sampling settings are taken, on the command line and over HTTP alike."""

import pytest
from pydantic import ValidationError

from configs.serving import ApiConfig, Sampling
from inference.web.polling import StreamRequest, make_app
from inference.web.stream_sessions import StreamSessions


@pytest.mark.parametrize(
    ("name", "taken", "refused", "problem"),
    [
        ("max_new_tokens", [1, 10**9], [0, -1], "must be at least 1"),
        ("temperature", [0, 0.3, 100], [-0.1, 100.1, float("nan"), float("inf")], "must be from 0 to 100"),
        ("top_p", [1e-300, 1], [0, -1, 1.01, float("nan")], "must be above 0 and at most 1"),
        ("top_k", [0, 7], [-1], "must be at least 0"),
        ("repetition_penalty", [0.01, 100], [0, 101, float("nan")], "must be above 0 and at most 100"),
        ("seed", [None, 0, 2**63 - 1], [-1, 2**63], "must be from 0 to 2^63 - 1"),
    ],
)
def test_both_take_the_same_numbers(name, taken, refused, problem):
    for value in taken:
        assert list(Sampling(**{name: value}).problems()) == []
        assert getattr(StreamRequest(prompt="a", **{name: value}), name) == value
    for value in refused:
        assert list(Sampling(**{name: value}).problems()) == [f"{name} {value}: {problem}"]
        assert list(ApiConfig(**{name: value}).problems()) == [f"--{name} {value}: {problem}"]
        with pytest.raises(ValidationError, match=name):
            StreamRequest(prompt="a", **{name: value})


def test_whole_numbers_are_not_read_from_anything_else():
    for name in ("max_new_tokens", "top_k", "seed"):
        for value in ("5", True, 5.5):
            with pytest.raises(ValidationError, match=name):
                StreamRequest(prompt="a", **{name: value})
    assert StreamRequest(prompt="a", temperature="0.5").temperature == 0.5


def test_the_description_of_the_interface_says_what_a_field_means_and_takes():
    app = make_app(None, Sampling(), StreamSessions())
    described = app.openapi()["components"]["schemas"]["StreamRequest"]["properties"]
    assert list(described)[:4] == ["prompt", "history", "session_id", "max_new_tokens"]
    assert described["top_p"]["anyOf"][0] == {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
    assert described["top_k"]["anyOf"][0] == {"type": "integer", "minimum": 0}
    assert described["temperature"]["description"] == "Lower is more certain; 0 = always the likeliest token."
