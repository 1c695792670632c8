"""Talk to a model in the terminal, or ask it one question.

    python generate.py --base_model ./models/NousResearch/Llama-2-7b-hf --lora_weights ./output/model --load_8bit
    python generate.py --prompt "你好"
    echo "你好" | python generate.py --load_4bit
    python generate.py --base_model output/merged_model_output --lora_weights ''

In the conversation: /system tells the model something before it, /retry draws the last answer anew, /undo takes the
last turn back, /save keeps the conversation as data, /new forgets it, /params shows and changes the sampling, /exit
ends it; /help says more. Ctrl-C ends an answer, not the program.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends it quietly; run_main then takes over

import sys
from typing import Any

from configs.command_line import configure, run_command
from configs.errors import explained
from configs.messages import _
from configs.serving import ChatConfig
from utils.quiet import quiet_libraries


@explained()
@quiet_libraries()
def main(**settings: Any) -> str | None:
    """Load a model, then answer one question or talk; what `python generate.py` does, for Python.

        answer = main(prompt="你好", base_model="models/NousResearch/Llama-2-7b-hf", load_8bit=True)

    Args:
        settings: the flags, by name; configs/serving.py says what each means (`--help` lists them).

    Returns:
        The answer to `prompt`, which is written to standard output too; None after a conversation.

    Raises:
        UserError: something has to be changed first; the message says what.
    """
    config = configure(ChatConfig, settings)

    from inference.loading import find_base, load_engine
    from inference.terminal.chat import Chat, answer_once, is_interactive

    base_model = find_base(config.base_model, config.lora_weights)
    if config.prompt is None and is_interactive():
        print(_("Loading {folder} …", folder=base_model), file=sys.stderr, flush=True)
    engine = load_engine(base_model, config.lora_weights, config.quantization)
    if config.prompt is not None:
        return answer_once(engine, config.prompt, config, config.system)
    Chat(engine, config, config.system).run()
    return None


if __name__ == "__main__":
    run_command(main, ChatConfig)
