"""Launchers: `python -m launch.NAME`."""

import os
import signal
import sys


def _interrupted(*_):
    """At once: where modules are imported, KeyboardInterrupt may be caught, or become an ImportError."""
    print("error: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)  # a launcher imports for a second; `command.run` takes it back
