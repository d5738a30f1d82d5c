"""The live feed: one WebSocket per browser tab, five looks a second, only what changed.

Gradio's login does not cover a route of our own, so every connection carries an unguessable token
that an authenticated event handed out, and must come from a page of this host (``Origin``).
Where a proxy refuses WebSockets the same feed answers plain HTTP requests (``/live/TOKEN/poll``).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from app import race_cache, race_charts, race_drawn, race_experts, race_gallery, race_images, race_outputs, race_view, race_why
from app.dispatch.job import owner_mark
from app.race import Race
from studio_state.events import Event

LOOK_EVERY_S = 0.2
MAX_TOKENS = 2000
MAX_RACES = 32
MAX_MESSAGE = 2000
CLOSE_REFUSED = 4403

Since = Callable[[str, int], Iterable[Event]]


@dataclass(frozen=True)
class Visitor:
    """Who looks at a page.

    Attributes:
        owner: the browser's secret, under which it submits experiments.
        host: the person who started the studio; may cancel any experiment.
    """

    owner: str = ""
    host: bool = False

    def may_cancel(self, race: Race) -> bool:
        """True if this is who started the race, or the host."""
        return self.host or (bool(self.owner) and race.owner == owner_mark(self.owner))


class Tokens:
    """Tokens of open pages, each with who asks; the oldest are forgotten."""

    def __init__(self, most: int = MAX_TOKENS):
        self._known: OrderedDict[str, Visitor] = OrderedDict()
        self._most = most
        self._lock = threading.Lock()

    def issue(self, visitor: Visitor) -> str:
        """A new token for a page."""
        token = secrets.token_urlsafe(24)
        with self._lock:
            self._known[token] = visitor
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return token

    def visitor(self, token: str) -> Visitor | None:
        """Who the token was given to; None for a token never issued, or forgotten. Using a token keeps it."""
        with self._lock:
            if token not in self._known:
                return None
            self._known.move_to_end(token)
            return self._known[token]


class Races:
    """The folded state of the experiments that somebody looks at. Safe to call from any thread.

    Args:
        since: events of an experiment with the given ``seq`` or later.
        place: place in the queue, 0 = in hand, 1 = next; None = neither.
        jobs: experiments that wait, run or ended last, for the list on the page.
        abandoned: True if no living process runs or records an experiment.
    """

    def __init__(
        self,
        since: Since,
        place: Callable[[str], int | None],
        jobs: Callable[[], list[dict[str, Any]]],
        abandoned: Callable[[str], bool],
    ):
        self._since, self._place, self.jobs, self._abandoned = since, place, jobs, abandoned
        self._races: OrderedDict[str, Race] = OrderedDict()
        self._texts: dict[tuple[str, str, str | None], tuple[int, str]] = {}
        self._lock = threading.Lock()

    def get(self, experiment: str) -> Race | None:
        """The race as it stands now; None if there is no such experiment."""
        with self._lock:
            return self._caught_up(experiment)

    def _caught_up(self, experiment: str) -> Race | None:
        race = self._races.get(experiment) or Race(experiment)
        if not race.over:
            gone = self._abandoned(experiment)  # asked first: an end that comes in between is then still read
            race.feed(self._since(experiment, race.seq + 1))
            if gone and not race.over and race.seq >= 0:
                race.interrupt()
                self._forget_texts(experiment)
        if race.seq < 0:
            return None
        self._races[experiment] = race
        self._races.move_to_end(experiment)
        while len(self._races) > MAX_RACES:
            self._forget_texts(self._races.popitem(last=False)[0])
        return race

    def _forget_texts(self, experiment: str) -> None:
        self._texts = {k: v for k, v in self._texts.items() if k[0] != experiment}

    def finished(self) -> list[Race]:
        """The races at hand that are over, newest first."""
        with self._lock:
            return sorted((r for r in self._races.values() if r.over), key=lambda r: r.experiment, reverse=True)

    def sections(self, experiment: str, item: str | None, visitor: Visitor) -> dict[str, str]:
        """Section name -> JSON text. Sections that did not change since the last look are not made again."""
        with self._lock:
            race = self._caught_up(experiment)
            if race is None:
                missing = {
                    "experiment": experiment,
                    "status": "unknown",
                    "text": "There is no such experiment here.",
                    "over": True,
                }
                return {"head": _dump(missing)}
            out = {"head": _dump(race_view.head(race, time.time(), self._place(experiment)) | {"mine": visitor.may_cancel(race)})}
            for name, make in _SECTIONS.items():
                key = (experiment, name, item)
                seq, text = self._texts.get(key, (-2, ""))
                if seq != race.seq:
                    text = _dump(make(race, item))
                    self._texts[key] = (race.seq, text)
                out[name] = text
            return out

    def pictures(self, experiment: str, since: int, item: str | None, ahead: Collection[str]) -> dict[str, Any]:
        """What is new in the grid of pictures (see :func:`race_gallery.gallery`)."""
        with self._lock:
            race = self._races.get(experiment)
            return race_gallery.gallery(race, since, item, ahead) if race else {"upto": since, "rows": []}


_SECTIONS: dict[str, Callable[[Race, str | None], Any]] = {
    "lanes": lambda race, item: race_view.lanes(race),
    "streams": race_outputs.streams,
    "images": race_images.images,
    "drawn": race_drawn.drawn,
    "charts": race_charts.charts,
    "kept": race_outputs.kept,
    "cache": race_cache.cache,
    "experts": race_experts.experts,
    "why": race_why.why,
    "table": lambda race, item: race_view.table(race),
}


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


class Viewer:
    """What one page looks at, and what it has already been told."""

    def __init__(self, races: Races, visitor: Visitor):
        self._races, self._visitor = races, visitor
        self._told: dict[str, str] = {}
        self.experiment = ""
        self.item: str | None = None
        self.seen = -1
        self._ahead: set[str] = set()

    def ask(self, message: Any) -> None:
        """Change what is looked at: ``{"watch": experiment, "item": id or null, "seen": upto}``. Anything else is ignored.

        ``seen`` is how far the page knows the pictures of this experiment, from a connection that it lost.
        """
        if not isinstance(message, dict):
            return
        experiment, item = message.get("watch", ""), message.get("item")
        if isinstance(experiment, str) and len(experiment) <= 100 and experiment != self.experiment:
            seen = message.get("seen")
            self.experiment, self._told, self._ahead = experiment, {}, set()
            self.seen = seen if isinstance(seen, int) else -1
        self.item = item if isinstance(item, str) and len(item) <= 200 else None

    def news(self) -> str:
        """The sections that changed since the last call, as one JSON object; empty if none did."""
        now = {"jobs": _dump(self._races.jobs())}
        if self.experiment:
            now |= self._races.sections(self.experiment, self.item, self._visitor)
        changed = {name: text for name, text in now.items() if self._told.get(name) != text}
        self._told |= changed
        changed |= self._pictures()
        return "{" + ",".join(f'"{name}":{text}' for name, text in changed.items()) + "}" if changed else ""

    def _pictures(self) -> dict[str, str]:
        """Pictures and marks that the page does not have yet; each picture goes out once, not with every look."""
        new = self._races.pictures(self.experiment, self.seen, self.item, self._ahead)
        self.seen = new["upto"]
        self._ahead |= {key for row in new["rows"] for key in race_gallery.keys_of(row)}
        return {"pictures": _dump(new)} if new["rows"] else {}


def same_host(connection: HTTPConnection) -> bool:
    """True if the request comes from a page of this host (CORS does not cover WebSockets)."""
    origin = connection.headers.get("origin")
    hosts = {connection.headers.get("host"), connection.headers.get("x-forwarded-host")} - {None}
    return origin is not None and urlsplit(origin).netloc in hosts


def routes(tokens: Tokens, races: Races) -> list[BaseRoute]:
    """The routes to be added to the server."""

    async def live(socket: WebSocket) -> None:
        visitor = tokens.visitor(socket.path_params["token"])
        if visitor is None or not same_host(socket):
            await socket.accept()
            await socket.close(CLOSE_REFUSED, "this page is not known to the studio; reload it")
            return
        await socket.accept()
        viewer = Viewer(races, visitor)
        listener = asyncio.create_task(_listen(socket, viewer))
        try:
            while not listener.done():
                text = await asyncio.to_thread(viewer.news)
                if text:
                    await socket.send_text(text)
                await asyncio.sleep(LOOK_EVERY_S)
        except (WebSocketDisconnect, RuntimeError):  # RuntimeError: the socket closed between two sends
            return
        finally:
            listener.cancel()

    async def poll(request: Request) -> Response:
        allowed = "origin" not in request.headers or same_host(request)
        visitor = tokens.visitor(request.path_params["token"])
        if visitor is None or not allowed:
            return JSONResponse({"error": "this page is not known to the studio; reload it"}, status_code=403)
        viewer = Viewer(races, visitor)
        query = request.query_params
        seen = query.get("seen", "")
        viewer.ask(
            {
                "watch": query.get("watch", ""),
                "item": query.get("item"),
                "seen": int(seen) if seen.isascii() and seen.isdigit() and len(seen) < 16 else -1,
            }
        )
        return Response(await asyncio.to_thread(viewer.news) or "{}", media_type="application/json")

    return [WebSocketRoute("/live/{token}", live), Route("/live/{token}/poll", poll)]


async def _listen(socket: WebSocket, viewer: Viewer) -> None:
    """Take the page's wishes until it leaves."""
    try:
        while True:
            text = await socket.receive_text()
            if len(text) <= MAX_MESSAGE:
                viewer.ask(_parse(text))
    except WebSocketDisconnect:
        return


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None
