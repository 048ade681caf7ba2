"""How far trained drafts reach, and what they gain: acceptance by position, tokens a cycle, tokens a second.

    python -m launch.benchmarks.drafts --workdir=runs/smollm2-draft --data=c4.txt

A cycle is one pass that drafts and one that verifies. The pass that drafts also reads the last token, so that the first
drafted token is the network's own and is always accepted; "accepted" counts the tokens that masks drafted, with its
standard error over texts. A cycle writes 2 + accepted tokens in two passes, where autoregression writes two. "trained"
suspends drafts where they cost more than they save, and takes what followed the last time where the text repeats
itself; "always" does neither. The last tokens of a text are plain steps, of which two count as a cycle. The last line
on standard output is a JSON object.
"""

import dataclasses
import functools
import statistics
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_lm.attention_patterns import Causal
from diffusion_lm.build import LoadedModel, load_for_inference
from diffusion_lm.inference import pipeline, presets
from diffusion_lm.samplers.base import Generation
from diffusion_lm.samplers.drafters import PromptLookup, TrainedDraft
from diffusion_lm.samplers.sampling_params import SamplingParams
from diffusion_lm.samplers.speculative import Speculative
from launch import command
from launch.benchmarks import timing
from launch.flags import Flags

FLAGS = Flags(command.FLAGS)
WORKDIR = FLAGS.workdir()
DATA = FLAGS.string("data", None, "Text whose last tenth gives prefixes; drafts were not trained on it.", required=True)
PREFIX = FLAGS.integer("prefix", 64, "Tokens of a prefix.", 1)
PREFIXES = FLAGS.integer("prefixes", 128, "Prefixes of which drafts are compared with the greedy text.", 1)
COUNTED = FLAGS.integer("counted", 32, "Prefixes that are written on from, alone, to count accepted tokens.", 1)
WRITTEN = FLAGS.integer("written", 4, "Of these, and of the chats, how many every sampler writes, and is timed.", 1)
SEEDS = FLAGS.integer("seeds", 1, "Texts behind each prefix and in each chat, to count accepted tokens.", 1)
NEW = FLAGS.integer("max_new_tokens", 96, "Tokens that are written after each.", 2)
REPEATS = 2
TEMPERATURE = FLAGS.float("temperature", 0.0, "Of the text and of drafts.", 0)
QUESTIONS = (
    "What is the capital of France, and what is it known for?", "Write a short poem about the sea.",
    "Explain how a bicycle stays upright.", "Give me three tips for sleeping better.",
    "What is the difference between a list and a tuple in Python?", "Tell me a story about a fox and a hen.",
    "How do I make pancakes?", "Why is the sky blue?",
)  # fmt: skip


def main() -> dict:
    model, sampling = load_for_inference(WORKDIR.value), SamplingParams(temperature=TEMPERATURE.value)
    masks = model.config.objective.draft_length
    if not masks:
        raise ValueError(f"--workdir={WORKDIR.value} was not trained to draft: train it with objective=Drafting()")
    texts = _prefixes(model, PREFIXES.value)
    result = {"masks": masks, "temperature": TEMPERATURE.value, "prefix": PREFIX.value}
    result["right_by_position"] = [round(share, 4) for share in _right(model, texts, masks)]
    result["positions_compared"] = len(texts)
    kinds = {"prefixes": list(_prefixes(model, COUNTED.value))}
    if getattr(model.tokenizer, "chat_template", ""):
        asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
        kinds["chat"] = [model.tokenizer.encode_chat(messages, add_generation_prompt=True) for messages in asked]
    drafters = {"trained": TrainedDraft(num_tokens=masks + 1), "lookup": PromptLookup()}
    samplers = {"autoregressive": presets.autoregressive(model, sampling=sampling)}
    samplers |= {n: presets.speculative(model, sampling=sampling, drafter=d) for n, d in drafters.items()}
    always = presets.speculative(model, sampling=sampling, drafter=drafters["trained"], break_even=0.0)
    samplers["always"] = dataclasses.replace(always, repeats=False)
    result["break_even"] = {name: round(samplers[name].break_even, 3) for name in drafters}
    for kind, prompts in kinds.items():
        accepted = _accepted(model, samplers["always"], prompts)
        result[kind] = {"accepted": accepted, **_written(model, samplers, prompts[: WRITTEN.value])}
    return result | timing.provenance()


def _prefixes(model: LoadedModel, number: int) -> np.ndarray:
    """int32 [number, PREFIX] from the last tenth of the text, at even distances."""
    text = Path(DATA.value).read_text(encoding="utf-8")
    ids = model.tokenizer.encode(text[int(len(text) * 0.9) :])
    starts = np.linspace(0, len(ids) - PREFIX.value - 1, number).astype(int)
    return np.stack([ids[start : start + PREFIX.value] for start in starts])


def _right(model: LoadedModel, texts: np.ndarray, masks: int) -> list[float]:
    """The share of prefixes after which the mask at each position drafts the network's own greedy token."""
    network = model.for_sampling(0)

    @functools.partial(jax.jit, static_argnums=2)
    def compared(network, texts, steps):
        count = jnp.full(len(texts), texts.shape[1], jnp.int32)
        cache = network.empty_cache(len(texts), texts.shape[1] + steps + 1)
        _, cache = network.extend(cache, texts[:, :-1], count - 1, Causal())
        _, drafts, _ = network.draft_and_verify(cache, texts[:, -1:], jnp.zeros_like(count), steps, causal=True)
        token, written = texts[:, -1:], []
        for _ in range(steps + 1):
            head, cache = network.extend(cache, token, jnp.ones_like(count), Causal())
            token = jnp.argmax(head.logits(), axis=-1).astype(jnp.int32)
            written.append(token)
        return jnp.argmax(drafts.logits(), axis=-1) == jnp.concatenate(written[1:], axis=1)

    parts = [compared(network, jnp.asarray(part), masks) for part in np.array_split(texts, max(len(texts) // 16, 1))]
    return np.concatenate(parts).mean(axis=0).tolist()


def _generate(model: LoadedModel, sampler, prompt, seed: int = 0) -> Generation:
    return pipeline.generate(model, sampler, [prompt], max_new_tokens=NEW.value, seed=seed).generation


def _accepted(model: LoadedModel, sampler: Speculative, prompts: list) -> dict:
    """Tokens of masks that are accepted in a cycle where every step is one, in the mean over cycles."""
    written = [_generate(model, sampler, prompt, seed) for prompt in prompts for seed in range(SEEDS.value)]
    made = np.array([int(text.length[0]) - 1 for text in written])
    cycles = np.array([(int(text.nfe) - 1) / 2 for text in written])
    mean, texts = made.sum() / cycles.sum(), len(written)
    apart = np.sqrt(np.square(made - mean * cycles).sum() * texts / max(texts - 1, 1)) / cycles.sum()  # of a ratio
    return {"mean": round(mean - 2, 3), "stderr": round(float(apart), 3), "cycles": cycles.sum(), "texts": texts}


def _written(model: LoadedModel, samplers: dict, prompts: list) -> dict:
    """Tokens a second of each sampler at batch 1, in turn, and the share of texts that are the autoregressive ones."""
    speeds, same = {name: [] for name in samplers}, {name: [] for name in samplers}
    for prompt in prompts:
        cases = {name: functools.partial(_generate, model, sampler, prompt) for name, sampler in samplers.items()}
        found = {name: case() for name, case in cases.items()}
        plain = found["autoregressive"]
        for name, timed in timing.alternate(cases, repeats=REPEATS).items():
            speeds[name].append(int(plain.length[0]) / timed.wall)
            same[name].append(bool((np.asarray(found[name].tokens) == np.asarray(plain.tokens)).all()))
    return {
        name: {
            "tokens_per_s": round(statistics.mean(found), 2),
            "times": round(statistics.mean(a / b for a, b in zip(found, speeds["autoregressive"], strict=True)), 3),
            "same_text": round(statistics.mean(same[name]), 3),
        }
        for name, found in speeds.items()
    }


if __name__ == "__main__":
    command.run(main, FLAGS)
