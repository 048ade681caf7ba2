"""Block diffusion: canvas after canvas, each denoised over a cache that holds all clean text before it."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import BlockCausal, Causal
from diffusion_lm.samplers.approximate_cache import ApproximateCacheSampler
from diffusion_lm.samplers.base import (
    DIFFUSION,
    CachedDenoiser,
    Canvas,
    CanvasSampler,
    Denoised,
    Denoising,
    Generation,
    History,
    Prompt,
    Query,
    Stage,
    TextSampler,
    denoising,
    fold_in_rows,
    generation_of,
    run_denoising,
    write_at,
)
from diffusion_lm.samplers.cache_policy import CachePolicy
from diffusion_lm.samplers.logits_processors import LogitsProcessor
from diffusion_lm.samplers.sampling_params import suppress

Array = jax.Array


@struct.dataclass
class BlockState:
    """The state of `BlockDiffusion`.

    text                int32 [B, S]  prompts, suffixes and generated tokens, in the cache's slots
    confidence          float32 [B, S]  of each generated token, see `Canvas`
    filled              int32 [B]     slots of text that are final: the next canvas begins there
    prompt_length       int32 [B]
    end                 int32 [B]     slots of text at which the row is complete
    last_fixed          int32 [B]     the slot of the last fixed token: no text ends before it. None: no suffix
    finished            bool [B]      complete, or at an end of text
    num_canvases        int32 []      denoised so far
    nfe                 int32 []      forward passes
    keys                [B]           a random key a row
    cache               the clean text so far; of an approximate cache, all positions
    history             all canvases, if recorded
    positions_computed  int32 []      of an approximate cache
    """

    text: Array
    confidence: Array
    filled: Array
    prompt_length: Array
    end: Array
    last_fixed: Array | None
    finished: Array
    num_canvases: Array
    nfe: Array
    keys: Array
    cache: Any
    history: History | None = None
    positions_computed: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDiffusion(TextSampler):
    """Denoises canvases of `canvas_length` tokens with `sampler`, one after the other (BD3-LM, arXiv 2503.09573).

    With align 1 the last canvas is only as wide as needed, unless `whole`. With suffixes, rows have several lengths:
    there it is as wide as the others, and positions after the end of a row's text are neither attended to nor
    committed.

    clean              how finished text attends in the cache: causally, or block by block (then `align` is the block)
    align              a canvas begins at a multiple of this; the rest of the prompt is fixed inside the first canvas.
                       1: the whole prompt goes into the cache. 0: the prompt goes into the canvas and there is no
                       cache: for networks with full attention, with a canvas wide enough for all
    record             keep each step's canvas (see `History`)
    self_cond_dim      the embedding width E of a self-conditioned network; 0: it isn't self-conditioned
    approximate_cache  with align 0: compute only what the policy names, over keys and values of earlier steps
    stops              further ids that end a row's text after their canvas, as a chat model's end of turn does
    fitted             with align 0: a row's canvas ends with its new tokens, at most at canvas_length (LLaDA, Dream);
                       else all of canvas_length is denoised, as in training on whole rows. See `sized`
    steps_per_token    with fitted: denoising steps for each new token; 0: as many as the sampler has
    whole              with align 1: the last canvas is denoised as wide as the others, as in training, and cut
                       (DiffusionGemma)
    logits_processor   a rule of the sampler's own, which `inference.pipeline` applies
    """

    sampler: CanvasSampler
    canvas_length: int
    mask: int
    eos: int
    clean: Causal | BlockCausal = Causal()  # noqa: RUF009  (immutable)
    align: int = 1
    record: bool = False
    self_cond_dim: int = 0
    approximate_cache: CachePolicy | None = None
    stops: tuple[int, ...] = ()
    fitted: bool = False
    steps_per_token: float = 0.0
    whole: bool = False
    logits_processor: LogitsProcessor | None = None

    def __post_init__(self):
        if self.canvas_length < 1:
            raise ValueError(f"canvas_length must be at least 1; got {self.canvas_length}")
        if self.align < 0 or (self.align and self.canvas_length % self.align):
            raise ValueError(f"canvas_length={self.canvas_length} must be a multiple of align={self.align}, 0 or above")
        if self.align and isinstance(self.clean, BlockCausal) and self.align != self.clean.block_size:
            raise ValueError(f"blocks of {self.clean.block_size} need align={self.clean.block_size}; got {self.align}")
        if self.fitted and (self.align or self.approximate_cache):
            raise ValueError(
                "fitted canvases are for networks with full attention (align=0) without an approximate cache"
            )
        if policy := self.approximate_cache:
            if self.align or self.self_cond_dim:
                raise ValueError(
                    "approximate caches are for networks with full attention (align=0) without self-conditioning"
                )
            blocks = -(-self.canvas_length // policy.block_size) if policy.block_size else 1
            if self.sampler.denoising_steps < blocks:
                raise ValueError(
                    f"denoising_steps={self.sampler.denoising_steps} are fewer than the {blocks} blocks of "
                    f"{policy.block_size} positions in a canvas of {self.canvas_length}: more steps, or wider blocks"
                )

    @property
    def separable(self) -> bool:
        return not self.record

    def sized(self, prompt: int, max_new_tokens: int) -> "BlockDiffusion":
        """The sampler for prompts of at most so many tokens, and so many new ones after each."""
        if not self.fitted:
            return self
        sampler, length = self.sampler, prompt + max_new_tokens
        if self.steps_per_token:
            steps = max(math.ceil(self.steps_per_token * max_new_tokens), 1)
            sampler = dataclasses.replace(sampler, denoising_steps=steps)
        if (block := getattr(sampler, "block_length", 0)) and sampler.denoising_steps < -(-max_new_tokens // block):
            raise ValueError(
                f"denoising_steps={sampler.denoising_steps} are fewer than the {-(-max_new_tokens // block)} blocks of "
                f"{block} positions in {max_new_tokens} new tokens: more steps, or wider blocks"
            )
        return dataclasses.replace(self, sampler=sampler, canvas_length=length, steps_per_token=0.0)

    def width(self, max_new_tokens: int) -> int:
        return self.canvas_length

    def max_canvases(self, max_new_tokens: int) -> int:
        """How many canvases hold so many new tokens, at worst."""
        return -(-(max_new_tokens + max(self.align, 1) - 1) // self.canvas_length)

    def slots(self, prompt: int, max_new_tokens: int) -> int:
        """Slots that the cache needs; none without a cache."""
        if self._narrows:
            return prompt + max_new_tokens
        if not self.align:
            return self.canvas_length if self.approximate_cache else 0
        return prompt + self.max_canvases(max_new_tokens) * self.canvas_length

    def stages(self, max_new_tokens: int) -> tuple[Stage, ...]:
        """Whole canvases, and a narrower one for the rest."""
        growth = self.canvas_length if self.separable and not self.approximate_cache else None
        whole = Stage(stepper=self, max_steps=self._whole_canvases(max_new_tokens), cache_growth=growth)
        rest = max_new_tokens % self.canvas_length if self._narrows else 0
        last = Stage(stepper=dataclasses.replace(self, canvas_length=rest), max_steps=1) if rest else None
        return tuple(stage for stage in (whole if whole.max_steps else None, last) if stage)

    @property
    def _narrows(self) -> bool:
        """Whether the last canvas is only as wide as needed."""
        return self.align == 1 and not self.whole

    def _whole_canvases(self, max_new_tokens: int) -> int:
        if self._narrows:
            return max_new_tokens // self.canvas_length
        return self.max_canvases(max_new_tokens) if self.align else 1

    def init(
        self, network: CachedDenoiser, cache: Any, prompt: Prompt, keys: Array, *, max_new_tokens: int
    ) -> BlockState:
        """Appends each prompt's whole multiples of `align` to the cache."""
        rows, width = prompt.tokens.shape
        least = max_new_tokens + (width if prompt.num_new_tokens is None else 0)  # else the caller knows that rows fit
        if not self.align and self.canvas_length < least:
            raise ValueError(
                f"a canvas of {self.canvas_length} doesn't hold a prompt of {width} and {max_new_tokens} new tokens"
            )
        cached = prompt.length // self.align * self.align if self.align else jnp.zeros_like(prompt.length)
        passes = 1 if self.align and width >= self.align else 0
        if passes:
            _, cache = network.extend(cache, prompt.tokens, cached, self.clean)
        tokens = jnp.where(jnp.arange(width, dtype=jnp.int32)[None] < prompt.length[:, None], prompt.tokens, self.mask)
        room = max_new_tokens if self._narrows else self._whole_canvases(max_new_tokens) * self.canvas_length
        text, last_fixed = jnp.pad(tokens, ((0, 0), (0, room)), constant_values=self.mask), None
        if prompt.suffix is not None:
            text = write_at(text, prompt.suffix, prompt.length)
            at = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
            last_fixed = jnp.max(jnp.where(text != self.mask, at, 0), axis=1)
        history = None
        if self.record:
            rest = self._narrows and max_new_tokens % self.canvas_length > 0
            canvases = self._whole_canvases(max_new_tokens) + rest
            shape = (canvases, self.sampler.denoising_steps, rows, self.canvas_length)
            history = History(
                tokens=jnp.full(shape, self.mask, jnp.int32),
                confidence=jnp.zeros(shape),
                start=jnp.zeros((canvases, rows), jnp.int32),
                steps=jnp.zeros(canvases, jnp.int32),
            )
        return BlockState(
            text=text,
            confidence=jnp.zeros(text.shape),
            filled=cached,
            prompt_length=prompt.length,
            end=prompt.length + (max_new_tokens if prompt.num_new_tokens is None else prompt.num_new_tokens),
            last_fixed=last_fixed,
            finished=jnp.zeros(rows, bool),
            num_canvases=jnp.zeros((), jnp.int32),
            nfe=jnp.full((), passes, jnp.int32),
            keys=keys,
            cache=cache,
            history=history,
            positions_computed=jnp.zeros((), jnp.int32) if self.approximate_cache else None,
        )

    def done(self, state: BlockState) -> Array:
        if state.last_fixed is not None:
            return state.finished
        narrow = self._narrows & (state.end - state.filled < self.canvas_length)  # the next stage's
        return state.finished | narrow

    def step(self, network: CachedDenoiser, state: BlockState) -> BlockState:
        """Denoises one canvas and, unless all rows are finished, appends it to the cache."""
        return self.after_canvas(network, state, self.denoised(network, state))

    def after_canvas(self, network: CachedDenoiser, state: BlockState, denoised: Denoised) -> BlockState:
        """The state with a denoised canvas in its text and, unless all rows are finished, in its cache."""
        tokens, state = denoised.state.tokens, self.written(state, denoised)
        if self.approximate_cache:
            return state.replace(cache=denoised.cache)
        if not self.align:
            return state

        def append(cache: Any) -> Any:
            count = jnp.where(state.finished, 0, self.canvas_length)
            return network.extend(cache, jnp.where(state.finished[:, None], 0, tokens), count, self.clean)[1]

        some = ~jnp.all(state.finished)
        cache = jax.lax.cond(some, append, lambda cache: cache, state.cache)
        return state.replace(nfe=state.nfe + some.astype(jnp.int32), cache=cache)

    def denoised(self, network: CachedDenoiser, state: BlockState) -> Denoised:
        """The next canvas after its last step."""
        record = (lambda canvas: (canvas.tokens, canvas.confidence)) if self.record else None
        return run_denoising(self.denoising(network, state), record)

    def denoising(self, network: CachedDenoiser, state: BlockState) -> Denoising:
        """The next canvas, step by step."""
        sampler, slot = self.sampler, self._slots(state)
        if self.approximate_cache:
            sampler = ApproximateCacheSampler(sampler=sampler, policy=self.approximate_cache, mask=self.mask)

        def predict(query: Query, cache: Any) -> tuple[Array, Any]:
            if jnp.shape(query.t) != (rows := query.tokens.shape[:1]):
                at = f"{type(self.sampler).__name__}.query: t has shape {jnp.shape(query.t)}"
                raise ValueError(f"{at}, and the {rows[0]} rows need a time each, of shape {rows}")
            if query.positions is not None:
                at = query.positions
                logits, cache = network.forward_positions(cache, query.tokens, at, query.t)
            else:
                at, inputs = slot, {"self_cond": query.self_cond, "embeddings": query.embeddings}
                if self._ends_inside(state):
                    inputs["segment_ids"] = (~self._beyond(state, slot)).astype(jnp.int32)
                inputs = {name: value for name, value in inputs.items() if value is not None}
                logits = network.denoise_canvas(state.cache, query.tokens, query.t, **inputs)
            logits = suppress(logits, (self.mask,))
            if state.last_fixed is None:
                return logits, cache
            end = self._ends(jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None])
            return jnp.where((at < state.last_fixed[:, None])[..., None] & end, -jnp.inf, logits), cache

        return denoising(
            sampler,
            predict,
            self._canvas(state, slot),
            cache=state.cache if self.approximate_cache else None,
            embed=network.expected_embedding if self.self_cond_dim or sampler.uses_embeddings else None,
            self_cond_dim=self.self_cond_dim,
        )

    def written(self, state: BlockState, denoised: Denoised) -> BlockState:
        """The state with a denoised canvas in its text; the cache is as before."""
        canvas, history, now = denoised.state, state.history, state.num_canvases
        ended = jnp.any(self._ends(canvas.tokens) & ~canvas.fixed, axis=1)
        if self.record:  # a narrow canvas leaves the rest of its width masked
            (tokens, confidence), here = denoised.trace, (slice(None), slice(None), slice(self.canvas_length))
            history = History(
                tokens=history.tokens.at[now, *here].set(tokens),
                confidence=history.confidence.at[now, *here].set(confidence),
                start=history.start.at[now].set(state.filled),
                steps=history.steps.at[now].set(canvas.step),
            )
        if self.approximate_cache:
            state = state.replace(positions_computed=state.positions_computed + canvas.positions_computed)
        text = write_at(state.text, canvas.tokens, state.filled)
        confidence = write_at(state.confidence, canvas.confidence, state.filled)
        return state.replace(
            text=jnp.where(state.finished[:, None], state.text, text),
            confidence=jnp.where(state.finished[:, None], state.confidence, confidence),
            filled=state.filled + jnp.where(state.finished, 0, self.canvas_length),
            finished=state.finished | ended | (state.filled + self.canvas_length >= state.end),
            num_canvases=now + 1,
            nfe=state.nfe + canvas.step,
            history=history,
        )

    def finish(self, state: BlockState, *, max_new_tokens: int) -> Generation:
        at = state.prompt_length[:, None] + jnp.arange(max_new_tokens, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(state.text, at, axis=1)
        beyond = at >= state.end[:, None]
        ended = jnp.cumsum(self._ends(tokens) | (tokens == self.mask) | beyond, axis=1) > 0
        return generation_of(
            state,
            tokens,
            ended,
            self.mask,
            confidence=jnp.take_along_axis(state.confidence, at, axis=1),
            writer=jnp.full(tokens.shape, DIFFUSION, jnp.int8),
            history=state.history,
            positions_computed=state.positions_computed,
        )

    def _ends(self, tokens: Array) -> Array:
        """bool, as tokens: where an id ends a row's text."""
        return functools.reduce(jnp.logical_or, [tokens == stop for stop in self.stops], tokens == self.eos)

    def _slots(self, state: BlockState) -> Array:
        """int32 [B, K]: the slots of the next canvas."""
        return state.filled[:, None] + jnp.arange(self.canvas_length, dtype=jnp.int32)[None]

    def _beyond(self, state: BlockState, slot: Array) -> Array:
        """bool [B, K]: after the end of a row's text, where the canvas ends with it."""
        return slot >= state.end[:, None] if self._ends_inside(state) else jnp.zeros_like(slot, bool)

    def _ends_inside(self, state: BlockState) -> bool:
        """Whether a row's text may end inside a canvas. Canvases at multiples of more than one position are denoised to
        their ends, as in training."""
        return self.fitted or (self.align == 1 and state.last_fixed is not None)

    def _canvas(self, state: BlockState, slot: Array) -> Canvas:
        """Masks at each row's next slots, except for fixed tokens; a finished row has nothing undecided."""
        there = jnp.take_along_axis(state.text, jnp.minimum(slot, state.text.shape[1] - 1), axis=1)
        given = (there != self.mask) & (slot < state.text.shape[1])
        fixed = given | self._beyond(state, slot)
        return Canvas(
            tokens=jnp.where(given, there, self.mask),
            undecided=~fixed & ~state.finished[:, None],
            fixed=fixed,
            confidence=fixed.astype(jnp.float32),
            keys=fold_in_rows(state.keys, state.num_canvases),
            step=jnp.zeros((), jnp.int32),
        )
