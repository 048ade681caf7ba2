"""What a client asks for: an OpenAI request's JSON, checked field by field."""

import dataclasses
import json
import math
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_lm.build import LoadedModel
from diffusion_lm.data.tokenizer import encode_prompt
from diffusion_lm.inference import by_name
from diffusion_lm.inference.pipeline import checked_room, encode_prompts

MAX_ROWS = 64  # texts of one request
_DEFAULT_TOKENS = {"completion": 16, "chat": 256}  # OpenAI's for completions; chats have none there


class RequestError(ValueError):
    """A request that can't be answered as it is.

    status  of HTTP, 4xx
    param   the field at fault
    code    a word for programs
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A request that was understood.

    prompts     the ids of each prompt, begin of text included
    infill      for a prompt with a suffix: (ids, number of missing tokens, ids); None: to continue
    max_tokens  of each text
    sampler     (name, denoising_steps, canvas_length) as `by_name.make_sampler` takes them; draw, arguments of
                `SamplingParams`, and cfg_scale: where not given, the sampler's own
    passes      whether the page's account of every pass is asked for
    """

    chat: bool
    prompts: tuple[np.ndarray, ...]
    infill: tuple[np.ndarray, int, np.ndarray] | None
    max_tokens: int
    n: int
    seed: int
    stop: tuple[str, ...]
    sampler: tuple[str, int | None, int]
    draw: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cfg_scale: float | None = None
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    passes: bool = False


def _integer(least: int, most: int) -> Callable:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise RequestError(f"must be an integer from {least} to {most}")
        return value

    return check


def _number(least: float, most: float) -> Callable:
    def check(value: Any) -> float:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        if not fits or not math.isfinite(value):
            raise RequestError(f"must be a number from {least:g} to {most:g}")
        return float(value)

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError("must be true or false")
    return value


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise RequestError("must be a string")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    texts = isinstance(stops, list) and len(stops) <= 16 and all(isinstance(s, str) and s for s in stops)
    if not texts or any("\ud800" <= character <= "\udfff" for s in stops for character in s):
        raise RequestError("must be a string or a list of up to 16 strings, none of them empty")
    return tuple(stops)


def _stream_options(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) - {"include_usage"}:
        raise RequestError('must be {"include_usage": true or false}')
    return _flag(value.get("include_usage", False))


def _only(*allowed: Any) -> Callable:
    def check(value: Any) -> Any:
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
            raise RequestError(f"is not supported: leave it out, or at {json.dumps(allowed[0])}")
        return value

    return check


_CHECKS: dict[str, Callable] = {
    "model": _string,
    "max_tokens": _integer(1, 2**31 - 1),
    "n": _integer(1, MAX_ROWS),
    "seed": _integer(0, 2**32 - 1),
    "stop": _stop,
    "stream": _flag,
    "stream_options": _stream_options,
    "temperature": _number(0, 100),
    "top_p": _number(1e-6, 1),
    "top_k": _integer(0, 2**31 - 1),
    "min_p": _number(0, 1),
    "cfg_scale": _number(0, 100),
    "sampler": _string,
    "denoising_steps": _integer(1, 100_000),
    "canvas_length": _integer(0, 2**31 - 1),
    "passes": _flag,
    "user": _string,
    "presence_penalty": _only(0),
    "frequency_penalty": _only(0),
    "logit_bias": _only({}),
}
_OF_COMPLETION = {
    "prompt": lambda value: value,
    "suffix": lambda value: value,
    "logprobs": _only(0),
    "echo": _only(False),
    "best_of": _integer(1, MAX_ROWS),
}
_OF_CHAT = {
    "messages": lambda value: value,
    "max_completion_tokens": _integer(1, 2**31 - 1),
    "logprobs": _flag,
    "top_logprobs": _only(0),
    "tools": _only([]),
    "tool_choice": _only("none", "auto"),
    "response_format": _only({"type": "text"}),
}


_OF_TOKENIZE = {"model": _string, "prompt": _string, "add_special_tokens": _flag, "return_token_strs": _flag}


def _fields(body: bytes, known: Mapping[str, Callable], name: str) -> dict[str, Any]:
    """What a body of JSON gives, checked, nulls left out."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RequestError("the body must be a JSON object")
    given = {}
    for key, value in fields.items():
        if key not in known:
            raise RequestError(f"{key[:40]!a} is no field of this request, or not supported: leave it out", param=key)
        if value is not None:
            try:
                given[key] = known[key](value)
            except RequestError as error:
                raise RequestError(f"{key} {error}", param=key) from None
    if given.get("model", name) != name:
        raise RequestError(
            f"there is no model {given['model'][:80]!a} here, but {name!a}", status=404, param="model",
            code="model_not_found",
        )  # fmt: skip
    return given


def read_text(body: bytes, *, name: str, model: LoadedModel) -> np.ndarray:
    """The ids of the text in a request to tokenize: as a prompt, or (add_special_tokens false) as text that follows
    other text. Raises RequestError."""
    given = _fields(body, _OF_TOKENIZE, name)
    text, begins = given.get("prompt", ""), given.get("add_special_tokens", True)
    if begins:
        return _encoded(model, [text], "prompt")[0]
    return _ids(model, text, "prompt") if text else np.zeros(0, np.int32)


def read(body: bytes, *, chat: bool, name: str, model: LoadedModel) -> Ask:
    """The request in a body of JSON, for the model that is served as `name`. Raises RequestError."""
    given = _fields(body, _CHECKS | (_OF_CHAT if chat else _OF_COMPLETION), name)
    prompts = [_messages(model, given.get("messages"))] if chat else _prompts(model, given.get("prompt", ""))
    n = given.get("n", 1)
    if given.get("best_of", n) != n:
        raise RequestError("best_of must be equal to n", param="best_of")
    if n * len(prompts) > MAX_ROWS:
        raise RequestError(f"a request has at most {MAX_ROWS} texts; got {n * len(prompts)}", param="n")
    draw = {key: given[key] for key in ("temperature", "top_p", "top_k", "min_p") if key in given}
    if 0 < draw.get("temperature", 1.0) < 1e-6:
        raise RequestError("temperature must be 0, or at least 1e-6", param="temperature")
    ask = Ask(
        chat=chat,
        prompts=tuple(prompts),
        infill=None,
        max_tokens=_max_tokens(model, prompts, given, chat),
        n=n,
        seed=given.get("seed", secrets.randbits(32)),
        stop=given.get("stop", ()),
        sampler=(given.get("sampler", ""), given.get("denoising_steps"), given.get("canvas_length", 0)),
        draw=draw,
        cfg_scale=given.get("cfg_scale"),
        stream=given.get("stream", False),
        include_usage=given.get("stream_options", False),
        logprobs=given.get("logprobs", False) is not False,
        passes=given.get("passes", False),
    )
    return _with_suffix(model, ask, given["suffix"]) if "suffix" in given else ask


def _prompts(model: LoadedModel, prompt: Any) -> list[np.ndarray]:
    """A string, token ids, or a list of either."""
    ids = isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt)
    prompts = [prompt] if ids or not isinstance(prompt, list) else prompt
    if not 0 < len(prompts) <= MAX_ROWS:
        raise RequestError(f"prompt must be 1 to {MAX_ROWS} texts", param="prompt")
    return _encoded(model, [_ids(model, one, "prompt", begins=True) for one in prompts], "prompt")


def _ids(model: LoadedModel, text: Any, param: str, begins: bool = False) -> Any:
    """The ids of a text that follows another, or the ids that it is; with `begins`, text stays text."""
    if isinstance(text, str):
        try:
            return text if begins else encode_prompt(model.tokenizer, text, follows=True)
        except ValueError as error:
            raise RequestError(_printable(error), param=param) from None
    if not isinstance(text, list) or not text or not all(type(i) is int for i in text):
        raise RequestError(f"{param} must be a string or a list of token ids (or of these)", param=param)
    if not all(0 <= i < model.tokenizer.vocab and i != model.tokenizer.mask for i in text):
        raise RequestError(f"{param}: token ids lie in 0..{model.tokenizer.vocab - 1}", param=param)
    return np.array(text, np.int32)


def _printable(error: Exception) -> str:
    return str(error).encode(errors="replace").decode()


def _messages(model: LoadedModel, messages: Any) -> np.ndarray:
    if not isinstance(messages, list) or not messages:
        raise RequestError("messages must be a list of at least one message", param="messages")
    if not hasattr(model.tokenizer, "encode_chat"):
        raise RequestError("this model has no chat template: use /v1/completions", param="messages")
    plain = []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and all(
            isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
        ):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise RequestError("a message is an object with a role and a content of text", param="messages")
        if more := set(message) - {"role", "content", "name"}:
            raise RequestError(f"a message's {min(more)[:40]!a} is not supported: leave it out", param="messages")
        try:
            (content + message["role"]).encode()
        except UnicodeEncodeError:
            raise RequestError("a message is not valid Unicode", param="messages") from None
        plain.append({"role": message["role"], "content": content})
    try:
        ids = model.tokenizer.encode_chat(plain)
    except ValueError as error:
        raise RequestError(str(error), param="messages") from None
    return _encoded(model, [ids], "messages")[0]


def _encoded(model: LoadedModel, prompts: list, param: str) -> list[np.ndarray]:
    try:
        return encode_prompts(model, prompts)
    except ValueError as error:
        code = "context_length_exceeded" if "context" in str(error) else None
        raise RequestError(_printable(error), param=param, code=code) from None


def _max_tokens(model: LoadedModel, prompts: list[np.ndarray], given: dict, chat: bool) -> int:
    """What is asked for; else the default, or what the context leaves."""
    asked = given.get("max_completion_tokens", given.get("max_tokens"))
    room = model.config.data.seq_len - max(map(len, prompts))
    if asked is None:
        return max(1, min(room, _DEFAULT_TOKENS["chat" if chat else "completion"]))
    try:
        checked_room(model, prompts, asked)
    except ValueError:
        message = f"max_tokens={asked} and a prompt of {model.config.data.seq_len - room} tokens don't fit the model's "
        limit = f"context of {model.config.data.seq_len}: at most {room} are left"
        raise RequestError(message + limit, param="max_tokens", code="context_length_exceeded") from None
    return asked


def _with_suffix(model: LoadedModel, ask: Ask, suffix: Any) -> Ask:
    """The request to fill in max_tokens tokens between the prompt and the suffix."""
    if ask.n > 1 or len(ask.prompts) > 1 or ask.stop:
        raise RequestError("suffix goes with one prompt, without n and stop", param="suffix")
    after = _ids(model, suffix, "suffix") if suffix not in ("", []) else np.zeros(0, np.int32)
    return dataclasses.replace(ask, infill=(ask.prompts[0], ask.max_tokens, after))


def known_samplers(model: LoadedModel) -> list[str]:
    """The names of samplers that the model can do, the one that fits it first."""

    def fits(name: str | None) -> bool:
        try:
            return bool(by_name.make_sampler(model, name))
        except ValueError:
            return False

    layout, trains_ar = model.config.objective.layout, model.config.objective.trains_ar
    names = [n for n in (by_name.PUBLISHED, *by_name.SAMPLERS) if n not in ("speculative", "auto") and fits(n)]
    names += ["speculative"] * trains_ar  # these two measure when they are made
    names += ["auto"] * ("confidence" in names and trains_ar and layout.align == 1)
    first = by_name.default_name(model, own=False)  # a published one is named, as it has settings of its own
    return sorted(names, key=lambda name: name != first)
