
// ---- The data: what pvm_jax/analysis/page.py wrote ------------------------------------------------------------------

const DATA = JSON.parse(byId("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const floats = (text) => new Float32Array(bytes(text).buffer);
/** Numbers in 16 bits, six of them the exponent's, as page.py's `_halves` writes them. */
const halves = (text) => Float32Array.from(new Uint16Array(bytes(text).buffer), (code) => code === 0xffff ? NaN :
  code === 0xfffe ? Infinity : code && 2 ** ((code >> 10) - 40) * (1 + (code & 1023) / 1024));
const color = (run) => `var(--run${run % 7})`;
const dot = (run) => el("span", { class: "dot", "--run": color(run) });
const clamp = (value, low, high) => Math.max(low, Math.min(value, high));

/** Three significant digits, without the long form of powers. */
function digits(value) {
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return Number(value.toPrecision(3)).toExponential();
  return String(Number(value.toPrecision(3)));
}

/** Base64 becomes arrays when a sample is opened, once; pictures of a run are images of the sample with its own grid. */
function unpack(run, images) {
  if (run.ready) return run;
  const lines = (list) => list.map((line) =>
    ({ ...line, values: line.halves === undefined ? floats(line.values) : halves(line.halves) }));
  const last = run.tokens.length - 1;
  run.pictures = run.pictures.map((picture) => ({ ...images[picture.image], ...picture }));
  run.places = Array.from({ length: Math.ceil(last / run.every) + 1 }, (_, i) => Math.min(i * run.every, last));
  run.before = floats(run.before);
  run.uniform = floats(run.uniform);
  run.mass = lines(run.mass);
  for (const name of ["tvr", "entropy", "ratio"]) run[name] = lines(run[name]);
  for (const map of run.maps) {
    Object.assign(map, { data: bytes(map.data), scale: floats(map.scale), sums: floats(map.sums) });
  }
  if (run.lens) {
    for (const name of ["probability", "rank", "kl"]) run.lens[name] = halves(run.lens[name]);
    const places = bytes(run.lens.token);
    const Places = places.length === 2 * run.lens.rank.length ? Uint16Array : Uint32Array;
    Object.assign(run.lens, { token: new Places(places.buffer), settled: floats(run.lens.settled) });
  }
  run.paints = {};
  if (run.mass.length) run.paints.mass = run.mass[0].values;
  if (run.ratio.length) run.paints.ratio = mean(run.ratio.map((line) => line.values));
  if (run.uniform.some((most) => most > 0)) {
    const found = mean(run.entropy.map((line) => line.values));
    run.paints.focus = found.map((value, j) => run.uniform[j] > 0 ? clamp(1 - value / run.uniform[j], 0, 1) : NaN);
  }
  run.ready = true;
  return run;
}

const mean = (arrays) => arrays[0].map((_, j) => arrays.reduce((sum, array) => sum + array[j], 0) / arrays.length);

const PAINTS = {
  mass: "attention on the image, Ω_V",
  ratio: "PVM's contribution, relative to the FFN's",
  focus: "PVM's focus, 1 − entropy / uniform",
};
const state = { sample: 0, at: 0, held: false, sources: [], paint: "mass", scale: "token", overlay: true, marks: [] };

// ---- Maps -----------------------------------------------------------------------------------------------------------

// Colours of a map by value, with opacity: what is not looked at is darkened, what is looked at glows.
const RAMP = [[0, 8, 6, 34, 0.62], [0.15, 60, 12, 90, 0.56], [0.4, 180, 40, 90, 0.52], [0.7, 245, 120, 30, 0.55],
  [1, 255, 226, 90, 0.58]];

function heat(value) {
  const high = Math.max(1, RAMP.findIndex(([at]) => at >= value));
  const [a, b] = [RAMP[high - 1], RAMP[high]];
  const share = clamp((value - a[0]) / (b[0] - a[0]), 0, 1);
  const mixed = a.map((x, i) => x + share * (b[i] - x));
  return `rgba(${mixed.slice(1, 4).map(Math.round).join(",")},${mixed[4].toFixed(3)})`;
}

/** The value at visual token m in a row of a map, which is stored as 255ths of the row's maximum. */
const cellValue = (run, map, row, m) => map.data[row * run.visual + m] / 255 * map.scale[row];

/** Row and column of a visual token in its picture, from 0. */
function placeOf(picture, m) {
  const at = m - picture.start;
  return [Math.floor(at / picture.columns), at % picture.columns];
}

const placeWords = (picture, m) => {
  const [row, column] = placeOf(picture, m);
  return `row ${row + 1}, column ${column + 1}`;
};

/** What the brightest colour stands for. */
function brightest(map, row) {
  if (state.scale === "token") return map.scale[row];
  return (map.largest ??= map.scale.reduce((a, b) => Math.max(a, b), 0));
}

/** One run's side of the explorer; its methods redraw what depends on the token. */
class Panel {
  constructor(index, run, alone) {
    Object.assign(this, { index, run, cell: -1 });
    const name = DATA.names[index];
    this.node = el("section", { class: `card run${alone && run.pictures.length ? " alone" : ""}`,
      "--run": color(index), "aria-label": name });
    const head = el("div", { class: "head" }, el("strong", {}, dot(index), name));
    this.node.append(head);
    this.numbers = el("dl", { class: "numbers" });
    if (run.pictures.length) this.node.append(this.views(head));
    this.node.append(this.words());
  }

  views(head) {
    const { run } = this;
    this.pictures = run.pictures.map((picture) => this.view(picture));
    const pictures = el("div", { class: "pictures" }, this.pictures.map((view) => view.figure));
    if (!run.maps.length) return el("div", { class: "views" }, pictures, el("div", { class: "side" }, this.numbers));
    this.source = el("select", { class: "source", onchange: () => { this.choose(this.source.value); } });
    head.append(el("label", {}, "Map ", this.source));
    fill(this.source, run.maps.map((map) => [map.key, map.label]), run.maps[0]?.key);
    this.low = el("span", {}, "0");
    this.high = el("span", { class: "high" });
    const ramp = el("span", { class: "ramp", role: "img", "aria-label": "colours of the map, from 0 to the maximum" });
    const stops = RAMP.map(([at, r, g, b]) => `rgb(${r},${g},${b}) ${100 * at}%`);
    ramp.style.background = `linear-gradient(90deg, ${stops.join(",")})`;
    this.readout = el("p", { class: "cell", "aria-live": "polite" });
    this.whose = el("p", { class: "soft whose" });
    const wanted = state.sources[this.index] ?? run.maps[0]?.key;
    this.map = run.maps.find((map) => map.key === wanted) ?? run.maps[0];
    this.source.value = this.map.key;
    const key = el("div", { class: "key" }, this.low, ramp, this.high);
    return el("div", { class: "views" }, pictures, el("div", { class: "side" }, key, this.whose, this.readout, this.numbers));
  }

  view(picture) {
    const canvas = el("canvas", { tabindex: "0", role: "img", "aria-label": picture.label });
    const unit = clamp(Math.floor(900 / Math.max(picture.rows, picture.columns)), 6, 40);
    Object.assign(canvas, { width: unit * picture.columns, height: unit * picture.rows });
    const { length } = this.run.pictures;
    const side = length === 1 ? (DATA.names.length > 1 ? 330 : 440) : length < 5 ? 220 : 150;
    const wide = side * clamp(Math.sqrt(picture.width / picture.height), 0.6, 1.2);
    const caption = el("figcaption");
    const box = el("div", { class: `picture${picture.width < 300 ? " small" : ""}` });
    box.style.aspectRatio = `${picture.width} / ${picture.height}`;
    box.append(el("img", { src: picture.url, alt: picture.label }), canvas);
    const figure = el("figure", { "--wide": `${Math.round(wide)}px` }, box, caption);
    const view = { picture, canvas, unit, caption, figure };
    canvas.addEventListener("pointermove", (event) => {
      const area = canvas.getBoundingClientRect();
      const place = (at, size, count) => clamp(Math.floor(at / size * count), 0, count - 1);
      this.point(view, place(event.clientY - area.top, area.height, picture.rows),
        place(event.clientX - area.left, area.width, picture.columns));
    });
    canvas.addEventListener("focus", () => { if (!this.inside(view)) this.point(view, 0, 0); });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      const at = this.inside(view) ? this.cell - picture.start : 0;
      this.point(view, clamp(Math.floor(at / picture.columns) + step[0], 0, picture.rows - 1),
        clamp(at % picture.columns + step[1], 0, picture.columns - 1));
    });
    return view;
  }

  inside({ picture }) {
    return this.cell >= picture.start && this.cell < picture.start + picture.rows * picture.columns;
  }

  point({ picture }, row, column) {
    this.cell = picture.start + row * picture.columns + column;
    this.drawMap();
  }

  choose(key) {
    this.map = this.run.maps.find((map) => map.key === key);
    this.source.value = key;
    state.sources[this.index] = key;
    this.drawMap();
  }

  words() {
    const { run } = this;
    this.tokens = run.tokens.map((piece, j) => {
      const shown = piece === "" ? [el("i", {}, "◌")] : piece.split("\n").flatMap((part, i) =>
        i ? [el("i", {}, "⏎"), "\n", part] : [part]);
      return el("span", { class: "token", role: "option", id: `token${this.index}-${j}`, "data-token": j }, shown);
    });
    this.text = el("div", { class: "text prose", tabindex: "0", role: "listbox", dir: "auto",
      "aria-label": `Answer of ${DATA.names[this.index]}, token by token` });
    this.tokens.forEach((token, j) => this.text.append(...(run.gaps.includes(j) ? [el("i", {}, " ⋯ ")] : []), token));
    const at = (event) => event.target.closest?.(".token")?.dataset.token;
    this.text.addEventListener("pointermove", (event) => {
      if (!state.held && at(event) !== undefined) move(Number(at(event)));
    });
    this.text.addEventListener("click", (event) => { if (at(event) !== undefined) hold(Number(at(event))); });
    this.paintKey = el("p", { class: "paint" });
    return el("div", {}, this.text, this.paintKey, run.pictures.length ? null : this.numbers);
  }

  /** The colour of the text; runs that have the measure share one scale, so that they compare. */
  paint(largest) {
    const values = this.run.paints[state.paint];
    this.tokens.forEach((token, j) => {
      const share = largest > 0 && Number.isFinite(values?.[j]) ? clamp(values[j] / largest, 0, 1) : 0;
      token.style.setProperty("--much", `${Math.round(45 * share)}%`);
    });
    this.paintKey.replaceChildren(...(values ? [`${PAINTS[state.paint]}: 0`, el("span", { class: "bar" }),
      `${digits(largest)} and above`] : state.paint === "none" ? [] : ["not measured for this model"]));
  }

  drawToken() {
    const { run } = this;
    this.t = clamp(state.at, 0, run.tokens.length - 1);
    this.row = nearest(run.places, this.t, (place) => place);
    this.text.querySelector(".now")?.classList.remove("now");
    this.text.querySelector("[aria-selected=true]")?.removeAttribute("aria-selected");
    const token = this.tokens[this.t];
    token.classList.add("now");
    token.setAttribute("aria-selected", "true");
    this.text.setAttribute("aria-activedescendant", token.id);
    const [top, bottom] = [token.offsetTop - 30, token.offsetTop + token.offsetHeight + 30];
    if (state.scroll) {
      if (top < this.text.scrollTop) this.text.scrollTop = top;
      else if (bottom > this.text.scrollTop + this.text.clientHeight) this.text.scrollTop = bottom - this.text.clientHeight;
    }
    const facts = [["token", JSON.stringify(visible(run.tokens[this.t]))]];
    if (run.mass.length) facts.push(["Ω_V", digits(run.paints.mass[this.t])]);
    if (run.ratio.length) facts.push(["PVM / FFN", digits(run.paints.ratio[this.t])]);
    if (run.paints.focus) facts.push(["PVM's focus", digits(run.paints.focus[this.t])]);
    if (run.lens) facts.push(["settles in layer", String(run.lens.settled[this.t])]);
    this.numbers.replaceChildren(...facts.map(([key, value]) => el("div", {}, el("dt", {}, key), el("dd", {}, value))));
    this.drawMap();
  }

  drawMap() {
    if (!this.map) return;
    const { run, map, row } = this;
    const most = brightest(map, row);
    this.whose.textContent = run.places[row] === this.t ? "" : `The map is that of token ${run.places[row] + 1}.`;
    for (const view of this.pictures) this.drawView(view, most);
    this.high.textContent = `${digits(most)} ${map.unit}`;
    const view = this.pictures.find((one) => this.inside(one));
    this.readout.textContent = view ? this.describe(view) : "Point at the image for the number of a cell.";
  }

  drawView({ picture, canvas, unit, caption }, most) {
    const { run, map, row: mapped } = this;
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, canvas.width, canvas.height);
    let best = picture.start;
    for (let m = picture.start; m < picture.start + picture.rows * picture.columns; m++) {
      const value = cellValue(run, map, mapped, m);
      if (value > cellValue(run, map, mapped, best)) best = m;
      if (!state.overlay) continue;
      const [row, column] = placeOf(picture, m);
      pen.fillStyle = heat(most > 0 ? clamp(value / most, 0, 1) : 0);
      pen.fillRect(column * unit, row * unit, unit, unit);
    }
    const ring = (m, style, wide) => {
      const [row, column] = placeOf(picture, m);
      pen.strokeStyle = style;
      pen.lineWidth = wide;
      pen.strokeRect(column * unit + wide / 2, row * unit + wide / 2, unit - wide, unit - wide);
    };
    const first = map.scale[mapped] > 0 && cellValue(run, map, mapped, best) === map.scale[mapped];
    if (state.overlay && first) ring(best, "#ffffff", 2.5);
    if (this.inside({ picture })) {
      ring(this.cell, "#000000", 3);
      ring(this.cell, "#4db3ec", 2);
    }
    const sum = digits(map.sums[mapped * run.pictures.length + run.pictures.indexOf(picture)]);
    caption.textContent = `${picture.label} · ${sum} ${map.unit}`;
    canvas.setAttribute("aria-label", `${picture.label}, ${map.label}, token ${run.places[mapped] + 1}: ${sum} in all, most in ` +
      placeWords(picture, best));
  }

  describe({ picture }) {
    const value = digits(cellValue(this.run, this.map, this.row, this.cell));
    return `${picture.label}, ${placeWords(picture, this.cell)}: ${value} ${this.map.unit}`;
  }
}

// ---- What moves -----------------------------------------------------------------------------------------------------

let panels = [];
let longest = 1;

function move(at, scroll = false) {
  state.at = clamp(at, 0, longest - 1);
  state.scroll = scroll;
  for (const panel of panels) panel.drawToken();
  for (const mark of state.marks) mark(state.at);
  byId("position").textContent = `token ${state.at + 1} of ${longest}${state.held ? ", held" : ""}`;
}

function hold(at) {
  state.held = !(state.held && at === state.at);
  byId("runs").classList.toggle("held", state.held);
  move(at);
}

function paint() {
  const found = panels.map((panel) => panel.run.paints[state.paint]).filter(Boolean);
  const sorted = found.flatMap((values) => [...values]).filter(Number.isFinite).sort((a, b) => a - b);
  const largest = sorted[Math.floor(0.98 * (sorted.length - 1))] || sorted.at(-1) || 0;
  for (const panel of panels) panel.paint(largest);
}

function open(index) {
  state.sample = index;
  state.held = false;
  byId("runs").classList.remove("held");
  const sample = DATA.samples[index];
  const runs = sample.runs.map((run) => unpack(run, sample.images));
  longest = Math.max(1, ...runs.map((run) => run.tokens.length));
  byId("question").textContent = sample.questions.map(({ runs: names, text }) =>
    visible(names ? `${names}: ${text}` : text)).join("\n\n");
  panels = runs.map((run, i) => new Panel(i, run, runs.length === 1));
  byId("runs").replaceChildren(...panels.map((panel) => panel.node));
  const paints = Object.entries(PAINTS).filter(([key]) => runs.some((run) => run.paints[key]));
  if (!paints.some(([key]) => key === state.paint)) state.paint = paints[0]?.[0] ?? "none";
  fill(byId("paint"), [...paints, ["none", "none"]], state.paint);
  byId("sample").value = index;
  for (const id of ["scale", "overlay"]) byId(id).closest("label").hidden = !runs.some((run) => run.maps.length);
  byId("notes").replaceChildren(...sample.notes.map((note) => el("p", { class: "note" }, note)));
  paint();
  drawCharts(runs);
  move(Math.min(state.at, longest - 1));
}

function listen() {
  byId("sample").addEventListener("change", (event) => open(Number(event.target.value)));
  byId("paint").addEventListener("change", (event) => { state.paint = event.target.value; paint(); });
  byId("scale").addEventListener("change", (event) => { state.scale = event.target.value; move(state.at); });
  byId("overlay").addEventListener("change", (event) => { state.overlay = event.target.checked; move(state.at); });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, summary")) return;
    // Up and down scroll the page unless the text has the focus.
    const inText = { ArrowUp: -10, ArrowDown: 10, Home: -longest, End: longest };
    const step = { ArrowLeft: -1, ArrowRight: 1, ...(event.target.matches(".text") && inText) }[event.key];
    const other = { "[": -1, "]": 1 }[event.key];
    if (step) move(state.at + step, true);
    else if (other) open((state.sample + other + DATA.samples.length) % DATA.samples.length);
    else if (event.key === "Enter") hold(state.at);
    else if (event.key === "h") byId("overlay").click();
    else if (event.key === "m") panels.forEach(nextMap);
    else return;
    event.preventDefault();
  });
}

function nextMap(panel) {
  if (!panel.map) return;
  const at = panel.run.maps.indexOf(panel.map);
  panel.choose(panel.run.maps[(at + 1) % panel.run.maps.length].key);
}

function drawTop() {
  byId("about").textContent = visible(DATA.about);
  if (DATA.names.length > 1) byId("legend").append(...DATA.names.map((name, i) => el("span", {}, dot(i), name)));
  byId("summary").append(el("thead", {}, el("tr", {}, DATA.header.map((cell) => el("th", { scope: "col" }, cell)))),
    el("tbody", {}, DATA.rows.map((row) => el("tr", {}, row.map((cell, i) =>
      el("td", {}, i ? null : dot(DATA.names.indexOf(cell)), cell))))));
  byId("measured").textContent = visible(JSON.stringify(DATA.measured, null, 1));
  fill(byId("sample"), DATA.samples.map((sample, i) => [i, sample.name]), 0);
  byId("sample-label").hidden = DATA.samples.length < 2;
  fill(byId("scale"), [["token", "each token's maximum"], ["all", "one for all tokens"]], "token");
}
