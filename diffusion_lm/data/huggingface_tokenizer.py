"""Tokenizers of Hugging Face models: tokenizer.json by the `tokenizers` library, special tokens, chat templates."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffusion_lm.data.chat import Rendered, answered_turns, render

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class HuggingFaceTokenizer:
    """A `data.tokenizer.Tokenizer` of ids 0..vocab-1.

    tokenizer_json  the file's bytes
    settings_json   tokenizer_config.json's bytes: special tokens, the chat template
    vocab           V: ids that have logits, at least as many as the tokenizer has
    mask, bos, eos  ids; the mask may lie among the tokens or behind them
    unknown         the id of text without a token; -1: none, as in byte-level tokenizers
    suppressed      ids that no sampler may emit
    stops           ids that end an answer, the end of text and the end of a turn
    adds_bos        whether a text begins with bos
    """

    tokenizer_json: bytes = field(repr=False)
    settings_json: bytes = field(default=b"{}", repr=False)
    vocab: int
    mask: int
    bos: int
    eos: int
    unknown: int = -1
    suppressed: tuple[int, ...] = ()
    stops: tuple[int, ...] = ()
    adds_bos: bool = False

    def __post_init__(self):
        known = self._plain.get_vocab_size(with_added_tokens=True)
        if known > self.vocab:
            raise ValueError(f"the tokenizer has {known} tokens, the network {self.vocab}: they don't belong together")

    @classmethod
    def from_files(
        cls,
        files: Mapping[str, bytes],
        *,
        vocab: int,
        mask: int,
        eos: int | Sequence[int],
        bos: int | None = None,
        suppressed: Sequence[int] = (),
    ) -> "HuggingFaceTokenizer":
        """The tokenizer of a folder's files, for a network of so many ids.

        eos: config.json's or generation_config.json's eos_token_id; the first ends a text, all end an answer.
        suppressed: further ids that are no text. Raises ValueError with one line where the files can't be read.
        """
        if "tokenizer.json" not in files:
            raise ValueError("there is no tokenizer.json: save the tokenizer with the tokenizers library")
        settings = _settings(files)
        ends = (eos,) if isinstance(eos, int) else tuple(eos)
        probe = cls(tokenizer_json=files["tokenizer.json"], vocab=vocab, mask=mask, bos=ends[0], eos=ends[0])
        ids = {name: probe.id_of(token) for name in _SPECIAL if (token := _text(settings.get(name)))}
        bos = next((i for i in (bos, ids.get("bos_token"), ends[0]) if i is not None), ends[0])
        for name, token in (("bos_token_id", bos), *(("eos_token_id", end) for end in ends)):
            if not 0 <= token < vocab:
                raise ValueError(f"{name}={token} is no id of the network's {vocab}: set it right in config.json")
        pads = tuple(i for name in ("pad_token", "bos_token") if (i := ids.get(name)) is not None and i not in ends)
        return cls(
            tokenizer_json=files["tokenizer.json"],
            settings_json=json.dumps(settings).encode(),
            vocab=vocab,
            mask=mask,
            bos=bos,
            eos=ends[0],
            unknown=-1 if probe.byte_level or ids.get("unk_token") is None else ids["unk_token"],
            suppressed=tuple(dict.fromkeys([*pads, *suppressed])),
            stops=tuple(dict.fromkeys([*ends, *([ids["eos_token"]] if ids.get("eos_token") is not None else [])])),
            adds_bos=probe.adds(bos) or bool(settings.get("add_bos_token")),
        )

    @functools.cached_property
    def _plain(self) -> Any:
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ImportError(
                "this model's tokenizer needs the tokenizers package: pip install -e '.[open]'"
            ) from error
        try:
            found = Tokenizer.from_str(self.tokenizer_json.decode())
        except Exception as error:  # the library raises plain Exceptions
            raise ValueError(f"tokenizer.json can't be read: {' '.join(str(error).split())[:200]}") from None
        found.no_truncation()
        found.no_padding()
        return found

    @functools.cached_property
    def _literal(self) -> Any:
        """The same, to which the texts of special tokens are plain text."""
        from tokenizers import Tokenizer

        found = Tokenizer.from_str(self._plain.to_str())
        found.encode_special_tokens = True
        return found

    @functools.cached_property
    def byte_level(self) -> bool:
        """Whether every byte has a token, so that no text is unknown."""
        content = json.loads(self.tokenizer_json)
        return "ByteLevel" in json.dumps([content.get("pre_tokenizer"), content.get("decoder")]) or bool(
            content.get("model", {}).get("byte_fallback")
        )

    def adds(self, token: int) -> bool:
        """Whether the tokenizer puts this id before a text."""
        first, plain = (self._plain.encode("a", add_special_tokens=added).ids[:1] for added in (True, False))
        return first == [token] and first != plain

    def id_of(self, token: str) -> int | None:
        """The id of a token's text, or None."""
        return self._plain.token_to_id(token)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes whenever the mapping does."""
        return hashlib.sha256(self.tokenizer_json + repr((self.vocab, self.mask, self.bos)).encode()).hexdigest()[:16]

    def encode(self, text: str) -> np.ndarray:
        """int32 [n], without begin or end of text. The text of a special token is that token, as on the hub."""
        return np.asarray(self._plain.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_literally(self, text: str) -> np.ndarray:
        """int32 [n]: as `encode`, but the text of a special token is text: what a user of a chat says."""
        return np.asarray(self._literal.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids) -> str:
        """The text of [n] ids. Special tokens give none. Raises ValueError for an id that is no token."""
        ids = np.asarray(ids, np.int64).reshape(-1)
        if ids.size and not (ids.min() >= 0 and ids.max() < max(self.vocab, self.mask + 1)):
            raise ValueError(f"ids must lie in 0..{self.vocab - 1}, not {ids.min()}..{ids.max()}")
        return self._plain.decode(ids[ids != self.mask].tolist(), skip_special_tokens=True)

    def pieces(self, ids) -> list[str]:
        """What each id looks like on a screen."""
        shown = []
        for i in np.asarray(ids).reshape(-1).tolist():
            token = "░" if i == self.mask else self._plain.id_to_token(i)
            alone = self._plain.decode([i], skip_special_tokens=False) if token is not None else ""
            shown.append(alone if alone and "\ufffd" not in alone else token or f"<{i}>")
        return shown

    @functools.cached_property
    def chat_template(self) -> str:
        """The template, "" where the model has none."""
        found = json.loads(self.settings_json).get("chat_template") or ""
        if isinstance(found, list):  # several, by name
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), "")
        return found

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> np.ndarray:
        """The ids that ask the model to answer the last message, int32 [n]. See `data.chat.render`.

        Raises ValueError where the model has no template, or it refuses the messages.
        """
        return self._encode_rendered(self.render_chat(messages, **variables))

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> Rendered:
        """What `encode_chat` encodes."""
        return render(self._template, messages, **self._rendering | variables)

    def encode_turns(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[tuple[np.ndarray, ...]]:
        """For each message of the assistant the ids before it, those of the answer up to its end of turn, and those
        that the template puts behind it; each int32 [n]. See `data.chat.answered_turns`.

        An answer that the template ends with none of `stops` ends with eos. Raises ValueError as `encode_chat`.
        """
        turns = []
        for asked, answer in answered_turns(self._template, messages, **self._rendering | variables):
            ids = self._encode_rendered(answer)
            ends = np.flatnonzero(np.isin(ids, self.stops))
            ids, end = (ids, ends[0] + 1) if len(ends) else (np.append(ids, np.int32(self.eos)), len(ids) + 1)
            turns.append((self._encode_rendered(asked), ids[:end], ids[end:]))
        return turns

    def _encode_rendered(self, rendered: Rendered) -> np.ndarray:
        ids = [self.encode(text) if meant else self.encode_literally(text) for text, meant in rendered.parts]
        return np.concatenate(ids) if ids else np.zeros(0, np.int32)

    @property
    def _template(self) -> str:
        if not self.chat_template:
            raise ValueError("this model has no chat template: give it a plain prompt")
        return self.chat_template

    @functools.cached_property
    def _rendering(self) -> dict[str, Any]:
        """What `chat.render` is given of this tokenizer."""
        settings = json.loads(self.settings_json)
        named = {name: _text(settings.get(name)) for name in _SPECIAL}
        added = self._plain.get_added_tokens_decoder().values()
        control = [token.content for token in added if token.special]
        return {"control_tokens": control, **{name: token for name, token in named.items() if token}}


def _settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    """tokenizer_config.json, with special_tokens_map.json and chat_template.jinja, which newer folders keep apart."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in files:
            try:
                found |= json.loads(files[name])
            except (ValueError, TypeError) as error:
                raise ValueError(f"{name} is no JSON object ({error}): fetch it again") from None
    if "chat_template.jinja" in files:
        found["chat_template"] = files["chat_template.jinja"].decode()
    return found


def _text(token: Any) -> str:
    """A token as tokenizer_config.json has it: a string, or an object with its content."""
    return token.get("content", "") if isinstance(token, Mapping) else token or ""
