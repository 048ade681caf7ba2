"""The denoiser: one transformer of groups of layers, under any attention pattern, with or without a cache."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import AttentionPattern, Causal, cache_key_range
from diffusion_lm.models.base import ModelSpec, Vocabulary, check_execution
from diffusion_lm.nn.cache import CachedLayer, KVCache, NewEntries, scatter_hidden
from diffusion_lm.nn.dot import dot, matrix
from diffusion_lm.nn.layers import Block, Modulation, Norm, SelfConditioning
from diffusion_lm.nn.lm_head import ChunkedLogits, LogitsSpec, unit
from diffusion_lm.nn.lora import LoRA
from diffusion_lm.nn.rope import rotation_of
from diffusion_lm.nn.specs import Execution, LayerGroup
from diffusion_lm.sharding import cut, platform, ways_in_force
from diffusion_lm.types import NoisyEmbeddings

Array = jax.Array
_SMALL = 2500  # a fan-in: standard deviation 0.02
_MAX_MASKED = 0.999  # SEDD's noise leaves a thousandth of the text


class Transformer(nn.Module):
    """Tokens in, LogitsHeads out.

    scan: the layers of a group are stacked and scanned (training), or apart (sampling: `bound_model.unstacked`).
    lora: adapters beside the parameters; None for none.
    """

    spec: ModelSpec
    vocabulary: Vocabulary
    exec: Execution = Execution()
    scan: bool = True
    lora: LoRA | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Array,
        t: Array,
        *,
        attention: AttentionPattern,
        positions: Array,
        segment_ids: Array | None = None,
        cache: KVCache | None = None,
        recompute: bool = False,
        self_cond: Array | None = None,
        embeddings: NoisyEmbeddings | None = None,
    ) -> tuple[Any, NewEntries | None]:
        """One forward pass. See `types.Denoise` for the arguments that aren't listed here.

        Args:
            tokens: int32, the row of the attention pattern: its parts, joined.
            cache: keys and values of each row's text before these tokens; never written here.
            recompute: compute these positions anew in place of what the cache holds of them, beside all else that it
                holds. `positions` are their slots, as `cache.scatter` takes them; the attention pattern is Full.

        Returns:
            A LogitsHead, or a tuple with one for each part of the row; and, with a cache, the new entries for
            `cache.append` (with `recompute`: all entries of the cache from now on).

        Raises:
            ValueError: for inputs that this network doesn't take.
        """
        s = self.spec
        check_execution(s, self.exec)
        shape = (self.vocabulary.rows, s.embedding_width or s.width)
        table = matrix(self, "embedding", shape, ("vocab", "embed"), _SMALL)
        # The rows start small, so that a tied head predicts nothing; the norm brings them to the size of hidden states.
        rows = jnp.take(table, tokens, axis=0).astype(jnp.float32)
        if self.lora is not None:
            rows = self.lora.embed(self, attention.noisy(tokens.shape[1]), tokens, self.vocabulary.mask, rows)
        inputs = self._inputs(rows, embeddings)
        x = inputs if s.embedding_scale == 1.0 else inputs * s.embedding_scale
        if s.embedding_width:
            shape = (s.embedding_width, s.width)
            x = self._affine("embedding_projection", x, shape, (None, "embed"), bias=True)
        if s.learned_positions:
            places = matrix(self, "position_embedding", (s.learned_positions, s.width), (None, "embed"), _SMALL)
            x = x + jnp.take(places, attention.repeat(positions), axis=0, mode="clip").astype(jnp.float32)
        if s.learned_times:
            times = matrix(self, "time_embedding", (s.learned_times, s.width), (None, "embed"), _SMALL)
            index = jnp.round(t * s.learned_times).astype(jnp.int32) - 1
            added = jnp.take(times, jnp.clip(index, 0, s.learned_times - 1), axis=0).astype(jnp.float32)
            x = x + jnp.repeat(added, x.shape[1] // t.shape[1], axis=1, total_repeat_length=x.shape[1])
        x = x if s.embedding_norm is None else Norm(s.embedding_norm, name="embedding_norm")(x)
        x = cut(x, "batch", "length", "embed")
        if s.conditioner is not None:
            canvas = None
            if s.conditioner.canvas_only:
                (first, stop), index = attention.noisy(x.shape[1]), jnp.arange(x.shape[1])
                canvas = ((first <= index) & (index < stop))[None, :, None]
            x = SelfConditioning(s.conditioner, self.exec, name="self_conditioning")(x, self_cond, canvas)
        elif self_cond is not None:
            raise ValueError("this network takes no self-conditioning: set model.self_conditioning=true and train anew")
        vectors = input_embeddings(s, table) if s.conditioner or embeddings is not None else None
        time = None if s.time is None else self._embed_time(t)
        ranges = attention.key_ranges(positions.shape[1], segment_ids)
        if recompute:
            ranges = ((cache_key_range(jnp.full_like(cache.length, cache.slots), cache.slots, positions),),)
        slots = positions if recompute else None
        x, layers, uneven = self._layers(x, cache, slots, time, attention.repeat(positions), attention, ranges)
        x = Norm(s.final_norm, name="final_norm")(x)
        if s.final_modulation is not None:
            shift, scale = Modulation(s.final_modulation, self.exec, parts=2, name="final_adaln")(time, x)
            x = x * (1 + scale) + shift
        x, hidden = self._shifted(x, cache, slots, attention, segment_ids) if s.logit_shift else (x, None)
        if s.head_bias:  # the last column, of an input that is always 1
            table = matrix(self, "unembedding", (self.vocabulary.rows, s.width + 1), ("vocab", None), _SMALL)
            x = jnp.concatenate([x, jnp.ones((*x.shape[:2], 1), x.dtype)], axis=-1)
        elif not s.tie_embeddings:
            table = matrix(self, "unembedding", (self.vocabulary.rows, s.width), ("vocab", "embed"), _SMALL)
        if embeddings is not None:  # one product adds the network's logits and those of the noisy embeddings themselves
            x = jnp.concatenate([x, embeddings.logit_scale[..., None] * inputs], axis=-1)
            table = jnp.concatenate([table, vectors.astype(table.dtype)], axis=-1)
        aux_loss = s.router_aux_loss_weight * sum(jnp.sum(u) for u in uneven) if uneven else None
        heads = self._heads(x, table, vectors, aux_loss, attention)
        return heads, None if cache is None else NewEntries(layers, hidden)

    def _inputs(self, rows: Array, embeddings: NoisyEmbeddings | None) -> Array:
        """The embedding's rows [B, L, E] of the tokens, or noisy embeddings in their place."""
        if embeddings is None:
            return rows
        if self.spec.time is None:
            raise ValueError("a network needs the time to denoise embeddings: set model.time_conditioning=true")
        return embeddings.signal_scale[..., None] * unit(rows) + embeddings.noise

    def _layers(self, x, cache, slots, time, positions, attention, ranges):
        """All groups in a row: x, new keys and values of each layer, load-balancing losses of each group of experts."""
        new, uneven, groups = [], [], self.spec.groups
        for i, group in enumerate(groups):
            layer, rope = group.layer, group.layer.attention.rope
            rotation = None if rope is None else rotation_of(rope, positions, layer.attention.head_dim)
            block = Block
            if self.exec.remat != "none":
                policy = jax.checkpoint_policies.dots_saveable if self.exec.remat == "dots" else None
                block = nn.remat(Block, policy=policy, prevent_cse=not self.scan, static_argnums=(5,))
            if self.scan:
                name = "layers" if len(groups) == 1 else f"layers_{i}"
                x, aux = self._scanned(block, group, name, x, cache, time, rotation, attention, ranges)
            else:
                losses = []
                for _ in range(group.repeat):
                    n = len(new)
                    past = None if cache is None else CachedLayer(cache.layers[n], cache.length, slots)
                    named = block(layer, self.exec, self.lora, name=f"layer_{n}")
                    x, (entries, loss) = named(x, past, time, rotation, attention, ranges)
                    new.append(entries)
                    losses.append(loss)
                aux = None if losses[0] is None else jnp.stack(losses)
            uneven += [] if aux is None else [aux]
        return x, tuple(new), uneven

    def _scanned(self, block, group: LayerGroup, name: str, x, cache, time, rotation, attention, ranges):
        if cache is not None:
            raise ValueError("a cache has its layers apart: take the network from `BoundModel.for_sampling`")
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast,) * 5,
            length=group.repeat,
            unroll=group.repeat if platform() == "cpu" else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, (_, aux) = layers(group.layer, self.exec, self.lora, name=name)(x, None, time, rotation, attention, ranges)
        return x, aux

    def _embed_time(self, t: Array) -> Array:
        """[B, n] -> [B, n, C], as the spec's `TimeSpec` says."""
        s, width, half = self.spec.time, self.spec.width, self.spec.time.waves // 2
        # The rates of arXiv 2006.11239 end at 1 / 10,000, DiT's one step before it.
        rates = jnp.exp(jnp.arange(half) * (-math.log(10_000.0) / (half - (s.input == "time"))))
        level = {
            "time": lambda: 1000.0 * t,
            "noise": lambda: -jnp.log1p(-jnp.minimum(t, _MAX_MASKED)),
            "zero": lambda: jnp.zeros_like(t),
        }[s.input]()
        phases = level[..., None] * rates[None, None]
        waves = [jnp.sin(phases), jnp.cos(phases)]
        waves = jnp.concatenate(waves if s.input == "time" else waves[::-1], axis=-1)
        shape = (s.waves, s.hidden or width)
        hidden = jax.nn.silu(self._affine("time_in", waves, shape, (None, "embed"), s.bias))
        shape = (shape[1], s.dim or width)
        return jax.nn.silu(self._affine("time_out", hidden, shape, ("embed", None), s.bias))

    def _affine(self, name: str, x: Array, shape: tuple[int, int], axes: tuple, bias: bool) -> Array:
        """x [B, n, i] times a matrix of that shape [i, o], plus a bias."""
        out = dot("bni,io->bno", x, matrix(self, name, shape, axes, shape[0]), self.exec.compute_dtype)
        return out + matrix(self, f"{name}_bias", shape[1:], axes[1:], 0)[None, None] if bias else out

    def _shifted(self, x: Array, cache: KVCache | None, slots: Array | None, attention: AttentionPattern, segment_ids):
        """Hidden states moved by one position, for a head that predicts the next token, and what a cache keeps."""
        if cache is None:
            return attention.previous(x, segment_ids, None), x
        if slots is not None:
            kept = scatter_hidden(cache.hidden, x, slots)
            index = jnp.clip(slots - 1, 0, cache.slots - 1)[..., None]
            return jnp.take_along_axis(kept, index, axis=1).astype(x.dtype), kept
        last = jnp.take_along_axis(cache.hidden, jnp.maximum(cache.length - 1, 0)[:, None, None], axis=1)[:, 0]
        before = jnp.where(cache.length[:, None] > 0, last.astype(x.dtype), x[:, 0])
        return attention.previous(x, segment_ids, before), x

    def _heads(self, x: Array, table: Array, vectors: Array | None, aux_loss: Array | None, attention):
        s, v = self.spec, self.vocabulary
        logits = LogitsSpec(v.size, self.exec.compute_dtype, never=v.never, softcap=s.logit_softcap)
        row, parts, heads, end = x.shape[1], attention.split(x), [], 0
        first, stop = (0, row) if self.lora is None else self.lora.span(attention.noisy(row), row)
        for part, alignment in zip(parts, attention.alignments, strict=True):
            start, end = end, end + part.shape[1]
            if end <= first or stop <= start:  # it hangs on nothing that is trained
                part = jax.lax.stop_gradient(part)
            head = ChunkedLogits(
                hidden=part if len(parts) == 1 else cut(part, "batch", "length", "embed"),
                table=table,
                spec=logits,
                alignment=alignment,
                row_parts=ways_in_force("batch"),
                length_parts=ways_in_force("length"),
                embeddings=vectors,
                aux_loss=None if heads else aux_loss,  # one pass has one: the first part's
            )
            heads.append(head)
        return heads[0] if len(heads) == 1 else tuple(heads)


def input_embeddings(spec: ModelSpec, table: Array) -> Array:
    """What a network that takes embeddings as inputs takes for each row of its table: of norm sqrt(E), whatever the
    table's; where the spec scales embeddings itself, those."""
    return unit(table) if spec.embedding_scale == 1.0 else table.astype(jnp.float32) * spec.embedding_scale


def init_params(module: Transformer, key: Array):
    """Fresh float32 parameters, boxed with their logical axis names."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    time = jnp.zeros((1, 1), jnp.float32)
    return module.init(key, tokens, time, attention=Causal(), positions=jnp.zeros((1, 2), jnp.int32))["params"]
