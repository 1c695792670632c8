"""A conversation in the terminal."""

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import get_type_hints

from configs.command_line import Flag
from configs.errors import UserError
from configs.messages import _
from configs.serving import Sampling
from ft_datasets.conversation import Turn
from inference.engine import Engine, PromptRefused, PromptTooLong, Statistics


def answer_once(engine: Engine, prompt: str, sampling: Sampling) -> str:
    """Write the answer to `prompt` to standard output as it comes, and how fast it came to standard error.

    Returns:
        The whole answer.
    """
    statistics, answer = Statistics(), ""
    for piece in engine.stream(engine.encode_chat(prompt), sampling, statistics):
        answer += piece
        print(piece, end="", flush=True)
    print(flush=True)
    _print_speed(statistics)
    return answer


class Chat:
    """A conversation in the terminal (or over a pipe): questions, answers as they come, and what was said so far."""

    def __init__(self, engine: Engine, sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling
        self.history: list[Turn] = []

    def run(self) -> None:
        """Talk until /exit, the end of the input, or Ctrl-D."""
        if is_interactive():
            print(_("Commands: /new /undo /params /exit /help. Ctrl-C ends an answer."))
        for line in _lines():
            command, _space, argument = line.strip().partition(" ")
            if command == "/exit":
                return
            if command == "/new":
                self.history.clear()
                print(_("A new conversation."))
            elif command == "/undo":
                print(
                    _("Taken back: {question}", question=self.history.pop()[0])
                    if self.history
                    else _("Nothing to undo.")
                )
            elif command == "/params":
                self._params(argument.strip())
            elif command == "/help":
                print(
                    _(
                        "/new      begin a new conversation\n"
                        "/undo     take the last question and its answer back\n"
                        "/params   show the sampling settings; /params top_p shows one, /params top_p 0.8 changes it\n"
                        "/exit     end (so does Ctrl-D)\n"
                        "Ctrl-C ends an answer. A question that begins with / may have a space before it."
                    )
                )
            elif re.match(r"/\w*$", command) and not line.startswith(" "):
                print(_("There is no command {command}; /help lists those that there are.", command=command))
            elif line.strip():
                with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C, or one before the first token
                    self._answer(line)

    def _answer(self, question: str) -> None:
        turns = self.engine.recent_turns(question, self.history, self.sampling.max_new_tokens)
        if len(turns) < len(self.history):
            print(
                _("(The first {count} turns no longer fit and are left out.)", count=len(self.history) - len(turns)),
                file=sys.stderr,
            )
        statistics, answer = Statistics(), ""
        try:
            for piece in self.engine.stream(self.engine.encode_chat(question, turns), self.sampling, statistics):
                answer += piece
                print(piece, end="", flush=True)
        except (PromptTooLong, PromptRefused) as error:
            print(error)
            return
        except KeyboardInterrupt:
            statistics.finish_reason = "cancelled"
        self.history.append((question, answer))
        print(flush=True)
        _print_speed(statistics)

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


def _lines() -> Iterator[str]:
    """Lines that the user types, with editing and recall; or those of a pipe."""
    if not is_interactive():
        yield from _lines_of_pipe()
        return
    ask: Callable[[str], str] = input
    if not _in_notebook():
        from prompt_toolkit import PromptSession

        ask = PromptSession[str]().prompt
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
