"""The papers page: the 68 systems of the reading list, what runs here, and claims that are checked by one click."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from app.components.papers import PaperList
from app.context import Context
from app.live import Visitor
from app.papers_checks import ClaimChecks
from app.papers_view import claim_page, paper_list, verdict_list
from app.run_service import sentences
from app.views.library import try_link
from studio_state.claims import Claim
from studio_state.errors import SpecError, StudioError
from studio_state.papers import Papers
from studio_state.store import Store

TITLE = "Papers"
Data = dict[str, Any]


def build(ctx: Context) -> None:
    """Lay out the page inside the current Blocks."""
    if ctx.store is None:
        raise ValueError("the papers page needs the record: Context(store=...)")
    PaperList(devices=ctx.devices, elem_id="papers", **paper_calls(ctx, ctx.store, Papers.load()))


def paper_calls(ctx: Context, store: Store, papers: Papers) -> dict[str, Callable[[Any], Data]]:
    """Functions of :class:`app.components.papers.PaperList`, by name; an error is ``{"error": sentence}``."""
    checks = ClaimChecks(ctx, store)

    def list_papers(_: Any) -> Data:
        @cache
        def link(method: str) -> str:
            card = ctx.catalog.by_id.get(method)
            return try_link(ctx, card) if card else ""

        def last(claim: str) -> Data:
            verdict = next((v.verdict for v in store.verdicts_on(claim)), "")
            return {"verdict": verdict, "running": checks.state(claim, Visitor())["running"]}

        return _answer(lambda: {"papers": paper_list(papers.papers, ctx.claims, link, last)})

    def open_claim(request: Data) -> Data:
        def found() -> Data:
            claim = _claim(ctx, request)
            store.refresh()
            verdicts = verdict_list(store.verdicts_on(claim.id), claim)
            return {
                **claim_page(claim, ctx.catalog),
                "verdicts": verdicts,
                "state": checks.state(claim.id, _visitor(ctx, request)),
            }

        return _answer(found)

    def begin_claim(request: Data) -> Data:
        def begun() -> Data:
            claim, visitor = _claim(ctx, request), _visitor(ctx, request)
            checks.begin(claim, visitor, str(request.get("device") or ctx.devices[0]))
            return {"state": checks.state(claim.id, visitor)}

        return _answer(begun)

    def claim_state(request: Data) -> Data:
        return _answer(lambda: {"state": checks.state(_claim(ctx, request).id, _visitor(ctx, request))})

    def cancel_claim(request: Data) -> Data:
        return _answer(lambda: {"message": checks.cancel(_claim(ctx, request).id, _visitor(ctx, request))})

    return {
        "list_papers": list_papers, "open_claim": open_claim, "begin_claim": begin_claim,
        "claim_state": claim_state, "cancel_claim": cancel_claim,
    }  # fmt: skip


def _answer(work: Callable[[], Data]) -> Data:
    try:
        return work()
    except StudioError as e:
        return {"error": " ".join(dict.fromkeys(sentences(e)))}


def _visitor(ctx: Context, request: Data) -> Visitor:
    return Visitor(str(request.get("owner") or "")[:200], ctx.is_host(str(request.get("host") or "")))


def _claim(ctx: Context, request: Data) -> Claim:
    name = str(request.get("claim"))
    if name not in ctx.claims:
        raise SpecError(f"there is no claim {name[:100]!r} in this studio; choose one from the list")
    return ctx.claims[name]
