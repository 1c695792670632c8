"""The prompt template: the one place where messages become text, in training and inference alike.

A template is a program in Jinja, as models bring one and as whatever serves a model reads one. Its exact text is stored
with every adapter and read back from there, so that an adapter is always asked in the words that it was trained on, and
written into every model that is made of it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _
from ft_datasets.conversation import Message
from ft_datasets.tokenizer import Tokenizer, read_settings

USE_ALPACA = "--prompt_template alpaca"


class TemplateRefusal(Exception):
    """A template does not take a conversation; the message says why, in the template's own words."""


@dataclass(frozen=True)
class AlpacaWords:
    """The pieces of a prompt in Stanford Alpaca's words; `{instruction}`, `{input}`, `{response}`, `{eos}` are filled
    in.

    Adapters of earlier versions store them. (There an earlier answer did not end in EOS.)
    """

    header: str = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    header_with_input: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    )
    instruction: str = "### Instruction:\n{instruction}\n\n"
    input: str = "### Input:\n{input}\n\n"
    response: str = "### Response:"
    end_of_turn: str = "{response}{eos}\n\n"

    @property
    def stop_text(self) -> str:
        """Where a model that goes on after its answer starts to invent the next question."""
        return "\n\n" + self.instruction.partition("{instruction}")[0].rstrip("\n")

    def prompt(self, instruction: str, input: str = "") -> str:
        """The text, without special tokens, that asks one question."""
        given = self.input.replace("{input}", input) if input else ""
        header = self.header_with_input if input else self.header
        return header + self.instruction.replace("{instruction}", instruction) + given + self.response

    def jinja(self, bos_token: str, eos_token: str) -> str:
        """The words as a Jinja template over `messages`; a user's message may have an `input` beside its content.

        A system message, where there is one, stands before the header.

        Args:
            bos_token: '' for tokenizers without BOS.
        """
        instruction, instruction_end = self.instruction.split("{instruction}")
        input_begin, input_end = self.input.split("{input}")
        answer, answer_end = self.end_of_turn.replace("{eos}", eos_token).split("{response}")
        return (
            f"{{{{- {_literal(bos_token)} -}}}}"
            "{%- if messages[0]['role'] == 'system' -%}"
            "{{- messages[0]['content'] + '\\n\\n' -}}{%- set turns = messages[1:] -%}"
            "{%- else -%}{%- set turns = messages -%}{%- endif -%}"
            "{%- set given = namespace(input=false) -%}"
            "{%- for message in turns -%}{%- if message['input'] -%}{%- set given.input = true -%}{%- endif -%}"
            "{%- endfor -%}"
            f"{{%- if given.input -%}}{{{{- {_literal(self.header_with_input)} -}}}}"
            f"{{%- else -%}}{{{{- {_literal(self.header)} -}}}}{{%- endif -%}}"
            "{%- for message in turns -%}"
            "{%- if message['role'] == 'user' -%}"
            f"{{{{- {_literal(instruction)} + message['content'] + {_literal(instruction_end)} -}}}}"
            f"{{%- if message['input'] -%}}"
            f"{{{{- {_literal(input_begin)} + message['input'] + {_literal(input_end)} -}}}}{{%- endif -%}}"
            f"{{{{- {_literal(self.response)} -}}}}"
            "{%- elif message['role'] == 'assistant' -%}"
            f"{{%- if loop.last -%}}{{{{- message['content'] + {_literal(eos_token)} -}}}}"
            f"{{%- else -%}}{{{{- {_literal(answer)} + message['content'] + {_literal(answer_end)} -}}}}"
            "{%- endif -%}"
            "{%- else -%}{{- raise_exception('There is no place for a message of role ' + message['role']) -}}"
            "{%- endif -%}"
            "{%- endfor -%}"
        )


@dataclass(frozen=True)
class PromptTemplate:
    """A prompt template.

    Attributes:
        name: alpaca; model = the model's own; or the file that it was read from.
        source: its Jinja, to the byte as whatever serves the model gets it.
        stop_text: a text that ends an answer, beside the model's end tokens; '' = there is none.
        date: what a template that asks for the date is told (ISO), for ever; '' = it does not ask.
        words: the pieces that an adapter of an earlier version stores instead.
    """

    name: str
    source: str
    stop_text: str = ""
    date: str = ""
    words: AlpacaWords | None = None

    @classmethod
    def alpaca(cls, tokenizer: Tokenizer) -> "PromptTemplate":
        """Stanford Alpaca's words, with a tokenizer's BOS and EOS."""
        words = AlpacaWords()
        return cls("alpaca", words.jinja(tokenizer.bos_token, tokenizer.eos_token), words.stop_text)

    @classmethod
    def from_dict(cls, stored: dict[str, Any], tokenizer: Tokenizer) -> "PromptTemplate":
        """The template that `to_dict` of this version or of an earlier one has made a dictionary of.

        Raises:
            ValueError: something is missing in it, or of another type.
        """
        if not isinstance(stored, dict) or not all(isinstance(value, str) for value in stored.values()):
            raise ValueError(_("{name} can't be {value}", name="prompt_template", value=f"{stored!r:.60}"))
        try:
            if "source" in stored:
                return cls(**stored)
            words = AlpacaWords(**{each.name: stored[each.name] for each in fields(AlpacaWords)})
            source = words.jinja(tokenizer.bos_token, tokenizer.eos_token)
        except (TypeError, KeyError, ValueError) as error:  # a key too few; a piece without its place to fill
            raise ValueError(f"prompt_template: {error}") from error
        return cls("alpaca", source, words.stop_text, words=words)

    def to_dict(self) -> dict[str, str]:
        """The template's exact text, as training_config.json stores it."""
        if self.words:
            return asdict(self.words)
        return {"name": self.name, "source": self.source, "stop_text": self.stop_text, "date": self.date}

    @property
    def identity(self) -> str:
        """What a checkpoint knows the template by, and can be read back from; see `from_identity`."""
        if self.words:  # as the checkpoints of that time have it
            return f"PromptTemplate({', '.join(f'{name}={text!r}' for name, text in asdict(self.words).items())})"
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_identity(cls, identity: str, tokenizer: Tokenizer) -> "PromptTemplate":
        """The template of a checkpoint.

        Raises:
            ValueError: it is none.
        """
        if identity == FIRST_IDENTITY:
            return cls.from_dict(asdict(FIRST_WORDS), tokenizer)
        return cls.from_dict(json.loads(identity), tokenizer)

    def render(
        self, messages: Sequence[Message], special_tokens: Mapping[str, str], add_generation_prompt: bool
    ) -> str:
        """The text of a conversation.

        Args:
            special_tokens: what the template may name, such as bos_token.
            add_generation_prompt: end in what an answer follows.

        Raises:
            TemplateRefusal: the template does not take this conversation.
        """
        # transformers' own Jinja, sandbox and functions: what it makes of the merged model's template is the same.
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), _spans = render_jinja_template(
                [[self.as_dict(message) for message in messages]],
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except Exception as error:  # the program is a stranger's: it may fail as any
            raise TemplateRefusal(" ".join(str(error).split()) or type(error).__name__) from error
        return text

    @property
    def takes_input(self) -> bool:
        """Whether it has a place of its own for what Alpaca's records give beside an instruction."""
        return "message['input']" in self.source

    def as_dict(self, message: Message) -> dict[str, str]:
        """A message as the template takes it, and as whatever serves the model is given it."""
        if not message.input:
            return {"role": message.role, "content": message.text}
        if self.takes_input:
            return {"role": message.role, "content": message.text, "input": message.input}
        return {"role": message.role, "content": f"{message.text}\n{message.input}"}


FIRST_WORDS = AlpacaWords(end_of_turn="{response}\n\n")
FIRST_IDENTITY = PromptTemplate("alpaca", "", words=FIRST_WORDS).identity
"""What checkpoints have whose runs began before there was another template."""


def choose_template(wanted: str, folder: Path, tokenizer: Tokenizer, day: str = "") -> PromptTemplate:
    """The template that --prompt_template names.

    Args:
        wanted: auto, alpaca, model, or the name of a file.
        folder: the model's.
        day: what it is to take for today's date (ISO); '' = today's.

    Raises:
        UserError: there is none, or it is not Jinja.
    """
    if wanted == "alpaca":
        return PromptTemplate.alpaca(tokenizer)
    if wanted not in ("auto", "model"):
        try:
            source = Path(wanted).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name that no file can have
            raise UserError(
                _(
                    "--prompt_template {value}: expected auto, alpaca, model, or a file of Jinja ({error})",
                    value=wanted,
                    error=getattr(error, "strerror", None) or error,
                )
            ) from error
        return _fixed(wanted, source, day)
    source = own_template(folder)
    if source is not None:
        return _fixed("model", source, day)
    if wanted == "model":
        raise UserError(
            _(
                "{folder} has no chat template of its own (chat_template.jinja, or chat_template in "
                "tokenizer_config.json). Leave --prompt_template out, or: {advice}",
                folder=folder,
                advice=USE_ALPACA,
            )
        )
    return PromptTemplate.alpaca(tokenizer)


def own_template(folder: Path) -> str | None:
    """The chat template of a model's folder, where it has one; the places and their order are transformers'."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            source = file.read_text(encoding="utf-8")
            return source if source.strip() else None
        except UnicodeDecodeError as error:
            raise UserError(_("{file} can't be read ({error}).", file=file, error=error)) from error
    found = read_settings(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, each with its name
        defaults = [each for each in found if isinstance(each, dict) and each.get("name") == "default"]
        found = defaults[-1].get("template") if defaults else None
    return found if isinstance(found, str) and found.strip() else None


FIXED_DAY = "{%- macro strftime_now(format) -%}"
"""What a template begins with that is told one date for ever."""
NOW = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")


def _fixed(name: str, source: str, day: str) -> PromptTemplate:
    """A template that is told one date for ever: with another one each day, no model would be asked as it was taught.

    Raises:
        UserError: it is not Jinja.
    """
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template([], chat_template=source)
    except (TemplateSyntaxError, RecursionError) as error:  # RecursionError: a thousand brackets
        raise UserError(
            _(
                "The chat template ({name}) can't be read, line {line}: {error}. Mend it, or: {advice}",
                name=name,
                line=getattr(error, "lineno", 1),
                error=error,
                advice=USE_ALPACA,
            )
        ) from error
    if "strftime_now" not in source:
        return PromptTemplate(name, source)
    day = day or date.today().isoformat()
    written = {match["format"]: date.fromisoformat(day).strftime(match["format"]) for match in NOW.finditer(source)}
    known = ", ".join(f"{_literal(form)}: {_literal(text)}" for form, text in sorted(written.items()))
    macro = f"{FIXED_DAY}{{{{- {{{known}}}.get(format, {_literal(day)}) -}}}}{{%- endmacro %}}"
    # Jinja takes a line's end away that follows a block.
    return PromptTemplate(name, macro + ("\n" if source.startswith("\n") else "") + source, date=day)


def _literal(text: str) -> str:
    """`text` as a string literal of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
