"""Text as it is written: rows that are generated together, pass by pass, and the text of each as it grows."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.build import LoadedModel
from diffusion_lm.data.tokenizer import Tokenizer, decode_continuation
from diffusion_lm.inference import runner
from diffusion_lm.inference.pipeline import Request, checked_room, encode_prompts, row_keys
from diffusion_lm.inference.runner import Snapshot
from diffusion_lm.samplers.base import TextSampler
from diffusion_lm.samplers.sampling_params import RowSampling

_CONTEXT = 16  # tokens before the new ones that decide how these are decoded
_HALF = "\ufffd"  # what the first bytes of a character decode to


class Rows:
    """Rows of one request's kind that are generated together. Iterating gives a `Snapshot` a pass; its rows from
    len(ids) on mean nothing: batches have 1, 2, 4, 8, ... rows, each a program of its own. A row's products have the
    type that they have where it is alone.

    request         the model, the sampler and their options
    ids             each row's prompt
    keys            [B], a random key a row
    max_new_tokens  tokens a row, at most
    sampling        of each row, in place of the sampler's own
    suffix          int32 [B, max_new_tokens], and num_new_tokens int32 [B]: to infill, see `encode_infill`
    """

    def __init__(
        self,
        request: Request,
        ids: Sequence[np.ndarray],
        keys: Any,
        *,
        max_new_tokens: int,
        suffix: np.ndarray | None = None,
        num_new_tokens: np.ndarray | None = None,
        sampling: RowSampling | None = None,
    ):
        number = np.arange(1 << (len(ids) - 1).bit_length())
        copies = np.where(number < len(ids), number, 0)
        suffix, num_new_tokens = (None if a is None else a[copies] for a in (suffix, num_new_tokens))
        self._wanted = number < len(ids)
        padded = [ids[i] for i in copies]
        sampler, network, prompt = request.prepared(padded, max_new_tokens, suffix, num_new_tokens, rows=1)
        self._passes = runner.snapshots(
            sampler, network, prompt, jnp.take(keys, copies, axis=0), max_new_tokens=max_new_tokens,
            wanted=self._wanted, sampling=jax.tree.map(lambda a: jnp.take(a, copies), sampling),
        )  # fmt: skip

    def __iter__(self) -> Iterator[Snapshot]:
        return self._passes

    def leave(self, row: int) -> None:
        """Finishes a row: at its next token, or after the canvas at hand. Without rows, iteration ends at once."""
        self._wanted[row] = False


class Answer:
    """One row's text as it grows: whole characters only, and nothing that may turn out to begin a stop string.

    text           so far; what `update` returned joins to it
    ids            int32 [n], its tokens, without the one that ended it
    finish_reason  None while it grows; then "stop" (an end of text or turn, or a stop string) or "length"
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, max_tokens: int, stop: Sequence[str] = ()):
        self.text, self.ids, self.finish_reason = "", np.zeros(0, np.int32), None
        self._tokenizer, self._prompt, self._max_tokens, self._stop = tokenizer, prompt, max_tokens, tuple(stop)
        self._decoded, self._shown, self._held = 0, 0, ""

    def update(self, tokens: np.ndarray, finished: bool) -> str:
        """The text that is new, with all final tokens of the row [n]. Raises ValueError where the network failed."""
        if (tokens < 0).any():  # categorical.INVALID
            raise ValueError("the network's logits were not finite: check its parameters, or compute in float32")
        ends = np.flatnonzero(np.isin(tokens, self._tokenizer.stops))
        self.ids = tokens[: min([*ends[:1], self._max_tokens])]
        reason: Literal["stop", "length"] | None = None
        if len(self.ids) == self._max_tokens:
            reason = "length"
        elif len(ends) or finished:
            reason = "stop"
        self._held += self._decode(last=reason is not None)
        piece, stopped = self._released(last=reason is not None)
        self.text, self.finish_reason = self.text + piece, "stop" if stopped else reason
        return piece

    def _decode(self, last: bool) -> str:
        """The text of tokens that are new, without the first bytes of a character."""
        before, width = np.concatenate([self._prompt, self.ids[: self._decoded]]), _CONTEXT
        # Where nothing but spaces came before, some tokenizers drop those that follow as well.
        while width < len(before) and not self._tokenizer.decode(before[-width:]).strip():
            width *= 2
        before = before[-width:]
        text = decode_continuation(self._tokenizer, before, self.ids[self._decoded :])
        whole = text if last else text.rstrip(_HALF)
        new = whole[self._shown :]
        self._decoded, self._shown = (len(self.ids), 0) if whole == text else (self._decoded, len(whole))
        return new

    def _released(self, last: bool) -> tuple[str, bool]:
        """What is held and can be shown, and whether a stop string follows it."""
        held, found = self._held, min((at for s in self._stop if (at := self._held.find(s)) >= 0), default=None)
        end = len(held) if found is None else found
        if not last:  # an earlier place may still become a stop string
            begins = (at for at in range(end) if any(s.startswith(held[at:]) for s in self._stop))
            end, found = next(((at, None) for at in begins), (end, found))
        self._held = held[end:]
        return held[:end], found is not None


def stream(
    model: LoadedModel,
    sampler: TextSampler,
    prompt: str | np.ndarray,
    *,
    max_new_tokens: int,
    seed: int,
    stop: Sequence[str] = (),
    **options,
) -> Iterator[tuple[str, Snapshot]]:
    """Generates text after one prompt: after each pass, the text that is new ("" for most passes over a canvas) and
    what is written (row 0). options: those of `Request`. The text is that of `pipeline.generate`, up to a stop string.

    Raises ValueError as `pipeline.generate` does.
    """
    ids = encode_prompts(model, [prompt])
    checked_room(model, ids, max_new_tokens)
    request = Request(model=model, sampler=sampler, **options)
    rows = Rows(request, ids, row_keys(seed, 1), max_new_tokens=max_new_tokens)
    answer = Answer(model.tokenizer, ids[0], max_new_tokens, stop)
    for snapshot in rows:
        piece = answer.update(snapshot.tokens[0, : snapshot.length[0]], snapshot.finished[0])
        yield piece, snapshot
        if answer.finish_reason:
            return
