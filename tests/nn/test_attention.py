"""Attention against a dense square of scores in float64, forward and backward, however its queries are dealt out."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import small

from diffusion_lm.attention_patterns import BlockCausal, BlockDiffusionTraining, Causal, Full
from diffusion_lm.models.base import Execution
from diffusion_lm.models.transformer import init_params
from diffusion_lm.nn import attention, cudnn, splash
from diffusion_lm.nn.attention import dot_product_attention
from diffusion_lm.nn.cache import CachedLayer, LayerKV

B, H, G, D, SLOTS = 2, 4, 2, 6, 9
FILLED = np.array([7, 0])
READINGS = {
    "causal": (Causal(), 37),
    "both ways": (Full(), 37),
    "blocks": (BlockCausal(5), 37),
    "noisy, causal": (BlockDiffusionTraining(5, Causal()), 35),
    "noisy, whole chunks of blocks": (BlockDiffusionTraining(2, Causal()), 40),
}


def who_sees_whom(pattern, length):
    """bool [L, L], by definition; both halves of BlockDiffusionTraining."""
    i, j = np.arange(length)[:, None], np.arange(length)[None]
    if isinstance(pattern, BlockDiffusionTraining):
        block, clean = pattern.block_size, who_sees_whom(pattern.clean, length)
        own, before = i // block == j // block, j // block < i // block
        return np.block([[own, before], [np.zeros_like(own), clean]])
    if isinstance(pattern, Full):
        return np.ones((length, length), bool)
    block = pattern.block_size if isinstance(pattern, BlockCausal) else 1
    return j // block <= i // block


def dense(q, k, v, seen, g):
    """softmax(q k / sqrt(D)) v and the gradients of its product with g, float64; k [B, G, D, S], v [B, G, S, D]."""
    q, g = (a.astype("f8").reshape(B, G, H // G, -1, D) for a in (q, g))
    k, v = k.astype("f8"), v.astype("f8")
    scores = np.where(seen[:, None, None], np.einsum("bgrqd,bgds->bgrqs", q, k) / np.sqrt(D), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    d_weights = np.einsum("bgrqd,bgsd->bgrqs", g, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) / np.sqrt(D)
    d_q, d_k = np.einsum("bgrqs,bgds->bgrqd", d_scores, k), np.einsum("bgrqs,bgrqd->bgds", d_scores, q)
    out, d_v = np.einsum("bgrqs,bgsd->bgrqd", weights, v), np.einsum("bgrqs,bgrqd->bgsd", weights, g)
    return out.reshape(B, H, -1, D), (d_q.reshape(B, H, -1, D), d_k, d_v)


def arrays(length, slots=0):
    rng = np.random.default_rng(length)
    shapes = (B, H, length, D), (B, G, D, slots + length), (B, G, slots + length, D), (B, H, length, D)
    return [rng.normal(size=shape).astype("f4") for shape in shapes]


def value_and_gradients(q, k, v, g, pattern, length, *, segment_ids=None, slots=0, **how):
    """The first `slots` keys and values are a cache's."""

    def run(q, k, v):
        kv = LayerKV(k=k, v=v)
        past = CachedLayer(kv=kv.cut(0, slots), length=jnp.asarray(FILLED, jnp.int32), slots=None) if slots else None
        new, ranges = kv.cut(slots, kv.slots), pattern.key_ranges(length, segment_ids)
        return dot_product_attention(
            q, new, pattern, ranges, past, compute_dtype="float32", **{"kernel": "chunked"} | how
        )

    def both(q, k, v, g):
        out, back = jax.vjp(run, q, k, v)
        return out, back(g)

    return jax.jit(both)(q, k, v, g)


def close(found, expected, by=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=by), found, expected)


@pytest.fixture(params=[(13, 3, 1024), (4, 2, 8)], ids=["a window a chunk", "chunks that share"])
def dealing(request, monkeypatch):
    """Three chunks of queries with a window each; some ten, computed anew backward, with two windows."""
    for name, value in zip(("_CHUNK", "_WINDOWS", "_KEEP_SCORES"), request.param, strict=True):
        monkeypatch.setattr(attention, name, value)


def in_documents(pattern, length, first, second, **how):
    """What was found, and what should be, where documents of the two rows are so long."""
    at = np.arange(length)
    segment_ids = np.stack([at // first, np.minimum(at // second, 2)]).astype(np.int32)
    halves = 2 if isinstance(pattern, BlockDiffusionTraining) else 1
    inputs = arrays(halves * length)
    doubled = np.concatenate([segment_ids] * halves, axis=1)
    at, window = np.tile(np.arange(length), halves), how.get("window", 0) or length
    near = abs(at[:, None] - at[None]) < window
    seen = (near & who_sees_whom(pattern, length))[None] & (doubled[:, :, None] == doubled[:, None])
    found = value_and_gradients(*inputs, pattern, length, segment_ids=jnp.asarray(segment_ids), **how)
    return found, dense(*inputs[:3], seen, inputs[3])


@pytest.mark.cases(4)
@pytest.mark.usefixtures("dealing")
@pytest.mark.parametrize("kind", READINGS)
def test_a_reading_is_the_dense_one(kind):
    """In documents: two in one row, three in the other, none of which ends where a chunk or a block does."""
    close(*in_documents(*READINGS[kind], 20, 13))


@pytest.mark.cases(4)
@pytest.mark.usefixtures("dealing")
@pytest.mark.parametrize(("kind", "window"), list(zip(READINGS, itertools.cycle([3, 7]), strict=False)))
def test_a_sliding_window_is_the_dense_one(kind, window):
    """Narrower and wider than a block, in turn."""
    close(*in_documents(*READINGS[kind], 20, 13, window=window))


LONGER = {
    "causal": (Causal(), 150),
    "both ways": (Full(), 150),
    "blocks": (BlockCausal(20), 150),  # the last one is cut short
    "noisy, causal": (BlockDiffusionTraining(5, Causal()), 145),
    "noisy, blocks": (BlockDiffusionTraining(20, BlockCausal(20)), 143),
}


@pytest.mark.cases(2)
@pytest.mark.parametrize("kind", LONGER)
def test_the_kernel_is_the_dense_one(kind, monkeypatch):
    """Interpreted, in two or three squares of queries and as many of keys; one row is one document, the other three."""
    monkeypatch.setattr(splash, "_SQUARE", 128)
    close(*in_documents(*LONGER[kind], 200, 61, kernel="splash"))


@pytest.mark.parametrize("kind", ["causal", "noisy, causal"])
def test_the_kernels_sliding_window_is_the_dense_one(kind, monkeypatch):
    monkeypatch.setattr(splash, "_SQUARE", 128)
    close(*in_documents(*LONGER[kind], 200, 61, kernel="splash", window=9))


def test_the_kernel_computes_no_square_of_which_nobody_sees_anybody():
    """Four a half: a noisy one sees itself and, in the clean half, up to its place; a clean one up to itself."""
    found = splash._kernel(BlockDiffusionTraining(32, Causal()), 8 * 128, 1, 128, True).fwd_mask_info
    assert np.sum(found.block_mask > 0) == (4 + 4 * 5 // 2) + 4 * 5 // 2


@pytest.fixture
def on_gpus(monkeypatch):
    """As far as our own code asks."""
    monkeypatch.setattr(cudnn, "platform", lambda: "gpu")


@pytest.mark.usefixtures("on_gpus")
@pytest.mark.parametrize("kind", READINGS)
def test_what_goes_to_cudnn_is_the_dense_one(kind, monkeypatch):
    """The kernel's place taken by plain XLA: documents told apart by columns, odd rows, and what is left to chunks."""
    asked = []

    def plain(q, *rest, **how):
        asked.append((q.shape[1] % 2, q.shape[3] % 8, how["is_causal"]))
        return jax.nn.dot_product_attention(q, *rest, implementation="xla", **how)

    monkeypatch.setattr(cudnn, "_fused", plain)
    pattern, length = READINGS[kind]
    close(*in_documents(pattern, length, 20, 13, kernel="cudnn"), by=3e-4)  # float32 sums that pass by 1500
    assert set(asked) == ({(0, 0, kind != "both ways")} if kind != "blocks" else set())
    if kind == "both ways":  # one document, but an odd row
        inputs, seen = arrays(length), np.ones((B, length, length), bool)
        close(
            value_and_gradients(*inputs, pattern, length, kernel="cudnn"), dense(*inputs[:3], seen, inputs[3]), by=3e-4
        )


@pytest.mark.usefixtures("on_gpus")
@pytest.mark.parametrize("pattern", [Causal(), Full(), BlockDiffusionTraining(5, Causal())])
def test_gpus_get_the_kernel(pattern, monkeypatch):
    """Lowered for them, forward and backward, with no mask beside it. (JAX asks for the version of a cuDNN that it
    would otherwise load.)"""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    length, rows = 65, 65 * (2 if isinstance(pattern, BlockDiffusionTraining) else 1)
    shapes = (B, H, rows, 64), (B, G, 64, rows), (B, G, rows, 64)

    def total(segment_ids, q, k, v):
        ranges = pattern.key_ranges(length, segment_ids)
        return jnp.sum(
            dot_product_attention(q, LayerKV(k=k, v=v), pattern, ranges, compute_dtype="bfloat16", kernel="cudnn")
        )

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    segment_ids = jax.ShapeDtypeStruct((B, length), jnp.int32)
    traced = jax.jit(jax.grad(total, argnums=(1, 2, 3))).trace(segment_ids, *arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(__cudnn\S*?)\(.*mask_type\\22: \\22(\w+?)\\22", text)
    mask = "NO_MASK" if isinstance(pattern, Full) else "CAUSAL"
    assert calls == [("__cudnn$fmhaSoftmax", mask), ("__cudnn$fmhaSoftmaxBackward", mask)]


def test_cudnn_is_refused_in_a_line(monkeypatch):
    attend_cudnn = functools.partial(value_and_gradients, *arrays(8), length=8, kernel="cudnn")
    with pytest.raises(ValueError, match=r"GPUs and this runs on cpu: set exec\.attention_kernel=auto"):
        attend_cudnn(pattern=BlockCausal(4))
    monkeypatch.setattr(cudnn, "platform", lambda: "gpu")
    with monkeypatch.context() as context:
        context.setattr(cudnn, "ways_in_force", lambda _: 2)
        with pytest.raises(ValueError, match=r"mesh\.sequence=2 cuts them: set mesh\.sequence=1 or"):
            attend_cudnn(pattern=Causal())
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    wide, segment_ids = np.zeros((B, H, 8, 128), "f4"), np.zeros((B, 8), "i4")
    kv = LayerKV(k=wide.swapaxes(2, 3), v=wide)
    with pytest.raises(
        ValueError, match=r"cudnn: The head dim must be .* but got 136\. Set exec\.attention_kernel=chunked"
    ):
        jax.eval_shape(
            lambda: dot_product_attention(
                wide, kv, Causal(), Causal().key_ranges(8, segment_ids), compute_dtype="bfloat16", kernel="cudnn"
            )
        )


def test_splash_lists_are_numbers_wherever_they_are_first_asked_for():
    """Inside a scan over layers too, where flax looks for constants."""
    splash._kernel.cache_clear()
    module = small.module_of(small.SPECS["plain"], exec=Execution(attention_kernel="splash"), scan=True)
    made = jax.eval_shape(functools.partial(init_params, module), jax.random.key(0))
    assert nn.meta.unbox(made)["layers"]["attention"]["query"].shape[0] == small.SPECS["plain"].layers


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_kernels_multiply_in_bfloat16_alone(kernel):
    """What splash attention would make of float32 on a TPU isn't float32's product."""
    with pytest.raises(ValueError, match=f"{kernel} multiplies in bfloat16, not in exec.compute_dtype=float32: set"):
        Execution(attention_kernel=kernel, compute_dtype="float32")


@pytest.mark.usefixtures("dealing")
@pytest.mark.parametrize("kind", ["causal", "blocks"])
def test_behind_a_cache_it_is_the_dense_one(kind):
    """Slots that aren't filled are seen by nobody; one row's cache is empty."""
    pattern, length = READINGS[kind]
    inputs = arrays(length, SLOTS)
    cached = np.broadcast_to((np.arange(SLOTS)[None] < FILLED[:, None])[:, None], (B, length, SLOTS))
    itself = np.broadcast_to(who_sees_whom(pattern, length)[None], (B, length, length))
    found = value_and_gradients(*inputs, pattern, length, slots=SLOTS)
    close(found, dense(*inputs[:3], np.concatenate([cached, itself], axis=-1), inputs[3]))


@pytest.mark.parametrize("pattern", [Causal(), BlockDiffusionTraining(32, Causal())], ids=["causal", "noisy"])
def test_longer_rows_are_no_longer_programs(monkeypatch, pattern):
    """Neither in lines, nor with an array of length times length in them."""
    monkeypatch.setattr(attention, "_WINDOWS", 3)
    lines = {}
    for length in (1 << 12, 1 << 14):
        whole = length * (2 if isinstance(pattern, BlockDiffusionTraining) else 1)
        shapes = (1, 1, whole, 2), (1, 1, 2, whole), (1, 1, whole, 2)
        q, k, v = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)

        def total(q, k, v, length=length):
            kv, ranges = LayerKV(k=k, v=v), pattern.key_ranges(length)
            return jnp.sum(dot_product_attention(q, kv, pattern, ranges, compute_dtype="float32"))

        text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(q, k, v).as_text()
        lines[length] = len(text.splitlines())
        assert f"{length}x{length}x" not in text
    assert len(set(lines.values())) == 1, lines
