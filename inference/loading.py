"""Base model + adapter -> an engine that is ready to answer."""

from pathlib import Path

import torch

from configs.errors import UserError
from configs.messages import _
from configs.quantization import Quantization
from configs.serving import DEFAULT_BASE_MODEL
from ft_datasets.chat_encoder import ChatEncoder
from ft_datasets.prompt import choose_template
from ft_datasets.tokenizer import Tokenizer
from inference.engine import Engine
from utils.files import read_json
from utils.machine.precision import half_precision
from utils.model.folder import ADAPTER_CONFIG, ModelFolder
from utils.model.weights import load_base_model
from utils.results.adapter_folder import check_adapter_folder, load_adapter, template_of
from utils.runs.description import described_template, read_training_config


def find_base(base_model: str, lora_weights: str) -> str:
    """The folder of the base model: the one that is given, or else the one that the adapter's own record names.

    That one is looked for where the record says and where model_download.py puts it. Where an adapter's record holds
    the digests of its base, the default folder is tried too: loading refuses it if it is another model.

    Raises:
        UserError: there is no adapter, or its base is not here.
    """
    if base_model or not lora_weights:
        return base_model or DEFAULT_BASE_MODEL
    adapter = Path(lora_weights)
    check_adapter_folder(adapter)
    described = read_training_config(adapter)
    if described:
        named = described["settings"].get("model_name")
    else:
        named = read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        return DEFAULT_BASE_MODEL
    places = [named, str(Path("models") / named), *([DEFAULT_BASE_MODEL] if described else [])]
    for place in places:
        if Path(place).is_dir():
            return place
    parts = [part for part in Path(named).parts if part not in (".", "models")]
    raise UserError(
        _(
            "The adapter in {adapter} was trained over {base}, and there is no such folder (seen from {here}). "
            "Download it with\n"
            "  python model_download.py --repo_id {repo_id}\n"
            "or give the folder that you have with --base_model.",
            adapter=adapter,
            base=named,
            here=Path.cwd(),
            repo_id="/".join(parts) if len(parts) == 2 and not Path(named).is_absolute() else "OWNER/NAME",
        )
    )


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
