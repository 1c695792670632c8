"""Which files of a data set's repository belong to a split: by its card, else by the names of files and folders."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from configs.datasets import FROM_HUB, HUB_PATH
from configs.errors import UserError
from configs.messages import _
from ft_datasets.records import KINDS, kind_of, name_records

NO_DATA = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files beside the data that are JSON too."""
WORDS_OF_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What names of files and folders call the splits, as Hugging Face reads them."""
SHARD = re.compile(r"data/([\w.]+)-\d{5}-of-\d{5}[^/]*")


@dataclass(frozen=True)
class HubData:
    """What a data_path that begins with `hub:` names.

    Attributes:
        configuration: one of several sets in the repository; "" = the only one, or the one that is meant by default.
        revision: branch, tag or commit; "" = main, or what was fetched before.
    """

    repository: str
    configuration: str
    revision: str
    split: str

    @classmethod
    def named(cls, data_path: str) -> "HubData":
        """What a data_path that begins with `hub:` names; without a split it is train."""
        match = HUB_PATH.fullmatch(data_path)
        assert match, "configs/datasets.py lets no other through"
        given = {name: value or "" for name, value in match.groupdict().items()}
        return cls(**{**given, "split": given["split"] or "train"})

    def __str__(self) -> str:
        parts = (
            self.repository,
            self.configuration and "/" + self.configuration,
            self.revision and "@" + self.revision,
        )
        return FROM_HUB + "".join(parts)


def choose_files(wanted: HubData, paths: Sequence[str], card: dict[str, Any]) -> list[str]:
    """Of a repository's files those of one split, in order: by what its card says, else by their names.

    Args:
        paths: of all files, relative to the repository.
        card: what the head of its README.md says.

    Raises:
        UserError: there is no such configuration or split, or nothing that is read without running a program.
    """
    readable = sorted(path for path in paths if _may_be_data(path))
    if not readable:
        raise UserError(_without_data(wanted, paths))
    splits = _splits_of_card(wanted, readable, card)
    if splits is None:
        splits = _splits_by_name(wanted, readable)
    if wanted.split not in splits:
        raise UserError(
            _(
                "{data} has no split {split}. It has: {splits} (say {data}:{first}).",
                data=wanted,
                split=wanted.split,
                splits=name_records([*splits]),
                first=next(iter(splits), "…"),
            )
        )
    chosen = splits[wanted.split]
    if not chosen:
        raise UserError(
            _(
                "{data}: its split {split} lies in no file of a kind that is read ({kinds}).",
                data=wanted,
                split=wanted.split,
                kinds=", ".join(KINDS),
            )
        )
    # The same data may lie there in several formats.
    kinds = [kind_of(path) for path in chosen]
    main = max(KINDS, key=kinds.count)
    return [path for path, kind in zip(chosen, kinds, strict=True) if kind == main]


def _may_be_data(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(kind_of(path)) and parts[-1] not in NO_DATA and not any(part.startswith((".", "__")) for part in parts)


def _without_data(wanted: HubData, paths: Sequence[str]) -> str:
    if programs := [path for path in paths if path.endswith(".py")]:
        return _(
            "{data} comes as a program ({program}) that would fetch the data, and no program of a repository is run "
            "here. Hugging Face keeps a copy of many such data sets: try {copy}. Or fetch the data yourself, and give "
            "its file.",
            data=wanted,
            program=programs[0],
            copy=replace(wanted, revision="refs/convert/parquet"),
        )
    return _(
        "{data} has no file of a kind that is read ({kinds}). It has: {names}",
        data=wanted,
        kinds=", ".join(KINDS),
        names=name_records(paths),
    )


def _splits_of_card(wanted: HubData, paths: Sequence[str], card: dict[str, Any]) -> dict[str, list[str]] | None:
    """Each split's files as the card names them; None where it names none."""
    listed = card.get("configs")
    configurations = {
        str(each.get("config_name", "default")): each
        for each in (listed if isinstance(listed, list) else [])
        if isinstance(each, dict)
    }
    if not configurations:
        return None
    default = [name for name, each in configurations.items() if each.get("default") is True]
    name = wanted.configuration or next(iter([*default, *({"default"} & configurations.keys())]), "")
    if not name and len(configurations) == 1:
        (name,) = configurations
    if name not in configurations:
        raise UserError(_several(wanted, configurations))
    data_files = configurations[name].get("data_files")
    if data_files is None:
        folder = str(configurations[name].get("data_dir", "")).strip("./")
        inside = [path for path in paths if not folder or path.startswith(folder + "/")]
        return _gathered((split_of(path)[1] or "train", path) for path in inside)
    splits: dict[str, list[str]] = {}
    for split, patterns in _patterns(data_files):
        matching = [path for pattern in patterns for path in paths if as_regex(pattern).fullmatch(path)]
        splits[split] = list(dict.fromkeys([*splits.get(split, []), *matching]))
    return splits


def _patterns(data_files: Any) -> Iterator[tuple[str, list[str]]]:
    """Splits and the patterns of their files, of the ways in which a card may put them."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    for each in data_files if isinstance(data_files, list) else [data_files]:
        each = each if isinstance(each, dict) else {"path": each}
        path = each.get("path", [])
        yield str(each.get("split", "train")), [str(item) for item in (path if isinstance(path, list) else [path])]


def _splits_by_name(wanted: HubData, paths: Sequence[str]) -> dict[str, list[str]]:
    """Each split's files by the names of files and folders; without such names all files are for training."""
    found = {path: split_of(path) for path in paths}
    if not any(split for _folder, split in found.values()):
        found = {path: (folder, "train") for path, (folder, _split) in found.items()}
    found = {path: (folder, split) for path, (folder, split) in found.items() if split}
    folders = dict.fromkeys(folder for folder, _split in found.values())
    if wanted.configuration or len(folders) > 1:
        if wanted.configuration not in folders:
            raise UserError(_several(wanted, folders))
        found = {path: (folder, split) for path, (folder, split) in found.items() if folder == wanted.configuration}
    return _gathered((split, path) for path, (_folder, split) in found.items())


def split_of(path: str) -> tuple[str, str]:
    """The folder in which a file's splits lie, and its split by its name; "" where that tells none."""
    if shard := SHARD.fullmatch(path):
        return "", shard[1]
    parts = path.split("/")
    for place, part in enumerate(parts):
        for split, words in WORDS_OF_SPLITS.items():
            if re.search(rf"(^|[-._ 0-9])({'|'.join(words)})([-._ 0-9]|$)", part):
                return _folder(parts[:place]), split
    return _folder(parts[:-1]), ""


def _folder(parts: Sequence[str]) -> str:
    """A folder's path; one that is only called data is no part of it."""
    return "/".join(part for part in parts if part != "data")


def as_regex(pattern: str) -> re.Pattern[str]:
    """A card's pattern of paths: `*` is anything but a slash, `**` anything, `?` and `[…]` one character."""
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    whole = pattern.removeprefix("./") + ("**" if pattern.endswith("/") else "")
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", whole)
    return re.compile(
        "".join(
            meanings.get(piece) or (piece.replace("[!", "[^") if piece.startswith("[") else re.escape(piece))
            for piece in pieces
        )
    )


def _gathered(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    for split, path in pairs:
        splits.setdefault(split, []).append(path)
    return splits


def _several(wanted: HubData, names: Iterable[str]) -> str:
    named = [name for name in names if name]
    if not named:
        return _("{data}: there is but one configuration; leave it out.", data=wanted)
    return _(
        "{data}: name one of the configurations that there are ({names}), as in {example}.",
        data=wanted,
        names=name_records(named),
        example=replace(wanted, configuration=named[0]),
    )
