"""The page's style sheet: one column of sections, both themes, readable on a phone and on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #16202c; --muted: #5a6675; --line: #dfe4ea;
  --model: #2158d8; --chance: #c2410c; --random: #6b7280; --pixels: #0f766e; --extra: #7c3aed;
  --good: #15803d; --warn: #b45309;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10151c; --card: #182029; --ink: #e6ebf1; --muted: #9aa7b5; --line: #2b3642;
    --model: #7aa5ff; --chance: #fb923c; --random: #a3adb8; --pixels: #2dd4bf; --extra: #c4a5fd;
    --good: #4ade80; --warn: #fbbf24;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main, header.top, footer { max-width: 1120px; margin: 0 auto; padding: 0 24px; }
header.top { padding-top: 40px; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 1.2rem; margin: 0 0 6px; }
p { margin: 0 0 12px; max-width: 75ch; }
.lead, .note, figcaption, footer { color: var(--muted); }
.note { font-size: 0.9rem; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 22px 24px; margin: 20px 0;
}
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px;
  margin: 22px 0 0;
}
.tile {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px 16px;
}
.tile dt { color: var(--muted); font-size: 0.85rem; }
.tile dd { margin: 0; }
.tile .value { font-size: 1.55rem; font-weight: 650; letter-spacing: -0.01em; line-height: 1.3; }
.tile .unit { font-size: 0.9rem; font-weight: 400; color: var(--muted); }
.tile .detail { font-size: 0.85rem; color: var(--muted); }
.good { color: var(--good); } .warn { color: var(--warn); }
.charts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr));
  gap: 18px 28px; margin-top: 12px;
}
figure { margin: 0; }
figcaption { font-size: 0.92rem; font-weight: 600; color: var(--ink); margin-bottom: 2px; }
.chart.wide { grid-column: 1 / -1; }
.chart svg { width: 100%; height: auto; display: block; }
.chart svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; margin-bottom: 12px; }
table { border-collapse: collapse; width: 100%; font-size: 0.95rem; }
th, td {
  text-align: left; padding: 8px 14px 8px 0; border-bottom: 1px solid var(--line);
  vertical-align: top;
}
thead th { color: var(--muted); font-weight: 600; font-size: 0.85rem; }
tbody th { font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.plain { width: auto; } table.plain th { padding-right: 28px; }
.bar {
  display: block; height: 8px; border-radius: 4px; background: var(--line); width: 100%;
  min-width: 90px; margin-top: 8px;
}
.bar > span { display: block; height: 100%; border-radius: 4px; }
.pictures { min-width: 640px; table-layout: fixed; }
.pictures th, .pictures td { border: 0; padding: 4px 10px 12px 0; }
.pictures img {
  width: 100%; max-width: 208px; height: auto; display: block; border-radius: 6px;
  border: 1px solid var(--line); background: var(--page);
}
.pictures img.pixels { image-rendering: pixelated; }
.pictures tbody th {
  width: 130px; font-size: 0.88rem; white-space: normal; overflow-wrap: anywhere;
}
.pictures thead th:first-child { width: 130px; }
.pictures th .note { font-weight: 400; display: block; }
details { border-top: 1px solid var(--line); padding: 10px 0; }
details:first-of-type { border-top: 0; }
summary { cursor: pointer; font-weight: 600; }
pre, code {
  font: 0.86rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
pre {
  overflow-x: auto; margin: 10px 0 0; padding: 14px; background: var(--page);
  border-radius: 8px;
}
td code { overflow-wrap: anywhere; }
footer { padding-bottom: 40px; font-size: 0.88rem; }
a:focus-visible, summary:focus-visible { outline: 2px solid var(--model); outline-offset: 2px; }
@media (max-width: 640px) {
  main, header.top, footer { padding: 0 14px; }
  section { padding: 16px; }
  header.top { padding-top: 24px; }
}
@media print { section, .tile { break-inside: avoid; } body { background: #fff; } }
"""
