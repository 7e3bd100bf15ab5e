"""The report's style sheet: light and dark, phone and desktop, nothing fetched."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f7f9; --text: #1b1f24; --soft: #59626d; --grid: #d9dde3;
  --bad: #9c3b00; --teacher: #1b1f24; --window-only: #7c828b; --memory-only: #8a5bb5; --no-attention: #94702f;
  --swapped: #b8342b; --aligned: #b87400; --final: #1769c2; --other: #24795a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1d2127; --text: #e6e9ed; --soft: #a2abb6;
  --grid: #363c45; --bad: #ffb27a; --teacher: #e6e9ed; --window-only: #8f96a0; --memory-only: #b895dd;
  --no-attention: #c9a96e; --swapped: #ef7a70; --aligned: #f0b040; --final: #6cb2ff; --other: #5fc79d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
p, li { max-width: 46rem; } ul { margin: .3rem 0; padding-left: 1.2rem; } li { margin: .25rem 0; }
.soft, figcaption, caption { color: var(--soft); font-size: .9rem; } small { color: var(--soft); font-weight: 400; }
.verdict { background: var(--card); border-left: .3rem solid var(--final); border-radius: .4rem; padding: .8rem 1rem; }
.verdict p { margin: .4rem 0; } .verdict .lead { font-size: 1.25rem; line-height: 1.4; font-weight: 600; }
.wrong { color: var(--bad); }
.scroll { overflow-x: auto; margin: .6rem 0; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--final); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
caption { text-align: left; padding-bottom: .3rem; position: sticky; left: 0; }
th, td { padding: .35rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid);
  vertical-align: top; font-weight: 400; overflow-wrap: normal; }
thead th { font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody th { min-width: 7.6rem; white-space: normal; }
th small, td small { display: block; }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tr.final > * { font-weight: 600; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; } table.facts th { width: 13rem; }
@media (max-width: 34rem) { table.facts th, table.facts td { display: block; width: auto; border: 0; padding: .1rem 0; }
  table.facts th { color: var(--soft); padding-top: .6rem; } tbody th { min-width: 6rem; max-width: 8rem; }
  table.facts th { max-width: none; } }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem;
  align-items: start; margin: .6rem 0; }
figure { margin: 0; background: var(--card); border-radius: .4rem; padding: .7rem; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; } figcaption { margin-bottom: .3rem; }
figcaption b { display: block; color: var(--text); font-weight: 600; }
pre { overflow-x: auto; background: var(--card); border-radius: .4rem; padding: .8rem; font-size: .8rem; }
summary { cursor: pointer; padding: .3rem 0; }
@media print { details > * { display: block; } }
"""
