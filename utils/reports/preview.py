"""Training examples as the model sees them."""

import json
from collections.abc import Sequence

from ft_datasets.examples import Example


def preview(examples: Sequence[Example]) -> None:
    """Print examples as JSON lines: what the model is given, and where loss is taken."""
    for example in examples:
        row = {"text": example.text, "input_ids": example.input_ids.tolist(), "labels": example.labels.tolist()}
        print(json.dumps(row, ensure_ascii=False))
