"""Supervised fine-tuning data: JSON records of a prompt and its completion, or of a chat's messages.

The answers are targets. All else, a user's and a tool's words and the chat template's own text, is context: it is never
noised and has no loss.
"""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging

from diffusion_lm.data import corpora, loader
from diffusion_lm.data.corpora import Corpus
from diffusion_lm.data.packing import Example, groups, pack, place
from diffusion_lm.data.source import check_tokenizer
from diffusion_lm.data.tokenizer import (
    Tokenizer,
    decode_continuation,
    encode_continuation,
    first_difference,
    lossless,
    with_bos,
)
from diffusion_lm.layouts import Layout
from diffusion_lm.types import Batch

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class PromptResponse:
    """Records of prompts and answers as the `data` of a config (see `data.source.DataSource`).

    A record is {"prompt": text, "completion": text}, or {"messages": [{"role": ..., "content": ...}, ...]} with roles
    system, user, assistant and tool, which may have "tools" beside it. The assistant's messages are the answers.
    Records that a model wrote (`inference.corpus`) have "finished": where it is false the last answer was cut off, and
    no end is learned after it; where it is true that answer may be empty. Other keys are not read.

    path          files of one JSON object a line (.jsonl, also compressed), or .json lists: a file, a folder or a glob
    chat          whether a prompt is a user's turn and its completion the assistant's, by the model's chat template, as
                  messages always are; else they are text as it stands
    seq_len       positions of a row, at least 2: longer answers are cut, and the log says how many
    val_fraction  the share of records that is held out, in [0, 1), chosen by a hash
    tokenizer     a SentencePiece .model file, or a Tokenizer; none: that of the model that training begins from
    vocab_size    ids of the tokenizer, at most, where only shapes are planned (`launch.compile`)
    """

    path: str
    chat: bool = False
    seq_len: int = 512
    val_fraction: float = 0.1
    tokenizer: str | Tokenizer | None = None
    vocab_size: int = 0

    def __post_init__(self):
        if self.seq_len < 2:
            raise ValueError(f"data.seq_len must be at least 2; got {self.seq_len}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction must lie in [0, 1); got {self.val_fraction}")

    def corpus(self) -> Corpus:
        """The records as JSON texts. Raises FileNotFoundError or ValueError if there are none."""
        return corpora.records(self.path, _checked, reading="prompts and responses")

    def open(
        self, layout: Layout, *, tokenizer: Tokenizer | None = None, fingerprint: str | None = None
    ) -> "TokenizedRecords":
        """See `DataSource`. Raises ValueError, too, where there is no tokenizer, or no template for chats."""
        tokenizer = check_tokenizer(self.tokenizer, tokenizer)
        if tokenizer is None:
            raise ValueError("data.tokenizer is not set: name a .model file, or begin from a trained model")
        corpus = self.corpus()
        found = corpus.fingerprint()
        if fingerprint not in (None, found):
            raise ValueError(f"data.path={self.path} is not what the checkpoint was trained on; use a new workdir")
        return TokenizedRecords(data=self, corpus=corpus, tokenizer=tokenizer, fingerprint=found, layout=layout)


def _checked(record: Any, where: str) -> str:
    """What is read of a record, as JSON. Raises ValueError with one line."""
    if not isinstance(record, dict) or not ("messages" in record or record.keys() >= {"prompt", "completion"}):
        has = ", ".join(map(repr, record)) if isinstance(record, dict) else "no keys"
        raise ValueError(f"{where}: a record has messages, or a prompt and its completion; this one has {has}")
    finished = record.get("finished", True)
    if not isinstance(finished, bool):
        raise ValueError(f"{where}: finished is true or false, not {finished!r:.40}")
    if "messages" in record:
        _check_messages(record["messages"], where, ends_at_once="finished" in record)
        kept = {"messages": record["messages"], **({"tools": record["tools"]} if record.get("tools") else {})}
    else:
        kept = {key: record[key] for key in ("prompt", "completion")}
        for key, text in kept.items():
            if not isinstance(text, str):
                raise ValueError(f"{where}: {key} is {type(text).__name__}, not text")
        if not kept["completion"].strip() and "finished" not in record:
            raise ValueError(f"{where}: the completion is empty: there is nothing to learn from it, leave it out")
    if re.search("[\ud800-\udfff]", json.dumps(kept, ensure_ascii=False)):
        raise ValueError(f"{where}: half a surrogate pair, which is no character: remove it")
    return json.dumps(kept if finished else {**kept, "finished": False})


def _check_messages(messages: Any, where: str, *, ends_at_once: bool) -> None:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{where}: messages is a list of objects with role and content")
    asked = False
    for number, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        here = f"{where}, message {number}"
        if role not in ROLES:
            raise ValueError(f"{here}: role {role!r:.40} is none of {', '.join(ROLES)}")
        calls = role == "assistant" and message.get("tool_calls")
        if not isinstance(content, str) and not (calls and content is None):
            raise ValueError(f"{here}: content is {type(content).__name__}, not text")
        if role == "assistant" and not asked:
            raise ValueError(f"{here}: the assistant answers nothing: begin with a user's message")
        may_be_empty = calls or (ends_at_once and number == len(messages))
        if role == "assistant" and not may_be_empty and not content.strip():
            raise ValueError(f"{here}: the answer is empty: there is nothing to learn from it, leave the record out")
        asked = asked or role in ("user", "tool")
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the last message isn't the assistant's: nothing answers it, take it out")


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedExamples:
    """Examples, and which of them share a row.

    examples    those of which an answer has room in a row
    rows        numbers of the examples of each row
    targets     tokens of answers, their ends included
    characters, bytes   of the text that the answers spell (bytes in UTF-8)
    """

    examples: list[Example]
    rows: list[list[int]]
    targets: int
    characters: int
    bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedRecords:
    """Records as tokens (see `data.source.TokenizedData`). Each part is tokenised when it is first asked for.

    Where an objective denoises, a chat with several answers is one example for each, which ends with it (as LLaDA
    trains them, arXiv 2502.09992, appendix B): the canvas of an answer must not see what came after it.
    """

    data: PromptResponse
    corpus: Corpus
    tokenizer: Tokenizer
    fingerprint: str
    layout: Layout

    @functools.cached_property
    def parts(self) -> tuple[Corpus, Corpus]:
        """The records to train on, and those held out. Raises ValueError if there is only one."""
        if self.data.val_fraction and len(list(itertools.islice(self.corpus.documents(), 2))) < 2:
            raise ValueError(f"{self.data.path} has one record, and none can be held out: set data.val_fraction=0")
        return corpora.split(self.corpus, self.data.val_fraction)

    @functools.cached_property
    def valid(self) -> PackedExamples | None:
        """The held-out part in rows of data.seq_len; None if data.val_fraction is 0."""
        return self.packed(self.parts[1], self.data.seq_len, "held-out") if self.data.val_fraction else None

    def packed(self, part: Corpus, length: int, name: str) -> PackedExamples:
        """A part in rows of `length` positions. Logs once what is cut, left out or lost.

        Raises ValueError if nothing fits.
        """
        found, number, cut, left_out, lost, stops = [], 0, 0, 0, 0, self.tokenizer.stops
        changed = []
        for number, record in enumerate(part.documents(), 1):  # noqa: B007
            changed += self._changed(record)
            for example in self.examples(record):
                placed = place(example, self.layout, length, stops)
                if placed is None:
                    left_out += 1
                    continue
                cut += example.tokens[-1] in stops and placed.example.tokens[-1] not in stops
                lost += int(np.sum(placed.example.tokens == self.tokenizer.unknown))
                found.append(placed)
        if not found:
            raise ValueError(f"no answer of the {number} {name} records fits into data.seq_len={length}: set it higher")
        sizes = [placed.end for placed in found]
        examples = [placed.example for placed in found]
        answers = [example.tokens[example.targets] for example in examples]
        texts = [self._answer(example) for example in examples]
        # In an order of their own: the largest examples lie in the first rows.
        rows = groups(sizes, self.layout, length)
        rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
        targets = sum(map(len, answers))
        logging.info(
            "%s part: %d records, %d examples in %d rows of %d, %.0f %% of the positions used, %d target tokens",
            *(name, number, len(examples), len(rows), length, 100 * sum(sizes) / (len(rows) * length), targets),
        )
        if cut or left_out:
            message = "%s part: data.seq_len=%d cuts %d answers, and leaves out %d whose prompts fill the row"
            logging.warning(message, name, length, cut, left_out)
        if lost:
            logging.warning("%s part: text without a token is lost at %d places", name, lost)
        if changed:
            message = "%s part: the tokenizer changes %d prompts and completions (such as %r to %r)"
            logging.warning(message, name, len(changed), *changed[0])
        counts = {"characters": sum(map(len, texts)), "bytes": sum(len(text.encode()) for text in texts)}
        return PackedExamples(examples=examples, rows=rows, targets=targets, **counts)

    def _answer(self, example: Example) -> str:
        """The text that the targets spell."""
        tokenizer, new = self.tokenizer, example.tokens[example.targets]
        before = () if lossless(tokenizer) else example.tokens[: example.targets.argmax()]
        return decode_continuation(tokenizer, before, new[new != tokenizer.unknown])

    def _changed(self, record: str) -> list[tuple[str, str]]:
        """Where a prompt or a completion isn't what its tokens spell: the first stretches that differ. Chats, which a
        template renders, aren't compared."""
        if lossless(self.tokenizer) or self.data.chat or "messages" in (content := json.loads(record)):
            return []
        (prompt, answer, _), unknown = self._turns(content)[0], self.tokenizer.unknown
        both = (content["prompt"], (), prompt), (content["completion"], prompt, answer)
        read = [(text, decode_continuation(self.tokenizer, at, ids[ids != unknown])) for text, at, ids in both]
        return [first_difference(text, left) for text, left in read if text != left]

    def examples(self, record: str) -> list[Example]:
        """The examples of a record, a JSON text. Raises ValueError with one line where the template refuses it."""
        content = json.loads(record)
        try:
            turns = self._turns(content)
        except ValueError as error:
            raise ValueError(f"{self.data.path}: {error}; the record is {record[:80]}") from None
        if not content.get("finished", True):
            context, answer, _ = turns[-1]
            turns[-1] = (context, answer[:-1], answer[:0])
        found, seen = [], np.zeros(0, np.int32)
        for context, answer, behind in turns:
            targets = np.zeros(len(context), bool)
            if found and not self.layout.denoises and np.array_equal(context[: len(seen)], seen):
                before = found.pop().targets  # one causal row learns all of a chat's answers
                targets[: len(before)] = before
            found.append(Example(np.concatenate([context, answer]), np.append(targets, np.ones(len(answer), bool))))
            seen = np.concatenate([context, answer, behind])
        return found

    def _turns(self, content: dict) -> list[tuple[np.ndarray, ...]]:
        """Ids of each answer's context, of the answer with its end, and of what the template puts behind it."""
        tokenizer = self.tokenizer
        if "messages" not in content and not self.data.chat:
            encode = functools.partial(encode_continuation, tokenizer) if content["prompt"] else tokenizer.encode
            prompt = with_bos(tokenizer, tokenizer.encode(content["prompt"]))
            answer = np.append(encode(content["completion"]), tokenizer.eos)
            return [(prompt, answer.astype(np.int32), answer[:0])]
        if not hasattr(tokenizer, "encode_turns"):
            raise ValueError("chats need a model with a chat template: train on prompts and completions")
        asked = [{"role": "user", "content": content.get("prompt")}]
        answered = [{"role": "assistant", "content": content.get("completion")}]
        tools = {"tools": content["tools"]} if "tools" in content else {}
        return tokenizer.encode_turns(content.get("messages") or asked + answered, **tools)

    def train_batches(
        self, *, length: int, batch: int, seed: int, mine: Sequence[int] | None = None
    ) -> Iterator[Batch]:
        """See `loader.shuffled_batches`: each epoch takes every row once."""
        part = self.packed(self.parts[0], length, "train")
        make = functools.partial(self._batch, part, length)
        return loader.shuffled_batches(part.rows, make, batch=batch, seed=seed, mine=mine)

    def valid_batches(self, *, length: int, batch: int) -> Iterator[Batch]:
        """NumPy Batches [batch, length] of the held-out examples; empty rows fill the last."""
        if self.valid is None:
            return
        part = self.valid if length == self.data.seq_len else self.packed(self.parts[1], length, "held-out")
        for first in range(0, len(part.rows), batch):
            some = part.rows[first : first + batch]
            yield self._batch(part, length, some + [[]] * (batch - len(some)))

    def _batch(self, part: PackedExamples, length: int, rows: Sequence[Sequence[int]]) -> Batch:
        return pack(self.layout, [[part.examples[i] for i in row] for row in rows], length, self.tokenizer)
