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
        num_anchors: how many anchors a row has, at most one in each of as many equal parts of it.
        kl_weight: the KL divergence's share of the loss, 0 to 1; the rest is the total variation distance.
        temperature: of both distributions.
        growth: the share of the updates in which the trained length grows 2, 4, 8, ... up to k, in stages of equal
            duration; 0: it is k from the start.
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

    def trained_length(self, progress: Array) -> Array:
        """int32 []: how many masks of a draft are trained once this share of the updates is done."""
        lengths = [2**i for i in range(1, self.draft_length.bit_length()) if 2**i < self.draft_length]
        if not self.growth or not lengths:
            return jnp.int32(self.draft_length)
        stage = jnp.floor(progress / self.growth * len(lengths)).astype(jnp.int32)
        return jnp.asarray([*lengths, self.draft_length], jnp.int32)[jnp.minimum(stage, len(lengths))]

    def __call__(
        self, denoise: Denoise, process: Process, key: Array, batch: Batch, *, progress: Array | None = None
    ) -> dict[str, Loss]:
        rows, length = batch.tokens.shape
        part = length // self.num_anchors
        if not part:
            raise ValueError(
                f"rows of {length} positions hold no {self.num_anchors} anchors: set objective.num_anchors"
            )
        start = part * jnp.arange(self.num_anchors, dtype=jnp.int32)[None]
        anchors = start + jax.random.randint(key, (rows, self.num_anchors), 0, part, jnp.int32)
        attention = Drafts(anchors, self.draft_length)
        places = attention.places(length)
        text, drafts = denoise(
            attention.join(batch.tokens, jnp.full(places.shape, process.mask, jnp.int32)),
            jnp.zeros((rows, 1)),
            attention=attention,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
        )
        weights = self._weights(batch, anchors, places, progress)
        loss = functools.partial(_distance, self.kl_weight, self.temperature)
        total = drafts.weighted_loss(loss, weights, teacher=text.gather(places))
        return {"draft": Loss(sum=total, weight=jnp.sum(weights), aux_loss=text.aux_loss)}

    def _weights(self, batch: Batch, anchors: Array, places: Array, progress: Array | None) -> Array:
        """float32 [B, A * k]: 1 for masks in their anchor's document after which another target follows there."""
        k, after = self.draft_length, jnp.minimum(places + 1, batch.tokens.shape[1] - 1)
        step = jnp.tile(jnp.arange(k, dtype=jnp.int32), self.num_anchors)[None]
        anchor = jnp.repeat(anchors, k, axis=1)
        inside = anchor + 2 + step < batch.tokens.shape[1]
        same = [jnp.take_along_axis(batch.segment_ids, at, axis=1) for at in (anchor, after)]
        here = inside & (same[0] == same[1]) & jnp.take_along_axis(batch.loss_mask, after, axis=1)
        if progress is not None:
            here &= step < self.trained_length(progress)
        return here.astype(jnp.float32)

    def elbo(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        """The text's negative log likelihood, which drafts don't change."""
        return AutoregressiveLoss()(denoise, process, key, batch)


def _distance(kl_weight: float, temperature: float, logits: Array, teacher: Array) -> Array:
    """The mix of both distances between the softmax of logits and teacher: [..., W] twice -> [...]."""
    logits, teacher = logits / temperature, teacher / temperature
    found = 0.0
    if kl_weight < 1:
        apart = jnp.abs(jax.nn.softmax(logits, axis=-1) - jax.nn.softmax(teacher, axis=-1))
        found += (1 - kl_weight) * 0.5 * jnp.sum(apart, axis=-1)
    return found + kl_weight * kl_divergence(logits, teacher) if kl_weight else found
