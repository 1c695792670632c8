"""Training against loops written out with transformers, PEFT and torch alone."""

import shutil
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from helpers.records import alpaca_encoder, encode_records, load_records
from helpers.trainers import make_trainer, project_logits, save_adapter, train
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from configs.errors import UserError
from configs.peft import LoraConfig, PrefixConfig
from configs.training import TrainingConfig
from ft_datasets.examples import Example
from ft_datasets.loading import load_data
from utils.model.decoder import causal_lm
from utils.model.folder import ModelFolder
from utils.model.quantization import rounded_weight
from utils.model.weights import load_base_model
from utils.results.adapter_folder import load_adapter
from utils.rows.packing import StepTokens, pack
from utils.runs.checkpoint import read_checkpoint
from utils.training.response_loss import ResponseLoss
from utils.training.step_plan import StepPlan
from utils.training.trials import Trials

CPU = torch.device("cpu")
SEQUENCE = [1, 300, 301, 302, 555, 410, 333, 278, 599, 261, 480, 481]


def reference_model(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def plain_loss(model, examples) -> torch.Tensor:
    """Mean cross-entropy of a response token over some examples, each of them run alone."""
    total, tokens = torch.zeros(()), 0
    for example in examples:
        labels = torch.from_numpy(example.labels.astype(np.int64))
        logits = model(torch.from_numpy(example.input_ids.astype(np.int64)).unsqueeze(0)).logits[0]
        total = total + cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        tokens += int((labels[1:] != -100).sum())
    return total / tokens


def plain_run(model, trainer, steps: int, lr: float, clip: float) -> list[float]:
    """The same steps as the trainer's, with torch alone; the loss of each."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        loss = plain_loss(model, [trainer.data.training[i] for i in trainer.schedule.indices(step)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def plain_lora(folder, trainer) -> peft.PeftModel:
    """PEFT over transformers, with the trainer's first adapter weights."""
    settings = peft.LoraConfig(
        r=8, lora_alpha=32, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(reference_model(folder), settings)
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert own.keys() == trainer.parameters.keys()
    for name, parameter in own.items():
        parameter.data.copy_(trainer.parameters[name])
    return model


STEPS, RATE = 6, 3e-3


@pytest.fixture(scope="module")
def lora_losses(tiny_model, tmp_path_factory) -> list[float]:
    """Losses of the plain LoRA loop."""
    trainer = make_trainer(tiny_model, tmp_path_factory.mktemp("plain"), batch_size_training=4, max_steps=STEPS)
    return plain_run(plain_lora(tiny_model, trainer), trainer, STEPS, RATE, clip=1.0)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 0])
def test_lora_losses_are_the_plain_loops_for_every_micro_batch_size(
    tiny_model, lora_losses, tmp_path, micro_batch_size
):
    trainer = make_trainer(
        tiny_model,
        tmp_path,
        batch_size_training=4,
        max_steps=STEPS,
        lr=RATE,
        micro_batch_size=micro_batch_size,
    )
    assert train(trainer) == pytest.approx(lora_losses, rel=2e-5)
    assert lora_losses[-1] < lora_losses[0]


def test_rows_that_go_forward_together_give_the_same_losses(tiny_model, lora_losses, tmp_path, monkeypatch):
    """As over several cards, where one card works on a row while the next works on the row before."""
    trainer = make_trainer(tiny_model, tmp_path, batch_size_training=4, max_steps=STEPS, lr=RATE, micro_batch_size=1)
    trainer.stepper.step_plan = trainer.stepper.step_plan._replace(rows=3)
    calls: list[str] = []

    def note(_module, _inputs, loss: torch.Tensor) -> None:
        calls.append("forward")
        loss.register_hook(lambda _gradient: calls.append("backward"))

    trainer.stepper.loss_module.register_forward_hook(note)
    assert train(trainer) == pytest.approx(lora_losses, rel=2e-5)
    assert calls == [*["forward"] * 3, *["backward"] * 3, "forward", "backward"] * STEPS


@pytest.mark.parametrize("micro_batch_size", [1, 0])
@pytest.mark.parametrize("folder_name", ["tiny_model", "grouped_model"])
def test_full_fine_tuning_losses_are_the_plain_loops(request, tmp_path, folder_name, micro_batch_size):
    folder = request.getfixturevalue(folder_name)
    trainer = make_trainer(
        folder,
        tmp_path,
        use_peft=False,
        batch_size_training=3,  # 8 examples: the last step of an epoch has two
        max_steps=STEPS,
        lr=1e-3,
        gradient_clipping_threshold=0.5,
        micro_batch_size=micro_batch_size,
    )
    losses = train(trainer)
    reference = reference_model(folder).requires_grad_(True)
    assert losses == pytest.approx(plain_run(reference, trainer, STEPS, 1e-3, clip=0.5), rel=2e-5)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(trainer.parameters[name].detach(), parameter.detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_losses_over_a_quantised_base_are_those_over_its_rounded_weights(tiny_model, tmp_path, quantization):
    trainer = make_trainer(
        tiny_model, tmp_path, quantization=quantization, batch_size_training=4, max_steps=STEPS, lr=RATE
    )
    reference = plain_lora(tiny_model, trainer)
    for name, module in reference.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and "lm_head" not in name:
            module.weight.data = rounded_weight(module.weight.data, quantization)
    assert train(trainer) == pytest.approx(plain_run(reference, trainer, STEPS, RATE, clip=1.0), rel=2e-5)


def test_clipping_off_lets_the_gradient_through(tiny_model, tmp_path):
    trainer = make_trainer(
        tiny_model, tmp_path, batch_size_training=4, max_steps=STEPS, lr=RATE, gradient_clipping=False
    )
    reference = plain_lora(tiny_model, trainer)
    assert train(trainer) == pytest.approx(plain_run(reference, trainer, STEPS, RATE, clip=1e9), rel=2e-5)


def test_held_out_loss_is_the_plain_mean_over_its_tokens(tiny_model, data_file, tmp_path):
    trainer = make_trainer(tiny_model, tmp_path, data_file, val_set_size=7, val_batch_size=2)
    assert len(trainer.data.held_out) == 7
    with torch.no_grad():
        expected = plain_loss(reference_model(tiny_model), trainer.data.held_out).item()
    assert trainer.stepper.evaluate(trainer.data.held_out) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("shared_length", [0, 2])
def test_the_loss_of_two_answers_is_that_of_their_tokens_alone(tiny_model, shared_length):
    """Two conversations of two answers each in a row, against transformers' own logits and a sum written by hand."""
    model = reference_model(tiny_model)
    rows = [[1, 300, 301, 302, 303, 304, 305, 306, 2], [1, 300, 401, 402, 403, 404, 2]]
    learnt = [((4, 5), (7, 9)), ((3, 4), (5, 7))]
    expected = torch.zeros(())
    for ids, positions in zip(rows, [(4, 7, 8), (3, 5, 6)], strict=True):
        log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = expected - sum(log_probabilities[at - 1, ids[at]] for at in positions)
    examples = [
        Example(1, "", np.array(ids, dtype=np.int32), spans, shared_length)
        for ids, spans in zip(rows, learnt, strict=True)
    ]
    module = ResponseLoss(load_base_model(ModelFolder(tiny_model), torch.float32, [CPU]), torch.float32)
    loss = module(pack(examples, CPU), 1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_an_attempt_before_the_first_step_leaves_the_run_as_it_was(tiny_model, tmp_path):
    settings = {"batch_size_training": 4, "max_steps": 3, "lr": RATE}
    expected = train(make_trainer(tiny_model, tmp_path / "without", **settings))
    trainer = make_trainer(tiny_model, tmp_path / "with", **settings)
    chosen = trainer.stepper.step_plan
    rows, labels = [], []
    module = trainer.stepper.loss_module
    module.register_forward_pre_hook(lambda _module, arguments: rows.append(len(arguments[0].input_ids)))
    module.register_forward_pre_hook(lambda _module, arguments: labels.append(len(arguments[0].label_ids)))
    longest_first = sorted(trainer.data.training, key=len, reverse=True)
    parameters = list(trainer.parameters.values())
    setup = replace(trainer.setup, step=StepTokens(10_000, 10_000, 0))
    trials = Trials(trainer.config, setup, module, trainer.optimizer, longest_first)
    tokens = len(longest_first[0]) + len(longest_first[1])
    trials.attempt(StepPlan(tokens, 1), tokens + 3, rows=2)
    assert rows == [tokens + 3] * 2
    assert labels == [tokens - 2] * 2  # no row of the run has more
    assert all(parameter.grad is None for parameter in parameters)
    assert all(trainer.optimizer.state[parameter]["exp_avg"].eq(0).all() for parameter in parameters)
    trainer.stepper.step_plan = chosen
    assert train(trainer) == expected


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kept_layers", [0, 1])
def test_recomputed_activations_give_the_same_gradients(tiny_model, tmp_path, use_peft, kept_layers):
    trainer = make_trainer(tiny_model, tmp_path, use_peft=use_peft)
    for name, parameter in trainer.parameters.items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(len(name)))
    batch = pack(trainer.data.training[:4], CPU)
    layers = causal_lm(trainer.model).model.layers
    calls: list[int] = []
    for index, layer in enumerate(layers):
        layer.self_attn.register_forward_pre_hook(lambda *_inputs, index=index: calls.append(index))

    def gradients(kept: int) -> dict[str, torch.Tensor]:
        calls.clear()
        trainer.stepper.step_plan = StepPlan(len(batch.input_ids), kept)
        trainer.stepper.loss_module(batch, 0.01).backward()
        found = {name: parameter.grad for name, parameter in trainer.parameters.items()}
        trainer.optimizer.zero_grad(set_to_none=True)
        return found

    expected = gradients(len(layers))
    assert sorted(calls) == [0, 1]
    recomputed = gradients(kept_layers)
    assert sorted(calls) == sorted([0, 1, *range(len(layers) - kept_layers)])
    for name, gradient in expected.items():
        assert gradient.abs().sum() > 0 or "embed" in name
        torch.testing.assert_close(recomputed[name], gradient, msg=name)


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_an_adapted_layer_is_w_x_plus_alpha_over_r_b_a_x(tiny_model, tmp_path, quantization):
    settings = LoraConfig(r=4, lora_alpha=6, target_modules=["o_proj", "up_proj"])
    trainer = make_trainer(tiny_model, tmp_path, quantization=quantization, lora_config=settings)
    decoder = causal_lm(trainer.model).model
    weights = dict(ModelFolder(tiny_model).tensors())
    for name in ("self_attn.o_proj", "mlp.up_proj"):
        layer = decoder.layers[1].get_submodule(name)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert (a.shape[0], b.shape[1]) == (4, 4)
        assert torch.equal(b, torch.zeros_like(b))  # an adapter begins as no change
        torch.nn.init.normal_(b)
        weight = weights[f"model.layers.1.{name}.weight"]
        weight = rounded_weight(weight, quantization) if quantization else weight
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(1))
        expected = x @ weight.t() + 6 / 4 * (x @ a.t()) @ b.t()
        torch.testing.assert_close(layer(x).detach(), expected.detach(), rtol=1e-4, atol=1e-4)
    assert not hasattr(decoder.layers[0].self_attn.q_proj, "lora_A")
    assert all(parameter.dtype == torch.float32 for parameter in trainer.parameters.values())


@pytest.mark.parametrize("kind", [{}, {"use_dora": True, "use_rslora": True}], ids=str)
@pytest.mark.parametrize("quantization", [None, "8bit"])
def test_a_run_with_dropout_goes_on_from_a_checkpoint_as_if_never_stopped(tiny_model, tmp_path, quantization, kind):
    def settings(dropout: float) -> dict:
        return {
            "quantization": quantization,
            "lora_config": LoraConfig(lora_dropout=dropout, **kind),
            "batch_size_training": 4,
            "max_steps": 6,
            "lr": RATE,
            "save_steps": 3,
            "micro_batch_size": 2,
        }

    whole = make_trainer(tiny_model, tmp_path / "whole", **settings(0.3))
    losses = train(whole)
    without = train(make_trainer(tiny_model, tmp_path / "without", **settings(0.0)))
    assert losses != pytest.approx(without, rel=1e-4)

    torch.manual_seed(12345)
    checkpoint = read_checkpoint(tmp_path / "whole" / "checkpoints" / "step-3")
    resumed = make_trainer(tiny_model, tmp_path / "resumed", checkpoint=checkpoint, **settings(0.3))
    assert resumed.done == 3
    assert train(resumed) == losses[3:]
    for name, parameter in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], parameter), name


@pytest.mark.parametrize("folder_name", ["tiny_model", "grouped_model"])
@pytest.mark.parametrize("method", ["prefix", "llama_adapter", "lora"])
def test_every_adapter_learns_and_computes_the_same_in_peft_itself(request, tmp_path, folder_name, method):
    folder = request.getfixturevalue(folder_name)
    trainer = make_trainer(
        folder,
        tmp_path,
        peft_method=method,
        prefix_config=PrefixConfig(num_virtual_tokens=5),
        batch_size_training=8,
        num_epochs=30,
        lr={"prefix": 0.3, "llama_adapter": 0.1, "lora": 0.01}[method],
    )
    losses = train(trainer)
    assert losses[-1] < 0.95 * losses[0]

    adapter = save_adapter(trainer)
    base = load_base_model(ModelFolder(folder), torch.float32, [CPU])
    reloaded = load_adapter(base, adapter, torch.float32)
    trained = project_logits(trainer.model.eval(), SEQUENCE)
    torch.testing.assert_close(project_logits(reloaded, SEQUENCE), trained, rtol=1e-5, atol=1e-5)

    plain = peft.PeftModel.from_pretrained(reference_model(folder), str(adapter)).eval()
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([SEQUENCE])).logits[0]
        untrained = reference_model(folder)(torch.tensor([SEQUENCE])).logits[0]
        # What the trainer minimised over packed examples is what PEFT computes over each one alone.
        alone = plain_loss(lambda ids: plain(input_ids=ids), trainer.data.training).item()
        assert trainer.stepper.evaluate(trainer.data.training) == pytest.approx(alone, rel=1e-4)
    torch.testing.assert_close(trained, expected, rtol=1e-3, atol=1e-3)
    assert (expected - untrained).abs().max() > 0.1


def test_frozen_layers_stay_bit_identical_and_the_others_move(tiny_model, tmp_path):
    trainer = make_trainer(
        tiny_model, tmp_path, use_peft=False, freeze_layers=True, num_freeze_layers=1, max_steps=3, lr=1e-2
    )
    train(trainer)
    state, moved = causal_lm(trainer.model).state_dict(), set()
    for name, tensor in ModelFolder(tiny_model).tensors():
        if not torch.equal(state[name], tensor):
            moved.add(name)
        frozen = name.startswith(("model.embed_tokens.", "model.layers.0."))
        assert frozen == (name not in moved), name
    assert any(name.startswith("model.layers.1.") for name in moved)


def test_held_out_examples_are_not_trained_on(tiny_model, data_file):
    config = TrainingConfig(val_set_size=0.2)
    config.alpaca_dataset.data_path = str(data_file)
    encoder = alpaca_encoder(tiny_model)
    data = load_data(config, encoder, report=print)
    training, held_out = ({example.number for example in part} for part in (data.training, data.held_out))
    assert len(held_out) == 12
    assert not training & held_out
    assert training | held_out == set(range(1, 61))
    records = load_records(data_file)
    alone = encode_records(records, encoder, 1024, report=print)
    assert all(example.text == alone[example.number - 1].text for example in data.training + data.held_out)

    config.seed = 43
    again = load_data(config, encoder, report=print)
    assert {example.number for example in again.held_out} != held_out


def test_a_resumed_run_keeps_its_step_plan_where_it_was_found_for_the_same(tiny_model, tmp_path):
    settings = {"batch_size_training": 4, "max_steps": 4, "save_steps": 2}
    begun = make_trainer(tiny_model, tmp_path / "begun", **settings)
    train(begun)
    checkpoint = read_checkpoint(tmp_path / "begun" / "checkpoints" / "step-2")
    found, plan = begun.stepper.loss_module.step_plan, checkpoint.state.step_plan
    assert plan == {"key": plan["key"], **found._asdict()}
    for change, expected in (({"token_budget": 99}, 99), ({"token_budget": 99, "key": "other"}, found.token_budget)):
        state = replace(checkpoint.state, step_plan=plan | change, last_eval_loss=1.5)
        resumed = make_trainer(
            tiny_model, tmp_path / "resumed", checkpoint=replace(checkpoint, state=state), **settings
        )
        assert resumed.stepper.loss_module.step_plan.token_budget == expected
        assert resumed.last_eval_loss == 1.5
    state = replace(checkpoint.state, step_plan={})  # of an early version
    resumed = make_trainer(tiny_model, tmp_path / "resumed", checkpoint=replace(checkpoint, state=state), **settings)
    assert resumed.stepper.loss_module.step_plan == found


def test_a_run_that_would_fill_the_disk_is_refused(tiny_model, tmp_path, monkeypatch):
    """LoRA r=8 on q and v of two layers: 4 thin matrices of 8 x 64 and 4 of 64 x 8; weights and Adam's two moments."""
    trainer = make_trainer(tiny_model, tmp_path / "out", keep_checkpoints=2)
    numbers = 8 * 8 * 64
    needed = 4 * numbers * 3 * 3 + 4 * numbers
    roomy, tight = needed + 1000, needed - 1000
    monkeypatch.setattr(
        "utils.runs.checkpoint.shutil.disk_usage", lambda _folder: shutil._ntuple_diskusage(0, 0, roomy)
    )
    trainer.check_disk_space()
    monkeypatch.setattr(
        "utils.runs.checkpoint.shutil.disk_usage", lambda _folder: shutil._ntuple_diskusage(0, 0, tight)
    )
    with pytest.raises(UserError, match="--keep_checkpoints"):
        trainer.check_disk_space()
