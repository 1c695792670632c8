"""Data that a function of the user's own gives, as llama-recipes has it: records, or token ids with labels."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from configs.datasets import AlpacaDataset, ChatDataset, CustomDataset
from configs.errors import UserError
from configs.messages import _
from ft_datasets.conversation import Conversation
from ft_datasets.examples import IGNORE_INDEX, Example
from ft_datasets.kind import Complaint
from ft_datasets.kinds import KINDS, read_record
from ft_datasets.records import name_records

DEFAULT_FUNCTION = "get_custom_dataset"


def load_custom(settings: CustomDataset, tokenizer: Any, split: str) -> list[Conversation | Example]:
    """What the function gives for a split, checked.

    Args:
        tokenizer: the model's, of transformers.
        split: train or validation.

    Raises:
        UserError: there is no such function, it fails, or what it gives can't be used.
    """
    path, _colon, name = settings.file.rpartition(":") if ":" in Path(settings.file).name else (settings.file, "", "")
    function = _function(Path(path), name or DEFAULT_FUNCTION)
    with_failures = _told(Path(path))
    given = with_failures(lambda: function(settings, tokenizer, split))
    if isinstance(given, str | Mapping) or not (given is None or hasattr(given, "__iter__")):
        raise UserError(
            _(
                "{file} gave a {kind} for {split}: a list of records is expected, or whatever gives one after another.",
                file=settings.file,
                kind=type(given).__name__,
                split=split,
            )
        )
    records = with_failures(lambda: [] if given is None else list(given))
    if not records and split == "train":
        raise UserError(_("{file}: there are no records in it, so there is nothing to learn from.", file=settings.file))
    complaints: dict[str, list[int]] = {}
    found: list[Conversation | Example] = []
    for number, record in enumerate(records, 1):
        try:
            found.append(_read(number, record))
        except Complaint as complaint:
            complaints.setdefault(str(complaint), []).append(number)
    if complaints:
        lines = [f"  {complaint}: {name_records(numbers)}" for complaint, numbers in complaints.items()]
        heading = _("{file}: these records can't be used (records count from 1):", file=f"{settings.file} ({split})")
        raise UserError("\n".join([heading, *lines]))
    return found


def _read(number: int, record: Any) -> Conversation | Example:
    if not isinstance(record, Mapping):
        raise Complaint(_("not an object with named fields"))
    record = dict(record)  # transformers' tokenizers give another kind of mapping
    if "input_ids" in record:
        return _example(number, record)
    settings = AlpacaDataset() if "instruction" in record else ChatDataset()
    return Conversation(number, tuple(read_record(record, KINDS[settings.NAME], settings)))


def _example(number: int, record: dict[str, Any]) -> Example:
    """Token ids with labels as an example."""
    try:
        ids, labels = (np.asarray(record[name]) for name in ("input_ids", "labels"))
    except (KeyError, TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of another device
        raise Complaint(_('"input_ids" and "labels" are not lists of as many token ids')) from None
    if ids.ndim != 1 or ids.shape != labels.shape or not ids.size or ids.dtype.kind not in "iu":
        raise Complaint(_('"input_ids" and "labels" are not lists of as many token ids'))
    if ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise Complaint(_('"input_ids" and "labels" are not lists of as many token ids'))
    if not np.all(np.asarray(record.get("attention_mask", 1))):
        raise Complaint(_('"attention_mask" is 0 for some tokens: leave padding out'))
    learnt = labels != IGNORE_INDEX
    if (labels != ids)[learnt].any():
        raise Complaint(_('"labels" holds others than "input_ids" and {ignored}', ignored=IGNORE_INDEX))
    learnt[0] = False  # before the first token there is nothing to predict it from
    if not learnt.any():
        raise Complaint(_('"labels" leaves nothing to learn'))
    edges = np.flatnonzero(np.diff(learnt, prepend=False, append=False)).tolist()
    return Example(number, "", ids.astype(np.int32), tuple(zip(edges[::2], edges[1::2], strict=True)))


def _function(path: Path, name: str) -> Callable[..., Iterable[Any]]:
    if not path.is_file():
        raise UserError(
            _("{file} is not there. Give it with --custom_dataset.file, as my_data.py:get_dataset.", file=path)
        )
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise UserError(_("{file} is not a file of Python: its name must end in .py.", file=path))
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look there
    _told(path)(lambda: specification.loader.exec_module(module))
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(_("{file} has no function {name}.", file=path, name=name))
    return function


def _told(path: Path) -> Callable[[Callable[[], Any]], Any]:
    """Calls what a user has written in a file, and tells them where in it, if anywhere, it failed."""

    def call(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (Exception, SystemExit) as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if Path(frame.filename).absolute() == path.absolute()]
            place = f"{(own or frames)[-1].filename}:{(own or frames)[-1].lineno}"
            if isinstance(error, SyntaxError):
                place = f"{error.filename}:{error.lineno}"
            raise UserError(
                _(
                    "{file} failed at {place}: {kind}: {error}",
                    file=path,
                    place=place,
                    kind=type(error).__name__,
                    error=error,
                )
            ) from error

    return call
