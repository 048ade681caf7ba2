"""Cases of a pretended library, for tests of benchmarks that run it in a process of its own."""

import os
import sys


def chatty(word: str):
    """Two cases of a library that prints, whole lines and others."""
    print("starting,", end=" ")

    def prints() -> None:
        print(word)
        print(f"{word} without a newline", end="")

    return {"prints": prints, "prints more": lambda: [prints() for _ in range(3)]}


def single():
    """One case, without a name."""
    return lambda: None


def no_library():
    """A library that can't start."""
    raise OSError("no compiler is found\nand more is said")


def dies(calls: int):
    """One case, whose process ends in a later call."""
    left = iter(range(calls))
    return lambda: next(left, None) is not None or os._exit(3)


def fails():
    """One case that can't run."""
    return lambda: sys.modules["no such module"]
