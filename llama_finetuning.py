"""Fine-tune a Llama-family model on your own data.

LoRA over an int8 base, one process, the model laid over both cards:
    CUDA_VISIBLE_DEVICES=1,2 torchrun --nnodes 1 --nproc_per_node 1 llama_finetuning.py --use_peft --peft_method lora \
      --model_name ./models/NousResearch/Llama-2-7b-hf --use_fp16 --output_dir output/model --dataset alpaca_dataset \
      --batch_size_training 40 --num_epochs 3 --quantization
Data parallel, a process for each card:
    torchrun --nnodes 1 --nproc_per_node 2 llama_finetuning.py --use_peft …
Full fine-tuning, sharded:
    torchrun --nnodes 1 --nproc_per_node 2 llama_finetuning.py --enable_fsdp …
See what the model will see:
    python llama_finetuning.py --preview 3
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends it quietly; run_main then takes over

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from configs.command_line import configure, run_command
from configs.errors import UserError, explained
from configs.messages import _
from configs.training import TrainingConfig
from utils.quiet import quiet_libraries


@explained()
@quiet_libraries()
def main(**settings: Any) -> Path:
    """Fine-tune a model, or preview or plan the run; what `python llama_finetuning.py` does, for Python.

        main(model_name="models/NousResearch/Llama-2-7b-hf", use_peft=True, **{"lora_config.r": 16})

    Args:
        settings: the flags, by name; configs/training.py says what each means (`--help` lists them).

    Returns:
        The output folder.

    Raises:
        UserError: something has to be changed first; the message says what.
        Interrupted: the run was asked to end; the same call goes on with it.
    """
    config = configure(TrainingConfig, settings)

    from ft_datasets.chat_encoder import ChatEncoder
    from ft_datasets.loading import load_data
    from ft_datasets.tokenizer import Tokenizer
    from utils.download.dataset import fetch_data
    from utils.model.folder import ModelFolder
    from utils.runs.description import template_for

    folder = ModelFolder(config.model_name)
    tokenizer = Tokenizer(folder.path)
    folder.check_vocabulary(tokenizer.vocab_size)
    folder.check_frozen_layers(config.frozen_layers or 0)
    inherited = None
    if config.from_adapter:
        from utils.results.adapter_folder import second_stage

        config, inherited = second_stage(config, folder, tokenizer)
    if config.preview:
        from utils.reports.preview import preview

        files = fetch_data(config.data, partial(print, file=sys.stderr))
        encoder = ChatEncoder(template_for(config, tokenizer, inherited), tokenizer)
        preview(load_data(config, encoder, lambda _message: None, files).training[: config.preview])
    elif config.plan:
        from utils.reports.plan import print_plan

        files = fetch_data(config.data, print)
        encoder = ChatEncoder(template_for(config, tokenizer, inherited), tokenizer)
        print_plan(config, folder, load_data(config, encoder, print, files))
    else:
        from utils.finetune import fine_tune
        from utils.machine.launch import joined_world

        if config.enable_fsdp and "RANK" not in os.environ:
            raise UserError(
                _("--enable_fsdp needs processes to share among: torchrun --nproc_per_node 2 llama_finetuning.py …")
            )
        with joined_world(config.one_gpu) as world:
            fine_tune(config, world, folder, tokenizer, inherited)
    return Path(config.output_dir)


if __name__ == "__main__":
    run_command(main, TrainingConfig)
