"""A conversation in the terminal."""

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

from configs.command_line import Flag
from configs.errors import UserError
from configs.messages import _
from configs.serving import Sampling
from ft_datasets.conversation import Message, Turn, messages_of
from inference.engine import Engine, PromptRefused, PromptTooLong, Statistics
from inference.terminal.saving import append_record


def answer_once(engine: Engine, prompt: str, sampling: Sampling, system: str = "") -> str:
    """Write the answer to `prompt` to standard output as it comes, and how fast it came to standard error.

    Returns:
        The whole answer.
    """
    statistics, answer = Statistics(), ""
    for piece in engine.stream(engine.encode_chat(prompt, system=system), sampling, statistics):
        answer += piece
        print(piece, end="", flush=True)
    print(flush=True)
    _print_speed(statistics)
    return answer


class Chat:
    """A conversation in the terminal (or over a pipe): questions, answers as they come, and what was said so far.

    Args:
        system: what the model is told before it; '' = nothing.
    """

    def __init__(self, engine: Engine, sampling: Sampling, system: str = "") -> None:
        self.engine, self.sampling, self.system = engine, sampling, system
        self.history: list[Turn] = []
        self.draws = 0  # how often the last question was asked again

    def run(self) -> None:
        """Talk until /exit, the end of the input, or Ctrl-D."""
        if is_interactive():
            print(_("Commands: /new /undo /params /exit /help. Ctrl-C ends an answer."))
        for text in _lines():
            command, argument = [*text.split(maxsplit=1), "", ""][:2]
            if re.match(r"/\w*$", command) and not text.startswith(" "):
                if command == "/exit":
                    return
                self._obey(command, argument.strip())
            elif question := _without_quotes(text):
                self.draws = 0
                self._answer(question, self.history)

    def _obey(self, command: str, argument: str) -> None:
        if command == "/new":
            self.history = []
            print(_("A new conversation."))
        elif command == "/undo":
            print(
                _("Taken back: {question}", question=self.history.pop()[0]) if self.history else _("Nothing to undo.")
            )
        elif command == "/retry":
            self._retry()
        elif command == "/system":
            self._tell(argument)
        elif command == "/save":
            self._save(argument)
        elif command == "/params":
            self._params(argument)
        elif command == "/help":
            print(
                _(
                    "/system   show the system message, which the model is told before the conversation;\n"
                    "          /system TEXT sets it, /system '' takes it away\n"
                    "/retry    ask the last question again, for another answer in the place of the last one\n"
                    "/undo     take the last question and its answer back\n"
                    "/new      begin a new conversation; the system message stays\n"
                    "/save     /save talk.jsonl appends the conversation to this file, as a record of chat_dataset\n"
                    "/params   show the sampling settings; /params top_p shows one, /params top_p 0.8 changes it\n"
                    "/exit     end (so does Ctrl-D)\n"
                    'Ctrl-C ends an answer. Alt-Enter begins a new line of a question; Enter does so too after """,\n'
                    'until another """. What is pasted stays together. A question that begins with / may have a space '
                    "before it."
                )
            )
        else:
            print(_("There is no command {command}; /help lists those that there are.", command=command))

    def _answer(self, question: str, before: Sequence[Turn]) -> None:
        """Answer a question after these turns; together they are the conversation from then on."""
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C, or one before the first token
            turns = self.engine.recent_turns(question, before, self.sampling.max_new_tokens, self.system)
            if len(turns) < len(before):
                print(
                    _("(The first {count} turns no longer fit and are left out.)", count=len(before) - len(turns)),
                    file=sys.stderr,
                )
            statistics, answer = Statistics(), ""
            try:
                prompt_ids = self.engine.encode_chat(question, turns, self.system)
                for piece in self.engine.stream(prompt_ids, self._sampling_of_draw(), statistics):
                    answer += piece
                    print(piece, end="", flush=True)
            except (PromptTooLong, PromptRefused) as error:
                print(error)
                return
            except KeyboardInterrupt:
                statistics.finish_reason = "cancelled"
            self.history = [*before, (question, answer)]
            print(flush=True)
            _print_speed(statistics)

    def _retry(self) -> None:
        if not self.history:
            print(_("Nothing to ask again."))
            return
        if self.sampling.temperature == 0:
            print(_("(At temperature 0 the answer is always the same: /params temperature 0.7)"), file=sys.stderr)
        self.draws += 1
        *before, (question, _answer) = self.history
        self._answer(question, before)

    def _sampling_of_draw(self) -> Sampling:
        """The settings, with a seed of its own for each time that a question is asked again."""
        if self.sampling.seed is None or not self.draws:
            return self.sampling
        return replace(self.sampling, seed=(self.sampling.seed + self.draws) % 2**63)

    def _tell(self, argument: str) -> None:
        """`/system` shows the system message, `/system TEXT` sets it; `/system ''` takes it away."""
        if argument:
            system = "" if argument in ("''", '""') else _without_quotes(argument)
            try:
                self.engine.encode_chat("?", (), system)
            except (PromptTooLong, PromptRefused) as error:
                print(error)
                return
            self.system = system
        print(self.system or _("There is no system message."))

    def _save(self, argument: str) -> None:
        """`/save FILE` appends the conversation to a file of records, but for questions that got no answer."""
        turns = [(question, answer) for question, answer in self.history if answer.strip()]
        if not argument or not turns:
            print(_("Name a file: /save talk.jsonl") if turns else _("There is nothing to save."))
            return
        *before, (question, answer) = turns
        file = Path(argument).expanduser() if argument.startswith("~/") else Path(argument)
        try:
            append_record(file, [*messages_of(question, before, self.system), Message("assistant", answer)])
        except UserError as error:
            print(error)
            return
        print(_("Saved in {file} (one more record for chat_dataset).", file=file))

    def _params(self, argument: str) -> None:
        """`/params` shows the sampling settings, `/params top_p` one of them; `/params top_p 0.8` changes it."""
        kinds = get_type_hints(Sampling)
        flags = {field.name: Flag(field.name, field, kinds[field.name], "") for field in fields(Sampling)}
        if argument:
            name, _space, text = argument.replace("=", " ").partition(" ")
            try:
                if name not in flags:
                    raise ValueError(_("no such setting; there are {names}", names=", ".join(flags)))
                if not text.strip():
                    print(f"{name}={getattr(self.sampling, name)}")
                    return
                before = getattr(self.sampling, name)
                setattr(self.sampling, name, flags[name].read(text.strip()))
                if problems := list(Sampling.problems(self.sampling)):
                    setattr(self.sampling, name, before)
                    raise ValueError(problems[0])
            except ValueError as error:
                print(f"{argument}: {error}")
                return
        print("  ".join(f"{name}={getattr(self.sampling, name)}" for name in flags))


def is_interactive() -> bool:
    """Whether a person types the questions, on a terminal or in a notebook."""
    return _in_notebook() or (hasattr(sys.stdin, "isatty") and sys.stdin.isatty())


def _in_notebook() -> bool:
    """Whether `input` is a notebook's own, which shows a line to type in; its sys.stdin has nothing to read."""
    return not inspect.isbuiltin(input)


QUOTES = '"""'
"""What begins and ends a text of several lines."""


def _lines() -> Iterator[str]:
    """What the user types, a question or a command each, or the lines of a pipe; what stands in quotes is one."""
    lines = _typed() if is_interactive() else _lines_of_pipe()
    for text in lines:
        while _is_open(text) and (line := next(lines, None)) is not None:
            text += "\n" + line
        yield text


def _is_open(text: str) -> bool:
    """Whether a text of several lines was begun and not ended."""
    begun = re.match(rf"\s*(/system\s+)?{QUOTES}", text)
    return begun is not None and not text[begun.end() :].rstrip().endswith(QUOTES)


def _without_quotes(text: str) -> str:
    """A text without the quotes around its lines; '' where there is nothing but blanks."""
    quoted = re.match(rf"\s*{QUOTES}\n?(.*?)\n?({QUOTES})?\s*$", text, re.DOTALL)
    text = quoted[1] if quoted else text
    return text if text.strip() else ""


def _typed() -> Iterator[str]:
    """What is typed, with editing and recall."""
    ask: Callable[[str], str] = input if _in_notebook() else _editor()
    while True:
        try:
            line = ask("> ")
        except KeyboardInterrupt:
            if _in_notebook():  # its stop button; on a terminal Ctrl-C clears the line
                return
            continue
        except EOFError:
            return
        yield line


def _editor() -> Callable[[str], str]:
    """A prompt in which Enter ends the text, unless it is within quotes; Alt-Enter begins a new line."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys, in_text = KeyBindings(), has_focus(DEFAULT_BUFFER)  # and not in the search for an earlier one

    @keys.add("enter", filter=in_text)
    def end(event: KeyPressEvent) -> None:
        if _is_open(event.current_buffer.text):
            event.current_buffer.insert_text("\n")
        else:
            event.current_buffer.validate_and_handle()

    # (Not Ctrl-J alone: Enter comes as that if it is typed while an answer is still written.)
    @keys.add("escape", "enter", filter=in_text)
    @keys.add("escape", "c-j", filter=in_text)
    def break_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession[str](multiline=True, prompt_continuation="  ", key_bindings=keys).prompt


def _lines_of_pipe() -> Iterator[str]:
    if hasattr(sys.stdin, "reconfigure"):  # a stream that is put in its place may lack it
        # Under the C locale Python would let bytes that are no text through, as half characters.
        sys.stdin.reconfigure(errors="strict")
    try:
        for line in sys.stdin or ():
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(_("The input is not UTF-8 text ({error}).", error=error)) from error


def _print_speed(statistics: Statistics) -> None:
    reason = {
        "length": _(" (cut off at the length limit)"),
        "cancelled": _(" (stopped)"),
        "stop": "",
    }[statistics.finish_reason]
    print(
        _(
            "[{tokens} tokens, {speed} tokens/s]{reason}",
            tokens=statistics.new_tokens,
            speed=f"{statistics.tokens_per_second:.1f}",
            reason=reason,
        ),
        file=sys.stderr,
        flush=True,
    )
