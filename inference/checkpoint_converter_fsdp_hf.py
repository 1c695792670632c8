"""Turn a run's checkpoint into a Hugging Face model (full fine-tuning) or a PEFT adapter (LoRA).

    python inference/checkpoint_converter_fsdp_hf.py --fsdp_checkpoint_path output/model/checkpoints/step-300 \
      --consolidated_model_path output/step-300 --HF_model_path_or_name ./models/NousResearch/Llama-2-7b-hf

One process, no GPU, tensor by tensor: memory holds one weight file at a time, whatever the model's size. It makes no
difference how many processes saved the checkpoint, nor whether they were sharded.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends it quietly; run_main then takes over
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import Any

from configs.command_line import configure, run_command
from configs.errors import UserError, explained
from configs.messages import _
from configs.results import ConverterConfig
from utils.quiet import quiet_libraries


@explained()
@quiet_libraries()
def main(**settings: Any) -> Path:
    """Check that checkpoint and base model belong together, then convert; what running this file does, for Python.

        main(fsdp_checkpoint_path="output/model/checkpoints/step-300", consolidated_model_path="output/step-300")

    Args:
        settings: the flags, by name; configs/results.py says what each means (`--help` lists them).

    Returns:
        The folder of the model or the adapter.

    Raises:
        UserError: something has to be changed first; the message says what.
    """
    config = configure(ConverterConfig, settings)

    from utils.model.folder import ModelFolder
    from utils.results.consolidating import consolidate
    from utils.results.model_card import chat_command
    from utils.runs.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(Path(config.fsdp_checkpoint_path))
    if not checkpoint.state.settings:
        raise UserError(
            _(
                "{path} was written by an earlier version and can't be converted. Go on with its run: it writes newer "
                "checkpoints, and its result when it ends.",
                path=checkpoint.path,
            )
        )
    base = ModelFolder(config.HF_model_path_or_name or checkpoint.state.settings["model_name"])
    print(_("Converting {path} …", path=checkpoint.path), flush=True)
    run = consolidate(checkpoint, base, Path(config.consolidated_model_path))
    print(_("Done: {folder}. Talk to it:  {command}", folder=run.output_dir, command=chat_command(run)))
    return Path(run.output_dir)


if __name__ == "__main__":
    run_command(main, ConverterConfig)
