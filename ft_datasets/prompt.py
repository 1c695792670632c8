"""The prompt template: the one place where instructions become text, in training and inference alike.

The wording is Stanford Alpaca's. The template's exact text is stored with every adapter and read back from there, so
that an adapter is always asked in the words that it was trained on.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

Turn = tuple[str, str]
"""One question and its answer."""


@dataclass(frozen=True)
class PromptTemplate:
    """The pieces that a prompt is put together from; `{instruction}`, `{input}` and `{response}` are filled in."""

    header: str = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    )
    header_with_input: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
    )
    instruction: str = "### Instruction:\n{instruction}\n\n"
    input: str = "### Input:\n{input}\n\n"
    response: str = "### Response:"
    end_of_turn: str = "{response}\n\n"

    def render(self, instruction: str, input: str = "", history: Sequence[Turn] = ()) -> str:
        """The prompt that asks `instruction`, after the earlier turns of `history`; the answer follows it directly."""
        parts = [self.header_with_input if input else self.header]
        for question, answer in history:
            parts += [_fill(self.instruction, instruction=question), self.response]
            parts.append(_fill(self.end_of_turn, response=answer))
        parts.append(_fill(self.instruction, instruction=instruction))
        if input:
            parts.append(_fill(self.input, input=input))
        parts.append(self.response)
        return "".join(parts)

    @property
    def stop_text(self) -> str:
        """Where a model that goes on after its answer starts to invent the next question."""
        return "\n\n" + self.instruction.partition("{instruction}")[0].rstrip("\n")

    def chat_template(self, bos_token: str, eos_token: str) -> str:
        """The same prompt as a Jinja template over `messages`, for vLLM, TGI, llama.cpp and transformers.

        A system message, where there is one, stands before the header. `bos_token` is empty for tokenizers without BOS.
        """
        before, after = self.instruction.split("{instruction}")
        before_answer, after_answer = self.end_of_turn.split("{response}")
        return (
            "{%- if messages[0]['role'] == 'system' -%}"
            "{%- set system = messages[0]['content'] + '\\n\\n' -%}{%- set turns = messages[1:] -%}"
            "{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}"
            f"{{{{- {_literal(bos_token)} + system + {_literal(self.header)} -}}}}"
            "{%- for message in turns -%}"
            "{%- if message['role'] == 'user' -%}"
            f"{{{{- {_literal(before)} + message['content'] + {_literal(after)} + {_literal(self.response)} -}}}}"
            "{%- elif message['role'] == 'assistant' -%}"
            f"{{%- if loop.last -%}}{{{{- message['content'] + {_literal(eos_token)} -}}}}"
            f"{{%- else -%}}{{{{- {_literal(before_answer)} + message['content'] + {_literal(after_answer)} -}}}}"
            "{%- endif -%}"
            "{%- endif -%}"
            "{%- endfor -%}"
        )

    def to_dict(self) -> dict[str, str]:
        """The template's exact text, as training_config.json stores it."""
        return asdict(self)


def _fill(template: str, **values: str) -> str:
    # Not str.format: a template may hold braces of its own.
    for name, value in values.items():
        template = template.replace("{" + name + "}", value)
    return template


def _literal(text: str) -> str:
    """`text` as a string literal of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
