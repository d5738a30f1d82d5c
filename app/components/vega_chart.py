"""A figure of one or more Vega-Lite charts with a sentence and a table, drawn from files of the studio itself.

The Vega libraries come out of the installed ``vl-convert-python``: written once into the cache, served locally, and
loaded by the browser when the first chart is shown.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gradio as gr
from filelock import FileLock

TEMPLATE = (
    '<figure class="vc"><div class="vc-place"></div><div class="ps-hidden" role="status" aria-live="polite"></div></figure>'
)


def vega_bundle(cache: Path) -> Path:
    """The script with vega, vega-lite and vega-embed; it sets ``window.vegaEmbed``. Written on first use.

    Args:
        cache: the studio's cache folder.

    Raises:
        OSError: the cache cannot be written.
    """
    target = cache / "web" / f"vega-{version('vl-convert-python')}.js"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            import vl_convert  # slow: it starts a JavaScript engine

            script = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lacks the default
            part = target.with_suffix(f".{os.getpid()}.part")
            part.write_text(f"(()=>{{{script}\n}})();", encoding="utf-8")  # its names stay inside
            part.replace(target)
    return target


class VegaChart(gr.HTML):
    """``value``: ``{title, specs, summary, warning, table: {head, rows}}``, or ``{title, empty}``: what to do next.

    A row of the table is a list of texts, or ``{id, mark, colour, cells}``: then its first cell is a button, the
    keyboard's way to what a click on a point does. Either fires ``select`` with ``{run: id}``. With ``announce`` a new
    sentence is spoken by screen readers.

    Args:
        bundle: the script of :func:`vega_bundle`; it must be served as a static file.
    """

    def __init__(self, *, bundle: Path, value: dict[str, Any] | None = None, **kwargs: Any):
        super().__init__(
            value=value or {},
            html_template=TEMPLATE,
            js_on_load="ParetoStudio.mountVega(element, props, trigger, watch); /* 'select' */",
            apply_default_css=False,
            bundle=f"gradio_api/file={bundle}",
            **kwargs,
        )

    def api_info(self) -> dict[str, Any]:
        """Shape of the value for API clients."""
        return {"type": "object"}
