"""The report as one HTML page that needs nothing beside it: figures are inside, no script, no font, no link out."""

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepalign.data.files import write_text_atomic
from deepalign.diagnose.figures import FigureFile
from deepalign.diagnose.tokens import CLASSES

Report = Mapping[str, Any]
TOKENS_LISTED = 15

STYLE = """
:root { --ink: #222; --faint: #666; --line: #d9d9d9; --wash: #f6f6f4; }
* { box-sizing: border-box; }
body { color: var(--ink); background: #fff; font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif;
       margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
p { max-width: 48rem; margin: .5rem 0; }
.lead { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; margin: .8rem 0; width: 100%;
        font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .5rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; border-bottom: 1.5px solid #999; vertical-align: bottom; }
td.number, th.number { text-align: right; }
td.number, td.name { white-space: nowrap; }
td small { color: var(--faint); white-space: nowrap; }
code, .token { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .92em; }
.token { background: var(--wash); border: 1px solid var(--line); border-radius: 3px; padding: 0 .25em;
         white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1.4rem 0 2rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--faint); font-size: .9rem; max-width: 48rem; margin-top: .4rem; }
figcaption b { color: var(--ink); }
.bands { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 0 1.6rem; }
h3 { font-size: 1rem; margin: .8rem 0 0; }
.agrees::before { content: "\\2713\\00a0"; } .disagrees::before { content: "\\2717\\00a0"; }
.disagrees { font-weight: 700; }
details { margin: .6rem 0; } summary { cursor: pointer; }
pre { background: var(--wash); padding: .8rem; overflow-x: auto; font-size: .8rem; white-space: pre-wrap; }
@media print {
  body { font-size: 10pt; max-width: none; padding: 0; }
  h2, h3, summary { break-after: avoid; } figure, tr, .bands { break-inside: avoid; }
  .scroll { overflow: visible; } table { font-size: 8.5pt; }
  .bands { grid-template-columns: repeat(3, 1fr); gap: 0 1rem; } .bands table { font-size: 8pt; }
}
"""

HOW_TO_READ = (
    "Every model reads the same token ids as the base. At each position of the response the two predictions of "
    "the next token are compared: KL(aligned‖base) is 0 where alignment has changed nothing. A model that is "
    "aligned only in its first tokens starts high and falls to almost nothing, so a response whose beginning was "
    "forced goes on as the base model would write it.",
    "Base-favored tokens are those to which the base gives more probability than the aligned model. Their count "
    "over the whole vocabulary is mostly about how a few tokens' gain is paid for by all others; the counts among "
    "the top tokens of either model are about tokens that could be drawn.",
    "Bands and intervals are bootstrap percentiles over contexts. They say how much the numbers depend on which "
    "contexts were drawn, not whether these contexts are like yours. Late positions are reached by fewer, longer "
    "responses.",
)


def write_page(report: Report, figures: Sequence[FigureFile], path: Path) -> None:
    """Write the page, whole or not at all."""
    names = ", ".join(report["series"])
    title = f"Where alignment acts: {names} against the base"
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="lead">{_text(_lead(report))}</p>',
        "<h2>Verdict in numbers</h2>",
        _verdict_table(report),
        *(_figure(figure) for figure in figures[:2]),
        "<h2>How to read it</h2>",
        *(f"<p>{_text(paragraph)}</p>" for paragraph in HOW_TO_READ),
        "<h2>Against the paper</h2>",
        "<p>What the paper says of an aligned model, and what was measured here. A verdict needs the interval to "
        "exclude no effect; the share of formatting tokens has none, and agrees above a half.</p>",
        _claims_table(report),
        "<h2>More figures</h2>",
        *(_figure(figure) for figure in figures[2:]),
        "<h2>Base-favored tokens by position</h2>",
        *_token_sections(report),
        "<h2>What was measured</h2>",
        _measured_table(report),
        f"<details><summary>Settings and versions</summary><pre>{_text(_settings(report))}</pre></details>",
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{_text(title)}</title><style>{STYLE}</style>"
    page = ["<!doctype html>", f'<html lang="en"><head>{head}</head>', "<body>", *body, "</body></html>", ""]
    write_text_atomic(path, "\n".join(page))


def number_text(number: Mapping[str, float | None], digits: str = ".3g") -> str:
    """A measured number with its interval: `1.82 (1.7 to 1.95)`; "none" where there is none."""
    if number["value"] is None:
        return "none"
    value = format(number["value"], digits)
    if number["low"] is None and number["high"] is None:
        return value
    low, high = ("never" if edge is None else format(edge, digits) for edge in (number["low"], number["high"]))
    return f"{value} ({low} to {high})"


def below_tenth_text(number: Mapping[str, float | None]) -> str:
    """The position where KL falls below a tenth of its first value."""
    return "never" if number["value"] is None else number_text(number, ".0f")


def _lead(report: Report) -> str:
    settings, first = report["settings"], next(iter(report["series"].values()))
    sizes = " and ".join(f"{group['n']} {name} contexts" for name, group in first["groups"].items())
    how = "given responses, teacher-forced"
    if settings["positions"]["generate"]:
        how = "responses written by the model, step by step"
    return f"{sizes}, {how}, up to {settings['positions']['positions']} positions. Base: {settings['base']}."


def _verdict_table(report: Report) -> str:
    rows = []
    for name, series in report["series"].items():
        for group, found in series["groups"].items():
            verdict = found["verdict"]
            rows.append(
                [
                    f"{_text(name)}<br><small>{_text(group)}</small>",
                    _interval(verdict["kl_first"]),
                    _interval(verdict["below_tenth"], below_tenth_text),
                    _interval(verdict["below_tenth_for_good"], below_tenth_text),
                    _interval(verdict["kl_early"]),
                    _interval(verdict["kl_late"]),
                    _interval(verdict["kl_late_over_early"]),
                    _interval(verdict["favored_early"]),
                    _interval(verdict["favored_late"]),
                ]
            )
    header = [
        "series",
        "KL at the first token",
        "below a tenth of it, from position",
        "for good from",
        "KL, positions 1-3",
        "KL, from 16 on",
        "late / early",
        "base-favored in its top, 1-3",
        "from 16 on",
    ]
    return _table(header, rows, numbers=range(1, len(header)))


def _interval(
    number: Mapping[str, float | None], text: Callable[[Mapping[str, float | None]], str] = number_text
) -> str:
    """HTML: the value, its interval small below it."""
    value, _, interval = text(number).partition(" (")
    return _text(value) + (f"<br><small>{_text(interval.rstrip(')'))}</small>" if interval else "")


def _claims_table(report: Report) -> str:
    rows = []
    for claim in report["claims"]:
        measured = claim["measured"]
        verdict = claim["verdict"]
        rows.append(
            [
                _text(claim["claim"]),
                _text(claim["paper"]),
                f"{_text(measured['what'])}: {_text(number_text(measured))}",
                f'<span class="{_text(verdict.replace(" ", "-"))}">{_text(verdict)}</span>',
            ]
        )
    return _table(["claim", "paper", "measured", "verdict"], rows)


def _token_sections(report: Report) -> list[str]:
    sections: list[str] = []
    for name, series in report["series"].items():
        bands = series["groups"]["harmful"]["tokens"]
        titles = [f"<h3>positions {_text(band['positions'])}</h3>" for band in bands[:-1]]
        tables = [f"<div>{title}{_token_table(band)}</div>" for title, band in zip(titles, bands, strict=False)]
        classes = _class_table(bands, report["vocabulary_classes"])
        sections.append(
            f"<details{' open' if not sections else ''}><summary><b>{_text(name)}</b>, harmful contexts</summary>"
            f'<div class="bands">{"".join(tables)}</div>{classes}</details>'
        )
    return sections


def _token_table(band: Mapping[str, Any]) -> str:
    rows = [
        [_token(token["readable"]), _text(token["class"]), f"{100 * token['share']:.0f}%"]
        for token in band["tokens"][:TOKENS_LISTED]
    ]
    return _table(["token", "class", "of rows"], rows, numbers=[2])


def _token(readable: str) -> str:
    return f'<span class="token">{_text(readable)}</span>'


def _class_table(bands: Sequence[Mapping[str, Any]], vocabulary: Mapping[str, float]) -> str:
    shown = [kind for kind in CLASSES if vocabulary[kind] > 0 or any(band["classes"][kind] > 0 for band in bands)]
    rows = [
        [_text(kind), *(f"{100 * band['classes'][kind]:.1f}%" for band in bands), f"{100 * vocabulary[kind]:.1f}%"]
        for kind in shown
    ]
    header = ["class", *(f"positions {band['positions']}" for band in bands), "vocabulary"]
    return _table(header, rows, numbers=range(1, len(header)))


def _measured_table(report: Report) -> str:
    settings = report["settings"]
    positions = settings["positions"]
    facts: list[tuple[str, Any]] = [("base", settings["base"])]
    facts += [(name, _series_text(series)) for name, series in report["series"].items()]
    groups = next(iter(report["series"].values()))["groups"]
    facts += [(f"contexts, {name}", group["n"]) for name, group in groups.items()]
    facts += [(key, value) for key, value in report["data"].items()]
    facts += [
        ("responses", "written by the model" if positions["generate"] else "given"),
        ("positions", positions["positions"]),
        ("top of a model", f"{positions['top_n']} of {positions['vocab_size']} tokens"),
        ("base-favored tokens kept per row", positions["top_k"]),
        ("bands", f"{settings['bootstrap']['confidence']:.0%}, {settings['bootstrap']['resamples']} resamples"),
        ("models in", f"{settings['dtype']} on {settings['device']}"),
    ]
    return _table(["", ""], [[_text(name), _text(value)] for name, value in facts])


def _series_text(series: Mapping[str, Any]) -> str:
    if series["contrast"] is None:
        return str(series["model"])
    alpha, space = series["contrast"]
    return f"{series['model']} under contrastive decoding, alpha {alpha:g}, {space}"


def _settings(report: Report) -> str:
    return json.dumps({key: report[key] for key in ("settings", "versions", "data")}, indent=2, ensure_ascii=False)


def _figure(figure: FigureFile) -> str:
    content = base64.b64encode(figure.path.read_bytes()).decode("ascii")
    return (
        f'<figure id="{_text(figure.name)}"><img alt="{_text(figure.title)}" src="data:image/png;base64,{content}">'
        f"<figcaption><b>{_text(figure.title)}.</b> {_text(figure.caption)}</figcaption></figure>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] | range = ()) -> str:
    """A table of HTML cells; the columns in `numbers` stand right."""

    def cell(tag: str, column: int, content: str) -> str:
        kind = "number" if column in numbers else "name" if column == 0 and len(numbers) else "text"
        return f'<{tag} class="{kind}">{content}</{tag}>'

    top = "".join(cell("th", column, _text(name)) for column, name in enumerate(header))
    head = f"<thead><tr>{top}</tr></thead>" if any(header) else ""
    lines = ["<tr>" + "".join(cell("td", i, content) for i, content in enumerate(row)) + "</tr>" for row in rows]
    return f'<div class="scroll"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def _text(value: Any) -> str:
    return html.escape(str(value))
