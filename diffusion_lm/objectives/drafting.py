"""Drafting: masks behind a clean text are trained towards the network's own next-token distributions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from diffusion_lm.draft_pattern import Drafts
from diffusion_lm.layouts import NoCanvas
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.base import Objective
from diffusion_lm.objectives.distillation import kl_divergence
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Batch, Denoise, Loss

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drafting(Objective):
    """Teaches a causal network to predict several tokens ahead, for speculative decoding that its own text verifies.

    In one pass a clean text goes through the network causally, and behind sampled positions of it (anchors) masks
    stand for tokens not known yet. A mask at a position is the student of what the network says at that position where
    it sees the text: same place, same pass, no gradient. The loss is the total variation distance (Uno, arXiv
    2609.04010), which is one minus the probability that speculative sampling accepts the draft (arXiv 2211.17192); or
    the KL divergence; or a mix.

    The text should be the network's own, written at the temperature that it will be used with: behind somebody else's
    text the masks learn what somebody else would go on with.

    Args:
        draft_length: k, the masks behind each anchor.
        num_anchors: how many anchors a row has, at most one in each of as many equal parts of its targets.
        kl_weight: the KL divergence's share of the loss, 0 to 1; the rest is the total variation distance.
        temperature: of both distributions.
        growth: the share of the updates in which drafts grow 2, 4, 8, ... up to k, in stages of equal duration; 0: they
            have length k from the start.
    """

    draft_length: int = 4
    num_anchors: int = 64
    kl_weight: float = 0.0
    temperature: float = 1.0
    growth: float = 0.0
    layout = NoCanvas()
    trains_ar = True

    def __post_init__(self):
        for name in ("draft_length", "num_anchors"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.{name} must be at least 1; got {getattr(self, name)}")
        for name in ("kl_weight", "growth"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"objective.{name} must lie in 0..1; got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"objective.temperature must be positive; got {self.temperature}")

    def stages(self) -> tuple[tuple[float, Objective], ...]:
        lengths = [2**i for i in range(1, self.draft_length.bit_length()) if 2**i < self.draft_length]
        growing = enumerate(lengths if self.growth else [], 1)
        shorter = [(self.growth * i / len(lengths), dataclasses.replace(self, draft_length=k)) for i, k in growing]
        return *shorter, (1.0, self)

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        length = batch.tokens.shape[1]
        anchors = self._anchors(key, batch)
        attention = Drafts(anchors, self.draft_length)
        places = attention.places(length)
        text, drafts = denoise(
            attention.join(batch.tokens, jnp.full(places.shape, process.mask, jnp.int32)),
            jnp.zeros((len(anchors), 1)),
            attention=attention,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
        )
        weights = _targets(batch, anchors, self.draft_length).reshape(places.shape).astype(jnp.float32)
        loss = functools.partial(_distance, self.kl_weight, self.temperature)
        total = drafts.weighted_loss(loss, weights, teacher=text.gather(places))
        return {"draft": Loss(sum=total, weight=jnp.sum(weights), aux_loss=text.aux_loss)}

    def _anchors(self, key: Array, batch: Batch) -> Array:
        """int32 [B, A], ascending: positions behind which the first mask has a target, each equally likely and at even
        distances; all of them where they are few, and then others, whose masks have none."""
        rows, length = batch.tokens.shape
        if self.num_anchors > length:
            raise ValueError(
                f"rows of {length} positions hold no {self.num_anchors} anchors: set objective.num_anchors"
            )
        everywhere = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (rows, length))
        scored = _targets(batch, everywhere, 1)[..., 0]
        order = jnp.argsort(~scored, axis=1, stable=True).astype(jnp.int32)
        count = jnp.sum(scored, axis=1, keepdims=True)
        number = jnp.arange(self.num_anchors, dtype=jnp.int32)[None]
        drawn = (number + jax.random.uniform(key, (rows, 1))) * (count / self.num_anchors)
        drawn = jnp.minimum(drawn.astype(jnp.int32), count - 1)
        return jnp.take_along_axis(order, jnp.where(count > self.num_anchors, drawn, number), axis=1)

    def elbo(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        """The text's negative log likelihood, which drafts don't change."""
        return AutoregressiveLoss()(denoise, process, key, batch)


def _targets(batch: Batch, anchors: Array, draft_length: int) -> Array:
    """bool [B, A, k]: whether the masks behind anchors [B, A] have a target, in the anchor's document."""
    after = anchors[..., None] + 2 + jnp.arange(draft_length, dtype=jnp.int32)[None, None]
    length = batch.tokens.shape[1]
    at = jnp.minimum(after, length - 1)
    take = jax.vmap(lambda row, where: row[where])
    same = take(batch.segment_ids, at) == take(batch.segment_ids, anchors)[..., None]
    return (after < length) & same & take(batch.loss_mask, at)


def _distance(kl_weight: float, temperature: float, logits: Array, teacher: Array) -> Array:
    """The mix of both distances between the softmax of logits and teacher: [..., W] twice -> [...]."""
    logits, teacher = logits / temperature, teacher / temperature
    found = 0.0
    if kl_weight < 1:
        apart = jnp.abs(jax.nn.softmax(logits, axis=-1) - jax.nn.softmax(teacher, axis=-1))
        found += (1 - kl_weight) * 0.5 * jnp.sum(apart, axis=-1)
    return found + kl_weight * kl_divergence(logits, teacher) if kl_weight else found
