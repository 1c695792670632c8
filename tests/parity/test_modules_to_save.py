"""Embedding, head and norms trained whole beside LoRA: they move, and every way of using them computes the same."""

import peft
import pytest
import torch
from helpers.records import alpaca_template
from helpers.trainers import make_trainer, project_logits, save_adapter, train
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from configs.errors import UserError
from configs.peft import LoraConfig
from utils.model.folder import ModelFolder
from utils.model.weights import load_base_model
from utils.planning.shape import Shape, Trained
from utils.results.adapter_folder import load_adapter
from utils.results.merging import merge
from utils.runs.checkpoint import read_checkpoint

SEQUENCE = [1, 300, 301, 302, 555, 410, 333, 278, 599, 261, 480, 481]
MODULES = ["embed_tokens", "lm_head", "norm"]
RUN = {"batch_size_training": 4, "max_steps": 6, "lr": 0.01, "save_steps": 3}


def reference_logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([SEQUENCE])).logits[0]


def reference_model(folder) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("quantization", [None, "8bit"])
def test_trained_saved_chatted_with_and_merged_they_compute_the_same(tiny_model, tmp_path, quantization):
    settings = {"quantization": quantization, "lora_config": LoraConfig(modules_to_save=MODULES), **RUN}
    trainer = make_trainer(tiny_model, tmp_path / "adapter", **settings)
    losses = train(trainer)
    assert losses[-1] < losses[0]
    adapter = save_adapter(trainer)
    trained = project_logits(trainer.model.eval(), SEQUENCE)

    before = dict(ModelFolder(tiny_model).tensors())
    saved = load_file(adapter / "adapter_model.safetensors")
    whole = {name.removeprefix("base_model.model."): t for name, t in saved.items() if "lora_" not in name}
    norms = {name for name in before if name.endswith("norm.weight")}
    assert whole.keys() == {"model.embed_tokens.weight", "lm_head.weight", *norms}
    assert all((tensor - before[name]).abs().max() > 1e-3 for name, tensor in whole.items())
    assert Trained.of(trainer.config, Shape.of(ModelFolder(tiny_model).config)).parameters == sum(
        parameter.numel() for parameter in trainer.parameters.values()
    )

    base = load_base_model(ModelFolder(tiny_model), torch.float32, [torch.device("cpu")], quantization)
    chat = project_logits(load_adapter(base, adapter, torch.float32), SEQUENCE)
    torch.testing.assert_close(chat, trained, rtol=1e-5, atol=1e-5)
    merge(ModelFolder(tiny_model), adapter, tmp_path / "merged", alpaca_template(tiny_model), 4.0, quantization)
    torch.testing.assert_close(reference_logits(reference_model(tmp_path / "merged")), trained, rtol=1e-4, atol=1e-4)
    if not quantization:
        plain = peft.PeftModel.from_pretrained(reference_model(tiny_model), str(adapter))
        torch.testing.assert_close(reference_logits(plain), trained, rtol=1e-4, atol=1e-4)

    checkpoint = read_checkpoint(tmp_path / "adapter" / "checkpoints" / "step-3")
    resumed = make_trainer(tiny_model, tmp_path / "resumed", checkpoint=checkpoint, **settings)
    assert train(resumed) == losses[3:]


def test_their_first_steps_are_the_plain_loops(tiny_model, tmp_path):
    """The gradient reaches the trained copies as PEFT's own forward pass would have it."""
    trainer = make_trainer(
        tiny_model, tmp_path, lora_config=LoraConfig(modules_to_save=MODULES), **RUN | {"batch_size_training": 1}
    )
    settings = peft.LoraConfig(
        r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], modules_to_save=MODULES, task_type="CAUSAL_LM"
    )
    plain = peft.get_peft_model(reference_model(tiny_model), settings)
    own = {name: parameter for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert own.keys() == trainer.parameters.keys()
    for name, parameter in own.items():
        parameter.data.copy_(trainer.parameters[name])
    optimizer = torch.optim.AdamW(own.values(), lr=RUN["lr"], weight_decay=0.0)
    expected = []
    for step in range(RUN["max_steps"]):
        (index,) = trainer.schedule.indices(step)
        example = trainer.data.training[index]
        ids, labels = (torch.tensor(numbers).long().unsqueeze(0) for numbers in (example.input_ids, example.labels))
        loss = plain(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own.values(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert train(trainer) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["embed_token"], "embed_tokens, input_layernorm, lm_head, norm, post_attention_layernorm"),
        (["q_proj"], "--lora_config.target_modules"),
    ],
)
def test_unknown_names_are_refused_with_those_that_there_are(tiny_model, tmp_path, names, said):
    with pytest.raises(UserError, match=said):
        make_trainer(tiny_model, tmp_path, lora_config=LoraConfig(modules_to_save=names))


def test_a_tied_embedding_is_refused_and_norms_are_not(grouped_model, tmp_path):
    with pytest.raises(UserError, match="one tensor"):
        make_trainer(grouped_model, tmp_path, lora_config=LoraConfig(modules_to_save=["embed_tokens", "norm"]))
    trainer = make_trainer(grouped_model, tmp_path, lora_config=LoraConfig(modules_to_save=["norm"]))
    assert sum("norm" in name for name in trainer.parameters) == 5
