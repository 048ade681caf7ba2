"""An optimizer: gradient descent with momentum."""

import dataclasses

import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Momentum:
    """The rate falls linearly to zero."""

    lr: float = 0.02
    momentum: float = 0.9

    def rate(self, steps: int):
        return lambda step: jnp.float32(self.lr) * (1 - step / steps)

    def build(self, steps: int, boxed) -> optax.GradientTransformation:
        del boxed
        return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(self.rate(steps), momentum=self.momentum))
