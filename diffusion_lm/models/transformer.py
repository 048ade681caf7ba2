"""The denoiser: one transformer, read causally, both ways, or as a noisy canvas over a clean prefix."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_lm.attention_patterns import AttentionPattern, Causal, cache_key_range
from diffusion_lm.nn.cache import CachedLayer, KVCache
from diffusion_lm.nn.dot import dot
from diffusion_lm.nn.layers import Block, RMSNorm
from diffusion_lm.nn.lm_head import ChunkedLogits, unit
from diffusion_lm.nn.matrix import matrix
from diffusion_lm.nn.self_conditioning import SelfConditioning
from diffusion_lm.sharding import cut, platform, ways_in_force
from diffusion_lm.types import NoisyEmbeddings

Array = jax.Array
_ROWS = 128  # the embedding's rows are padded to a multiple of this, so that meshes divide them
_TIME_WIDTH = 256
_SMALL = 2500  # a fan-in: standard deviation 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes. Zero means: derived (kv_heads = heads, head_dim = width / heads, mlp = 8/3 width in steps of 64).

    time_conditioning  tell the network t (adaLN); masked diffusion's optimum doesn't need it
    experts            feed-forwards of `mlp` units in a layer, of which a position takes num_experts_per_token (0: one)
    balance            what an uneven use of experts costs in training, for each layer (arXiv 2101.03961)
    self_conditioning  tell the network what it said a reading ago (`soft`)
    attention          "splash", TPUs' kernel, in bfloat16; "chunked", plain XLA; "auto": splash on TPUs, else chunks;
                       "cudnn", GPUs' kernel (run on none yet), in bfloat16: what is read causally or both ways, a clean
                       half too; blocks, noisy ones and those of a clean text, are read by chunks all the same
    remat              what a layer keeps for its backward pass: all, only its products ("dots"), or nothing ("full")
    products           the type of matrix products' factors; sums are float32 in any case
    quantization       "int8": forward, layers multiply with their weights in int8, which some accelerators do at twice
                       bfloat16's rate (as AQT does, github.com/google/aqt); all else, and the gradient, in `products`
    """

    width: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int = 0
    head_dim: int = 0
    mlp_dim: int = 0
    num_experts: int = 0
    num_experts_per_token: int = 0
    router_aux_loss_weight: float = 0.01
    qk_norm: bool = True
    tie_embeddings: bool = True
    time_conditioning: bool = False
    self_conditioning: bool = False
    rope_theta: float = 10_000.0
    attention_kernel: Literal["auto", "splash", "cudnn", "chunked"] = "auto"
    remat: Literal["none", "dots", "full"] = "none"
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    quantization: Literal["none", "int8"] = "none"

    def __post_init__(self):
        full = self._derived()
        for name in ("width", "layers", "heads", "kv_heads", "head_dim", "mlp_dim"):
            if full.get(name, getattr(self, name)) < 1:
                raise ValueError(f"model.{name} must be at least 1, not {getattr(self, name)}")
        if self.heads % full["kv_heads"]:
            raise ValueError(f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}")
        if self.num_experts < 0 or not (self.num_experts > 0) <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"model.num_experts_per_token={self.num_experts_per_token} must lie in 1..model.num_experts={self.num_experts}; where "
                "there are no experts, both are 0"
            )
        if self.router_aux_loss_weight < 0:
            raise ValueError(
                f"model.router_aux_loss_weight={self.router_aux_loss_weight} must not be negative: it would reward an uneven use"
            )
        if self.quantization not in ("none", "int8"):
            raise ValueError(f"model.quantization={self.quantization} is unknown: set it to none or int8")
        if self.quantization != "none" and self.num_experts:
            raise ValueError(
                f"model.quantization={self.quantization} isn't made for model.num_experts={self.num_experts}: set "
                "model.quantization=none"
            )
        if self.attention_kernel in ("splash", "cudnn") and self.compute_dtype != "bfloat16":
            raise ValueError(
                f"model.attention_kernel={self.attention_kernel} multiplies in bfloat16, not in model.compute_dtype={self.compute_dtype}: set "
                "model.attention_kernel=chunked"
            )
        if full["head_dim"] % 2:
            raise ValueError(f"model.head_dim={full['head_dim']} must be even: rotary positions turn pairs")

    def _derived(self) -> dict[str, int]:
        return {
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.width // max(self.heads, 1),
            "mlp_dim": self.mlp_dim or -(-self.width * 8 // (3 * 64)) * 64,
        }

    @property
    def resolved(self) -> "Architecture":
        """The same sizes without zeros."""
        return dataclasses.replace(self, **self._derived())


class Transformer(nn.Module):
    """Tokens in, a Readout out. scan: layers stacked and scanned (training), or one by one (sampling: `unstacked`)."""

    architecture: Architecture
    vocab: int
    scan: bool = True

    @property
    def rows(self) -> int:
        """Rows of the embedding table: the pieces, the mask, and padding up to a multiple of 128."""
        return -(-(self.vocab + 1) // _ROWS) * _ROWS

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
        again: bool = False,
        self_cond: Array | None = None,
        embeddings: NoisyEmbeddings | None = None,
    ):
        """Reads tokens int32 [B, L] at times t float32 [B, n], after what `cache` holds of each row.

        again: in place of what it holds of these positions, beside all else that it holds (Full; positions
        are slots as `cache.rewrite` takes them); `new` is then all that the cache holds thereafter.

        self_cond, embeddings: see `types.Denoise`. ValueError for a network that wasn't made for them.

        For BlockDiffusionTraining, tokens, t, soft, and the results are [noisy ; clean], 2 L wide; positions, segment_ids [B, L].
        For DraftAndVerify all are [text ; canvases], and there is a cache.
        Returns (Readout, new), ((noisy, clean), new), or ((text, canvases), new): new is the tuple of this row's
        LayerKV for `cache.append` if there is a cache, else None. Never writes the cache.
        """
        a = self.architecture.resolved
        table = matrix(self, "embedding", (self.rows, a.width), ("vocab", "embed"), _SMALL)
        # Small rows, so that a tied readout starts out knowing nothing; normalised, so that the layers see unit size.
        fed = _fed(a, jnp.take(table, tokens, axis=0).astype(jnp.float32), embeddings)
        x = RMSNorm(name="embedding_norm")(fed)
        x = cut(x, "batch", "length", "embed")
        if a.self_conditioning:
            x = SelfConditioning(a, name="self_conditioning")(x, self_cond)
        elif self_cond is not None:
            raise ValueError("this network takes no soft prediction: set model.self_conditioning=true and train anew")
        vectors = unit(table) if a.self_conditioning or embeddings is not None else None
        time = self._embed_time(t) if a.time_conditioning else None
        ranges = attention.key_ranges(positions.shape[1], segment_ids)
        if again:
            ranges = ((cache_key_range(jnp.full_like(cache.length, cache.slots), cache.slots, positions),),)
        slots = positions if again else None
        x, new, uneven = self._layers(x, cache, slots, time, _angles(a, attention, positions), attention, ranges)
        x = RMSNorm(name="final_norm")(x)
        if not a.tie_embeddings:
            table = matrix(self, "unembedding", (self.rows, a.width), ("vocab", "embed"), _SMALL)
        if embeddings is not None:  # one product says what the layers found and what the vectors say by themselves
            x = jnp.concatenate([x, embeddings.logit_scale[..., None] * fed], axis=-1)
            table = jnp.concatenate([table, vectors.astype(table.dtype)], axis=-1)
        return self._heads(x, table, vectors, self._penalty(uneven), attention), new

    def _layers(self, x, cache, slots, time, angles, attention, ranges):
        block = Block
        if self.architecture.remat != "none":
            policy = jax.checkpoint_policies.dots_saveable if self.architecture.remat == "dots" else None
            block = nn.remat(Block, policy=policy, prevent_cse=not self.scan, static_argnums=(5,))
        if self.scan:
            if cache is not None:
                raise ValueError("a cache is read layer by layer: bind the denoiser with `nn.bound.Bound.for_sampling`")
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast,) * 5,
                length=self.architecture.layers,
                unroll=self.architecture.layers if platform() == "cpu" else 1,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, (_, uneven) = layers(self.architecture.resolved, name="layers")(x, None, time, angles, attention, ranges)
            return x, None, uneven
        new, uneven = [], []
        for i in range(self.architecture.layers):
            past = None if cache is None else CachedLayer(kv=cache.layers[i], length=cache.length, slots=slots)
            x, found = block(self.architecture.resolved, name=f"layer_{i}")(x, past, time, angles, attention, ranges)
            new.append(found[0])
            uneven.append(found[1])
        return (
            x,
            (None if cache is None else tuple(new)),
            (jnp.stack(uneven) if self.architecture.num_experts else None),
        )

    def _embed_time(self, t: Array) -> Array:
        """[B, n] -> [B, n, E]: sines and cosines of 1000 t (arXiv 2006.11239), then two products."""
        width = self.architecture.width
        rates = jnp.exp(jnp.linspace(0.0, -jnp.log(10_000.0), _TIME_WIDTH // 2))
        phases = 1000.0 * t[..., None] * rates[None, None]
        waves = jnp.concatenate([jnp.sin(phases), jnp.cos(phases)], axis=-1)
        first = matrix(self, "time_in", (_TIME_WIDTH, width), (None, "embed"), _TIME_WIDTH)
        second = matrix(self, "time_out", (width, width), ("embed", None), width)
        hidden = jax.nn.silu(dot("bnw,we->bne", waves, first, self.architecture.compute_dtype))
        return dot("bne,ef->bnf", hidden, second, self.architecture.compute_dtype)

    def _penalty(self, uneven: Array | None) -> Array | None:
        """What the layers' uneven use of experts costs."""
        return None if uneven is None else self.architecture.router_aux_loss_weight * jnp.sum(uneven)

    def _heads(
        self, x: Array, table: Array, vectors: Array | None, aux_loss: Array | None, attention: AttentionPattern
    ):
        def project(hidden, alignment, aux_loss=aux_loss):
            return ChunkedLogits(
                hidden=hidden,
                table=table,
                embeddings=vectors,
                aux_loss=aux_loss,
                vocab=self.vocab,
                alignment=alignment,
                compute_dtype=self.architecture.compute_dtype,
                shards=ways_in_force("batch"),
                along=ways_in_force("length"),
            )

        parts = attention.split(x)
        if len(parts) == 1:
            return project(x, *attention.alignments)
        parts = [cut(part, "batch", "length", "embed") for part in parts]
        # One pass has one auxiliary loss: the first part's.
        rest = zip(parts[1:], attention.alignments[1:], strict=True)
        return project(parts[0], attention.alignments[0]), *(project(*part, aux_loss=None) for part in rest)


def _fed(a: Architecture, rows: Array, embeddings: NoisyEmbeddings | None) -> Array:
    """The embedding's rows [B, L, E] of the tokens, or what stands in their place."""
    if embeddings is None:
        return rows
    if not a.time_conditioning:
        raise ValueError("noise on vectors can't be told from a clean text: set model.time_conditioning=true")
    return embeddings.signal_scale[..., None] * unit(rows) + embeddings.noise


def _angles(a: Architecture, attention: AttentionPattern, positions: Array) -> Array:
    """Rotary angles float32 [B, L, D / 2]; both halves of BlockDiffusionTraining stand at the same positions."""
    positions = attention.repeat(positions)
    rates = a.rope_theta ** -jnp.linspace(0.0, 1.0, a.head_dim // 2, endpoint=False)
    return positions[..., None].astype(jnp.float32) * rates[None, None]


def init_params(module: Transformer, key: Array):
    """Fresh float32 parameters, boxed with their logical axis names."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    time = jnp.zeros((1, 1), jnp.float32)
    return module.init(key, tokens, time, attention=Causal(), positions=jnp.zeros((1, 2), jnp.int32))["params"]
