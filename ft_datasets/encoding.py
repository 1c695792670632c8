"""Records -> examples: tokens, which of them carry loss, and the held-out split."""

from collections.abc import Callable, Sequence

import numpy as np

from configs.errors import UserError
from configs.messages import _
from ft_datasets.alpaca_dataset import Record
from ft_datasets.examples import Example
from ft_datasets.prompt import PromptTemplate
from ft_datasets.records import name_records
from ft_datasets.tokenizer import Tokenizer


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
        Example(
            record.number,
            text,
            np.array([*ids, tokenizer.eos_id], dtype=np.int32),
            learnt=((common_prefix(prompt, ids), len(ids) + 1),),
        )
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
                numbers=name_records(long),
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
    responses = sum(example.label_count for example in examples)
    return _(
        "tokens an example: mean {mean}, 90 % below {p90}, longest {longest}; {share} % of all tokens carry loss",
        mean=round(lengths.mean()),
        p90=int(np.percentile(lengths, 90)),
        longest=int(lengths.max()),
        share=round(100 * responses / int(lengths.sum())),
    )
