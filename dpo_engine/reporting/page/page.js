"use strict";
(async () => {
  const root = document.documentElement;
  const make = (tag, text, kind) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (kind) node.className = kind;
    return node;
  };
  // Text from data is written in the direction of its first letter.
  const foreign = (kind, text) => {
    const node = make("div", text, kind);
    node.dir = "auto";
    return node;
  };
  const unpack = async (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };

  // The page has the system's theme until the button is pressed. Pages are printed in the light theme.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const plots = [];
  const style = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const setTheme = (theme) => {
    root.dataset.theme = theme;
    for (const plot of plots) Plotly.react(plot, ...drawing(plot.chart));
  };
  const theme = () => chosen || (dark.matches ? "dark" : "light");
  root.dataset.theme = theme();
  dark.addEventListener("change", () => setTheme(theme()));
  addEventListener("beforeprint", () => setTheme("light"));
  addEventListener("afterprint", () => setTheme(theme()));
  document.getElementById("theme").addEventListener("click", () => {
    chosen = theme() === "dark" ? "light" : "dark";
    setTheme(chosen);
  });

  let data, moved = false;
  for (const name of ["wheel", "touchmove", "keydown"]) addEventListener(name, () => { moved = true; }, { once: true, passive: true });
  try {
    data = JSON.parse(await unpack("data"));
    const script = document.createElement("script");
    script.textContent = await unpack("plotly");
    document.head.append(script);
  } catch (error) {
    const trouble = document.getElementById("trouble");
    trouble.textContent = `The charts cannot be shown (${error.message}). This page needs a browser from 2023 or later.`;
    trouble.hidden = false;
    throw error;
  }

  // Charts
  const color = (name) => ({ quiet: style("note"), accent: style("ink"), chosen: style("run0"), rejected: style("run1") })[name] || style(name);
  const faded = (name, lightShare) => {
    const share = root.dataset.theme === "dark" ? Math.min(1, lightShare + 0.25) : lightShare;
    const [r, g, b] = [1, 3, 5].map((at) => parseInt(color(name).slice(at, at + 2), 16));
    return `rgba(${r},${g},${b},${share})`;
  };
  const plainText = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  // Points without a neighbor have no line, so they need a marker.
  const alone = (values) => values.map((value, i) => value !== null && (values[i - 1] ?? null) === null && (values[i + 1] ?? null) === null);
  const traces = {
    line: (t) => [{
      x: t.X, y: t.Y, name: plainText(t.name), mode: (t.dots && !t.thin) || alone(t.Y).some(Boolean) ? "lines+markers" : "lines", text: t.text,
      marker: { size: t.dots && !t.thin ? 5 : alone(t.Y).map((one) => one ? 6 : 0), color: color(t.color), opacity: 1 }, showlegend: !t.unnamed,
      line: { color: t.thin ? faded(t.color, t.color === "quiet" ? 0.7 : 0.55) : color(t.color), width: t.thin ? 1.2 : 2, dash: t.dash ? "dot" : "solid" },
      hovertemplate: "%{y:.4~g}" + (t.text ? " · %{text}" : "") + t.where,
    }],
    estimate: (t) => t.X.length > 40 ? [
      { x: [...t.X, ...[...t.X].reverse()], y: [...t.high, ...[...t.low].reverse()], fill: "toself", fillcolor: faded(t.color, 0.18), line: { width: 0 }, hoverinfo: "skip", showlegend: false, mode: "lines" },
      { x: t.X, y: t.Y, name: plainText(t.name), mode: "lines", line: { color: color(t.color), width: 2, dash: t.dash ? "dot" : "solid" }, customdata: t.low.map((v, i) => [v, t.high[i]]), hovertemplate: "%{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})" + t.where },
    ] : [{
      x: t.X, y: t.Y, name: plainText(t.name), mode: "lines+markers", marker: { size: 5 },
      line: { color: color(t.color), width: 2, dash: t.dash ? "dot" : "solid" },
      error_y: { type: "data", symmetric: false, array: t.high.map((v, i) => v - t.Y[i]), arrayminus: t.low.map((v, i) => t.Y[i] - v), color: faded(t.color, 0.5), thickness: 1.2, width: 3 },
      customdata: t.low.map((v, i) => [v, t.high[i]]),
      hovertemplate: "%{y:.3f} (%{customdata[0]:.3f} to %{customdata[1]:.3f})" + t.where,
    }],
    points: (t) => [{
      x: t.X, y: t.Y, name: plainText(t.name), mode: "markers", marker: { size: 5, color: faded(t.color, 0.45) }, customdata: t.pair,
      hovertemplate: "pair %{customdata}: %{x:.3~g}, %{y:.3~g}",
    }],
    bars: (t) => [{
      x: t.X, y: t.Y, name: plainText(t.name), type: "bar", marker: { color: faded(t.color, 0.6), line: { width: 0 } }, customdata: t.text, hovertemplate: "%{customdata}: %{y} pairs",
    }],
  };
  const marks = { best: [0, 1, 1.2, "solid"], restart: [0, 1, 1, "dash"], skip: [0.9, 1, 1, "solid"], save: [0, 0.06, 4, "solid"] };
  const drawnFirst = Object.keys(marks);
  // All charts over steps show the same range of steps. At a step where a curve has no value, the hover box shows the
  // nearest value, and names the step of this value.
  const overSteps = Object.values(data.charts).flat().filter((chart) => chart.x === "step");
  const lastStep = Math.max(1, ...overSteps.flatMap((chart) => chart.traces.map((t) => t.X[t.X.length - 1])));
  for (const chart of Object.values(data.charts).flat()) {
    const same = new Set(chart.traces.map((t) => `${t.X}`)).size === 1;
    for (const t of chart.traces) t.where = chart.x === "step" && !same ? " at step %{x}" : "";
  }
  const range = (chart, name) => {
    const values = chart.traces.flatMap((t) => t[name]).filter((value) => value !== null);
    return [values.reduce((a, b) => Math.min(a, b), 0), values.reduce((a, b) => Math.max(a, b), 0)];
  };
  // With more than two runs, each section explains their colors once, and charts with more than four named curves have
  // no legend.
  const crowded = (chart) => data.runs.length > 2 && chart.traces.filter((t) => !t.unnamed).length > 4;
  const drawing = (chart) => {
    const axis = (title, more) => ({
      title: { text: title, font: { size: 11, color: style("soft") }, standoff: 6 }, gridcolor: style("line"), zeroline: false, linecolor: style("line"),
      tickfont: { size: 10.5, color: style("soft") }, automargin: true, nticks: 6, ...more,
    });
    const shapes = [...(chart.marks || [])].sort((a, b) => drawnFirst.indexOf(a.kind) - drawnFirst.indexOf(b.kind)).map((mark) => {
      let [y0, y1, width, dash] = marks[mark.kind];
      // With several runs, each run has its own position for restarts and for the best evaluation, so that these marks
      // do not hide the marks of other runs.
      if (mark.kind === "best" && mark.run !== undefined) [y0, y1, width] = [0.92 - 0.1 * mark.run, 1 - 0.1 * mark.run, 4];
      if (mark.kind === "restart" && mark.run !== undefined) [y0, y1] = [mark.run / data.runs.length, (mark.run + 1) / data.runs.length];
      const tint = mark.kind === "best" ? "good" : mark.kind === "skip" ? "bad" : "soft";
      return { type: "line", xref: "x", yref: "paper", x0: mark.at, x1: mark.at, y0, y1, layer: "below", line: { color: mark.run === undefined ? style(tint) : color(`run${mark.run}`), width, dash } };
    });
    const zero = (direction) => ({ type: "line", layer: "below", line: { color: style("soft"), width: 1 }, ...direction });
    if (chart.zero || chart.cross) shapes.push(zero({ xref: "x", yref: "paper", x0: 0, x1: 0, y0: 0, y1: 1 }));
    if (chart.cross) shapes.push(zero({ xref: "paper", yref: "y", x0: 0, x1: 1, y0: 0, y1: 0 }));
    if (chart.diagonal) {
      const [x, y] = [range(chart, "X"), range(chart, "Y")], [low, high] = [Math.max(x[0], y[0]), Math.min(x[1], y[1])];
      shapes.push({ ...zero({ xref: "x", yref: "y", x0: low, x1: high, y0: low, y1: high }), line: { color: style("soft"), width: 1, dash: "dash" } });
    }
    const across = {};
    if (chart.x === "step") across.range = [0, 1.03 * lastStep];
    if (chart.whole) {
      const [low, high] = range(chart, "X");
      if (high - low < 6) Object.assign(across, { dtick: 1, range: [low - 0.5, high + 0.5] });
    }
    return [
      chart.traces.flatMap((trace) => traces[trace.type](trace)),
      {
        margin: { l: 44, r: 8, t: 6, b: 34 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", color: style("ink") },
        xaxis: axis(chart.x, across), yaxis: axis(chart.y, { exponentformat: chart.y === "bytes" ? "SI" : "e" }), shapes, barmode: "overlay", bargap: 0,
        hovermode: chart.x === "step" ? "x unified" : "closest", hoverlabel: { bgcolor: style("panel"), bordercolor: style("line"), font: { color: style("ink"), size: 12 } },
        showlegend: chart.traces.length > 1 && !crowded(chart), legend: { orientation: "h", maxheight: 400, y: 1.02, yanchor: "bottom", x: 0, font: { size: 11, color: style("soft") }, bgcolor: "rgba(0,0,0,0)" },
      },
      { responsive: true, displayModeBar: false },
    ];
  };
  for (const chart of Object.values(data.charts).flat()) {
    const plot = document.querySelector(`#chart-${chart.id} .plot`);
    plot.chart = chart;
    await Plotly.newPlot(plot, ...drawing(chart));
    plots.push(plot);
    // A tall legend must not reduce the height of the curves.
    const legend = plot.querySelector(".legend .bg")?.getBBox().height || 0;
    if (legend > 45) {
      plot.style.height = `${plot.clientHeight + legend - 25}px`;
      await Plotly.Plots.resize(plot);
    }
  }
  for (const link of document.querySelectorAll(".evidence a")) {
    if (!document.getElementById(link.getAttribute("href").slice(1))) link.remove();
  }

  // Pairs
  const table = document.getElementById("pair-table");
  if (table) pairTable(table);
  function pairTable(table) {
    const several = table.hasAttribute("data-runs");
    const oneSource = new Set(data.pairs.map((p) => p.source)).size === 1;
    const referred = data.pairs.some((p) => p.reference !== null);
    const columns = [
      ["pair", "pair", (p) => p.index], ["margin", "reward margin", (p) => p.margin],
      ...(several ? [["run", "run", (p) => data.runs[p.run]]] : []),
      ["kind", "kind", (p) => p.kinds.join(", ")], ["prompt", "prompt", (p) => p.prompt],
      ...(oneSource ? [["chosen", "chosen response", (p) => p.chosen.t.join("")]] : []),
      ...(referred ? [["change", "change, nats", (p) => p.change], ["reference", "reference, nats", (p) => p.reference]] : []), ["policy", "policy, nats", (p) => p.policy],
      ["length", "tokens", (p) => p.chosen_tokens - p.rejected_tokens], ...(oneSource ? [] : [["source", "source", (p) => p.source]]),
    ];
    const text = ["run", "kind", "prompt", "chosen", "source"], lesser = ["kind", "source", "chosen"];
    const show = (name) => `${text.includes(name) ? (["kind", "run"].includes(name) ? "left" : "text") : ""} ${lesser.includes(name) ? "lesser" : ""}`.trim();
    const hints = {
      margin: "chosen reward minus rejected reward; a negative margin means that the pair is ranked wrongly", change: "log-probability difference under the policy minus that under the reference",
      reference: "log-probability difference, chosen minus rejected, under the reference", policy: "log-probability difference, chosen minus rejected, under the policy",
      length: "tokens of chosen and of rejected; sorted by the difference",
    };
    const first = 15;
    let order = ["margin", 1], shown = first;
    for (const pair of data.pairs) pair.words = [pair.prompt, pair.chosen.t.join(""), pair.rejected.t.join(""), pair.source, `${pair.index}`].join("\n").toLowerCase();
    const head = table.tHead.rows[0];
    for (const [name, label] of columns) {
      const cell = make("th", label, show(name).replace("text", "left"));
      cell.dataset.name = name;
      cell.title = hints[name] || "";
      cell.tabIndex = 0;
      const sort = () => { order = [name, order[0] === name ? -order[1] : 1]; fill(); };
      cell.addEventListener("click", sort);
      cell.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
      head.append(cell);
    }
    const search = document.getElementById("search"), kinds = document.getElementById("kind"), runs = document.getElementById("run"), more = document.getElementById("more");
    for (const kind of [...new Set(data.pairs.flatMap((pair) => pair.kinds))].sort()) {
      const all = data.flips[kind];
      const option = make("option", all ? `${kind} (${data.pairs.filter((pair) => pair.kinds.includes(kind)).length} of ${all})` : kind);
      option.value = kind;
      kinds.append(option);
    }
    // A number that would be rounded to 0 keeps one significant digit, to explain its sign. Exactly 0 has no sign.
    const number = (value, digits) => {
      if (value === null || value === undefined) return "—";
      const size = Math.abs(value), tiny = size > 0 && size < 0.5 * 10 ** -digits;
      return `${value < 0 ? "−" : value > 0 ? "+" : ""}${tiny ? size.toPrecision(1) : size.toFixed(digits)}`;
    };
    const cells = {
      margin: (p) => number(p.margin, 3), change: (p) => number(p.change, 2), reference: (p) => number(p.reference, 2), policy: (p) => number(p.policy, 2),
      length: (p) => `${p.chosen_tokens} / ${p.rejected_tokens}`,
    };
    function fill() {
      const wanted = search.value.toLowerCase();
      const value = columns.find(([name]) => name === order[0])[2];
      const found = data.pairs.filter((p) => (!wanted || p.words.includes(wanted)) && (!kinds.value || p.kinds.includes(kinds.value)) && (!runs || !runs.value || p.run === Number(runs.value)));
      found.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return order[1] * (x < y ? -1 : x > y ? 1 : 0);
      });
      for (const cell of head.cells) cell.setAttribute("aria-sort", cell.dataset.name === order[0] ? (order[1] > 0 ? "ascending" : "descending") : "none");
      document.getElementById("count").textContent = `${found.length} of ${data.pairs.length} pairs`;
      table.tBodies[0].replaceChildren(...found.slice(0, shown).map(row));
      if (!found.length) {
        const none = make("td", "No pair matches.", "left");
        none.colSpan = columns.length;
        table.tBodies[0].insertRow().append(none);
      }
      more.hidden = found.length <= shown;
    }
    function row(pair) {
      const line = make("tr", undefined, "pair");
      line.tabIndex = 0;
      for (const [name, , value] of columns) {
        const cell = make("td", undefined, show(name));
        if (["prompt", "chosen"].includes(name)) cell.append(foreign("foreign", value(pair).slice(0, 500)));
        else cell.textContent = cells[name] ? cells[name](pair) : value(pair);
        line.append(cell);
      }
      const open = () => {
        if (line.classList.toggle("open")) line.after(opened(pair));
        else line.nextElementSibling.remove();
      };
      line.addEventListener("click", open);
      line.addEventListener("keydown", (event) => { if (event.key === "Enter") open(); });
      return line;
    }
    function opened(pair) {
      const line = make("tr", undefined, "opened"), whole = make("td"), cell = make("div", undefined, "inside");
      whole.colSpan = columns.length;
      whole.append(cell);
      line.append(whole);
      const prompt = foreign("foreign prompt");
      if (pair.cut) prompt.append(make("span", pair.cut, "cut"));
      prompt.append(pair.prompt);
      cell.append(make("h4", pair.cut ? "Prompt · ✂ its start was cut" : "Prompt"), prompt);
      if (pair.cut === null) cell.append(make("p", "✂ The pair reaches a length limit, so the start of the prompt may have been cut.", "limit"));
      const sides = make("div", undefined, "sides");
      const detail = make("div", "", "detail");
      const values = ["chosen", "rejected"].flatMap((side) => ratios(pair[side])).filter((v) => v !== null).map(Math.abs).sort((a, b) => a - b);
      const scale = Math.max(values[Math.floor(0.95 * values.length)] || 0, 0.05);
      detail.textContent = "Point at a token, or tap it, to see its log-probabilities.";
      for (const side of ["chosen", "rejected"]) sides.append(response(pair, side, scale, detail));
      cell.append(sides, make("p", `The strongest color stands for an absolute value of ${scale.toPrecision(2)} nats or more.`, "note"), detail);
      return line;
    }
    function ratios(side) {
      return side.v.map((value, i) => value === null ? null : side.r ? value - side.r[i] : value);
    }
    function response(pair, name, scale, detail) {
      const side = pair[name], box = make("div"), tokens = foreign("foreign tokens"), ratio = ratios(side);
      const count = pair[`${name}_tokens`];
      const sum = side.r ? `${number(side.sum - side.refsum, 2)} nats against the reference` : `${number(side.sum, 2)} nats`;
      box.append(make("h4", `${name === "chosen" ? "Chosen" : "Rejected"} · ${count} token${count === 1 ? "" : "s"} · ${sum}`), tokens);
      side.t.forEach((piece, i) => {
        const token = make("span", piece ? piece.replace(/\n/g, "↵\n") : "∅", "token");
        const value = ratio[i];
        let words = "not scored";
        if (value === null) token.classList.add("unscored");
        else {
          const strength = Math.min(1, Math.abs(value) / scale);
          token.style.background = `rgba(var(--${value < 0 ? "less" : "more"}), ${(0.65 * strength).toFixed(3)})`;
          words = side.r ? `log-ratio ${number(value, 3)} = policy ${number(side.v[i], 3)} − reference ${number(side.r[i], 3)}` : `policy ${number(value, 3)} nats`;
        }
        token.title = words;
        const pick = () => {
          detail.textContent = `“${piece}”: ${words}`;
          for (const other of table.querySelectorAll(".detail.shown")) other.classList.remove("shown");
          detail.classList.add("shown");
          for (const other of box.parentElement.querySelectorAll(".picked")) other.classList.remove("picked");
          token.classList.add("picked");
        };
        token.addEventListener("pointerenter", pick);
        token.addEventListener("click", pick);
        tokens.append(token);
      });
      if (side.more) tokens.append(make("span", ` … (${side.more} more)`, "token unscored"));
      return box;
    }
    for (const input of [search, kinds, runs]) if (input) input.addEventListener("input", () => { shown = first; fill(); });
    more.addEventListener("click", () => { shown += 200; fill(); });
    fill();
  }
  // The table has moved the sections below it, so scroll to the linked section again.
  if (location.hash && !moved) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  root.dataset.ready = "true";
})();
