"""The metric glossary as a page, generated from :data:`studio_state.metrics.METRICS`.

``python -m studio_state.glossary > assets/docs/metrics.md``; a test fails when the file is stale.
"""

from __future__ import annotations

from studio_state.metrics import METRICS

_GROUPS = {"speed": "Speed", "memory": "Memory", "quality": "Quality", "count": "Counts"}
_SUMMARIES = {
    "median": "median of the items",
    "mean": "mean of the items",
    "max": "largest",
    "sum": "sum of the items",
    "last": "last value",
    "given": "one number a lane",
}


def page() -> str:
    """The glossary in Markdown."""
    lines = ["# Metrics", "", "Every metric the studio knows. Names are the same in events, tables, exports and SQL.", ""]
    for group, title in _GROUPS.items():
        lines += [f"## {title}", "", "| name | unit | better | over items | meaning |", "|---|---|---|---|---|"]
        lines += [
            f"| `{name}` | {m.unit or '–'} | {m.better} | {_SUMMARIES[m.summary]} | {m.text} |"
            for name, m in METRICS.items()
            if m.group == group
        ]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
