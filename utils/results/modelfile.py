"""An Ollama Modelfile with the prompt of a chat template, in the template language of Go.

The pieces of the prompt are found by rendering conversations of words that no template holds, and what is put together
from them is compared with what Jinja renders; a template that can't be had that way is left out, with the reason.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from configs.messages import _
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.conversation import Message, messages_of
from ft_datasets.prompt import FIXED_DAY, TemplateRefusal

SYSTEM, QUESTION, ANSWER, NEXT = "qzsystemzq", "qzquestionzq", "qzanswerzq", "qznextzq"
"""Words that stand for the messages of a conversation."""


def conversation(*texts: str, system: str = "") -> list[Message]:
    """Questions and answers in turn, behind a system message where there is one."""
    return messages_of(texts[-1], list(zip(texts[:-1:2], texts[1::2], strict=True)), system)


def prompt_text(encoder: ChatEncoder, messages: list[Message]) -> str | None:
    """The prompt that asks for the next answer; None where the template refuses the messages."""
    try:
        return encoder.render(messages, add_generation_prompt=True).text
    except TemplateRefusal:
        return None


PROBES = [
    ("你好",),
    ("第一行\n第二行", "{{ .System }} {% x %}", "a  b"),
    ("1", "2", "3", "4", "5"),
]


@dataclass
class GoTemplate:
    """The pieces of a prompt between the messages.

    Attributes:
        before: what stands before the first question where there is no system message.
        around_system: what stands before and behind a system message; None = the template takes none.
        behind_question: what asks for an answer.
        before_answer: what more stands before an answer that was given.
        behind_answer: what stands between an answer and the next question.
    """

    before: str
    around_system: tuple[str, str] | None
    behind_question: str
    before_answer: str
    behind_answer: str

    @property
    def source(self) -> str:
        """The template in Go's language, over Ollama's `.System` and `.Messages`."""
        before = _literal(self.before)
        if self.around_system:
            first, second = map(_literal, self.around_system)
            before = f"{{{{ if .System }}}}{first}{{{{ .System }}}}{second}{{{{ else }}}}{before}{{{{ end }}}}"
        question = f"{{{{ .Content }}}}{_literal(self.behind_question)}"
        answer = f"{_literal(self.before_answer)}{{{{ .Content }}}}{_literal(self.behind_answer)}"
        return (
            f'{before}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{question}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}{{{{ end }}}}'
        )

    def render(self, messages: list[Message]) -> str:
        """What Ollama makes of a conversation."""
        text = self.before
        for message in messages:
            if message.role == "system" and self.around_system:
                text = self.around_system[0] + message.text + self.around_system[1]
            elif message.role == "user":
                text += message.text + self.behind_question
            elif message.role == "assistant":
                text += self.before_answer + message.text + self.behind_answer
        return text


def _literal(text: str) -> str:
    """Text as it stands in a template of Go: two braces would begin a command."""
    return text.replace("{", '{{ "{" }}')


def go_template(encoder: ChatEncoder) -> GoTemplate | None:
    """The same prompt for Ollama; None where it can't be put together from fixed pieces."""
    single = _between(prompt_text(encoder, conversation(QUESTION)), QUESTION)
    double = _between(prompt_text(encoder, conversation(QUESTION, ANSWER, NEXT)), QUESTION, ANSWER, NEXT)
    if not single or not double:
        return None
    before_system = _between(prompt_text(encoder, conversation(QUESTION, system=SYSTEM)), SYSTEM, QUESTION)
    around_system = (before_system[0], before_system[1]) if before_system else None
    found = GoTemplate(single[0], around_system, single[1], double[1].removeprefix(single[1]), double[2])
    for texts in PROBES:
        for system in ("", "系统 {x}") if around_system else ("",):
            messages = conversation(*texts, system=system)
            if prompt_text(encoder, messages) != found.render(messages):
                return None
    is_writable = all(character.isprintable() or character in "\n\t" for character in found.source)
    return found if is_writable and '"""' not in found.source else None  # Ollama drops what can't be printed


def _between(text: str | None, *words: str) -> list[str] | None:
    """What stands around and between words; None where one is not there once, or they stand otherwise."""
    pieces = []
    for word in words:
        if not text or text.count(word) != 1:
            return None
        piece, _word, text = text.partition(word)
        pieces.append(piece)
    return [*pieces, text or ""]


def modelfile(encoder: ChatEncoder | None, bos_token: str, stops: Iterable[str]) -> tuple[str, list[str]]:
    """A Modelfile for the model.gguf beside it, and what has to be said about it.

    Args:
        encoder: the chat template with its tokenizer; None = the model has none.
        bos_token: what llama.cpp puts before a prompt by itself, and the template therefore must not; "" = nothing.
        stops: the tokens that end an answer.
    """
    found = encoder and go_template(encoder)
    notes = list(_notes(encoder, found))
    lines = [*(f"# {note}" for note in notes), "FROM ./model.gguf"]
    if found:
        found.before = found.before.removeprefix(bos_token)
        if found.around_system:
            found.around_system = (found.around_system[0].removeprefix(bos_token), found.around_system[1])
        lines.append(f'TEMPLATE """{found.source}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n", notes


def _notes(encoder: ChatEncoder | None, found: GoTemplate | None) -> Iterator[str]:
    if not encoder:
        yield _("The model has no chat template, and Ollama is given none.")
        return
    if not found:
        yield _(
            "The model's chat template can't be written in Ollama's language. Without one Ollama guesses; llama.cpp "
            "takes the template itself from model.gguf."
        )
        return
    if not found.around_system:
        yield _("The model's chat template takes no system message: Ollama leaves it out without a word.")
    spacious = conversation(" a\n")
    if prompt_text(encoder, spacious) != found.render(spacious):
        yield _("The model's chat template cuts off spaces and line ends around a message; Ollama keeps them.")
    if "strftime_now" in encoder.template.source and FIXED_DAY not in encoder.template.source:
        yield _("The model's chat template names the day; Ollama always names the day on which this file was made.")
