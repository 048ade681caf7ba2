"""A made-up trace: a sonnet's tokens, committed in random order with growing confidence."""

import re

import numpy as np
import pytest

from diffusion_lm.visualize.frames import Trace, trace_from_history

VERSE = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade
Nor lose possession of that fair thou owest;
Nor shall Death brag thou wander'st in his shade,
When in eternal lines to time thou growest:
So long as men can breathe or eyes can see,
So long lives this and this gives life to thee.

That time of year thou mayst in me behold
When yellow leaves, or none, or few, do hang
Upon those boughs which shake against the cold,
Bare ruin'd choirs, where late the sweet birds sang.
In me thou see'st the twilight of such day
As after sunset fadeth in the west,
Which by and by black night doth take away,
Death's second self, that seals up all in rest.

"""
EOS, MASK = 0, 1000


def fake_trace(n=256, steps=12, seed=0, *, text=VERSE, prompt_length=9, unused=7, changes=4) -> Trace:
    """n positions of the repeated text; the last `unused` follow an end of text; `changes` positions are revised."""
    rng = np.random.default_rng(seed)
    cut = re.findall(r" ?[^\W_]{1,6}|\n| ?[^\w\n]|\s|_", text)
    words = (cut * (n // len(cut) + 1))[:n]
    names = ["", *sorted(set(words))]
    final = np.array([names.index(word) for word in words])
    final[n - unused - 1] = EOS
    final[n - unused :] = EOS

    free = np.arange(prompt_length, n)
    order = free[np.argsort(free / n + rng.normal(0, 0.6, len(free)))]
    when = np.zeros(n, int)
    when[order] = 1 + (np.arange(len(order)) * steps) // len(order)
    at = np.arange(1, steps + 1)[:, None]
    tokens = np.where(when[None] <= at, final[None], MASK)
    changed = rng.choice(free[: n - unused - prompt_length - 1], changes, replace=False)
    for i in changed:  # another word for three steps, or masked again
        tokens[when[i] - 1 : when[i] + 2, i] = rng.integers(1, len(names))
        if i % 2:
            tokens[when[i] : when[i] + 1, i] = MASK
    tokens[-1] = final
    confidence = rng.beta(3 + 6 * at / steps, 1.2, size=tokens.shape).astype(np.float32)
    return trace_from_history(
        tokens,
        confidence,
        prompt_length=prompt_length,
        length=n,
        mask=MASK,
        eos=EOS,
        texts=lambda ids: [names[i] for i in ids],
        title="A sonnet out of noise",
        subtitle="confidence sampler, one canvas",
        meta={"model": "made up", "temperature": 0.7, "seed": seed},
    )


@pytest.fixture(scope="session")
def make_trace():
    return fake_trace
