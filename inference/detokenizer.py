"""Token ids -> text, piece by piece, never cutting a character."""

from ft_datasets.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4
"""Tokens that one character may take: a byte each."""


class IncrementalDecoder:
    """Decodes a growing list of ids; the pieces it returns are final, and together they are `tokenizer.decode` of all.

    A few earlier tokens are decoded along with the new one, since a token's text depends on its neighbours (leading
    spaces, bytes of one character). A piece that ends inside a character waits for the rest of it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.window = 0  # first id that is decoded as context
        self.read = 0  # first id whose text was not returned yet
        self.replacement_ids = tokenizer.encode(REPLACEMENT)[-3:]

    def push(self, token_id: int) -> str:
        """Take one id, and return the text that is now certain ('' inside a character)."""
        self.ids.append(token_id)
        text = self._pending()
        if text.endswith(REPLACEMENT) and len(self.ids) - self.read < LONGEST_CHARACTER:
            return ""
        return self._accept(text)

    def finish(self) -> str:
        """Return what was waiting, without a character that was cut off."""
        text = self._pending()
        written_out = self.ids[-len(self.replacement_ids) :] == self.replacement_ids
        return self._accept(text if written_out else text.rstrip(REPLACEMENT))

    def _pending(self) -> str:
        context = self.tokenizer.decode(self.ids[self.window : self.read])
        return self.tokenizer.decode(self.ids[self.window :])[len(context) :]

    def _accept(self, text: str) -> str:
        if text:
            self.window, self.read = self.read, len(self.ids)
        return text


class StopText:
    """Ends a text where a stop string begins; holds back an end that may turn out to be its beginning."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Take a piece and return what can't belong to the stop string."""
        if self.found:
            return ""
        text = self.held + piece
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
