"""Turn a run's checkpoint into a Hugging Face model (full fine-tuning) or a PEFT adapter (LoRA).

    python inference/checkpoint_converter_fsdp_hf.py --fsdp_checkpoint_path output/model/checkpoints/step-300 \
      --consolidated_model_path output/step-300 --HF_model_path_or_name ./models/NousResearch/Llama-2-7b-hf

One process, no GPU, tensor by tensor: memory holds one weight file at a time, whatever the model's size. It makes no
difference how many processes saved the checkpoint, nor whether they were sharded.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.command_line import parse
from configs.errors import UserError, run_main
from configs.messages import _
from configs.results import ConverterConfig
from utils.model.folder import ModelFolder
from utils.quiet import quiet_libraries


def main(argv: list[str]) -> None:
    """Check that checkpoint and base model belong together, then convert."""
    config = parse(ConverterConfig, argv)
    quiet_libraries()
    from utils.results.consolidating import consolidate
    from utils.results.model_card import chat_command
    from utils.runs.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(Path(config.fsdp_checkpoint_path))
    if "settings" not in checkpoint.state:
        raise UserError(
            _(
                "{path} was written by an earlier version and can't be converted. Go on with its run: it writes newer "
                "checkpoints, and its result when it ends.",
                path=checkpoint.path,
            )
        )
    base = ModelFolder(config.HF_model_path_or_name or checkpoint.state["settings"]["model_name"])
    print(_("Converting {path} …", path=checkpoint.path), flush=True)
    run = consolidate(checkpoint, base, Path(config.consolidated_model_path))
    print(_("Done: {folder}. Talk to it:  {command}", folder=run.output_dir, command=chat_command(run)))


if __name__ == "__main__":
    run_main(main)
