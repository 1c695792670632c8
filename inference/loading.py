"""Base model + adapter -> an engine that is ready to answer."""

from pathlib import Path

import torch

from configs.quantization import Quantization
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.prompt import choose_template
from ft_datasets.tokenizer import Tokenizer
from inference.engine import Engine
from utils.machine.precision import half_precision
from utils.model.folder import ModelFolder
from utils.model.weights import load_base_model
from utils.results.adapter_folder import check_adapter_folder, load_adapter, template_of
from utils.runs.description import described_template, read_training_config


def load_engine(base_model: str, lora_weights: str, quantization: Quantization | None) -> Engine:
    """Load a model for chat or serving, with the prompt template that it was trained on.

    The same arithmetic as in training: a quantised base computes here what it computed there.

    Raises:
        UserError: a folder is missing or wrong, or the adapter belongs to another base model.
    """
    base = ModelFolder(base_model)
    adapter = Path(lora_weights) if lora_weights else None
    if adapter:
        check_adapter_folder(adapter)
    tokenizer = Tokenizer(base.path)
    base.check_vocabulary(tokenizer.vocab_size)
    if adapter:
        template = template_of(adapter, base, tokenizer)
    elif described := read_training_config(base.path):
        template = described_template(base.path, described, tokenizer)
    else:
        template = choose_template("auto", base.path, tokenizer)

    count = torch.cuda.device_count()
    devices = [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]
    dtype, _reason = half_precision(devices[0])
    model = load_base_model(base, dtype, devices, quantization)
    if adapter:
        model = load_adapter(model, adapter, dtype)
    return Engine(model, ChatEncoder(template, tokenizer))
