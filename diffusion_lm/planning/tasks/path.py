"""Path planning: two chains of nodes share one node; find the path from start to goal through it."""

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
    """Edges in random order, then start and goal, `6,2/2,10/...-8,3` -> the path's edges `8,2/2,0/0,11/11,5/5,3`.

    The chains share one node, at the same depth of both. The start is the first node of either chain and the goal the
    last of either. Training and test share no set of edges with start and goal.

    nodes   possible node names, 0 to nodes - 1
    length  nodes of a chain, at least 3
    """

    nodes: int = 12
    length: int = 6
    alphabet = "0123456789,/-"
    difficulty_unit = "edges from the shared node to the goal"

    def __post_init__(self):
        if self.length < 3:
            raise ValueError(f"task.length must be at least 3; got {self.length}")
        if not 2 * self.length - 1 <= self.nodes <= 100:
            least = 2 * self.length - 1
            raise ValueError(f"task.nodes must be {least} (two chains of {self.length}) to 100; got {self.nodes}")

    @property
    def max_lengths(self) -> tuple[int, int]:
        """Reached where the longest names repeat most: at the shared node, then inside the chains."""
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
        path = rng.choice([one, other])[:at] + rng.choice([one, other])[at:]
        return Example(f"{'/'.join(edges)}-{path[0]},{path[-1]}", "/".join(_edges(path)))

    def verify(self, prompt: str, answer: str) -> bool:
        if not _PROMPT.fullmatch(prompt) or not _ANSWER.fullmatch(answer):
            return False
        edges, _, ends = prompt.partition("-")
        (start, goal), path = ends.split(","), answer.split("/")
        known = edges.split("/")
        if len(known) != 2 * (self.length - 1) or not set(path) <= set(known):
            return False
        firsts, lasts = zip(*(edge.split(",") for edge in path), strict=True)
        return firsts[0] == start and lasts[-1] == goal and firsts[1:] == lasts[:-1]

    def difficulty(self, example: Example) -> int:
        """How far a model has to look ahead where the chains branch.

        Both chains reach the shared node at the same depth, so that it has the same place in every path.
        """
        edges = [edge.split(",") for edge in example.prompt.partition("-")[0].split("/")]
        froms, tos = Counter(a for a, _ in edges), Counter(b for _, b in edges)
        path = [edge.split(",")[0] for edge in example.answer.split("/")]
        # The node that other edges share too; the goal, which is not in this list, if there is none.
        shared = next((at for at, node in enumerate(path) if max(froms[node], tos[node]) == 2), len(path))
        return self.length - 1 - shared

    def scratchpad(self, example: Example) -> str:
        """The nodes from the goal back to the shared one, `3,5,11`: they decide which branch to take."""
        back = [edge.split(",")[1] for edge in reversed(example.answer.split("/"))]
        start = example.answer.partition(",")[0]
        return ",".join([*back, start][: self.difficulty(example) + 1])

    def split_key(self, example: Example) -> str:
        edges, _, ends = example.prompt.partition("-")
        return "/".join(sorted(edges.split("/"))) + "-" + ends

    def read(self, path: str | File) -> list[Example]:
        return read_rows(self, path, "input", "output")


def _edges(chain: list[str]) -> list[str]:
    return [f"{a},{b}" for a, b in itertools.pairwise(chain)]
