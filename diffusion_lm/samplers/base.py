"""The protocols of sampling, the states that samplers step, and the loops that drive them.

A canvas sampler (ancestral, confidence, ...) denoises one canvas. It never calls the network: `denoise` does, once a
step. A text sampler (autoregressive, block diffusion, ...) generates a whole answer in stages and keeps the cache.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_lm.attention_patterns import AttentionPattern
from diffusion_lm.types import LogitsHead, NoisyEmbeddings

Array = jax.Array
AUTOREGRESSION, DIFFUSION, DRAFT = 0, 1, 2  # who wrote a token, see `Generation`


class CachedDenoiser(Protocol):
    """What a text sampler sees of a network (`models.bound_model.BoundModel` is one). Caches have a `length`, int32
    [B]."""

    def extend(self, cache: Any, tokens: Array, count: Array, attention: AttentionPattern) -> tuple[LogitsHead, Any]:
        """Appends the first count[b] of clean tokens [B, T]: the predictions at all T positions, and the cache."""

    def draft_and_verify(
        self, cache: Any, tokens: Array, count: Array, masks: int, causal: bool = False
    ) -> tuple[LogitsHead, LogitsHead, Any]:
        """`extend` under causal attention; the same pass predicts a canvas of `masks` masks after each token, as
        `denoise_canvas` would at time 1, or with `causal` the token after each mask, as `objectives.drafting` trains
        it. Returns predictions [B, T] and [B, T * masks], and the cache."""

    def truncate(self, cache: Any, count: Array) -> Any:
        """The cache without the last count[b] positions of row b."""

    def resize(self, cache: Any, rows: Array, slots: int | None = None) -> Any:
        """The cache of the chosen rows, int32 [n], with at least as many slots as before (None: as many)."""

    def denoise_canvas(self, cache: Any, canvas: Array, t: Array, **inputs) -> Array:
        """float32 logits [B, K, V] of a noisy canvas [B, K] at times t [B] after the cache, which stays as it is.

        inputs: `self_cond` and `embeddings` (see `types.Denoise`); segment_ids int32 [B, K]: each position attends to
        those of its own segment, and to the whole cache.
        """

    def expected_embedding(self, logits: Array) -> Array:
        """softmax(logits) [B, K, V] @ the token embeddings, float32 [B, K, E]."""


class Query(NamedTuple):
    """What a canvas sampler asks the network.

    tokens      int32 [B, W]    the noisy tokens
    t           float32 [B]     the time of each row, in [0, 1]
    embeddings  noisy embeddings in place of the tokens' own
    positions   int32 [B, W]    which positions of the canvas these are (its length stands for none); None: all
    self_cond   float32 [B, W, E]  the previous step's expected embeddings: `denoise` fills them in
    """

    tokens: Array
    t: Array
    embeddings: NoisyEmbeddings | None = None
    positions: Array | None = None
    self_cond: Array | None = None


@struct.dataclass
class Canvas:
    """A canvas that is being denoised.

    tokens      int32 [B, K]    the current tokens; the mask id where nothing is committed
    undecided   bool [B, K]     still to be committed
    fixed       bool [B, K]     given by the user
    confidence  float32 [B, K]  the probability of the token when it was committed; 1 where fixed, 0 where undecided
    keys        [B]             a random key a row
    step        int32 []        steps made so far
    """

    tokens: Array
    undecided: Array
    fixed: Array
    confidence: Array
    keys: Array
    step: Array


class CanvasSampler(Protocol):
    """A frozen dataclass that denoises a canvas in at most `denoising_steps` steps. Its state is a `Canvas`, or a
    subclass with fields of its own.

    uses_embeddings  whether `update` takes a third argument, softmax(logits) -> expected embedding [B, K, E]
    """

    denoising_steps: int
    uses_embeddings = False

    def __post_init__(self):
        if not hasattr(self, "denoising_steps"):
            raise ValueError(f"{type(self).__name__} has no field denoising_steps, the most steps of a canvas: add it")
        if self.denoising_steps < 1:
            raise ValueError(f"denoising_steps must be at least 1; got {self.denoising_steps}")

    def init(self, canvas: Canvas) -> Any:
        """The state before the first step: noise at the undecided positions."""
        return canvas

    def query(self, state: Any) -> Query:
        """The network's input in the next step."""

    def update(self, state: Any, logits: Array) -> Any:
        """The state after the step; logits float32 [B, W, V] answer `query(state)`, minus infinity at the mask."""

    def conditioning(self, state: Any, logits: Array) -> Array:
        """The logits whose expected embedding conditions the next step; state is the one before this step."""
        return logits

    def done(self, state: Any) -> Array:
        """bool [B]: rows that need no further step."""
        return ~jnp.any(state.undecided, axis=1)

    def variants(self, length: int) -> tuple["CanvasSampler", ...]:
        """Samplers of one state that each query another number of a canvas's `length` positions."""
        return (self,)

    def variant(self, state: Any) -> Array:
        """int32 []: which of several variants makes the next step."""


class Denoised(NamedTuple):
    """A sampler's last state, the cache after it, and what was recorded, one entry a step."""

    state: Any
    cache: Any
    trace: Any = None


class Denoising(NamedTuple):
    """A canvas's denoising, to be stepped: `step` maps (state, cache, self_cond), which `carry` is at first."""

    sampler: CanvasSampler
    carry: tuple
    step: Callable[[tuple], tuple]


def denoise(
    sampler: CanvasSampler,
    predict: Callable[[Query, Any], tuple[Array, Any]],
    canvas: Canvas,
    *,
    record: Callable[[Any], Any] | None = None,
    **options,
) -> Denoised:
    """Denoises a canvas: the one loop over canvas samplers, with one network call a step.

    record: state -> arrays to keep of each step. The others: see `denoising`.
    """
    return run_denoising(denoising(sampler, predict, canvas, **options), record)


def run_denoising(todo: Denoising, record: Callable[[Any], Any] | None = None) -> Denoised:
    """All steps."""
    done, recorded = (lambda carry: todo.sampler.done(carry[0])), record and (lambda carry: record(carry[0]))
    end, trace = decode_loop(todo.step, done, todo.carry, todo.sampler.denoising_steps, recorded)
    return Denoised(end[0], end[1], trace)


def denoising(
    sampler: CanvasSampler,
    predict: Callable[[Query, Any], tuple[Array, Any]],
    canvas: Canvas,
    *,
    cache: Any = None,
    embed: Callable[[Array], Array] | None = None,
    self_cond_dim: int = 0,
) -> Denoising:
    """The denoising of a canvas.

    Args:
      sampler: what to ask, and how the canvas changes.
      predict: (query, cache) -> (logits float32 [B, W, V], cache): the network, with logits processors and guidance.
      canvas: where it begins.
      cache: keys and values that `predict` changes; a cache that it only looks at belongs into the function.
      embed: softmax(logits) -> expected embedding [B, K, E].
      self_cond_dim: E of a self-conditioned network: each step receives the expected embedding of the previous step's
        prediction, zeros before the first (Analog Bits, arXiv 2208.04202, section 3). Predictions are taken at
        temperature 1, as in training, unless the sampler says otherwise. 0: no self-conditioning.
    """
    variants = sampler.variants(canvas.tokens.shape[1])

    def one_pass(variant: CanvasSampler, state: Any, cache: Any, self_cond: Array | None):
        query = variant.query(state)._replace(self_cond=self_cond)
        logits, cache = predict(query, cache)  # the one network call
        told = embed(variant.conditioning(state, logits)) if self_cond_dim else None
        state = variant.update(state, logits, *((embed,) if variant.uses_embeddings else ()))
        return state, cache, told

    def step(carry):
        if len(variants) == 1:
            return one_pass(variants[0], *carry)
        branches = [functools.partial(one_pass, variant) for variant in variants]
        return jax.lax.switch(sampler.variant(carry[0]), branches, *carry)

    self_cond = jnp.zeros((*canvas.tokens.shape, self_cond_dim)) if self_cond_dim else None
    return Denoising(sampler, (sampler.init(canvas), cache, self_cond), step)


class Stepper(Protocol):
    """A frozen dataclass that steps a text sampler's state."""

    def step(self, network: CachedDenoiser, state: Any) -> Any: ...

    def done(self, state: Any) -> Array:
        """bool [B]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of generation: `stepper` steps until every row is done, at most `max_steps` times.

    cache_growth  the most positions that a step appends to the cache, which may grow between steps; None: the stage
                  needs every slot from the start
    enter         (network, state) -> the state that `stepper` steps; None: as the stage before left it
    """

    stepper: Stepper
    max_steps: int
    cache_growth: int | None = None
    enter: Callable[[CachedDenoiser, Any], Any] | None = None


@struct.dataclass
class Prompt:
    """tokens int32 [B, P], padded on the right; length int32 [B], at least 1 (begin of text).

    suffix          int32 [B, N] or None: the text after each prompt, the mask id where tokens are to be infilled. For
                    canvases only: autoregressive samplers can't condition on it
    num_new_tokens  int32 [B] or None: how much of the suffix is the row's text, which ends there; None: all of it
    """

    tokens: Array
    length: Array
    suffix: Array | None = None
    num_new_tokens: Array | None = None


@struct.dataclass
class History:
    """Each step's canvas: tokens int32 and confidence float32 [canvases, steps, B, K]; start int32 [canvases, B], the
    position of a canvas's first token; steps int32 [canvases], how many were made."""

    tokens: Array
    confidence: Array
    start: Array
    steps: Array


@struct.dataclass
class Generation:
    """tokens int32 [B, N], the mask id from the end of text on; length int32 [B], tokens before it; nfe int32 [],
    forward passes of the network, prompt and commits included; cache, to continue from; history, if recorded;
    positions_computed int32 [], of approximate caches: positions a row in all passes (exact ones: nfe x canvas);
    confidence float32 [B, N], the network's probability of each token when it was committed; writer int8 [B, N], how
    each was written: AUTOREGRESSION, DIFFUSION or DRAFT (an accepted one)."""

    tokens: Array
    length: Array
    nfe: Array
    cache: Any
    confidence: Array | None = None
    writer: Array | None = None
    history: History | None = None
    positions_computed: Array | None = None


def generation_of(state: Any, tokens: Array, ended: Array, mask: int, **more) -> Generation:
    """The tokens [B, N] of a text sampler's last state, masked where the row has ended, bool [B, N]."""
    length = jnp.sum(~ended, axis=1, dtype=jnp.int32)
    tokens = jnp.where(ended, mask, tokens)
    return Generation(tokens=tokens, length=length, nfe=state.nfe, cache=state.cache, **more)


class TextSampler(Protocol):
    """A frozen dataclass that generates text after prompts, in stages. Arrays of its state have rows first, apart from
    scalars; the state has the `cache`, `finished` bool [B], and `nfe` int32 [].

    separable  a row's text doesn't depend on the batch, and the row may leave it
    """

    separable = True

    def width(self, max_new_tokens: int) -> int:
        """Positions of a row in one forward pass (but for the prompt's)."""
        del max_new_tokens
        return 1

    def slots(self, prompt: int, max_new_tokens: int) -> int:
        """Slots that the cache needs for a prompt of so many tokens."""
        return prompt + max_new_tokens

    def init(self, network: CachedDenoiser, cache: Any, prompt: Prompt, keys: Array, *, max_new_tokens: int) -> Any:
        """The state after the forward pass over the prompts."""

    def stages(self, max_new_tokens: int) -> tuple[Stage, ...]:
        """What follows, in order."""

    def finish(self, state: Any, *, max_new_tokens: int) -> Generation:
        """The generated tokens of the last state."""

    def generate(
        self, network: CachedDenoiser, cache: Any, prompt: Prompt, keys: Array, *, max_new_tokens: int
    ) -> Generation:
        """Generates at most `max_new_tokens` tokens after each prompt; prompts may differ in length."""
        state = self.init(network, cache, prompt, keys, max_new_tokens=max_new_tokens)
        for stage in self.stages(max_new_tokens):
            state = stage.enter(network, state) if stage.enter else state
            step = functools.partial(stage.stepper.step, network)
            state, _ = decode_loop(step, stage.stepper.done, state, stage.max_steps)
        return self.finish(state, max_new_tokens=max_new_tokens)


def decode_loop(
    step: Callable[[Any], Any],
    done: Callable[[Any], Array],
    state: Any,
    max_steps: int | Array,
    record: Callable[[Any], Any] | None = None,
    max_running: int | Array = 0,
    max_cached: int | Array | None = None,
):
    """Steps `state` until at most `max_running` rows aren't done, or its cache holds more than `max_cached` positions
    of a row, at most `max_steps` times: the one decoding loop.

    Returns (state, trace): trace stacks record(state) after each step on a leading axis of max_steps, or is None.
    """
    trace = None
    if record is not None:
        trace = jax.tree.map(lambda a: jnp.zeros((max_steps, *a.shape), a.dtype), jax.eval_shape(record, state))

    def running(carry):
        state, _, made = carry
        more = (made < max_steps) & (jnp.sum(~done(state)) > max_running)
        return more if max_cached is None else more & (jnp.max(state.cache.length) <= max_cached)

    def body(carry):
        state, trace, made = carry
        state = step(state)
        if record is not None:
            trace = jax.tree.map(lambda all_, one: all_.at[made].set(one), trace, record(state))
        return state, trace, made + 1

    state, trace, _ = jax.lax.while_loop(running, body, (state, trace, jnp.zeros((), jnp.int32)))
    return state, trace


def commit(canvas: Canvas, chosen: Array, tokens: Array, confidence: Array, *, eos: int) -> Canvas:
    """The canvas after a step that commits `tokens` at the chosen undecided positions.

    Positions after an end of text are closed and repeat it, as in training: they aren't returned. Fixed tokens stay.
    An eos of -1 closes nothing, for networks that were trained on rows of several texts.
    """
    chosen = chosen & canvas.undecided
    tokens = jnp.where(chosen, tokens, canvas.tokens)
    confidence = jnp.where(chosen, confidence, canvas.confidence)
    closed = after_eos(tokens, canvas.fixed, eos)
    return canvas.replace(
        tokens=jnp.where(closed, eos, tokens),
        confidence=jnp.where(closed, 0.0, confidence),
        undecided=canvas.undecided & ~chosen & ~closed,
        step=canvas.step + 1,
    )


def after_eos(tokens: Array, fixed: Array, eos: int) -> Array:
    """bool [B, K]: positions after an end of text that isn't fixed, unless they are fixed themselves."""
    ends = (tokens == eos) & ~fixed
    return ((jnp.cumsum(ends, axis=1) - ends) > 0) & ~fixed


def gather_tokens(values: Array, tokens: Array) -> Array:
    """values [..., V] of each token [...]; of the nearest id where a token (a mask) has none."""
    return jnp.take_along_axis(values, tokens[..., None], axis=-1, mode="clip")[..., 0]


def write_at(text: Array, new: Array, start: Array) -> Array:
    """text [B, S] with new [B, T] from column start[b] on."""
    return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (at,)))(text, new, start)


def fields_of(state: Any) -> dict[str, Any]:
    """A dataclass's fields by name: what a subclass of a state begins with."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def fold_in_rows(keys: Array, count: int | Array) -> Array:
    """A fresh key a row for the count-th use: a row draws the same alone and in any batch."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, count)
