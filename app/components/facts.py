"""Facts and notices: short texts that come from users, models and workers, shown as text and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import gradio as gr

Tone = Literal["info", "warning", "error"]


class Facts(gr.HTML):
    """A list of (label, text) pairs with an optional note; see :func:`facts`."""

    def __init__(self, value: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(
            value=value or facts([]),
            html_template='<div class="ps-facts-place"></div>',
            js_on_load="ParetoStudio.mountFacts(element, props, watch);",
            apply_default_css=False,
            **kwargs,
        )


class Notice(gr.HTML):
    """One or more sentences, spoken by screen readers when they change; see :func:`notice`."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            value=notice(),
            html_template='<div role="alert"><div class="ps-notice-place"></div></div>',
            js_on_load="ParetoStudio.mountNotice(element, props, watch);",
            apply_default_css=False,
            **kwargs,
        )


class LinkBox(gr.HTML):
    """The link to what stands on the page; ``value`` is ``{"packed": text for ?p=}``. Empty until asked for."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            value={},
            html_template='<div class="ps-link-place"></div>',
            js_on_load="ParetoStudio.mountLink(element, props, watch);",
            apply_default_css=False,
            **kwargs,
        )


def facts(rows: Iterable[tuple[str, str]], note: str = "", tone: Tone = "info") -> dict[str, Any]:
    """Value of :class:`Facts`; empty texts are left out."""
    return {"rows": [[label, text] for label, text in rows if text], "note": note, "tone": tone}


def notice(lines: str | Sequence[str] = (), tone: Tone = "info") -> dict[str, Any]:
    """Value of :class:`Notice`; empty shows nothing."""
    return {"lines": [lines] if isinstance(lines, str) else list(lines), "tone": tone}
