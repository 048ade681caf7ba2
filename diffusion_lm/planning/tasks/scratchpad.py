"""A scratchpad before the answer: the network first writes a canvas of intermediate results, then the answer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from diffusion_lm.planning.tasks.base import Example, Task

PAD = "."  # fills the scratchpad's canvas


class HasScratchpad(Task, Protocol):
    """A task that has useful intermediate results."""

    def scratchpad(self, example: Example) -> str:
        """Intermediate results in the task's alphabet; at most `max_lengths[1]` characters."""


@dataclass(frozen=True, kw_only=True)
class Scratchpad:
    """The task's prompts -> a scratchpad, dots to the end of its canvas, and the answer: `1000...` -> `1230....1234`.

    With canvases of `canvas` positions, the first holds the scratchpad and the second the answer. Only the answer is
    verified.
    """

    task: HasScratchpad

    @property
    def alphabet(self) -> str:
        return self.task.alphabet + PAD

    @property
    def canvas(self) -> int:
        """Positions of an answer, end of text included."""
        return self.task.max_lengths[1] + 1

    @property
    def max_lengths(self) -> tuple[int, int]:
        prompt, answer = self.task.max_lengths
        return prompt, self.canvas + answer

    @property
    def difficulty_unit(self) -> str:
        return self.task.difficulty_unit

    def draw(self, rng) -> Example:
        return self._with_scratchpad(self.task.draw(rng))

    def verify(self, prompt: str, answer: str) -> bool:
        return self.task.verify(prompt, answer[self.canvas :])

    def difficulty(self, example: Example) -> int:
        return self.task.difficulty(self._without_scratchpad(example))

    def split_key(self, example: Example) -> str:
        return self.task.split_key(self._without_scratchpad(example))

    def read(self, path: str | Path) -> list[Example]:
        return [self._with_scratchpad(example) for example in self.task.read(path)]

    def _with_scratchpad(self, example: Example) -> Example:
        return Example(example.prompt, self.task.scratchpad(example).ljust(self.canvas, PAD) + example.answer)

    def _without_scratchpad(self, example: Example) -> Example:
        return Example(example.prompt, example.answer[self.canvas :])
