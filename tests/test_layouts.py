"""Each layout's answers, one table a question."""

import jax.numpy as jnp
import pytest

from diffusion_lm.attention_patterns import BlockCausal, BlockDiffusionTraining, Causal, Full
from diffusion_lm.layouts import Blocks, NoCanvas, WholeRow
from diffusion_lm.types import Batch

CAUSAL, BLOCK_CAUSAL = Blocks(4, Causal()), Blocks(4, BlockCausal(4))
LAYOUTS = (NoCanvas(), WholeRow(), CAUSAL, BLOCK_CAUSAL)


@pytest.mark.parametrize(
    ("question", "answers"),
    {
        "denoises": (False, True, True, True),
        "pad": (0, 0, 3, 3),
        "closed_by_eos": (False, False, True, True),
        "align": (1, 0, 1, 4),
        "prefix": (Causal(), Causal(), Causal(), BlockCausal(4)),
        "attention": (Causal(), Full(), *(BlockDiffusionTraining(4, p) for p in (Causal(), BlockCausal(4)))),
    }.items(),
)
def test_what_a_layout_is(question, answers):
    assert tuple(getattr(layout, question) for layout in LAYOUTS) == answers


@pytest.mark.parametrize(
    ("question", "arguments", "answers"),
    [
        ("canvas_length", (64,), (1, 64, 4, 4)),
        ("canvas_end", (9, 64), (9, 64, 12, 12)),
        ("canvas_end", (8, 64), (8, 64, 8, 8)),
        ("canvas_end", (9, 11), (9, 11, 11, 11)),
        ("round_up", (9,), (9, 9, 12, 12)),
        ("answer_start", (6,), (6, 6, 8, 6)),
    ],
)
def test_where_canvases_lie(question, arguments, answers):
    assert tuple(getattr(layout, question)(*arguments) for layout in LAYOUTS) == answers


def batch(length) -> Batch:
    """Two documents a row; the first two positions of each are context."""
    tokens = jnp.ones((2, length), jnp.int32)
    index = jnp.arange(length, dtype=jnp.int32)[None]
    second = jnp.broadcast_to(index >= length // 2, tokens.shape)
    context = jnp.broadcast_to(index % (length // 2) < 2, tokens.shape)
    positions = jnp.broadcast_to(index % (length // 2), tokens.shape)
    return Batch(tokens=tokens, segment_ids=1 + second, positions=positions, context_mask=context, loss_mask=~context)


def test_rows():
    rows = batch(64)
    assert [layout.num_spans(64) for layout in LAYOUTS] == [1, 1, 16, 16]
    assert all(layout.prepare(rows) is rows for layout in (NoCanvas(), CAUSAL, BLOCK_CAUSAL))
    one = WholeRow().prepare(rows)
    assert (one.segment_ids == 1).all() and (one.positions == jnp.arange(64)[None]).all()
    assert (one.context_mask == (jnp.arange(64) < 2)[None]).all()  # not the second document's
    assert (one.loss_mask == rows.loss_mask).all()


def test_layouts_are_values():
    assert Blocks(4, Causal()) == CAUSAL != BLOCK_CAUSAL and NoCanvas() != WholeRow()
    assert len(set(LAYOUTS)) == 4


def test_rows_that_blocks_do_not_divide_are_refused():
    for layout in LAYOUTS:
        layout.prepare(batch(64))
    with pytest.raises(ValueError, match=r"set data\.seq_len to a multiple of 4"):
        CAUSAL.prepare(batch(63))
    with pytest.raises(ValueError, match=r"objective\.block_size must be at least 1; got 0"):
        Blocks(0, Causal())
