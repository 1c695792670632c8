"""Text as people and programs hand it over."""


def has_half_character(text: str) -> bool:
    """Whether a text holds a lone surrogate: half of a character, or a byte that was no UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
