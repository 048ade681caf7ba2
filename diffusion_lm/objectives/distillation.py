"""Distillation through time: in one pass what a trained network says after two (SDTT, arXiv 2410.21035).

From a text noised at t the teacher goes back a student's step, 1 / steps, in `passes` passes of its own; the student,
asked at t, learns what the teacher said of each token in the last pass that had it to write. A student of n steps can
teach one of n / 2.

What a pass writes side by side it still draws independently, so that the most to be learned are the teacher's marginals
after its passes: of a teacher whose passes agree with one another these are what it says at once, and nothing is won.
Under noise on vectors (`processes.gaussian`) the teacher follows the flow's ODE instead, whose end is settled by where
it begins: there the student learns a flow map, and one pass can write tokens that fit each other (arXiv 2303.01469).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_lm.layouts import Layout, WholeRow
from diffusion_lm.objectives.autoregressive import next_token_loss
from diffusion_lm.objectives.elbo import ELBO, draw_times, one_text
from diffusion_lm.processes.base import Process
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.types import Batch, Denoise, LogitsHead, Loss, loss_of

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """objective  what the teacher was trained by, whose bound is reported; of a joint one the causal part is trained on
    teacher    its workdir; `diffusion_lm.build` loads it, and begins with its parameters
    steps      passes a canvas in which the student is to write
    passes     the teacher's passes in each of them
    """

    objective: Any = dataclasses.field(default_factory=ELBO)
    teacher: str = ""
    student_steps: int = 8
    teacher_steps: int = 2

    def __post_init__(self):
        if self.student_steps < 1 or self.teacher_steps < 2:
            raise ValueError(
                f"objective.num_timesteps={self.student_steps} must be at least 1, objective.passes={self.teacher_steps} 2"
            )
        if not self.layout.denoises:
            raise ValueError(f"{type(self.objective).__name__} denoises nothing: there is nothing to distil")

    @property
    def layout(self) -> Layout:
        return self.objective.layout

    @property
    def trains_ar(self) -> bool:
        return self.objective.trains_ar

    def bound(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        """The teacher's objective's, of the student."""
        return getattr(self.objective, "bound", self.objective)(denoise, process, key, batch)

    def __call__(
        self, denoise: Denoise, process: Any, key: Array, batch: Batch, *, teacher: Denoise | None = None
    ) -> dict[str, Loss]:
        """The divergence from the teacher to the student, at noised tokens; no gradient flows to the teacher.
        ValueError where nobody has loaded one."""
        if teacher is None:
            raise ValueError("distillation needs its teacher: train with launch.train, which loads objective.teacher")
        batch = one_text(batch) if self.layout == WholeRow() else batch
        time_key, noise_key, key = jax.random.split(key, 3)
        noise = (_OnVectors if isinstance(process, Gaussian) else _OnTokens)(process, batch)
        t = noise.at(draw_times(time_key, (batch.tokens.shape[0], 1), self.student_steps))
        noised = noise.laid(noise_key, t)
        said = self._taught(teacher, noise, key, noised, t)
        student, clean = self._read(denoise, batch, noised, t)
        wanted = ~batch.context_mask & (batch.segment_ids > 0) & ~noise.done(noised, t)
        total = student.weighted_loss(_divergence, wanted.astype(jnp.float32), teacher=said)
        loss = {"canvas": loss_of(student, total, jnp.sum(batch.loss_mask, dtype=jnp.float32))}
        return {"causal": next_token_loss(clean, batch), **loss} if self.trains_ar else loss

    def _taught(self, teacher: Denoise, noise: Any, key: Array, noised: dict, t: Array) -> LogitsHead:
        """Of each token, what was said in the last pass that had it to write."""
        said, size = None, 1.0 / (self.student_steps * self.teacher_steps)
        for i, pass_key in enumerate(jax.random.split(key, self.teacher_steps)):
            now, then = noise.at(t - i * size), noise.at(t - (i + 1) * size)
            head, _ = self._read(teacher, noise.batch, noised, now)
            said = head if said is None else head.select(~noise.done(noised, now), said)
            if i + 1 < self.teacher_steps:
                noised = noise.back(jax.random.split(pass_key, t.shape[0]), head, noised, now, then)
        return said

    def _read(self, denoise: Denoise, batch: Batch, noised: dict, t: Array):
        where = {"positions": batch.positions, "segment_ids": batch.segment_ids}
        if self.layout == WholeRow():
            return denoise(t=t, attention=self.layout.attention, **noised, **where), None
        self.layout.check_row(batch.tokens.shape[1])
        attention = self.layout.attention
        both, times = attention.join(noised["tokens"], batch.tokens), attention.join(t, jnp.zeros_like(t))
        return denoise(both, times, attention=attention, **where)


class _OnTokens(NamedTuple):
    """A text under a process's noise, as a network is asked of it."""

    process: Process
    batch: Batch

    def at(self, t: Array) -> Array:
        return t

    def laid(self, key: Array, t: Array) -> dict:
        return self._given(self.process.corrupt(key, self.batch.tokens, t))

    def done(self, noised: dict, t: Array) -> Array:
        """bool [B, L]: nothing is left to say."""
        return self.process.is_final(noised["tokens"], t[:, 0])

    def back(self, keys: Array, head: LogitsHead, noised: dict, t: Array, s: Array) -> dict:
        """One position at a time, each with a key of its own: however a readout parts them, the draws are these."""

        def one(logits, at, xt):
            row = (jax.vmap(jax.random.fold_in)(keys, at), logits[:, None], xt[:, None], t[:, 0], s[:, 0])
            return self.process.reverse(*row)[:, 0]

        at = jnp.broadcast_to(jnp.arange(self.batch.tokens.shape[1])[None], self.batch.tokens.shape)
        return self._given(head.map_positions(jax.vmap(one, 1, 1), at, noised["tokens"]))

    def _given(self, xt: Array) -> dict:
        return {"tokens": jnp.where(self.batch.context_mask, self.batch.tokens, xt)}


class _OnVectors(NamedTuple):
    """The same under Gaussian noise; each network sees its own vectors under one noise."""

    process: Gaussian
    batch: Batch

    def at(self, t: Array) -> Array:
        return jnp.maximum(t, self.process.least)

    def laid(self, key: Array, t: Array) -> dict:
        return {"tokens": self.batch.tokens, "embeddings": self.process.mixed(key, ~self.batch.context_mask, t)}

    def done(self, noised: dict, t: Array) -> Array:
        return jnp.zeros_like(self.batch.context_mask)

    def back(self, keys: Array, head: LogitsHead, noised: dict, t: Array, s: Array) -> dict:
        keep, more, _ = noised["embeddings"]
        z = keep[..., None] * jnp.take(head.embeddings, self.batch.tokens, axis=0) + more
        z = self.process.reverse(keys, head.expected_embedding(), z, t[:, 0], s[:, 0], churn=0.0)
        return noised | {"embeddings": self.process.held(z, ~self.batch.context_mask, s)}


def _divergence(logits: Array, said: Array) -> Array:
    """KL(softmax(said) | softmax(logits)): [..., W] twice -> [...]."""
    p, log_ratio = (
        jax.nn.softmax(said, axis=-1),
        jax.nn.log_softmax(said, axis=-1) - jax.nn.log_softmax(logits, axis=-1),
    )
    return jnp.sum(jnp.where(p > 0, p * log_ratio, 0.0), axis=-1)
