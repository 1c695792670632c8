"""The chat template of a saved model, rendered as transformers renders it."""

from pathlib import Path
from typing import Any

from utils.files import read_json

Messages = list[dict[str, str]]


class ChatTemplate:
    """A Jinja template with the special tokens that it may name.

    Attributes:
        source: its text.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        self.source, self.special_tokens = source, special_tokens

    def render(self, messages: Messages) -> str | None:
        """The prompt that asks for the next answer; None where the template refuses the messages."""
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _spans = render_jinja_template(
                [messages], chat_template=self.source, add_generation_prompt=True, **self.special_tokens
            )
        except TemplateError:
            return None
        return rendered[0]


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """A folder's chat template; None where it has none."""
    settings_file, own_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    settings: dict[str, Any] = read_json(settings_file) if settings_file.is_file() else {}
    source = own_file.read_text(encoding="utf-8") if own_file.is_file() else settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not source:
        return None
    tokens = {name: value for name, value in settings.items() if name.endswith("_token") and value}
    texts = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items()}
    return ChatTemplate(source, {name: text for name, text in texts.items() if isinstance(text, str)})
