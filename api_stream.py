"""Serve a model over HTTP, for clients that poll.

    python -u api_stream.py --load_4bit
    curl -X POST http://127.0.0.1:8000/stream -H 'Content-Type: application/json' -d '{"prompt": "你好", "history": []}'

Repeat the curl until `response` ends in [stop]. The answer's keys: response, history, status, time, session_id.
"""

from configs.command_line import parse
from configs.errors import UserError, run_main
from configs.inference import ApiConfig
from configs.messages import _


def main(argv: list[str]) -> None:
    """Load the model, serve it."""
    config = parse(ApiConfig, argv)

    from utils.quiet import quiet_libraries

    quiet_libraries()
    from inference.api import make_app, serve
    from inference.loading import load_engine
    from utils.stream_sessions import StreamSessions

    print(_("Loading {folder} …", folder=config.base_model), flush=True)
    engine = load_engine(config.base_model, config.lora_weights, config.quantization)
    sessions = StreamSessions()
    try:
        serve(
            make_app(engine, config, sessions),
            config.host,
            config.port,
            on_start=lambda url: print(_("Ready: POST {url}/stream (Ctrl-C ends it)", url=url), flush=True),
        )
    except OSError as error:
        raise UserError(
            _(
                "Can't listen on {host}:{port} ({error}). Choose another --port.",
                host=config.host,
                port=config.port,
                error=error.strerror,
            )
        ) from error
    finally:
        sessions.close()


if __name__ == "__main__":
    run_main(main)
