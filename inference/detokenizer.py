"""Token ids -> text, piece by piece, never cutting a character."""

from ft_datasets.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4
"""Tokens that one character may take: a byte each."""
PROBE = "a"
"""Put before a text so that its tokens are those of the middle of a line."""


class IncrementalDecoder:
    """A decoder of ids that come one by one; its pieces are final, and together they are `tokenizer.decode` of all.

    A few earlier tokens are decoded along with the new one, since a token's text depends on its neighbours (leading
    spaces, bytes of one character). A piece that ends inside a character waits for the rest of it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.window = 0  # first id that is decoded as context
        self.read = 0  # first id whose text was not returned yet
        self.held = 0  # how many of the last ids may be the beginning of a character
        self.probe_ids = tokenizer.encode(PROBE)

    def push(self, token_id: int) -> str:
        """Take one id, and return the text that is now certain ('' inside a character)."""
        self.ids.append(token_id)
        text, end = self._pending(len(self.ids)), len(self.ids)
        if not text.endswith(REPLACEMENT) or self._is_written_out():
            self.held = 0
            return self._accept(text, end)
        self.held += 1
        if self.held < LONGEST_CHARACTER:
            return ""
        # The first of four ids that make no character begins none: it is a stray byte.
        self.held -= 1
        return self._accept(self._pending(end - self.held), end - self.held)

    def finish(self) -> str:
        """Return what was waiting, without a character that was cut off."""
        text = self._pending(len(self.ids))
        return self._accept(text if self._is_written_out() else text.rstrip(REPLACEMENT), len(self.ids))

    def _is_written_out(self) -> bool:
        """Whether the text ends in the character U+FFFD itself, and not in bytes that make no character."""
        for count in range(1, LONGEST_CHARACTER):
            last = self.ids[-count:]
            text = self.tokenizer.decode(last)
            if text.endswith(REPLACEMENT) and self.tokenizer.encode(PROBE + text) == self.probe_ids + last:
                return True
        return False

    def _pending(self, end: int) -> str:
        context = self.tokenizer.decode(self.ids[self.window : self.read])
        return self.tokenizer.decode(self.ids[self.window : end])[len(context) :]

    def _accept(self, text: str, end: int) -> str:
        if text:
            self.window, self.read = self.read, end
        return text


class StopText:
    """A filter that ends a text where a stop string begins; an end that may be its beginning is held back.

    Args:
        stop: the string; '' = none ends it.
    """

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Take a piece and return what can't belong to the stop string."""
        if self.found:
            return ""
        text = self.held + piece
        if not self.stop:
            return text
        before, stop, _after = text.partition(self.stop)
        if stop:
            self.found, self.held = True, ""
            return before
        overlap = next((n for n in range(min(len(self.stop) - 1, len(text)), 0, -1) if text.endswith(self.stop[:n])), 0)
        self.held = text[len(text) - overlap :]
        return text[: len(text) - overlap]

    def finish(self) -> str:
        """Return what was held back."""
        held, self.held = self.held, ""
        return held
