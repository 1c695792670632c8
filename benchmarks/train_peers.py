"""One training run of a peer: the plain padded loop, TRL or Unsloth; benchmarks/train.py starts it in its own process.

    python benchmarks/train_peers.py padded|trl|unsloth run.json

run.json holds the fields of Run. Examples are the project's own: equal tokens, in the same order. As the project does,
a run appends a line to `output/metrics.jsonl` at the end of each optimizer step; whoever watches the file measures.
"""

import json
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__" and sys.argv[1] == "unsloth":
    import unsloth

import torch

from configs.datasets import AlpacaDataset
from configs.quantization import Quantization
from configs.training import TrainingConfig
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.examples import IGNORE_INDEX, Example
from ft_datasets.loading import load_data
from ft_datasets.prompt import PromptTemplate
from ft_datasets.tokenizer import Tokenizer
from utils.machine.memory import limit_memory
from utils.machine.world import World
from utils.quiet import quiet_libraries
from utils.rows.schedule import Schedule

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
ALL_LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


@dataclass
class Run:
    """What a peer is asked to do.

    Attributes:
        parts: micro-batches that a step is cut into.
        checkpointing: whether layers recompute their activations.
        warm_up: steps before the clock starts.
    """

    model: str
    data: str
    output: str
    quantization: Quantization | None
    targets: list[str] = field(default_factory=list)
    full: bool = False
    fp16: bool = False
    batch: int = 4
    max_seq_length: int = 512
    steps: int = 4
    warm_up: int = 1
    parts: int = 1
    checkpointing: bool = False
    gpu_memory_gb: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """What products are computed in."""
        return torch.float32 if DEVICE.type == "cpu" else torch.float16 if self.fp16 else torch.bfloat16


class Recorder:
    """Counts tokens, and writes a step's line when the step is done."""

    def __init__(self, run: Run) -> None:
        self.run, self.tokens, self.step = run, 0, 0
        self.file = (Path(run.output) / "metrics.jsonl").open("w", encoding="utf-8")

    def end_step(self, loss: torch.Tensor | None = None) -> None:
        """Take note of a step; the device is waited for only where the clock starts and stops."""
        self.step += 1
        line: dict[str, Any] = {"step": self.step, "tokens": self.tokens}
        self.tokens = 0
        if self.step in (1, self.run.warm_up, self.run.steps):
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
                line["max_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
            line["train_loss"] = None if loss is None else loss.item()
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def read_steps(run: Run) -> list[list[Example]]:
    """The examples of each step, as the project's own run takes them."""
    config = TrainingConfig(
        model_name=run.model,
        alpaca_dataset=AlpacaDataset(run.data),
        max_seq_length=run.max_seq_length,
        run_validation=False,
    )
    tokenizer = Tokenizer(run.model)
    examples = load_data(config, ChatEncoder(PromptTemplate.alpaca(tokenizer), tokenizer), report=print).training
    schedule = Schedule(len(examples), run.batch, num_epochs=1_000_000, max_steps=run.steps, seed=config.seed)
    return [[examples[i] for i in schedule.indices(step)] for step in range(run.steps)]


def load_model(run: Run) -> torch.nn.Module:
    """transformers' model with PEFT's LoRA over it, as llama-recipes puts them together."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    quantization = None
    if run.quantization == "8bit":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    elif run.quantization == "4bit":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=run.dtype,
        )
    model = LlamaForCausalLM.from_pretrained(
        run.model,
        dtype=torch.float32 if run.full else run.dtype,
        device_map={"": DEVICE},
        attn_implementation="flash_attention_2" if DEVICE.type == "cuda" and find_spec("flash_attn") else "sdpa",
        **({"quantization_config": quantization} if quantization else {}),
    )
    if quantization:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=run.checkpointing)
    elif run.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    if run.full:
        return model
    lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules=run.targets, task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def padded(run: Run) -> None:
    """The loop of llama-recipes: examples padded to the longest, autocast, AdamW."""
    model = load_model(run).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=run.dtype == torch.float16)
    recorder = Recorder(run)
    for examples in read_steps(run):
        size = -(-len(examples) // run.parts)
        total = torch.zeros((), device=DEVICE)
        for start in range(0, len(examples), size):
            chosen = examples[start : start + size]
            batch = pad(chosen)
            with torch.autocast(DEVICE.type, run.dtype, enabled=run.dtype != torch.float32):
                loss = model(**batch, use_cache=False).loss * len(chosen) / len(examples)
            scaler.scale(loss).backward()
            total += loss.detach()
            recorder.tokens += sum(map(len, chosen))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        recorder.end_step(total)


def pad(examples: list[Example]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels, each [examples, longest], on the device."""
    shape = (len(examples), max(map(len, examples)))
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE_INDEX),
    }
    for row, example in enumerate(examples):
        length = len(example)
        batch["input_ids"][row, :length] = torch.from_numpy(example.input_ids)
        batch["attention_mask"][row, :length] = 1
        batch["labels"][row, :length] = torch.from_numpy(example.labels)
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def trl(run: Run) -> None:
    """TRL's SFTTrainer with packing, and Liger's kernels where they are installed; TRL 1.15's loss needs a GPU."""
    from transformers import AutoTokenizer

    model = load_model(run)
    use_liger = DEVICE.type == "cuda" and find_spec("liger_kernel") is not None
    # A micro-batch is one row to TRL. Without FlashAttention its mask is dense, so a long one costs its square.
    tokens = None if model.config._attn_implementation == "flash_attention_2" else 2048
    use_sft_trainer(run, model, AutoTokenizer.from_pretrained(run.model), use_liger, tokens)


def unsloth_(run: Run) -> None:
    """Unsloth's model and adapter under TRL's SFTTrainer with packing, as its notebooks have it."""
    checkpointing = "unsloth" if run.checkpointing else False
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        run.model,
        max_seq_length=run.max_seq_length,
        dtype=None if run.full else run.dtype,
        load_in_4bit=run.quantization == "4bit",
        load_in_8bit=run.quantization == "8bit",
        full_finetuning=run.full,
        use_gradient_checkpointing=checkpointing,
        local_files_only=True,
    )
    if not run.full:
        model = unsloth.FastLanguageModel.get_peft_model(
            model,
            r=8,
            lora_alpha=32,
            lora_dropout=0,
            bias="none",
            target_modules=run.targets,
            use_gradient_checkpointing=checkpointing,
            random_state=42,
        )
    use_sft_trainer(run, model, tokenizer, use_liger=False)


def use_sft_trainer(
    run: Run, model: torch.nn.Module, tokenizer: Any, use_liger: bool, tokens: int | None = None
) -> None:
    """Train with rows of max_seq_length packed tokens, as many a step as hold about the tokens of `batch` examples.

    Args:
        tokens: about how many a micro-batch holds where run.parts is 1; None = all of the step.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    recorder = Recorder(run)
    steps = read_steps(run)
    rows = max(1, round(sum(map(len, steps[0])) / run.max_seq_length))
    parts = min(rows, run.parts * -(-rows * run.max_seq_length // tokens) if tokens else run.parts)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token

    class CountingTrainer(SFTTrainer):
        def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            recorder.tokens += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            recorder_loss.append(super().training_step(model, inputs, *more, **named).detach())
            return recorder_loss[-1]

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *_arguments: Any, **_named: Any) -> None:
            recorder.end_step(sum(recorder_loss))
            recorder_loss.clear()

    recorder_loss: list[torch.Tensor] = []
    columns = [
        {
            "input_ids": example.input_ids.tolist(),
            "completion_mask": (example.labels != IGNORE_INDEX).astype(int).tolist(),
        }
        # Packing leaves gaps, and a last row that is not full: more examples than the steps need.
        for example in [example for examples in (*steps, *steps) for example in examples]
    ]
    arguments = SFTConfig(
        output_dir=str(Path(run.output) / "trainer"),
        max_length=run.max_seq_length,
        packing=True,
        completion_only_loss=True,  # else completion_mask is left unread where the examples are tokens already
        per_device_train_batch_size=-(-rows // parts),
        gradient_accumulation_steps=parts,
        max_steps=run.steps,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        bf16=run.dtype == torch.bfloat16,
        fp16=run.dtype == torch.float16,
        gradient_checkpointing=run.checkpointing,
        optim="adamw_torch_fused",
        use_cpu=DEVICE.type == "cpu",
        use_liger_kernel=use_liger,
        report_to="none",
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
    )
    trainer = CountingTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(columns),
        processing_class=tokenizer,
        callbacks=[EndOfStep()],
    )
    if run.dtype == torch.float16:
        # TRL makes the adapter of a quantized model bf16, whose gradients the scaler of fp16 does not take.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train()


@quiet_libraries()
def main(name: str, settings: str) -> None:
    """Run one peer."""
    run = Run(**json.loads(Path(settings).read_text(encoding="utf-8")))
    limit_memory(World(0, 1, [DEVICE]), run.gpu_memory_gb)
    {"padded": padded, "trl": trl, "unsloth": unsloth_}[name](run)


if __name__ == "__main__":
    main(*sys.argv[1:])
