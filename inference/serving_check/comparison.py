"""What a server says beside what our own engine says, and the likely reason where they part.

Answers are values here, whoever gave them.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from statistics import mean
from typing import Literal

from configs.serving import Sampling
from ft_datasets.tokenizer import Tokenizer
from inference.engine import Engine, Statistics
from inference.serving_check.questions import Question

Reason = Literal[
    "template",
    "bos_twice",
    "bos_missing",
    "spaces",
    "special_as_text",
    "tokenizer",
    "stop",
    "limit",
    "rounding",
    "quantization",
    "weights",
]
"""Why a server answers otherwise.

template: the prompt's text is another. bos_twice, bos_missing: only its first token is. spaces: only spaces are, such
as SentencePiece's `▁` at the beginning of a text. special_as_text: a special token came as ordinary characters, or the
other way round. tokenizer: the same text became other tokens. stop: one side goes on where the other one ends. limit:
the server cut the answer off. rounding: another dtype, or another order of sums; two tokens were as good as equal.
quantization: the weights are stored in fewer bits. weights: it is another model.
"""
OF_QUANTIZATION = 1.0
"""Mean difference of log-probabilities, or distance of the two best tokens, beyond which it is another model."""
SHOWN = 16
"""Characters that are shown before and after the place where two texts part."""


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        text: the answer up to it and with it.
        logprob: its log-probability.
        others: what other tokens would have made of the answer, each with its log-probability; the server's alone.
    """

    text: str
    logprob: float
    others: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """What one side makes of a question.

    Attributes:
        finish_reason: stop, length, or '' where it is not told.
        prompt_ids: None where they are not told.
        prompt_tokens: how many they are; None where even that is not told.
        prompt_text: the prompt as the template has it; None where it is not told.
        tokens: () where they are not told.
        margins: how far the best token's log-probability is above the second's, for each token; our own engine's alone.
    """

    text: str
    finish_reason: str = ""
    prompt_ids: tuple[int, ...] | None = None
    prompt_tokens: int | None = None
    prompt_text: str | None = None
    tokens: tuple[Token, ...] = ()
    margins: tuple[float, ...] = ()


@dataclass(frozen=True)
class Difference:
    """A place where two texts part.

    Attributes:
        position: characters before it.
        own, served: the texts around it.
    """

    position: int
    own: str
    served: str

    @classmethod
    def between(cls, own: str, served: str) -> "Difference":
        """The first place where two texts part, which differ."""
        position = len([*takewhile(lambda pair: pair[0] == pair[1], zip(own, served, strict=False))])
        around = slice(max(0, position - SHOWN), position + SHOWN)
        return cls(position, own[around], served[around])


@dataclass(frozen=True)
class Comparison:
    """How a server's answer to one question compares with our own engine's.

    Attributes:
        spells_tokens: it spells special tokens out, which servers read as they like; it counts for nothing.
        prompt: whether the prompts are the same: by their ids, or where a server does not tell them by their number.
        prompt_difference, answer_difference: where they part; None where they don't, or where that can't be said.
        logprob_difference: mean absolute difference of our tokens' log-probabilities, to where the answers part.
        finish_reasons: our own, the server's.
        reasons: the likely ones; [] = there is nothing to explain.
        is_same: but for rounding.
    """

    question: Question
    spells_tokens: bool
    prompt: Literal["same", "same number", "differs", "not told"]
    prompt_difference: Difference | None
    answer_difference: Difference | None
    logprob_difference: float | None
    finish_reasons: tuple[str, str]
    reasons: list[Reason]
    is_same: bool


@dataclass(frozen=True)
class Report:
    """The comparison of all questions.

    Attributes:
        left_out: questions that our own engine does not take, each with why.
    """

    comparisons: list[Comparison]
    left_out: list[tuple[Question, str]] = field(default_factory=list)

    @property
    def counted(self) -> list[Comparison]:
        """The comparisons that count: those of questions that spell no special token out."""
        return [comparison for comparison in self.comparisons if not comparison.spells_tokens]

    @property
    def is_same(self) -> bool:
        """Whether the server answers as our own engine does."""
        return all(comparison.is_same for comparison in self.counted)

    @property
    def reasons(self) -> list[tuple[Reason, int]]:
        """The likely reasons of what differs, the most frequent one first, each with how many questions have it."""
        return Counter(
            reason for comparison in self.counted if not comparison.is_same for reason in comparison.reasons
        ).most_common()


def own_answer(engine: Engine, question: Question, max_new_tokens: int) -> Answer:
    """What our own engine makes of a question, always taking the likeliest token.

    Raises:
        PromptTooLong, PromptRefused: see Engine.encode_chat.
    """
    prompt_ids = engine.encode_chat(question.prompt, question.history, question.system)
    statistics = Statistics()
    text = "".join(engine.stream(prompt_ids, Sampling(max_new_tokens, temperature=0), statistics))
    ids = statistics.token_ids
    scores = engine.log_probabilities(prompt_ids, ids)
    best, second = scores.topk(2).values.T.tolist()
    logprobs = scores.gather(1, scores.new_tensor(ids).long().unsqueeze(1)).squeeze(1).tolist()
    texts = [engine.tokenizer.decode(ids[: count + 1]) for count in range(len(ids))]
    return Answer(
        text,
        statistics.finish_reason,
        tuple(prompt_ids),
        len(prompt_ids),
        engine.encoder.render(question.messages, add_generation_prompt=True).text,
        tuple(map(Token, texts, logprobs)),
        tuple(one - other for one, other in zip(best, second, strict=True)),
    )


def spells_tokens(engine: Engine, question: Question) -> bool:
    """Whether a question holds the text of a special token."""
    return bool(engine.encoder.render(question.messages, add_generation_prompt=True).broken)


def compare(
    question: Question, own: Answer, served: Answer, tokenizer: Tokenizer, tolerance: float, spells_tokens: bool
) -> Comparison:
    """Compare a server's answer with our own engine's.

    Args:
        tokenizer: our own.
        tolerance: mean difference of log-probabilities that still counts as the same.
    """
    prompt, reasons, prompt_difference = _compare_prompts(own, served, tokenizer)
    own_text, served_text = _plain(own.text), _plain(served.text)
    logprob_difference = _logprob_difference(own, served)
    if not reasons:
        reasons = _reasons_of_answers(own, served, tolerance, logprob_difference)
    return Comparison(
        question,
        spells_tokens,
        prompt,
        prompt_difference,
        Difference.between(own_text, served_text) if own_text != served_text else None,
        logprob_difference,
        (own.finish_reason, served.finish_reason),
        reasons,
        is_same=not {*reasons} - {"rounding"},
    )


def _compare_prompts(
    own: Answer, served: Answer, tokenizer: Tokenizer
) -> tuple[Literal["same", "same number", "differs", "not told"], list[Reason], Difference | None]:
    if served.prompt_ids is not None and own.prompt_ids is not None:
        if served.prompt_ids == own.prompt_ids:
            return "same", [], None
        known_text = None if served.prompt_text is None else _is_same_text(own, served, tokenizer)
        reasons = reasons_of_ids(own.prompt_ids, served.prompt_ids, tokenizer, known_text)
        spelled = [tokenizer.spell(ids) for ids in (own.prompt_ids, served.prompt_ids)]
        if spelled[0] == spelled[1]:  # only the cuts between tokens tell them apart
            spelled = ["|".join(tokenizer.spell([i]) for i in ids) for ids in (own.prompt_ids, served.prompt_ids)]
        return "differs", reasons, Difference.between(*spelled)
    if served.prompt_tokens is None or own.prompt_tokens is None:
        return "not told", [], None
    if served.prompt_tokens == own.prompt_tokens:
        return "same number", [], None
    has_bos = bool(tokenizer.bos_ids)
    by_one: dict[int, Reason] = {1: "bos_twice", -1: "bos_missing"} if has_bos else {}
    return "differs", [by_one.get(served.prompt_tokens - own.prompt_tokens, "template")], None


def _is_same_text(own: Answer, served: Answer, tokenizer: Tokenizer) -> bool:
    """Whether the prompts' texts are the same; llama.cpp leaves BOS out, which its tokenizer puts before them."""
    return (own.prompt_text or "").removeprefix(tokenizer.bos_token) == (served.prompt_text or "").removeprefix(
        tokenizer.bos_token
    )


def reasons_of_ids(
    own: Sequence[int], served: Sequence[int], tokenizer: Tokenizer, is_same_text: bool | None = None
) -> list[Reason]:
    """Why a prompt's ids differ.

    Args:
        is_same_text: whether the prompts' texts are the same; None = not known.
    """
    reasons: list[Reason] = []
    own_bos, served_bos = (len([*takewhile(tokenizer.bos_ids.__contains__, ids)]) for ids in (own, served))
    if own_bos != served_bos:
        reasons.append("bos_twice" if served_bos > own_bos else "bos_missing")
    own, served = own[own_bos:], served[served_bos:]
    if tuple(own) == tuple(served):
        return reasons
    if is_same_text is False:
        return [*reasons, "template"]
    own_text, served_text = (re.sub("[▁ ]", "", tokenizer.spell(ids)) for ids in (own, served))
    if own_text != served_text:
        return [*reasons, "tokenizer" if is_same_text else "template"]
    special = {token.id for token in tokenizer.special_tokens.values()}
    if [i for i in own if i in special] != [i for i in served if i in special]:
        return [*reasons, "special_as_text"]
    return [*reasons, "spaces" if tokenizer.spell(own) != tokenizer.spell(served) else "tokenizer"]


def _plain(text: str) -> str:
    """A text without what servers do as they like: blanks at its ends, and how many U+FFFD stand for broken bytes."""
    return re.sub("\ufffd+", "\ufffd", re.sub(r"^\s+|[\s\ufffd]+$", "", text))


def _logprob_difference(own: Answer, served: Answer) -> float | None:
    """The mean difference of the log-probabilities of our tokens up to where the answers part; None = not told."""
    own_logprobs, served_logprobs = map(_logprobs_by_text, (own, served))
    alike = [*takewhile(own_logprobs.__contains__, served_logprobs)]
    differences = [abs(own_logprobs[text] - served_logprobs[text]) for text in alike]
    # The token with which ours goes on elsewhere is often among those that the server could have chosen.
    others = {_plain(text): logprob for token in served.tokens for text, logprob in token.others}
    if (parted := _parting_token(own, served)) and (text := _plain(parted.text)) in others:
        differences.append(abs(parted.logprob - others[text]))
    return mean(differences) if differences else None


def _parting_token(own: Answer, served: Answer) -> Token | None:
    """Our first token that the server's answer lacks."""
    own_text, served_text = _plain(own.text), _plain(served.text)
    if own_text == served_text:
        return None
    position = Difference.between(own_text, served_text).position
    return next((token for token in own.tokens if len(_plain(token.text)) > position), None)


def _logprobs_by_text(answer: Answer) -> dict[str, float]:
    """The text up to each token that completes a character -> its log-probability.

    (Of the tokens that make one character together, llama.cpp lists the last alone.)
    """
    logprobs: dict[str, float] = {}
    for token in answer.tokens:
        logprobs.setdefault(_plain(token.text), token.logprob)
    return logprobs


def _reasons_of_answers(
    own: Answer, served: Answer, tolerance: float, logprob_difference: float | None
) -> list[Reason]:
    """Why answers to the same prompt differ, or their log-probabilities."""
    own_text, served_text = _plain(own.text), _plain(served.text)
    goes_on = own.finish_reason == "stop" and (
        (served_text != own_text and served_text.startswith(own_text))
        or (served_text == own_text and served.finish_reason == "length")
    )
    is_shorter = served_text != own_text and own_text.startswith(served_text)
    parted = _parting_token(own, served)
    margin = own.margins[own.tokens.index(parted) if parted else -1] if own.margins else None
    # Ending and going on can be as good as equally likely, but not where the server's answer spells our end out.
    end = _plain(own.tokens[-1].text) if own.tokens else ""
    spells_end = len(end) > len(own_text) and served_text.startswith(end)
    is_tie = margin is not None and margin <= tolerance and not spells_end
    if not is_tie and (goes_on or (is_shorter and served.finish_reason == "stop")):
        return ["stop"]
    if is_shorter and served.finish_reason == "length":
        return ["limit"]
    if logprob_difference is not None and logprob_difference > tolerance:
        return ["quantization" if logprob_difference <= OF_QUANTIZATION else "weights"]
    if own_text == served_text:
        return []
    if margin is None or margin <= tolerance:
        return ["rounding"]
    # Log-probabilities that were close up to there tell more than how surprising the one token is.
    return ["quantization" if logprob_difference is not None or margin <= OF_QUANTIZATION else "weights"]
