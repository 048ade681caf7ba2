"""The operations that a network's products need, by formula: useful ones, whatever a compiler makes of them.

Each multiplication and each addition counts as one. Counted are the products with weights and those of attention, for
pairs of positions that attend to each other. Not counted: the lookup of embeddings, norms, softmax, time conditioning,
the layer of self-conditioning, and what a backward pass computes anew. Each row counts as one document; several would
make attention cheaper. (Appendix B of PaLM, arXiv 2204.02311, counts alike, but a full square of attention.)
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from diffusion_lm.attention_patterns import AttentionPattern
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import Transformer, init_params
from diffusion_lm.types import Batch

BACKWARD = 3  # a step's operations over those of its forward pass: the pass itself, and two products for each of its


def of_pass(
    module: Transformer, *, rows: int, length: int, attention: AttentionPattern, past: int = 0, num_logits: int = 0
) -> int:
    """The operations of one forward pass.

    Args:
        rows, length: texts, and positions of each (for a pattern that holds a text twice: of one copy).
        attention: the pattern.
        past: positions of a cache that all queries attend to.
        num_logits: of how many positions a row logits are computed; 0 for all.
    """
    width, positions = module.spec.width, attention.row_length(length)
    total = (num_logits or positions) * width * module.vocabulary.size
    for group in module.spec.groups:
        a, mlp, experts = group.layer.attention, group.layer.mlp, group.layer.mixture
        weights = a.head_dim * (2 * a.heads + (1 if a.tie_kv else 2) * a.kv_heads)
        if experts is not None:
            weights += 3 * (experts.dim * experts.num_experts_per_token + experts.shared_dim) + experts.num_experts
        if mlp is not experts:
            weights += (3 if mlp.gated else 2) * mlp.dim
        pairs = attention.num_pairs(length, a.window) + positions * min(past, a.window or past)
        total += group.repeat * (positions * width * weights + 2 * pairs * a.heads * a.head_dim)
    return 2 * rows * total


def of_update(module: Transformer, objective: Callable, batch: Batch) -> int:
    """The operations of one update: the forward passes that `objective` makes, and their gradient. Frozen matrices have
    none of their own, and their adapters' small products aren't counted.

    With self-conditioning, half of the updates first predict what is noised without it, for which there is no gradient.

    Args:
        objective: (denoise, teacher, key, batch) -> Losses. Both are the network; teacher has no gradient.
        batch: a Batch, abstract or not.
    """
    found, backward = [], BACKWARD if module.lora is None else BACKWARD - 1

    def traced(params, key, batch):
        network = BoundModel(module=module, params=params)

        def counting(times):
            def denoise(tokens, t, *, attention, positions, segment_ids, **vectors):
                where = {"rows": len(positions), "length": positions.shape[1], "attention": attention}
                found.append(times * of_pass(module, **where))
                if times == backward and module.spec.self_conditioning and attention.may_be_noisy:
                    # Half of a first pass, and of the expected embeddings that follow from it.
                    mean = 2 * where["rows"] * where["length"] * module.spec.width * module.vocabulary.size
                    found.append((of_pass(module, **where, num_logits=where["length"]) + mean) // 2)
                where = {"attention": attention, "positions": positions, "segment_ids": segment_ids}
                return network.denoise(tokens, t, **where, **vectors)

            return denoise

        return objective(counting(backward), counting(1), key, batch)

    params = nn.meta.unbox(jax.eval_shape(lambda key: init_params(module, key), jax.random.key(0)))
    jax.eval_shape(traced, params, jax.random.key(0), batch)
    return sum(found)
