"use strict";

// ---- Light and dark ----

const root = document.documentElement;
const theme = document.getElementById("theme");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
theme.hidden = false;
theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
prefersDark.addEventListener("change", nameTheme);
nameTheme();

// ---- What is in the file ----

// Each column is gzip in base64. It is text to the page, whatever a model wrote, and stays text: nothing below makes
// markup of a string.
async function unpack(name) {
  const text = atob(document.getElementById(`data-${name}`).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
}
const integers = async (name, type) => new type(await (await unpack(name)).arrayBuffer());

const NATS = 1000; // log-probabilities are whole thousandths of a nat
const LOWEST = -32767;
const MINUS_INFINITY = -32768;
const LEVELS = [0.1, 0.25, 0.5, 1, 2, 5]; // nats

async function main() {
  const data = await (await unpack("header")).json();
  const has = (name) => data.columns.includes(name);
  const scores = {};
  for (const name of ["before", "after", "ref", "teacher"]) if (has(name)) scores[name] = await integers(name, Int16Array);
  const tokens = await integers("tokens", Uint32Array);
  const mask = has("mask") ? await integers("mask", Uint8Array) : null;
  // Larger than all the rest, and of no use until a token is asked for.
  let topk = null;
  const loadTopk = async () => topk ??= { ids: await integers("topk", Uint32Array), logprobs: await integers("topk_logprobs", Int16Array) };

  const idOf = (token) => data.vocabulary[token][0];
  const textOf = (token) => data.vocabulary[token][1];
  const advantage = (state, i) => Math.max(-data.clip, Math.min(data.clip, (scores.teacher[i] - scores[state][i]) / NATS));
  const isTrained = (i) => !mask || mask[i];
  const states = ["before", "after"].filter(has);

  let start = 0;
  for (const row of data.rows) {
    row.start = start;
    row.end = start += row.tokens;
    for (const state of states) {
      let sum = 0, count = 0;
      for (let i = row.start; i < row.end; i++) if (isTrained(i)) { sum += Math.abs(advantage(state, i)); count++; }
      row[state] = sum / count;
    }
  }

  // ---- The list ----

  const list = document.getElementById("list");
  const controls = document.getElementById("controls");
  const pager = document.getElementById("pager");
  const options = controls.elements;
  // About as many tokens on a page as stay quick to draw and to scroll.
  const PAGE = Math.max(3, Math.min(20, Math.floor(5000 / (tokens.length / data.rows.length))));
  const ORDERS = {
    before: (a, b) => b.before - a.before,
    after: (a, b) => b.after - a.after,
    better: (a, b) => (b.before - b.after) - (a.before - a.after),
    worse: (a, b) => (a.before - a.after) - (b.before - b.after),
    row: (a, b) => a.row - b.row,
  };
  let page = 0;
  let found = [];

  function completion(row) {
    return row.text ??= Array.from(tokens.subarray(row.start, row.end), textOf).join("");
  }

  function search() {
    const wanted = options.find.value.toLowerCase(), teacher = options.teacher?.value;
    const those = teacher ? data.rows.filter((row) => row.teacher === Number(teacher)) : data.rows;
    found = those.filter((row) => !wanted || (row.prompt + completion(row)).toLowerCase().includes(wanted));
    found.sort(ORDERS[options.sort.value]);
    page = 0;
    draw();
  }

  function draw() {
    hide();
    const shown = found.slice(page * PAGE, (page + 1) * PAGE);
    list.replaceChildren(...shown.map(article));
    colour();
    const [previous, status, next] = pager.children;
    pager.hidden = false;
    status.textContent = found.length
      ? `${page * PAGE + 1}–${page * PAGE + shown.length} of ${found.length}${found.length < data.rows.length ? " found" : ""}`
      : "No rollout has this text.";
    previous.disabled = page === 0;
    next.disabled = (page + 1) * PAGE >= found.length;
  }

  function article(row) {
    const about = element("header", {}, element("span", {}, `row ${row.row}`), element("span", {}, `${row.tokens} tokens`));
    if (row.teacher !== undefined) {
      const { className, textContent } = options.teacher.options[row.teacher + 1];
      about.append(element("span", { className }, textContent));
    }
    const means = element("span", {}, "mean |advantage| ");
    states.forEach((state, i) => means.append(i ? " → " : "", element("b", { title: state }, row[state].toFixed(3))));
    about.append(means);
    const text = element("p", { className: "tokens", tabIndex: 0, dir: "auto" });
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", `Completion of row ${row.row}. The arrow keys go through its tokens.`);
    text.start = row.start;
    for (let i = row.start; i < row.end; i++) {
      const content = textOf(tokens[i]);
      text.append(element("span", { className: !content ? "empty" : content.includes("\n") ? "break" : "" }, visible(content)));
    }
    return element("article", {}, about, element("p", { className: "prompt", dir: "auto" }, visible(row.prompt)), text);
  }

  function colour() {
    const state = options.state.value;
    for (const text of list.querySelectorAll(".tokens")) {
      let i = text.start;
      for (const span of text.children) {
        const kept = ["empty", "break", "current"].filter((name) => span.classList.contains(name)).join(" ");
        const shown = isTrained(i) ? shade(advantage(state, i)) : "masked";
        span.className = `${shown} ${kept}`;
        // Numbers that round to nothing would hide the others.
        if (options.numbers.checked && /\d/.test(shown)) span.dataset.a = signed(advantage(state, i), 1);
        else delete span.dataset.a;
        i++;
      }
      text.classList.toggle("numbers-on", options.numbers.checked);
    }
  }

  // ---- One token ----

  const detail = document.getElementById("detail");
  let current = null;

  function show(span) {
    current?.classList.remove("current");
    current = span;
    span.classList.add("current");
    const text = span.parentElement;
    const i = text.start + Array.prototype.indexOf.call(text.children, span);
    describe(i);
    if (data.top && !topk) loadTopk().then(() => current === span && (describe(i), place(span)));
    place(span);
  }

  function hide() {
    current?.classList.remove("current");
    current = null;
    detail.hidden = true;
  }

  function describe(i) {
    const text = textOf(tokens[i]);
    const lines = [["before", "student, before"], ["after", "student, after"], ["ref", "reference"], ["teacher", "teacher"]];
    const rows = lines.filter(([name]) => has(name)).map(([name, label]) => {
      const value = scores[name][i];
      const gap = states.includes(name) ? (isTrained(i) ? signed(advantage(name, i), 3) : "not trained") : "";
      return line(label, nats(value), percent(value), gap);
    });
    detail.replaceChildren(
      element("p", { className: "what" }, text ? visible(text) : "▫"),
      element("p", { className: "quiet" }, `id ${idOf(tokens[i])}${text ? "" : ", part of the next character"}`),
      element("table", {}, line("", "log-prob.", "prob.", "advantage"), ...rows),
    );
    if (!data.top || !topk) return;
    const best = [];
    for (let j = i * data.top; j < (i + 1) * data.top; j++) {
      const token = topk.ids[j];
      const row = line(visible(textOf(token)) || "▫", nats(topk.logprobs[j]), percent(topk.logprobs[j]), `id ${idOf(token)}`);
      row.className = idOf(token) === idOf(tokens[i]) ? "sampled" : "";
      best.push(row);
    }
    detail.append(element("p", { className: "quiet" }, "The teacher’s most likely tokens"), element("table", { className: "top-tokens" }, ...best));
  }

  function place(span) {
    detail.hidden = false;
    // A token that is broken over two lines has two.
    const boxes = span.getClientRects();
    const box = boxes[boxes.length - 1];
    const below = box.bottom + 8 + detail.offsetHeight < innerHeight;
    detail.style.left = `${Math.max(8, Math.min(box.left, innerWidth - detail.offsetWidth - 8))}px`;
    detail.style.top = `${below ? box.bottom + 8 : Math.max(8, boxes[0].top - 8 - detail.offsetHeight)}px`;
  }

  const tokenAt = (event) => event.target.closest?.(".tokens > span");
  list.addEventListener("pointerover", (event) => { if (tokenAt(event)) show(tokenAt(event)); });
  list.addEventListener("pointerout", (event) => { if (event.pointerType === "mouse" && tokenAt(event)) hide(); });
  list.addEventListener("click", (event) => { if (tokenAt(event)) show(tokenAt(event)); });
  list.addEventListener("focusin", (event) => { if (event.target.matches(".tokens:focus-visible")) show(event.target.children[0]); });
  list.addEventListener("focusout", hide);
  document.addEventListener("scroll", () => { if (current) place(current); }, { passive: true });
  document.addEventListener("pointerdown", (event) => { if (!event.target.closest("#list")) hide(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  list.addEventListener("keydown", (event) => {
    if (!event.target.matches(".tokens")) return;
    const inside = current?.parentElement === event.target ? current : null;
    const { firstElementChild: first, lastElementChild: last } = event.target;
    const next = {
      ArrowRight: inside ? inside.nextElementSibling : first,
      ArrowLeft: inside?.previousElementSibling,
      Home: first,
      End: last,
    }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    if (next) {
      show(next);
      next.scrollIntoView({ block: "nearest", behavior: "instant" });
      place(next);
    }
  });

  // ---- Controls ----

  controls.hidden = false;
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("input", (event) => {
    if (["find", "sort", "teacher"].includes(event.target.name)) search();
    else colour();
  });
  pager.addEventListener("click", (event) => {
    if (!event.target.value) return;
    page += Number(event.target.value);
    draw();
    list.scrollIntoView({ block: "start", behavior: "instant" });
  });
  legend();
  search();
  performance.mark("rollouts");
}

// ---- Small things ----

function element(name, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const line = (...cells) => element("tr", {}, ...cells.map((cell) => element("td", {}, cell)));

// A model may write what a page would not show, or would turn around. Joiners stay: scripts and emoji need them.
function visible(text) {
  return text
    .replace(/[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\u2028\u2029]/gu, (c) => {
      if (c === "\u200c" || c === "\u200d") return c;
      if (c === "\n") return "↵\n";
      if (c === "\t") return "⇥\t";
      return `⟨U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`;
    });
}

const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);

function nats(value) {
  if (value === MINUS_INFINITY) return "−∞";
  return `${value === LOWEST ? "≤ " : ""}${(value / NATS).toFixed(3).replace("-", "−")}`;
}

function percent(value) {
  const share = value === MINUS_INFINITY ? 0 : Math.exp(value / NATS) * 100;
  return share > 0 && share < 0.01 ? "<0.01%" : `${Math.min(share, 100).toFixed(2)}%`;
}

function shade(value) {
  const level = LEVELS.filter((edge) => Math.abs(value) >= edge).length;
  return level ? `${value < 0 ? "less" : "more"} l${level}` : "";
}

function legend() {
  const edges = [...LEVELS.map((edge) => -edge).reverse(), 0, ...LEVELS];
  const labels = edges.map((edge) => element("span", { className: shade(edge) }, edge ? signed(edge, 2).replace(/\.?0+$/, "") : "0"));
  document.getElementById("legend").replaceChildren(...labels);
}

if (document.getElementById("data-header")) {
  main().catch((error) => {
    document.getElementById("list").textContent = `The rollouts cannot be shown: ${error.message}`;
    throw error;
  });
}
