"""Parts of an HTML page that is one file: elements, tables and matplotlib's charts as inline SVG.

Elements are a tree, which escapes every text when it is written.
"""

import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

from algos.launch import report

# Widths of charts in inches. The page scales a chart to its column: a smaller one has larger text.
LARGE, SMALL = 4.2, 2.1
# What a browser may load for the page: nothing. Pictures, styles and players are in it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
CSS = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --soft: #59636e; --line: #d9dee3 }
@media (prefers-color-scheme: dark) {
  :root { --page: #15191e; --text: #e4e8ec; --soft: #9aa5b1; --line: #39424c } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 82rem; padding: 1rem; overflow-wrap: anywhere;
  background: var(--page); color: var(--text); font: 1rem/1.5 system-ui, sans-serif }
h1 { margin: .5rem 0; font-size: 1.6rem; line-height: 1.25 }
h2 { margin: 2rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.2rem }
h3 { margin: 1rem 0 .25rem; font-size: 1rem }
p { max-width: 52rem; margin: .25rem 0 .75rem; color: var(--soft); font-size: .9rem }
.scroll, pre { overflow: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .25rem 1.25rem .25rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; overflow-wrap: normal }
th { background: var(--page); font-weight: 600 }
.facts th { min-width: 6.5rem }
.facts td, .facts th + th { min-width: 11rem; max-width: 26rem; overflow-wrap: anywhere }
.returns :is(td, th):nth-child(n+3):not(:last-child), .seeds :is(td, th + th)
  { text-align: right }
:is(.returns, .differences, .seeds) :is(td, th) { white-space: nowrap }
:is(td, th):first-child { position: sticky; left: 0; max-width: 45vw; white-space: normal;
  overflow-wrap: break-word }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .5rem 0; padding: 0;
  list-style: none }
.legend svg { width: 2.2rem; height: .7rem; margin-right: .4rem }
.charts { display: grid; gap: 1rem; margin: .5rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)) }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)) }
.small { grid-template-columns: repeat(auto-fill, minmax(min(45%, 12rem), 1fr)); gap: .75rem }
figure { min-width: 0; max-width: 40rem; margin: 0 }
figcaption { color: var(--soft); font-size: .8rem }
svg, iframe { background: #fff; border-radius: 4px }
svg * { stroke-linejoin: round; stroke-linecap: butt }
figure :is(svg, img, iframe) { display: block; width: 100% }
iframe { aspect-ratio: 4 / 3; border: 0 }
summary { margin: .25rem 0; cursor: pointer }
pre { max-height: 36rem; font-size: .8rem }
"""


def node(tag: str, *children: ET.Element | str, **attributes: str) -> ET.Element:
    """An element and what is in it; `class_` stands for class, `stroke_width` for stroke-width."""
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    element = ET.Element(tag, named)
    for child in children:
        if isinstance(child, ET.Element):
            element.append(child)
        elif len(element):
            element[-1].tail = child
        else:
            element.text = child
    return element


def table(kind: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> ET.Element:
    """A table of CSS class `kind`, in a box that scrolls; the first cell of a row is its head."""
    cells = lambda row: (node("td" if i else "th", cell) for i, cell in enumerate(row))
    body = node("tbody", *(node("tr", *cells(row)) for row in rows))
    top = node("thead", node("tr", *(node("th", cell) for cell in head)))
    return node("div", node("table", top, body, class_=kind), class_="scroll", tabindex="0")


def charts(figures: Iterable[ET.Element], kind: str = "charts") -> ET.Element:
    """Figures side by side, as many as there is room for; `kind` is the CSS class."""
    return node("div", *figures, class_=kind)


def chart(paint: Callable[[Any], None], width: float, title: str, caption: str = "") -> ET.Element:
    """What `paint` draws on an axis, as SVG, with a title in it or a caption above it."""
    settings: dict[Any, Any] = {"svg.fonttype": "none"}  # write text as text, not as outlines
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(settings):
        path = Path(folder, "chart.svg")
        with report.figure(path, 1, 1, width, title) as (axis,):
            paint(axis)
        drawn = ET.parse(path).getroot()
    for element in drawn.iter():  # in HTML, SVG has no namespaces
        element.tag = element.tag.rsplit("}", 1)[-1]
        element.attrib = {name.rsplit("}", 1)[-1]: x for name, x in element.attrib.items()}
    # Leave out the metadata, and the style, which would apply to the whole page.
    parts = [part for part in drawn if part.tag != "metadata" and part.find("style") is None]
    view = {"viewBox": drawn.attrib["viewBox"], "role": "img", "aria_label": title or caption}
    svg = node("svg", *parts, **view)
    return node("figure", *([node("figcaption", caption)] if caption else []), svg)


def make_ids_unique(page: ET.Element) -> None:
    """Rename the ids that charts refer to: matplotlib may use one id in several charts."""
    for i, svg in enumerate(page.iter("svg")):
        names = {}  # old to new, as references: #id
        for element in svg.iter():
            old = element.attrib.pop("id", None)
            if old and element.tag in ("path", "clipPath"):  # nothing refers to groups
                names[f"#{old}"] = f"#c{i}-{len(names)}"
                element.set("id", names[f"#{old}"][1:])
        for element in svg.iter():
            if "href" in element.attrib:
                element.set("href", names[element.attrib["href"]])
            if "clip-path" in element.attrib:
                element.set("clip-path", f"url({names[element.attrib['clip-path'][4:-1]]})")


def section(title: str, text: str, *parts: ET.Element) -> list[ET.Element]:
    """A part of the page: title, text and `parts`; nothing without parts."""
    return [node("section", node("h2", title), node("p", text), *parts)] if parts else []


def page_of(title: str, parts: list[ET.Element]) -> str:
    """The page as HTML."""
    head = [
        node("meta", charset="utf-8"),
        node("meta", http_equiv="Content-Security-Policy", content=POLICY),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("title", title),
        node("style", CSS),
    ]
    body = node("body", node("h1", title), *parts)
    page = node("html", node("head", *head), body, lang="en")
    make_ids_unique(page)
    return f"<!DOCTYPE html>\n{ET.tostring(page, encoding='unicode', method='html')}\n"
