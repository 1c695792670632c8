"""Compare a server with our own engine: does the deployed model say what the tuned one says?

    python inference/verify_serving.py --endpoint http://127.0.0.1:8000 --model my-model --lora_weights output/model
    python inference/verify_serving.py --endpoint http://127.0.0.1:8080 --base_model output/merged --lora_weights ''

Both are asked the same questions, always taking the likeliest token. Prompt ids, answers, their log-probabilities and
their ends are compared, as far as the server tells them, and the likely reason of a difference is named. Any server
that speaks OpenAI's protocol will do (vLLM, LMDeploy, SGLang, llama.cpp, Ollama), and so does api_stream.py.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends it quietly; run_main then takes over
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataclasses import asdict
from typing import Any

from configs.command_line import configure, run_command
from configs.errors import UserError, explained
from configs.messages import _
from configs.serving_check import ServingCheckConfig
from utils.quiet import quiet_libraries


@explained()
@quiet_libraries()
def main(**settings: Any) -> dict[str, Any]:
    """Ask a server and our own engine the same, and compare; what running this file does, for Python.

        main(endpoint="http://127.0.0.1:8000", lora_weights="output/model")

    Args:
        settings: the flags, by name; configs/serving_check.py says what each means (`--help` lists them).

    Returns:
        What --report writes.

    Raises:
        UserError: they do not say the same, or something has to be changed first; the message says which.
        NetworkGaveUpError: the server does not answer.
    """
    config = configure(ServingCheckConfig, settings)

    from inference.engine import PromptRefused, PromptTooLong
    from inference.loading import find_base, load_engine
    from inference.serving_check.comparison import Report, compare, own_answer, spells_tokens
    from inference.serving_check.endpoint import Endpoint
    from inference.serving_check.questions import BUILT_IN, read_questions, with_special_tokens
    from inference.serving_check.words import heading, row, verdict
    from utils.files import write_json

    questions = read_questions(Path(config.prompts)) if config.prompts else list(BUILT_IN)
    report = Report([], [])
    with Endpoint(config.endpoint, config.model, config.key, config.timeout) as endpoint:
        base_model = find_base(config.base_model, config.lora_weights)
        print(_("Loading {folder} …", folder=base_model), file=sys.stderr, flush=True)
        engine = load_engine(base_model, config.lora_weights, config.quantization)
        if not config.prompts:
            questions.append(with_special_tokens(engine.tokenizer))
        print(heading(), flush=True)
        for number, question in enumerate(questions, 1):
            try:
                own = own_answer(engine, question, config.max_new_tokens)
            except (PromptRefused, PromptTooLong) as error:  # not every template has a place for a system message
                report.left_out.append((question, str(error)))
                print(f"{number:<3}  " + _("left out: {reason}", reason=error), flush=True)
                continue
            served = endpoint.ask(question, config.max_new_tokens)
            apart = spells_tokens(engine, question)
            report.comparisons.append(compare(question, own, served, engine.tokenizer, config.tolerance, apart))
            print("\n".join(row(number, report.comparisons[-1])), flush=True)
    found = {"endpoint": endpoint.url, "model": endpoint.model, "same": report.is_same, **asdict(report)}
    if config.report:
        write_json(Path(config.report), found)
    if not report.counted:
        raise UserError(_("No question was left to compare."))
    if not report.is_same:
        raise UserError(verdict(report))
    print(verdict(report))
    return found


if __name__ == "__main__":
    run_command(main, ServingCheckConfig)
