"""What a run's base model is known by, and whether a base model that is given now is the same."""

import re
from dataclasses import dataclass, field
from typing import Any, Protocol

from configs.messages import _

NAMED_AT_MOST = 4
"""How many tensors one message names."""
TOKEN_ROWS = ("embed_tokens.weight", "lm_head.weight")
"""Ends of the names of tensors that have a row for each token."""


class BaseModel(Protocol):
    """A base model that is given now (utils/model/folder.py has it)."""

    @property
    def digests(self) -> dict[str, str]:
        """Tensor name -> dtype, shape, and a hash over rows spread over the tensor."""

    def fingerprint(self) -> str:
        """One hash over the digests."""

    def first_row_fingerprint(self) -> str:
        """What earlier versions had in its place: a hash over the first row of every weight."""


@dataclass(frozen=True)
class BaseIdentity:
    """What a run's base model is known by, as training_config.json keeps it.

    Attributes:
        fingerprint: see BaseModel; of runs of earlier versions, that over first rows.
        digests: see BaseModel; {} where an earlier version wrote the file.
        sha256: tensor name -> SHA-256 of the whole tensor; {} likewise.
    """

    fingerprint: str
    digests: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, described: dict[str, Any]) -> "BaseIdentity":
        """The identity that a training_config.json holds."""
        return cls(
            described["base_model_fingerprint"],
            described.get("base_model_digests", {}),
            described.get("base_model_sha256", {}),
        )

    def to_dict(self) -> dict[str, Any]:
        """The identity as training_config.json holds it."""
        return {
            "base_model_fingerprint": self.fingerprint,
            "base_model_digests": self.digests,
            "base_model_sha256": self.sha256,
        }

    @property
    def is_of_first_rows(self) -> bool:
        """Whether an earlier version wrote it, which knew the first row of every weight alone."""
        return bool(re.fullmatch("[0-9a-f]{64}", self.fingerprint))

    def is_of(self, base: BaseModel) -> bool:
        """Whether the run's base model is this one, as far as the rows that were looked at tell."""
        return self.fingerprint == (base.first_row_fingerprint() if self.is_of_first_rows else base.fingerprint())


def compared_by_first_rows(path: object) -> str:
    """What to tell where an adapter or a checkpoint of an earlier version is used."""
    return _(
        "{path} was written by an earlier version: of the base model, only the first row of every weight is compared.",
        path=path,
    )


def differences(before: dict[str, str], now: dict[str, str]) -> str:
    """A sentence that names the tensors whose digests (or hashes) differ; '' where there is nothing to compare.

    Args:
        before: tensor name -> digest, of a run's base model.
        now: the same of the base model that is given now.
    """
    every = before | now
    names = [name for name in every if before.get(name) != now.get(name)]
    if not before or not names:
        return ""
    named = ", ".join(name + _change(name, before.get(name), now.get(name)) for name in names[:NAMED_AT_MOST])
    if len(names) > NAMED_AT_MOST:
        named = _("{names} and {count} more", names=named, count=len(names) - NAMED_AT_MOST)
    return _("{count} of {total} tensors differ: {names}.", count=len(names), total=len(every), names=named)


def _change(name: str, before: str | None, now: str | None) -> str:
    """What is to be said of a tensor that differs, behind its name: its dtype and shape, if these changed."""
    if before is None:
        return _(" (new)")
    if now is None:
        return _(" (missing)")
    old, new = before.split()[:-1], now.split()[:-1]  # without the hash
    if old == new:
        return ""
    if name.endswith(TOKEN_ROWS):
        (rows, _x, width), (new_rows, _x, new_width) = (each[-1].partition("x") for each in (old, new))
        if (old[0], width) == (new[0], new_width):
            return _(" ({old} -> {new} tokens)", old=rows, new=new_rows)
    return f" ({' '.join(old)} -> {' '.join(new)})"
