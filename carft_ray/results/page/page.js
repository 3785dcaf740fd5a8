// Draws the figures of a report from its document, filters them, moves alpha, and sorts the table of trials.
"use strict";
(() => {
  const doc = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const { kept, values: PARAMETERS, metrics: METRICS, rows: ROWS } = doc.trials;
  const trials = ROWS.map((row) => {
    const trial = { values: {}, metrics: {} };
    kept.forEach((name, i) => { trial[name] = row[i]; });
    PARAMETERS.forEach((name, i) => { trial.values[name] = row[kept.length + i]; });
    METRICS.forEach((name, i) => { trial.metrics[name] = row[kept.length + PARAMETERS.length + i]; });
    trial.id = trial.metrics.id_accuracy ?? null;
    trial.ood = doc.has_ood ? trial.metrics.ood_accuracy ?? null : null;
    trial.method = doc.method_of[trial.name] ?? "";
    trial.device = doc.devices[trial.name] ?? "";
    return trial;
  });
  const byName = new Map([...trials, ...doc.baselines].map((row) => [row.name, row]));
  const isBaseline = new Set(doc.baselines.map((row) => row.name));
  const best = doc.status.best;
  const FEW = 20; // trials below which no surface and no line through many trials is drawn
  const MANY = 300; // trials from which on marks are small
  const PATTERNS = { complete: "", pruned: "/", diverged: "x", error: "x", running: ".", stopped: "\\", waiting: ".", set_aside: "\\" };

  // state, kept while a page that is written again is loaded again
  const state = { outcomes: null, top: 100, feasible: false, method: "", device: "", alpha: best?.alpha ?? 1, sort: null, down: true };
  const KEY = `carft:${doc.study}`;
  try { Object.assign(state, JSON.parse(sessionStorage.getItem(KEY)) ?? {}); } catch { /* private windows have none */ }
  const remember = () => { try { sessionStorage.setItem(KEY, JSON.stringify(state)); } catch { /* as above */ } };

  // numbers as people read them
  const fixed = (value, digits) => { // a half goes to the even digit, as in the tables that Python has written
    const halves = value * 2 ** (digits + 1), [lower, upper] = [Math.floor, Math.ceil].map((to) => to(value * 10 ** digits));
    return Math.abs(halves % 2) === 1 ? ((lower % 2 ? upper : lower) / 10 ** digits).toFixed(digits) : value.toFixed(digits);
  };
  const percent = (value, digits = 1) => (value == null ? "" : fixed(100 * value, digits));
  const thousands = (number) => number.toLocaleString("en-US");
  const spaced = (name) => doc.names[name] ?? String(name).replaceAll("_", " ");
  const short = (value) => {
    if (typeof value !== "number") return value == null ? "" : String(value);
    if (value !== 0 && Math.abs(value) < 1e-3) return String(Number(value.toPrecision(3))).includes("e") || Math.abs(value) < 1e-4 ? value.toExponential(2).replace(/\.?0*e/, "e") : String(Number(value.toPrecision(3)));
    return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(3)));
  };
  const logit = (value) => { const p = Math.min(0.9995, Math.max(0.0005, value)); return Math.log(p / (1 - p)); };
  const known = (values) => values.filter((value) => value != null && Number.isFinite(value));
  // null is a value if it is a choice
  const has = (trial, name) => trial.values[name] != null || Boolean(doc.space[name]?.choices?.includes(null));
  const about = (trial) => [
    `<b>${trial.name}</b>`,
    ...PARAMETERS.filter((name) => has(trial, name)).map((name) => `${spaced(name)} ${short(trial.values[name]) || "null"}`),
    `alpha ${trial.alpha?.toFixed(2) ?? "-"}`,
    `ID ${percent(trial.id)} %` + (trial.ood == null ? "" : `, OOD ${percent(trial.ood)} %`),
    `objective ${percent(trial.objective)} %` + (trial.expected == null ? "" : `, expected ${percent(trial.expected)} %`),
  ].join("<br>");

  // colours of the theme
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const isDark = () => parseInt(colour("paper").slice(1, 3), 16) < 128;
  const CIVIDIS = [[0, "#00224e"], [0.25, "#434e6c"], [0.5, "#7d7c78"], [0.75, "#bcae6c"], [1, "#fee838"]];
  const between = (share) => { // of the part of cividis that stands out from the ground
    const at = Math.min(0.999, Math.max(0, isDark() ? 0.42 + 0.58 * share : 0.1 + 0.72 * share)) * 4, i = Math.floor(at), part = at - i;
    const rgb = (hex) => [1, 3, 5].map((k) => parseInt(hex.slice(k, k + 2), 16));
    const [low, high] = [rgb(CIVIDIS[i][1]), rgb(CIVIDIS[i + 1][1])];
    return `rgb(${low.map((value, k) => Math.round(value + part * (high[k] - value))).join(",")})`;
  };
  const axis = (more = {}) => ({
    gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, automargin: true, ticks: "", ...more,
    title: { text: more.title ?? "", standoff: 8, font: { size: 13 } },
  });
  const layout = (more = {}) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: colour("ink"), size: 12.5, family: "system-ui, Helvetica, Arial, sans-serif" },
    margin: { l: 52, r: 16, t: 8, b: 44 }, height: 340, hovermode: "closest", dragmode: matchMedia("(hover: hover)").matches ? "zoom" : false, showlegend: false,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } },
    hoverlabel: { bgcolor: colour("paper"), bordercolor: colour("line"), font: { color: colour("ink") }, align: "left" },
    xaxis: axis(), yaxis: axis(), ...more,
  });
  let isPrinting = false;
  const width = (element) => element.clientWidth || 600;
  const isNarrow = (element) => width(element) < 560;
  const bar = (title, element) => ({ title: { text: title, side: "right", font: { size: 12 } }, thickness: 10, len: 0.8, outlinewidth: 0, ...(isNarrow(element) ? { orientation: "h", y: -0.16, yanchor: "top", len: 1, title: { text: title, side: "bottom", font: { size: 12 } } } : {}) });

  /** Ticks of a logit axis around some accuracies, at percents that people would choose. */
  const logitAxis = (accuracies, title, below = 0.06) => { // below the lowest: a share of the range
    const found = known(accuracies).map(logit);
    const low = Math.min(...found), high = Math.max(...found), margin = Math.max(0.06 * (high - low), 0.03);
    const least = low - Math.max(below * (high - low), margin);
    const inside = (value) => logit(value) >= least && logit(value) <= high + margin;
    const steps = [25, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1].map((step) => {
      const ticks = [];
      for (let k = 1; k * step < 100 - 1e-9; k += 1) if (inside((k * step) / 100)) ticks.push((k * step) / 100);
      return ticks;
    });
    const chosen = steps.find((ticks) => ticks.length >= 4) ?? steps.at(-1);
    return axis({ title, range: [least, high + margin], tickvals: chosen.map(logit), ticktext: chosen.map((p) => short(Number((100 * p).toFixed(2)))) });
  };
  const logTicks = (low, high) => {
    const digits = high > 300 * low ? [1] : high > 50 * low ? [1, 3] : [1, 2, 5], ticks = [];
    for (let k = Math.floor(Math.log10(low)); k <= Math.log10(high); k += 1) for (const digit of digits) ticks.push(Number(`${digit}e${k}`));
    const inside = ticks.filter((tick) => tick >= low / 1.01 && tick <= high * 1.01);
    return inside.length > 1 ? { tickvals: inside, ticktext: inside.map(short), minor: { ticks: "" } } : {};
  };
  const parameterAxis = (name, more = {}) => {
    const one = doc.space[name] ?? {};
    return one.choices ? axis({ title: spaced(name), type: "category", categoryorder: "array", categoryarray: one.choices.map(String), ...more }) : axis({ title: spaced(name), type: one.log ? "log" : "linear", nticks: 5, ...(one.log ? logTicks(one.low, one.high) : {}), ...more });
  };

  // Plotly reads texts as HTML: of what may be a name only these few stay
  const literal = (value) => {
    if (typeof value === "string") return value.replaceAll("&", "&amp;").replace(/<(?!\/?(b|br|extra)>)/g, "&lt;");
    if (Array.isArray(value)) return value.map(literal);
    return value && typeof value === "object" ? Object.fromEntries(Object.entries(value).map(([key, one]) => [key, literal(one)])) : value;
  };

  // filters
  const results = trials.filter((trial) => trial.objective != null);
  const ranked = [...results].sort((a, b) => a.violation - b.violation || (doc.standing[b.name] ?? 0) - (doc.standing[a.name] ?? 0) || (b.expected ?? b.objective) - (a.expected ?? a.objective) || a.number - b.number);
  const place = new Map(ranked.map((trial, i) => [trial.name, i]));
  const outcomes = [...new Set(trials.map((trial) => trial.outcome))];
  const passes = (trial) =>
    (state.outcomes ?? outcomes).includes(trial.outcome) &&
    (state.top >= 100 || (place.has(trial.name) && place.get(trial.name) < Math.max(1, Math.ceil((state.top / 100) * ranked.length)))) &&
    (!state.feasible || trial.violation <= 0) && ["method", "device"].every((kind) => !state[kind] || trial[kind] === state[kind]);
  const shown = () => trials.filter(passes);
  const complete = (rows) => rows.filter((trial) => trial.objective != null && trial.id != null);

  // alpha
  const at = (curve, alpha, name) => {
    const points = curve.points;
    if (alpha < points[0].alpha - 1e-9 || alpha > points.at(-1).alpha + 1e-9 || points[0][name] == null) return null;
    const next = points.findIndex((point) => point.alpha >= alpha - 1e-9);
    const [a, b] = [points[Math.max(0, next - 1)], points[next]];
    if (Math.abs(b.alpha - alpha) < 1e-9 || b === a) return b[name];
    return a[name] + ((alpha - a.alpha) / (b.alpha - a.alpha)) * (b[name] - a[name]);
  };
  const isMeasured = (curve, alpha) => curve.points.some((point) => Math.abs(point.alpha - alpha) < 1e-9);
  const curvesOf = (rows) => {
    const names = new Set(rows.map((trial) => trial.name));
    const found = doc.curves.filter((curve) => isBaseline.has(curve.name) || names.has(curve.name));
    return found.sort((a, b) => (a.name === best?.name) - (b.name === best?.name)); // it lies above the others
  };
  const curveColour = (curve) => (curve.name === best?.name ? colour("best") : colour(isBaseline.has(curve.name) ? "muted" : "grey"));
  const diamonds = (curves, x, y) => ({
    x: curves.map(x), y: curves.map(y), mode: "markers", name: "at the slider", text: curves.map((curve) => `${spaced(curve.name)} at alpha ${state.alpha.toFixed(2)}`),
    marker: { symbol: "diamond", size: curves.map((curve) => (curve.name === best?.name ? 13 : 8)), color: curves.map(curveColour), line: { color: colour("paper"), width: 1.5 } }, hovertemplate: "%{text}<extra></extra>", meta: "diamonds",
  });
  const lines = (curves, x, y) => curves.map((curve) => ({
    x: curve.points.map(x), y: curve.points.map(y), mode: "lines", showlegend: curve.name === best?.name, name: "curve of the best",
    line: { color: curveColour(curve), width: curve.name === best?.name ? 2.5 : 1, dash: isBaseline.has(curve.name) ? "dot" : "solid" }, opacity: curve.name === best?.name ? 1 : 0.55,
    text: curve.points.map((point) => `${spaced(curve.name)}, alpha ${point.alpha}: ID ${percent(point.id_accuracy)} %` + (point.ood_accuracy == null ? "" : `, OOD ${percent(point.ood_accuracy)} %`)), hovertemplate: "%{text}<extra></extra>",
  }));

  const front = (rows) => { // of a Pareto search as the study has it, else of the points shown
    if (doc.report?.front) return doc.report.front.points.map((point) => ({ id: point.id_accuracy, ood: point.ood_accuracy }));
    const sorted = rows.filter((trial) => trial.violation <= 0 && trial.ood != null).sort((a, b) => b.id - a.id || b.ood - a.ood);
    let highest = -1;
    return sorted.filter((trial) => trial.ood > highest && ((highest = trial.ood), true)).reverse();
  };

  const draw = {};

  draw.front = (rows, element) => {
    const points = complete(rows).filter((trial) => trial.ood != null), curves = curvesOf(points).filter((curve) => curve.points[0].ood_accuracy != null);
    const weights = known(points.map((trial) => trial.values.kl_weight)).filter((value) => value > 0);
    const coloured = new Set(weights).size > 1;
    const ends = coloured ? [Math.log10(Math.min(...weights)), Math.log10(Math.max(...weights))] : [0, 1];
    const feasible = points.filter((trial) => trial.violation <= 0), missing = points.filter((trial) => trial.violation > 0);
    const X = (trial) => logit(trial.id), Y = (trial) => logit(trial.ood);
    const onAxes = (point) => [logit(point.id_accuracy), logit(point.ood_accuracy)];
    const traces = [], isPlain = (trial) => trial.values.kl_weight === 0;
    const plain = feasible.every(isPlain) ? [] : feasible.filter(isPlain), others = feasible.filter((trial) => !plain.includes(trial));
    const everything = [...points, ...curves.flatMap((curve) => curve.points.map((point) => ({ id: point.id_accuracy, ood: point.ood_accuracy })))];
    const baselines = doc.baselines.filter((row) => row.metrics.ood_accuracy != null && row.outcome === "complete");
    everything.push(...baselines.map((row) => ({ id: row.metrics.id_accuracy, ood: row.metrics.ood_accuracy })));
    if (!everything.length) return null;
    const confirmed = (doc.confirm?.rows ?? []).filter((row) => row.role !== "baseline" && row.ood_accuracy);
    everything.push(...confirmed.flatMap((row) => [0, 1].map((end) => ({ id: row.id_accuracy.ends[end], ood: row.ood_accuracy.ends[end] }))));
    const edge = front(points);
    if (edge.length > 1) traces.push({ x: edge.map(X), y: edge.map(Y), mode: "lines", name: "front", line: { color: colour("green"), width: 1.5, shape: "vh" }, hoverinfo: "skip" });
    traces.push(...lines(curves, (point) => onAxes(point)[0], (point) => onAxes(point)[1]));
    const size = points.length > MANY ? 6 : 9;
    const dots = (several) => ({ x: several.map(X), y: several.map(Y), mode: "markers", text: several.map(about), hovertemplate: "%{text}<extra></extra>", customdata: several.map((trial) => trial.name) });
    if (plain.length) traces.push({ ...dots(plain), name: "trial without KL term", marker: { symbol: "square", size: size - 1, color: colour("paper"), line: { color: colour("ink"), width: 1.3 } } });
    if (others.length) traces.push({ ...dots(others), name: "trial",
      marker: { size, line: { color: colour("grey"), width: 0.8 }, ...(coloured ? { color: others.map((trial) => Math.log10(trial.values.kl_weight)), cmin: ends[0], cmax: ends[1], colorscale: CIVIDIS, showscale: true, colorbar: { ...bar("KL weight", element), tickvals: decades(ends), ticktext: decades(ends).map((k) => short(10 ** k)) } } : { color: colour("blue") }) } });
    if (missing.length) traces.push({ x: missing.map(X), y: missing.map(Y), mode: "markers", name: "misses a constraint", text: missing.map(about), hovertemplate: "%{text}<extra></extra>", marker: { symbol: "x-thin", size: 9, line: { color: colour("grey"), width: 1.8 } } });
    const marks = ["star", "square", "diamond-tall", "triangle-up", "triangle-down", "pentagon", "hexagram"];
    const ordered = [...baselines].sort((a, b) => (b.alpha === 0) - (a.alpha === 0));
    if (ordered.length) traces.push({ x: ordered.map((row) => logit(row.metrics.id_accuracy)), y: ordered.map((row) => logit(row.metrics.ood_accuracy)), mode: "markers+text", name: "baseline", text: ordered.map((row) => spaced(row.name)), textposition: ordered.map((row) => (row.alpha === 0 ? "bottom right" : "bottom center")), textfont: { color: colour("ink"), size: 12 }, cliponaxis: false, hovertemplate: "%{text}<extra></extra>", marker: { symbol: ordered.map((_, i) => marks[i % marks.length]), size: ordered.map((row) => (row.alpha === 0 ? 16 : 11)), color: colour("ink"), line: { color: colour("paper"), width: 1 } } });
    if (confirmed.length) {
      const bars = (name) => ({ type: "data", symmetric: false, thickness: 1, width: 4, color: colour("green"), array: confirmed.map((row) => logit(row[name].ends[1]) - logit(row[name].mean)), arrayminus: confirmed.map((row) => logit(row[name].mean) - logit(row[name].ends[0])) });
      traces.push({ x: confirmed.map((row) => logit(row.id_accuracy.mean)), y: confirmed.map((row) => logit(row.ood_accuracy.mean)), mode: "markers", name: "confirmed, 95 %", error_x: bars("id_accuracy"), error_y: bars("ood_accuracy"), text: confirmed.map((row) => `${row.name}, ${row.seeds} fresh seeds`), hovertemplate: "%{text}<extra></extra>", marker: { symbol: "circle", size: confirmed.map((row) => (row.role === "winner" ? 12 : 7)), color: colour("green"), line: { color: colour("paper"), width: 1.5 } } });
    }
    const own = points.find((trial) => trial.name === best?.name);
    if (own) traces.push({ x: [X(own)], y: [Y(own)], mode: "markers", name: "best", hoverinfo: "skip", marker: { symbol: "circle-open", size: 17, color: colour("best"), line: { width: 2.5 } } });
    traces.push(diamonds(curves, (curve) => { const value = at(curve, state.alpha, "id_accuracy"); return value == null ? null : logit(value); }, (curve) => { const value = at(curve, state.alpha, "ood_accuracy"); return value == null ? null : logit(value); }));
    return { traces, layout: layout({ height: isPrinting ? 330 : isNarrow(element) ? 540 : 560, showlegend: true, xaxis: logitAxis(everything.map((point) => point.id), "ID accuracy, %"), yaxis: logitAxis(everything.map((point) => point.ood), "OOD accuracy, mean over sets, %", 0.11), margin: { l: 56, r: 16, t: 8, b: isNarrow(element) ? 110 : 48 } }) };
  };
  const decades = ([low, high]) => {
    const found = [];
    for (let k = Math.ceil(low - 1e-9); k <= high + 1e-9; k += 1) found.push(k);
    return found.length > 1 ? found : [low, high];
  };

  draw.alphas = (rows, element) => {
    const curves = curvesOf(rows);
    if (!curves.length) return null;
    const name = curves[0].points[0].objective == null ? "id_accuracy" : "objective";
    const traces = lines(curves, (point) => point.alpha, (point) => 100 * point[name]);
    traces.push(diamonds(curves, () => state.alpha, (curve) => { const value = at(curve, state.alpha, name); return value == null ? null : 100 * value; }));
    return { traces, layout: layout({ height: isPrinting ? 330 : 420, showlegend: true, xaxis: axis({ title: "alpha", range: [-0.03, 1.03] }), yaxis: axis({ title: name === "objective" ? "objective, %" : "ID accuracy, %" }) }) };
  };

  draw.sets = (rows, element) => {
    const table = doc.tables[0], sets = table.sets;
    const marks = ["circle", "star", "square", "diamond", "triangle-up", "x", "cross", "triangle-down"];
    const tones = ["best", "ink", "blue", "green", "purple", "orange", "grey", "muted"];
    const first = table.rows.filter((row) => row.role === "winner"), others = table.rows.filter((row) => row.role === "baseline" && !row.name.endsWith(", alpha 1"));
    const drawn = [...first, ...others].slice(0, 8), all = drawn.flatMap((row) => row.cells.flatMap((cell) => (cell ? [cell.mean, cell.low ?? cell.mean, cell.high ?? cell.mean] : []))).map((value) => 100 * value);
    const margin = 0.06 * (Math.max(...all) - Math.min(...all)) + 0.5;
    const traces = drawn.map((row, i) => ({
      y: sets.map(spaced), x: row.cells.map((cell) => (cell ? 100 * cell.mean : null)), mode: "markers", cliponaxis: false, name: spaced(row.name), hovertemplate: `${spaced(row.name)}: %{x:.1f} % on %{y}<extra></extra>`,
      marker: { symbol: marks[i], color: colour(tones[i]), size: i ? 9 : 11 },
      error_x: row.cells.some((cell) => cell?.low != null) ? { type: "data", symmetric: false, thickness: 1, width: 0, color: colour(tones[i]), array: row.cells.map((cell) => (cell?.high == null ? 0 : 100 * (cell.high - cell.mean))), arrayminus: row.cells.map((cell) => (cell?.low == null ? 0 : 100 * (cell.mean - cell.low))) } : undefined,
    })).reverse();
    return { traces, layout: layout({ height: 140 + 34 * sets.length, showlegend: true, scattermode: "group", xaxis: axis({ title: `accuracy, %: ${table.label.toLowerCase()}`, range: [Math.min(...all) - margin, Math.max(...all) + margin] }), yaxis: axis({ autorange: "reversed" }), legend: { ...layout().legend, traceorder: "reversed" } }) };
  };

  draw.changes = () => {
    const sets = doc.changes.map((one) => spaced(one.set)), steps = doc.changes[0].steps;
    const tone = (i) => (i ? 0.45 : 1);
    const traces = steps.flatMap((step, i) => ["right", "wrong"].map((key) => ({
      type: "bar", orientation: "h", y: sets, x: doc.changes.map((one) => (key === "right" ? 1 : -1) * one.steps[i][key]), offsetgroup: String(i), name: `${key === "right" ? "become right" : "become wrong"}, ${step.from} to ${step.to}`,
      opacity: tone(i), marker: { color: colour(key === "right" ? "blue" : "best"), pattern: { shape: key === "right" ? "" : "/", fillmode: "overlay", fgcolor: colour("paper"), size: 5 } }, hovertemplate: `%{y}: %{text} images ${key === "right" ? "become right" : "become wrong"}, ${step.from} to ${step.to}<extra></extra>`, text: doc.changes.map((one) => String(one.steps[i][key])), textposition: "none",
    })));
    return { traces, layout: layout({ height: 160 + 46 * sets.length, barmode: "relative", showlegend: true, xaxis: axis({ title: "images", zeroline: true, zerolinecolor: colour("muted") }), yaxis: axis({ autorange: "reversed" }) }) };
  };

  draw.history = (rows) => {
    const points = complete(rows), failed = rows.filter((trial) => trial.objective == null && !["running", "waiting"].includes(trial.outcome));
    if (!points.length && !failed.length) return null;
    let top = -Infinity;
    const steps = [...points].sort((a, b) => a.number - b.number).filter((trial) => trial.violation <= (best ? total(best) : 0) + 1e-12 && trial.objective > top && ((top = trial.objective), true));
    const last = Math.max(...rows.map((trial) => trial.number));
    const baselines = doc.baselines.filter((row) => row.objective != null && row.outcome === "complete");
    const low = Math.min(...points.map((trial) => trial.objective), ...baselines.map((row) => row.objective));
    const dots = (several, name, marker) => ({ x: several.map((trial) => trial.number), y: several.map((trial) => 100 * trial.objective), mode: "markers", name, text: several.map(about), hovertemplate: "%{text}<extra></extra>", marker });
    const missing = points.filter((trial) => trial.violation > 0), size = points.length > MANY ? 4 : 8;
    const traces = [
      dots(points.filter((trial) => !missing.includes(trial)), "trial", { color: colour("blue"), size }),
      ...(missing.length ? [dots(missing, "misses a constraint", { symbol: "x-thin", size, line: { color: colour("grey"), width: 1.8 } })] : []),
      { x: [...steps.map((trial) => trial.number), last + 0.5], y: [...steps.map((trial) => 100 * trial.objective), 100 * top], mode: "lines", name: "best so far", line: { shape: "hv", color: colour("best"), width: 2 }, hoverinfo: "skip" },
    ];
    const foot = Number.isFinite(low) ? low - 0.07 * (Math.max(top, ...baselines.map((row) => row.objective)) - low) : 0;
    if (failed.length) traces.push({ x: failed.map((trial) => trial.number), y: failed.map(() => 100 * foot), mode: "markers", name: "without a result", text: failed.map((trial) => `${trial.name}: ${trial.outcome}<br>${trial.reason ?? ""}`), hovertemplate: "%{text}<extra></extra>", marker: { symbol: "x", size: rows.length > MANY ? 4 : 8, color: colour("grey") } });
    const dashes = ["dash", "dot", "dashdot", "longdash"];
    baselines.forEach((row, i) => traces.push({ x: [-0.5, last + 0.5], y: [100 * row.objective, 100 * row.objective], mode: "lines", name: spaced(row.name), line: { color: colour("muted"), width: 1.3, dash: dashes[i % 4] }, hovertemplate: `${spaced(row.name)} %{y:.1f} %<extra></extra>` }));
    return { traces, layout: layout({ showlegend: true, xaxis: axis({ title: "trial", dtick: last < 10 ? 1 : undefined }), yaxis: axis({ title: "objective, %" }) }) };
  };
  const total = (row) => Object.values(row.violations ?? {}).reduce((sum, value) => sum + Math.max(0, value), 0);

  draw.slices = (rows, element) => {
    const points = complete(rows), names = PARAMETERS.filter((name) => new Set(points.filter((trial) => has(trial, name)).map((trial) => trial.values[name])).size > 1);
    if (!points.length || !names.length) return null;
    const columns = Math.max(1, Math.min(names.length, Math.floor(width(element) / (isPrinting ? 190 : 260)), 4)), lanes = Math.ceil(names.length / columns);
    const found = layout({ height: 60 + 250 * lanes, grid: { rows: lanes, columns, pattern: "independent", xgap: 0.1, ygap: 0.3 }, margin: { l: 52, r: 70, t: 8, b: 48 } });
    const alphas = known(points.map((trial) => trial.alpha)), showscale = new Set(alphas).size > 1;
    const traces = names.map((name, i) => {
      const key = i ? i + 1 : "", there = points.filter((trial) => has(trial, name));
      found[`xaxis${key}`] = parameterAxis(name);
      found[`yaxis${key}`] = axis({ title: i % columns ? "" : "objective, %" });
      return { x: there.map((trial) => (doc.space[name]?.choices ? String(trial.values[name]) : trial.values[name])), y: there.map((trial) => 100 * trial.objective), xaxis: `x${key}`, yaxis: `y${key}`, mode: "markers", text: there.map(about), hovertemplate: "%{text}<extra></extra>",
        marker: { size: points.length > MANY ? 5 : 8, color: showscale ? there.map((trial) => trial.alpha) : colour("blue"), colorscale: CIVIDIS, cmin: 0, cmax: 1, showscale: showscale && !i, colorbar: { title: { text: "alpha", side: "right", font: { size: 12 } }, thickness: 10, outlinewidth: 0, len: Math.min(1, 1.6 / lanes) }, line: { color: colour("grey"), width: points.length > MANY ? 0.3 : 0.8 } } };
    });
    return { traces, layout: found };
  };

  draw.importance = () => {
    const names = Object.keys(Object.values(doc.importance)[0]).sort((a, b) => (doc.importance.id_accuracy?.[b] ?? 0) - (doc.importance.id_accuracy?.[a] ?? 0));
    const label = { id_accuracy: "for ID accuracy", ood_accuracy: "for OOD accuracy" };
    const traces = Object.entries(doc.importance).map(([metric, shares], i) => ({ type: "bar", orientation: "h", y: names.map(spaced), x: names.map((name) => shares[name] ?? 0), name: label[metric], hovertemplate: `%{y}: %{x:.2f} ${label[metric]}<extra></extra>`, marker: { color: colour(i ? "orange" : "blue"), pattern: { shape: i ? "/" : "", fillmode: "overlay", fgcolor: colour("paper"), size: 5 } } }));
    return { traces, layout: layout({ height: 140 + 60 * names.length, showlegend: true, xaxis: axis({ title: "share", rangemode: "tozero" }), yaxis: axis({ autorange: "reversed" }) }) };
  };

  draw.contour = (rows) => {
    const points = complete(rows).filter((trial) => trial.values.learning_rate > 0 && trial.values.kl_weight != null);
    if (points.length < FEW) return { none: `Fewer than ${FEW} trials pass the filters: too few for a surface.` };
    const SIZE = 36, KERNEL = 0.12;
    const scale = (name) => { const one = doc.space[name], of = one.log ? Math.log : Number, low = of(one.low), high = of(one.high); return { to: (value) => (of(value) - low) / (high - low), back: (share) => (one.log ? Math.exp(low + share * (high - low)) : low + share * (high - low)) }; };
    const [sx, sy] = [scale("learning_rate"), scale("kl_weight")];
    const xy = points.map((trial) => [sx.to(trial.values.learning_rate), sy.to(trial.values.kl_weight), 100 * trial.objective]).filter((one) => one.every(Number.isFinite));
    const shares = Array.from({ length: SIZE }, (_, i) => i / (SIZE - 1));
    const z = shares.map((v) => shares.map((u) => {
      let sum = 0, weight = 0, nearest = 9;
      for (const [a, b, value] of xy) { const d = (a - u) ** 2 + (b - v) ** 2; nearest = Math.min(nearest, d); const w = Math.exp(-d / (2 * KERNEL ** 2)); sum += w * value; weight += w; }
      return nearest > (1.5 * KERNEL) ** 2 || !(weight > 1e-12) ? null : sum / weight;
    }));
    const traces = [
      { type: "contour", x: shares.map(sx.back), y: shares.map(sy.back), z, colorscale: CIVIDIS, ncontours: 14, line: { width: 0.5, color: colour("paper") }, colorbar: { title: { text: "objective, %", side: "right", font: { size: 12 } }, thickness: 10, outlinewidth: 0 }, hovertemplate: "learning rate %{x:.3g}<br>KL weight %{y:.3g}<br>about %{z:.1f} %<extra></extra>" },
      { x: points.map((trial) => trial.values.learning_rate), y: points.map((trial) => trial.values.kl_weight), mode: "markers", text: points.map(about), hovertemplate: "%{text}<extra></extra>", marker: points.length > MANY ? { size: 3, color: "#000000", opacity: 0.45 } : { size: 5, color: "#ffffff", line: { color: "#000000", width: 1 } } },
    ];
    return { traces, layout: layout({ height: 400, xaxis: parameterAxis("learning_rate"), yaxis: parameterAxis("kl_weight") }) };
  };

  draw.parallel = (rows, element) => {
    const points = complete(rows);
    const columns = [...PARAMETERS.filter((name) => doc.space[name]).map((name) => ({ name, log: doc.space[name].log, choices: doc.space[name].choices, of: (trial) => trial.values[name] })),
      { name: "alpha", of: (trial) => trial.alpha }, { name: "ID, %", of: (trial) => 100 * trial.id }, ...(doc.has_ood ? [{ name: "OOD, %", of: (trial) => (trial.ood == null ? null : 100 * trial.ood) }] : []), { name: "objective, %", of: (trial) => 100 * trial.objective }];
    if (points.length < 2) return null;
    for (const column of columns) {
      if (column.choices) { column.to = (value) => (column.choices.length > 1 ? column.choices.findIndex((choice) => String(choice) === String(value)) / (column.choices.length - 1) : 0.5); column.ends = column.choices.length > 1 ? [column.choices[0], column.choices.at(-1)].map(String) : [String(column.choices[0]), ""]; continue; }
      const scaled = column.log ? (value) => Math.log(value) : Number, all = known(points.map(column.of));
      const low = Math.min(...all), high = Math.max(...all);
      column.to = (value) => (high > low ? (scaled(value) - scaled(low)) / (scaled(high) - scaled(low)) : 0.5);
      column.ends = high > low ? [short(low), short(high)] : [short(low), ""];
    }
    const order = [...points].sort((a, b) => a.objective - b.objective), BANDS = Math.min(5, order.length);
    const MOST = 40; // lines of a band: more are a single area
    const spread = (band) => (band.length <= MOST ? band : Array.from({ length: MOST }, (_, i) => band[Math.round((i * (band.length - 1)) / (MOST - 1))]));
    const traces = Array.from({ length: BANDS }, (_, k) => {
      const band = order.slice(Math.floor((k * order.length) / BANDS), Math.floor(((k + 1) * order.length) / BANDS)), x = [], y = [];
      for (const trial of spread(band)) { columns.forEach((column, i) => { const value = column.of(trial); x.push(i); y.push(value == null && !column.choices?.includes(null) ? null : column.to(value)); }); x.push(null); y.push(null); }
      return { x, y, mode: "lines", hoverinfo: "skip", name: `${percent(band[0].objective)} to ${percent(band.at(-1).objective)} %`, line: { color: between(k / Math.max(1, BANDS - 1)), width: (points.length > 100 ? 1 : 1.6) * (k === BANDS - 1 ? 1.5 : 1) }, opacity: 0.6 + (0.4 * (k + 1)) / BANDS };
    });
    const ends = columns.flatMap((column, i) => [0, 1].map((end) => ({ x: i, y: end, text: column.ends[end], showarrow: false, yshift: end ? 12 : -12, font: { size: 11, color: colour("muted") } })));
    const names = columns.map((column) => spaced(column.name).replace(isNarrow(element) ? " " : "\u0000", "<br>"));
    return { traces, layout: layout({ height: 400, showlegend: true, legend: { ...layout().legend, title: { text: "objective " } }, margin: { l: 30, r: 30, t: 8, b: 32 }, annotations: ends, xaxis: axis({ title: points.length > BANDS * MOST ? `${BANDS * MOST} of ${thousands(points.length)} trials are drawn, as many of each colour` : "", tickvals: columns.map((_, i) => i), ticktext: names, range: [-0.3, columns.length - 0.7], tickangle: isNarrow(element) ? -60 : 0, showgrid: true, gridcolor: colour("line") }), yaxis: axis({ showgrid: false, showticklabels: false, range: [-0.12, 1.12] }) }) };
  };

  draw.pruning = (rows) => {
    const groups = new Map();
    for (const trial of rows) {
      const found = Object.entries(doc.intermediate_values[trial.name] ?? {}).map(([step, value]) => [Number(step), value]).sort((a, b) => a[0] - b[0]);
      if (!found.length) continue;
      const key = trial.outcome === "pruned" ? "cut by the pruner" : trial.outcome === "complete" ? "complete" : "others";
      const one = groups.get(key) ?? groups.set(key, { x: [], y: [], ends: [] }).get(key);
      for (const [step, value] of found) { one.x.push(step); one.y.push(100 * value); }
      one.x.push(null); one.y.push(null); one.ends.push([...found.at(-1), trial.name]);
    }
    if (!groups.size) return null;
    const tone = { complete: "blue", "cut by the pruner": "best", others: "grey" };
    const traces = [...groups].flatMap(([name, one]) => [
      { x: one.x, y: one.y, mode: "lines", name, opacity: 0.6, line: { color: colour(tone[name]), width: 1.2, dash: name === "complete" ? "solid" : "dot" }, hoverinfo: "skip" },
      { x: one.ends.map((end) => end[0]), y: one.ends.map((end) => 100 * end[1]), mode: "markers", showlegend: false, text: one.ends.map((end) => end[2]), hovertemplate: "%{text}: %{y:.1f} % at %{x} %<extra></extra>", marker: { symbol: name === "complete" ? "circle" : "x", size: 7, color: colour(tone[name]) } },
    ]);
    return { traces, layout: layout({ height: 380, showlegend: true, xaxis: axis({ title: "of the schedule, %", range: [0, 103] }), yaxis: axis({ title: "objective on the subset, %" }) }) };
  };

  draw.timeline = (rows, element) => {
    const names = new Set(rows.map((trial) => trial.name)), now = Date.parse(doc.made.time);
    const all = Object.entries(doc.seconds).filter(([name]) => names.has(name) || !place.has(name) && !trials.some((trial) => trial.name === name))
      .map(([name, [began, seconds]]) => ({ name, began: 1000 * began, ms: 1000 * seconds || (byName.get(name)?.outcome === "running" ? Math.max(0, now - 1000 * began) : 0), outcome: byName.get(name)?.outcome ?? "complete", kind: trials.some((trial) => trial.name === name) ? "trial" : isBaseline.has(name) || doc.repeats.includes(name) ? "baseline" : doc.models.some((row) => row.kind === "soup" && row.name === name) ? "soup" : "confirm" })).filter((one) => one.ms > 0).sort((a, b) => a.began - b.began);
    if (!all.length) return null;
    const ends = []; // of the last training on each line; times are known to a second
    for (const one of all) { let lane = ends.findIndex((end) => end <= one.began + Math.min(1000, one.ms / 5)); if (lane < 0) lane = ends.push(0) - 1; ends[lane] = one.began + one.ms; one.lane = lane; }
    const tone = { complete: "blue", pruned: "orange", diverged: "best", error: "best", running: "green", stopped: "grey", waiting: "grey", set_aside: "grey" };
    const label = (one) => (one.kind === "trial" ? one.outcome : `${one.kind}, ${one.outcome}`);
    const kinds = [...new Set(all.map(label))];
    const traces = kinds.map((kind) => {
      const several = all.filter((one) => label(one) === kind), outcome = several[0].outcome;
      const color = colour({ trial: tone[outcome] ?? "grey", baseline: "purple", confirm: "green", soup: "orange" }[several[0].kind]);
      return { type: "bar", orientation: "h", name: spaced(kind), y: several.map((one) => one.lane + 1), base: several.map((one) => one.began), x: several.map((one) => one.ms), width: 0.8, text: several.map((one) => `${one.name}, ${kind}, ${short(one.ms / 1000)} s`), textposition: "none", hovertemplate: "%{text}<extra></extra>",
        marker: { color, line: { color: all.length > MANY ? color : colour("paper"), width: 1 }, pattern: { shape: PATTERNS[outcome] ?? "", fillmode: "overlay", fgcolor: colour("paper"), size: 6 } } };
    });
    return { traces, layout: layout({ height: 130 + 26 * Math.min(ends.length, 24) + (isNarrow(element) ? 20 * kinds.length : 0), barmode: "overlay", showlegend: true, xaxis: axis({ type: "date", tickangle: 0, nticks: isNarrow(element) ? 3 : undefined }), yaxis: axis({ title: "line", dtick: Math.ceil(ends.length / 12), autorange: "reversed", showgrid: false }) }) };
  };

  draw.optimism = (_, element) => {
    const report = doc.report, rows = [["as measured, used for selection", best.objective, null]];
    const values = doc.expected.find((each) => each.trials.includes(best.name));
    if (values) rows.push(["expected with a new seed", values.objective, values.ends]);
    for (const [found, name] of [[doc.confirm, `${doc.confirm?.seeds.length} fresh seeds`], [doc.test, "test sets"]]) {
      const won = found?.rows.find((row) => row.role === "winner");
      if (won) rows.push([won.name === best.name ? name : `${name}, ${won.name}`, won.objective.mean, won.objective.ends]); // else of an earlier best, or chosen by a confirm
    }
    const rival = doc.baselines.find((row) => row.name === report.evidence.nearest);
    if (rival) rows.push([`${spaced(rival.name)}, as measured`, rival.objective, null]);
    const shapes = ["x", "circle", "circle", "circle", "circle", "square"], tones = rows.map(([name]) => colour(name.startsWith("as measured") ? "best" : rival && name.startsWith(spaced(rival.name)) ? "ink" : "blue"));
    const traces = [{ y: rows.map((row) => (isNarrow(element) ? row[0].replace(", ", ",<br>") : row[0])), x: rows.map((row) => 100 * row[1]), mode: "markers+text", text: rows.map((row) => percent(row[1])), textposition: "top center", cliponaxis: false, hovertemplate: "%{y}: %{x:.1f} %<extra></extra>", marker: { size: 11, color: tones, symbol: rows.map((row, i) => (i === 0 ? "x" : rival && i === rows.length - 1 ? "square" : shapes[1])) },
      error_x: { type: "data", symmetric: false, thickness: 1.5, width: 4, color: colour("blue"), array: rows.map((row) => (row[2] ? 100 * (row[2][1] - row[1]) : 0)), arrayminus: rows.map((row) => (row[2] ? 100 * (row[1] - row[2][0]) : 0)) } }];
    return { traces, layout: layout({ height: 120 + 46 * rows.length, xaxis: axis({ title: "objective, %" }), yaxis: axis({ autorange: "reversed", range: [rows.length - 0.5, -0.7] }), margin: { l: 52, r: 24, t: 16, b: 44 } }) };
  };

  draw.expected = (_, element) => {
    const names = doc.expected.map((each) => (isNarrow(element) ? spaced(each.trials[0]).replace(", ", ",<br>") : spaced(each.trials[0])));
    const error = (each, i) => 100 * Math.abs(each.ends[i] - each.objective), isTrial = (each) => trials.some((row) => row.name === each.trials[0]);
    const traces = [
      { name: "expected with a new seed", y: names, x: doc.expected.map((each) => 100 * each.objective), text: doc.expected.map((each) => `alpha ${each.alpha.toFixed(2)}`), mode: "markers", hovertemplate: "%{y}, %{text}: expected %{x:.1f} %<extra></extra>", marker: { size: 11, symbol: doc.expected.map((each) => (isTrial(each) ? "diamond" : "square")), color: doc.expected.map((each) => colour(each.trials.includes(best.name) ? "best" : isTrial(each) ? "blue" : "ink")) },
        error_x: { type: "data", symmetric: false, thickness: 1.5, width: 4, color: colour("blue"), array: doc.expected.map((each) => error(each, 1)), arrayminus: doc.expected.map((each) => error(each, 0)) } },
      { name: "measured", y: doc.expected.flatMap((each, i) => each.measured.map(() => names[i])), x: doc.expected.flatMap((each) => each.measured.map((value) => 100 * value)), text: doc.expected.flatMap((each) => each.trials), mode: "markers", hovertemplate: "%{text}: measured %{x:.1f} %<extra></extra>", marker: { size: 8, symbol: "circle-open", color: colour("ink"), line: { width: 1.5 } } },
    ];
    return { traces, layout: layout({ height: 130 + 30 * names.length, showlegend: true, xaxis: axis({ title: "objective, %" }), yaxis: axis({ autorange: "reversed", range: [names.length - 0.5, -0.7] }), margin: { l: 52, r: 24, t: 16, b: 44 } }) };
  };

  draw.reliability = (rows, element) => {
    const roles = [...new Set(doc.reliability.map((one) => one.role))], beside = roles.length > 1 && !isNarrow(element);
    const found = layout({ height: beside || roles.length < 2 ? 380 : 700, showlegend: true, grid: { rows: beside ? 1 : roles.length, columns: beside ? roles.length : 1, pattern: "independent", xgap: 0.12, ygap: 0.22 } });
    const tones = { "zero-shot": ["ink", "star"], chosen: ["best", "circle"], "fine-tuned": ["blue", "square"] }, traces = [];
    roles.forEach((role, i) => {
      const key = i ? i + 1 : "";
      found[`xaxis${key}`] = axis({ title: `confidence, %: ${role} images`, range: [0, 103] });
      found[`yaxis${key}`] = axis({ title: i && beside ? "" : "accuracy, %", range: [-3, 103] });
      traces.push({ x: [0, 100], y: [0, 100], xaxis: `x${key}`, yaxis: `y${key}`, mode: "lines", showlegend: false, hoverinfo: "skip", line: { color: colour("muted"), dash: "dot", width: 1 } });
      for (const one of doc.reliability.filter((each) => each.role === role)) traces.push({ x: one.bins.map((bin) => 100 * bin.confidence), y: one.bins.map((bin) => 100 * bin.accuracy), xaxis: `x${key}`, yaxis: `y${key}`, mode: "lines+markers", name: `${one.model}, alpha ${one.alpha.toFixed(2)}`, showlegend: !i, legendgroup: one.model, text: one.bins.map((bin) => `${bin.num_images} images`), hovertemplate: "%{text}: accuracy %{y:.0f} % at confidence %{x:.0f} %<extra></extra>", line: { color: colour(tones[one.model][0]), width: 1 }, marker: { symbol: tones[one.model][1], opacity: 1, size: one.bins.map((bin) => 4 + 9 * Math.sqrt(bin.num_images / Math.max(...one.bins.map((each) => each.num_images)))) } });
    });
    return { traces, layout: found };
  };

  // one figure, all figures
  const PAPER = 680, PRINTED = 100; // pixels of its width; trials on it
  let closed = [];
  const CONFIG = { displayModeBar: false, responsive: true, scrollZoom: false };
  const render = (id, isFresh = false) => { // fresh: not with the width and the margins of before
    const element = $(id).querySelector(".canvas");
    const found = literal(draw[id](shown(), element));
    const nothing = !found ? "No trial passes the filters." : found.none;
    if (nothing) {
      if (window.Plotly && element.data) Plotly.purge(element);
      element.replaceChildren(make("p", { class: "empty" }, nothing));
      return;
    }
    element.querySelector(".empty")?.remove();
    const draws = isFresh ? Plotly.newPlot : Plotly.react;
    draws(element, found.traces, isPrinting ? { ...found.layout, width: Math.min(PAPER, width(element)) } : found.layout, CONFIG);
    element.dataset.points = found.traces.reduce((sum, trace) => sum + (trace.customdata?.length ?? 0), 0);
  };
  const FILTERED = new Set(["front", "alphas", "history", "slices", "contour", "parallel", "pruning", "timeline"]);
  const renderAll = (only = doc.figures, isFresh = false) => { for (const id of only) render(id, isFresh); };

  for (const button of document.querySelectorAll("[data-save]")) button.addEventListener("click", () => {
    const figure = button.closest("figure"), element = figure.querySelector(".canvas"), { width, height } = element.getBoundingClientRect();
    if (element.data) Plotly.downloadImage(element, { format: button.dataset.save, filename: `${doc.name}-${figure.id}`, width, height, scale: button.dataset.save === "png" ? 3 : 1 });
  });

  // alpha slider
  const moveAlpha = () => {
    const slider = $("alpha");
    if (!slider) return;
    slider.value = state.alpha;
    const curves = curvesOf(complete(shown()).length ? complete(shown()) : trials), own = curves.find((curve) => curve.name === best?.name) ?? curves[0];
    const measured = own && isMeasured(own, state.alpha);
    $("alpha-text").textContent = `${state.alpha.toFixed(2)}${own && !measured ? " (between measured points)" : ""}`;
    slider.setAttribute("aria-valuetext", `alpha ${state.alpha.toFixed(2)}`);
    const id = doc.figures.includes("front") ? "front" : "alphas", element = $(id).querySelector(".canvas");
    const index = (element.data ?? []).findIndex((trace) => trace.meta === "diamonds");
    if (index >= 0) {
      const fresh = draw[id](shown(), element).traces.at(-1);
      Plotly.restyle(element, { x: [fresh.x], y: [fresh.y], text: [literal(fresh.text)] }, [index]);
    }
    const names = doc.has_ood ? ["id_accuracy", "ood_accuracy", "objective"] : ["id_accuracy", "objective"];
    const titles = { id_accuracy: "ID, %", ood_accuracy: "OOD, %", objective: "objective, %" };
    $("alpha-table").tHead.replaceChildren(make("tr", {}, make("th", { scope: "col" }, "curve"), ...names.map((name) => make("th", { scope: "col", class: "num" }, titles[name]))));
    const first = [...curves].sort((a, b) => (b === own) - (a === own) || isBaseline.has(b.name) - isBaseline.has(a.name)).slice(0, 6);
    $("alpha-table").tBodies[0].replaceChildren(...first.map((curve) => make("tr", curve === own ? { class: "best" } : {}, make("th", { scope: "row" }, spaced(curve.name)),
      ...names.map((name) => make("td", { class: "num", "data-name": curve.name, "data-metric": name }, percent(at(curve, state.alpha, name)))))));
  };

  // table of trials
  const textOf = (column, trial) => (column.text ? column.text(trial) : String(column.of(trial) ?? ""));
  const COLUMNS = [ // without those that are empty
    { title: "trial", of: (trial) => trial.number, cell: (trial) => make("th", { scope: "row" }, make("a", { href: `${doc.base}/${encodeURIComponent(trial.name)}/` }, trial.name)), text: (trial) => trial.name },
    { title: "outcome", of: (trial) => trial.outcome },
    ...PARAMETERS.map((name) => ({ title: spaced(name), number: trials.every((trial) => typeof (trial.values[name] ?? 0) === "number"), of: (trial) => trial.values[name], text: (trial) => short(trial.values[name]) })),
    { title: "alpha", number: true, of: (trial) => trial.alpha, text: (trial) => trial.alpha?.toFixed(2) ?? "" },
    { title: "ID, %", number: true, of: (trial) => trial.id, text: (trial) => percent(trial.id) },
    ...(doc.has_ood ? [{ title: "OOD, %", number: true, of: (trial) => trial.ood, text: (trial) => percent(trial.ood) }] : []),
    { title: "objective, %", number: true, of: (trial) => trial.objective, text: (trial) => percent(trial.objective) },
    { title: "expected, %", number: true, of: (trial) => trial.expected, text: (trial) => percent(trial.expected) },
    ...(trials.some((trial) => trial.violation > 0) ? [{ title: "violation, points", number: true, of: (trial) => trial.violation, text: (trial) => percent(trial.violation, 2) }] : []),
    { title: "time, s", number: true, of: (trial) => trial.elapsed_s, text: (trial) => (trial.elapsed_s == null ? "" : trial.elapsed_s.toFixed(0)) },
    { title: "reason", of: (trial) => trial.reason ?? "" },
  ].filter((column) => trials.some((trial) => textOf(column, trial)));
  if (!COLUMNS[state.sort]) state.sort = null;
  const ordered = () => {
    const rows = shown();
    if (state.sort == null) return rows.sort((a, b) => (place.get(a.name) ?? 1e9) - (place.get(b.name) ?? 1e9) || a.number - b.number);
    const { of } = COLUMNS[state.sort], sign = state.down ? -1 : 1;
    return rows.sort((a, b) => {
      const [x, y] = [of(a), of(b)];
      if (x == null || y == null || x === "" || y === "") return (x == null || x === "") - (y == null || y === "");
      return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
    });
  };
  const fillTable = () => {
    const table = $("trial-table");
    if (!table) return;
    table.tHead.rows[0].replaceChildren(...COLUMNS.map((column, i) => {
      const button = make("button", { type: "button" }, column.title);
      button.addEventListener("click", () => { state.down = state.sort === i ? !state.down : Boolean(column.number); state.sort = i; remember(); fillTable(); table.tHead.rows[0].cells[i].firstChild.focus(); });
      return make("th", { scope: "col", ...(column.number ? { class: "num" } : {}), "aria-sort": state.sort === i ? (state.down ? "descending" : "ascending") : "none" }, button);
    }));
    const rows = ordered();
    $("not-printed").textContent = rows.length > PRINTED ? `The first ${PRINTED} of ${thousands(rows.length)} trials.` : "";
    table.tBodies[0].replaceChildren(...(isPrinting ? rows.slice(0, PRINTED) : rows).map((trial) => make("tr", trial.name === best?.name ? { class: "best" } : {}, ...COLUMNS.map((column) => column.cell?.(trial) ?? make("td", column.number ? { class: "num" } : column.title === "reason" ? { title: textOf(column, trial) } : {}, textOf(column, trial))))));
  };

  // tables are copied as they stand, filtered and sorted
  const NUMBER = /^[-+]?[\d.]+(e[-+]?\d+)?( \[[-+\d., ]+\])?$/;
  const literally = (text) => (/^'*[=+@-]/.test(text) && !NUMBER.test(text) ? `'${text}` : text); // a spreadsheet would take it for a formula
  const LATEX = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}" };
  const inLatex = (text) => text.replace(/[\\~^<>|&%$#_{}]/g, (one) => LATEX[one] ?? `\\${one}`).replace(/^(?=[[*])/, "{}");
  const copied = {
    csv: (rows) => rows.map((row) => row.map(literally).map((text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text)).join(",")).join("\n"),
    markdown: ([head, ...rows], isNumber) => [head, isNumber.map((is) => (is ? "---:" : "---")), ...rows].map((row) => `| ${row.map((text) => text.replace(/[\\`*_[\]<>|~&$]/g, "\\$&")).join(" | ")} |`).join("\n"),
    latex: (rows, isNumber) => [`\\begin{tabular}{${isNumber.map((is) => (is ? "r" : "l")).join("")}}`, ...rows.map((row) => `    ${row.map(inLatex).join(" & ")} \\\\`), "\\end{tabular}"].join("\n"),
  };
  for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", async () => {
    const table = $(button.dataset.table), isNumber = [...table.tHead.rows[0].cells].map((cell) => cell.classList.contains("num"));
    const rows = [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent.replace(/\s+/g, " ").trim()));
    const text = copied[button.dataset.copy](rows, isNumber), status = button.parentElement.querySelector("[role=status]");
    try { await navigator.clipboard.writeText(text); status.textContent = "Copied."; } catch {
      const area = make("textarea", {}, text); document.body.append(area); area.select(); document.execCommand("copy"); area.remove(); status.textContent = "Copied.";
    }
  });

  // the bar of filters
  const update = () => {
    remember();
    if ($("filters")) {
      $("top-text").textContent = `${state.top} %`;
      $("shown").textContent = `${thousands(shown().length)} of ${thousands(trials.length)} trials`;
    }
    renderAll(doc.figures.filter((id) => FILTERED.has(id)));
    moveAlpha();
    fillTable();
  };
  const setUpFilters = () => {
    const form = $("filters");
    if (!form) return;
    for (const outcome of outcomes) {
      const box = make("input", { type: "checkbox", value: outcome });
      box.checked = (state.outcomes ?? outcomes).includes(outcome);
      box.addEventListener("change", () => { state.outcomes = [...$("outcomes").querySelectorAll("input:checked")].map((each) => each.value); update(); });
      $("outcomes").append(make("label", {}, box, `${spaced(outcome)} ${thousands(trials.filter((trial) => trial.outcome === outcome).length)}`));
    }
    $("top").value = state.top;
    $("top").addEventListener("input", () => { state.top = Number($("top").value); update(); });
    $("feasible-label").hidden = !trials.some((trial) => trial.violation > 0);
    $("feasible").checked = state.feasible;
    $("feasible").addEventListener("change", () => { state.feasible = $("feasible").checked; update(); });
    for (const kind of ["method", "device"]) {
      const names = [...new Set(trials.map((trial) => trial[kind]))].filter(Boolean);
      $(`${kind}-label`).hidden = names.length < 2;
      $(kind).append(...names.map((name) => make("option", { value: name }, spaced(name))));
      $(kind).value = state[kind];
      $(kind).addEventListener("change", () => { state[kind] = $(kind).value; update(); });
    }
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => {
      Object.assign(state, { outcomes: null, top: 100, feasible: false, method: "", device: "" });
      for (const box of $("outcomes").querySelectorAll("input")) box.checked = true;
      update();
    }));
  };
  $("alpha")?.addEventListener("input", () => { state.alpha = Number($("alpha").value); remember(); moveAlpha(); });
  for (const button of document.querySelectorAll("[data-alpha]")) button.addEventListener("click", () => { state.alpha = button.dataset.alpha === "chosen" ? best?.alpha ?? 1 : Number(button.dataset.alpha); remember(); moveAlpha(); });

  // colours
  const THEMES = ["", "light", "dark"], root = document.documentElement;
  const nameTheme = () => { const name = root.dataset.theme || "system"; $("theme").textContent = `Colours: ${name}`; $("theme").setAttribute("aria-label", `Colours: ${name}. Change`); };
  $("theme").addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(root.dataset.theme ?? "") + 1) % 3];
    if (next) root.dataset.theme = next; else delete root.dataset.theme;
    try { if (next) localStorage.setItem("carft-theme", next); else localStorage.removeItem("carft-theme"); } catch { /* as above */ }
    nameTheme(); renderAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => renderAll());

  // paper: light, and as wide as it is
  let before;
  window.addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    document.body.style.width = `${PAPER}px`;
    isPrinting = true;
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
    renderAll(doc.figures, true);
    fillTable();
  });
  window.addEventListener("afterprint", () => {
    if (before) root.dataset.theme = before; else delete root.dataset.theme;
    document.body.style.width = "";
    isPrinting = false;
    for (const one of closed) one.open = false;
    renderAll(doc.figures, true);
    fillTable();
  });

  nameTheme();
  setUpFilters();
  renderAll();
  update();
  let columns = isNarrow(document.body);
  window.addEventListener("resize", () => { if (isNarrow(document.body) !== columns) { columns = !columns; renderAll(); } });
  document.body.dataset.ready = "true";
})();
