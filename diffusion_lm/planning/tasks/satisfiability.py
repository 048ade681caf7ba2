"""3-SAT: find an assignment that satisfies every clause."""

import functools
import itertools
import math
import random
from dataclasses import dataclass
from pathlib import Path

from diffusion_lm.planning.tasks.base import Example, read_rows

CLAUSES = {5: 41, 7: 45, 9: 51}  # of the public sets


@dataclass(frozen=True, kw_only=True)
class Satisfiability:
    """Clauses `1,4,0/1,9,5/...` -> an assignment `1,2,3,9,5`, written as its true literals.

    Literals are those of the public sets: variable v is the digit v. Its negation is the digit v + 5 (0 for 10) with
    5 variables, and the v-th letter from b on with more. All clauses of a prompt differ. Training and test share no
    set of clauses.

    variables  3 to 9
    clauses    of a prompt; 0: as many as the public set of so many variables has
    """

    variables: int = 5
    clauses: int = 0
    difficulty_unit = "satisfying assignments"

    def __post_init__(self):
        if not 3 <= self.variables <= 9:
            raise ValueError(f"task.variables must be 3 to 9; got {self.variables}")
        if not self.clauses and self.variables not in CLAUSES:
            raise ValueError(f"no public set has {self.variables} variables: set task.clauses")
        most = 7 * math.comb(self.variables, 3)
        if not 0 <= self.clauses <= most:
            raise ValueError(f"task.clauses must be at most {most} for {self.variables} variables; got {self.clauses}")

    @property
    def count(self) -> int:
        """Clauses of a prompt."""
        return self.clauses or CLAUSES[self.variables]

    @property
    def literals(self) -> str:
        """The characters of all variables, then of their negations."""
        return "123456789"[: self.variables] + ("67890" if self.variables <= 5 else "bcdefghij")[: self.variables]

    @property
    def alphabet(self) -> str:
        return self.literals + ",/"

    @property
    def max_lengths(self) -> tuple[int, int]:
        return 6 * self.count - 1, 2 * self.variables - 1

    def draw(self, rng: random.Random) -> Example:
        """A random assignment, and random clauses among those that it satisfies."""
        assignment = tuple(rng.random() < 0.5 for _ in range(self.variables))
        clauses = rng.sample(_satisfied(self.literals, assignment), self.count)
        return Example("/".join(clauses), ",".join(_literals(self.literals, enumerate(assignment))))

    def verify(self, prompt: str, answer: str) -> bool:
        clauses, chosen = [clause.split(",") for clause in prompt.split("/")], answer.split(",")
        if len(clauses) != self.count or any(len(clause) != 3 or not self._known(clause) for clause in clauses):
            return False
        if not self._known(chosen) or [self.literals.index(c) % self.variables for c in chosen] != list(
            range(self.variables)
        ):
            return False
        return all(set(chosen) & set(clause) for clause in clauses)

    def difficulty(self, example: Example) -> int:
        clauses = [set(clause.split(",")) for clause in example.prompt.split("/")]
        signs = itertools.product((True, False), repeat=self.variables)
        assignments = (_literals(self.literals, enumerate(choice)) for choice in signs)
        return sum(not any(clause.isdisjoint(chosen) for clause in clauses) for chosen in assignments)

    def split_key(self, example: Example) -> str:
        return "/".join(sorted(example.prompt.split("/")))

    def read(self, path: str | Path) -> list[Example]:
        return read_rows(self, path, "input", "output")

    def _known(self, literals: list[str]) -> bool:
        return all(len(literal) == 1 and literal in self.literals for literal in literals)


def _literals(literals: str, signs) -> list[str]:
    """The true literals of pairs (variable, whether it is true)."""
    return [literals[variable + (0 if true else len(literals) // 2)] for variable, true in signs]


@functools.cache
def _satisfied(literals: str, assignment: tuple[bool, ...]) -> list[str]:
    """Each clause that an assignment satisfies: seven of the eight of any three variables."""
    return [
        ",".join(_literals(literals, zip(trio, signs, strict=True)))
        for trio in itertools.combinations(range(len(assignment)), 3)
        for signs in itertools.product((True, False), repeat=3)
        if any(assignment[variable] == sign for variable, sign in zip(trio, signs, strict=True))
    ]
