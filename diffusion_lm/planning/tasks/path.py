"""Path planning: which of two ways on, at the one node where two chains meet, leads to the goal."""

import itertools
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path as File

from diffusion_lm.planning.tasks.base import Example, read_rows

_PROMPT = re.compile(r"\d+,\d+(/\d+,\d+)*-\d+,\d+", re.ASCII)
_ANSWER = re.compile(r"\d+,\d+(/\d+,\d+)*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class PathPlanning:
    """Edges `6,2/2,10/...-8,3` (then start and goal) -> the edges of a way `8,2/2,0/0,11/11,5/5,3`.

    Two chains of `length` nodes each out of `nodes`, one of which they share, as far down the one as down the other;
    edges are in random order. Start and goal are an end of either chain. Unseen: the edges, start and goal.
    """

    nodes: int = 12
    length: int = 6
    alphabet = "0123456789,/-"
    difficulty_unit = "edges from where the chains meet to the goal"

    def __post_init__(self):
        if self.length < 3:
            raise ValueError(f"task.length must be at least 3, not {self.length}: a way has a start, a middle, a goal")
        if not 2 * self.length - 1 <= self.nodes <= 100:
            least = 2 * self.length - 1
            raise ValueError(f"task.nodes must be {least} (two chains of {self.length}) to 100, not {self.nodes}")

    @property
    def max_lengths(self) -> tuple[int, int]:
        """The nodes with the longest names stand where names are repeated most: where the chains meet, then inside."""
        sizes = sorted((len(str(node)) for node in range(self.nodes)), reverse=True)
        edges = self.length - 1
        prompt = [4] + [2] * (2 * self.length - 4) + [1, 1]
        answer = [2] * (self.length - 2) + [1, 1]
        return (
            sum(size * times for size, times in zip(sizes, prompt, strict=False)) + 4 * edges + 1,
            sum(size * times for size, times in zip(sizes, answer, strict=False)) + 2 * edges - 1,
        )

    def draw(self, rng: random.Random) -> Example:
        names = [str(node) for node in rng.sample(range(self.nodes), 2 * self.length - 1)]
        at = rng.randrange(self.length)
        one, other = names[: self.length], names[self.length :]
        other.insert(at, one[at])
        edges = _edges(one) + _edges(other)
        rng.shuffle(edges)
        way = rng.choice([one, other])[:at] + rng.choice([one, other])[at:]
        return Example(f"{'/'.join(edges)}-{way[0]},{way[-1]}", "/".join(_edges(way)))

    def verify(self, prompt: str, answer: str) -> bool:
        if not _PROMPT.fullmatch(prompt) or not _ANSWER.fullmatch(answer):
            return False
        edges, _, ends = prompt.partition("-")
        (start, goal), way = ends.split(","), answer.split("/")
        known = edges.split("/")
        if len(known) != 2 * (self.length - 1) or not set(way) <= set(known):
            return False
        firsts, lasts = zip(*(edge.split(",") for edge in way), strict=True)
        return firsts[0] == start and lasts[-1] == goal and firsts[1:] == lasts[:-1]

    def difficulty(self, example: Example) -> int:
        """How far has to be looked ahead. The chains are as long before they meet as behind, so that the node where
        they do is at the same place in any way."""
        way = [edge.split(",")[0] for edge in example.answer.split("/")]
        return self.length - 1 - _meeting(way, example.prompt)

    def scratchpad(self, example: Example) -> str:
        """From the goal back to where the chains meet: `3,5,11`. What is ahead of that node is then known."""
        back = [edge.split(",")[1] for edge in reversed(example.answer.split("/"))]
        start = example.answer.partition(",")[0]
        return ",".join([*back, start][: self.difficulty(example) + 1])

    def split_key(self, example: Example) -> str:
        edges, _, ends = example.prompt.partition("-")
        return "/".join(sorted(edges.split("/"))) + "-" + ends

    def read(self, path: str | File) -> list[Example]:
        return read_rows(self, path, "input", "output")


def _meeting(way: list[str], prompt: str) -> int:
    """The place in a way of the node that stands in other edges too than the way's; its end, if none before it does."""
    edges = [edge.split(",") for edge in prompt.partition("-")[0].split("/")]
    froms, tos = Counter(a for a, _ in edges), Counter(b for _, b in edges)
    return next((at for at, node in enumerate(way) if max(froms[node], tos[node]) == 2), len(way))


def _edges(chain: list[str]) -> list[str]:
    return [f"{a},{b}" for a, b in itertools.pairwise(chain)]
