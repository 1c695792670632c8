"""The proof of a merged folder, which is read again: is it base and adapter together, to whoever loads it?"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.messages import _
from configs.quantization import Quantization
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.records import name_records
from utils.files import write_json
from utils.model.folder import ModelFolder
from utils.results.merge_ids import IdCount, compare_ids
from utils.results.merge_measures import ADAPTED, BASE, MERGED, QUANTIZED, ROUNDED, Measures, measure
from utils.results.merge_prompts import Prompts, choose_prompts
from utils.results.quantized_folder import QuantizedFolder
from utils.runs.description import read_training_config

MERGE_REPORT = "merge_report.json"

LARGEST_ERROR = 0.05
"""Of a merged model's logits, as a share of what the adapter moves."""
LARGEST_QUANTIZED_ERROR = 0.2
"""The same where the merged weights are stored in fewer bits."""
ROUNDINGS = 2.0
"""In bf16 rounding alone may move more: the error may be so many times that of another merge that is rounded alike."""
LARGEST_LOSS = 0.2
"""In bf16, how far from all of it what arrives of the adapter's movement may be: rounding hardly changes that."""
BUDGET_SECONDS = 600.0
"""For all decoder layers; with merging and the rest, a model of 7B stays below 15 minutes on a CPU."""


@dataclass(frozen=True)
class Proof:
    """What has been found out about a merged folder.

    Attributes:
        quantization: of the base over which the adapter was computed as well; None = over the original one alone.
        save_quantized: as which the merged weights are stored; None = in the base's own dtype.
        reference: which of the two the merged model is held to: '' = the original one, or QUANTIZED.
        limit: of the error.
    """

    prompts: Prompts
    ids: IdCount
    measures: Measures
    quantization: Quantization | None
    save_quantized: Quantization | None
    reference: str
    limit: float

    @property
    def error(self) -> float:
        """See Measures.error."""
        return self.measures.error(MERGED, self.reference)

    @property
    def arrived(self) -> float:
        """See Measures.arrived."""
        return self.measures.arrived(self.reference)

    def problem(self) -> str:
        """What speaks against what the merged model computes; '' = nothing."""
        if not self.measures.distance(self.reference + ADAPTED, self.reference + BASE):
            return _("the adapter changes nothing: with it, the base model computes the same. It was not trained.")
        if not self.measures.distance(MERGED, self.reference + BASE):
            return _("the merge changes nothing: the merged model computes what its base does.")
        if not self.error <= self.limit:  # NaN is refused as well
            return _(
                "its logits are off by {error} of what the adapter moves, and {limit} is the limit.",
                error=_percent(self.error),
                limit=_percent(self.limit),
            ) + "\n".join(["", *self._over_each_base(), *self._advice()])
        if ROUNDED in self.measures.losses and abs(self.arrived - 1) > LARGEST_LOSS:
            return _("{share} of what the adapter moves has arrived in it.", share=_percent(self.arrived))
        return ""

    def verdict(self) -> list[str]:
        """What is told of a merged model that is right."""
        whence = {
            "held out": _("held out of the data"),
            "training": _("of the training data"),
            "built in": _("built in"),
        }
        lengths = self.measures.lengths
        lines = [
            _(
                "Verified on {count} prompts {whence}: transformers reads {equal} of {total} conversations as the "
                "tokens of training; logits are off by {error} of what the adapter moves (limit {limit}); the "
                "likeliest next token is the same at {same} of {positions} positions.",
                count=len(lengths),
                whence=whence[self.prompts.origin],
                equal=self.ids.equal,
                total=self.ids.total,
                error=_percent(self.error),
                limit=_percent(self.limit),
                same=int(self.measures.is_equal.sum()),
                positions=sum(lengths),
            )
        ]
        if ROUNDED in self.measures.losses and self.error > LARGEST_ERROR:
            lines.append(
                _(
                    "That is what rounding to bf16 does: another merge, by PEFT, is off by {error}. Of what the "
                    "adapter moves, {share} has arrived.",
                    error=_percent(self.measures.error(ROUNDED, self.reference)),
                    share=_percent(self.arrived),
                )
            )
        if self.ids.spelling:
            lines.append(
                _(
                    "{count} more conversations spell out a special token, which transformers takes for the token and "
                    "training for text: {equal} of them are read alike.",
                    count=self.ids.spelling,
                    equal=self.ids.spelling_equal,
                )
            )
        return [*lines, *self._over_each_base()]

    def report(self) -> dict[str, Any]:
        """What merge_report.json holds."""
        measures, kept = self.measures, len(self.measures.lengths)
        logits = {"error": self.error, "limit": self.limit, "arrived": self.arrived}
        if ROUNDED in measures.losses:
            logits["error_of_rounding"] = measures.error(ROUNDED, self.reference)
        if self.quantization:
            logits |= {
                "error_over_original_base": measures.error(MERGED),
                f"error_over_{self.quantization}_base": measures.error(MERGED, QUANTIZED),
            }
        return {
            "prompts": {
                "origin": self.prompts.origin,
                "data": self.prompts.data,
                "records": [example.number for example in self.prompts.examples[:kept]],
                "left_out_for_time": [example.number for example in self.prompts.examples[kept:]],
            },
            "ids": {
                "conversations": self.ids.total,
                "equal": self.ids.equal,
                "spelling_a_special_token": self.ids.spelling,
                "spelling_equal": self.ids.spelling_equal,
            },
            "logits": logits,
            "loss": {name: measures.loss(name) for name in measures.losses},
            "likeliest_next_token": {
                "positions": sum(measures.lengths),
                "equal": int(measures.is_equal.sum()),
                "prompts": self._divergences(),
            },
        }

    def _over_each_base(self) -> list[str]:
        """Errors and losses, a line for each base over which the adapter was computed."""
        return [
            _(
                "Over the base in {precision}: off by {error}; loss {base} without the adapter, {adapted} with it, "
                "{merged} merged.",
                precision=self.quantization if over else _("its own precision"),
                error=_percent(self.measures.error(MERGED, over)),
                base=f"{self.measures.loss(over + BASE):.4f}",
                adapted=f"{self.measures.loss(over + ADAPTED):.4f}",
                merged=f"{self.measures.loss(MERGED):.4f}",
            )
            for over in self.measures.overs
        ]

    def _advice(self) -> list[str]:
        if not self.save_quantized:
            return []
        return [
            _(
                "In {precision}, too little is left of what the adapter changes. Leave --save_quantized out, or let "
                "base and adapter be served together.",
                precision=self.save_quantized,
            )
        ]

    def _divergences(self) -> list[dict[str, Any]]:
        """For each prompt, along the given answer: where the likeliest next token first differs, and how narrowly."""
        found = []
        parts = zip(
            self.measures.is_equal.split(self.measures.lengths),
            self.measures.margins.split(self.measures.lengths),
            strict=True,
        )
        for example, (is_equal, margins) in zip(self.prompts.examples, parts, strict=False):
            first = int(is_equal.int().argmin()) if not is_equal.all() else None
            found.append(
                {
                    "record": example.number,
                    "positions": len(is_equal),
                    "equal": int(is_equal.sum()),
                    "first_position_at_which_it_differs": first,
                    "margin_there": None if first is None else margins[first].item(),
                }
            )
        return found


def prove(
    folder: Path,
    base: ModelFolder,
    adapter: Path,
    encoder: ChatEncoder,
    quantization: Quantization | None,
    save_quantized: Quantization | None,
    count: int,
    say: Callable[[str], None],
    budget_seconds: float = BUDGET_SECONDS,
) -> None:
    """Read a merged folder again, compare it with base and adapter, and write merge_report.json into it.

    Args:
        folder: where the merged model lies.
        quantization: as which the base's weights were rounded before.
        save_quantized: as which the merged ones are stored.
        encoder: training's prompt template with its tokenizer.
        count: of examples to compare.
        say: is told what is done, and the verdict.

    Raises:
        UserError: the folder is read as other tokens than training had, or computes something else.
    """
    began = time.monotonic()
    say(_("Reading the written model again, to compare it with base and adapter …"))
    prompts = choose_prompts(adapter, encoder, count, say)
    ids = compare_ids(folder, prompts.conversations, encoder)
    if ids.other:
        raise _refusal(
            _(
                "transformers reads {other} of {total} conversations with it as other tokens than training had "
                "(records {records}).",
                other=len(ids.other),
                total=ids.total,
                records=name_records(ids.other),
            )
        )
    trained_over = (read_training_config(adapter) or {}).get("settings", {}).get("quantization")
    compared_over = quantization or save_quantized or trained_over
    # What is stored in fewer bits is compared with the adapter over a base in as many: what these bits cost the base is
    # no error of the merge, and is told by the losses.
    reference = QUANTIZED if quantization or save_quantized else ""
    measures = measure(
        base,
        adapter,
        QuantizedFolder(folder) if save_quantized else ModelFolder(folder),
        prompts.examples,
        quantization=compared_over,
        reference=reference,
        budget_seconds=budget_seconds,
    )
    if len(measures.lengths) < len(prompts.examples):
        say(
            _(
                "All {count} prompts would take longer than {minutes} minutes here: {kept} are compared.",
                count=len(prompts.examples),
                minutes=round(budget_seconds / 60),
                kept=len(measures.lengths),
            )
        )
    limit = LARGEST_QUANTIZED_ERROR if save_quantized else LARGEST_ERROR
    if ROUNDED in measures.losses:
        limit = max(limit, ROUNDINGS * measures.error(ROUNDED, reference))
    proof = Proof(prompts, ids, measures, compared_over, save_quantized, reference, limit)
    if problem := proof.problem():
        raise _refusal(problem)
    verdict = proof.verdict()
    seconds = round(time.monotonic() - began, 1)
    write_json(folder / MERGE_REPORT, {"verified": True, "verdict": verdict, **proof.report(), "seconds": seconds})
    for line in verdict:
        say(line)


def leave_unproved(folder: Path, say: Callable[[str], None]) -> None:
    """Write a merge_report.json that says that nothing was compared."""
    verdict = _("Not verified: --verify False.")
    write_json(folder / MERGE_REPORT, {"verified": False, "verdict": [verdict]})
    say(verdict)


def _refusal(problem: str) -> UserError:
    return UserError(
        _(
            "The merged model is not what base and adapter are together, and is not kept: {problem}\n"
            "(--verify False merges without this comparison.)",
            problem=problem,
        )
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
