"""Talk to a model in the terminal, or ask it one question.

    python generate.py --base_model ./models/NousResearch/Llama-2-7b-hf --lora_weights ./output/model --load_8bit
    python generate.py --prompt "你好"
    echo "你好" | python generate.py --load_4bit
    python generate.py --base_model output/merged_model_output --lora_weights ''

In the conversation: /new forgets it, /undo takes the last turn back, /params shows and changes the sampling, /exit
ends it. Ctrl-C ends an answer, not the program.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends it quietly; run_main then takes over

import sys

from configs.command_line import parse
from configs.errors import run_main
from configs.messages import _
from configs.serving import ChatConfig
from utils.quiet import quiet_libraries


def main(argv: list[str]) -> None:
    """Load the model; answer one question, or talk."""
    config = parse(ChatConfig, argv)

    quiet_libraries()
    from inference.loading import load_engine
    from inference.terminal.chat import Chat, answer_once

    if config.prompt is None and sys.stdin.isatty():
        print(_("Loading {folder} …", folder=config.base_model), file=sys.stderr, flush=True)
    engine = load_engine(config.base_model, config.lora_weights, config.quantization)
    if config.prompt is not None:
        answer_once(engine, config.prompt, config)
    else:
        Chat(engine, config).run()


if __name__ == "__main__":
    run_main(main)
