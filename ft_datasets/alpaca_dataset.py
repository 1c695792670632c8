"""Alpaca JSON -> records -> examples of input_ids and labels."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.messages import _
from ft_datasets.prompt import PromptTemplate
from ft_datasets.tokenizer import Tokenizer

IGNORE_INDEX = -100
"""Label of a position on which no loss is taken."""

NAMED_AT_MOST = 10
"""How many records one message names."""


@dataclass(frozen=True)
class Record:
    """One entry of the data file; `number` counts from 1, as a person counts."""

    number: int
    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Example:
    """One record as tokens.

    Attributes:
        number: the record's number in the data file.
        text: prompt and response, without BOS and EOS.
        input_ids: [BOS] + tokens + [EOS], shape [length], int32.
        prompt_length: how many of them are BOS and prompt; the loss is taken on the rest.
        shared_length: how many of the first are shared with other examples, see ft_datasets/shared_prefixes.py.
    """

    number: int
    text: str
    input_ids: np.ndarray
    prompt_length: int
    shared_length: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> np.ndarray:
        """input_ids with IGNORE_INDEX in the places of BOS and prompt, shape [length]."""
        labels = self.input_ids.copy()
        labels[: self.prompt_length] = IGNORE_INDEX
        return labels

    @property
    def own_length(self) -> int:
        """Tokens that are not shared."""
        return len(self.input_ids) - self.shared_length

    @property
    def weight(self) -> int:
        """What it counts in a row: its own tokens, or half of all, which attention has keys and values of, if more."""
        return max(self.own_length, -(-len(self.input_ids) // 2))

    @property
    def prefix(self) -> bytes:
        """The shared tokens, as something to look up."""
        return self.input_ids[: self.shared_length].tobytes()

    @property
    def response_length(self) -> int:
        """Tokens of the response, EOS included: how many losses the example brings."""
        return len(self.input_ids) - self.prompt_length


def load_records(path: str | Path) -> list[Record]:
    """Read and check an Alpaca JSON file.

    Raises:
        UserError: naming the file and the line, or the numbers of the records that are wrong.
    """
    path = Path(path)
    entries = _read_list(path)
    complaints: dict[str, list[int]] = {}
    records = []
    for number, entry in enumerate(entries, 1):
        complaint = _complaint(entry)
        if complaint:
            complaints.setdefault(complaint, []).append(number)
        else:
            records.append(Record(number, entry["instruction"], entry.get("input") or "", entry["output"]))
    if complaints:
        lines = [f"  {complaint}: {_name_records(numbers)}" for complaint, numbers in complaints.items()]
        heading = _("{file}: these records can't be used (records count from 1):", file=path)
        advice = _('Each record needs "instruction" and "output" as text, and may have "input".')
        raise UserError("\n".join([heading, *lines, advice]))
    return records


def _read_list(path: Path) -> list[Any]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            _("{file} is not there. Give the data file with --alpaca_dataset.data_path.", file=path)
        ) from None
    except OSError as error:
        raise UserError(_("{file} can't be read: {error}.", file=path, error=error.strerror)) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise UserError(
            _(
                "{file}, line {line}: not UTF-8 text. Save the file as UTF-8 (for a GBK file: "
                "iconv -f GB18030 -t UTF-8 old.json > new.json).",
                file=path,
                line=line,
            )
        ) from error
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        is_json_lines = error.msg == "Extra data" and text.lstrip().startswith("{")
        hint = _(" It looks like JSON lines; one JSON list is needed.") if is_json_lines else ""
        raise UserError(
            _(
                "{file}, line {line}, column {column}: not valid JSON ({error}).",
                file=path,
                line=error.lineno,
                column=error.colno,
                error=error.msg,
            )
            + hint
        ) from error
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        raise UserError(
            _("{file}: the JSON is nested too deep, or holds too long a number, to be a list of records.", file=path)
        ) from None
    if not isinstance(entries, list):
        raise UserError(_("{file}: a JSON list of records is expected, and this is not a list.", file=path))
    if not entries:
        raise UserError(_("{file}: the list is empty, so there is nothing to learn from.", file=path))
    return entries


def _complaint(entry: Any) -> str:
    """What keeps an entry from being a record, or ''."""
    if not isinstance(entry, dict):
        return _("not an object with named fields")
    for key in ("instruction", "output"):
        if key not in entry or entry[key] is None:
            return _('without "{key}"', key=key)
    for key in ("instruction", "input", "output"):
        if not isinstance(entry.get(key), str | None):
            return _('"{key}" is not text', key=key)
    for key in ("instruction", "output"):
        if not entry[key].strip():
            return _('"{key}" is empty', key=key)
    for key in ("instruction", "input", "output"):
        if any("\ud800" <= character <= "\udfff" for character in entry.get(key) or ""):
            return _('"{key}" holds half a character (a lone surrogate)', key=key)
    return ""


def _name_records(numbers: Sequence[int]) -> str:
    named = ", ".join(map(str, numbers[:NAMED_AT_MOST]))
    more = len(numbers) - NAMED_AT_MOST
    return named + (_(" and {count} more", count=more) if more > 0 else "")


def encode_records(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    template: PromptTemplate,
    max_seq_length: int,
    report: Callable[[str], None],
    threads: int = 1,
) -> list[Example]:
    """Turn records into examples; those longer than `max_seq_length` are left out, counted and named to `report`.

    Raises:
        UserError: no example is short enough.
    """
    prompts = [template.render(record.instruction, record.input) for record in records]
    prompt_ids = tokenizer.encode_batch(prompts, threads)
    texts = [prompt + record.output for prompt, record in zip(prompts, records, strict=True)]
    text_ids = tokenizer.encode_batch(texts, threads)
    for i, (prompt, record) in enumerate(zip(prompts, records, strict=True)):
        # The colon that ends the prompt and the answer's first character may be one token (":-"), which a model that
        # was given the colon can't generate. Such an answer starts on a new line.
        if common_prefix(prompt_ids[i], text_ids[i]) < len(prompt_ids[i]):
            texts[i] = f"{prompt}\n{record.output}"
            text_ids[i] = tokenizer.encode(texts[i])
    examples = [
        Example(record.number, text, np.array([*ids, tokenizer.eos_id], dtype=np.int32), common_prefix(prompt, ids))
        for record, text, prompt, ids in zip(records, texts, prompt_ids, text_ids, strict=True)
    ]
    kept = [example for example in examples if len(example) <= max_seq_length]
    long = [example.number for example in examples if len(example) > max_seq_length]
    if long:
        report(
            _(
                "{count} of {total} examples are longer than --max_seq_length {limit} tokens and are left out "
                "(records {numbers}; the longest has {longest} tokens).",
                count=len(long),
                total=len(examples),
                limit=max_seq_length,
                numbers=_name_records(long),
                longest=max(map(len, examples)),
            )
        )
    if not kept:
        raise UserError(_("No example fits in --max_seq_length {limit} tokens: raise it.", limit=max_seq_length))
    return kept


def common_prefix(prompt_ids: Sequence[int], text_ids: Sequence[int]) -> int:
    """How many tokens of prompt + response hold nothing but prompt.

    A token that holds the prompt's end and the response's beginning carries a part of the response, so it gets a label:
    the boundary is where the two encodings part.
    """
    for position, (one, other) in enumerate(zip(prompt_ids, text_ids, strict=False)):
        if one != other:
            return position
    return min(len(prompt_ids), len(text_ids))


def split_examples(examples: Sequence[Example], val_set_size: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold a seeded choice of examples out of training: (training, held out), each in the file's order.

    Args:
        examples: all of them.
        val_set_size: below 1 a share, of which 200 examples at most are taken; otherwise their number.
        seed: fixes the choice.

    Raises:
        UserError: nothing would be left to train on.
    """
    count = min(200, round(len(examples) * val_set_size)) if val_set_size < 1 else int(val_set_size)
    if count >= len(examples):
        raise UserError(
            _(
                "--val_set_size {count} leaves nothing of the {total} examples to train on.",
                count=count,
                total=len(examples),
            )
        )
    held_out = set(np.random.default_rng([seed, 0x5EED]).permutation(len(examples))[:count].tolist())
    training = [example for i, example in enumerate(examples) if i not in held_out]
    return training, [examples[i] for i in sorted(held_out)]


def describe_lengths(examples: Sequence[Example]) -> str:
    """One line on how long examples are, in tokens."""
    lengths = np.array([len(example) for example in examples])
    responses = sum(example.response_length for example in examples)
    return _(
        "tokens an example: mean {mean}, 90 % below {p90}, longest {longest}; {share} % of all tokens carry loss",
        mean=round(lengths.mean()),
        p90=int(np.percentile(lengths, 90)),
        longest=int(lengths.max()),
        share=round(100 * responses / int(lengths.sum())),
    )


def count_duplicates(records: Sequence[Record]) -> int:
    """How many records repeat the question and answer of an earlier one."""
    seen = Counter((record.instruction, record.input, record.output) for record in records)
    return sum(seen.values()) - len(seen)
