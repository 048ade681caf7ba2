"""How often long work says how far it is."""

import time

SECONDS = 10


class Progress:
    """Begins with the work, so that what is done in SECONDS says nothing."""

    def __init__(self):
        self._said = time.monotonic()

    def due(self) -> bool:
        """Whether SECONDS have passed since this was last true, or since the beginning."""
        now = time.monotonic()
        if now - self._said < SECONDS:
            return False
        self._said = now
        return True
