"""The style sheet of the report's page: light and dark, laptop and phone."""

STYLE = """\
:root {
  color-scheme: light dark;
  --page: #f6f5f2; --card: #ffffff; --ink: #1f2328; --muted: #606a75; --rule: #e2e0da; --track: #efede8;
  --accent: #0a6c74; --good: #1a6b35; --bad: #b3261e;
  --wrong: #fbe1de; --extra: #fdeec2; --missed: #e6e4df;
  --weights: #0072b2; --gradients: #e69f00; --optimizer: #009e73; --activations: #cc79a7; --workspace: #8a8f98;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171a; --card: #1d2125; --ink: #e7e9eb; --muted: #9aa4ae; --rule: #31373d; --track: #2a2f35;
    --accent: #5cc3cc; --good: #74cf91; --bad: #ff9a90;
    --wrong: #5a2723; --extra: #544312; --missed: #383d43;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 1rem; margin: 0 0 12px; }
p { margin: 0 0 10px; }
small { font-size: 0.8rem; }
header p { overflow-wrap: anywhere; }
.muted, small { color: var(--muted); }
section { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
section { padding: 18px 20px; margin: 18px 0 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 18px; }
.rates { display: flex; align-items: center; flex-wrap: wrap; gap: 6px 26px; margin: 4px 0 8px; }
.rates span { display: flex; flex-direction: column; }
.rates b { font-size: 3rem; line-height: 1.1; font-weight: 650; white-space: nowrap; }
.rates .before b { color: var(--muted); }
.rates .after b { color: var(--accent); }
.rates .arrow { font-size: 2rem; color: var(--muted); }
.better { color: var(--good); }
.worse { color: var(--bad); }
.big { font-size: 1.5rem; font-variant-numeric: tabular-nums; margin-right: 6px; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--muted); }
svg .value { fill: var(--ink); font-weight: 600; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .line { fill: none; stroke: var(--accent); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .dot { fill: var(--accent); stroke: var(--card); stroke-width: 1.5; }
.stack, .track { display: flex; background: var(--track); border-radius: 5px; overflow: hidden; }
.stack { height: 26px; margin: 4px 0 16px; gap: 1px; }
.track { height: 12px; align-self: center; }
.lines { display: grid; gap: 8px; }
.line { display: grid; grid-template-columns: 21rem 1fr 6rem; gap: 14px; }
.line small { margin-left: 8px; }
.line i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
.size { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.weights { background: var(--weights); } .gradients { background: var(--gradients); }
.optimizer { background: var(--optimizer); } .activations { background: var(--activations); }
.workspace { background: var(--workspace); }
.settings { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px 20px; margin: 0; }
dt { color: var(--muted); font-size: 0.8rem; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; table-layout: fixed; }
th { text-align: left; color: var(--muted); font-weight: 500; font-size: 0.85rem; }
th, td { padding: 7px 16px 7px 0; border-top: 1px solid var(--rule); vertical-align: top; overflow-wrap: anywhere; }
thead th { border-top: 0; }
mark { color: inherit; border-radius: 3px; padding: 0 3px; }
.wrong { background: var(--wrong); text-decoration: underline wavy var(--bad) 1px; text-underline-offset: 3px; }
.extra { background: var(--extra); font-style: italic; }
.missed { background: var(--missed); text-decoration: line-through; color: var(--muted); }
.legend mark { margin-left: 6px; white-space: nowrap; }
footer { font-size: 0.8rem; margin-top: 18px; overflow-wrap: anywhere; }
@media (max-width: 720px) {
  main { padding: 20px 12px 32px; }
  section { padding: 14px; margin-top: 12px; }
  .pair { grid-template-columns: 1fr; }
  .rates { gap: 6px 16px; }
  .rates b { font-size: 2.1rem; }
  .rates .arrow { font-size: 1.4rem; }
  .line { grid-template-columns: 1fr auto; gap: 4px 12px; }
  .line small { display: block; margin-left: 19px; }
  .track { grid-column: 1 / -1; grid-row: 2; width: 100%; }
  thead { display: none; }
  tr { display: block; border-top: 1px solid var(--rule); padding: 8px 0; }
  td { display: grid; grid-template-columns: 4.2rem 1fr; border: 0; padding: 2px 0; }
  td::before { content: attr(data-label); color: var(--muted); font-size: 0.85rem; }
}
"""
