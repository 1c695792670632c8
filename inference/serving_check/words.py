"""A comparison in words: a row for each question, and the verdict."""

import unicodedata
from collections.abc import Callable, Iterator

from configs.messages import _
from inference.serving_check.comparison import Comparison, Difference, Reason, Report

REASONS: dict[Reason, Callable[[], str]] = {
    "template": lambda: _(
        "Template: the server makes another prompt of the same messages. Give it the chat template of the merged "
        "folder (vLLM: --chat-template, llama.cpp: --jinja --chat-template-file), and look at the model's name."
    ),
    "bos_twice": lambda: _(
        "BOS twice: the chat template writes it, and the server puts another one before it. Have it add none."
    ),
    "bos_missing": lambda: _(
        "BOS missing: neither the server's template nor its tokenizer puts it before the prompt (add_bos_token in "
        "tokenizer_config.json, tokenizer.ggml.add_bos_token in a GGUF file)."
    ),
    "spaces": lambda: _(
        "Spaces: the server's tokenizer loses or adds some, such as `▁` behind a special token. Give it the "
        "merged folder's own tokenizer files, tokenizer.json among them, or its GGUF file."
    ),
    "special_as_text": lambda: _(
        "Special tokens as text: the server reads what the template writes as ordinary characters, or what a user "
        "writes as special tokens."
    ),
    "tokenizer": lambda: _(
        "Tokenizer: the server cuts the same text into other tokens. See that it has the files of the merged folder."
    ),
    "stop": lambda: _(
        "Stop tokens: one side goes on where the other one ends. Give the server the end tokens of the merged folder's "
        "generation_config.json, or a stop word."
    ),
    "limit": lambda: _("A limit of the server's own cuts answers off: let it have a longer context."),
    "rounding": lambda: _("Rounding: another dtype or order of sums, where two tokens are as good as equally likely."),
    "quantization": lambda: _(
        "Dtype or quantisation: the same prompt, and log-probabilities that are a little off. --load_8bit or "
        "--load_4bit compares with a base that is quantised here too; --tolerance 1 lets such differences pass. (The "
        "base without an adapter that changes little looks the same.)"
    ),
    "weights": lambda: _(
        "Weights: the same prompt, and quite other log-probabilities. It looks like another model, or like the base "
        "without the adapter."
    ),
}
"""What each reason means, and what to do about it."""


def heading() -> str:
    """The names of the table's columns."""
    return _row("", _("prompt"), _("answer"), _("log-prob"), _("question"))


def row(number: int, comparison: Comparison) -> Iterator[str]:
    """A question's line in the table, and beneath it where prompts and answers part."""
    prompt = {
        "same": _("same ids"),
        "same number": _("same length"),
        "differs": _("differs"),
        "not told": _("not told"),
    }[comparison.prompt]
    place, difference = comparison.answer_difference, comparison.logprob_difference
    answer = _("same") if place is None else _("differs at {position}", position=place.position)
    told = "" if difference is None else f"{difference:.4f}"
    question = " ".join(comparison.question.prompt.split())[:40]
    yield _row(str(number), prompt, answer, told, question + (_(" (apart)") if comparison.spells_tokens else ""))
    if not comparison.is_same:
        for name, where in ((_("prompt"), comparison.prompt_difference), (_("answer"), place)):
            if where is not None:
                yield _around(name, where)
        if "stop" in comparison.reasons and place is None:
            own, served = comparison.finish_reasons
            yield "      " + _("ended by: {own} here, {served} there", own=own, served=served)
    if comparison.reasons:
        yield "      " + _("likely: {reasons}", reasons=", ".join(comparison.reasons))


def verdict(report: Report) -> str:
    """Whether it is the same, and the likely reasons if it is not."""
    count = len(report.counted)
    if report.is_same:
        return _("The server answers as our own engine does: {count} of {count} questions.", count=count)
    differing = sum(not comparison.is_same for comparison in report.counted)
    lines = [
        _("The server differs from our own engine: {differing} of {count} questions.", differing=differing, count=count)
    ]
    lines += [f"  {number:3}  {REASONS[reason]()}" for reason, number in report.reasons]
    return "\n".join(lines)


def _around(name: str, place: Difference) -> str:
    return "      " + _("{name} here {own}, there {served}", name=name, own=repr(place.own), served=repr(place.served))


def _row(*cells: str) -> str:
    widths = (3, 12, 20, 9, 0)
    return "  ".join(cell + " " * (width - _columns(cell)) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _columns(text: str) -> int:
    """Columns that a text takes in a terminal: most Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
