"""Serves a trained network by OpenAI's protocol, with a page that shows a canvas clear up.

    python -m launch.serve --workdir=runs/quickstart --port=8000
    curl localhost:8000/v1/completions -d '{"prompt": "Return the", "max_tokens": 64}'

The page is at http://localhost:8000/. SIGTERM or ^C lets the running requests end, then ends the server.
"""

import contextlib
import logging
import signal
from pathlib import Path

from diffusion_lm.inference import api
from launch import command
from launch.flags import Flags

FLAGS = Flags(command.FLAGS)
WORKDIR = FLAGS.workdir()
CHECKPOINT_STEP = FLAGS.integer("checkpoint_step", None, "Step of the checkpoint to load. Default: the newest.", 0)
HOST = FLAGS.string("host", "127.0.0.1", "Address to listen at; 0.0.0.0: of all networks, which needs --api_key_file.")
PORT = FLAGS.integer("port", 8000, "Port to listen at; 0: any that is free.", 0, 65535)
NAME = FLAGS.string("name", None, "The model's name in requests. Default: the last part of --workdir.")
API_KEY_FILE = FLAGS.string(
    "api_key_file", None, "File with the key that requests carry as a bearer token. Default: none is needed."
)
MAX_ROWS = FLAGS.integer("max_rows", 64, "Texts that are generated together, at most.", 1)
MAX_WAITING = FLAGS.integer("max_waiting", 256, "Requests that wait, at most; a further one is answered by 429.", 1)
DRAIN_S = FLAGS.integer("drain_s", 60, "Seconds that running requests have once the server is asked to end.", 1)
log = logging.getLogger("diffusion_lm")


def main() -> dict:
    for package in ("starlette", "uvicorn"):
        command.needs(package, "serve", "serving")
    import uvicorn

    from diffusion_lm.serving import app
    from diffusion_lm.serving.engine import Engine, warm_up

    key = Path(API_KEY_FILE.value).read_text(encoding="utf-8").strip() if API_KEY_FILE.value else None
    if key == "" or (key is None and not app.is_loopback(HOST.value)):
        raise ValueError(f"--host={HOST.value} needs --api_key_file, a file with a key: whoever knows it can use this")
    model = api.load(WORKDIR.value, CHECKPOINT_STEP.value, command.ALLOW_IMPORT.value)
    engine = Engine(model, max_rows=MAX_ROWS.value, max_waiting=MAX_WAITING.value)
    warm_up(engine)
    hosts = ("127.0.0.1", "localhost", "[::1]") if app.is_loopback(HOST.value) else ()
    name = NAME.value or Path(WORKDIR.value.removeprefix("package:")).name
    config = uvicorn.Config(
        app.make_app(engine, name, api_key=key, hosts=hosts), host=HOST.value, port=PORT.value, log_level="warning",
        timeout_graceful_shutdown=DRAIN_S.value,
    )  # fmt: skip
    server = uvicorn.Server(config)
    server.capture_signals = lambda: _signals(server)  # uvicorn's own raise the signal again in the end
    sock = config.bind_socket()
    sock.listen()  # so that whoever reads the line below can connect
    log.info("%s is served at http://%s:%d/", name, HOST.value, sock.getsockname()[1])
    server.run(sockets=[sock])
    engine.close()
    return {"served": server.server_state.total_requests}


@contextlib.contextmanager
def _signals(server):
    """SIGTERM and ^C end the server once its requests have ended; a second ^C at once."""
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, server.handle_exit) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


if __name__ == "__main__":
    command.run(main, FLAGS)
