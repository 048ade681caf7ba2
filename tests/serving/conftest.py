"""A server of the small trained network, in this process."""

import contextlib
import dataclasses
import threading
import time

import numpy as np
import pytest

from diffusion_lm.data.tokenizer import SentencePiece
from diffusion_lm.serving.app import make_app
from diffusion_lm.serving.engine import Engine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chatting(SentencePiece):
    """With a chat template of its own."""

    chat_template = "role: content"  # not annotated, so no field

    def encode_chat(self, messages):
        """Refuses an unknown role, as templates do."""
        if any(m["role"] not in ("system", "user", "assistant") for m in messages):
            raise ValueError("the chat template refuses these messages")
        text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
        return np.concatenate([[self.bos], self.encode(text)]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Served:
    """An engine, the model that it has, and where it is served."""

    engine: Engine
    model: object
    url: str

    def idle(self) -> bool:
        """Waits for a few seconds until nothing waits or runs."""
        end = time.monotonic() + 10
        while self.engine._running and time.monotonic() < end:
            time.sleep(0.02)
        return not self.engine._running and self.engine.load() == {"waiting": 0, "running": 0}


@pytest.fixture(scope="package")
def served(model):
    """The trained network behind a port of this machine."""
    uvicorn = pytest.importorskip("uvicorn", reason="needs the serve extra")
    module = model.network.module  # float32: sums of a batch and of one row round alike
    module = module.clone(exec=dataclasses.replace(module.exec, compute_dtype="float32"))
    network = model.network.replace(module=module)
    model = model._replace(network=network, prepared={}, tokenizer=Chatting(proto=model.tokenizer.proto))
    engine = Engine(model, max_rows=8, max_waiting=4)
    config = uvicorn.Config(make_app(engine, "tiny"), port=0, log_level="warning", timeout_graceful_shutdown=2)
    server, sock = uvicorn.Server(config), config.bind_socket()
    server.capture_signals = contextlib.nullcontext
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    yield Served(engine, model, f"http://127.0.0.1:{sock.getsockname()[1]}")
    server.should_exit = True
    thread.join()
    engine.close()
