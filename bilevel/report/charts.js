// The upper half of page.html: facts, curves, histogram, table of sources.
// Everything that comes from a run enters the document as text nodes or attribute values, never as markup.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const whole = (n) => n.toLocaleString("en");
const many = (n, what) => `${whole(n)} ${what}${n === 1 ? "" : "s"}`;
function number(v) {
  if (v === null) return "–";
  if (v !== 0 && (Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6)) return v.toExponential(1);
  return Math.abs(v) >= 1000 ? whole(Math.round(v)) : String(Number(v.toPrecision(3)));
}
// A number beside others that differ from it by `step` or more: with the decimals that tell them apart.
const exact = (v, step) => (step >= 1 || !step ? number(v) : v.toFixed(Math.min(12, Math.ceil(-Math.log10(step) - 1e-9))));
// The same without zeros at the end, and never as one of the bounds if it is not that bound itself.
function plainly(v, step, bounds) {
  if (v === null) return number(v);
  let text = step >= 1 || !step ? number(v) : String(Number(exact(v, step)));
  for (let digits = 1; digits <= 12 && bounds.includes(Number(text)) && !bounds.includes(v); digits++)
    text = String(Number(v.toFixed(digits)));
  return text;
}
const percent = (p) => `${Number((100 * p).toPrecision(3))}%`;
const colour = (k) => `var(--c${k % 8})`;

function swatch(paint) {
  const square = make("span", { class: "swatch" });
  square.style.background = paint;
  return square;
}

function track(share, mark) {
  const [bar, line] = [make("i"), make("u")];
  bar.style.width = `${100 * share}%`;
  line.style.left = `${100 * mark}%`;
  return make("span", { class: "track", "aria-hidden": "true" }, bar, line);
}

// ---------------------------------------------------------------------------------------------------------------------
// Charts, each drawn at its real width. Pointer or arrow keys choose the place whose values are shown.

function ticks(low, high, most, least = 0) {
  const raw = Math.max(least, (high - low) / most), power = 10 ** Math.floor(Math.log10(raw));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found;
}

function axes(svg, width, x, y, least) { // least: distance of two marks of x
  const [left, right, top, bottom] = [46, width - 20, 10, 204];
  const X = (v) => left + ((v - x[0]) / (x[1] - x[0] || 1)) * (right - left);
  const Y = (v) => bottom - ((v - y[0]) / (y[1] - y[0] || 1)) * (bottom - top);
  const marked = (values) => values.map((v) => [v, exact(v, values[1] - values[0])]);
  for (const [v, words] of marked(ticks(...y, 5))) {
    svg.append(draw("line", { class: "grid", x1: left, x2: right, y1: Y(v), y2: Y(v) }));
    svg.append(draw("text", { x: left - 6, y: Y(v) + 4, "text-anchor": "end" }, words));
  }
  for (const [v, words] of marked(ticks(...x, Math.max(2, width / 75), least))) {
    svg.append(draw("text", { x: X(v), y: bottom + 17, "text-anchor": "middle" }, words));
  }
  return { X, Y, left, right, top, bottom };
}

// chart: { title, note, count, start, paint(svg, width) -> scale, place(scale, k) -> x, legend(k) -> nodes,
// show(scale, k) }, and pick(k) if a click or Enter has an effect
function figure(chart) {
  const svg = draw("svg", { role: "img", tabindex: 0, "aria-label": `${chart.title}; arrow keys move along it` });
  const legend = make("div", { class: "legend" });
  legend.append(...chart.legend(chart.start));
  const caption = make("figcaption", {}, chart.title, make("small", {}, chart.note ? ` ${chart.note}` : ""));
  let scale = null, here = chart.start;
  const show = (k) => {
    here = Math.max(0, Math.min(chart.count - 1, k));
    legend.replaceChildren(...chart.legend(here));
    chart.show(scale, here);
  };
  svg.addEventListener("pointermove", (event) => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    let nearest = 0; // places are sorted by x
    for (let k = 1; k < chart.count; k++) {
      if (Math.abs(chart.place(scale, k) - at) < Math.abs(chart.place(scale, nearest) - at)) nearest = k;
    }
    show(nearest);
  });
  svg.addEventListener("pointerleave", () => show(chart.start));
  svg.addEventListener("blur", () => show(chart.start));
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: chart.count - 1 };
    if (event.key === "Enter") chart.pick?.(here);
    if (!(event.key in moves)) return;
    show(moves[event.key]);
    legend.setAttribute("aria-live", "polite");
    event.preventDefault();
  });
  if (chart.pick) {
    svg.classList.add("pickable");
    svg.addEventListener("click", () => chart.pick(here));
  }
  new ResizeObserver(() => {
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${svg.clientWidth} 230`); // paper has another width, and nothing is drawn anew
    scale = chart.paint(svg, svg.clientWidth);
    show(here);
  }).observe(svg);
  return make("figure", {}, caption, svg, legend);
}

function path(points) {
  let line = "", move = "M";
  for (const [x, y] of points) {
    if (y !== null) line += `${move}${x.toFixed(1)} ${y.toFixed(1)}`;
    move = y === null ? "M" : "L";
  }
  return line;
}

function curves({ title, note, x, low, high, series, bands, called }) {
  const values = series.flatMap((one) => one.y).filter((v) => v !== null);
  let [least, most] = [low ?? Math.min(...values), high ?? Math.max(...values)];
  if (high === null) most += 0.05 * (most - least || Math.abs(most) || 1);
  const paint = (k) => (bands ? colour(0) : colour(k));
  let cursor, dots;
  return figure({
    title, note, count: x.length, start: x.length - 1,
    place: (scale, k) => scale.X(x[k]),
    paint(svg, width) {
      const scale = axes(svg, width, [x[0], x.at(-1)], [least, most], 1);
      const points = (one) => one.y.map((v, k) => [scale.X(x[k]), v === null ? null : scale.Y(v)]);
      for (const [a, b] of bands ?? []) {
        const around = path([...points(series[a]), ...points(series[b]).reverse()]);
        svg.append(draw("path", { d: around, fill: colour(0), opacity: 0.2 }));
      }
      series.forEach((one, k) => {
        const thin = bands && one.name !== "median" ? { opacity: 0.45 } : {};
        svg.append(draw("path", { class: "curve", d: path(points(one)), stroke: paint(k), ...thin }));
        const at = x.findIndex((step) => step >= called[one.name]);
        if (at >= 0 && one.y[at] !== null) {
          const name = draw("title", {}, `${one.name}: verdict at step ${called[one.name]}`);
          svg.append(draw("circle", { class: "called", cx: scale.X(x[at]), cy: scale.Y(one.y[at]), r: 5, stroke: paint(k) },
            name));
        }
      });
      cursor = draw("line", { class: "cursor", y1: scale.top, y2: scale.bottom });
      dots = series.map((_, k) => draw("circle", { r: 3.5, fill: paint(k) }));
      svg.append(cursor, ...dots);
      return scale;
    },
    show(scale, k) {
      for (const side of ["x1", "x2"]) cursor.setAttribute(side, scale.X(x[k]));
      series.forEach((one, s) => {
        dots[s].setAttribute("cx", scale.X(x[k]));
        dots[s].setAttribute("cy", one.y[k] === null ? -9 : scale.Y(one.y[k]));
      });
    },
    legend: (k) => [
      make("span", {}, "step ", make("b", {}, whole(x[k]))),
      ...series.map((one, s) =>
        make("span", {}, ...(bands ? [] : [swatch(paint(s))]), make("bdi", { title: one.name }, one.name), " ",
          make("b", {}, plainly(one.y[k], (most - least) / 100, [low, high])))),
    ],
  });
}

function histogram({ edges, groups, threshold, sides }) {
  const totals = edges.slice(1).map((_, k) => groups.reduce((sum, group) => sum + group.counts[k], 0));
  const sum = (counts) => counts.reduce((a, b) => a + b);
  const upto = totals.map((_, k) => sum(totals.slice(0, k + 1)) / sum(totals));
  let bars;
  const wide = (edges.at(-1) - edges[0]) / totals.length / 2;
  const parted = threshold === null ? "" : `; dashed line: ${exact(threshold, wide)}, the two-means threshold; ` +
    `${whole(sides[0])} below, ${whole(sides[1])} above`;
  return figure({
    title: "Weights of all records", note: `click a bar or press Enter to see its records${parted}`,
    count: totals.length, start: totals.indexOf(Math.max(...totals)),
    pick: (k) => findWeights(edges[k], edges[k + 1]),
    place: (scale, k) => scale.X((edges[k] + edges[k + 1]) / 2),
    paint(svg, width) {
      const scale = axes(svg, width, [edges[0], edges.at(-1)], [0, 1.05 * Math.max(...totals)]);
      bars = totals.map((_, k) => {
        const bar = draw("g", { class: "bar" });
        let below = 0;
        groups.forEach((group, g) => {
          const [x, y, next] = [scale.X(edges[k]), scale.Y(below + group.counts[k]), scale.X(edges[k + 1])];
          const size = { width: Math.max(0.5, next - x - 1), height: scale.Y(below) - y };
          bar.append(draw("rect", { x, y, ...size, fill: colour(g) }));
          below += group.counts[k];
        });
        return bar;
      });
      svg.append(...bars);
      if (threshold !== null) {
        const x = scale.X(threshold);
        svg.append(draw("line", { class: "cursor", x1: x, x2: x, y1: scale.top, y2: scale.bottom }));
      }
      return scale;
    },
    show: (_, here) => bars.forEach((bar, k) => bar.classList.toggle("here", k === here)),
    legend: (k) => [
      make("span", {}, "weight ", make("b", {}, `${exact(edges[k], wide)} to ${exact(edges[k + 1], wide)}`)),
      ...groups.map((group, g) =>
        make("span", {}, swatch(colour(g)), `${group.name} `, make("b", {}, whole(group.counts[k])))),
      make("span", {}, "up to here ", make("b", {}, percent(upto[k]))),
    ],
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Facts, and the table of sources with its forest plot: difference and interval of every source on one scale.

function forest({ difference, low, high }, reach) {
  if (difference === null) return "";
  const [width, height, radius] = [100, 16, 4], edge = radius + 1; // so that a dot at the end of the scale is whole
  const X = (v) => edge + ((Math.max(-reach, Math.min(reach, v)) / reach + 1) * (width - 2 * edge)) / 2;
  return draw("svg", { class: "forest", width, height, "aria-hidden": "true" },
    draw("line", { class: "grid", x1: X(0), x2: X(0), y1: 0, y2: height }),
    draw("line", { class: "reach", x1: X(low), x2: X(high), y1: height / 2, y2: height / 2 }),
    draw("circle", { class: low > 0 || high < 0 ? "sure" : "open", cx: X(difference), cy: height / 2, r: radius }));
}

function judged(rows) {
  const reach = Math.max(...rows.flatMap((row) => [row.low, row.high, row.difference]).map(Math.abs)) || 1;
  const interval = (row) => `${number(row.difference)} (${number(row.low)} to ${number(row.high)})`;
  const verdict = (row) => row.verdict + (row.called_at === null ? "" : `, step ${row.called_at}`);
  return {
    verdict: ["Verdict", "verdict", (row) => [make("span", { class: "verdict" }, verdict(row))]],
    difference: ["Difference to the others", "difference", (row) =>
      [forest(row, reach), make("span", { class: "interval" }, row.difference === null ? "–" : interval(row))]],
  };
}

function sources() {
  const rows = data.sources.map((one, k) => ({ ...one, k }));
  const largest = Math.max(...rows.flatMap((row) => [row.share, row.before]));
  const columns = [
    ["Source", "name", (row) => [swatch(row.curve === null ? "var(--line)" : colour(row.curve)),
      make("bdi", {}, row.name)]],
    ["Learned share", "share", (row) => [track(row.share / largest, row.before / largest), make("span", { class: "share" }, percent(row.share))]],
    ["Share before", "before", (row) => [percent(row.before)]],
    ["Records", "records", (row) => [whole(row.records)]],
    ["A record's weight", "weight", (row) => [number(row.weight)]],
  ];
  if (rows.some((row) => row.verdict)) {
    const { verdict, difference } = judged(rows);
    columns.splice(1, 0, verdict); // beside the name, in sight on a phone
    columns.push(difference);
  }
  const body = make("tbody");
  const order = (key, down) => {
    rows.sort((a, b) => (a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : a.k - b.k) * (down ? -1 : 1));
    const cells = (row) => columns.map(([, , show]) => make("td", {}, ...show(row)));
    body.replaceChildren(...rows.map((row) => make("tr", {}, ...cells(row))));
  };
  const heads = columns.map(([title, key]) => {
    const head = make("th", { scope: "col" }, make("button", { type: "button" }, title));
    head.firstChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : key !== "name";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      order(key, down);
    });
    return head;
  });
  heads[columns.findIndex(([, key]) => key === "share")].setAttribute("aria-sort", "descending");
  order("share", true);
  return make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body);
}

function trained({ note, sources }) {
  const text = ([part, learned]) => (learned ? make("mark", {}, part) : part);
  const record = ([head, parts]) => [make("p", { class: "note" }, head), make("pre", { tabindex: 0 }, ...parts.map(text))];
  $("trained").append(...(note ? [make("p", { class: "note" }, note)] : []),
    ...sources.flatMap(([name, records]) => [make("h3", {}, make("bdi", {}, name)), ...records.flatMap(record)]));
}

function overview() {
  document.title = `${data.run} – learned weights`;
  $("run").textContent = data.run;
  $("subtitle").textContent = data.subtitle;
  $("verdict").textContent = data.verdict;
  [$("export-words").textContent, $("export").textContent] = data.export;
  $("about").querySelector("tbody").append(...data.about.map(([name, value]) =>
    make("tr", {}, make("td", {}, name), make("td", {}, make("bdi", {}, value)))));
  $("facts").append(...data.facts.map(([name, value, note]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, value, make("small", {}, note)))));
  const figures = data.charts.map(curves), quantiles = data.charts.findIndex((chart) => chart.bands);
  if (data.histogram) figures.splice(quantiles + 1, 0, histogram(data.histogram));
  $("charts").append(...figures);
  $("charts-section").hidden = !$("charts").hasChildNodes();
  $("sources-section").hidden = data.sources.length < 2;
  $("sources").append(sources());
  $("judged").hidden = !data.sources.some((one) => one.verdict);
  $("overlaps-section").hidden = !data.overlaps.length;
  const item = (place) => make("li", {}, make("bdi", {}, place));
  $("overlaps").append(...data.overlaps.map(([amount, ...places]) =>
    make("li", {}, `${amount}, such as`, make("ul", {}, ...places.map(item)))));
  $("selection").textContent = data.selection;
  trained(data.trained);
  $("settings").textContent = data.settings;
  $("files").textContent = data.files_read;
}

