"""The bound of noise on vectors against the entropy of a world in which the best network is known (`vectors`)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.oracle import LENGTH, TEXTS, batch_of, entropy, truth
from support.vectors import PROCESS, VECTORS, Seer

from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.embedding_flow import EmbeddingFlowLoss
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.gaussian import Gaussian

ROWS, DRAWS = 16_384, 12
PARTS = EmbeddingFlowLoss().elbo, EmbeddingFlowLoss()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _cost(process, seer, texts, keys):
    """Nats a text [draws], by the bound and by the cross-entropy."""
    batch = batch_of(texts)

    def one(key):
        bound, trained = (
            part(seer, process, own, batch) for part, own in zip(PARTS, jax.random.split(key), strict=True)
        )
        return bound["canvas"].mean * LENGTH, trained["canvas"].mean * LENGTH

    return jax.lax.map(one, keys)


def costs(process=PROCESS, **seer):
    """Mean and standard error over texts in their proportions, all noise drawn anew."""
    counts = np.floor(truth() * ROWS + 0.5).astype(int)
    texts = np.repeat(TEXTS, counts, axis=0)[:ROWS]
    own = -np.log(truth()[texts @ np.array([27, 9, 3, 1])]).mean()  # of these texts, in place of the entropy
    bound, trained = (
        np.asarray(a) for a in _cost(process, Seer(process, **seer), texts, jax.random.split(jax.random.key(0), DRAWS))
    )
    return bound.mean() - own + entropy(), bound.std(ddof=1) / np.sqrt(DRAWS), trained.mean()


def test_the_best_networks_bound_is_the_entropy():
    """Whatever the noise's size: that only bends time. Weights that are 5 % off show."""
    bound, error, _ = costs(dataclasses.replace(PROCESS, noise=2.5, min_time=PROCESS.min_time / 2.5))
    assert error < 0.06 and abs(bound - entropy()) < 3 * error


def test_any_other_networks_lies_above_and_it_pays_more_in_training():
    best, other = costs(), costs(bumps=1.0)
    assert other[0] > entropy() + 0.1 and other[2] > best[2] + 0.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongWeight(Gaussian):
    """The signal-to-noise ratio's derivative without its half."""

    def snr_rate(self, t):
        return 2 * super().snr_rate(t)


def test_a_wrong_weight_is_noticed():
    fields = {field.name: getattr(PROCESS, field.name) for field in dataclasses.fields(PROCESS)}
    assert abs(costs(WrongWeight(**fields))[0] - entropy()) > 1.0


def test_where_the_path_ends_is_paid_by_reading_what_is_left():
    """An early end costs a little more, since its tokens are drawn side by side, and never less than the entropy."""
    early, error, _ = costs(dataclasses.replace(PROCESS, min_time=0.45))
    assert entropy() - 4 * error < early < entropy() + 0.3


@functools.partial(jax.jit, static_argnames="elbo")
def _asked(tokens, elbo=False):
    """What the network is asked of texts whose first two tokens are given, what it says, and the loss."""
    seen = []

    def denoise(tokens, t, *, embeddings, **where):
        seen.append((embeddings, Seer()(tokens, t, embeddings=embeddings, **where)))
        return seen[-1][1]

    ask = EmbeddingFlowLoss().elbo if elbo else EmbeddingFlowLoss()
    return ask(denoise, PROCESS, jax.random.key(0), batch_of(tokens, context_mask=2))["canvas"], seen


def test_given_tokens_are_clean_and_cost_nothing():
    loss, ((mixed, _), (last, _)) = _asked(TEXTS[:5], elbo=True)
    for keep, more, told in (mixed, last):
        assert (keep[:, :2] == 1).all() and (more[:, :2] == 0).all() and (told[:, :2] == 0).all()
        assert (keep[:, 2:] < 1).all() and (more[:, 2:] != 0).all() and (told[:, 2:] > 0).all()
    assert loss.weight == 10


def test_half_of_the_rows_learn_beside_clean_text_which_costs_nothing():
    tokens = np.tile(TEXTS[:5], (200, 1))
    loss, (((keep, more, told), head),) = _asked(tokens)
    clean = np.asarray(keep == 1)
    assert clean[:, :2].all() and not np.asarray(more)[clean].any() and not np.asarray(told)[clean].any()
    assert 0.2 < clean[:, 2:].mean() < 0.3 and 0.28 < clean[:, 2:].any(axis=1).mean() < 0.39  # 1/4; 1/2 E[1 - (1-u)^2]
    noised = (~clean).astype(np.float32)
    np.testing.assert_allclose(loss.sum, head.cross_entropy(jnp.asarray(tokens), jnp.asarray(noised)), rtol=1e-5)
    assert loss.weight == 2000


def test_what_a_vector_says_by_itself_is_its_likelihood():
    """log N(z; alpha e, sigma^2) of each piece, but for what all pieces have in common."""
    t, noised = jnp.full((1, 1), 0.6), jnp.ones((1, 4), bool)
    z = 2 * jax.random.normal(jax.random.key(0), (1, 4, 2))
    alpha, sigma = PROCESS.alpha_sigma(t)
    said = PROCESS.as_embeddings(z, noised, t).logit_scale[..., None] * z @ VECTORS.T
    away = z[:, :, None] - alpha.item() * jnp.asarray(VECTORS)[None, None]
    whole = -jnp.sum(away**2, axis=-1) / (2 * sigma.item() ** 2)
    np.testing.assert_allclose(jax.nn.log_softmax(said), jax.nn.log_softmax(whole), atol=1e-4)


def test_noise_and_objective_must_go_together():
    batch = batch_of(TEXTS[:5])
    with pytest.raises(ValueError, match="set objective=EmbeddingFlowLoss"):
        ELBO()(Seer(), PROCESS, jax.random.key(0), batch)
    with pytest.raises(ValueError, match=r"set process=Gaussian\(\)"):
        EmbeddingFlowLoss()(Seer(), Absorbing(mask=3), jax.random.key(0), batch)


@pytest.mark.parametrize("bad", [{"noise": 0.0}, {"noise": float("nan")}, {"min_time": 0.0}, {"min_time": 1.0}])
def test_a_path_that_can_not_be_is_refused(bad):
    with pytest.raises(ValueError, match=r"process\.(noise|min_time)"):
        Gaussian(**bad)


@pytest.mark.parametrize("churn", [0.0, 0.5, 1.0])
def test_a_step_back_keeps_the_noise_s_law(churn):
    """Knowing x_0, z_t -> z_s is distributed as z_s: mean alpha_s e, standard deviation sigma_s."""
    rows, t, s = 200_000, jnp.full(1, 0.8), jnp.full(1, 0.3)
    e, eps = jnp.ones((1, rows, 2)), jax.random.normal(jax.random.key(0), (1, rows, 2))
    (alpha, sigma), (alpha_s, sigma_s) = ((a[0] for a in PROCESS.alpha_sigma(at)) for at in (t, s))
    z = PROCESS.reverse(jax.random.split(jax.random.key(1), 1), e, alpha * e + sigma * eps, t, s, churn)
    assert abs(float(z.mean() - alpha_s)) < 5 * float(sigma_s) / np.sqrt(2 * rows)
    assert abs(float(z.std() / sigma_s) - 1) < 0.01
    moved = np.corrcoef(np.asarray(z).ravel(), np.asarray(eps).ravel())[0, 1]
    assert moved > 0.999 if churn == 0 else moved < 0.99
