"""Conversations -> token ids, by a prompt template.

The template's special tokens are put in by id, and each stretch of text between two of them is encoded in one piece. A
special token that a user or the data spell out stays text: before the template sees it, it is broken by a character
that nothing else holds, which is taken out again before the stretch is encoded.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from ft_datasets.conversation import Message
from ft_datasets.prompt import PromptTemplate, TemplateRefusal
from ft_datasets.tokenizer import Tokenizer

BREAKS = [*map(chr, chain(range(0xFDD1, 0xFDF0), range(0xE000, 0xF900)))]
"""Characters that have no meaning, or none for all: one of them that a conversation does not hold breaks its tokens."""

ANSWER = "好的。Ok."
"""An answer that tells what a template writes behind one."""


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, in which `broken` stands within special tokens that are none ('' = nowhere)."""

    marked: str
    broken: str

    @property
    def text(self) -> str:
        """The text as it is read."""
        return self.marked.replace(self.broken, "") if self.broken else self.marked


class ChatEncoder:
    """A prompt template with the tokenizer of its model: what gives a conversation's ids, to train on and to ask.

    Attributes:
        end_id: the token that the template writes behind an answer; None = it writes none.
        ending: all that it writes behind an answer, as far as that token.
        keeps_answers: whether the template writes an answer at all, as it was given.
        stop_ids: every id that ends an answer in generation.
    """

    def __init__(self, template: PromptTemplate, tokenizer: Tokenizer) -> None:
        self.template, self.tokenizer = template, tokenizer
        # (One of a single character could not be broken.)
        longest_first = sorted((text for text in tokenizer.special_tokens if len(text) > 1), key=len, reverse=True)
        any_token = "|".join(map(re.escape, longest_first))
        self._special = re.compile(any_token)
        # A template may change a text's case, and in a text they may overlap, so each is broken where it begins.
        self._spelled = re.compile(any_token, re.IGNORECASE)
        self._beginning = re.compile(f"(?=(?:{any_token})).", re.DOTALL | re.IGNORECASE)
        self.end_id, self.ending, self.keeps_answers = self._find_end()
        self.stop_ids = tokenizer.stop_ids | ({self.end_id} if self.end_id is not None else set())

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        """The text of a conversation, as the template has it.

        Raises:
            TemplateRefusal: the template does not take it.
        """
        broken = ""
        texts = [text for message in messages for text in (message.text, message.input)]
        if any(map(self._spelled.search, texts)):
            whole = "".join([self.template.source, *texts])
            broken = next(character for character in BREAKS if character not in whole)
            messages = [
                replace(message, text=self._break(message.text, broken), input=self._break(message.input, broken))
                for message in messages
            ]
        marked = self.template.render(messages, self.tokenizer.named_tokens, add_generation_prompt)
        return Rendered(marked, broken)

    def answered(self, prompt: Rendered, answer: str, whole: Rendered) -> Rendered:
        """What asks for an answer with the answer behind it, as a model is to say it when it is asked so.

        Args:
            answer: its text; what the prompt begins of it already (<think>) stands there once.
            whole: the conversation up to its end, as the template has it.
        """
        marked = prompt.marked.replace(prompt.broken, whole.broken) if prompt.broken else prompt.marked
        begun, said = prompt.text.rstrip(), answer.lstrip()
        for length in range(min(len(begun), len(said)), 1, -1):
            if begun.endswith(said[:length]):
                answer = said[length:].lstrip()
                break
        return Rendered(marked + self._break(answer, whole.broken) + self.ending, whole.broken)

    def encode_batch(self, conversations: Sequence[Rendered], threads: int = 1) -> list[list[int]]:
        """The ids of rendered conversations."""
        parts = [self._split(rendered) for rendered in conversations]
        first, following = ({part for part in chain(*parts) if part[0] is place} for place in (True, False))
        known: dict[tuple[bool, str], list[int]] = {}
        if first:
            count = len(self.tokenizer.bos_ids)
            found = self.tokenizer.encode_batch([text for _place, text in first], threads)
            known |= zip(first, (ids[count:] for ids in found), strict=True)
        if following:
            found = self.tokenizer.encode_after_special([text for _place, text in following], threads)
            known |= zip(following, found, strict=True)
        special = self.tokenizer.special_tokens
        return [
            [i for place, text in split for i in ((special[text].id,) if place is None else known[place, text])]
            for split in parts
        ]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids that ask for an answer to the last of `messages`.

        Raises:
            TemplateRefusal: the template does not take them.
        """
        return self.encode_batch([self.render(messages, add_generation_prompt=True)])[0]

    def _split(self, rendered: Rendered) -> list[tuple[bool | None, str]]:
        """A text as special tokens (None, token) and stretches between them (is it the text's beginning, stretch)."""
        parts: list[tuple[bool | None, str]] = []
        at = 0
        before = None
        for match in chain(self._special.finditer(rendered.marked), [None]):
            stretch = rendered.marked[at : match.start() if match else None]
            token = self.tokenizer.special_tokens[match[0]] if match else None
            if before is not None and before.rstrip:
                stretch = stretch.lstrip()
            if token is not None and token.lstrip:
                stretch = stretch.rstrip()
            if rendered.broken:
                stretch = stretch.replace(rendered.broken, "")
            if stretch:
                parts.append((self._is_beginning(parts), stretch))
            if match:
                parts.append((None, match[0]))
                at, before = match.end(), token
        return parts

    def _is_beginning(self, parts: Sequence[tuple[bool | None, str]]) -> bool:
        """Whether a stretch behind these parts is encoded as the beginning of a text."""
        # Earlier versions encoded what stands behind BOS so, and their adapters know it by these ids.
        is_behind_bos = self.template.words is not None and [part[1] for part in parts] == [self.tokenizer.bos_token]
        return not parts or is_behind_bos

    def _break(self, text: str, broken: str) -> str:
        return self._beginning.sub(lambda match: match[0] + broken, text)

    def _find_end(self) -> tuple[int | None, str, bool]:
        """The token behind an answer, all that ends there, and whether an answer is found in what the template writes.

        (It is not where that token stands before the answer as well: whoever asks for an answer would get that alone.)
        """
        talk = [Message("user", "?"), Message("assistant", ANSWER)]
        for messages in (talk, [Message("system", "?"), *talk]):
            try:
                prompt = self.render(messages[:-1], add_generation_prompt=True).marked
                rendered = self.render(messages, add_generation_prompt=False).marked
            except TemplateRefusal:  # what it has against it is told where it is asked for
                continue
            asked = len(prompt) if rendered.startswith(prompt) else 0
            between, found, after = rendered[asked:].partition(ANSWER) if asked else rendered.rpartition(ANSWER)
            match = self._special.search(after) if found else None
            if match is None:
                return None, after, bool(found)
            is_early = bool(asked) and match[0] in between
            return self.tokenizer.special_tokens[match[0]].id, after[: match.end()], not is_early
        return None, "", True
