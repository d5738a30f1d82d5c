"""``pareto-studio``: turns errors into one sentence and an exit status."""

from __future__ import annotations

import os
import sys

from studio_state.errors import SpecError, StudioError

DEBUG_VARIABLE = "PARETO_STUDIO_DEBUG"


def main() -> None:
    """Run the command line.

    ``--debug`` anywhere (or ``PARETO_STUDIO_DEBUG=1``) shows the traceback of an error.
    """
    from app.cli import cli

    debug = bool(os.environ.get(DEBUG_VARIABLE))
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        debug = True
    try:
        cli()
    except Exception as e:
        if debug:
            raise
        sys.exit(explain(e))


def explain(error: Exception) -> int:
    """Say on stderr what went wrong; returns the exit status."""
    if isinstance(error, SpecError):
        for problem in error.problems:
            print(problem.sentence(), file=sys.stderr)
        return 2
    if isinstance(error, StudioError):
        print(error, file=sys.stderr)
    else:
        print(
            f"unexpected error: {type(error).__name__}: {error}; run it again with --debug and report what it shows",
            file=sys.stderr,
        )
    return 1


if __name__ == "__main__":
    main()
