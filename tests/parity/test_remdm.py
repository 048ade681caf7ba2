"""ReMDM's public code (arXiv 2503.00307) on its stored random network: each stored pass replayed with our law.

A pass there draws the token with the largest probability / (1e-10 - log(u + 1e-10)) from stored uniforms u; the same
rule on our probabilities must give the same canvas. Times run down to 1e-5 there; passes are replayed between those.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.samplers.base import Canvas
from diffusion_lm.samplers.draw import Draw
from diffusion_lm.samplers.remasking import Cap, ConfidenceBased, Loop, Remasking, Rescale

MASK, HEADS, PASSES, EPS = 60, 4, 16, 1e-5


@pytest.fixture(scope="module")
def stored(shared):
    path = shared / "parity/remdm/io.npz"
    if not path.is_file():
        pytest.skip(f"no stored numbers of remdm: {path} is absent")
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def network(shared):
    safetensors = pytest.importorskip("safetensors.numpy")
    weights = safetensors.load_file(shared / "parity/remdm/model.safetensors")
    return {name.removeprefix("backbone."): jnp.asarray(array) for name, array in weights.items()}


def normed(x, weight):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight[None, None]


def rotated(x):
    """[B, L, H, D]: each of the first half of D with its partner in the second."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] / 10_000 ** (np.arange(half) / half)[None]
    cos, sin = (jnp.asarray(f(np.tile(angle, 2)), jnp.float32)[None, :, None] for f in (np.cos, np.sin))
    turned = jnp.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cos + turned * sin


@jax.jit
def backbone(w, tokens, sigma):
    """MDLM's transformer: tokens [B, L], sigma [B] -> logits [B, L, V + 1]."""

    def linear(name, x):
        y = jnp.einsum("...i,oi->...o", x, w[f"{name}.weight"], precision="highest")
        bias = w.get(f"{name}.bias")
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

    angle = sigma[:, None] * jnp.exp(-np.log(10_000) * jnp.arange(128) / 128)[None]
    wave = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    c = jax.nn.silu(linear("sigma_map.mlp.2", jax.nn.silu(linear("sigma_map.mlp.0", wave))))

    def modulation(name, parts):
        return jnp.split(linear(f"{name}.adaLN_modulation", c)[:, None], parts, axis=-1)

    x = w["vocab_embed.embedding"][tokens]
    rows, length, width = x.shape
    for i in range(2):
        name = f"blocks.{i}"
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation(name, 6)
        h = normed(x, w[f"{name}.norm1.weight"]) * (1 + scale) + shift
        qkv = linear(f"{name}.attn_qkv", h).reshape(rows, length, 3, HEADS, width // HEADS)
        q, k, v = rotated(qkv[:, :, 0]), rotated(qkv[:, :, 1]), qkv[:, :, 2]
        scores = jnp.einsum("bihd,bjhd->bhij", q, k, precision="highest") / np.sqrt(width // HEADS)
        read = jnp.einsum("bhij,bjhd->bihd", jax.nn.softmax(scores, axis=-1), v, precision="highest")
        x = x + gate * linear(f"{name}.attn_out", read.reshape(rows, length, width))
        h = normed(x, w[f"{name}.norm2.weight"]) * (1 + scale_mlp) + shift_mlp
        x = x + gate_mlp * linear(f"{name}.mlp.2", jax.nn.gelu(linear(f"{name}.mlp.0", h), approximate=True))
    shift, scale = modulation("output_layer", 2)
    h = normed(x, w["output_layer.norm_final.weight"]) * (1 + scale) + shift
    return linear("output_layer.linear", h)


@pytest.mark.parametrize("which", ["model", "true"])
def test_the_network_is_the_stored_one(stored, network, which):
    sigma = stored["forward/sigma"] * (which == "true")
    logits = backbone(network, stored["forward/xt"], sigma)
    np.testing.assert_allclose(logits, stored[f"forward/backbone_logits_{which}_sigma"], atol=2e-5)


class ForwardBackward(Cap):
    """The plain corrector they compare with: sigma = (alpha_s - alpha_t) / alpha_t, too much in the last pass."""

    def sigma(self, t, most, standing, probability):
        return ((1 - EPS) / PASSES / jnp.maximum(1 - t, 1e-9))[:, None]


class Peer(Draw):
    """Their nucleus leaves out the token that crosses p, ours has it: top_p, as they draw."""

    def sharpened(self, logits):
        p = jax.nn.softmax(logits, axis=-1)
        order = jnp.argsort(-p, axis=-1)
        within = jnp.cumsum(jnp.take_along_axis(p, order, axis=-1), axis=-1) <= self.top_p
        kept = jnp.take_along_axis(within.at[..., 0].set(True), jnp.argsort(order, axis=-1), axis=-1)
        return jnp.where(kept, logits, -jnp.inf)


RUNS = {  # what the peer was given: its eta isn't stored with the runs, but no other replays them
    "remdm-cap": (Cap(eta=0.1), Draw()),
    "remdm-cap_topp0.9": (Cap(eta=0.1), Peer(top_p=0.9)),
    "remdm-rescale": (Rescale(eta=0.3), Draw()),
    "remdm-conf": (ConfidenceBased(), Draw()),
    "remdm-loop": (Loop(eta=0.05), Draw()),
    "forward-backward": (ForwardBackward(), Draw()),
}


def replayed(stored, network, name, remask, draw=Draw(), overshoots=()):  # noqa: B008  (frozen)
    """int [passes]: at how many of the 2 x 24 positions our law draws another token than the peer."""
    sampler = Remasking(process=Absorbing(mask=MASK), passes=PASSES, eot=-1, remask=remask, draw=draw)
    before, after, times, uniforms = (
        stored[f"sampler/{name}_s16/{part}"] for part in ("x_in", "x_out", "t", "tape/torch.rand_like")
    )
    probability, differ = jnp.zeros(before[0].shape), []
    for k, (x, expected, u) in enumerate(zip(before, after, uniforms, strict=True)):
        x, t = jnp.asarray(x), jnp.asarray(times[k][:, 0])
        at, to = remask.times(t, t - (1 - EPS) / PASSES)
        if k in overshoots:
            to = 1 - (1 - t + (1 - EPS) / PASSES) * remask.alpha_on / (1 - remask.t_on)
        logits = draw.sharpened(backbone(network, x, jnp.zeros(2))[..., :MASK])
        everywhere = jnp.ones(x.shape, bool)
        canvas = Canvas(
            tokens=x, open=everywhere, given=~everywhere, probability=probability, keys=None, passes=jnp.array(k)
        )
        weights = sampler.probabilities(logits, x, at, to, sampler.sigma(canvas, t, at, to))
        drawn = np.argmax(np.asarray(weights, np.float64) / (1e-10 - np.log(u + 1e-10)), axis=-1)
        differ.append(int((drawn != expected).sum()))
        probability = sampler._written(jnp.asarray(expected), canvas, logits)
    return np.array(differ)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "remdm-loop"])
def test_every_pass_replays(stored, network, name):
    assert (replayed(stored, network, name, *RUNS[name]) == 0).all()


def test_a_loop_replays_but_for_the_pass_that_enters_it(stored, network):
    """Pass 7 begins before t_on and ends behind it. There they go on past alpha_on, up to alpha = 1, and we stop."""
    differ = replayed(stored, network, "remdm-loop", *RUNS["remdm-loop"])
    assert (np.flatnonzero(differ) == [7]).all()
    assert (replayed(stored, network, "remdm-loop", *RUNS["remdm-loop"], overshoots=[7]) == 0).all()


def test_another_share_does_not_replay(stored, network):
    """Nor do sharper logits, so that the replays above say something."""
    for name, wrong in (("cap", Cap(eta=0.09)), ("rescale", Rescale(eta=0.28)), ("conf", Cap(eta=0.1))):
        assert replayed(stored, network, f"remdm-{name}", wrong).sum() > 2
    warm = replayed(stored, network, "remdm-conf", ConfidenceBased(), Draw(temperature=0.9))
    assert warm.sum() > 2
