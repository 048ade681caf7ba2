"""A model's own texts as a file of records to train on: thousands of rows, written as they are generated, resumable."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion_lm import files, lock
from diffusion_lm.build import LoadedModel
from diffusion_lm.data import corpora
from diffusion_lm.inference import pipeline
from diffusion_lm.progress import Progress
from diffusion_lm.samplers.base import TextSampler

log = logging.getLogger(__name__)


class Asked(NamedTuple):
    """What a row continues: a plain text, or a chat's messages that the assistant answers."""

    prompt: str = ""
    messages: list[dict[str, Any]] | None = None
    tools: list | None = None

    def record(self, text: str, finished: bool) -> dict[str, Any]:
        """The row as `data.prompt_response.PromptResponse` reads it."""
        if self.messages is None:
            return {"prompt": self.prompt, "completion": text, "finished": finished}
        tools = {} if self.tools is None else {"tools": self.tools}
        return {"messages": [*self.messages, {"role": "assistant", "content": text}], **tools, "finished": finished}


class Shard(NamedTuple):
    """A part of the rows, for a process of its own: consecutive ones, so that all files in order are the whole."""

    index: int = 0
    count: int = 1

    def path(self, path: Path) -> Path:
        """corpus.jsonl -> corpus-00002-of-00008.jsonl; as it is where there is one part."""
        return path if self.count == 1 else path.with_stem(f"{path.stem}-{self.index:05d}-of-{self.count:05d}")

    def rows(self, number: int) -> range:
        """Which of so many rows it has."""
        return range(number * self.index // self.count, number * (self.index + 1) // self.count)


class Written(NamedTuple):
    """rows in the file, those written by this call, their tokens and forward passes, and how many didn't end."""

    rows: int
    new: int
    tokens: int
    nfe: int
    unfinished: int


def read_prompts(path: str) -> list[Asked]:
    """Prompts from a file: of JSON records their `prompt`, or their `messages` without the last answer; else each line.

    Raises FileNotFoundError or ValueError with one line.
    """

    def take(record: Any, where: str) -> str:
        messages = record.get("messages") if isinstance(record, dict) else None
        if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
            messages = messages[:-1] if messages[-1].get("role") == "assistant" else messages
            return json.dumps({"messages": messages, "tools": record.get("tools")})
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(f"{where}: there is neither a prompt nor a list of messages")
        return json.dumps({"prompt": record["prompt"]})

    if any(part in (".jsonl", ".ndjson", ".json") for part in Path(path).suffixes):
        return [Asked(**json.loads(text)) for text in corpora.records(path, take, reading="prompts").documents()]
    return [Asked(prompt=line) for line in corpora.corpus(path, documents="line").documents()]


def encode(model: LoadedModel, asked: Sequence[Asked]) -> list[np.ndarray]:
    """The ids of each. Raises ValueError where the model has no chat template for messages, or a text has no token."""
    chats = any(one.messages is not None for one in asked)
    if chats and not hasattr(model.tokenizer, "encode_chat"):
        raise ValueError("chats are for converted models with a chat template; this one was trained on plain text")
    ids = []
    for number, one in enumerate(asked, 1):
        tools = {} if one.tools is None else {"tools": one.tools}
        try:
            prompt = one.prompt if one.messages is None else model.tokenizer.encode_chat(one.messages, **tools)
            ids += pipeline.encode_prompts(model, [prompt])
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None
    return ids


def write_corpus(
    model: LoadedModel,
    sampler: TextSampler,
    asked: Sequence[Asked],
    path: Path,
    *,
    settings: dict[str, Any],
    batch_size: int,
    max_new_tokens: int,
    cut: Callable[[str], str] = lambda text: text,
    shard: Shard = Shard(),  # noqa: B008 (immutable)
    **options: Any,
) -> Written:
    """Writes a record for each of `asked`, in order, batch by batch; continues a file that was begun.

    Row i draws from key i of the seed, so that a row doesn't depend on where a run was stopped, or on who writes the
    others. A kill loses the batch that was being generated, and nothing that is in the file.

    Args:
      model, sampler: what generates.
      asked: the rows.
      path: of the file; beside it NAME.settings.json says what it was begun with.
      settings: all that decides what the rows are, as JSON values; must be the same to continue.
      batch_size: rows generated together.
      max_new_tokens: tokens a row, at most.
      cut: what is kept of a text: where it takes something away, the text is finished.
      shard: the part of `asked` that is written, to a file named after it.
      options: see `pipeline.generate`.

    Raises:
      ValueError: if the file was begun with other settings, or for what the model's context can't hold.
      InUseError: if another process writes it.
    """
    first_row, path = shard.rows(len(asked)).start, shard.path(path)
    asked = [asked[i] for i in shard.rows(len(asked))]
    ids = encode(model, asked)
    content = "".join(json.dumps(one) for one in asked)
    settings = settings if shard.count == 1 else {**settings, "shard": shard}
    settings = {**settings, "max_new_tokens": max_new_tokens, "prompts": hashlib.sha256(content.encode()).hexdigest()}
    with lock.hold(path.with_suffix(".lock")):
        done = _continue(path, json.loads(json.dumps(settings)))
        if done > len(asked):
            raise ValueError(
                f"{path} has {done} rows, more than the {len(asked)} that are asked for: name another --out"
            )
        if done:
            log.info("%s has %d of %d rows: continuing", path, done, len(asked))
        first, progress = time.monotonic(), Progress()
        tokens = nfe = unfinished = 0
        with files.named(path), path.open("ab") as file:
            for start in range(done, len(asked), batch_size):
                rows = ids[start : start + batch_size]
                count = len(rows)
                rows += rows[-1:] * (batch_size - count)  # one program for all batches
                output = pipeline.generate(
                    model, sampler, rows, max_new_tokens=max_new_tokens, first_row=first_row + start, **options
                )
                lengths = np.asarray(output.generation.length)[:count]
                ended = np.isin(output.generation.tokens, model.tokenizer.stops).any(axis=1)[:count]
                lines = []
                for i in range(count):
                    text = cut(output.texts[i])
                    finished = bool(lengths[i] < max_new_tokens or ended[i] or text != output.texts[i])
                    unfinished += not finished
                    lines.append(json.dumps(asked[start + i].record(text, finished), ensure_ascii=False) + "\n")
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
                tokens, nfe = tokens + int(lengths.sum()), nfe + int(output.generation.nfe)
                if progress.due() or start + count == len(asked):
                    taken = time.monotonic() - first
                    left = (len(asked) - start - count) * taken / (start + count - done)
                    message = "%d of %d rows, %.0f tokens/s, %.0f s left"
                    log.info(message, start + count, len(asked), tokens / taken, left)
    return Written(len(asked), len(asked) - done, tokens, nfe, unfinished)


def _continue(path: Path, settings: dict[str, Any]) -> int:
    """How many whole rows the file has. Takes off a last line that was cut short; writes the settings of a new file."""
    beside = path.with_suffix(".settings.json")
    if not path.exists():
        partial = beside.with_suffix(".tmp")
        with files.named(beside):
            partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
            partial.replace(beside)
        path.touch()
        return 0
    if not beside.exists():
        raise ValueError(f"{path} is there, and no {beside.name} says what it was begun with: name another --out")
    begun = json.loads(beside.read_text(encoding="utf-8"))
    if differing := sorted(key for key in begun.keys() | settings.keys() if begun.get(key) != settings.get(key)):
        raise ValueError(f"{path} was begun with another {', '.join(differing)}: set them back, or name another --out")
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    os.truncate(path, whole)
    return content.count(b"\n")
