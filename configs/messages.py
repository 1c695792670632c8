"""The language that the programs speak to people: Chinese under a Chinese locale, English otherwise.

Source strings are English; `locale/zh_CN/LC_MESSAGES/llama2_chinese.po` holds the Chinese (`make catalogue`
compiles it). gettext picks the language from LANGUAGE, LC_ALL, LC_MESSAGES and LANG, in that order.
"""

import gettext
from pathlib import Path

DOMAIN = "llama2_chinese"
LOCALE_DIR = Path(__file__).resolve().parent.parent / "locale"

_translation = gettext.translation(DOMAIN, localedir=LOCALE_DIR, fallback=True)


def _(message: str, /, **values: object) -> str:
    """Translate `message` and fill in its `{named}` values."""
    translated = _translation.gettext(message) if message else message
    return translated.format(**values) if values else translated
