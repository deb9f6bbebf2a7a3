"""The run as one self-contained HTML page: images embedded, nothing loaded from anywhere, everything escaped."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from longctx.report.summary import Fact

_STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --ink: #1c2733; --muted: #6b7785; --line: #e6e9ed; --tint: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14181d; --ink: #e6e9ed; --muted: #98a3b0; --line: #2b323a; --tint: #1b2026; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 3rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -0.01em; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 3rem 0 0.75rem; }
.lead { color: var(--muted); margin: 0.4rem 0 2rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(14.5rem, 1fr)); gap: 0 2rem; margin: 0; }
.facts div { border-top: 1px solid var(--line); padding: 0.65rem 0 0.75rem; }
dt { color: var(--muted); font-size: 0.85rem; }
dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
dd small { display: block; color: var(--muted); font-size: 0.8rem; }
figure { margin: 0 0 2.5rem; }
img { display: block; width: 100%; height: auto; }
pre { background: var(--tint); border: 1px solid var(--line); border-radius: 6px; padding: 1rem 1.1rem;
  overflow-x: auto; font: 0.82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
footer { color: var(--muted); font-size: 0.85rem; margin-top: 3rem; }
"""
# Even if something hostile slipped through, the page may load and run nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Picture:
    """One figure in both themes, as PNG bytes, with a text for those who cannot see it."""

    light: bytes
    dark: bytes
    description: str


def render(title: str, lead: str, facts: Sequence[Fact], pictures: Sequence[Picture], config: str, version: str) -> str:
    """The page. ``config`` is the resolved configuration's text; all arguments are plain text and escaped here."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="lead">{escape(lead)}</p>
</header>
<main>
<dl class="facts">
{"".join(_fact(fact) for fact in facts)}</dl>
<h2>Measurements</h2>
{"".join(_picture(picture) for picture in pictures)}<h2>Configuration</h2>
<pre>{escape(config)}</pre>
</main>
<footer>Written by longctx {escape(version)} from metrics.jsonl and eval/.</footer>
</body>
</html>
"""


def _fact(fact: Fact) -> str:
    remark = f"<small>{escape(fact.remark)}</small>" if fact.remark else ""
    return f"<div><dt>{escape(fact.name)}</dt><dd>{escape(fact.value)}{remark}</dd></div>\n"


def _picture(picture: Picture) -> str:
    alt = escape(picture.description)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_data_uri(picture.dark)}">'
        f'<img src="{_data_uri(picture.light)}" alt="{alt}"></picture></figure>\n'
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
