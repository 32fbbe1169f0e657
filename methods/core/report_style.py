"""How the pages of report.py look: one style sheet, light and dark, on a screen and on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1c1d1f; --soft: #6a6d73; --line: #e6e6e3;
  --accent: #2f5fd0; --bar: #a9b7d6;
  --series-0: #2f5fd0; --series-1: #d9722e; --series-2: #2a9474; --series-3: #8a56c2;
  --series-4: #b8860b; --series-5: #c23d6b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #141517; --card: #1b1d20; --ink: #e9e9e6; --soft: #9a9da3; --line: #2d3034;
    --accent: #8aacff; --bar: #56658a;
    --series-0: #8aacff; --series-1: #f0a06a; --series-2: #62c9a8; --series-3: #bf98ee;
    --series-4: #dcb44a; --series-5: #ee7fa5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1120px; padding: 56px 32px 80px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%;
}
header p { margin: 6px 0 0; color: var(--soft); font-size: 17px; max-width: 70ch; }
h1 { margin: 0; font-size: 32px; line-height: 1.2; font-weight: 650; letter-spacing: -0.02em; }
h2 {
  margin: 52px 0 16px; font-size: 13px; font-weight: 600; letter-spacing: 0.08em;
  text-transform: uppercase; color: var(--soft);
}
h2 span { margin-left: 6px; font-weight: 400; letter-spacing: 0; text-transform: none; }
figure, dl, dd, p.legend { margin: 0; }

table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 12px 0 12px 20px; text-align: right; font-weight: 400; border-bottom: 1px solid var(--line); }
th:first-child { padding-left: 0; text-align: left; }
thead th { padding-top: 0; font-size: 13px; color: var(--soft); white-space: nowrap; }
tbody th { font-weight: 600; }
tbody th, td { vertical-align: top; }
td { white-space: nowrap; }
td.words:last-child { white-space: normal; }
td small { color: var(--soft); font-size: 12px; }
.size, .reference, .reference th { color: var(--soft); font-weight: 400; }
.best .number { color: var(--accent); font-weight: 650; }
.best small { font-weight: 400; }
.bar {
  display: block; position: relative; height: 4px; margin-top: 6px; min-width: 56px;
  border-radius: 2px; background: var(--line); overflow: hidden;
}
.bar b, .bar u { position: absolute; top: 0; bottom: 0; }
.bar b { left: 0; background: var(--bar); }
.bar u { background: var(--ink); opacity: 0.45; }
.best .bar b { background: var(--accent); }
.note { margin: 14px 0 0; color: var(--soft); font-size: 14px; max-width: 80ch; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)); gap: 20px; }
.chart { padding: 20px 20px 12px; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.chart:only-child { max-width: 640px; }
.chart figcaption { font-weight: 600; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; color: var(--soft); }
.swatch {
  display: inline-block; width: 16px; margin-right: 7px; vertical-align: middle;
  border-top: 2px solid currentColor;
}
.swatch.dashed { border-top-style: dashed; }
svg { display: block; width: 100%; height: auto; margin-top: 8px; overflow: visible; }

.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 28px 20px; }
.pair div { display: flex; gap: 4px; }
.pair img {
  flex: 1; min-width: 0; width: 0; aspect-ratio: 1; object-fit: cover; border-radius: 6px;
  background: var(--line);
}
.pixels { image-rendering: pixelated; }
.pair figcaption { margin-top: 8px; font-size: 14px; line-height: 1.4; }
.pair del { display: block; color: var(--soft); text-decoration: none; }
.pair del + span::before { content: "→ "; color: var(--soft); }

.views { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 28px 20px; }
.view.wide { grid-column: 1 / -1; }
.view img { display: block; max-width: 100%; max-height: 90vh; border-radius: 6px; background: var(--line); }
.view figcaption { margin-top: 8px; font-size: 14px; line-height: 1.4; }

.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 0 32px; }
.facts div {
  display: flex; justify-content: space-between; gap: 16px; align-items: baseline; padding: 7px 0;
  border-bottom: 1px solid var(--line); font-size: 14px;
}
dt { color: var(--soft); white-space: nowrap; }
dd { text-align: right; font-variant-numeric: tabular-nums; }

@media (max-width: 860px) {
  body { padding: 32px 18px 56px; }
  h1 { font-size: 26px; }
  h2 { margin-top: 40px; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table, tbody { display: block; }
  tr {
    display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 14px 18px; padding: 18px 0;
    border-bottom: 1px solid var(--line);
  }
  tr th, tr td { display: block; padding: 0; border: 0; text-align: left; }
  tr th { grid-column: 1 / 3; font-size: 17px; }
  td::before {
    content: attr(data-name); display: block; white-space: normal;
    font-size: 12px; line-height: 1.3; color: var(--soft);
  }
  td.size { text-align: right; align-self: center; }
  td.size::before { display: none; }
  td.size::after { content: " " attr(data-name); }
  td.words { white-space: normal; }
  td.words:last-child { grid-column: 1 / -1; }
  .bar { min-width: 0; margin-top: 4px; }
  .chart { padding: 16px 14px 10px; }
  .pairs { grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)); gap: 22px 14px; }
}
@media print { body { padding: 0; } .chart, .pair, .view { break-inside: avoid; } }
"""
