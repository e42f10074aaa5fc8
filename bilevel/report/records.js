// The lower half of page.html: pages of records, with search, sorting and marks. It is loaded after charts.js.

const PAGE = 50; // records shown at a time
const CLIP = 900; // characters of a text shown until it is opened
const PIECE = 4000; // characters per block of an open text; blocks out of sight are not laid out
const HITS = 1000; // search hits highlighted per block

// ---------------------------------------------------------------------------------------------------------------------
// Marks, by file and index in it. The browser stores them if it lets a page do so.

const STORE = `bilevel.report ${data.id}`;
const marks = new Map(); // "index file" -> keep or drop
const keyOf = (file, index) => `${index} ${file}`;

function marksAsJson() {
  const all = [...marks].map(([key, mark]) => {
    const space = key.indexOf(" ");
    return { file: key.slice(space + 1), index: Number(key.slice(0, space)), mark };
  });
  all.sort((a, b) => (a.file < b.file ? -1 : a.file > b.file ? 1 : a.index - b.index));
  return JSON.stringify({ run: data.run, marks: all }, null, 1) + "\n";
}

function takeMarks(text) {
  const given = JSON.parse(text).marks;
  for (const { file, index, mark } of given) {
    if (!data.files.includes(file) || !Number.isInteger(index) || !["keep", "drop"].includes(mark)) {
      throw new Error(`it holds no marks of this run: ${JSON.stringify({ file, index, mark })}`);
    }
  }
  for (const { file, index, mark } of given) marks.set(keyOf(file, index), mark);
}

function remember() {
  let kept = true;
  try {
    localStorage.setItem(STORE, marksAsJson());
  } catch {
    kept = false;
  }
  $("storage").textContent = kept ? "" : "This browser cannot store your marks: save them before you leave the page.";
  let [keep, drop] = [0, 0];
  for (const mark of marks.values()) mark === "keep" ? keep++ : drop++;
  $("tally").textContent = `${whole(keep)} keep, ${whole(drop)} drop`;
  $("save").disabled = !marks.size;
}

function saveMarks() {
  const link = make("a", { download: `${data.run}-marks.json` });
  link.href = URL.createObjectURL(new Blob([marksAsJson()], { type: "application/json" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function openMarks() {
  const [file] = $("file").files;
  if (!file) return;
  try {
    takeMarks(await file.text());
    remember();
  } catch (error) {
    $("tally").textContent = `${file.name} cannot be used: ${error.message}`;
  }
  $("file").value = "";
  find();
}

// ---------------------------------------------------------------------------------------------------------------------
// Records: data.records holds one list per field, in order of file and index. Their turns are in compressed
// packs of data.pack records, in the order shown first; a pack is read when a search or a page needs it.

const { file: FILE, index: INDEX, weight: WEIGHT, length: LENGTH, response: RESPONSE } = data.records;
const { noisy: NOISY, shared: SHARED } = data.records; // 0 or 1 of each record, or null if nothing is known
const { gap: GAP, harmful: HARMFUL } = data.records; // numbers, null for a record of which nothing is known; or null
const N = INDEX.length;
const RESPONSES = new Set(data.responses);
const PACKS = $("packs").textContent.trim().split("\n");
const TURNS = []; // of the records whose pack has been read
const reading = []; // of each pack: the promise that it is read
const SLOT = [];
data.order.forEach((k, slot) => (SLOT[k] = slot));

async function unpack(pack) {
  const text = atob(PACKS[pack]), bytes = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k++) bytes[k] = text.charCodeAt(k);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const turns = JSON.parse(await new Response(stream).text());
  turns.forEach((turn, k) => (TURNS[data.order[pack * data.pack + k]] = turn));
  PACKS[pack] = null;
}
function read(records) {
  const packs = new Set(records.map((k) => Math.floor(SLOT[k] / data.pack)));
  return Promise.all([...packs].map((pack) => (reading[pack] ??= unpack(pack))));
}
async function readAll() {
  for (const pack of PACKS.keys()) await (reading[pack] ??= unpack(pack));
}

const HEAVIEST = WEIGHT.reduce((a, b) => Math.max(a, b), 1);
const SEEN = []; // of each file: records before this one
const RANK = FILE.map((file) => (SEEN[file] = (SEEN[file] ?? -1) + 1));
const ORDERS = { mixed: RANK, weight: WEIGHT, response: RESPONSE, length: LENGTH };
if (GAP) for (const [name, last] of [["gap", 1e9], ["-gap", -1e9]]) ORDERS[name] = GAP.map((gap) => gap ?? last);
const [LOW, TOP] = [WEIGHT.reduce((a, b) => Math.min(a, b), Infinity), WEIGHT.reduce((a, b) => Math.max(a, b), 0)];
const weightOf = (k) => (WEIGHT[k] < 0.1 ? number(WEIGHT[k]) : exact(WEIGHT[k], Math.min(0.01, (TOP - LOW) / 100)));
const markOf = (k) => marks.get(keyOf(data.files[FILE[k]], INDEX[k]));
const placeOf = (k) => `${data.files[FILE[k]]} #${INDEX[k]}`;

let found = []; // records that pass the filters, in the chosen order
let page = 0;
let [asked, turned] = [0, 0]; // searches and turns of a page so far: one that waits for texts gives way to a newer one
let pattern = null; // regular expression of the search, or null

function matches(k) {
  return TURNS[k].some(([, text]) => pattern.test(text)) || pattern.test(placeOf(k));
}

async function find() {
  const mine = ++asked, words = $("search").value;
  $("records").setAttribute("aria-busy", true);
  if (words) await readAll();
  if (mine !== asked) return;
  pattern = words ? new RegExp(words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "iu") : null;
  const [source, noisy, shared, marked] = ["source", "noisy", "shared", "marked"].map((id) => $(id).value);
  const [least, most] = [$("least"), $("most")].map((input) => (input.value === "" ? NaN : Number(input.value)));
  found = [];
  for (let k = 0; k < N; k++) {
    if (source !== "" && FILE[k] !== Number(source)) continue;
    if (noisy !== "" && NOISY[k] !== Number(noisy)) continue;
    if (shared !== "" && SHARED[k] !== Number(shared)) continue;
    if (WEIGHT[k] < least || WEIGHT[k] > most) continue;
    if (marked && (markOf(k) ?? "none") !== marked) continue;
    if (pattern && !matches(k)) continue;
    found.push(k);
  }
  const sort = $("sort").value, sign = sort.startsWith("-") ? -1 : 1, values = ORDERS[sort] ?? ORDERS[sort.replace("-", "")];
  if (sort === "source") found.sort((a, b) => FILE[a] - FILE[b] || WEIGHT[a] - WEIGHT[b] || a - b);
  else if (values) found.sort((a, b) => sign * (values[a] - values[b]) || a - b);
  $("count").textContent = found.length === N ? many(N, "record") : `${whole(found.length)} of ${many(N, "record")}`;
  await turn(0, false);
}

async function findWeights(least, most) {
  $("filters").reset();
  [$("least").value, $("most").value] = [least, most];
  await find();
  $("filters").scrollIntoView({ block: "start" });
}

async function turn(to, scroll = true) {
  const mine = ++turned;
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  page = Math.max(0, Math.min(pages - 1, to));
  $("number").value = page + 1;
  $("number").max = pages;
  $("pages").textContent = whole(pages);
  for (const id of ["previous", "previous-below"]) $(id).disabled = page === 0;
  for (const id of ["next", "next-below"]) $(id).disabled = page === pages - 1;
  const wanted = found.slice(page * PAGE, (page + 1) * PAGE);
  $("records").setAttribute("aria-busy", true);
  await read(wanted);
  if (mine !== turned) return;
  const shown = wanted.map(record);
  $("records").replaceChildren(...(shown.length ? shown : [make("li", { class: "note" }, "No record is like that.")]));
  $("records").removeAttribute("aria-busy");
  if (scroll) $("records").scrollIntoView({ block: "start" });
}

function lit(text) {
  if (!pattern) return [text];
  const parts = [];
  let end = 0;
  for (const hit of text.matchAll(new RegExp(pattern.source, "giu"))) {
    parts.push(text.slice(end, hit.index), make("mark", {}, hit[0]));
    end = hit.index + hit[0].length;
    if (parts.length > 2 * HITS) break;
  }
  return [...parts, text.slice(end)];
}

// The index `at`, or the next one if `at` would split a surrogate pair.
const between = (text, at) => (/[\ud800-\udbff]/.test(text[at - 1]) ? at + 1 : at);

function pieces(text) {
  const found = [];
  for (let start = 0, end; start < text.length; start = end) {
    end = between(text, start + PIECE);
    if (end < text.length) {
      const [line, word] = ["\n", " "].map((mark) => text.lastIndexOf(mark, end - 1));
      if (line > start || word > start) end = 1 + (line > start ? line : word);
    }
    found.push(make("div", { dir: "auto" }, ...lit(text.slice(start, end))));
  }
  return found;
}

function textNodes([role, text, length]) {
  const body = make("div", { class: RESPONSES.has(role) ? "text response" : "text", dir: "auto" });
  const nodes = [make("h3", {}, role), body];
  if (!text.trim()) {
    body.classList.add("nothing");
    body.textContent = text ? `only white space, ${many(length, "character")}` : "empty";
    return nodes;
  }
  const part = () => {
    const hit = pattern ? text.search(pattern) : -1;
    const start = hit > CLIP - 100 ? between(text, hit - 200) : 0, end = between(text, start + CLIP);
    return [start ? "… " : "", ...lit(text.slice(start, end)), text.length > end ? " …" : ""];
  };
  if (text.length > CLIP) {
    const button = make("button", { type: "button", "aria-expanded": "false" });
    const open = (yes) => {
      body.replaceChildren(...(yes ? pieces(text) : part()));
      body.classList.toggle("whole", yes);
      yes ? body.setAttribute("tabindex", 0) : body.removeAttribute("tabindex");
      button.setAttribute("aria-expanded", yes);
      button.textContent = yes ? "Show less" : `Show all ${many(text.length, "character")}`;
    };
    button.addEventListener("click", () => open(button.getAttribute("aria-expanded") === "false"));
    open(false);
    nodes.push(button);
  } else body.append(...lit(text));
  if (length > text.length) {
    nodes.push(make("span", { class: "cut" }, `${many(length - text.length, "more character")} in the file only`));
  }
  return nodes;
}

function known(k) {
  if (GAP[k] === null) return "no mean gap";
  const harmful = HARMFUL && HARMFUL[k] !== null ? `, harmful: ${Math.round(100 * HARMFUL[k])}%` : "";
  return `mean gap ${number(GAP[k])}${harmful}`;
}

function record(k) {
  const place = placeOf(k);
  const buttons = ["Keep", "Drop"].map((word) => {
    const mark = word.toLowerCase();
    return make("button", { type: "button", value: mark, "aria-label": `${mark} ${place}` }, word);
  });
  const item = make("li", { class: "record", tabindex: -1, "aria-label": place },
    make("div", { class: "meta" },
      make("strong", {}, weightOf(k), make("small", {}, " weight")),
      track(WEIGHT[k] / HEAVIEST, 1 / HEAVIEST),
      ...(GAP ? [make("div", {}, known(k))] : []),
      make("div", {}, make("bdi", {}, ...lit(place))),
      make("div", {}, `${many(LENGTH[k], "character")}, response ${whole(RESPONSE[k])}`),
      ...(NOISY && NOISY[k] === 1 ? [make("div", { class: "noisy" }, "known as noisy")] : []),
      ...(SHARED && SHARED[k] === 1 ? [make("div", { class: "noisy" }, "validation record, too")] : [])),
    make("div", { class: "turns" }, ...TURNS[k].flatMap(textNodes)),
    make("div", { class: "choice" }, ...buttons));
  const show = () => {
    const now = markOf(k);
    for (const button of buttons) button.setAttribute("aria-pressed", button.value === now);
    for (const mark of ["keep", "drop"]) item.classList.toggle(mark, now === mark);
  };
  const set = (mark) => {
    const key = keyOf(data.files[FILE[k]], INDEX[k]);
    marks.get(key) === mark ? marks.delete(key) : marks.set(key, mark);
    remember();
    show();
  };
  for (const button of buttons) button.addEventListener("click", () => set(button.value));
  item.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "y") set("keep");
    else if (event.key === "n") set("drop");
    else if (event.key === "j") step(item, 1);
    else if (event.key === "k") step(item, -1);
  });
  show();
  return item;
}

async function step(item, by) {
  const next = by > 0 ? item.nextElementSibling : item.previousElementSibling;
  const before = page;
  if (!next) await turn(page + by);
  if (!next && page === before) return;
  (next ?? $("records")[by > 0 ? "firstElementChild" : "lastElementChild"]).focus();
}

async function begin() {
  if (!window.DecompressionStream) throw ($("loading").textContent = "This page needs a browser of 2023 or later.");
  overview();
  const present = [...new Set(FILE)];
  $("source").append(...present.map((k) => make("option", { value: k }, data.sources[k].name)));
  $("source").parentElement.hidden = present.length < 2;
  $("noisy-label").hidden = !NOISY;
  $("shared-label").hidden = !SHARED;
  const orders = (values) => [...$("sort").options].filter((option) => values.includes(option.value));
  if (!data.histogram) { // all records, or all of a source, have one weight
    $("filters").querySelector("fieldset").hidden = true;
    for (const option of orders(["weight", "-weight"])) option.remove();
  }
  if (!GAP) for (const option of orders(["-gap", "gap"])) option.remove();
  const left = data.per_sample ? orders(data.histogram ? ["weight"] : GAP ? ["-gap"] : ["place"]) : orders(["mixed"]);
  if (data.per_sample) orders(["mixed"])[0].remove();
  left[0].defaultSelected = true;
  try {
    const stored = localStorage.getItem(STORE);
    if (stored) takeMarks(stored);
  } catch {
    // Ignore storage that the browser does not provide or that another page has written.
  }
  let waiting;
  const soon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(find, 120);
  };
  $("filters").addEventListener("input", soon);
  $("filters").addEventListener("change", (event) => {
    if (event.target.tagName === "SELECT") soon();
  });
  $("filters").addEventListener("reset", soon); // the event fires before the fields are cleared
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("number").addEventListener("change", () => turn(Number($("number").value) - 1));
  for (const id of ["previous", "previous-below"]) $(id).addEventListener("click", () => turn(page - 1));
  for (const id of ["next", "next-below"]) $(id).addEventListener("click", () => turn(page + 1));
  $("save").addEventListener("click", saveMarks);
  $("open").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", openMarks);
  window.addEventListener("beforeprint", () => ($("about").open = true));
  remember();
  await find();
  $("loading").remove();
  $("page").hidden = false;
  await readAll(); // so that the first search need not
}

begin();
