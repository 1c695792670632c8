"""Bring the Chinese catalogue up to date: every message of the programs, the translations that there are, compiled.

    python -m scripts.catalogue        (or: make catalogue)

Prints the messages that lack a translation. Write it into the .po file beneath `msgid` (where a message has changed,
put the old translation right and remove `#, fuzzy`), then run it again.
"""

import dataclasses
import importlib
import inspect
import io
from collections import defaultdict
from pathlib import Path

from babel.messages.catalog import Catalog
from babel.messages.extract import extract
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

from configs.command_line import field_docs
from configs.messages import DOMAIN, LOCALE_DIR

ROOT = LOCALE_DIR.parent
PO_FILE = LOCALE_DIR / "zh_CN" / "LC_MESSAGES" / f"{DOMAIN}.po"
MO_FILE = PO_FILE.with_suffix(".mo")
NOT_THE_PROGRAMS = ("tests", "models", "output")


def main() -> None:
    """Extract, merge, write, compile, and say what is missing."""
    catalog = read_catalog()
    catalog.update(current_messages(), update_creation_date=False)
    with PO_FILE.open("wb") as file:
        write_po(file, catalog, width=118, include_lineno=False, ignore_obsolete=True)
    MO_FILE.write_bytes(compiled(read_catalog()))
    missing = untranslated(catalog)
    print(f"{PO_FILE.relative_to(ROOT)}: {len(catalog)} messages, {len(missing)} without a translation")
    for text in missing:
        print(f"  {text!r}")


def read_catalog() -> Catalog:
    """The catalogue as it is stored."""
    with PO_FILE.open("rb") as file:
        return read_po(file, locale="zh_CN", domain=DOMAIN)


def current_messages() -> Catalog:
    """Every message that the sources hold, without translations."""
    catalog = Catalog()
    for text, files in sorted((messages_in_code() | messages_in_docs()).items(), key=lambda item: item[1]):
        catalog.add(text, locations=[(file, 0) for file in sorted(files)]).flags.discard("python-format")
    return catalog


def messages_in_code() -> dict[str, set[str]]:
    """The text of every `_("…")`, and the files where it stands."""
    messages: dict[str, set[str]] = defaultdict(set)
    for path in source_files():
        with path.open("rb") as source:
            for _line, text, _comments, _context in extract("python", source, keywords={"_": None}):
                messages[text].add(path.relative_to(ROOT).as_posix())
    return dict(messages)


def messages_in_docs() -> dict[str, set[str]]:
    """What `--help` shows of the configuration classes: each one's first paragraph, and the text beneath each field."""
    messages: dict[str, set[str]] = defaultdict(set)
    for path in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{path.stem}")
        for config_class in vars(module).values():
            if not (inspect.isclass(config_class) and dataclasses.is_dataclass(config_class)):
                continue
            texts = list(field_docs(config_class).values())
            if not config_class.__name__.startswith("_"):
                texts.append(inspect.cleandoc(config_class.__doc__ or "").split("\n\n")[0].replace("\n", " "))
            for text in texts:
                messages[text].add(config_class.__module__.replace(".", "/") + ".py")
    return dict(messages)


def source_files() -> list[Path]:
    """The programs' Python files."""
    tops = [top for top in ROOT.iterdir() if top.name[0] != "." and top.name not in NOT_THE_PROGRAMS]
    tops = [top for top in tops if not (top / "pyvenv.cfg").exists()]
    return sorted(path for top in tops for path in ([top] if top.suffix == ".py" else top.rglob("*.py")))


def untranslated(catalog: Catalog) -> list[str]:
    """Messages without a translation, or with one of an earlier wording."""
    return [message.id for message in catalog if message.id and (message.fuzzy or not message.string)]


def compiled(catalog: Catalog) -> bytes:
    """The .mo file of a catalogue."""
    buffer = io.BytesIO()
    write_mo(buffer, catalog)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
