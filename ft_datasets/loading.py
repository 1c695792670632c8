"""The data of a run: files, or a function, as examples to learn from and examples to measure on."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from configs.datasets import CustomDataset
from configs.errors import UserError
from configs.messages import _
from configs.training import TrainingConfig
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.conversation import Conversation
from ft_datasets.custom_dataset import load_custom
from ft_datasets.encoding import encode_conversations, fitting, split_examples
from ft_datasets.examples import Example
from ft_datasets.kinds import load_conversations
from ft_datasets.prompt import USE_ALPACA
from ft_datasets.records import DataFiles, name_records
from ft_datasets.shared_prefixes import share_prefixes


@dataclass(frozen=True)
class Data:
    """Examples to learn from, and examples that are only measured on (none without --run_validation).

    Attributes:
        origin: where data from a hub comes from, see DataFiles.
    """

    training: list[Example]
    held_out: list[Example]
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(map(len, [*self.training, *self.held_out]))

    def apart(self) -> "Data":
        """The same examples, none of which shares its beginning with others."""
        training, held_out = ([replace(x, shared_length=0) for x in xs] for xs in (self.training, self.held_out))
        return replace(self, training=training, held_out=held_out)


def fingerprint(examples: Sequence[Example]) -> str:
    """The hash of the examples' tokens and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        bounds = [position for span in example.learnt for position in span]
        if bounds[-1] == len(example):
            bounds.pop()  # checkpoints have always named a single answer, which ends there, by its start alone
        digest.update(example.input_ids.tobytes() + np.array(bounds, dtype="<u4").tobytes())
    return digest.hexdigest()


def load_data(
    config: TrainingConfig,
    encoder: ChatEncoder,
    report: Callable[[str], None],
    files: DataFiles | None = None,
) -> Data:
    """Read, check, tokenise and split the data.

    Args:
        files: what the settings name, with what was fetched from a hub; None = files that lie here.

    Raises:
        UserError: see load_conversations, load_custom and encode_conversations.
    """
    if isinstance(config.data, CustomDataset):
        return _load_custom(config, config.data, encoder, report)
    files = files or DataFiles.here(config.data.paths)
    conversations = load_conversations(config.data, files)
    examples = _shared(config, _encode(config, conversations, encoder, report))
    training, held_out = split(config, examples)
    source_of = {conversation.number: conversation.source for conversation in conversations}
    sources = [source_of[example.number] for example in training]
    mixed = mix(training, sources, config.data.times, config.seed)
    if lost := set(sources) - {source_of[example.number] for example in mixed}:
        raise UserError(
            _(
                "--{name}.weights leave no example of {file} to train on: raise its weight, or leave the file out.",
                name=config.dataset,
                file=config.data.paths[min(lost)],
            )
        )
    return Data(mixed, held_out, files.origin)


def split(config: TrainingConfig, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those that are held out."""
    return split_examples(examples, config.val_set_size, config.seed) if config.run_validation else (examples, [])


def mix(examples: Sequence[Example], sources: Sequence[int], times: Sequence[float], seed: int) -> list[Example]:
    """Each example as many times as its source counts; of a fraction, a seeded choice has one more.

    The choice depends on the seed and on the examples' order alone, so that a run that goes on has the same.

    Args:
        sources: for each example, which source it is from.
        times: for each source, how often an epoch has its examples.
    """
    counts = np.array([int(times[source]) for source in sources])
    for source, number in enumerate(times):
        own = np.flatnonzero(np.array(sources) == source)
        chosen = np.random.default_rng([seed, 0x317, source]).permutation(len(own))[: round(number % 1 * len(own))]
        counts[own[chosen]] += 1
    return [example for example, count in zip(examples, counts.tolist(), strict=True) for _time in range(count)]


def _load_custom(
    config: TrainingConfig, settings: CustomDataset, encoder: ChatEncoder, report: Callable[[str], None]
) -> Data:
    from transformers import AutoTokenizer  # what such functions are written for

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    except Exception as error:  # of many kinds, as the files have many ways to be wrong
        raise UserError(
            _("{file} can't be read as a tokenizer ({error}).", file=config.model_name, error=error)
        ) from error
    training = _encode(config, load_custom(settings, tokenizer, "train"), encoder, report)
    held_out = load_custom(settings, tokenizer, "validation") if config.run_validation else []
    if not held_out:
        return Data(*split(config, _shared(config, training)))
    encoded = _encode(config, held_out, encoder, report)
    shared = _shared(config, training + encoded)
    return Data(shared[: len(training)], shared[len(training) :])


def _encode(
    config: TrainingConfig,
    records: Sequence[Conversation | Example],
    encoder: ChatEncoder,
    report: Callable[[str], None],
) -> list[Example]:
    """Conversations as examples; those that are examples already stay as they are, in their order."""
    conversations = [record for record in records if isinstance(record, Conversation)]
    examples = [record for record in records if isinstance(record, Example)]
    examples = [replace(example, text=encoder.tokenizer.decode(example.input_ids.tolist())) for example in examples]
    encoded = encode_conversations(conversations, encoder, config.num_workers_dataloader)
    in_order = sorted([*examples, *encoded], key=lambda example: example.number)
    most = encoder.tokenizer.embeddings
    if beyond := [example.number for example in in_order if example.input_ids.max() >= most]:
        raise UserError(
            _(
                "The model has embeddings for {most} tokens, and these records hold others: {numbers}. Tokens are to "
                "be those of the model's own tokenizer; where its template writes others, train in other words: "
                "{advice}",
                most=most,
                numbers=name_records(list(dict.fromkeys(beyond))),
                advice=USE_ALPACA,
            )
        )
    return fitting(in_order, config.max_seq_length, report)


def _shared(config: TrainingConfig, examples: list[Example]) -> list[Example]:
    # Dropout on a shared prefix would be that of all its examples; a learnt prefix stands before each of them.
    if config.lora_config.lora_dropout or config.method == "prefix":
        return examples
    return share_prefixes(examples)
