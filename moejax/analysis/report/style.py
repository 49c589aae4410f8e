"""The style sheet of a report: light, dark, narrow and on paper, without scripts or fonts.

The theme follows the reader's system; a checkbox turns it over. Text has a contrast of at least
4.5 on its ground in both (the tests compute it).
"""

LIGHT = {
    "ground": "#ffffff", "panel": "#f4f5f7", "text": "#1b1f24", "muted": "#57606a",
    "rule": "#d5dae0", "grid": "#e6e9ed", "link": "#0a58a6", "code": "#f4f5f7",
    "good": "#166534", "good-ground": "#e3f4e8", "bad": "#9b2412", "bad-ground": "#fdeae6",
    "unsure": "#6f4d00", "unsure-ground": "#fdf3d6",
    "c0": "#2f74c0", "c1": "#c4512c", "c2": "#2e8b57", "c3": "#8456b8",
    "c4": "#9a7200", "c5": "#b83f7d", "c6": "#14868c", "c7": "#6b7280",
}  # fmt: skip
DARK = {
    "ground": "#14171a", "panel": "#1d2125", "text": "#e6e9ec", "muted": "#a7b0ba",
    "rule": "#3a4149", "grid": "#272c32", "link": "#83bbf2", "code": "#1d2125",
    "good": "#86d6a0", "good-ground": "#17301f", "bad": "#f5a08f", "bad-ground": "#3a1d17",
    "unsure": "#e8c46a", "unsure-ground": "#332a12",
    "c0": "#6aaaf0", "c1": "#ee8460", "c2": "#62c48d", "c3": "#b794e8",
    "c4": "#d3ab3f", "c5": "#ea80b4", "c6": "#4fc0c4", "c7": "#a3abb5",
}  # fmt: skip


def style_sheet() -> str:
    """The whole style sheet."""
    light, dark = _variables(LIGHT, "light"), _variables(DARK, "dark")
    themes = f"""
:root{{{light}}}
@media (prefers-color-scheme:dark){{:root:not(:has(#theme:checked)){{{dark}}}}}
@media (prefers-color-scheme:light){{:root:has(#theme:checked){{{dark}}}}}
"""
    numbered = "".join(
        f".s{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}.k{i}{{color:var(--c{i})}}"
        for i in range(8)
    )
    paper = _PAPER.replace("LIGHT", light)
    return f"{themes}{_PAGE}{_FIGURES}{numbered}{paper}".strip()


def _variables(values: dict[str, str], scheme: str) -> str:
    return f"color-scheme:{scheme};" + "".join(f"--{k}:{v};" for k, v in values.items())


_PAGE = """
*{box-sizing:border-box}
html{scroll-padding-top:1rem;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--text);
 font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
 overflow-wrap:break-word}
.layout{max-width:76rem;margin:0 auto;padding:0 1.25rem;display:grid;
 grid-template-columns:minmax(0,1fr);column-gap:3rem}
header{padding:2.2rem 0 .6rem}
h1{font-size:1.95rem;line-height:1.2;letter-spacing:-.015em;margin:.1rem 0 .4rem;font-weight:680}
h2{font-size:1.35rem;line-height:1.3;letter-spacing:-.01em;margin:3rem 0 .7rem;font-weight:660;
 padding-top:1.1rem;border-top:1px solid var(--rule)}
h3{font-size:1.05rem;margin:1.9rem 0 .5rem;font-weight:650}
p{margin:.5rem 0 .8rem;max-width:46rem}
a{color:var(--link);text-underline-offset:.15em}
.kicker,.note,.legend,nav{color:var(--muted);font-size:.875rem;line-height:1.45}
.kicker{margin:0}.lead{font-size:1.08rem}
.toggle{float:right;font-size:.875rem;color:var(--muted);cursor:pointer;display:flex;gap:.4rem;
 align-items:center;margin-top:.1rem}
nav ol{list-style:none;margin:.4rem 0;padding:0;columns:2;column-gap:1.5rem}
nav a{color:var(--muted);text-decoration:none;display:block;padding:.22rem 0}
nav a:hover{color:var(--link);text-decoration:underline}
nav .title{font-weight:600;color:var(--text)}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.7rem;
 margin:1.2rem 0;padding:0}
.cards div{background:var(--panel);border-radius:.5rem;padding:.7rem .85rem;display:flex;
 flex-direction:column}
.cards dt{font-size:.8rem;color:var(--muted);line-height:1.35}
.cards dd{margin:.1rem 0 0;font-size:1.28rem;font-weight:640;line-height:1.25;
 font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.cards small{display:block;font-size:.78rem;font-weight:400;color:var(--muted);letter-spacing:0;
 line-height:1.35;margin-top:.15rem}
.facts{margin:.6rem 0 1rem}
.facts div{display:grid;grid-template-columns:11rem minmax(0,1fr);gap:.2rem 1rem;
 padding:.32rem 0;border-bottom:1px solid var(--grid)}
.facts dt{color:var(--muted)}.facts dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;container-type:inline-size;margin:.9rem 0 1.3rem;max-width:100%}
.scroll:focus-visible,pre:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;font-size:.875rem;line-height:1.4;font-variant-numeric:tabular-nums;
 min-width:min(100%,30rem)}
caption{text-align:left;padding:0 0 .45rem;max-width:46rem}
caption .title,figcaption .title{font-weight:640;color:var(--text);display:block;font-size:.95rem}
caption .note{display:block;margin-top:.1rem}
caption span{position:sticky;left:0;max-width:min(100cqi,46rem)}
th,td{padding:.34rem .6rem;text-align:left;vertical-align:baseline;
 border-bottom:1px solid var(--grid)}
th:first-child,td:first-child{padding-left:0}
thead th{font-weight:600;color:var(--muted);border-bottom:1px solid var(--rule);
 vertical-align:bottom;white-space:nowrap}
tbody th{font-weight:500}tbody th,tbody td{white-space:nowrap}
tbody .long{white-space:normal;min-width:13rem;overflow-wrap:anywhere}
tbody .long p{margin:.1rem 0 0;font-weight:400;font-size:inherit}
.n{text-align:right;white-space:nowrap}
tr.sum th,tr.sum td{font-weight:640;border-top:1px solid var(--rule)}
pre{background:var(--code);border-radius:.5rem;padding:.75rem .9rem;overflow-x:auto;
 font-size:.82rem;line-height:1.5;margin:.5rem 0 1rem}
code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.token{background:var(--panel);border-radius:.25rem;padding:.05rem .3rem;white-space:pre-wrap;
 font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.92em}
.badge{display:inline-block;border-radius:1rem;padding:.08rem .6rem;font-size:.92em;
 font-weight:600;white-space:nowrap;background:var(--panel);color:var(--text)}
.badge.good{background:var(--good-ground);color:var(--good)}
.badge.bad{background:var(--bad-ground);color:var(--bad)}
.badge.unsure{background:var(--unsure-ground);color:var(--unsure)}
.warnings{background:var(--unsure-ground);border-left:4px solid var(--unsure);
 border-radius:.25rem;padding:.7rem 1rem .7rem;margin:1.2rem 0}
.warnings h2{border:0;padding:0;margin:0 0 .3rem;font-size:1rem;color:var(--unsure)}
.said{padding-left:1.1rem;max-width:46rem}
.warnings ul{margin:0;padding-left:1.1rem}.warnings li{margin:.25rem 0}
details{margin:.8rem 0}
summary{cursor:pointer;color:var(--link);font-size:.92rem;padding:.2rem 0}
footer{margin:3.5rem 0 2rem;padding-top:1rem;border-top:1px solid var(--rule);
 color:var(--muted);font-size:.82rem}
@media (min-width:66rem){
 .layout{grid-template-columns:12.5rem minmax(0,1fr)}
 header,footer{grid-column:2}
 nav{grid-column:1;grid-row:1/span 9;padding-top:2.6rem}
 nav>div{position:sticky;top:1.4rem;max-height:calc(100vh - 2.8rem);overflow-y:auto}
 nav ol{columns:1}main,footer{grid-column:2}}
@media (max-width:34rem){
 .layout{padding:0 1rem}h1{font-size:1.55rem}h2{font-size:1.2rem}
 .cards{grid-template-columns:repeat(2,minmax(0,1fr))}
 .facts div{grid-template-columns:minmax(0,1fr)}}
"""
_FIGURES = """
.gallery{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));
 gap:1.6rem 2rem;margin:1rem 0 1.4rem}
.gallery>figure:only-child{max-width:28rem}
figure{margin:0;min-width:0}
figure svg{display:block;width:100%;height:auto;margin:.3rem 0;overflow:visible}
figure .note{margin:.2rem 0 0}
.legend{list-style:none;margin:.15rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.05rem .9rem}
.legend li{display:flex;align-items:center;gap:.4rem;min-width:0;overflow-wrap:anywhere}
.key{width:1.1rem;height:0;border-top:2.5px solid currentColor;flex:none}
.key.dashed{border-top-style:dashed}.key.points{width:.55rem;height:.55rem;border:0;border-radius:50%;background:currentColor}
svg text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--muted);
 font-variant-numeric:tabular-nums}
svg text.small{font-size:9.5px}svg text.label,svg text.name{fill:var(--text)}
svg text.name,svg text.told,svg text.reference{paint-order:stroke;
 stroke:var(--ground);stroke-width:3px}
.end{text-anchor:end}.middle{text-anchor:middle}
.grid{stroke:var(--grid);fill:none}.tick,.axis{stroke:var(--rule);fill:none}
.frame{fill:none;stroke:var(--rule)}
.curve{fill:none;stroke-width:1.7;stroke-linejoin:round}
.curve.dashed{stroke-dasharray:5 3}.curve.points{stroke-width:1}
.dots{fill:none;stroke-width:5;stroke-linecap:round}
.band{opacity:.2;stroke:none}.band.thin{opacity:.09}
.curve.late{stroke-dasharray:4 3}.key.late{border-top-style:dashed}
.key.points.late{background:none;border:2px solid currentColor}
path.reference{stroke:var(--muted);stroke-dasharray:2 3;fill:none}
svg text.reference{font-size:10px}
.zero{stroke:var(--text);stroke-width:1;fill:none}.margin{fill:var(--panel)}
.interval{stroke-width:2;fill:none;stroke:var(--c0)}
.dot{stroke-width:8;stroke-linecap:round;fill:none;stroke:var(--c0)}
.interval.good,.dot.good{stroke:var(--good)}.interval.bad,.dot.bad{stroke:var(--bad)}
.interval.unsure,.dot.unsure{stroke:var(--unsure)}
image{image-rendering:pixelated}
"""
_PAPER = """
@page{margin:16mm 15mm}
@media print{
 :root,:root:has(#theme:checked),:root:not(:has(#theme:checked)){LIGHT}
 html{font-size:10pt}body{font-size:10pt}thead,tbody tr:first-child{break-after:avoid}
 .toggle{display:none}
 .layout{display:block;max-width:none;padding:0}
 h1{font-size:20pt}h2{font-size:13.5pt;margin-top:1.6rem}
 h2,h3,caption,summary{break-after:avoid}figure,tr,.cards div,.warnings li{break-inside:avoid}
 .gallery{grid-template-columns:1fr 1fr;gap:.9rem 1.4rem}
 .cards{grid-template-columns:repeat(4,1fr)}
 .scroll{container-type:normal}.scroll,pre{overflow:visible}p:has(+.gallery){break-after:avoid}
 .raw pre{columns:3;font-size:6pt}caption span{position:static}table{font-size:7.6pt;min-width:0}
 th,td,tbody th,tbody td,thead th{padding:.2rem .4rem;white-space:normal}tbody .long{min-width:0}
 pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:8pt}
 nav>div{position:static;max-height:none}nav ol{columns:3}
 a{color:inherit;text-decoration:none}
 details::details-content{content-visibility:visible;block-size:auto}
 *{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
