"""Every option of a layer and of a network against a plain float64 network, with and without a cache."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small import FLOAT32, denoise_canvas, extend, module_of, read, rows

from diffusion_lm.attention_patterns import BlockCausal, BlockDiffusionTraining, Causal, Full
from diffusion_lm.models.base import DenoiserSpec, TransformerSpec, Vocabulary
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.models.transformer import Transformer, init_params
from diffusion_lm.nn.rope import rotate, rotation_of
from diffusion_lm.nn.specs import (
    AttentionSpec,
    ExpertsSpec,
    LayerGroup,
    LayerSpec,
    MLPSpec,
    NormSpec,
    RopeScaling,
    RopeSpec,
)
from diffusion_lm.types import DenseLogits

CLOSE = {"rtol": 0, "atol": 3e-5}
SIZES = {"heads": 4, "kv_heads": 2, "head_dim": 8}


def spec_of(*layers: LayerSpec, **fields) -> TransformerSpec:
    return TransformerSpec(width=16, groups=tuple(LayerGroup(layer=layer, repeat=2) for layer in layers), **fields)


def layer(mlp=None, *, norm=None, post_norm=None, **attention) -> LayerSpec:
    fields = {"attention": AttentionSpec(**SIZES | attention), "mlp": mlp or MLPSpec(dim=24)}
    return LayerSpec(**fields, norm=norm or NormSpec(), post_norm=post_norm)


PLUS_ONE, LAYER_NORM = NormSpec(offset=1.0), NormSpec(kind="layer", eps=1e-5, bias=True)
SPECS = {
    "biases of q, k and v, another eps": spec_of(layer(norm=NormSpec(eps=1e-2), qkv_bias=True), tie_embeddings=True),
    "layer norms with bias, plain gelu, all biases, no rope": spec_of(
        layer(MLPSpec(dim=24, gated=False, activation="gelu_tanh", bias=True),
              norm=LAYER_NORM, qkv_bias=True, out_bias=True, rope=None),
        final_norm=LAYER_NORM,
    ),
    "sandwich norms, sliding and full, two ropes, scaled embedding, soft cap": spec_of(
        layer(MLPSpec(dim=24, activation="gelu_tanh"), norm=PLUS_ONE, post_norm=PLUS_ONE, qk_norm=PLUS_ONE, window=3),
        layer(MLPSpec(dim=24, activation="gelu_tanh"), norm=PLUS_ONE, post_norm=PLUS_ONE, rope=RopeSpec(theta=1e6)),
        final_norm=PLUS_ONE, embedding_scale=4.0, logit_softcap=2.0,
    ),
    "squared relu, layer norms without bias, half of each head turned": spec_of(
        layer(MLPSpec(dim=24, gated=False, activation="relu2"), norm=NormSpec(kind="layer"),
              rope=RopeSpec(fraction=0.5)),
    ),
    "dense, then experts": spec_of(layer(), layer(ExpertsSpec(dim=12, num_experts=4, num_experts_per_token=2))),
}  # fmt: skip


@functools.cache
def network(spec: TransformerSpec, vocabulary: Vocabulary | None = None) -> BoundModel:
    """Every parameter away from where it starts."""
    module = module_of(spec) if vocabulary is None else Transformer(spec, vocabulary, FLOAT32)
    params = nn.meta.unbox(jax.jit(functools.partial(init_params, module))(jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: jnp.asarray(a + rng.normal(scale=0.25, size=a.shape), jnp.float32), params)
    return BoundModel(module=module, params=params)


# A plain network: one layer at a time, one head at a time, all pairs of positions.


def reference(net: BoundModel, tokens, causal: bool) -> np.ndarray:
    spec, params = net.module.spec, jax.tree.map(lambda a: np.asarray(a, np.float64), net.for_sampling().params)
    x = params["embedding"][np.asarray(tokens)] * spec.embedding_scale
    layers = [group.layer for group in spec.groups for _ in range(group.repeat)]
    for i, one in enumerate(layers):
        p = params[f"layer_{i}"]
        parts = {
            "attention": functools.partial(_attention, one.attention, p["attention"], causal=causal),
            "mlp": functools.partial(_experts if "experts" in p else _mlp, one.mlp, p.get("mlp") or p["experts"]),
        }
        for name, part in parts.items():
            h = part(_norm(one.norm, p[f"{name}_norm"], x))
            x = x + (h if one.post_norm is None else _norm(one.post_norm, p[f"{name}_post_norm"], h))
    x = _norm(spec.final_norm, params["final_norm"], x)
    logits = x @ params["embedding" if spec.tie_embeddings else "unembedding"].T
    logits = spec.logit_softcap * np.tanh(logits / spec.logit_softcap) if spec.logit_softcap else logits
    return logits[..., : net.module.vocabulary.size]


def _norm(spec, p, x):
    if spec.kind == "layer":
        x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + spec.eps)
    else:
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + spec.eps)
    return x * (spec.offset + p["scale"]) + (p["bias"] if spec.bias else 0.0)


def _attention(a, p, x, causal):
    q, kv = np.einsum("ble,ehd->blhd", x, p["query"]), np.einsum("ble,ecgd->blcgd", x, p["key_value"])
    if a.qkv_bias:
        q, kv = q + p["query_bias"], kv + p["key_value_bias"]
    k, v = kv[:, :, 0], kv[:, :, 1]
    if a.qk_norm is not None:
        q, k = _norm(a.qk_norm, p["query_norm"], q), _norm(a.qk_norm, p["key_norm"], k)
    if a.rope is not None:
        q, k = _turned(a.rope, q), _turned(a.rope, k)
    at = np.arange(x.shape[1])
    seen = at[None] <= at[:, None] if causal else np.ones((len(at), len(at)), bool)
    seen = seen & (abs(at[None] - at[:, None]) < a.window) if a.window else seen
    out = 0.0
    for head in range(a.heads):
        group = head // (a.heads // a.kv_heads)
        scores = np.where(seen, q[:, :, head] @ k[:, :, group].swapaxes(1, 2) / np.sqrt(a.head_dim), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = out + (weights / weights.sum(axis=-1, keepdims=True)) @ v[:, :, group] @ p["output"][head]
    return out + p["output_bias"] if a.out_bias else out


def _turned(rope, x):
    """Pairs of columns as complex numbers."""
    pairs = int(x.shape[-1] * rope.fraction) // 2
    rates = np.array([rope.theta ** (-2 * i / (2 * pairs)) for i in range(pairs)])
    turn = np.exp(1j * np.arange(x.shape[1])[:, None] * rates)[:, None]
    turned = (x[..., :pairs] + 1j * x[..., pairs : 2 * pairs]) * turn
    return np.concatenate([turned.real, turned.imag, x[..., 2 * pairs :]], axis=-1)


ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


def _mlp(m, p, x):
    hidden = np.einsum("ble,ecm->blcm", x, p["gate_up"]) + (p["gate_up_bias"] if m.bias else 0.0)
    gate = ACTIVATIONS[m.activation](hidden[:, :, 0])
    return (gate * hidden[:, :, 1] if m.gated else gate) @ p["down"] + (p["down_bias"] if m.bias else 0.0)


def _experts(m, p, x):
    scores, out = x @ p["router"], np.zeros_like(x)
    for b, i in np.ndindex(*x.shape[:2]):
        best = np.argsort(-scores[b, i])[: m.num_experts_per_token]
        gates = np.exp(scores[b, i, best])
        for gate, e in zip(gates / gates.sum(), best, strict=True):
            first, second = np.einsum("e,ecm->cm", x[b, i], p["gate_up"][e])
            out[b, i] += gate * (ACTIVATIONS["silu"](first) * second) @ p["down"][e]
    return out


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", SPECS)
def test_a_network_is_the_plain_one(name):
    net, tokens = network(SPECS[name]), rows(9)
    for attention in (Causal(), Full()):
        expected = reference(net, tokens, attention == Causal())
        np.testing.assert_allclose(read(net, tokens, attention), expected, **CLOSE)


@pytest.mark.cases(2)
@pytest.mark.parametrize("name", SPECS)
def test_with_a_cache_it_is_the_same(name):
    net, tokens = network(SPECS[name]).for_sampling(), rows(9)
    expected = read(network(SPECS[name]), tokens, Causal())
    first, cache = extend(net, net.empty_cache(2, 9), tokens[:, :5], jnp.full(2, 5), Causal())
    rest, _ = extend(net, cache, tokens[:, 5:], jnp.full(2, 4), Causal())
    np.testing.assert_allclose(jnp.concatenate([first, rest], axis=1), expected, **CLOSE)


def test_a_canvas_of_a_sliding_layer_is_the_noisy_block_of_training():
    """The window reaches from the canvas into the cache, as from a noisy block into the clean text."""
    net, clean, noisy = network(spec_of(layer(window=3))), rows(8), rows(8, seed=1)
    pattern = BlockDiffusionTraining(4, Causal())
    trained, _ = read(net, pattern.join(clean.at[:, 4:].set(noisy[:, 4:]), clean), pattern, length=8)
    sampling = net.for_sampling()
    _, cache = extend(sampling, sampling.empty_cache(2, 8), clean[:, :4], jnp.full(2, 4), Causal())
    found = denoise_canvas(sampling, cache, noisy[:, 4:], jnp.zeros(2))
    np.testing.assert_allclose(found, trained[:, 4:], **CLOSE)
    wide = net.replace(module=net.module.clone(spec=spec_of(layer())))
    assert abs(read(wide, clean, Full()) - read(net, clean, Full())).max() > 1e-2


# Positions beyond those of pretraining.


def _rates(scaling: RopeScaling, theta=10_000.0, pairs=16):
    """Frequency by frequency, as the papers and model cards describe it."""
    length, found = scaling.original_length, []
    for i in range(pairs):
        rate = theta ** (-i / pairs)
        wavelength = 2 * math.pi / rate
        if scaling.kind == "linear":
            share = 0.0
        elif scaling.kind == "llama3":
            if wavelength < length / scaling.high:
                share = 1.0
            elif wavelength > length / scaling.low:
                share = 0.0
            else:
                share = (length / wavelength - scaling.low) / (scaling.high - scaling.low)
        else:

            def pair_of(turns):
                return 2 * pairs * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

            low, high = math.floor(pair_of(scaling.high)), math.ceil(pair_of(scaling.low))
            share = 1 - min(max((i - low) / (high - low), 0), 1)
        found.append(share * rate + (1 - share) * rate / scaling.factor)
    return np.array(found)


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling(kind="linear", factor=4.0),
        RopeScaling(kind="llama3", factor=8.0, original_length=512, low=1.0, high=4.0),
        RopeScaling(kind="yarn", factor=4.0, original_length=512, low=1.0, high=32.0),
    ],
    ids=lambda s: s.kind,
)
def test_scaled_rope_turns_as_published(scaling):
    """Angles frequency by frequency; a rotation keeps each vector's length, times YaRN's magnitude."""
    rope, positions = RopeSpec(scaling=scaling), jnp.asarray([[0, 1, 700]], jnp.int32)
    rotation, angles = rotation_of(rope, positions, 32), np.array([0, 1, 700])[:, None] * _rates(scaling)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 3, 32)), jnp.float32)
    magnitude = 0.1 * math.log(scaling.factor) + 1.0 if scaling.kind == "yarn" else 1.0
    np.testing.assert_allclose(rotation.cos[0], magnitude * np.cos(angles), atol=1e-3)
    np.testing.assert_allclose(rotation.sin[0], magnitude * np.sin(angles), atol=1e-3)
    np.testing.assert_allclose(rotate(x, rotation)[:, :, 0], magnitude * x[:, :, 0], rtol=1e-6)
    norms = (jnp.linalg.norm(a, axis=-1) for a in (rotate(x, rotation), magnitude * x))
    np.testing.assert_allclose(*norms, rtol=1e-5)


def test_layers_share_one_rotation():
    """The compiler computes no angle's cosine anew for a layer's queries or keys."""

    def turned(x, positions):
        rotation = rotation_of(RopeSpec(), positions, 32)
        for _ in range(3):
            x = jnp.tanh(rotate(x, rotation))
        return x

    arguments = jnp.ones((1, 2, 16, 32)), jnp.arange(16, dtype=jnp.int32)[None]
    text = jax.jit(turned).lower(*arguments).compile().as_text()
    assert len(re.findall(r" cosine\(", text)) == len(re.findall(r" sine\(", text)) == 1


# The vocabulary.


def test_a_mask_inside_the_vocabulary_is_never_predicted():
    vocabulary = Vocabulary(size=11, mask=4, suppressed=(2, 9))
    net, tokens = network(SPECS["dense, then experts"], vocabulary), rows(6)
    assert vocabulary.never == (2, 4, 9) and Vocabulary(size=11, mask=11).never == ()
    logits = read(net, tokens, Full())
    assert (np.isneginf(logits) == np.isin(np.arange(11), vocabulary.never)).all()
    allowed = [i for i in range(11) if i not in vocabulary.never]
    expected = read(network(SPECS["dense, then experts"], Vocabulary(size=11, mask=11)), tokens, Full())
    np.testing.assert_array_equal(logits[..., allowed], expected[..., allowed])


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_loss_and_its_gradient_are_those_of_the_logits(softcap):
    """With ids that are never predicted and with a soft cap; chunk by chunk as for all logits at once."""
    spec = dataclasses.replace(SPECS["biases of q, k and v, another eps"], logit_softcap=softcap)
    net, targets = network(spec, Vocabulary(size=11, mask=4)), jnp.where(rows(6) == 4, 5, rows(6))
    at, weights = jnp.broadcast_to(jnp.arange(6)[None], (2, 6)), jnp.ones((2, 6))

    def loss(params, dense):
        t, where = jnp.zeros((2, 1)), {"positions": at, "segment_ids": None}
        head = net.replace(params=params).denoise(rows(6), t, attention=Full(), **where)
        return (DenseLogits(values=head.logits()) if dense else head).cross_entropy(targets, weights)

    one, other = (jax.value_and_grad(loss)(net.params, dense) for dense in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other)


# A head that predicts the next token.

PLAIN = spec_of(layer())
SHIFTED = dataclasses.replace(PLAIN, logit_shift=True)


def shifted(logits):
    return jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1)


def test_a_shifted_head_is_the_other_one_moved_by_a_position():
    plain, net, tokens = network(PLAIN), network(SHIFTED), rows(8)
    for attention in (Full(), BlockCausal(4)):
        np.testing.assert_array_equal(read(net, tokens, attention), shifted(read(plain, tokens, attention)))
    np.testing.assert_array_equal(read(net, tokens, Causal()), read(plain, tokens, Causal()))
    at = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32)[None], (2, 8))
    documents = {"segment_ids": 1 + at // 5, "positions": jnp.where(at < 5, at, at - 5)}
    found, before = (read(one, tokens, Full(), **documents) for one in (net, plain))
    expected = jnp.concatenate([shifted(before[:, :5]), shifted(before[:, 5:])], axis=1)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("clean", [Causal(), BlockCausal(4)], ids=str)
def test_a_shifted_canvas_follows_the_cache_as_a_noisy_block_follows_the_clean_text(clean):
    net, text, noisy = network(SHIFTED), rows(12), rows(12, seed=1)
    pattern = BlockDiffusionTraining(4, clean)
    trained, _ = read(net, pattern.join(noisy, text), pattern, length=12)
    sampling = net.for_sampling()
    cache = sampling.empty_cache(2, 12)
    np.testing.assert_allclose(denoise_canvas(sampling, cache, noisy[:, :4], jnp.zeros(2)), trained[:, :4], **CLOSE)
    _, cache = extend(sampling, cache, text[:, :8], jnp.array([8, 4]), clean)
    found = denoise_canvas(sampling, cache, jnp.stack([noisy[0, 8:], noisy[1, 4:8]]), jnp.zeros(2))
    np.testing.assert_allclose(found, jnp.stack([trained[0, 8:], trained[1, 4:8]]), **CLOSE)
    shorter = sampling.truncate(cache, jnp.array([4, 0]))  # the hidden state before it is still there
    found = denoise_canvas(sampling, shorter, noisy[:, 4:8], jnp.zeros(2))
    np.testing.assert_allclose(found, trained[:, 4:8], **CLOSE)


def test_a_shifted_draft_follows_its_text():
    net, text = network(SHIFTED).for_sampling(), rows(7)
    _, cache = extend(net, net.empty_cache(2, 12), text[:, :4], jnp.full(2, 4), Causal())
    _, drafts, after = jax.jit(lambda *a: net.draft_and_verify(*a, masks=2))(cache, text[:, 4:], jnp.full(2, 3))
    masks = jnp.full((2, 2), net.module.vocabulary.mask)
    for i in range(3):
        _, longer = extend(net, cache, text[:, 4 : 5 + i], jnp.full(2, 1 + i), Causal())
        alone = denoise_canvas(net, longer, masks, jnp.ones(2))
        np.testing.assert_allclose(drafts.logits()[:, 2 * i : 2 * i + 2], alone, **CLOSE)
    np.testing.assert_allclose(after.hidden[:, :7], longer.hidden[:, :7], **CLOSE)


def test_shifted_positions_computed_anew_are_those_of_a_full_pass():
    net, tokens = network(SHIFTED), rows(8)
    sampling, t = net.for_sampling(), jnp.zeros(2)
    every = jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32)[None], (2, 8))
    found, cache = sampling.forward_positions(sampling.empty_cache(2, 8), tokens, every, t)
    expected = read(net, tokens, Full())
    np.testing.assert_allclose(found, expected, **CLOSE)
    some = jnp.array([[0, 3, 4], [7, 1, 8]], jnp.int32)  # 8: none
    at = jnp.minimum(some, 7)
    found, _ = sampling.forward_positions(cache, jnp.take_along_axis(tokens, at, axis=1), some, t)
    expected = jnp.take_along_axis(expected, at[..., None], axis=1)
    np.testing.assert_allclose(found[some < 8], expected[some < 8], **CLOSE)


def test_our_own_spec_is_one_group_of_layers_alike():
    spec = DenoiserSpec(width=48, layers=3, heads=4, kv_heads=2)
    ((one, repeat),) = ((group.layer, group.repeat) for group in spec.groups)
    assert (repeat, one.attention.kv_heads, one.attention.head_dim, one.mlp.dim) == (3, 2, 12, 128)
