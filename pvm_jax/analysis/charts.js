
// ---- Curves ---------------------------------------------------------------------------------------------------------

const [WIDE, HIGH, LEFT, RIGHT, TOP, BOTTOM] = [560, 240, 52, 14, 12, 34];
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];

function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("--")) node.style.setProperty(key, value);
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

/** Where numbers of [low, high] stand between `from` and `to`, and which of them get a label. */
function axis(low, high, log, from, to) {
  const map = log ? Math.log10 : (value) => value;
  if (!(map(high) > map(low))) [low, high] = log ? [low / 2, low * 2] : [low - 0.5, low + 0.5];
  const [a, b] = [map(low), map(high)];
  const steps = log ? powers(low, high) : [];
  return { ticks: steps.length > 1 ? steps : evenly(low, high),
    place: (value) => from + (map(value) - a) / (b - a) * (to - from) };
}

/** 1, 2, 5, 10, ... of [low, high], or 1, 10, 100, ... where these are many; none or one where it is narrow. */
function powers(low, high) {
  const parts = high / low < 150 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    found.push(...parts.map((part) => part * 10 ** power));
  }
  return found.filter((value) => value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9));
}

/** About five round numbers of [low, high], equally far apart. */
function evenly(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((part) => part * power).find((size) => size >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(value);
  return found;
}

/** Lowest and highest of the values that can be drawn. */
function extent(arrays, log) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of arrays.flatMap((values) => [...values])) {
    if (!Number.isFinite(value) || (log && value <= 0)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return low <= high ? [low, high] : null;
}

/**
 * A card with curves over the tokens, whose `mark` shows a token in it.
 * spec: title, words (what the axes are), log: [x, y], zero: the y axis begins at 0,
 *   lines: [{run, label, x, values, dash}], fits: [{run, exponent, scale, first, last}],
 *   levels: [{x, values, label}] to compare with, of which the first is named,
 *   why: sentences below.
 */
function chart(spec) {
  const card = el("section", { class: "card chart", "aria-label": spec.title });
  const now = el("div", { class: "now" });
  card.append(el("h3", {}, spec.title), now);
  const width = around(spec.lines);
  const thick = spec.fits?.length ? "Dashed: the power law." : width > 1 ? `Thick: mean of ${width} tokens.` : "";
  const below = [...spec.why, thick].filter(Boolean).map((sentence) => el("p", { class: "why" }, sentence));
  const levels = spec.levels ?? [];
  const ys = extent([...spec.lines, ...levels].map((line) => line.values), spec.log[1]);
  if (!ys) {
    card.append(el("p", { class: "soft" }, "There is nothing that could be drawn."), ...below);
    return { card, mark() {} };
  }
  const xs = extent(spec.lines.map((line) => line.x), spec.log[0]);
  const x = axis(...xs, spec.log[0], LEFT, WIDE - RIGHT);
  const y = axis(spec.zero ? Math.min(0, ys[0]) : ys[0], ys[1], spec.log[1], HIGH - BOTTOM, TOP);
  const drawing = svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": `${spec.title}: ${spec.words}` });
  drawing.append(grid(x, y, spec.words));
  const faint = spec.fits?.length || around(spec.lines) > 1;
  for (const line of spec.lines) {
    drawing.append(svg("path", { class: "series", "--run": color(line.run), "stroke-dasharray": faint ? "" : line.dash,
      opacity: faint ? 0.4 : 1, d: path(line, x, y, spec.log) }));
  }
  drawing.append(...(spec.fits?.length ? fitted(spec.fits, x, y) : smoothed(spec.lines, x, y, spec.log)));
  levels.forEach((level, i) => {
    drawing.append(svg("path", { class: "level", d: path(level, x, y, spec.log) }));
    if (!i) drawing.append(svg("text", { x: LEFT + 6, y: y.place(Math.max(...level.values)) + 14 }, level.label));
  });
  const marker = svg("line", { class: "marker", y1: TOP, y2: HIGH - BOTTOM });
  const knobs = spec.lines.map((line) => svg("circle", { class: "knob", r: 4.5, "--run": color(line.run) }));
  drawing.append(marker, ...knobs);
  const widest = spec.lines.reduce((most, line) => line.x.length > most.x.length ? line : most);
  follow(drawing, (event, area) => nearest(widest.x, (event.clientX - area.left) / area.width * WIDE, x.place));
  card.append(drawing, ...below);
  return { card, mark: (t) => markChart(spec, t, { x, y, marker, knobs, now, widest }) };
}

function fitted(fits, x, y) {
  return fits.flatMap((fit) => {
    const end = (t) => `${x.place(t).toFixed(1)},${clamp(y.place(fit.scale * t ** fit.exponent), TOP, HIGH - BOTTOM).toFixed(1)}`;
    const d = `M${end(fit.first)}L${end(fit.last)}`;
    return [svg("path", { class: "halo", d }), svg("path", { class: "fit", "--run": color(fit.run), d })];
  });
}

/** How many tokens a thick line is the mean of: 1 for short answers, whose lines are drawn as they are. */
const around = (found) => {
  const longest = Math.max(...found.map((line) => line.values.length));
  return longest < 120 ? 1 : 2 * Math.round(longest / 60) + 1;
};

/** Each line's running mean, of its logarithm where the axis has it. */
function smoothed(found, x, y, log) {
  const width = around(found);
  if (width === 1) return [];
  const [to, from] = log[1] ? [Math.log, Math.exp] : [(value) => value, (value) => value];
  return found.flatMap((line) => {
    const values = line.values.map((_, j) => {
      const near = line.values.slice(Math.max(0, j - (width >> 1)), j + (width >> 1) + 1).map(to).filter(Number.isFinite);
      return near.length ? from(near.reduce((sum, value) => sum + value, 0) / near.length) : NaN;
    });
    const d = path({ ...line, values }, x, y, log);
    return [svg("path", { class: "halo", d }),
      svg("path", { class: "thick", "--run": color(line.run), "stroke-dasharray": line.dash, d })];
  });
}

function markChart(spec, t, { x, y, marker, knobs, now, widest }) {
  spec.lines.forEach((line, i) => {
    const at = Math.min(t, line.values.length - 1);
    const [left, value] = [x.place(line.x[at]), line.values[at]];
    if (line === widest) for (const end of ["x1", "x2"]) marker.setAttribute(end, left);
    const drawn = Number.isFinite(value) && (!spec.log[1] || value > 0);
    knobs[i].setAttribute("visibility", drawn ? "visible" : "hidden");
    knobs[i].setAttribute("cx", left);
    knobs[i].setAttribute("cy", drawn ? y.place(value) : 0);
  });
  now.replaceChildren(...spec.lines.map((line) => el("span", {}, dot(line.run), line.label ? `${line.label}: ` : "",
    el("b", {}, digits(line.values[Math.min(t, line.values.length - 1)])))));
}

function grid(x, y, words) {
  const group = svg("g", { class: "grid" });
  for (const tick of x.ticks) {
    const at = x.place(tick);
    group.append(svg("line", { x1: at, x2: at, y1: TOP, y2: HIGH - BOTTOM }),
      svg("text", { x: at, y: HIGH - BOTTOM + 15, "text-anchor": "middle" }, digits(tick)));
  }
  for (const tick of y.ticks) {
    const at = y.place(tick);
    group.append(svg("line", { x1: LEFT, x2: WIDE - RIGHT, y1: at, y2: at }),
      svg("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, digits(tick)));
  }
  group.append(svg("text", { x: (LEFT + WIDE - RIGHT) / 2, y: HIGH - 3, "text-anchor": "middle" }, words));
  return group;
}

function path(line, x, y, log) {
  let [d, on] = ["", false];
  for (let j = 0; j < line.values.length; j++) {
    const drawn = Number.isFinite(line.values[j]) && (!log[1] || line.values[j] > 0) && (!log[0] || line.x[j] > 0);
    if (drawn) d += `${on ? "L" : "M"}${x.place(line.x[j]).toFixed(1)},${y.place(line.values[j]).toFixed(1)}`;
    on = drawn;
  }
  return d;
}

function nearest(places, at, place) {
  let best = 0;
  for (let j = 1; j < places.length; j++) {
    if (Math.abs(place(places[j]) - at) < Math.abs(place(places[best]) - at)) best = j;
  }
  return best;
}

/** The token under the pointer becomes the current one; a click holds it. */
function follow(node, find) {
  const token = (event) => find(event, node.getBoundingClientRect());
  node.addEventListener("pointermove", (event) => { if (!state.held) move(token(event), true); });
  node.addEventListener("click", (event) => hold(token(event)));
}

// ---- The logit lens -------------------------------------------------------------------------------------------------

const LENSES = {
  probability: ["probability of the model's final token", (value) => value],
  rank: ["rank of the final token (bright: first)", (value) => 1 - Math.log10(value) / 4],
  kl: ["KL from the final distribution (bright: 0)", (value) => Math.exp(-value / 2)],
};

/** Layers x tokens, the first layer at the bottom, and a line where each token's prediction settles. */
function lensCard(run, index) {
  const name = DATA.names[index];
  const { layers } = run.lens;
  const count = run.tokens.length;
  const card = el("section", { class: "card chart", "aria-label": `logit lens of ${name}` });
  const canvas = el("canvas", { role: "img" });
  Object.assign(canvas, { width: count, height: layers });
  const steps = Array.from(run.lens.settled, (layer, j) =>
    `${j ? "L" : "M"}${j},${layers - layer}L${j + 1},${layers - layer}`).join("");
  const cursor = [svg("path", { class: "under" }), svg("path", { class: "settled" })];
  const over = svg("svg", { viewBox: `0 0 ${count} ${layers}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("path", { class: "under", d: steps }), svg("path", { class: "settled", d: steps }), ...cursor);
  const box = el("div", { class: "lens" }, canvas, over);
  for (const layer of new Set([0, layers - 1])) {
    const label = el("small", {}, String(layer));
    label.style.top = `calc(${(layers - layer - 0.5) / layers * 100}% - 9px)`;
    box.append(label);
  }
  const table = el("table", { class: "layers" });
  const title = el("h3");
  card.append(title, box, el("p", { class: "why" }, "Tokens from left to right, layers from below; the white line is where " +
    "the most probable token becomes the final one for good."),
    el("div", { class: "scroll tall", tabindex: "0", "aria-label": "What each layer would predict" }, table));
  follow(canvas, (event, area) => clamp(Math.floor((event.clientX - area.left) / area.width * count), 0, count - 1));
  function draw() {
    const kind = byId("lens").value;
    title.replaceChildren(dot(index), `${name}, logit lens: ${LENSES[kind][0]}`);
    canvas.setAttribute("aria-label", `logit lens of ${name}: ${LENSES[kind][0]}, ${layers} layers, ${count} tokens`);
    drawLens(canvas, run, layers, count, kind);
  }
  const mark = (t) => {
    const at = Math.min(t, count - 1);
    for (const part of cursor) part.setAttribute("d", `M${at + 0.5},0V${layers}`);
    table.replaceChildren(el("thead", {}, el("tr", {}, ["layer", "most probable", "final: p", "rank", "KL"].map((cell) =>
      el("th", { scope: "col" }, cell)))), el("tbody", {}, Array.from({ length: layers }, (_, i) => layerRow(run, layers - 1 - i, at))));
  };
  draw();
  return { card, mark, draw };
}

function drawLens(canvas, run, layers, count, kind) {
  const pen = canvas.getContext("2d");
  const values = run.lens[kind];
  for (let layer = 0; layer < layers; layer++) {
    for (let j = 0; j < count; j++) {
      const [r, g, b] = solid(LENSES[kind][1](values[layer * count + j]));
      pen.fillStyle = `rgb(${r},${g},${b})`;
      pen.fillRect(j, layers - 1 - layer, 1, 1);
    }
  }
}

/** The colours of maps without their opacity. */
function solid(value) {
  const share = clamp(Number.isFinite(value) ? value : 0, 0, 1);
  const high = Math.max(1, RAMP.findIndex(([at]) => at >= share));
  const [a, b] = [RAMP[high - 1], RAMP[high]];
  return a.slice(1, 4).map((x, i) => Math.round(x + (share - a[0]) / (b[0] - a[0]) * (b[i + 1] - x)));
}

function layerRow(run, layer, t) {
  const at = layer * run.tokens.length + t;
  const settled = layer >= run.lens.settled[t];
  return el("tr", { class: settled ? "done" : "" }, el("td", {}, String(layer)),
    el("td", {}, JSON.stringify(visible(run.lens.words[run.lens.token[at]] ?? ""))),
    el("td", {}, digits(run.lens.probability[at])), el("td", {}, digits(run.lens.rank[at])),
    el("td", {}, digits(run.lens.kl[at])));
}

// ---- All of them ----------------------------------------------------------------------------------------------------

const positions = (run) => Float32Array.from(run.tokens, (_, j) => j + 1);
const several = () => DATA.names.length > 1;
const who = (index, label) => [several() ? DATA.names[index] : "", label].filter(Boolean).join(", ");

/** Lines of one measure of all runs; `pick` gives [{label, values}] of a run. */
function lines(runs, pick, x = positions) {
  return runs.flatMap((run, index) => pick(run).map((line, i) => ({ run: index, label: who(index, line.label),
    x: x(run), values: line.values, dash: DASHES[i % DASHES.length] })));
}

/** Of a run the line that was chosen, all layers' or one layer's; none where the model has no such layer. */
const only = (name, chosen) => (run) => run[name].slice(chosen, chosen + 1).map(({ values }) => ({ label: "", values }));

function massChart(runs, chosen) {
  const shown = runs.map((run) => run.mass[chosen]);
  const fits = shown.flatMap((line, run) => line?.fit ? [{ run, ...line.fit }] : []);
  const why = shown.map((line, run) => who(run, !line ? "has no such layer" : line.fit
    ? `Ω_V ∝ t^${line.fit.exponent.toFixed(2)} (95 %: ${line.fit.low.toFixed(2)} to ${line.fit.high.toFixed(2)})`
    : `no fit: ${runs[run].noFit ?? "this layer's attention on the image cannot be fitted"}`));
  const log = [true, true];
  return chart({ title: `Ω_V(t): attention on the image, ${shown.find(Boolean).label}`, log, fits, why,
    words: "text tokens before it, t", lines: lines(runs, only("mass", chosen), (run) => run.before) });
}

function tvrChart(runs, chosen) {
  const { label } = runs.map((run) => run.tvr[chosen]).find(Boolean);
  return chart({ title: `TVR(t): attention on text over attention on the image, ${label}`,
    words: "text tokens before it, t", log: [true, true], why: [],
    lines: lines(runs, only("tvr", chosen), (run) => run.before) });
}

/** Curves of a retrieval that prefers nothing, those that differ: images have sizes, and a causal memory grows. */
function uniforms(runs) {
  const found = new Map(runs.filter((run) => run.paints.focus).map((run) => [run.uniform.join(), run]));
  return Array.from(found.values(), (run) =>
    ({ x: positions(run), values: run.uniform, label: "uniform over all it may retrieve from" }));
}

function drawCharts(runs) {
  const made = [];
  const looks = runs.some((run) => run.mass.length);
  const layers = runs.reduce((most, run) => run.mass.length > most.length ? run.mass : most, []);
  const chosen = Math.min(Number(byId("layer").value) || 0, Math.max(0, layers.length - 1));
  fill(byId("layer"), layers.map((line, i) => [i, line.label]), chosen);
  byId("layer-label").hidden = !looks;
  if (looks) made.push(massChart(runs, chosen), tvrChart(runs, chosen));
  if (runs.some((run) => run.ratio.length)) {
    const levels = uniforms(runs);
    if (levels.length) {
      made.push(chart({ title: "Entropy of PVM's retrieval, in nats, mean over heads", words: "token of the answer",
        log: [false, false], zero: true, why: [], levels, lines: lines(runs, (run) => run.entropy) }));
    }
    made.push(chart({ title: "PVM's contribution: |gate · branch| / |FFN's output|", words: "token of the answer",
      log: [false, false], zero: true, why: [], lines: lines(runs, (run) => run.ratio) }));
  }
  const lenses = runs.flatMap((run, index) => run.lens ? [lensCard(run, index)] : []);
  byId("lens-label").hidden = !lenses.length;
  byId("lens").onchange = () => lenses.forEach((lens) => lens.draw());
  byId("layer").onchange = () => { drawCharts(runs); move(state.at); };
  byId("charts").replaceChildren(...[...made, ...lenses].map((one) => one.card));
  state.marks = [...made, ...lenses].map((one) => one.mark);
}

fill(byId("lens"), Object.entries(LENSES).map(([key, [label]]) => [key, label]), "probability");
drawTop();
listen();
open(0);
