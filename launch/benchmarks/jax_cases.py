"""The benchmark's cases of this library: a training step, whole generations, and the memory of the loss."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.build import build_init
from diffusion_lm.models.base import DenoiserSpec, Vocabulary
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import Transformer, init_params
from diffusion_lm.nn.lm_head import ChunkedLogits, LogitsSpec
from diffusion_lm.objectives.base import Objective
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.base import Generation, Prompt
from diffusion_lm.training import state as train_state
from diffusion_lm.training.optimizer import AdamW
from diffusion_lm.training.step import make_step
from diffusion_lm.types import Alignment, Batch, DenseLogits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """A network that PyTorch and Transformers can have too: as many key-value heads as heads, no QK norm."""

    vocab: int
    width: int
    layers: int
    heads: int
    mlp: int

    def transformer(self, *, tied: bool, **options: bool) -> Transformer:
        sizes = {"width": self.width, "layers": self.layers, "heads": self.heads, "mlp_dim": self.mlp}
        return Transformer(
            DenoiserSpec(**sizes, qk_norm=False, tie_embeddings=tied, **options),
            Vocabulary(size=self.vocab, mask=self.vocab),
        )


class TrainStep:
    """One update a call, on `batch` rows of `length` random tokens.

    `options` are fields of `DenoiserSpec`, such as time_conditioning; `parameters` is their number.
    """

    def __init__(self, sizes: Sizes, objective: Objective, process: Any = None, *, batch: int, length: int, **options):
        module, optim = sizes.transformer(tied=False, **options), AdamW()
        process = dataclasses.replace(process or Absorbing(), mask=sizes.vocab)

        def loss(params, key, rows, constants):
            denoise = BoundModel(module=module, params=params).denoise
            return objective(denoise, process.with_params(params.get("noise")), key, rows)

        init = functools.partial(build_init(module, process), constants={})
        self._key = jax.random.key(0)
        optimizer = optim.build(1000, jax.eval_shape(init, self._key))
        fresh = jax.jit(lambda key: train_state.unboxed(train_state.initial(init, optimizer, False, key)))
        self._step = jax.jit(make_step(loss, optimizer, optim.rate(1000)), donate_argnums=0)
        self._batch = random_rows(sizes.vocab, batch, length)
        self._state = fresh(self._key)
        self.parameters = train_state.parameter_count(self._state.params)

    def __call__(self) -> dict[str, jax.Array]:
        self._state, metrics = self._step(self._state, self._key, self._batch, {})
        jax.block_until_ready(self._state)
        return metrics


def random_rows(vocab: int, batch: int, length: int) -> Batch:
    """Rows [batch, length] of random tokens, each one document whose first token is context."""
    first = jnp.zeros((batch, length), bool).at[:, 0].set(True)
    return Batch(
        tokens=jax.random.randint(jax.random.key(1), (batch, length), 0, vocab),
        segment_ids=jnp.ones((batch, length), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (batch, length)),
        context_mask=first,
        loss_mask=~first,
    )


def random_network(sizes: Sizes) -> BoundModel:
    """A network with freshly initialized parameters and tied embeddings."""
    module = sizes.transformer(tied=True)
    params = jax.jit(lambda key: nn.meta.unbox(init_params(module, key)))(jax.random.key(0))
    return BoundModel(module=module, params=params)


def generation(network: BoundModel, sampler: Any, *, prompt: int, new: int) -> Callable[[], Generation]:
    """A case that generates `new` tokens for one row after a random prompt, in one program whose cache is donated.

    The end of text must not be sampled: give the sampler an `eos` that is no token.
    """
    tokens = jax.random.randint(jax.random.key(1), (1, prompt), 0, network.module.vocabulary.size)
    request = Prompt(tokens=tokens, length=jnp.full(1, prompt, jnp.int32))
    keys = jax.random.split(jax.random.key(2), 1)
    generate = jax.jit(
        lambda network, cache: sampler.generate(network, cache, request, keys, max_new_tokens=new), donate_argnums=1
    )
    return lambda: generate(network, network.empty_cache(1, sampler.slots(prompt, new))).replace(cache=None)


class LossMemory(NamedTuple):
    """Bytes of temporaries of the loss and its gradients: in the library's chunks, and with full logits."""

    chunked: int
    full: int


class LossPrograms(NamedTuple):
    """The loss and its gradients, jitted, in the library's chunks and with full logits; and the shapes that both take:
    hidden states [1, L, E], the table [V, E], targets and weights [1, L]."""

    chunked: Callable
    full: Callable
    shapes: tuple[jax.ShapeDtypeStruct, ...]


def loss_programs(*, vocab: int, positions: int, width: int, compute_dtype: str = "bfloat16") -> LossPrograms:
    """At these sizes; nothing is compiled, run or allocated."""

    def head(hidden, table):
        spec = LogitsSpec(vocab, compute_dtype)
        return ChunkedLogits(hidden=hidden, table=table, spec=spec, alignment=Alignment.SAME)

    def chunked(hidden, table, targets, weights):
        return head(hidden, table).cross_entropy(targets, weights)

    def full(hidden, table, targets, weights):
        return DenseLogits(values=head(hidden, table).logits()).cross_entropy(targets, weights)

    shapes = tuple(
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((1, positions, width), jnp.float32),
            ((vocab, width), jnp.float32),
            ((1, positions), jnp.int32),
            ((1, positions), jnp.float32),
        )
    )
    return LossPrograms(*(jax.jit(jax.value_and_grad(loss, argnums=(0, 1))) for loss in (chunked, full)), shapes)


def loss_memory(*, vocab: int, positions: int, width: int, compute_dtype: str = "bfloat16") -> LossMemory:
    """Compiles loss and gradients at these sizes; nothing is run or allocated."""
    programs = loss_programs(vocab=vocab, positions=positions, width=width, compute_dtype=compute_dtype)

    def temporaries(program) -> int:
        return program.lower(*programs.shapes).compile().memory_analysis().temp_size_in_bytes

    return LossMemory(chunked=temporaries(programs.chunked), full=temporaries(programs.full))
