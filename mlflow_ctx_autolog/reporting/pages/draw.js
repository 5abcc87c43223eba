const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 760px)"), paper = matchMedia("print");
function draw() {
  const isDark = dark.matches && !paper.matches;
  const ink = isDark ? "#e6eaee" : "#1b1f24", line = isDark ? "#343c46" : "#d9dee3";
  for (const [name, figure] of Object.entries(data.figures)) {
    const axis = { gridcolor: line, zerolinecolor: line, fixedrange: narrow.matches };
    const given = figure.layout, small = narrow.matches;
    const layout = { ...given, template: undefined, paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, size: small ? 10 : 12 },
      margin: { l: 44, r: 10, t: 24, b: 40, autoexpand: true },
      xaxis: { ...axis, automargin: true, ...given.xaxis },
      yaxis: { ...axis, automargin: true, ...given.yaxis } };
    layout.width = $(name).clientWidth;
    Plotly.react(name, figure.data, layout, { displayModeBar: false });
  }
}
draw();
for (const query of [dark, narrow, paper]) query.addEventListener("change", draw);
addEventListener("resize", draw);
