"""Scripts and styles of the page's own components. Everything is served by the studio itself."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    "dom.js",
    "schema_form.js",
    "pipeline_state.js",
    "pipeline_drag.js",
    "editor_parts.js",
    "pipeline_editor.js",
    "live_charts.js",
    "live_feed.js",
    "live_parts.js",
    "live_tokens.js",
    "live_images.js",
    "live_swipe.js",
    "live_drawn.js",
    "live_gallery.js",
    "live_experts.js",
    "live_why.js",
    "live_cache.js",
    "live_race.js",
    "facts.js",
    "vega_chart.js",
    "history_table.js",
    "compare_parts.js",
    "library.js",
    "papers.js",
)
STYLES = (
    "page.css",
    "pipeline_editor.css",
    "live_race.css",
    "live_images.css",
    "live_drawn.css",
    "live_why.css",
    "live_cache.css",
    "compare.css",
    "library.css",
    "papers.css",
)


def head() -> str:
    """The scripts as inline tags; they only define ``window.ParetoStudio`` and touch nothing else."""
    return "".join(f"<script>\n{(HERE / name).read_text(encoding='utf-8')}\n</script>\n" for name in SCRIPTS)


def css_paths(hosted: bool = False) -> list[Path]:
    """The style sheets, in order.

    Args:
        hosted: also hide the buttons for what a hosted studio refuses.
    """
    return [HERE / name for name in (*STYLES, *(("hosted.css",) if hosted else ()))]
