"""Settings of llama_finetuning.py. The names are llama-recipes'; where a default differs, its reason stands beneath."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from configs.datasets import AlpacaDataset, ChatDataset, CustomDataset
from configs.fsdp import FsdpConfig
from configs.messages import _
from configs.peft import LlamaAdapterConfig, LoraConfig, PrefixConfig
from configs.quantization import QUANTIZATION_FLAG, Quantization


@dataclass
class TrainingConfig:
    """Fine-tune a Llama-family model on instruction data: LoRA over a bf16, fp16, int8 or 4-bit base, or full.

    Steps: read the data, load the base model, add the adapter, train, save.
    """

    model_name: str = "./models/NousResearch/Llama-2-7b-hf"
    """Folder of the base model, as model_download.py leaves it."""
    output_dir: str = "output/model"
    """Folder for the adapter (or the whole model), checkpoints, metrics.jsonl and loss.png."""
    dataset: Literal["alpaca_dataset", "chat_dataset", "custom_dataset"] = "alpaca_dataset"
    """Form of the data: alpaca_dataset = questions with answers, chat_dataset = conversations, custom_dataset = what a
    function of yours gives. Differs from llama-recipes (samsum): Alpaca JSON is what people have for Chinese."""
    alpaca_dataset: AlpacaDataset = field(default_factory=AlpacaDataset)
    chat_dataset: ChatDataset = field(default_factory=ChatDataset)
    custom_dataset: CustomDataset = field(default_factory=CustomDataset)
    prompt_template: str = "auto"
    """The words that messages are put in: auto = the model's own chat template where its folder has one, else alpaca;
    alpaca = Stanford Alpaca's words; model = the model's own; or a file with a chat template in Jinja. A run that goes
    on keeps the one that it began with."""

    use_peft: bool = False
    """Train a small adapter over the frozen base model; without it all the weights are trained."""
    peft_method: Literal["lora", "llama_adapter", "prefix"] = "lora"
    """Which adapter, with --use_peft."""
    lora_config: LoraConfig = field(default_factory=LoraConfig)
    from_adapter: str = ""
    """Folder of a LoRA adapter whose weights the run starts from, as a second stage; rank, alpha, layers and kind of
    LoRA are its own. (A run that goes on from a checkpoint needs it no more.)"""
    llama_adapter_config: LlamaAdapterConfig = field(default_factory=LlamaAdapterConfig)
    prefix_config: PrefixConfig = field(default_factory=PrefixConfig)
    freeze_layers: bool = False
    """Full fine-tuning: leave the first num_freeze_layers decoder layers and the embeddings as they are."""
    num_freeze_layers: int = 1
    """How many layers --freeze_layers leaves as they are."""

    quantization: Quantization | None = field(default=None, metadata=QUANTIZATION_FLAG)
    """Hold the frozen base in fewer bits: alone or 8bit = int8 (half the memory), 4bit = NF4 (a quarter)."""
    mixed_precision: bool = True
    """Compute in bf16 (or fp16, --use_fp16); False = fp32 throughout. A CPU always computes in fp32."""
    use_fp16: bool = False
    """Compute in fp16 with a gradient scaler instead of bf16: for cards without bf16 (V100, P100, T4)."""
    pure_bf16: bool = False
    """Full fine-tuning: keep the trained weights and their gradients in bf16, 4 bytes a parameter instead of 8. Each
    update is computed in fp32 and rounded up or down at random, so that small ones count on average."""

    batch_size_training: int = 4
    """Examples an optimizer step, for each data-parallel process."""
    micro_batch_size: int = 0
    """Most examples in one forward pass; 0 = what is fastest of all that fits, found by measuring. Differs from
    llama-recipes (4): nobody should have to find it by trial and error. It changes speed and memory, never the result.
    """
    num_epochs: int = 3
    """Passes over the training examples."""
    max_steps: int = 0
    """Stop after so many optimizer steps; 0 = after num_epochs."""
    max_seq_length: int = 1024
    """Longest example in tokens; longer ones are left out, counted and named, never cut."""
    num_workers_dataloader: int = 1
    """Threads that turn text into tokens (SentencePiece tokenizers; a tokenizer.json uses one)."""

    lr: float = 1e-4
    """Highest learning rate."""
    scheduler: Literal["cosine", "step", "constant"] = "cosine"
    """Learning rate over the run: cosine = warm-up, then down to a tenth; step = times gamma after each epoch;
    constant. Differs from llama-recipes (step): cosine loses nothing on long runs and gains on short ones."""
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises from zero (cosine only)."""
    gamma: float = 0.85
    """Factor of the learning rate after each epoch (--scheduler step only)."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """Bytes a trained parameter that AdamW keeps: 8 (fp32), or 2 (bitsandbytes' 8 bits); paged = on a card that is full
    they move to host memory and back."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    gradient_clipping: bool = True
    """Scale a gradient down whose norm is above gradient_clipping_threshold. Differs from llama-recipes (False): one
    bad example must not spoil a run."""
    gradient_clipping_threshold: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 42
    """Fixes the held-out split, the order of the examples, the adapter's first weights and dropout."""

    run_validation: bool = True
    """Hold examples out of training and report the loss on them after each epoch."""
    val_set_size: float = 0.05
    """Examples held out: below 1 a share (200 at most), else their number."""
    val_batch_size: int = 0
    """Most examples in one forward pass of validation; 0 = as many as training's rows have room for. Differs from
    llama-recipes (1): that is slow."""

    save_model: bool = True
    """Save the adapter (or the model) at the end; False keeps the metrics alone."""
    save_steps: int = 0
    """Optimizer steps between checkpoints; 0 = by time alone, see save_minutes."""
    save_minutes: float = 10.0
    """Minutes between checkpoints; 0 = by save_steps alone."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept; the oldest go first."""
    save_optimizer: bool = True
    """Store the optimizer in checkpoints. Differs from llama-recipes (False): without it a run can't be resumed."""
    resume: str = "auto"
    """auto = go on from the newest whole checkpoint in output_dir; none = move an old run aside and start anew; or the
    path of a checkpoint."""
    accept_changes: bool = False
    """Resume although a flag or the data changed since the checkpoint was written."""
    dist_checkpoint_root_folder: str = ""
    """Another place for checkpoints, such as a larger disk; empty = output_dir."""
    dist_checkpoint_folder: str = "checkpoints"
    """Folder of the checkpoints within it."""

    gpu_memory_gb: float = 0.0
    """Take at most so much of each card's memory (GB, 1e9 bytes), for shared cards; 0 = all of it."""
    activation_offload: bool = True
    """Where activations do not all fit on the card, let some wait in main memory if that is faster than computing them
    again (it is tried); False = leave main memory alone."""
    torch_compile: bool | None = None
    """Compile the decoder's layers: up to a minute at the start, then faster. Left out = where the run is long
    enough to gain by it. Only on GPUs."""
    one_gpu: bool = False
    """Use only the first visible card. Otherwise a single process lays the model over all of them."""
    enable_fsdp: bool = False
    """Share weights, gradients and optimizer out among the processes that torchrun starts (torch FSDP2)."""
    fsdp_config: FsdpConfig = field(default_factory=FsdpConfig)

    preview: int = 0
    """Print the first N training examples as JSON lines with their tokens and labels, and end."""
    plan: bool = False
    """Print what the run will take (memory, disk, steps), and end."""

    @property
    def data(self) -> AlpacaDataset | ChatDataset | CustomDataset:
        """The settings of the data, of the kind that `dataset` names."""
        return getattr(self, self.dataset)

    @property
    def method(self) -> Literal["full", "lora", "llama_adapter", "prefix"]:
        """What is trained: an adapter over the frozen base model, or all of its weights."""
        return self.peft_method if self.use_peft else "full"

    @property
    def frozen_layers(self) -> int | None:
        """Decoder layers that a full fine-tuning leaves as they are, with the embedding; None = it trains all."""
        return self.num_freeze_layers if self.freeze_layers else None

    @property
    def checkpoints_dir(self) -> Path:
        """Where the run's checkpoints lie."""
        if not self.dist_checkpoint_root_folder:
            return Path(self.output_dir) / self.dist_checkpoint_folder
        # Runs may share the root, so each has a folder of its own.
        own = f"{self.dist_checkpoint_folder}-{Path(self.output_dir).resolve().name}"
        return Path(self.dist_checkpoint_root_folder) / own

    @classmethod
    def restored(cls, settings: dict[str, Any]) -> "TrainingConfig":
        """The settings that `dataclasses.asdict` once made a dictionary of."""
        kinds = {field.name: type(getattr(cls(), field.name)) for field in fields(cls)}
        return cls(**{k: kinds[k](**v) if isinstance(v, dict) else v for k, v in settings.items() if k in kinds})

    def flat(self) -> dict[str, Any]:
        """Every setting by the name of its flag."""
        settings: dict[str, Any] = {}
        for name, value in asdict(self).items():
            settings |= (
                {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
            )
        return settings

    def problems(self) -> Iterator[str]:
        """What is out of range, and which settings do not go together."""
        at_least = {
            0: "micro_batch_size max_steps lr weight_decay val_set_size val_batch_size save_steps save_minutes preview "
            "num_freeze_layers warmup_ratio seed gpu_memory_gb",
            1: "batch_size_training num_epochs num_workers_dataloader keep_checkpoints",
            8: "max_seq_length",
        }
        for least, names in at_least.items():
            for name in names.split():
                if getattr(self, name) < least:
                    yield _(
                        "--{name} {value}: must be at least {least}", name=name, value=getattr(self, name), least=least
                    )
        for name in ("gamma", "gradient_clipping_threshold"):
            if getattr(self, name) <= 0:
                yield _("--{name} {value}: must be above 0", name=name, value=getattr(self, name))
        if self.seed >= 2**63:
            yield _("--seed {value}: must be from 0 to 2^63 - 1", value=self.seed)
        if self.warmup_ratio > 1:
            yield _("--warmup_ratio {value}: must be at most 1", value=self.warmup_ratio)
        if not self.use_peft and self.quantization:
            yield _(
                "--quantization {bits} trains no weights of the base model, so it needs an adapter: add --use_peft, "
                "or leave --quantization out for full fine-tuning",
                bits=self.quantization,
            )
        yield from self._without_effect()
        if not self.data.data_path:
            needed = "file" if self.dataset == "custom_dataset" else "data_path"
            yield _("--{name} needs a value", name=f"{self.dataset}.{needed}")
        if self.preview and self.plan:
            yield _("--preview and --plan each print and end: give one of them")
        if self.val_set_size >= 1 and self.val_set_size != int(self.val_set_size):
            yield _("--val_set_size {value}: below 1 it is a share, from 1 on a whole number", value=self.val_set_size)
        if self.use_peft and self.freeze_layers:
            yield _("--freeze_layers is for full fine-tuning: with --use_peft the whole base model is frozen already")
        if self.use_fp16 and not self.mixed_precision:
            yield _("--use_fp16 and --mixed_precision False exclude each other: fp16 is the mixed precision")
        if self.pure_bf16 and (self.use_fp16 or not self.mixed_precision):
            yield _("--pure_bf16 computes in bf16: leave --use_fp16 and --mixed_precision False out")
        if self.optimizer != "adamw" and self.enable_fsdp:
            yield _(
                "--optimizer {name} quantizes in blocks that FSDP would cut through: use --optimizer adamw, which "
                "--enable_fsdp shares out among the cards; --pure_bf16 saves more",
                name=self.optimizer,
            )
        if self.method == "llama_adapter" and self.quantization:
            yield _(
                "--peft_method llama_adapter passes its prompt through the base model's own weights, which PEFT "
                "can't do over a quantized base: use --peft_method lora, or leave --quantization out"
            )
        if self.from_adapter and Path(self.from_adapter).resolve() == Path(self.output_dir).resolve():
            yield _("--output_dir {folder} is the folder of --from_adapter: give another one", folder=self.output_dir)
        if self.lora_config.use_dora and self.enable_fsdp:
            yield _(
                "--lora_config.use_dora needs whole rows of the base model at the start, which --enable_fsdp cuts up: "
                "leave one of them out"
            )
        if self.method not in ("full", "lora") and self.enable_fsdp:
            yield _("--enable_fsdp shards LoRA and full fine-tuning only: use --peft_method lora")

    def _without_effect(self) -> Iterator[str]:
        """Settings that were changed although another one makes them do nothing."""
        defaults = type(self)()
        conditions = {
            "alpaca_dataset": (self.dataset == "alpaca_dataset", "--dataset alpaca_dataset"),
            "chat_dataset": (self.dataset == "chat_dataset", "--dataset chat_dataset"),
            "custom_dataset": (self.dataset == "custom_dataset", "--dataset custom_dataset"),
            "peft_method": (self.use_peft, "--use_peft"),
            "lora_config": (self.method == "lora", "--use_peft --peft_method lora"),
            "from_adapter": (self.method == "lora", "--use_peft --peft_method lora"),
            "llama_adapter_config": (
                self.method == "llama_adapter",
                "--use_peft --peft_method llama_adapter",
            ),
            "prefix_config": (self.method == "prefix", "--use_peft --peft_method prefix"),
            "val_set_size val_batch_size": (self.run_validation, "--run_validation"),
            "gamma": (self.scheduler == "step", "--scheduler step"),
            "warmup_ratio": (self.scheduler == "cosine", "--scheduler cosine"),
            "num_freeze_layers": (self.freeze_layers, "--freeze_layers"),
            "pure_bf16": (not self.use_peft, "full fine-tuning (--use_peft False)"),
            "fsdp_config": (self.enable_fsdp, "--enable_fsdp"),
            "gradient_clipping_threshold": (self.gradient_clipping, "--gradient_clipping"),
        }
        for names, (is_used, needed) in conditions.items():
            for name in names.split():
                if not is_used and getattr(self, name) != getattr(defaults, name):
                    yield _("--{name} has an effect only with {needed}", name=name, needed=needed)
