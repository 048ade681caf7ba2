"""Names to parameters and back: what one direction does the other undoes, on one device and on several."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_lm.models.weights import Leaf, Part, check_names, load_parameters, write_tensors

E, H, D, M, X, V = 6, 2, 3, 5, 2, 7


class Stored:
    """A tensor in memory, read as one of a file is."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def read(self, rows=slice(None)):
        return self.array[rows]


LEAVES = (
    Leaf(path=("embedding",), parts=(Part(tensor="table", shape=(V, E), place=(slice(0, V),)),)),
    Leaf(path=("layer", "query"), parts=(Part(tensor="q", shape=(E, H, D), inputs=1),)),
    Leaf(path=("layer", "output"), parts=(Part(tensor="o", shape=(H, D, E), inputs=2),)),
    Leaf(
        path=("layer", "gate_up"),
        parts=(
            Part(tensor="gate", shape=(E, M), inputs=1, place=(slice(None), 0)),
            Part(tensor="up", shape=(E, M), inputs=1, place=(slice(None), 1)),
        ),
    ),
    Leaf(
        path=("layer", "experts"),
        parts=tuple(
            Part(
                tensor="experts", shape=(E, M), inputs=1, place=(x, slice(None), i),
                select=(x, slice(i * M, (i + 1) * M)), tensor_shape=(X, 2 * M, E),
            )
            for x in range(X)
            for i in range(2)
        ),
    ),
)  # fmt: skip
SHAPES = {"table": (V, E), "q": (H * D, E), "o": (E, H * D), "gate": (M, E), "up": (M, E), "experts": (X, 2 * M, E)}


def tensors(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def abstract(dtype=jnp.float32):
    shapes = {
        "embedding": (8, E),
        "layer": {"query": (E, H, D), "output": (H, D, E), "gate_up": (E, 2, M), "experts": (X, E, 2, M)},
    }
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), shapes, is_leaf=is_shape)


def loaded(arrays, dtype=jnp.float32):
    return load_parameters(LEAVES, {name: Stored(a) for name, a in arrays.items()}, abstract(dtype))


def test_products_are_the_linear_layers():
    arrays, x = tensors(), np.random.default_rng(1).normal(size=(4, E)).astype(np.float32)
    params = loaded(arrays)
    found = np.einsum("be,ehd->bhd", x, params["layer"]["query"]).reshape(4, -1)
    np.testing.assert_allclose(found, x @ arrays["q"].T, rtol=1e-5)
    y = np.random.default_rng(2).normal(size=(4, H * D)).astype(np.float32)
    found = np.einsum("bhd,hde->be", y.reshape(4, H, D), params["layer"]["output"])
    np.testing.assert_allclose(found, y @ arrays["o"].T, rtol=1e-5)
    up = np.einsum("be,em->bm", x, params["layer"]["experts"][1, :, 1])
    np.testing.assert_allclose(up, x @ arrays["experts"][1, M:].T, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_there_and_back_is_the_same_bits(dtype, seed):
    arrays = tensors(seed, dtype)
    back = dict(write_tensors(LEAVES, loaded(arrays, dtype), dtype))
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes()


def test_rows_that_no_tensor_has_are_zero():
    assert (np.asarray(loaded(tensors())["embedding"])[V:] == 0).all()


def test_progress_counts_every_byte():
    seen = []
    load_parameters(LEAVES, {n: Stored(a) for n, a in tensors().items()}, abstract(), progress=seen.append)
    assert sum(seen) == sum(leaf.size * 4 for leaf in jax.tree.leaves(abstract()))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"q": None}, "has no tensor q, which"),
        ({"q": None, "o": None}, r"has no tensor o \(and 1 more\)"),
        ({"new": np.zeros(3, np.float32)}, "holds new, which a network"),
        ({"q": np.zeros((E, E + 1), np.float32)}, r"q of shape \(6, 7\); its config.json makes it \(6, 6\)"),
        ({"q": np.zeros((6, 6), np.int8)}, "q as int8"),
    ],
)
def test_wrong_tensors_are_one_line(change, cause):
    arrays = {name: a for name, a in (tensors() | change).items() if a is not None}
    stored = {name: Stored(a) for name, a in arrays.items()}
    with pytest.raises(ValueError, match=cause) as raised:
        check_names("FOLDER", stored, LEAVES, buffers=lambda name: name == "skipped")
    assert "\n" not in str(raised.value)
    check_names("FOLDER", {n: Stored(a) for n, a in (tensors() | {"skipped": np.zeros(1)}).items()}, LEAVES,
                buffers=lambda name: name == "skipped")  # fmt: skip


def test_leaves_that_are_not_the_networks_are_refused():
    with pytest.raises(ValueError, match="differ in layer/output"):
        load_parameters(LEAVES[:2] + LEAVES[3:], {}, abstract())
