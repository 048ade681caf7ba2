"""Published samplers that draw: stored runs come out token for token from our network, given the stored draws.

The draws take the place of random numbers, at the one method of a sampler or a process that draws. The rest is what
`published` makes of the family's settings, run with its loop in Python.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import parity
from support.family import TOLERANCE
from support.python_loops import generated, loops_in_python  # noqa: F401 (a fixture)
from support.sources import write_source
from support.stored_draws import NucleusWithoutCrossing, chosen

from diffusion_lm.convert.loading import load_source
from diffusion_lm.inference import pipeline, published
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.score import UnnormalizedScore
from diffusion_lm.samplers.base import Prompt
from diffusion_lm.samplers.first_hitting import FirstHitting
from diffusion_lm.samplers.renoising import Renoising

pytest.importorskip("tokenizers", reason="tokenizers is not installed: pip install -e '.[test]'")
pytestmark = pytest.mark.usefixtures("loops_in_python")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(family, its generation_config.json, changes=of its config.json) -> the folder's model."""

    @functools.cache
    def loaded(family, generation=None, **config):
        folder = tmp_path_factory.mktemp(family)
        write_source(folder, family, config, generation and json.loads(generation))
        return load_source(folder, dtype="float32")

    return loaded


def arrays_of(family, run):
    """The arrays of a run, by their names in it."""
    io = parity.arrays(family)
    return {name.removeprefix(f"{run}/"): array for name, array in io.items() if name.startswith(f"{run}/")}


def with_sampler(sampler, made, **fields):
    """The text sampler with a canvas sampler of another class, the same but for these fields."""
    inner = sampler.sampler
    same = {field.name: getattr(inner, field.name) for field in dataclasses.fields(inner)}
    return dataclasses.replace(sampler, sampler=made(**same | fields))


def endless(sampler, **fields):
    """The text sampler without ends of a text, with other fields of its canvas sampler."""
    return dataclasses.replace(sampler, eos=-1, stops=(), sampler=dataclasses.replace(sampler.sampler, **fields))


# DiffusionGemma. On random weights a change of 2e-5 in what a pass is conditioned on changes its logits by up to 4e-3
# (default_s8), so that two networks in float32 part after a few passes. So the one test conditions on the stored logits
# of the pass before; the other, where none are stored, is of the sampler alone.

GEMMA = {"stops": {"entropy_bound": 1.5, "confidence_threshold": 0.3}}  # as its README says; the others: of its file


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredRenoising(Renoising):
    """canvases: what each begins with, int32 [B, K]; what its steps draw, and the noise for what they don't keep,
    int32 [steps, B, K]; and what the passes predicted, [steps, B, K, V], or None. `init` takes the next."""

    canvases: list
    now: list = dataclasses.field(default_factory=list)

    def init(self, canvas):
        self.now[:] = self.canvases.pop(0)
        return super().init(canvas)

    def update(self, state, logits):
        if (stored := self.now[3]) is not None:
            assert np.abs(logits - stored[int(state.step)]).max() < TOLERANCE
        return super().update(state, logits)

    def conditioning(self, state, logits):
        stored = self.now[3]
        return super().conditioning(state, logits if stored is None else jnp.asarray(stored[int(state.step)]))

    def _draw(self, state, logits):
        tokens = jnp.asarray(self.now[1][int(state.step)])
        return tokens, jnp.ones(tokens.shape)

    def _noise(self, state, count):
        return jnp.asarray(self.now[0] if int(count) == self.denoising_steps else self.now[2][int(count)])


class GemmaRun:
    """A stored run: the preset with its draws, its prompts, what is to come out, and the passes of each canvas."""

    def __init__(self, load, run):
        self.io = io = arrays_of("diffusion_gemma", run[0])
        generation = (parity.folder("diffusion_gemma") / "generation_config.json").read_text()
        self.model = model = load("diffusion_gemma", generation)
        mask = io.get("attention_mask", np.ones(io["prompt"].shape)) == 1
        self.rows = [row[real] for row, real in zip(io["prompt"], mask, strict=True)]  # our padding is on the right
        self.settings = GEMMA.get(run["kind"], {})
        made = published.preset(model, max_denoising_steps=int(run["steps"]), **self.settings)
        starts, self.length = io["canvas_start"], made.new_tokens(model, self.rows)
        self.passes = [np.flatnonzero(starts == start) for start in dict.fromkeys(starts.tolist())]
        logits = io.get("logits")
        self.canvases = [
            (first, io["drawn"][k], io["random"][k], logits if logits is None else logits[k])
            for first, k in zip(io["initial_canvases"], self.passes, strict=True)
        ]
        self.sampler = with_sampler(made.sampler, StoredRenoising, canvases=self.canvases)
        new = io["sequences"][:, io["prompt"].shape[1] :]
        self.ended = np.cumsum(np.isin(new, model.tokenizer.stops), axis=1) > 0
        self.expected = np.where(self.ended, model.tokenizer.mask, new)
        self.width = made.sampler.canvas_length

    def going(self, canvas):
        """bool [B]: rows whose text hasn't ended before the canvas."""
        return ~self.ended[:, canvas * self.width - 1] if canvas else np.full(len(self.rows), True)


@pytest.mark.parametrize("run", parity.found("diffusion_gemma", r"sampler/(?P<kind>\w+)_s(?P<steps>\d+)(?=/logits)"))
def test_diffusion_gemma(load, run):
    run = GemmaRun(load, run)
    tokens, passes = generated(run.model, run.sampler, run.rows, run.length)
    np.testing.assert_array_equal(tokens, run.expected)
    assert not run.canvases and passes == len(run.passes) + sum(len(k) for k in run.passes)


class Scripted:
    """A network that predicts a run's likeliest tokens with entropies that make its sampler accept and stop as it did.

    It checks every canvas that it is given, and every one that is committed.
    """

    def __init__(self, run):
        self.run, self.vocab, self.passes = run, run.model.tokenizer.mask, 0
        self.committed, self.order = -1, []  # the prompt is the first

    def empty_cache(self, rows, slots):
        return None

    def expected_embedding(self, logits):
        return jnp.zeros((*logits.shape[:2], self.run.sampler.self_cond_dim))

    def extend(self, cache, tokens, count, attention):
        if self.committed >= 0:
            last = self.run.io["argmax"][self.run.passes[self.committed][-1]]
            rows = np.asarray(count) > 0
            np.testing.assert_array_equal(np.asarray(tokens)[rows], last[rows])
        self.committed += 1
        self.order = list(self.run.passes[self.committed])
        return None, cache

    def denoise_canvas(self, cache, canvas, t, self_cond):
        io, (k, *self.order) = self.run.io, self.order
        going = self.run.going(self.committed) & ~(io["done"][k - 1] & (k != self.run.passes[self.committed][0]))
        np.testing.assert_array_equal(np.asarray(canvas)[going], io["canvas"][k][going])
        self.passes += 1
        return self.logits(k)

    def logits(self, k):
        bound, sure = self.run.settings["entropy_bound"], self.run.settings["confidence_threshold"]
        io, nats = self.run.io, np.zeros(self.run.io["argmax"][k].shape)
        for row, accepted in enumerate(io["accepted"][k]):
            nats[row] = bound / (accepted.sum() - 0.5) * np.where(accepted, 1.0, 1.01)
            if not io["done"][k, row]:
                nats[row, np.flatnonzero(accepted)[-1] if accepted.all() else ~accepted] = 0.9 * np.log(self.vocab)
            assert (nats[row].mean() < sure) == io["done"][k, row]
        low, high = np.zeros(nats.shape), np.full(nats.shape, 60.0)
        for _ in range(60):  # by how much the likeliest token leads, so that its distribution has these nats
            lead = (low + high) / 2
            total = np.exp(lead) + self.vocab - 1
            more = np.log(total) - lead * np.exp(lead) / total > nats
            low, high = np.where(more, lead, low), np.where(more, high, lead)
        peaks = np.arange(self.vocab) == io["argmax"][k][..., None]
        return jnp.asarray(peaks * low[..., None] * io["temperature"][k], jnp.float32)


@pytest.mark.parametrize("run", parity.found("diffusion_gemma", r"sampler/(?P<kind>stops)_s(?P<steps>\d+)"))
def test_diffusion_gemmas_rows_stop_and_end_on_their_own(load, run):
    """Ours doesn't go on for a row that has ended."""
    run = GemmaRun(load, run)
    network, count = Scripted(run), np.array([len(row) for row in run.rows], np.int32)
    prompt = Prompt(
        tokens=jnp.asarray([np.pad(row, (0, count.max() - len(row))) for row in run.rows]), length=jnp.asarray(count)
    )
    keys = pipeline.row_keys(0, len(count))
    out = run.sampler.generate(network, None, prompt, keys, max_new_tokens=run.length)
    np.testing.assert_array_equal(out.tokens, run.expected)
    done = [run.io["done"][k] | ~run.going(c) for c, k in enumerate(run.passes)]
    assert network.passes == sum(min((~one.all(axis=1)).sum() + 1, len(one)) for one in done)


# MDLM and SEDD: in each step the draw of the stored uniforms from our probabilities


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredSteps:
    """Mixed into a process: what its code draws in the step whose time, of `times` [steps], is nearest."""

    times: np.ndarray
    uniforms: np.ndarray

    def reverse(self, keys, logits, xt, t, s):
        p = self.probabilities(logits, t, s)

        def draw(p, t):
            uniforms = self.uniforms[np.argmin(np.abs(self.times - float(t[0])))]
            return chosen(p, np.pad(uniforms, ((0, 0), (0, 0), (0, p.shape[-1] - uniforms.shape[-1])))).astype(np.int32)

        drawn = jax.pure_callback(draw, jax.ShapeDtypeStruct(xt.shape, jnp.int32), p, t)
        return jnp.where(xt == self.mask, drawn, xt)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredMasks(StoredSteps, Absorbing):
    def probabilities(self, logits, t, s):
        reveals = self.reveal_probability(t, s)[:, None, None]
        p = reveals * jax.nn.softmax(logits, axis=-1)
        return jnp.concatenate([p, jnp.broadcast_to(1 - reveals, (*p.shape[:-1], 1))], axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredScores(StoredSteps, UnnormalizedScore):
    def probabilities(self, logits, t, s):
        return jnp.exp(self.log_probabilities(logits, t, s))


LAST_TIME = 1e-5  # of both codes' grids, after which one step removes what noise is left
LEFT = 0.999  # their log-linear noise masks this share at time 1: ours counts time by the share


def replayed(model, made, process, times, uniforms, expected):
    """Rows of masks, without a begin of text, denoised with the stored draws."""
    same = {field.name: getattr(model.process, field.name) for field in dataclasses.fields(model.process)}
    process = process(**same, times=LEFT * np.append(times, LAST_TIME)[: len(uniforms)], uniforms=uniforms)
    rows = [np.zeros(0, np.int32)] * len(expected)
    tokens, passes = generated(model, endless(made.sampler, process=process), rows, expected.shape[1])
    np.testing.assert_array_equal(tokens, expected)
    assert passes <= len(times) + 1


@pytest.mark.parametrize(
    "run", parity.found("mdlm", r"sampler/(?P<predictor>ddpm_cache|ddpm|analytic)_s(?P<steps>\d+)")
)
def test_mdlm(load, run):
    io, model = arrays_of("mdlm", run[0]), load("mdlm", eos_token_id=0)
    made = published.preset(model, predictor=run["predictor"], denoising_steps=int(run["steps"]))
    replayed(model, made, StoredMasks, io["t"][:, 0, 0], io["tape/torch.rand_like"], io["final"])


@pytest.mark.parametrize("run", parity.found("sedd", r"sampler/(?P<predictor>analytic|euler)_s(?P<steps>\d+)"))
def test_sedd(load, run):
    """The last draw is among tokens alone."""
    io, model, steps = arrays_of("sedd", run[0]), load("sedd", eos_token_id=0), int(run["steps"])
    made = published.preset(model, predictor=run["predictor"], denoising_steps=steps)
    tapes = sorted((array for name, array in io.items() if "rand_like" in name), key=len, reverse=True)
    rows = [np.pad(u, ((0, 0), (0, 0), (0, model.tokenizer.mask + 1 - u.shape[-1]))) for tape in tapes for u in tape]
    times = np.linspace(1, LAST_TIME, steps + 1)[:-1]
    replayed(model, made, StoredScores, times, np.stack(rows), io["final"])


# BD3-LM


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class StoredFirstHitting(FirstHitting):
    """The stored draws, one of each a step of all blocks, and the times that they make."""

    uniforms: np.ndarray
    ranks: np.ndarray
    tokens: np.ndarray
    times: np.ndarray
    began: list = dataclasses.field(default_factory=lambda: [0])

    def init(self, canvas):
        self.began.append(self.began[-1] + int(canvas.undecided.sum()))
        return super().init(canvas)

    def _step(self, state):
        return min(self.began[-2] + int(state.step), len(self.times) - 1)  # none is left after the last

    def _draw(self, state, logits):
        np.testing.assert_allclose(state.time, self.times[self._step(state)], rtol=1e-5)
        p = np.asarray(jax.nn.softmax(self.sampling.sharpened(logits), axis=-1))
        drawn = chosen(p, self.tokens[self._step(state)][..., : p.shape[-1]])
        return jnp.asarray(drawn, jnp.int32), jnp.ones(drawn.shape)

    def _rank(self, state):
        return jnp.asarray(self.ranks[self._step(state)])

    def _uniform(self, state):
        return jnp.asarray(self.uniforms[self._step(state)], jnp.float32)[None]


@pytest.mark.cases(2)
@pytest.mark.parametrize(
    "run", parity.found("bd3lm", r"sampler/first_hitting(_kvcache)?_bs(?P<block>\d+)(_topp(?P<top_p>[\d.]+))?")
)
def test_bd3lm(load, run):
    """Its nucleus leaves out the token that crosses p: for this test ours does, too."""
    io, model = arrays_of("bd3lm", run[0]), load("bd3lm", eos_token_id=0, block_size=int(run["block"]))
    top_p = float(run["top_p"] or 1)
    made = published.preset(model, nucleus_p=top_p)
    assert made.sampler.sampler.sampling.top_p == top_p
    draws = {"uniforms": "numpy.random.rand", "ranks": "torch.randint", "tokens": "torch.rand_like"}
    stored = {field: io[f"tape/{name}"] for field, name in draws.items()} | {"times": io["t"]}
    sampler = endless(with_sampler(made.sampler, StoredFirstHitting, **stored))
    if run["top_p"]:
        sampler = endless(sampler, sampling=NucleusWithoutCrossing(top_p=top_p))
    expected = io["final"][:, 1:]
    tokens, passes = generated(model, sampler, io["final"][:, :1], expected.shape[1])
    np.testing.assert_array_equal(tokens, expected)
    assert passes == io["nfe"] + expected.shape[1] // int(
        run["block"]
    )  # ours writes finished blocks in passes of their own
