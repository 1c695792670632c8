"""Serve a model over HTTP, for clients that poll.

    python -u api_stream.py --load_4bit
    curl -X POST http://127.0.0.1:8000/stream -H 'Content-Type: application/json' -d '{"prompt": "你好", "history": []}'

Repeat the curl until `response` ends in [stop]. The answer's keys: response, history, status, time, session_id.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends it quietly; run_main then takes over

from typing import Any

from configs.command_line import configure, run_command
from configs.errors import explained
from configs.messages import _
from configs.serving import ApiConfig
from utils.quiet import quiet_libraries


@explained()
@quiet_libraries()
def main(**settings: Any) -> None:
    """Load a model and serve it until Ctrl-C; what `python api_stream.py` does, for Python.

        main(base_model="models/NousResearch/Llama-2-7b-hf", load_4bit=True, port=8000)

    Args:
        settings: the flags, by name; configs/serving.py says what each means (`--help` lists them).

    Raises:
        UserError: something has to be changed first; the message says what.
        Interrupted: Ctrl-C came, which is how a server ends.
    """
    config = configure(ApiConfig, settings)

    from inference.loading import find_base, load_engine
    from inference.web.polling import listen, make_app, serve
    from inference.web.stream_sessions import StreamSessions

    base_model = find_base(config.base_model, config.lora_weights)
    with listen(config.host, config.port) as listener:
        print(_("Loading {folder} …", folder=base_model), flush=True)
        engine = load_engine(base_model, config.lora_weights, config.quantization)
        sessions = StreamSessions()
        url = f"http://{config.host}:{listener.getsockname()[1]}"
        print(_("Ready: POST {url}/stream (Ctrl-C ends it)", url=url), flush=True)
        try:
            serve(make_app(engine, config, sessions), listener)
        finally:
            sessions.close()


if __name__ == "__main__":
    run_command(main, ApiConfig)
