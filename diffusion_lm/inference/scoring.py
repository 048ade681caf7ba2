"""The log probability of continuations: exact where the network is autoregressive, else the ELBO with its Monte Carlo
error. Requests are batched by length, and continuations of one context share its forward pass."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.inference.pipeline import few_widths
from diffusion_lm.layouts import Layout
from diffusion_lm.loaded_model import LoadedModel, objective_of
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.objectives.base import predict
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.base import decode_loop
from diffusion_lm.types import Batch, cross_entropy

Array = jax.Array


class Request(NamedTuple):
    """The log probability of `continuation` after `context`, both ids; the context begins with begin of text or holds
    at least one other token.

    noise  requests of one number are noised alike, so that a difference between them has little Monte Carlo error
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]
    noise: int = 0


class Scored(NamedTuple):
    """What one request has.

    log_prob        nats: the log probability, or the ELBO
    standard_error  Monte Carlo error of the ELBO; 0 if exact
    greedy          whether greedy decoding would write the continuation; of canvases, by one token a pass, the most
                    confident first. False for noise other than masks: not computed
    passes          forward passes of a row that it took; a shared one counts for the request that came first
    """

    log_prob: float
    standard_error: float
    greedy: bool
    passes: int


def score(
    model: LoadedModel, requests: Sequence[Request], *, draws: int = 32, seed: int = 0, batch_size: int = 16
) -> Iterator[tuple[int, Scored]]:
    """Yields (index, what it has) for every request, in the order in which batches are ready, the longest first.

    Masks (`Absorbing`, without time or self-conditioning) are drawn by number, not each for itself: l of the n tokens
    of a canvas, with weight n / l (LLaDA, arXiv 2502.09992, equation 6). l is stratified over 1..n, two draws a
    stratum, from which the standard error follows. Other noise: the objective's own ELBO at independent draws.

    Args:
      model: a trained network; it computes in its `exec.compute_dtype`.
      requests: what to score; see `fitting`.
      draws: of noise a request, an even number; a canvas of one token needs only one.
      seed: of the noise. A request's noise depends on the seed and its `noise`, not on other requests.
      batch_size: rows a forward pass, at most.

    Raises ValueError for a request that the model's context can't hold, an empty one, or an odd number of draws.
    """
    if draws < 2 or draws % 2 or batch_size < 1:
        raise ValueError(f"draws must be even and batch_size at least 1; got {draws} and {batch_size}")
    for request in requests:
        if not request.continuation or fitting(model, *request[:2]) != request.context:
            raise ValueError("a request needs a continuation, and a context that fits: see scoring.fitting")
    if model.config.objective.trains_ar:
        return _exact(model, requests, batch_size)
    return _bounds(model, requests, draws, seed, batch_size)


def fitting(model: LoadedModel, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
    """The context's last tokens, as many as the model's context holds beside the continuation.

    Raises ValueError where not one token of the context has room.
    """
    keep = _room(model) - len(continuation)
    if keep < 1 or not len(context):
        raise ValueError(
            f"{len(continuation)} tokens after {len(context)} don't go into the model's context of "
            f"{model.config.data.seq_len}: shorten the text"
        )
    return tuple(map(int, context[-keep:]))


def windows(model: LoadedModel, ids: Sequence[int], bos: int) -> list[Request]:
    """A text of any length as requests whose log probabilities sum to the text's, after `bos`: each token is scored
    once, and the last window has as much context as fits."""
    found, size = [], _room(model) - 1
    for number, start in enumerate(range(0, len(ids), size)):
        new = tuple(map(int, ids[start : start + size]))
        found.append(Request(fitting(model, ids[:start] if start else [bos], new), new, number))
    return found


def _room(model: LoadedModel) -> int:
    """Tokens of a context and a continuation together, at most: an autoregressive network doesn't read the last one."""
    objective, length = model.config.objective, model.config.data.seq_len
    return length + 1 if objective.trains_ar else _row_width(objective.layout, length, length)


def _row_width(layout: Layout, tokens: int, most: int) -> int:
    """Positions of a row that holds so many tokens: one of few widths, each of which is a program to compile."""
    unit = layout.round_up(1)
    return min(layout.round_up(few_widths(tokens, most)), most // unit * unit)


def _batches(indices: Iterable[int], width: Any, batch_size: int) -> Iterator[tuple[Any, list[int], int]]:
    """(width, indices, rows) of one forward pass each, the widest first; a last batch has as few rows as a power of two
    allows. A request's width is its own, whatever the batch."""
    by_width: dict[Any, list[int]] = {}
    for index in indices:
        by_width.setdefault(width(index), []).append(index)
    for size, members in sorted(by_width.items(), reverse=True):
        for first in range(0, len(members), batch_size):
            some = members[first : first + batch_size]
            yield size, some, min(batch_size, 1 << (len(some) - 1).bit_length())


def _padded(rows: Sequence[Sequence[int]], count: int, width: int) -> np.ndarray:
    """int32 [count, width], zeros behind each row and below the last."""
    padded = np.zeros((count, width), np.int32)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


# ---- autoregressive networks ----


def _exact(model: LoadedModel, requests: Sequence[Request], batch_size: int) -> Iterator[tuple[int, Scored]]:
    """Each different context once, then the continuations after it. One of a single token needs no pass of its own."""
    network, members, most = model.for_sampling(0), {}, model.config.data.seq_len
    for index, request in enumerate(requests):
        members.setdefault(request.context, []).append(index)
    contexts = list(members)
    for width, some, count in _batches(range(len(contexts)), lambda i: few_widths(len(contexts[i]), most), batch_size):
        lengths = np.array([len(contexts[i]) for i in some] + [1] * (count - len(some)), np.int32)
        first, cache = _prefill(network, _padded([contexts[i] for i in some], count, width), lengths)
        first = np.asarray(first)
        owner = {index: row for row, i in enumerate(some) for index in members[contexts[i]]}
        rest = {index: len(requests[index].continuation) - 1 for index in owner}
        charged = {members[contexts[i]][0] for i in some}

        def scored(index: int, log_prob: float, greedy: bool, first=first, owner=owner, rest=rest, charged=charged):
            token, row = requests[index].continuation[0], first[owner[index]]
            passes = (index in charged) + (rest[index] > 0)
            return index, Scored(float(row[token]) + log_prob, 0.0, greedy and int(row.argmax()) == token, passes)

        yield from (scored(index, 0.0, True) for index in owner if not rest[index])
        longer = [index for index in owner if rest[index]]
        for length, some_rest, rows in _batches(longer, lambda i, rest=rest: few_widths(rest[i], most), batch_size):
            texts = [requests[index].continuation for index in some_rest]
            rows_of = np.array([owner[index] for index in some_rest] + [0] * (rows - len(texts)), np.int32)
            tokens, targets = (_padded([text[s] for text in texts], rows, length) for s in (slice(-1), slice(1, None)))
            found = _continued(network, cache, rows_of, tokens, targets)
            for index, row in zip(some_rest, np.asarray(found, np.float64), strict=False):
                log_probs, greedy = row[: rest[index]].T
                yield scored(index, -log_probs.sum(), bool(greedy.all()))


@jax.jit
def _prefill(network: BoundModel, tokens: Array, count: Array) -> tuple[Array, Any]:
    """Log probabilities [B, V] of what follows tokens[b, :count[b]], and the cache that holds them."""
    head, cache = network.extend(network.empty_cache(*tokens.shape), tokens, count, Causal())
    return jax.nn.log_softmax(head.gather(count[:, None] - 1).logits()[:, 0]), cache


@jax.jit
def _continued(network: BoundModel, cache: Any, rows: Array, tokens: Array, targets: Array) -> Array:
    """[B, T, 2]: -log p of each target, and whether it is the likeliest token, after rows of the cache and tokens."""
    cache = network.resize(cache, rows, cache.slots + tokens.shape[1])
    head, _ = network.extend(cache, tokens, jnp.full(tokens.shape[0], tokens.shape[1]), Causal())
    return head.map_positions(_judged, targets)


def _judged(logits: Array, targets: Array) -> Array:
    likeliest = jnp.argmax(logits, axis=-1) == targets
    return jnp.stack([cross_entropy(logits, targets), likeliest.astype(jnp.float32)], axis=-1)


# ---- canvases ----


def _bounds(
    model: LoadedModel, requests: Sequence[Request], draws: int, seed: int, batch_size: int
) -> Iterator[tuple[int, Scored]]:
    layout, spec, most = model.config.objective.layout, model.config.model, model.config.data.seq_len
    counted = type(model.process) is Absorbing and not (spec.time_conditioning or spec.self_conditioning)

    def shape(index: int) -> tuple[int, bool]:
        """The width, and whether every canvas has at most one token to score, so that nothing is random."""
        width = _row_width(layout, sum(map(len, requests[index][:2])), most)
        targets = _targets(requests[index], width).reshape(layout.num_spans(width), -1)
        return width, counted and int(targets.sum(axis=1).max()) == 1

    for (width, sure), some, count in _batches(range(len(requests)), shape, batch_size):
        chosen, each = [requests[index] for index in some], 1 if sure else draws
        batch = _rows(chosen, count, width, model.tokenizer.mask)
        if counted:
            noised = [_noised(r, width, layout, each, seed) for r in chosen]
            noised += [noised[0]] * (count - len(some))  # rows that nothing is asked of
            nats = [
                _counted(model.network, batch, np.stack([row[draw] for row in noised]), layout, model.tokenizer.mask)
                for draw in range(each)
            ]
            greedy, passes = (np.asarray(a) for a in _greedy(model.network, batch, layout, model.tokenizer.mask))
        else:
            objective, key = objective_of(model.config), jax.random.key(seed)
            numbers = np.array([request.noise for request in chosen] + [0] * (count - len(some)), np.int32)
            nats = [
                _drawn(model.network, jax.random.fold_in(key, draw), numbers, batch, objective, model.process)
                for draw in range(each)
            ]
            greedy, passes = np.zeros(count, bool), np.zeros(count, int)
        nats = np.asarray(jax.device_get(nats), np.float64)
        for row, index in enumerate(some):
            own = nats[:, row]
            yield index, Scored(-own.mean(), _error(own, strata=counted), bool(greedy[row]), each + int(passes[row]))


def _targets(request: Request, width: int) -> np.ndarray:
    """bool [width]: where the continuation lies."""
    at = np.arange(width)
    return (at >= len(request.context)) & (at < len(request.context) + len(request.continuation))


def _rows(requests: Sequence[Request], count: int, width: int, mask: int) -> Batch:
    """Contexts and continuations as rows of one document each; nothing attends to what lies behind them."""
    tokens = _padded([request.context + request.continuation for request in requests], count, width)
    at = np.arange(width, dtype=np.int32)[None]
    length = np.array([sum(map(len, request[:2])) for request in requests] + [1] * (count - len(requests)))
    start = np.array([len(request.context) for request in requests] + [1] * (count - len(requests)))
    there, context = at < length[:, None], at < start[:, None]
    return Batch(
        tokens=np.where(there, tokens, mask).astype(np.int32),
        segment_ids=there.astype(np.int32),
        positions=np.broadcast_to(at, tokens.shape),
        context_mask=context & there,
        loss_mask=there & ~context,
    )


def _noised(request: Request, width: int, layout: Layout, draws: int, seed: int) -> np.ndarray:
    """float32 [draws, width]: n / l where a draw masks the token, 0 where it is clean.

    Draws 2k and 2k + 1 take their l of each canvas from one stratum of 1..n; each canvas goes through the strata in an
    order of its own. So every two draws differ by what is random, and the mean over the strata is exact.
    """
    targets = _targets(request, width).reshape(layout.num_spans(width), -1)
    weights, strata = np.zeros((draws, *targets.shape), np.float32), max(draws // 2, 1)
    for count, number in enumerate(np.flatnonzero(targets.any(axis=1))):
        mine, rng = np.flatnonzero(targets[number]), np.random.default_rng((seed, request.noise, count))
        stratum = np.repeat(rng.permutation(strata), 2)[:draws]
        masked = np.ceil((stratum + 1 - rng.random(draws)) / strata * len(mine)).astype(int).clip(1, len(mine))
        order = rng.random((draws, len(mine))).argsort(axis=1).argsort(axis=1)
        weights[:, number, mine] = np.where(order < masked[:, None], len(mine) / masked[:, None], 0.0)
    return weights.reshape(draws, width)


def _error(draws: np.ndarray, *, strata: bool) -> float:
    """The standard error of the mean of float64 [draws]: pairs of one stratum each, or independent draws."""
    if len(draws) == 1:
        return 0.0
    if strata:
        return float(np.sqrt(np.square(draws[::2] - draws[1::2]).sum()) / len(draws))
    return float(draws.std(ddof=1) / np.sqrt(len(draws)))


@functools.partial(jax.jit, static_argnames=("layout",))
def _counted(network: BoundModel, batch: Batch, weights: Array, layout: Layout, mask: Array) -> Array:
    """float32 [B]: the sum of weights [B, L] * -log p(token | the tokens whose weight is 0)."""
    head = _predicted(network, batch, jnp.where(weights > 0, mask, batch.tokens), layout)
    nats = head.map_positions(cross_entropy, batch.tokens)
    return jnp.sum(jnp.where(weights > 0, weights * nats, 0.0), axis=1)


@functools.partial(jax.jit, static_argnames=("layout",))
def _greedy(network: BoundModel, batch: Batch, layout: Layout, mask: Array) -> tuple[Array, Array]:
    """Whether the most confident masked token of each canvas is right, pass after pass: bool [B]; passes int32 [B].

    What is right is committed. So it is what a sampler at temperature 0 that commits one token a pass would write.
    """
    rows, width = batch.tokens.shape
    steps = width // layout.num_spans(width)

    def running(state: _Guessed) -> Array:
        return jnp.any(state.undecided, axis=1) & state.right

    def step(state: _Guessed) -> _Guessed:
        head = _predicted(network, batch, jnp.where(state.undecided, mask, batch.tokens), layout)
        found = head.map_positions(_most_confident, batch.tokens)
        confidence = jnp.where(state.undecided, found[..., 0], -jnp.inf).reshape(-1, steps)
        best = jax.nn.one_hot(jnp.argmax(confidence, axis=1), steps, dtype=bool).reshape(batch.tokens.shape)
        best = best & state.undecided
        right = state.right & jnp.all(~best | (found[..., 1] > 0), axis=1)
        return _Guessed(state.undecided & ~best, right, state.passes + running(state))

    start = _Guessed(batch.loss_mask, jnp.ones(rows, bool), jnp.zeros(rows, jnp.int32))
    state, _ = decode_loop(step, lambda state: ~running(state), start, steps)
    return state.right, state.passes


class _Guessed(NamedTuple):
    undecided: Array
    right: Array
    passes: Array


def _most_confident(logits: Array, targets: Array) -> Array:
    confidence = jnp.max(jax.nn.log_softmax(logits, axis=-1), axis=-1)
    return jnp.stack([confidence, (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)], axis=-1)


def _predicted(network: BoundModel, batch: Batch, tokens: Array, layout: Layout):
    batch = layout.prepare(batch)
    t = jnp.ones((tokens.shape[0], layout.num_spans(tokens.shape[1])))  # such a network isn't given the time
    return predict(network.denoise, layout, batch, t, tokens)[0]


@functools.partial(jax.jit, static_argnums=(4, 5))
def _drawn(network: BoundModel, key: Array, numbers: Array, batch: Batch, objective: Any, process: Any) -> Array:
    """float32 [B]: the objective's negative ELBO of each row, whose noise is `numbers` int32 [B]."""

    def one(number: Array, row: Batch) -> Array:
        row = jax.tree.map(lambda a: a[None], row)
        return objective.elbo(network.denoise, process, jax.random.fold_in(key, number), row)["canvas"].sum

    return jax.vmap(one)(numbers, batch)
