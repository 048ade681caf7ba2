"""Distillation through time: the student predicts in one pass what the teacher predicts after several."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.layouts import Layout
from diffusion_lm.objectives.autoregressive import next_token_loss
from diffusion_lm.objectives.base import Objective, corrupt, draw_times, noised_mask, per_target, predict
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.processes.base import Process
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.types import Batch, Denoise, LogitsHead, Loss

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(Objective):
    """KL(teacher | student) at noisy tokens (SDTT, arXiv 2410.21035).

    The teacher denoises a text from time t to t - 1/student_steps in `teacher_steps` passes. The student, at t, learns
    the teacher's distribution of each token in the last pass in which that token was still noise. A student of n steps
    can teach one of n/2.

    Tokens sampled in one pass are independent, so the student learns at most the teacher's marginals after its passes.
    Where a teacher's passes agree with one another these are its first predictions, and nothing is gained. Under noise
    on embeddings (`processes.gaussian`) the teacher follows the flow's ODE, whose end is fixed by its beginning: there
    the student learns a flow map, and one pass can sample tokens that fit together (arXiv 2303.01469).

    Args:
        objective: what the teacher was trained with; its `elbo` is reported. Of a joint one the autoregressive part is
            trained as well.
        teacher: the teacher's workdir; the student starts from its parameters.
        student_steps: passes per canvas in which the student is to sample.
        teacher_steps: the teacher's passes for each of them.
    """

    objective: Any = dataclasses.field(default_factory=ELBO)
    teacher: str = ""
    student_steps: int = 8
    teacher_steps: int = 2

    def __post_init__(self):
        if self.student_steps < 1:
            raise ValueError(f"objective.student_steps must be at least 1; got {self.student_steps}")
        if self.teacher_steps < 2:
            raise ValueError(f"objective.teacher_steps must be at least 2; got {self.teacher_steps}")
        if not self.layout.denoises:
            raise ValueError(f"{type(self.objective).__name__} denoises nothing: distil a diffusion objective")

    @property
    def layout(self) -> Layout:
        return self.objective.layout

    @property
    def trains_ar(self) -> bool:
        return self.objective.trains_ar

    @property
    def frozen(self) -> Mapping[str, str]:
        return {"teacher": self.teacher}

    def elbo(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        return self.objective.elbo(denoise, process, key, batch)

    def __call__(
        self, denoise: Denoise, process: Any, key: Array, batch: Batch, *, teacher: Denoise | None = None
    ) -> dict[str, Loss]:
        if teacher is None:
            raise ValueError("distillation needs its teacher: train with launch.train, which loads objective.teacher")
        batch = self.layout.prepare(batch)
        time_key, noise_key, key = jax.random.split(key, 3)
        noise = (_EmbeddingNoise if isinstance(process, Gaussian) else _TokenNoise)(process, batch)
        t = noise.clip_time(draw_times(time_key, (batch.tokens.shape[0], 1), self.student_steps))
        noisy = noise.corrupt(noise_key, t)
        target = self._teacher_head(teacher, noise, key, noisy, t)
        student, clean = predict(denoise, self.layout, batch, t, **noisy)
        weights = (noised_mask(batch) & ~noise.is_final(noisy, t)).astype(jnp.float32)
        loss = per_target(student, student.weighted_loss(kl_divergence, weights, teacher=target), batch)
        return {"causal": next_token_loss(clean, batch), "canvas": loss} if self.trains_ar else {"canvas": loss}

    def _teacher_head(self, teacher: Denoise, noise: Any, key: Array, noisy: dict, t: Array) -> LogitsHead:
        """For each token, the teacher's prediction in the last pass in which the token was noise."""
        target, size = None, 1.0 / (self.student_steps * self.teacher_steps)
        for i, step_key in enumerate(jax.random.split(key, self.teacher_steps)):
            now, then = noise.clip_time(t - i * size), noise.clip_time(t - (i + 1) * size)
            head, _ = predict(teacher, self.layout, noise.batch, now, **noisy)
            target = head if target is None else head.select(~noise.is_final(noisy, now), target)
            if i + 1 < self.teacher_steps:
                noisy = noise.reverse(jax.random.split(step_key, t.shape[0]), head, noisy, now, then)
        return target


class _TokenNoise(NamedTuple):
    """A batch under a process's noise; a noisy batch is a dict of inputs for `predict`."""

    process: Process
    batch: Batch

    def clip_time(self, t: Array) -> Array:
        return t

    def corrupt(self, key: Array, t: Array) -> dict:
        return {"tokens": corrupt(self.process, key, self.batch, t)}

    def is_final(self, noisy: dict, t: Array) -> Array:
        """bool [B, L]: positions that no further step changes."""
        return self.process.is_final(noisy["tokens"], t[:, 0])

    def reverse(self, keys: Array, head: LogitsHead, noisy: dict, t: Array, s: Array) -> dict:
        """One step t -> s. Each position has its own key, so that the sample doesn't depend on the head's chunks."""

        def step(logits, key, xt, t, s):
            flat = (a.reshape(-1, *a.shape[2:]) for a in (key, logits[:, :, None], xt[..., None], t, s))
            key, *rest = flat
            return self.process.reverse(jax.random.wrap_key_data(key), *rest).reshape(xt.shape)

        tokens, context = self.batch.tokens, self.batch.context_mask
        index = jnp.arange(tokens.shape[1])
        own = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(index))(keys)
        times = (jnp.broadcast_to(a[:, :1], tokens.shape) for a in (t, s))
        xs = head.map_positions(step, jax.random.key_data(own), noisy["tokens"], *times)
        return {"tokens": jnp.where(context, tokens, xs)}


class _EmbeddingNoise(NamedTuple):
    """The same for Gaussian noise; student and teacher each embed the tokens themselves, under one noise."""

    process: Gaussian
    batch: Batch

    def clip_time(self, t: Array) -> Array:
        return jnp.maximum(t, self.process.min_time)

    def corrupt(self, key: Array, t: Array) -> dict:
        embeddings = self.process.corrupt_embeddings(key, ~self.batch.context_mask, t)
        return {"tokens": self.batch.tokens, "embeddings": embeddings}

    def is_final(self, noisy: dict, t: Array) -> Array:
        return jnp.zeros_like(self.batch.context_mask)

    def reverse(self, keys: Array, head: LogitsHead, noisy: dict, t: Array, s: Array) -> dict:
        signal_scale, eps, _ = noisy["embeddings"]
        z = signal_scale[..., None] * jnp.take(head.embeddings, self.batch.tokens, axis=0) + eps
        z = self.process.reverse(keys, head.expected_embedding(), z, t[:, 0], s[:, 0], churn=0.0)
        return noisy | {"embeddings": self.process.as_embeddings(z, ~self.batch.context_mask, s)}


def kl_divergence(logits: Array, teacher: Array) -> Array:
    """KL(softmax(teacher) | softmax(logits)): [..., W] twice -> [...]."""
    p = jax.nn.softmax(teacher, axis=-1)
    log_ratio = jax.nn.log_softmax(teacher, axis=-1) - jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(jnp.where(p > 0, p * log_ratio, 0.0), axis=-1)
