"""Our models in EleutherAI's lm-evaluation-harness (the package lm-eval, extra [eval]).

    python -m launch.harness --workdir=runs/smollm2 --tasks=TASK --include_path=FOLDER
    python -m diffusion_lm.inference.harness --model diffusion_lm --model_args workdir=runs/smollm2 --tasks TASK

lm-eval finds no models in other packages: the second line is its own command line after this file has registered ours.
"""

import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from diffusion_lm import files
from diffusion_lm.inference import api, by_name, pipeline, scoring
from diffusion_lm.loaded_model import LoadedModel
from diffusion_lm.models.bound_model import BoundModel
from diffusion_lm.samplers.sampling_params import SamplingParams

try:
    from lm_eval.api.model import LM
except ImportError:  # all but the harness's own side works without it
    LM = object

NAME = "diffusion_lm"
MAX_NEW_TOKENS = 256  # where a task doesn't say
_UNSAID_DEVICE = "cuda:0"  # what lm-eval's command line passes where nobody names a device
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")


class RequestCache:
    """Results by request in a JSON Lines file, which grows as they come: what a killed run had finished is not lost."""

    def __init__(self, path: Path | str | None, identity: Any):
        """identity: what the results depend on beside the request. Raises ValueError for a file of another kind."""
        self._identity, self._known, self._path = identity, {}, None if path is None else Path(path)
        if self._path is None or not self._path.exists():
            return
        *lines, rest = self._path.read_text(encoding="utf-8").split("\n")
        try:
            self._known = dict(json.loads(line) for line in lines)
        except (ValueError, TypeError):
            raise ValueError(f"{path} is no cache of requests: name another file, or remove it") from None
        if rest:  # the line that was being written
            self._path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def key(self, kind: str, arguments: Sequence, repeat: int) -> str:
        """Of the request's repeat-th occurrence."""
        said = json.dumps([self._identity, kind, arguments, repeat], sort_keys=True)
        return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()

    def get(self, key: str) -> Any:
        """The result, or None."""
        return self._known.get(key)

    def keep(self, results: Mapping[str, Any]) -> None:
        """Adds results of one batch."""
        self._known |= results
        if self._path is not None:
            with files.named(self._path), self._path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{json.dumps([key, value])}\n" for key, value in results.items()))


class DiffusionLM(LM):
    """What lm-eval asks of a model. See the arguments of `launch.harness` for the options."""

    def __init__(
        self,
        workdir: str | LoadedModel,
        *,
        sampler: str | None = None,
        denoising_steps: int | None = None,
        canvas_length: int = 0,
        draws: int = 32,
        seed: int = 0,
        batch_size: int = 16,
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
        request_cache: str | None = None,
        max_batch_size: None = None,
        device: str | None = None,
    ):
        if LM is not object:
            super().__init__()
        if sampler == "auto":
            raise ValueError("sampler=auto chooses by measured speed, so that results would differ: name another")
        if not isinstance(batch_size, int | str) or not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be an integer of at least 1; got {batch_size}")
        if max_batch_size is not None or device not in (None, _UNSAID_DEVICE):
            raise ValueError("max_batch_size and device don't apply: leave them out")
        loaded = workdir if isinstance(workdir, LoadedModel) else api.load(workdir)
        self.model = _computing_in(loaded, compute_dtype)
        self.batch_size = int(batch_size)
        self._making = {"sampler": sampler, "denoising_steps": denoising_steps, "canvas_length": canvas_length}
        self._draws, self._seed, self._samplers = draws, seed, {}
        self._counts: dict[str, Counter] = {}
        made = self._sampler(SamplingParams(temperature=0.0, suppressed=self.model.tokenizer.suppressed))
        steps = getattr(getattr(made, "sampler", None), "denoising_steps", None)
        self._said = {
            "checkpoint_step": self.model.step,
            "likelihood": "exact" if self.model.config.objective.trains_ar else "ELBO",
            "sampler": sampler or type(getattr(made, "sampler", made)).__name__,
            "denoising_steps": steps,
            "canvas_length": getattr(made, "canvas_length", None),
            "seed": seed,
            "draws": 0 if self.model.config.objective.trains_ar else draws,
            "compute_dtype": compute_dtype,
        }
        self._cache = RequestCache(request_cache, self._said | {"weights": _fingerprint(self.model)})

    def get_model_info(self) -> dict[str, Any]:
        """How the results came about, and what they cost: lm-eval adds it to its results."""
        return self._said | {"batch_size": self.batch_size, "requests": {k: _costs(c) for k, c in self._counts.items()}}

    # ---- what lm-eval calls; a request's `args` are texts and options ----

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log probability, whether greedy) of each (context, continuation)."""
        del disable_tqdm
        found = self._cached("loglikelihood", [request.args for request in requests], self._continuations)
        return [(log_prob, greedy) for log_prob, greedy, _ in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each (text,), begin of text given, end of text left out."""
        del disable_tqdm
        return [found[0] for found in self._cached("loglikelihood_rolling", [r.args for r in requests], self._texts)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each (context, options), up to the first of its stop strings."""
        del disable_tqdm
        return self._cached("generate_until", [request.args for request in requests], self._answers)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's own cache."""
        return self.model.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's template, which lm-eval stores."""
        return getattr(self.model.tokenizer, "chat_template", "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text. Raises ValueError for a model without a template."""
        if not hasattr(self.model.tokenizer, "render_chat"):
            raise ValueError("chats are for converted models with a chat template; this one was trained on plain text")
        return self.model.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt).text

    # ---- batches ----

    def _cached(self, kind: str, requests: list[tuple], run: Any) -> list:
        """Each request's result: from the cache, or as `run` yields them batch by batch, {index: result}."""
        seen, keys = Counter(), []
        for arguments in requests:
            said = json.dumps(arguments, sort_keys=True) if kind == "generate_until" else None
            keys.append((self._cache.key(kind, arguments, seen[said]), seen[said]))
            seen[said] += said is not None  # a repeated prompt draws anew; a likelihood is what it is
        missing = {key: i for i, (key, _) in enumerate(keys) if self._cache.get(key) is None}
        todo, counts = list(missing.values()), self._counts.setdefault(kind, Counter())
        counts.update(requests=len(requests), cached=len(requests) - len(todo))
        start = time.perf_counter()
        given = ([keys[i][1] for i in todo],) if kind == "generate_until" else ()
        for batch in run([requests[i] for i in todo], counts, *given):
            self._cache.keep({keys[todo[i]][0]: result for i, result in batch.items()})
            for i, result in batch.items() if LM is not object else ():
                value = result if isinstance(result, str) else result[0] if len(result) == 1 else tuple(result[:2])
                self.cache_hook.add_partial(kind, requests[todo[i]], value)
        counts["seconds"] += time.perf_counter() - start
        return [self._cache.get(key) for key, _ in keys]

    def _continuations(self, requests: list[tuple], counts: Counter) -> Iterator[dict]:
        scored = []
        for context, continuation in requests:
            before, ids = self._encode_pair(context, continuation)
            kept = scoring.fitting(self.model, before, ids)
            counts["truncated"] += len(kept) < len(before)
            scored.append(scoring.Request(kept, ids))
        for index, found in self._score(scored, counts):
            yield {index: [found.log_prob, found.greedy, found.standard_error]}

    def _texts(self, requests: list[tuple], counts: Counter) -> Iterator[dict]:
        parts, owner = [], []
        for index, (text,) in enumerate(requests):
            own = scoring.windows(self.model, self._encode(text), self.model.tokenizer.bos)
            parts, owner = parts + own, owner + [index] * len(own)
        left, sums = Counter(owner), np.zeros((len(requests), 2))
        yield {index: [0.0, 0.0] for index in range(len(requests)) if not left[index]}  # an empty text is certain
        for number, found in self._score(parts, counts):
            index = owner[number]
            sums[index] += found.log_prob, found.standard_error**2
            left[index] -= 1
            if not left[index]:
                yield {index: [float(sums[index, 0]), float(np.sqrt(sums[index, 1]))]}

    def _score(self, requests: list[scoring.Request], counts: Counter) -> Iterator[tuple[int, scoring.Scored]]:
        options = {"draws": self._draws, "seed": self._seed, "batch_size": self.batch_size}
        for index, found in scoring.score(self.model, requests, **options):
            counts.update(tokens=len(requests[index].continuation), passes=found.passes, errors=found.standard_error)
            yield index, found

    def _answers(self, requests: list[tuple], counts: Counter, repeats: list[int]) -> Iterator[dict]:
        context, groups = self.model.config.data.seq_len, {}
        for index, (prompt, options) in enumerate(requests):
            until, most, sampling = self._options(options)
            if not most < context:
                raise ValueError(f"max_gen_toks={most} leaves no room for a prompt in the context of {context}")
            ids = self._with_bos(self._encode(prompt))
            counts["truncated"] += len(ids) > context - most
            groups.setdefault((most, sampling), []).append((len(ids), index, ids[-(context - most) :], until))
        for (most, sampling), members in groups.items():
            members.sort(key=lambda member: -member[0])
            for first in range(0, len(members), self.batch_size):
                some = members[first : first + self.batch_size]
                output = pipeline.generate(
                    self.model, self._sampler(sampling), [ids for _, _, ids, _ in some], max_new_tokens=most,
                    seed=[(self._seed + repeats[index]) % 2**32 for _, index, _, _ in some],
                )  # fmt: skip
                tokens, nfe = int(np.sum(output.generation.length)), int(output.generation.nfe)
                counts.update(tokens=tokens, passes=nfe * len(some))
                yield {index: _cut(text, until) for (_, index, _, until), text in zip(some, output.texts, strict=True)}

    def _options(self, options: Mapping[str, Any]) -> tuple[tuple[str, ...], int, SamplingParams]:
        """Stop strings, tokens and sampling of a task's generation_kwargs, as Hugging Face means them."""
        options = dict(options)
        until, most = options.pop("until", None) or [], options.pop("max_gen_toks", MAX_NEW_TOKENS)
        until = (until,) if isinstance(until, str) else tuple(filter(None, until))
        sampling = {name: options.pop(name) for name in _SAMPLING if options.get(name) is not None}
        sampled = options.pop("do_sample", sampling.get("temperature", 0) > 0)
        if options:
            raise ValueError(f"generation_kwargs {', '.join(options)} isn't known: leave it out of the task")
        sampling = {"temperature": 1.0, **sampling} if sampled else {"temperature": 0.0}
        return until, int(most), SamplingParams(**sampling, suppressed=self.model.tokenizer.suppressed)

    def _sampler(self, sampling: SamplingParams) -> Any:
        if sampling not in self._samplers:
            self._samplers[sampling] = by_name.make_sampler(self.model, sampling=sampling, **self._making)
        return self._samplers[sampling]

    # ---- texts ----

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = self.model.tokenizer.encode(text)
        if self.model.tokenizer.unknown in ids:
            raise ValueError(f"the tokenizer has no token for a part of {text[:60]!r}: this task isn't for this model")
        return tuple(map(int, ids))

    def _with_bos(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """As in training: begin of text first where texts have one, unless a chat template has written it."""
        tokenizer = self.model.tokenizer
        return ids if ids and (ids[0] == tokenizer.bos or not tokenizer.adds_bos) else (tokenizer.bos, *ids)

    def _encode_pair(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The context's tokens, and the others of both texts together; spaces between are the continuation's."""
        bare = context.rstrip()
        before, whole = self._encode(bare), self._encode(context + continuation)
        if len(whole) <= len(before):
            raise ValueError(f"{continuation[:60]!r} has no token of its own after {context[-20:]!r}")
        return self._with_bos(before), whole[len(before) :]


def _cut(text: str, until: Sequence[str]) -> str:
    return text[: min((text.find(stop) for stop in until if stop in text), default=None)]


def _computing_in(model: LoadedModel, compute_dtype: str) -> LoadedModel:
    """The model with products of this type. In bfloat16 a row's numbers depend a little on the batch."""
    config = dataclasses.replace(model.config, exec=dataclasses.replace(model.config.exec, compute_dtype=compute_dtype))
    network = BoundModel(module=model.network.module.clone(exec=config.exec), params=model.network.params)
    return model._replace(config=config, network=network, prepared={})


def _fingerprint(model: LoadedModel) -> str:
    """Changes with the network's form, its tokenizer and, but for chance, its weights."""
    digest = hashlib.sha256(json.dumps([model.meta.config, model.tokenizer.fingerprint], sort_keys=True).encode())
    for leaf in jax.tree.leaves(model.network.params):
        digest.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)][:1024], np.float32).tobytes())
    return digest.hexdigest()[:16]


def _costs(counts: Counter) -> dict[str, Any]:
    """What a kind of requests cost; those from the cache cost nothing."""
    scored = max(counts["requests"] - counts["cached"], 1)
    return {
        "requests": counts["requests"],
        "from_cache": counts["cached"],
        "truncated_contexts": counts["truncated"],
        "tokens": counts["tokens"],
        "nfe_per_token": round(counts["passes"] / max(counts["tokens"], 1), 4),
        "tokens_per_s": round(counts["tokens"] / counts["seconds"], 2) if counts["seconds"] else None,
        "mean_standard_error": counts["errors"] / scored,
    }


def register() -> None:
    """Makes lm-eval know the model by NAME. Raises ImportError without lm-eval."""
    from lm_eval.api.registry import register_model

    register_model(NAME)(DiffusionLM)


def main() -> None:
    """lm-eval's own command line, which then knows our model."""
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


if __name__ == "__main__":
    from diffusion_lm.inference import harness  # by its own name, not as __main__

    harness.main()
