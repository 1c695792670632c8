"""A command line, or a call from Python -> a validated configuration dataclass.

Every field of the dataclass is a flag, and a keyword argument of the command's `main`; a field that is itself a
dataclass gives dotted ones (`--lora_config.r 16`). Values are read by the field's type, so `--prompt 2024` stays text.
All problems are reported together, before anything runs.
"""

import ast
import difflib
import functools
import inspect
import math
import os
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from configs.errors import UserError, run_main
from configs.messages import _
from configs.text import has_half_character

Config = TypeVar("Config")

TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")


class Flag:
    """One flag: where its value goes and how it is read.

    A field's metadata may hold `bare`, the value of the flag when it stands alone (`--quantization`), `aliases`, other
    spellings of a choice, and `any_text`, which lets the value look like a flag (`--prompt --你好`).
    """

    def __init__(self, name: str, field: Field, kind: Any, doc: str) -> None:
        self.name, self.kind, self.doc, self.metadata = name, kind, doc, field.metadata
        self.may_be_none = get_origin(kind) in (Union, types.UnionType)
        if self.may_be_none:  # Optional[X] is read as X
            (self.kind,) = (option for option in get_args(kind) if option is not type(None))
        self.default = field.default if field.default is not MISSING else field.default_factory()
        self.is_list = get_origin(self.kind) is list
        self.bare = "true" if self.kind is bool else self.metadata.get("bare")

    @property
    def type_name(self) -> str:
        """What a value looks like, for help and errors."""
        if get_origin(self.kind) is Literal:
            return "|".join(get_args(self.kind))
        return {bool: "true|false", int: "N", float: "X", str: "TEXT"}.get(self.kind, "[a,b]")

    def read(self, given: Any) -> Any:
        """The value of the flag, of its text or of what a call from Python gives.

        Raises:
            ValueError: with what was expected.
        """
        if given is None and self.may_be_none:
            return None
        if self.is_list and not isinstance(given, str):
            if isinstance(given, (list, tuple)) and all(isinstance(item, str) for item in given):
                return list(given)
            raise ValueError(_("a list of texts"))
        if self.kind is str and not isinstance(given, (str, os.PathLike, int, float)):
            raise ValueError(_("text"))
        text = str(given)
        if self.kind is bool:
            if text.lower() not in TRUE + FALSE:
                raise ValueError(_("true or false"))
            return text.lower() in TRUE
        if self.kind in (int, float):
            try:
                value = self.kind(text)
                if math.isfinite(value):
                    return value
            except (ValueError, OverflowError):
                pass
            raise ValueError(_("a whole number") if self.kind is int else _("a number"))
        if get_origin(self.kind) is Literal:
            value = self.metadata.get("aliases", {}).get(text.lower(), text)
            if value is not None and value not in get_args(self.kind):
                raise ValueError(_("one of {choices}", choices=", ".join(get_args(self.kind))))
            return value
        if self.is_list:
            return [item.strip(" '\"") for item in text.strip("[]()").split(",") if item.strip(" '\"")]
        return text


def parse(config_class: type[Config], argv: list[str]) -> Config:
    """Read the command line `argv` into a `config_class`.

    Raises:
        UserError: an unknown flag, a missing or wrong value, or what the class's own `problems()` finds.
    """
    flags = _flags_by_name(config_class)
    texts = [f"--{flag.name}" for flag in flags.values() if flag.metadata.get("any_text")]
    if any(token in ("-h", "--help") and before not in texts for before, token in zip(["", *argv], argv, strict=False)):
        print(usage(config_class))
        sys.exit(0)
    _check_readable(argv)
    given, problems = _gather(argv, flags)
    return _configured(config_class, flags, given, problems)


def configure(config_class: type[Config], settings: dict[str, Any]) -> Config:
    """Read a call's keyword arguments into a `config_class`: the names of flags, values or the flags' texts.

    Raises:
        UserError: as `parse` does, in the same words.
    """
    flags = _flags_by_name(config_class)
    _check_readable(map(str, [*settings, *settings.values()]))
    given = {name: [value] for name, value in settings.items() if name in flags}
    problems = [_unknown(name, flags) for name in settings if name not in flags]
    return _configured(config_class, flags, given, problems)


def run_command(main: Callable[..., object], config_class: type) -> NoReturn:
    """Make the call of `main` that the command line asks for, and leave with the exit status that its end deserves."""
    run_main(lambda: call(main, config_class, sys.argv[1:]))


def call(main: Callable[..., object], config_class: type, argv: list[str]) -> object:
    """Have fire make the call of `main` that `argv` asks for; returns what it returns.

    fire is handed what was read and found right, as --name=value, so that it is left nothing to guess: by itself it
    takes values for Python and parts of them for flags, makes up flags that nobody gave, and prints what comes back.
    """
    texts = texts_of(parse(config_class, argv))

    from fire import Fire, decorators  # --help and a wrong flag need not wait for it

    command = [f"--{name}={text}" for name, text in texts.items()]
    return Fire(decorators.SetParseFn(str)(main), command, serialize=lambda _result: None)


def find_problems(config: Any) -> Iterator[str]:
    """The problems that a configuration, and those within it, find in their own values."""
    yield from getattr(config, "problems", lambda: ())()
    for field in fields(config):
        if is_dataclass(getattr(config, field.name)):
            yield from find_problems(getattr(config, field.name))


def texts_of(config: Any, prefix: str = "") -> dict[str, str]:
    """Name and text of each flag from which this configuration is read: every setting that is not its default."""
    texts, defaults = {}, type(config)()
    for field in fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if is_dataclass(value):
            texts |= texts_of(value, name + ".")
        elif value != getattr(defaults, field.name):
            texts[name] = _list_text(value) if isinstance(value, list) else str(value)
    return texts


def flags_of(config: Any) -> list[str]:
    """The arguments from which `parse` reads this configuration."""
    arguments: list[str] = []
    for name, text in texts_of(config).items():
        arguments += [f"--{name}={text}"] if text.startswith("--") else [f"--{name}", text]
    return arguments


def usage(config_class: type) -> str:
    """The text of `--help`: the first paragraph of the class's docstring, then each flag with its meaning."""
    lines = [_(inspect.cleandoc(config_class.__doc__ or "").split("\n\n")[0].replace("\n", " ")), ""]
    for flag in _flags(config_class):
        default = "" if flag.default in (None, "", []) else _(" (default {value})", value=flag.default)
        lines.append(f"  --{flag.name} {flag.type_name}{default}")
        doc = _(flag.doc)  # Chinese has no spaces to break at; the terminal does that
        lines += [" " * 6 + line for line in (textwrap.wrap(doc, 100) if doc.isascii() else [doc])]
    return "\n".join(lines)


def _check_readable(texts: Iterable[str]) -> None:
    """Refuse text that can't be written: bytes of the command line that are no UTF-8 come as half characters."""
    for text in texts:
        if has_half_character(text):
            raise UserError(_("This is not UTF-8 text: {text}", text=ascii(text)))


def _configured(
    config_class: type[Config], flags: dict[str, Flag], given: dict[str, list[Any]], problems: list[str]
) -> Config:
    """The configuration, unless there are problems: those that were found before, and those of its values."""
    values: dict[str, Any] = {}
    for name, items in given.items():
        for item in items:
            try:
                value = flags[name].read(item)
            except ValueError as error:
                problems.append(_("--{name} {text}: expected {expected}", name=name, text=item, expected=error))
                continue
            values[name] = values.get(name, []) + value if flags[name].is_list else value
    config = _build(config_class, values)
    problems += find_problems(config)
    if problems:
        raise UserError("\n".join([*problems, _("`--help` lists every flag.")]))
    return config


def _unknown(name: str, flags: dict[str, Flag]) -> str:
    near = difflib.get_close_matches(name, flags, n=1, cutoff=0.4)
    hint = _("; did you mean --{near}?", near=near[0]) if near else ""
    return _("unknown flag --{name}", name=name) + hint


def _gather(argv: list[str], flags: dict[str, Flag]) -> tuple[dict[str, list[str]], list[str]]:
    """Sort the command line into each flag's texts; what belongs nowhere is a problem."""
    given: dict[str, list[str]] = {}
    problems: list[str] = []
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        name, equals, text = token.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not token.startswith("--"):
            problems.append(_("unexpected `{token}`: a value must follow its flag", token=token))
            continue
        flag = flags.get(name)
        if flag is None:
            problems.append(_unknown(name, flags))
            if tokens and not equals and not tokens[0].startswith("--"):
                tokens.pop(0)
            continue
        if not equals:
            looks_like_flag = bool(tokens) and tokens[0].startswith("--")
            if flag.bare is not None and (not tokens or looks_like_flag):
                text = flag.bare
            elif not tokens or (looks_like_flag and not flag.metadata.get("any_text")):
                problems.append(_("--{name} needs a value", name=name))
                continue
            else:
                text = tokens.pop(0)
        if flag.is_list:
            given.setdefault(name, []).append(text)
        else:
            given[name] = [text]
    return given, problems


def _list_text(items: list[str]) -> str:
    """The text that is read as these items; quotes save brackets at its ends from being taken for the list's."""
    text = ",".join(items)
    return text if text == text.strip("[]()") else ",".join(f"'{item}'" for item in items)


def _flags_by_name(config_class: type) -> dict[str, Flag]:
    return {flag.name: flag for flag in _flags(config_class)}


def _flags(config_class: type, prefix: str = "") -> Iterator[Flag]:
    kinds, docs = get_type_hints(config_class), field_docs(config_class)
    for field in fields(config_class):
        kind = kinds[field.name]
        if is_dataclass(kind):
            yield from _flags(kind, prefix + field.name + ".")
        else:
            yield Flag(prefix + field.name, field, kind, docs.get(field.name, ""))


def _build(config_class: type[Config], values: dict[str, Any], prefix: str = "") -> Config:
    kinds, chosen = get_type_hints(config_class), {}
    for field in fields(config_class):
        name = prefix + field.name
        if is_dataclass(kinds[field.name]):
            chosen[field.name] = _build(kinds[field.name], values, name + ".")
        elif name in values:
            chosen[field.name] = values[name]
    return config_class(**chosen)


@functools.cache
def field_docs(config_class: type) -> dict[str, str]:
    """The docstring beneath each field of a dataclass (Python keeps none, so they are read from its source)."""
    docs: dict[str, str] = {}
    for base in config_class.__bases__:
        if is_dataclass(base):
            docs |= field_docs(base)
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if is_field and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs
