"""Models with random weights in Llama's shape, and data of long examples: for benchmarks without a download.

python -m benchmarks.make_model tiny|1b|7b|7b-4 FOLDER CORPUS [TOKENIZER]
"""

import json
import random
import shutil
import sys
from pathlib import Path

from ft_datasets.tokenizer import Tokenizer
from scripts.quickstart import train_tokenizer
from utils.quiet import quiet_libraries

SHAPES = {
    "tiny": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "7b-4": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 4, "num_attention_heads": 32},
}
"""A few million parameters; TinyLlama-1.1B; Llama-2-7B, and four layers of it."""


@quiet_libraries()
def make_model(shape: str, folder: Path, corpus: Path, tokenizer: Path | None = None) -> None:
    """Write a model as a hub repository holds it, unless it is there.

    Args:
        shape: a name of SHAPES.
        corpus: Alpaca JSON.
        tokenizer: a tokenizer.model, or a folder that holds one; None = learn a small one from `corpus`.
    """
    if (folder / "made").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if tokenizer is None:
        entries = json.loads(corpus.read_text(encoding="utf-8"))
        train_tokenizer([{"input": "", **entry} for entry in entries[:2000]], folder)
    else:
        folder.mkdir()
        shutil.copyfile(tokenizer / "tokenizer.model" if tokenizer.is_dir() else tokenizer, folder / "tokenizer.model")

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=-(-Tokenizer(folder).vocab_size // 64) * 64,
        max_position_embeddings=32_768,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if shape == "tiny" else torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    # The peers read the tokenizer through transformers, from the files that a hub repository has beside it.
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "made").touch()


def write_long_data(corpus: Path, model: Path, tokens: int, count: int, target: Path) -> Path:
    """Write `count` Alpaca records of nearly `tokens` tokens each, put together from the answers of `corpus`."""
    answers = [entry["output"] for entry in json.loads(corpus.read_text(encoding="utf-8"))]
    chooser, tokenizer, records = random.Random(0), Tokenizer(model), []
    for number in range(count):
        pieces, left = [], tokens * 0.97 - 100
        while left > 0:
            pieces.append(chooser.choice(answers))
            left -= len(tokenizer.encode(pieces[-1] + "\n"))
        # The last piece went beyond the limit.
        records.append({"instruction": f"{number + 1}", "input": "", "output": "\n".join(pieces[:-1])})
    target.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return target


if __name__ == "__main__":
    make_model(sys.argv[1], *map(Path, sys.argv[2:]))
