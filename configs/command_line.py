"""Command line -> a validated configuration dataclass.

Every field of the dataclass is a flag; a field that is itself a dataclass gives dotted flags (`--lora_config.r 16`).
Values are read by the field's type, so `--prompt 2024` stays text. All problems are reported together, before
anything runs.
"""

import ast
import difflib
import functools
import inspect
import math
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from configs.errors import UserError
from configs.messages import _

Config = TypeVar("Config")

TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")


class Flag:
    """One flag: where its value goes and how its text is read.

    A field's metadata may hold `bare`, the value of the flag when it stands alone (`--quantization`), `aliases`, other
    spellings of a choice, and `any_text`, which lets the value look like a flag (`--prompt --你好`).
    """

    def __init__(self, name: str, field: Field, kind: Any, doc: str) -> None:
        self.name, self.kind, self.doc, self.metadata = name, kind, doc, field.metadata
        if get_origin(kind) in (Union, types.UnionType):  # Optional[X] is read as X
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

    def read(self, text: str) -> Any:
        """The value that `text` stands for. Raises ValueError with what was expected."""
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
    """Read `argv` into a `config_class`.

    Raises:
        UserError: an unknown flag, a missing or wrong value, or what the class's own `problems()` finds.
    """
    flags = {flag.name: flag for flag in _flags(config_class)}
    texts = [f"--{flag.name}" for flag in flags.values() if flag.metadata.get("any_text")]
    if any(token in ("-h", "--help") and before not in texts for before, token in zip(["", *argv], argv, strict=False)):
        print(usage(config_class))
        sys.exit(0)
    unreadable = [token for token in argv if any("\ud800" <= character <= "\udfff" for character in token)]
    if unreadable:
        raise UserError(_("The command line is not UTF-8 text: {text}", text=ascii(unreadable[0])))
    given, problems = _gather(argv, flags)
    values: dict[str, Any] = {}
    for name, texts in given.items():
        for text in texts:
            try:
                value = flags[name].read(text)
            except ValueError as error:
                problems.append(_("--{name} {text}: expected {expected}", name=name, text=text, expected=error))
                continue
            values[name] = values.get(name, []) + value if flags[name].is_list else value
    config = _build(config_class, values)
    problems += find_problems(config)
    if problems:
        raise UserError("\n".join([*problems, _("`--help` lists every flag.")]))
    return config


def find_problems(config: Any) -> Iterator[str]:
    """What the dataclass, and those within it, say of their own values."""
    yield from getattr(config, "problems", lambda: ())()
    for field in fields(config):
        if is_dataclass(getattr(config, field.name)):
            yield from find_problems(getattr(config, field.name))


def flags_of(config: Any, prefix: str = "") -> list[str]:
    """The arguments from which `parse` reads this configuration: every setting that is not its default."""
    arguments, defaults = [], type(config)()
    for field in fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if is_dataclass(value):
            arguments += flags_of(value, name + ".")
        elif value != getattr(defaults, field.name):
            arguments += [f"--{name}", ",".join(value) if isinstance(value, list) else str(value)]
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
            near = difflib.get_close_matches(name, flags, n=1, cutoff=0.4)
            hint = _("; did you mean --{near}?", near=near[0]) if near else ""
            problems.append(_("unknown flag --{name}", name=name) + hint)
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
