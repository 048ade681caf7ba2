"""Speculative writing: guess several tokens, check them causally in one pass, keep what stands.

A guess stands where it is the very token that autoregression would draw there with the same key. So the text is that
of `autoregressive` token for token, greedily or at any temperature, and a guess that is one token (not a distribution)
is accepted with its probability under the network, as in rejection sampling (arXiv 2211.17192, algorithm 1).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.samplers.base import CachedDenoiser, Generation, Prompt, Stage, TextSampler, decode_loop
from diffusion_lm.samplers.drafters import Drafter
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.types import LogitsHead

Array = jax.Array
_TURN = 16  # positions that the plain steps of a turn read, and its cycles
_SHARE = 1 / 64  # of the plain steps' time may be spent on cycles in vain
_SAVINGS = 8  # cycles in vain that those before them can have earned, at most
_FOREVER = 2**30  # steps
_MARGIN = 1.2  # times `break_even`: measured of cycles in a row, and one alone between plain steps takes longer


@struct.dataclass
class SpeculativeState:
    """text int32 [B, S] with the prompt, filled int32 [B] columns of it (of which the cache has read all but the last),
    prompt int32 [B], finished bool [B], keys [B], nfe int32 [], and what drafts have brought: accepted float32 []
    tokens a cycle lately, credit float32 [] steps that cycles may lose, pause int32 [] plain steps still to make."""

    text: Array
    filled: Array
    prompt: Array
    finished: Array
    keys: Array
    nfe: Array
    accepted: Array
    budget: Array
    cooldown: Array
    cache: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculative(TextSampler):
    """Writes what `Autoregressive` would, several tokens a pass where `drafter` guesses well.

    break_even  tokens that a cycle (draft and check) must bring to be worth its time, in plain steps. Where drafts
                bring less, they are left off for a while; 0: never

    What drafts in vain may cost is earned first: by plain steps, a small share of each, and by drafts that paid. So
    writing takes at most that share longer than autoregression (and one cycle more, for guesses that cost no pass: a
    look back at the text says when one has a chance). Where checks make the guesses, a try begins with a plain step
    that reads a canvas, too: a part of a cycle's cost, which isn't counted.
    """

    drafter: Drafter
    mask: int
    eos: int
    draw: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    break_even: float = 0.0

    def slots(self, prompt: int, length: int) -> int:
        """Slots that the cache must have."""
        return prompt + length

    def begin(self, model: CachedDenoiser, cache: Any, prompt: Prompt, keys: Array, *, length: int) -> SpeculativeState:
        """One pass reads the prompts and says their next tokens."""
        rows = prompt.tokens.shape[0]
        head, cache = model.extend(cache, prompt.tokens, prompt.length, Causal())
        state = self.from_text(
            text=jnp.pad(prompt.tokens, ((0, 0), (0, length)), constant_values=self.mask),
            filled=prompt.length,
            prompt=prompt.length,
            finished=jnp.zeros(rows, bool),
            keys=keys,
            nfe=jnp.ones((), jnp.int32),
            cache=cache,
        )
        no_draft = jnp.zeros((rows, 0), jnp.int32)
        return self._keep(state, no_draft, head.gather(prompt.length[:, None] - 1).logits(), length)[0]

    def from_text(self, *, text: Array, **rest) -> SpeculativeState:
        """The carry for a text of which the cache has read all but the last token (see `Writing`)."""
        budget = jnp.full((), self._risk if self._free else 0.0)
        return SpeculativeState(
            text=jnp.pad(text, ((0, 0), (0, self.drafter.width + 1)), constant_values=self.mask),
            accepted=jnp.zeros(()),
            budget=budget,
            cooldown=self._pause(budget) if self.break_even else jnp.zeros((), jnp.int32),
            **rest,
        )

    def phases(self, length: int) -> tuple[Stage, ...]:
        """Turns of a few plain steps while drafts don't seem to pay, and of a few cycles while they do; but plain steps
        alone where not even a draft that stands whole would pay."""
        if self._risk > self.drafter.width:
            return (Stage(sampler=_Plain(self, length), steps=length, reads=1),)
        reads = _TURN + (self.drafter.masks > 0) + self.cycles * self._watch
        return (Stage(sampler=_Turns(self, length), steps=length, reads=reads),)

    def round(self, model: CachedDenoiser, state: SpeculativeState, length: int) -> SpeculativeState:
        """Plain steps that are due; a look back, if they were the last; then cycles, unless more are due."""
        due = jnp.where(self._fits(state), jnp.clip(state.cooldown, 0, _TURN), _TURN)
        state, _ = decode_loop(_Plain(self, length), model, state, due)
        if self._slots(state) < self._watch:  # no check ever fits
            return state
        state = state.replace(budget=self._saved(state.budget + _SHARE * due))
        over = (due > 0) & (state.cooldown <= 0)
        state = self._judged(model, state, over)
        if self.drafter.masks and self.break_even:  # a first guess
            state, _ = decode_loop(_Opening(self, length), model, state, over.astype(jnp.int32))
        return decode_loop(_Cycles(self, length), model, state, self.cycles)[0]

    def draft_and_verify(self, model: CachedDenoiser, state: SpeculativeState, length: int) -> SpeculativeState:
        """One draft and its check; a pause is due where drafts have come to bring less than they cost."""
        draft = self.drafter(model, state.cache, state.text, state.filled)
        state, num_accepted = self._check(model, state, draft, length)
        accepted, budget = (state.accepted + num_accepted) / 2, self._saved(state.budget + num_accepted - self._risk)
        return state.replace(
            nfe=state.nfe + self.drafter.passes,
            accepted=accepted,
            budget=budget,
            cooldown=jnp.where((accepted >= self._risk) & (budget >= self._risk), 0, self._pause(budget)),
        )

    def undecided(self, model: CachedDenoiser, state: SpeculativeState, length: int) -> SpeculativeState:
        """A plain step that also guesses."""
        return self._check(model, state, jnp.zeros((state.text.shape[0], 0), jnp.int32), length)[0]

    def _fits(self, state: SpeculativeState) -> Array:
        """Whether every row's cache has slots for a check, which reads the last token and all of the draft."""
        return jnp.max(state.filled) + self.drafter.width <= self._slots(state)

    def _slots(self, state: SpeculativeState) -> int:
        return state.text.shape[1] - self._watch  # which `from_text` added

    @property
    def _free(self) -> bool:
        """A guess takes no time to speak of."""
        return not (self.drafter.passes or self.drafter.masks)

    @property
    def _watch(self) -> int:
        """The shortest pause, as many steps as a check reads tokens: long enough to see how a guess made at its start
        would have fared."""
        return self.drafter.width + 1

    @property
    def _risk(self) -> float:
        """Steps that a cycle loses if nothing of its draft stands; it pays where so many tokens do."""
        return max(_MARGIN * self.break_even - 1.0, 0.0)

    def _saved(self, budget: Array) -> Array:
        return jnp.minimum(budget, _SAVINGS * self._risk)

    def _pause(self, budget: Array) -> Array:
        """Plain steps until there is something to look back at, and a cycle in vain can be afforded."""
        return jnp.clip(jnp.ceil((self._risk - budget) / _SHARE), self._watch, _FOREVER).astype(jnp.int32)

    @property
    def cycles(self) -> int:
        """Cycles a turn, at most."""
        return max(_TURN // self._watch, 1)

    def _judged(self, model: CachedDenoiser, state: SpeculativeState, over: Array) -> SpeculativeState:
        """Where a pause is over: what guesses would have brought, and another pause if that doesn't pay. A guess that
        takes time isn't made to look back. Where cycles begin, a first one in vain ends them."""
        if not self._free:
            return state.replace(accepted=jnp.where(over, self._risk, state.accepted))
        width = self.drafter.width
        then = jnp.maximum(state.filled - width, 1)
        guess = self.drafter(model, state.cache, state.text, then)
        came = jnp.take_along_axis(state.text, then[:, None] + jnp.arange(width, dtype=jnp.int32)[None], axis=1)
        num_accepted = _mean_over(jnp.sum(jnp.cumprod(guess == came, axis=1), axis=1), ~state.finished)
        accepted = (state.accepted + num_accepted) / 2  # few that stood by luck don't pay
        pays = accepted >= self._risk
        return state.replace(
            accepted=jnp.where(over, jnp.where(pays, self._risk, accepted), state.accepted),
            cooldown=jnp.where(over & ~pays, max(self._watch, _TURN), state.cooldown),
        )

    def plain_step(self, model: CachedDenoiser, state: SpeculativeState, length: int) -> SpeculativeState:
        """One token by autoregression: `_check` of no draft, in fewer operations."""
        last = jnp.take_along_axis(state.text, state.filled[:, None] - 1, axis=1)
        going = ~state.finished
        head, cache = model.extend(state.cache, jnp.where(going[:, None], last, 0), going.astype(jnp.int32), Causal())
        made = state.filled - state.prompt
        tokens, _ = self.draw(jax.vmap(jax.random.fold_in)(state.keys, made), head.logits()[:, 0])
        here = jnp.arange(state.text.shape[1], dtype=jnp.int32)[None] == state.filled[:, None]
        return state.replace(
            text=jnp.where(here, jnp.where(going, tokens, self.mask)[:, None], state.text),
            filled=state.filled + going,
            finished=state.finished | (tokens == self.eos) | (made + 1 >= length),
            nfe=state.nfe + 1,
            cooldown=state.cooldown - 1,
            cache=cache,
        )

    def _check(
        self, model: CachedDenoiser, state: SpeculativeState, draft: Array, length: int
    ) -> tuple[SpeculativeState, Array]:
        """Reads the last token and the draft causally; the cache keeps what stands, the text the next guess."""
        last = jnp.take_along_axis(state.text, state.filled[:, None] - 1, axis=1)
        tokens = jnp.where(state.finished[:, None], 0, jnp.concatenate([last, draft], axis=1))
        count = jnp.where(state.finished, 0, tokens.shape[1])
        if self.drafter.masks:
            head, ahead, cache = model.fork(state.cache, tokens, count, self.drafter.masks)
        else:
            head, cache = model.extend(state.cache, tokens, count, Causal())
        before = state.filled
        state, num_accepted = self._keep(state, draft, head.logits(), length)
        new = state.filled - before
        if self.drafter.masks:
            state = state.replace(text=_written(state.text, self._ahead(ahead, new), state.filled))
        cache = model.truncate(cache, count - new)
        return state.replace(cache=cache, nfe=state.nfe + 1), num_accepted

    def _ahead(self, canvases: LogitsHead, new: Array) -> Array:
        """The likeliest tokens, int32 [B, width], behind the last of new[b], by the canvas that begins at it."""
        end = jnp.maximum(new, 1) * self.drafter.masks
        index = end[:, None] - self.drafter.width + jnp.arange(self.drafter.width, dtype=jnp.int32)[None]
        return jnp.argmax(canvases.gather(index).logits(), axis=-1).astype(jnp.int32)

    def _keep(
        self, state: SpeculativeState, draft: Array, logits: Array, length: int
    ) -> tuple[SpeculativeState, Array]:
        """Draws the token behind each of the tokens read, up to the first that the draft got wrong; and how many of
        the draft stood, in the mean over rows that were still being written."""
        rows, width = logits.shape[:2]
        made = (state.filled - state.prompt)[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        keys = jax.vmap(lambda key, at: jax.vmap(lambda i: jax.random.fold_in(key, i))(at))(state.keys, made)
        drawn, _ = self.draw(keys.reshape(-1), logits.reshape(rows * width, -1))
        drawn = drawn.reshape(rows, width)
        right = jnp.cumprod(drawn[:, :-1] == draft, axis=1)
        stands = jnp.pad(right, ((0, 0), (1, 0)), constant_values=1).astype(bool)
        ended = (jnp.cumsum(drawn == self.eos, axis=1) - (drawn == self.eos)) > 0
        stands &= ~ended & (made < length) & ~state.finished[:, None]
        new = jnp.sum(stands, axis=1, dtype=jnp.int32)
        filled = state.filled + new
        writing = ~state.finished
        finished = state.finished | jnp.any(stands & (drawn == self.eos), axis=1) | (filled - state.prompt >= length)
        num_accepted = _mean_over(jnp.sum(right, axis=1), writing)
        text = _written(state.text, jnp.where(stands, drawn, self.mask), state.filled)
        return state.replace(text=text, filled=filled, finished=finished), num_accepted

    def answer(self, state: SpeculativeState, *, length: int) -> Generation:
        at = state.prompt[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(state.text, at, axis=1)
        ended = jnp.cumsum((at >= state.filled[:, None]) | (tokens == self.eos), axis=1) > 0
        return Generation(
            tokens=jnp.where(ended, self.mask, tokens),
            length=jnp.sum(~ended, axis=1, dtype=jnp.int32),
            nfe=state.nfe,
            cache=state.cache,
        )


def _mean_over(values: Array, rows: Array) -> Array:
    return jnp.sum(values * rows) / jnp.maximum(jnp.sum(rows), 1)


def _written(text: Array, piece: Array, at: Array) -> Array:
    """text [B, S] with piece [B, T] at column at[b]."""
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))(text, piece, at)


@dataclasses.dataclass(frozen=True)
class _Turns:
    """The writer with a length, as `run` steps it."""

    writer: Speculative
    length: int

    def step(self, model: CachedDenoiser, state: SpeculativeState) -> SpeculativeState:
        return self.writer.round(model, state, self.length)

    def done(self, state: SpeculativeState) -> Array:
        return state.finished


class _Plain(_Turns):
    """The steps of a turn that are autoregressive. (A loop of their own: a conditional would copy the cache.)"""

    def step(self, model: CachedDenoiser, state: SpeculativeState) -> SpeculativeState:
        return self.writer.plain_step(model, state, self.length)


class _Opening(_Turns):
    """The step before cycles whose checks make the guesses."""

    def step(self, model: CachedDenoiser, state: SpeculativeState) -> SpeculativeState:
        return self.writer.undecided(model, state, self.length)

    def done(self, state: SpeculativeState) -> Array:
        return state.finished | ~self.writer._fits(state)


class _Cycles(_Turns):
    """The cycles of a turn: none while plain steps are due, nor where the cache ends."""

    def step(self, model: CachedDenoiser, state: SpeculativeState) -> SpeculativeState:
        return self.writer.draft_and_verify(model, state, self.length)

    def done(self, state: SpeculativeState) -> Array:
        return state.finished | (state.cooldown > 0) | ~self.writer._fits(state)
