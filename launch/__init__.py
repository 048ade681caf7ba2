"""Launchers: `python -m launch.NAME`."""

import sys


def _unhandled(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # a launcher imports for a second before `command.run` can catch anything
    sys.excepthook = _unhandled
