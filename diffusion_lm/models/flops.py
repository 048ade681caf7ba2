"""The operations that a network's products need, by formula: useful ones, whatever a compiler makes of them.

Two for each multiplication and addition. Counted are the products with weights and those of attention, for pairs of
positions that see each other; not the lookup of embeddings, norms, softmax, time conditioning, self-conditioning's own
layer, or what a backward pass computes anew. Documents that end inside a row would make attention cheaper: each row
counts as one document.
(Appendix B of PaLM, arXiv 2204.02311, counts alike, but for a full square of attention.)
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import Transformer, init_params
from diffusion_lm.types import (
    AttentionPattern,
    Batch,
    BlockCausal,
    BlockDiffusionTraining,
    Causal,
    DraftAndVerify,
    Full,
)

BACKWARD = 3  # a step's operations for each of its forward pass: the pass, and two products for each of its products


def of_pass(
    module: Transformer, *, rows: int, length: int, attention: AttentionPattern, past: int = 0, heads: int = 0
) -> int:
    """One forward pass over [rows, length] positions that also see `past` positions of a cache.

    readouts: of how many positions a row logits are formed, 0 for all. For BlockDiffusionTraining, length is that of one half.
    """
    a = module.architecture.resolved
    positions = 2 * length if isinstance(attention, BlockDiffusionTraining) else length
    heads, mlp = (
        a.head_dim * (2 * a.heads + 2 * a.kv_heads),
        3 * a.mlp_dim * (a.num_experts_per_token or 1) + a.num_experts,
    )
    weights = positions * a.layers * a.width * (heads + mlp) + (heads or positions) * a.width * module.vocab
    pairs = _pairs(attention, length) + length * past
    return 2 * rows * (weights + 2 * pairs * a.layers * a.heads * a.head_dim)


def of_update(module: Transformer, objective: Callable, batch: Batch) -> int:
    """One update's operations on a Batch (abstract will do): what `objective` asks of the network, and its gradient.
    A network that is told what it said reads half of what is noised once before, for which there is no gradient.

    objective: (denoise, teacher, key, batch) -> Losses; both are the network, of which teacher has no gradient.
    """
    found = []

    def traced(params, key, batch):
        bound = BoundModel(module=module, params=params)

        def counting(times):
            def denoise(tokens, t, *, attention, positions, segment_ids, **vectors):
                where = {"rows": len(positions), "length": positions.shape[1], "attention": attention}
                found.append(times * of_pass(module, **where))
                if times == BACKWARD and module.architecture.self_conditioning and not isinstance(attention, Causal):
                    found.append(_told(module, **where))
                return bound.denoise(
                    tokens, t, attention=attention, positions=positions, segment_ids=segment_ids, **vectors
                )

            return denoise

        return objective(counting(BACKWARD), counting(1), key, batch)

    params = nn.meta.unbox(jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0)))
    jax.eval_shape(traced, params, jax.random.key(0), batch)
    return sum(found)


def _told(module: Transformer, rows: int, length: int, attention: AttentionPattern) -> int:
    """Half of a first reading, and of the mean vectors that it gives."""
    mean = 2 * rows * length * module.architecture.width * module.vocab
    return (of_pass(module, rows=rows, length=length, attention=attention, heads=length) + mean) // 2


def _pairs(attention: AttentionPattern, length: int) -> int:
    """Pairs of positions of which the first sees the second."""
    if isinstance(attention, BlockDiffusionTraining):  # a noisy position sees its block, and the clean blocks before it
        return _pairs(BlockCausal(attention.block_size), length) + _pairs(attention.clean, length)
    if isinstance(
        attention, DraftAndVerify
    ):  # what is said of the text sees it causally, a canvas what it stands behind
        return _pairs(Causal(), attention.text) * (1 + attention.canvas) + attention.text * attention.canvas**2
    if isinstance(attention, Full):
        return length * length
    block_size = attention.block_size if isinstance(attention, BlockCausal) else 1
    return sum(min(at // block_size * block_size + block_size, length) for at in range(length))
