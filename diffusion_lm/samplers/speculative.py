"""Speculative decoding: draft several tokens, verify them causally in one forward pass, keep the accepted ones.

A drafted token is accepted where autoregressive sampling would draw the same token with the same key. So the text is
that of `autoregressive` token for token, at any temperature and in any batch (drafter-invariant speculative decoding,
arXiv 2408.07978). A draft that is a token is accepted with its probability under the network. One that the same keys
draw from a distribution is accepted about as often as by rejection sampling (arXiv 2211.17192, algorithm 1), whose text
would depend on the drafts: see `categorical.coupled`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.samplers.base import (
    AUTOREGRESSION,
    DRAFT,
    CachedDenoiser,
    Generation,
    Prompt,
    Stage,
    TextSampler,
    decode_loop,
    generation_of,
    write_at,
)
from diffusion_lm.samplers.drafters import Drafter, PromptLookup
from diffusion_lm.samplers.sampling_params import SamplingParams, probability, suppress

Array = jax.Array
_ROUND = 16  # positions of a round's plain steps, and of its drafts
_SHARE = 1 / 64  # of the plain steps' time may be spent on drafts in vain
_MAX_BUDGET = 8  # drafts in vain that can be saved up for, at most
_FOREVER = 2**30  # steps
_NGRAM = 3  # as many tokens at a text's end that were there before say what follows
_MARGIN = 1.2  # times `break_even`: measured on drafts in a row, and one alone between plain steps takes longer


@struct.dataclass
class SpeculativeState:
    """text int32 [B, S] with the prompt, filled int32 [B] columns of it (the cache holds all of these but the last),
    confidence float32 [B, S] and writer int8 [B, S] of generated tokens (see `Generation`), prompt_length int32 [B],
    finished bool [B], keys [B], nfe int32 [], and what drafts have saved: accepted float32 []
    tokens a draft lately, budget float32 [] steps that drafts may lose, cooldown int32 [] plain steps still to make."""

    text: Array
    confidence: Array
    writer: Array
    filled: Array
    prompt_length: Array
    finished: Array
    keys: Array
    nfe: Array
    accepted: Array
    budget: Array
    cooldown: Array
    cache: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculative(TextSampler):
    """Samples what `AutoregressiveSampler` would, several tokens a pass where `drafter` is right.

    break_even  tokens that a draft with its verification must yield to be worth its time, in plain steps. Where drafts
                yield less, they are suspended for a while; 0: never
    repeats     whether a draft is what followed the last time, as `PromptLookup` has it, where a text ends as it did
                before; where all rows' texts do, the drafter's passes are saved

    Drafts in vain are paid for in advance: by a small share of each plain step, and by drafts that paid. So sampling
    takes at most that share longer than autoregression (and one draft more, where drafts cost no pass: comparing drafts
    with the text so far says when they have a chance). Where verification makes the drafts, an attempt begins with a
    plain step that also predicts a canvas: a part of the cost that isn't counted.
    """

    drafter: Drafter
    mask: int
    eos: int
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    break_even: float = 0.0
    repeats: bool = False

    def init(
        self, network: CachedDenoiser, cache: Any, prompt: Prompt, keys: Array, *, max_new_tokens: int
    ) -> SpeculativeState:
        """One forward pass over the prompts predicts their next tokens."""
        rows = prompt.tokens.shape[0]
        head, cache = network.extend(cache, prompt.tokens, prompt.length, Causal())
        text = jnp.pad(prompt.tokens, ((0, 0), (0, max_new_tokens)), constant_values=self.mask)
        state = self.from_text(
            text=text,
            confidence=jnp.zeros(text.shape),
            writer=jnp.full(text.shape, AUTOREGRESSION, jnp.int8),
            filled=prompt.length,
            prompt_length=prompt.length,
            finished=jnp.zeros(rows, bool),
            keys=keys,
            nfe=jnp.ones((), jnp.int32),
            cache=cache,
        )
        no_draft, last = jnp.zeros((rows, 0), jnp.int32), head.gather(prompt.length[:, None] - 1)
        return self.accept(state, no_draft, last.logits(), max_new_tokens)[0]

    def from_text(self, *, text: Array, confidence: Array, writer: Array, **rest) -> SpeculativeState:
        """The state for a text of which the cache holds all but the last token (see `SpeculativeState`)."""
        budget, more = jnp.full((), self._risk if self._free else 0.0), ((0, 0), (0, self._verified))
        return SpeculativeState(
            text=jnp.pad(text, more, constant_values=self.mask),
            confidence=jnp.pad(confidence, more),
            writer=jnp.pad(writer, more, constant_values=AUTOREGRESSION),
            accepted=jnp.zeros(()),
            budget=budget,
            cooldown=self._cooldown(budget) if self.break_even else jnp.zeros((), jnp.int32),
            **rest,
        )

    def stages(self, max_new_tokens: int) -> tuple[Stage, ...]:
        """Rounds of a few plain steps and a few drafts; plain steps alone where not even a draft that is wholly
        accepted would pay."""
        if self._risk > self.drafter.num_tokens:
            return (Stage(stepper=_PlainSteps(self, max_new_tokens), max_steps=max_new_tokens, cache_growth=1),)
        growth = _ROUND + (self.drafter.canvas_length > 0) + self.drafts_a_round * self._verified
        return (Stage(stepper=_Rounds(self, max_new_tokens), max_steps=max_new_tokens, cache_growth=growth),)

    def round(self, network: CachedDenoiser, state: SpeculativeState, max_new_tokens: int) -> SpeculativeState:
        """Plain steps of the cooldown; at its end, a comparison of drafts with the text; then drafts, unless there are
        more plain steps to make. (Loops: a conditional would copy the cache.)"""
        due = jnp.where(self._fits(state), jnp.clip(state.cooldown, 0, _ROUND), _ROUND)
        plain = _PlainSteps(self, max_new_tokens)
        state, _ = decode_loop(lambda state: plain.step(network, state), plain.done, state, due)
        if state.text.shape[1] < 2 * self._verified:  # no verification ever fits
            return state
        state = state.replace(budget=self._saved(state.budget + _SHARE * due))
        over = (due > 0) & (state.cooldown <= 0)
        state = self._compared(network, state, over)
        if self.drafter.canvas_length and self.break_even:  # a plain step that also makes a first draft
            no_draft = jnp.zeros((state.text.shape[0], 0), jnp.int32)
            state, _ = decode_loop(
                lambda state: self._verify(network, state, no_draft, max_new_tokens)[0],
                lambda state: state.finished | ~self._fits(state),
                state,
                over.astype(jnp.int32),
            )
        return decode_loop(
            lambda state: self.draft_and_verify(network, state, max_new_tokens),
            lambda state: state.finished | (state.cooldown > 0) | ~self._fits(state),
            state,
            self.drafts_a_round,
        )[0]

    def draft_and_verify(
        self, network: CachedDenoiser, state: SpeculativeState, max_new_tokens: int
    ) -> SpeculativeState:
        """One draft and its verification; a cooldown follows where drafts have come to save less than they cost."""
        draft, passes = self._drafted(network, state)
        state, num_accepted = self._verify(network, state, draft, max_new_tokens)
        risk = self._risk_of(passes)
        accepted, budget = (state.accepted + num_accepted) / 2, self._saved(state.budget + num_accepted - risk)
        pays = (accepted >= risk) & (budget >= risk)
        return state.replace(
            nfe=state.nfe + passes,
            accepted=accepted,
            budget=budget,
            cooldown=jnp.where(pays, 0, self._cooldown(budget)),
        )

    def _drafted(self, network: CachedDenoiser, state: SpeculativeState) -> tuple[Array, Array]:
        """The next draft, and the passes that it took."""

        def made() -> Array:
            return self._tokens(state, self.drafter(network, state.cache, state.text, state.filled))

        passes = jnp.int32(self.drafter.num_passes)
        if not self.repeats:
            return made(), passes
        repeated, match = PromptLookup(num_tokens=self.drafter.num_tokens).find(state.text, state.filled)
        known = (match >= _NGRAM) | state.finished
        draft = jax.lax.cond(jnp.all(known), lambda: repeated, lambda: jnp.where(known[:, None], repeated, made()))
        return draft, jnp.where(jnp.all(known), 0, passes)

    def plain_step(self, network: CachedDenoiser, state: SpeculativeState, max_new_tokens: int) -> SpeculativeState:
        """One token by autoregression: `_verify` of no draft, in fewer operations."""
        last = jnp.take_along_axis(state.text, state.filled[:, None] - 1, axis=1)
        going = ~state.finished
        head, cache = network.extend(state.cache, jnp.where(going[:, None], last, 0), going.astype(jnp.int32), Causal())
        made = state.filled - state.prompt_length
        keys = jax.vmap(jax.random.fold_in)(state.keys, made)
        tokens, confidence = self.sampling.next_token(keys, suppress(head.logits()[:, 0], (self.mask,)))
        here = jnp.arange(state.text.shape[1], dtype=jnp.int32)[None] == state.filled[:, None]
        return state.replace(
            text=jnp.where(here, jnp.where(going, tokens, self.mask)[:, None], state.text),
            confidence=jnp.where(here & going[:, None], confidence[:, None], state.confidence),
            filled=state.filled + going,
            finished=state.finished | (tokens == self.eos) | (made + 1 >= max_new_tokens),
            nfe=state.nfe + 1,
            cooldown=state.cooldown - 1,
            cache=cache,
        )

    def accept(
        self, state: SpeculativeState, draft: Array, logits: Array, max_new_tokens: int
    ) -> tuple[SpeculativeState, Array]:
        """Samples the token after each position, up to the first that the draft got wrong; and how many drafted tokens
        were right, in the mean over unfinished rows."""
        made = (state.filled - state.prompt_length)[:, None] + jnp.arange(logits.shape[1], dtype=jnp.int32)[None]
        drawn = self._tokens(state, logits)
        confidence = probability(self.sampling.allowed(suppress(logits, (self.mask,))), drawn)
        right = jnp.cumprod(drawn[:, :-1] == draft, axis=1)
        keep = jnp.pad(right, ((0, 0), (1, 0)), constant_values=1).astype(bool)
        ended = (jnp.cumsum(drawn == self.eos, axis=1) - (drawn == self.eos)) > 0
        keep &= ~ended & (made < max_new_tokens) & ~state.finished[:, None]
        filled = state.filled + jnp.sum(keep, axis=1, dtype=jnp.int32)
        complete = filled - state.prompt_length >= max_new_tokens
        num_accepted = _mean_over(jnp.sum(right, axis=1), ~state.finished)
        writer = jnp.pad(right, ((0, 0), (0, 1))) * DRAFT + AUTOREGRESSION
        state = state.replace(
            text=write_at(state.text, jnp.where(keep, drawn, self.mask), state.filled),
            confidence=write_at(state.confidence, jnp.where(keep, confidence, 0.0), state.filled),
            writer=write_at(state.writer, writer.astype(jnp.int8), state.filled),
            filled=filled,
            finished=state.finished | jnp.any(keep & (drawn == self.eos), axis=1) | complete,
        )
        return state, num_accepted

    def _tokens(self, state: SpeculativeState, guess: Array) -> Array:
        """int32 [B, n]: tokens as they are; of logits [B, n, V] what autoregressive sampling would draw after the
        text."""
        if guess.ndim == 2:
            return guess
        rows, width = guess.shape[:2]
        made = (state.filled - state.prompt_length)[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        keys = jax.vmap(lambda key, at: jax.vmap(lambda i: jax.random.fold_in(key, i))(at))(state.keys, made)
        logits = suppress(guess, (self.mask,)).reshape(rows * width, -1)
        return self.sampling.next_token(keys.reshape(-1), logits)[0].reshape(rows, width)

    def finish(self, state: SpeculativeState, *, max_new_tokens: int) -> Generation:
        at = state.prompt_length[:, None] + jnp.arange(max_new_tokens, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(state.text, at, axis=1)
        ended = jnp.cumsum((at >= state.filled[:, None]) | (tokens == self.eos), axis=1) > 0
        confidence, writer = (jnp.take_along_axis(a, at, axis=1) for a in (state.confidence, state.writer))
        return generation_of(state, tokens, ended, self.mask, confidence=confidence, writer=writer)

    @property
    def drafts_a_round(self) -> int:
        """The most drafts in a round."""
        return max(_ROUND // self._verified, 1)

    @property
    def _verified(self) -> int:
        """Positions of a verification; also the shortest cooldown: long enough to see how a draft made at its start
        would have fared."""
        return self.drafter.num_tokens + 1

    @property
    def _free(self) -> bool:
        """Whether a draft takes no time to speak of."""
        return not (self.drafter.num_passes or self.drafter.canvas_length)

    @property
    def _risk(self) -> float:
        """Steps that a draft loses if none of it is accepted; it pays where so many tokens are."""
        return max(_MARGIN * self.break_even - 1.0, 0.0)

    def _risk_of(self, passes: Array) -> Array:
        """`_risk`, of a draft that took so many passes: each takes as long as the verification."""
        share = (1 + passes) / (1 + self.drafter.num_passes)
        return jnp.maximum(_MARGIN * self.break_even * share - 1.0, 0.0)

    @property
    def is_dear(self) -> bool:
        """Whether drafts pay only where more than half of each is accepted."""
        return self._risk > self.drafter.num_tokens / 2

    def _fits(self, state: SpeculativeState) -> Array:
        """Whether every row's cache has slots for a verification, of the last token and all of the draft."""
        slots = state.text.shape[1] - self._verified  # which `from_text` added
        return jnp.max(state.filled) + self.drafter.num_tokens <= slots

    def _saved(self, budget: Array) -> Array:
        return jnp.minimum(budget, _MAX_BUDGET * self._risk)

    def _cooldown(self, budget: Array) -> Array:
        """Plain steps until there is text to compare with, and a draft in vain can be afforded."""
        return jnp.clip(jnp.ceil((self._risk - budget) / _SHARE), self._verified, _FOREVER).astype(jnp.int32)

    def _compared(self, network: CachedDenoiser, state: SpeculativeState, over: Array) -> SpeculativeState:
        """At the end of a cooldown: what drafts would have saved, and another cooldown if that doesn't pay. A draft
        that takes time isn't made for this. Where drafts begin, a first one in vain ends them."""
        if not self._free:
            return state.replace(accepted=jnp.where(over, self._risk, state.accepted))
        width = self.drafter.num_tokens
        then = jnp.maximum(state.filled - width, 1)
        draft = self._tokens(state.replace(filled=then), self.drafter(network, state.cache, state.text, then))
        text = jnp.take_along_axis(state.text, then[:, None] + jnp.arange(width, dtype=jnp.int32)[None], axis=1)
        num_accepted = _mean_over(jnp.sum(jnp.cumprod(draft == text, axis=1), axis=1), ~state.finished)
        accepted = (state.accepted + num_accepted) / 2  # few that were right by luck don't pay
        pays = accepted >= self._risk
        return state.replace(
            accepted=jnp.where(over, jnp.where(pays, self._risk, accepted), state.accepted),
            cooldown=jnp.where(over & ~pays, max(self._verified, _ROUND), state.cooldown),
        )

    def _verify(
        self, network: CachedDenoiser, state: SpeculativeState, draft: Array, max_new_tokens: int
    ) -> tuple[SpeculativeState, Array]:
        """One causal pass over the last token and the draft; the cache keeps the accepted tokens, the text receives the
        next draft."""
        last = jnp.take_along_axis(state.text, state.filled[:, None] - 1, axis=1)
        tokens = jnp.where(state.finished[:, None], 0, jnp.concatenate([last, draft], axis=1))
        count, masks = jnp.where(state.finished, 0, tokens.shape[1]), self.drafter.canvas_length
        if masks:
            head, canvases, cache = network.draft_and_verify(
                state.cache, tokens, count, masks, causal=self.drafter.causal
            )
        else:
            head, cache = network.extend(state.cache, tokens, count, Causal())
        before = state.filled
        state, num_accepted = self.accept(state, draft, head.logits(), max_new_tokens)
        new = state.filled - before
        if masks:  # the canvas that begins at the last of the new tokens
            width = self.drafter.num_tokens
            start = jnp.maximum(new, 1) * masks - width
            logits = canvases.gather(start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]).logits()
            guess = logits if self.drafter.causal else jnp.argmax(logits, axis=-1).astype(jnp.int32)
            draft = self._tokens(state, guess)
            state = state.replace(text=write_at(state.text, draft, state.filled))
        cache = network.truncate(cache, count - new)
        return state.replace(cache=cache, nfe=state.nfe + 1), num_accepted


def _mean_over(values: Array, rows: Array) -> Array:
    return jnp.sum(values * rows) / jnp.maximum(jnp.sum(rows), 1)


@dataclasses.dataclass(frozen=True)
class _Rounds:
    sampler: Speculative
    max_new_tokens: int

    def step(self, network: CachedDenoiser, state: SpeculativeState) -> SpeculativeState:
        return self.sampler.round(network, state, self.max_new_tokens)

    def done(self, state: SpeculativeState) -> Array:
        return state.finished


class _PlainSteps(_Rounds):
    def step(self, network: CachedDenoiser, state: SpeculativeState) -> SpeculativeState:
        return self.sampler.plain_step(network, state, self.max_new_tokens)
