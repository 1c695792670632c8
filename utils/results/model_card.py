"""The README.md of a result, and the command that talks to it."""

import shlex
from pathlib import Path

from configs.messages import _
from configs.training import TrainingConfig
from utils.runs.description import TRAINING_CONFIG


def chat_command(config: TrainingConfig) -> str:
    """The command that talks to a run's result."""
    base, adapter = (config.output_dir, "") if config.method == "full" else (config.model_name, config.output_dir)
    quantized = {"8bit": " --load_8bit", "4bit": " --load_4bit"}.get(config.quantization or "", "")
    return f"python generate.py --base_model {shlex.quote(base)} --lora_weights {shlex.quote(adapter)}{quantized}"


def model_card(config: TrainingConfig, facts: dict[str, str]) -> str:
    """README.md of an adapter or a model: how it was made and how to use it, in a form that hubs understand."""
    library = "transformers" if config.method == "full" else "peft"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return (
        f"---\nlibrary_name: {library}\nbase_model: {config.model_name}\nlanguage: zh\n"
        f"pipeline_tag: text-generation\n---\n\n# {Path(config.output_dir).resolve().name}\n\n"
        f"| | |\n| --- | --- |\n{rows}\n\n"
        + _(
            "Every setting, the prompt template's exact text and the package versions are in `{file}`.",
            file=TRAINING_CONFIG,
        )
        + f"\n\n```bash\n{chat_command(config)}\n```\n"
    )
