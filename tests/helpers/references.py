"""What the project's forward pass and engine are compared with: transformers' own model, given one text at a time."""

from pathlib import Path


def transformers_model(folder: Path):
    """A folder's model as transformers loads it, in fp32.

    It keeps the rotary angles of the longest text that it has seen, so where they depend on the length each text needs
    a model of its own.
    """
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def generated_by_transformers(model, prompt_ids: list[int], count: int, **more) -> list[int]:
    """`count` greedy tokens after a prompt, those that occurred made less likely so that they don't repeat."""
    import torch

    output = model.generate(
        torch.tensor([prompt_ids]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=count,
        repetition_penalty=1.3,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )
    return output[0, len(prompt_ids) :].tolist()


def generated_by_engine(engine, prompt_ids: list[int], count: int) -> list[int]:
    """The same by the project's engine."""
    from configs.serving import Sampling

    sampling = Sampling(max_new_tokens=count, temperature=0, repetition_penalty=1.3)
    return list(engine._tokens(prompt_ids, sampling, count))


def examples_that_begin_alike() -> list:
    """Three examples that share a beginning of eight tokens, and one that shares none; up to 40 tokens long."""
    import numpy as np

    from ft_datasets.examples import Example

    header, made = [1, 555, 410, 333, 278, 599, 261, 444, 298], []
    answers = [[*range(300, 330), 2], [480, 2], [*range(340, 349), 2], [*range(100, 120), 2]]
    for number, answer in enumerate(answers):
        shared = len(header) - 1 if number < 3 else 0
        ids = np.array([*(header if shared else header[:1]), *answer], dtype=np.int32)
        made.append(Example(number, "", ids, ((len(ids) - len(answer), len(ids)),), shared))
    return made
