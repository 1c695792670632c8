"""How two answers compare, and which reason is named; every value is written by hand."""

from typing import get_args

import pytest
from helpers.chat_templates import chat_folder

from ft_datasets.tokenizer import Tokenizer
from inference.serving_check.comparison import Answer, Difference, Reason, Report, Token, compare, reasons_of_ids
from inference.serving_check.questions import Question
from inference.serving_check.words import REASONS, heading, row, verdict

pytestmark = pytest.mark.usefixtures("english")


@pytest.fixture(scope="module")
def tokenizer(tiny_model) -> Tokenizer:
    return Tokenizer(tiny_model)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> Tokenizer:
    return Tokenizer(chat_folder(tmp_path_factory.mktemp("chatml") / "model", "chatml"))


def answer(*pieces: tuple[str, float], finish_reason="length", ids=(1, 5), margin=2.0) -> Answer:
    """An answer of these pieces, each with its log-probability."""
    texts = ["".join(piece for piece, _logprob in pieces[: count + 1]) for count in range(len(pieces))]
    tokens = tuple(Token(text, logprob) for text, (_piece, logprob) in zip(texts, pieces, strict=True))
    return Answer(texts[-1], finish_reason, ids, len(ids), None, tokens, (margin,) * len(tokens))


A, B, C = ("a", -1.0), ("b", -0.5), ("c", -2.0)


def compared(tokenizer, own, served, tolerance=0.1):
    return compare(Question("?"), own, served, tokenizer, tolerance, spells_tokens=False)


@pytest.mark.parametrize(
    ("own", "served", "reason", "difference"),
    [
        (answer(A, B), answer(A, B), None, 0.0),
        (answer(A, B), answer(("a", -1.1), ("b", -0.5)), None, 0.05),
        (answer(A, B), answer(("a", -1.5), ("b", -1.2)), "quantization", 0.6),
        (answer(A, B), answer(("a", -3.0), ("b", -1.5)), "weights", 1.5),
        (answer(A, B, margin=0.05), answer(A, C), "rounding", 0.0),
        (answer(A, B, margin=0.5), answer(A, C), "quantization", 0.0),
        (answer(A, B, margin=1.5), answer(A, C), "quantization", 0.0),
        (answer(A, finish_reason="stop"), answer(A, B), "stop", 0.0),
        (answer(A, finish_reason="stop"), answer(A), "stop", 0.0),
        (answer(A, B), answer(A, finish_reason="stop"), "stop", 0.0),
        (answer(A, margin=0.05, finish_reason="stop"), answer(A, B), "rounding", 0.0),
        (answer(A, B, margin=0.05), answer(A, finish_reason="stop"), "rounding", 0.0),
        (answer(A, margin=0.05, finish_reason="stop"), answer(("a", -1.5), B), "quantization", 0.5),
        (answer(A, B), answer(A), "limit", 0.0),
        (answer(A, finish_reason="stop"), answer(A, finish_reason=""), None, 0.0),
        (answer((" \n", -3.0), A), answer(A), None, 0.0),  # blanks at the ends don't count
        (answer(A), answer(("a", -1.0), ("\n\ufffd ", -2.0)), None, 0.0),  # nor half a character there
    ],
)
def test_answers_to_the_same_prompt(tokenizer, own, served, reason, difference):
    comparison = compared(tokenizer, own, served)
    assert comparison.prompt == "same"
    assert comparison.reasons == ([reason] if reason else [])
    assert comparison.is_same == (reason in (None, "rounding"))
    assert comparison.logprob_difference == pytest.approx(difference)


def test_answers_of_servers_that_tell_no_log_probabilities(tokenizer):
    for margin, reason in ((0.05, "rounding"), (0.5, "quantization"), (1.5, "weights")):
        served = Answer("ac", "length", (1, 5), 2)
        comparison = compared(tokenizer, answer(A, B, margin=margin), served)
        assert (comparison.reasons, comparison.logprob_difference) == ([reason], None)


def test_a_token_that_the_server_has_not_chosen_tells_how_far_off_it_is(tokenizer):
    for logprob, reason, difference in ((-0.7, "quantization", 0.1), (-6.5, "weights", 3.0)):
        tokens = (Token("a", -1.0), Token("ac", -0.3, (("ac", -0.3), ("ab", logprob))))
        comparison = compared(tokenizer, answer(A, B), Answer("ac", "length", (1, 5), 2, None, tokens))
        assert (comparison.reasons, comparison.logprob_difference) == ([reason], pytest.approx(difference))


def test_tokens_that_make_one_character_together_and_of_which_one_is_listed(tokenizer):
    tokens = (Token("\ufffd", -3.0), Token("你", -1.0), Token("你\ufffd", -4.0), Token("你好", -2.0))
    own = Answer("你好", "length", (1, 5), 2, None, tokens, (2.0,) * 4)
    assert compared(tokenizer, own, answer(("你", -1.5), ("好", -2.0))).logprob_difference == 0.25
    assert compared(tokenizer, own, Answer("你好", "length", (1, 5), 2, None, tokens)).logprob_difference == 0


def test_the_tolerance_is_what_is_given(tokenizer):
    own, served = answer(A, B), answer(("a", -1.5), ("b", -1.2))
    assert compared(tokenizer, own, served, tolerance=0.7).is_same
    assert not compared(tokenizer, own, served, tolerance=0.5).is_same


def test_where_two_texts_part():
    assert Difference.between("x" * 40 + "你好" + "y" * 40, "x" * 40 + "你们") == Difference(
        41, "x" * 15 + "你好" + "y" * 15, "x" * 15 + "你们"
    )
    assert Difference.between("ab", "a").position == 1


def test_reasons_of_sentencepiece_ids(tokenizer):
    own = tokenizer.encode("Below is 你好 12")
    letters = [tokenizer._backend.token_to_id(letter) for letter in "Below"]
    assert tokenizer.spell(own[:2]) == "<s>▁Below" and None not in letters
    for served, reasons in (
        ([1, *own], ["bos_twice"]),
        ([1, 1, *own], ["bos_twice"]),
        (own[1:], ["bos_missing"]),
        ([1, *letters, *own[2:]], ["spaces"]),
        (tokenizer.encode("Below  is 你好 12"), ["spaces"]),
        (tokenizer.encode("Above is 你好 12"), ["template"]),
        ([1, *tokenizer.encode("Above is 你好 12")], ["bos_twice", "template"]),
    ):
        assert reasons_of_ids(own, served, tokenizer) == reasons
    as_text = tokenizer.encode("a</s>")
    assert 2 not in as_text
    assert reasons_of_ids([*tokenizer.encode("a"), 2], as_text, tokenizer) == ["special_as_text"]
    # That the texts are the same, or are not, is known of some servers.
    assert reasons_of_ids(own, tokenizer.encode("Above is 你好 12"), tokenizer, is_same_text=True) == ["tokenizer"]
    assert reasons_of_ids(own, tokenizer.encode("Below  is 你好 12"), tokenizer, is_same_text=False) == ["template"]


def test_reasons_of_byte_level_ids(chatml):
    end, hello = chatml.special_tokens["<|im_end|>"].id, chatml.encode("你好")
    letters = [i for letter in "instruction" for i in chatml.encode(letter)]
    assert chatml.spell([*hello, end]) == "你好<|im_end|>"
    assert reasons_of_ids([*hello, end], [*hello, *chatml.encode("<|im_end|>")], chatml) == ["special_as_text"]
    assert letters != chatml.encode("instruction")
    assert reasons_of_ids(chatml.encode("instruction"), letters, chatml) == ["tokenizer"]
    assert reasons_of_ids(chatml.encode("a b"), chatml.encode("a  b"), chatml) == ["spaces"]
    assert reasons_of_ids(chatml.encode("a\n\nb"), chatml.encode("a\nb"), chatml) == ["template"]


def test_servers_that_tell_how_many_tokens_a_prompt_has(tokenizer, chatml):
    def served(count):
        return Answer("a", prompt_tokens=count)

    own = answer(A, finish_reason="")
    told = {count: compared(tokenizer, own, served(count)) for count in (1, 2, 3, 7, None)}
    assert {count: comparison.prompt for count, comparison in told.items()} == {
        1: "differs",
        2: "same number",
        3: "differs",
        7: "differs",
        None: "not told",
    }
    reasons = {count: comparison.reasons for count, comparison in told.items()}
    assert reasons == {1: ["bos_missing"], 2: [], 3: ["bos_twice"], 7: ["template"], None: []}
    assert compared(chatml, own, served(3)).reasons == ["template"]  # it has no BOS


def test_the_verdict_counts_reasons_and_leaves_apart_what_spells_tokens(tokenizer):
    same, stop = compared(tokenizer, answer(A), answer(A)), compared(tokenizer, answer(A, B), answer(C, C))
    twice = compared(tokenizer, answer(A), answer(A, ids=(1, 1, 5)))
    apart = compare(Question("</s>"), answer(A), answer(A, ids=(1, 1, 5)), tokenizer, 0.1, spells_tokens=True)
    assert Report([same, apart]).is_same and verdict(Report([same, apart])).endswith("1 of 1 questions.")
    report = Report([twice, stop, apart, twice, same])
    assert not report.is_same and report.reasons == [("bos_twice", 2), ("weights", 1)]
    first, second, third = verdict(report).splitlines()
    assert first == "The server differs from our own engine: 3 of 4 questions."
    assert second.startswith("    2  BOS twice: ") and third.startswith("    1  Weights: ")


def test_every_reason_has_its_words():
    assert set(REASONS) == set(get_args(Reason)) and all(words() for words in REASONS.values())


def test_rows(tokenizer):
    comparison = compare(Question("你 好\n！"), answer(A, B), answer(A, C), tokenizer, 0.1, spells_tokens=False)
    assert heading() == "     prompt        answer                log-prob   question"
    assert list(row(3, comparison)) == [
        "3    same ids      differs at 1          0.0000     你 好 ！",
        "      answer here 'ab', there 'ac'",
        "      likely: quantization",
    ]
