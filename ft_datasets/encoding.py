"""Conversations -> examples: tokens, which of them carry loss, and the held-out split."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from configs.errors import UserError
from configs.messages import _
from ft_datasets.chat_encoder import ChatEncoder, Rendered
from ft_datasets.conversation import Conversation, Message
from ft_datasets.examples import Example
from ft_datasets.prompt import USE_ALPACA, TemplateRefusal
from ft_datasets.records import name_records

AT_ONCE = 2000
"""Conversations that are encoded together: enough for several threads, few enough for the memory."""


@dataclass(frozen=True)
class _Answer:
    """A learnt message of a conversation: the text that asks for it, and that text with it behind."""

    prompt: Rendered
    whole: Rendered


def encode_conversations(
    conversations: Sequence[Conversation], encoder: ChatEncoder, threads: int = 1
) -> list[Example]:
    """Turn conversations into examples.

    A conversation is one example, which learns each of its learnt answers, as long as the template writes an earlier
    answer as it writes a last one. Where it does not (Qwen3 takes the thinking out of earlier ones), each answer is an
    example of its own: the conversation up to there, as it is when that answer is asked for. So it is where the
    template asks for an answer in other words than it writes one behind (DeepSeek-R1 and QwQ ask with a <think>).

    Raises:
        UserError: the template does not take some of the conversations.
    """
    refused: dict[str, list[int]] = {}
    examples: list[Example] = []
    for first in range(0, len(conversations), AT_ONCE):
        examples += _encode_some(conversations[first : first + AT_ONCE], encoder, refused, threads)
    if refused:
        lines = [f"  {reason}: {name_records(numbers)}" for reason, numbers in refused.items()]
        heading = _("The prompt template ({name}) does not take these records:", name=encoder.template.name)
        advice = _("Change the records, or train in other words: {advice}", advice=USE_ALPACA)
        raise UserError("\n".join([heading, *lines, advice]))
    return examples


def fitting(examples: Sequence[Example], max_seq_length: int, report: Callable[[str], None]) -> list[Example]:
    """The examples that are not too long; the others are left out, counted and named to `report`.

    Raises:
        UserError: no example is short enough.
    """
    kept = [example for example in examples if len(example) <= max_seq_length]
    long = [example.number for example in examples if len(example) > max_seq_length]
    if long:
        report(
            _(
                "{count} of {total} examples are longer than --max_seq_length {limit} tokens and are left out "
                "(records {numbers}; the longest has {longest} tokens).",
                count=len(long),
                total=len(examples),
                limit=max_seq_length,
                numbers=name_records(list(dict.fromkeys(long))),
                longest=max(map(len, examples)),
            )
        )
    if not kept:
        raise UserError(_("No example fits in --max_seq_length {limit} tokens: raise it.", limit=max_seq_length))
    return kept


def _encode_some(
    conversations: Iterable[Conversation], encoder: ChatEncoder, refused: dict[str, list[int]], threads: int
) -> Iterator[Example]:
    """The examples of some conversations; what the template has against others goes into `refused`."""
    answers: list[tuple[Conversation, list[_Answer]]] = []
    for conversation in conversations:
        try:
            answers.append((conversation, _answers(conversation.messages, encoder)))
        except TemplateRefusal as error:
            refused.setdefault(str(error), []).append(conversation.number)
    rendered = [text for _conversation, group in answers for answer in group for text in (answer.prompt, answer.whole)]
    ids = iter(encoder.encode_batch(rendered, threads))
    for conversation, group in answers:
        pairs = [(next(ids), next(ids)) for _answer in group]
        for at, (prompt, whole) in enumerate(pairs):
            # The colon that ends the prompt and the answer's first character may be one token (":-"), which a model
            # that was given the colon can't generate. Such an answer starts on a new line, where that parts them.
            if common_prefix(prompt, whole) < len(prompt):
                moved = _on_a_new_line(conversation.messages, at)
                again = encoder.render(moved, add_generation_prompt=False)
                (ids_again,) = encoder.encode_batch([again])
                if common_prefix(prompt, ids_again) == len(prompt):
                    pairs[at], group[at] = (prompt, ids_again), replace(group[at], whole=again)
        try:
            yield from _examples(conversation.number, group, pairs, encoder)
        except TemplateRefusal as error:
            refused.setdefault(str(error), []).append(conversation.number)


def _learnt(messages: Sequence[Message]) -> list[int]:
    return [at for at, message in enumerate(messages) if message.is_learnt]


def _answers(messages: Sequence[Message], encoder: ChatEncoder) -> list[_Answer]:
    answers = []
    for at in _learnt(messages):
        prompt = encoder.render(messages[:at], add_generation_prompt=True)
        whole = encoder.render(messages[: at + 1], add_generation_prompt=False)
        if not whole.text.startswith(prompt.text):
            whole = encoder.answered(prompt, messages[at].text, whole)
        answers.append(_Answer(prompt, whole))
    return answers


def _on_a_new_line(messages: Sequence[Message], answer: int) -> list[Message]:
    """The messages up to the learnt answer of this number, which begins with a line's end."""
    last = _learnt(messages)[answer]
    return [*messages[:last], replace(messages[last], text="\n" + messages[last].text)]


def _examples(
    number: int, answers: Sequence[_Answer], pairs: Sequence[tuple[list[int], list[int]]], encoder: ChatEncoder
) -> Iterator[Example]:
    """The examples of one conversation: one, or one of each answer.

    Args:
        pairs: ids of each answer's prompt, and of the conversation up to the answer's end.

    Raises:
        TemplateRefusal: an answer is not to be found in what the template makes of it.
    """
    if not encoder.keeps_answers:
        raise TemplateRefusal(_("it leaves answers out, or writes others"))
    spans, ended = [], []
    for prompt, whole in pairs:
        start = common_prefix(prompt, whole)
        if encoder.end_id is None:
            whole = [*whole, encoder.tokenizer.eos_id]
        stop = len(whole) if encoder.end_id is None else _position(encoder.end_id, whole, start) + 1
        if stop - start < 2:
            raise TemplateRefusal(_("it leaves an answer out, or does not end it"))
        spans.append((start, stop))
        ended.append(whole[:stop])
    longest = ended[-1]
    if all(longest[: len(ids)] == ids for ids in ended):
        yield _example(number, answers[-1], longest, tuple(spans), encoder)
    else:
        for answer, ids, span in zip(answers, ended, spans, strict=True):
            yield _example(number, answer, ids, (span,), encoder)


def _position(token_id: int, ids: Sequence[int], start: int) -> int:
    """Where a token stands for the first time from `start` on; -1 = nowhere."""
    return next((at for at in range(start, len(ids)) if ids[at] == token_id), -1)


def _example(
    number: int, answer: _Answer, ids: Sequence[int], learnt: tuple[tuple[int, int], ...], encoder: ChatEncoder
) -> Example:
    tokenizer = encoder.tokenizer
    text = answer.whole.text.removeprefix(tokenizer.bos_token).removesuffix(tokenizer.eos_token)
    return Example(number, text, np.array(ids, dtype=np.int32), learnt)


def common_prefix(prompt_ids: Sequence[int], text_ids: Sequence[int]) -> int:
    """How many tokens of prompt + response hold nothing but prompt.

    A token that holds the prompt's end and the response's beginning carries a part of the response, so it gets a label:
    the boundary is where the two encodings part.
    """
    for position, (one, other) in enumerate(zip(prompt_ids, text_ids, strict=False)):
        if one != other:
            return position
    return min(len(prompt_ids), len(text_ids))


def split_examples(examples: Sequence[Example], val_set_size: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold a seeded choice of records out of training: (training, held out) examples, each in the file's order.

    Args:
        examples: all of them; those of one record stay together.
        val_set_size: below 1 a share, of which 200 records at most are taken; otherwise their number.
        seed: fixes the choice.

    Raises:
        UserError: nothing would be left to train on.
    """
    records = list(dict.fromkeys(example.number for example in examples))
    count = min(200, round(len(records) * val_set_size)) if val_set_size < 1 else int(val_set_size)
    if count >= len(records):
        raise UserError(
            _(
                "--val_set_size {count} leaves nothing of the {total} examples to train on.",
                count=count,
                total=len(records),
            )
        )
    held_out = {records[i] for i in np.random.default_rng([seed, 0x5EED]).permutation(len(records))[:count]}
    training = [example for example in examples if example.number not in held_out]
    return training, [example for example in examples if example.number in held_out]


def describe_lengths(examples: Sequence[Example]) -> str:
    """One line on how long examples are, in tokens."""
    lengths = np.array([len(example) for example in examples])
    responses = sum(example.label_count for example in examples)
    return _(
        "tokens an example: mean {mean}, 90 % below {p90}, longest {longest}; {share} % of all tokens carry loss",
        mean=round(lengths.mean()),
        p90=int(np.percentile(lengths, 90)),
        longest=int(lengths.max()),
        share=round(100 * responses / int(lengths.sum())),
    )
