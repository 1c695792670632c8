"""What a run says before it begins, against sizes worked out by hand."""

import pytest
import torch
from helpers.settings import setup_of

from configs.training import TrainingConfig
from utils.machine.world import World
from utils.planning.shape import Shape
from utils.reports.run import note_on_cards

LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}


@pytest.fixture
def notes(monkeypatch):
    """What is said of Llama 2 7B over cards with so many free GB each."""

    def said(free_gb: list[float], **settings) -> list[str]:
        free = {torch.device("cuda", index): round(gb * 1e9) for index, gb in enumerate(free_gb)}
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device], 80e9))
        config, lines = TrainingConfig(**settings), []
        setup = setup_of(config, World(0, 1, list(free)), 500)
        note_on_cards(config, setup, Shape.of(LLAMA_2_7B), lines.append)
        return lines

    return said


def test_the_readmes_command_would_be_faster_with_a_process_for_each_card(notes):
    """6.5 GB of int8 and 0.5 of embedding and head in fp16, a layer's activations and the logits beside them."""
    settings = {"use_peft": True, "quantization": "8bit", "batch_size_training": 40}
    (line,) = notes([16, 16], **settings)
    assert "torchrun --nproc_per_node 2 llama_finetuning.py" in line
    assert "--batch_size_training 20 " in line
    needed = float(line.partition("from ")[2].partition(" GB")[0])
    assert 7.0 < needed < 9.0
    (line,) = notes([24, 24, 24], **settings)
    assert "--nproc_per_node 3 " in line
    assert "--batch_size_training 14 " in line
    assert notes([16, 6], **settings) == []  # the smaller card, which others use as well
    assert notes([16, 16], **settings, gpu_memory_gb=6) == []
    assert notes([16], **settings) == []


def test_what_fits_depends_on_how_the_base_is_held(notes):
    """13.5 GB in fp16, 7 in int8, 4 in NF4; full fine-tuning takes 16 bytes a parameter, 108 GB, and 13 in fp16."""
    for quantization, smallest in ((None, 14), ("8bit", 7), ("4bit", 3.5)):
        settings = {"use_peft": True, "quantization": quantization}
        assert notes([smallest, smallest], **settings) == []
        assert len(notes([smallest + 2, smallest + 2], **settings)) == 1
    assert notes([105, 105]) == []
    assert len(notes([125, 125])) == 1
    assert len(notes([45, 45], pure_bf16=True, optimizer="adamw_8bit")) == 1  # 6 bytes: 40.4 GB
