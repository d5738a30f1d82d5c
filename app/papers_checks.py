"""Claims that are checked in the background of the studio: one at a time each, through the dispatcher's queue."""

from __future__ import annotations

import hmac
import logging
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from app.claim_run import check_claim, specs_of
from app.context import Context
from app.live import Visitor
from app.race_view import head
from app.run_service import all_problems, cancel_for, sentences, start
from studio_state.claims import Claim
from studio_state.errors import StudioError
from studio_state.experiment import ExperimentSpec
from studio_state.results import Results, results_of
from studio_state.store import Store

log = logging.getLogger(__name__)
NEVER: dict[str, Any] = {"running": False}


@dataclass
class Checking:
    """One claim in hand, or the last time it was.

    Attributes:
        owner: secret of the browser that asked; it may cancel.
        number: experiments begun.
        experiment: id of the one in hand.
        wanted: False once somebody cancelled.
        message: how it ended, where that is not a verdict.
    """

    claim: Claim
    owner: str
    specs: dict[str, ExperimentSpec]
    name: str = ""
    number: int = 0
    experiment: str = ""
    wanted: bool = True
    over: bool = False
    failed: bool = False
    message: str = ""
    guard: threading.Lock = field(default_factory=threading.Lock)

    def may_cancel(self, visitor: Visitor) -> bool:
        """True for who asked for it, and for the host."""
        return visitor.host or (bool(self.owner) and hmac.compare_digest(self.owner.encode(), visitor.owner.encode()))


class ClaimChecks:
    """Starts, watches and cancels checks. Safe to call from any thread.

    Args:
        store: verdicts are recorded here.
    """

    def __init__(self, ctx: Context, store: Store):
        self._ctx, self._store = ctx, store
        self._latest: dict[str, Checking] = {}
        self._lock = threading.Lock()

    def begin(self, claim: Claim, visitor: Visitor, device: str) -> None:
        """Check a claim in the background; a claim that is being checked goes on.

        Raises:
            SpecError: an experiment of it cannot run here.
        """
        specs = specs_of(claim, None, device, lambda spec: all_problems(self._ctx, spec))
        with self._lock:
            before = self._latest.get(claim.id)
            if before is not None and not before.over:
                return
            check = self._latest[claim.id] = Checking(claim, visitor.owner, specs)
        threading.Thread(target=self._work, args=(check,), name=f"claim-{claim.id}", daemon=True).start()

    def cancel(self, claim: str, visitor: Visitor) -> str:
        """Stop a check; returns a sentence.

        Raises:
            StudioError: somebody else asked for it.
        """
        check = self._latest.get(claim)
        if check is None or check.over:
            return "This claim is not being checked; there is nothing to cancel."
        if not check.may_cancel(visitor):
            raise StudioError("somebody else started this check; only they or the host may cancel it")
        with check.guard:
            check.wanted = False
            if check.experiment and self._ctx.dispatch.place(check.experiment) is not None:
                cancel_for(self._ctx, check.experiment, visitor)
        return "Cancelling: what was measured so far is kept in the history."

    def state(self, claim: str, visitor: Visitor) -> dict[str, Any]:
        """How a check stands: text, share done, whether this visitor may cancel it; afterwards how it ended."""
        check = self._latest.get(claim)
        if check is None:
            return NEVER
        text, done = self._progress(check)
        return {
            "running": not check.over, "text": text, "done": done,
            "mine": check.may_cancel(visitor), "message": check.message, "failed": check.failed,
        }  # fmt: skip

    def _progress(self, check: Checking) -> tuple[str, float | None]:
        of = len(check.specs)
        race = self._ctx.races.get(check.experiment) if check.experiment else None
        if race is None:
            return "Starting", None
        line = head(race, time.time(), self._ctx.dispatch.place(check.experiment))
        if race.status == "finished":
            line = {**line, "text": "Judging" if check.number == of else "Done"}
        words = f"Experiment {check.number} of {of}, {check.name}: {line['text']}"
        return ", ".join(filter(None, (words, line["eta"]))), (check.number - 1 + (line["done"] or 0.0)) / of

    # -- on the thread of the check ------------------------------------------------------------------------------------
    def _work(self, check: Checking) -> None:
        try:
            verdict = check_claim(
                check.claim, check.specs, lambda name, spec: self._run(check, name, spec), lambda entries: self._store.record(*entries), by="studio"
            )  # fmt: skip
            check.message = (
                "" if verdict else "Cancelled before a verdict could be given; what was measured is kept in the history."
            )
        except StudioError as e:
            check.failed, check.message = True, " ".join(sentences(e))
        except Exception as e:  # an error of ours must be told on the page, not end a silent thread
            log.exception("claim %s", check.claim.id)
            check.failed, check.message = True, f"Internal error while checking: {type(e).__name__}: {e}; please report it."
        finally:
            check.over = True

    def _run(self, check: Checking, name: str, spec: ExperimentSpec) -> Results | None:
        """Submit one experiment and wait for its end; None if it was cancelled, here or elsewhere."""
        with check.guard:
            if not check.wanted:
                return None
            check.experiment = start(self._ctx, spec, check.owner, origin="claim")
            check.name, check.number = name, check.number + 1
        found = results_of(self._ctx.dispatch.follow(check.experiment))
        return None if found.status == "cancelled" else found
