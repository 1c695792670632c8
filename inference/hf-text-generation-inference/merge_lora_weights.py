"""Merge a LoRA adapter into its base model, for serving with TGI, vLLM or transformers.

    python inference/hf-text-generation-inference/merge_lora_weights.py \
      --base_model ./models/NousResearch/Llama-2-7b-hf --peft_model output/model --output_dir output/merged_model_output

With --format gguf the folder gets a model.gguf for llama.cpp and a Modelfile for Ollama as well; a model that needs no
merging is converted with --peft_model ''.

Works tensor by tensor: memory holds one shard of the merged model at a time, whatever the model's size, and no GPU is
needed. The sum W + scale * B A is formed in fp32 and rounded once; in a bf16 model so that small updates count.

Then the written folder is read again and compared with base and adapter, a layer at a time (--verify).
"""

import signal
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends it quietly; run_main then takes over
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from typing import TYPE_CHECKING, Any

from configs.command_line import configure, run_command
from configs.errors import UserError, explained
from configs.messages import _
from configs.results import MergeConfig
from utils.quiet import quiet_libraries

if TYPE_CHECKING:
    from utils.results.gguf import GgufFile


@explained()
@quiet_libraries()
def main(**settings: Any) -> Path:
    """Check that base and adapter belong together, then merge; what `python …/merge_lora_weights.py` does, for Python.

        main(base_model="models/NousResearch/Llama-2-7b-hf", peft_model="output/model", output_dir="output/merged")

    Args:
        settings: the flags, by name; configs/results.py says what each means (`--help` lists them).

    Returns:
        The folder of the merged model.

    Raises:
        UserError: something has to be changed first; the message says what.
    """
    config = configure(MergeConfig, settings)

    from ft_datasets.chat_encoder import ChatEncoder
    from ft_datasets.tokenizer import Tokenizer
    from utils.model.folder import ModelFolder
    from utils.results.adapter_folder import check_adapter_folder, template_of
    from utils.results.merge_proof import leave_unproved, prove
    from utils.results.merging import merge

    adapter, output = Path(config.peft_model), Path(config.output_dir)
    base = ModelFolder(config.base_model)
    if config.format == "gguf":
        from utils.results.gguf import GgufFile  # what can't become one is refused before anything is written

        file = GgufFile(base, config.gguf_type)
        file.check_place(output, besides=base.parameter_bytes if config.peft_model else 0)
        if not config.peft_model:
            return convert(file, output)
    elif not config.peft_model:
        raise UserError(_("--peft_model '': nothing to merge; --format gguf converts a model as it is"))
    check_adapter_folder(adapter)
    tokenizer = Tokenizer(base.path)
    template = template_of(adapter, base, tokenizer)
    say = partial(print, flush=True)

    def check(folder: Path) -> None:
        if config.verify:
            encoder = ChatEncoder(template, tokenizer)
            kinds = (config.quantization, config.save_quantized)
            prove(folder, base, adapter, encoder, *kinds, config.verify_prompts, say)
        else:
            leave_unproved(folder, say)

    say(_("Merging {adapter} into {base} …", adapter=adapter, base=base.path))
    size = merge(base, adapter, output, template, config.shard_gb, config.quantization, config.save_quantized, check)
    facts = {"folder": output, "size": f"{size / 1e9:.2f}"}
    if config.save_quantized:
        say(_("Done: {folder} ({size} GB), for vLLM, and for transformers with bitsandbytes.", **facts))
    else:
        say(
            _(
                "Done: {folder} ({size} GB). Talk to it:  python generate.py --base_model {folder} --lora_weights ''",
                **facts,
            )
        )
    if config.format == "gguf":
        convert(GgufFile(ModelFolder(output), config.gguf_type), output)
    return output


def convert(file: "GgufFile", output: Path) -> Path:
    """Write a GGUF file and its Modelfile, and say what came of it; returns the folder."""
    print(_("Writing {file} …", file=output / "model.gguf"), flush=True)
    file.write(output)
    for note in file.notes:
        print(note)
    print(
        _(
            "Done: {folder}/model.gguf ({size} GB). With Ollama:  ollama create my-model -f {folder}/Modelfile",
            folder=output,
            size=f"{file.size / 1e9:.2f}",
        )
    )
    return output


if __name__ == "__main__":
    run_command(main, MergeConfig)
