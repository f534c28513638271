// The page of `brewjax explore`. The state is what the task does not say: it is in the address, so that a link shows
// the same, and going back undoes.
"use strict";

const $ = (id) => document.getElementById(id);
const EDITED = ["instruction", "note", "style", "profile", "history", "left_out"];
const suggested = $("member").value; // the member that the page begins with
const EXPECTED = 3; // items that a new case expects first, unless it is edited
let shown = null; // the last answer
let pinned = null; // the ranking that the shown one is compared with
let turn = 0; // of requests: only the answer to the last one is shown
let undone = []; // addresses before this one
const opened = new Set(); // items whose reasons are shown, which stay so in the next ranking

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function readAddress() {
  try {
    return JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}");
  } catch {
    return {};
  }
}

let state = readAddress();

function edit(changes) {
  undone.push(location.hash);
  state = { ...state, ...changes };
  for (const key of Object.keys(state)) if (state[key] === null) delete state[key];
  history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify(state)));
  load();
}

function request(model) {
  const { compare, ...rest } = state;
  const member = state.typed_events ? null : $("member").value || suggested;
  return { member, task: $("task").value, candidates: Number($("candidates").value), ...rest, model };
}

async function post(path, body, parse = (response) => response.json()) {
  const headers = { "Content-Type": "application/json" };
  const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).message || `error ${response.status}`);
  return parse(response);
}

async function load() {
  const current = ++turn;
  showState();
  $("ranking").classList.add("busy");
  try {
    const answer = await post("rank", request(0));
    const second = state.compare === "model" ? await post("rank", request(1)) : null;
    if (current !== turn) return;
    shown = answer;
    const key = JSON.stringify([state.member, Boolean(state.typed_events), state.task, state.candidates, state.like, state.case]);
    if (!pinned || pinned.key !== key) pinned = { key, ranking: answer.ranking };
    showRanking(second ? second.ranking : pinned.ranking);
    showPrompt();
    showProfile();
    showEvents();
    const wrong = answer.out_of_order.map(([first, second]) => `${first} should be before ${second}`);
    const order = !answer.expected.length ? ""
      : wrong.length ? `. Not as expected: ${wrong.join(", ")}` : ". As expected";
    $("status").className = wrong.length ? "warn" : "";
    const counts = `${answer.ranking.length} ranked in ${answer.milliseconds.toFixed(0)} ms`;
    $("status").textContent = `${counts}, ${answer.tokens.toLocaleString("en")} tokens${order}`;
  } catch (error) {
    if (current !== turn) return;
    $("status").className = "warn";
    $("status").textContent = error.message;
  } finally {
    if (current === turn) $("ranking").classList.remove("busy");
  }
}

function showState() {
  for (const id of ["member", "task", "style", "candidates", "like"]) if (state[id] !== undefined) $(id).value = state[id];
  if ($("case")) $("case").value = state.case ?? "";
  if (document.activeElement !== $("typed-events")) $("typed-events").value = (state.typed_events || []).join("\n");
  if (state.typed_events) $("typed").open = true;
  for (const id of ["candidates", "like"]) $(id).disabled = state.case !== undefined;
  if ($("compare")) $("compare").value = state.compare || "pinned";
  $("compare-heading").textContent = state.compare === "model" ? "there" : "was";
}

function showPrompt() {
  if (document.activeElement !== $("member")) $("member").value = shown.member;
  $("task").value = shown.task;
  if (document.activeElement !== $("expected")) $("expected").value = expectedIds().join("\n");
  for (const id of ["instruction", "note"]) if (document.activeElement !== $(id)) $(id).value = shown[id];
  $("style").value = shown.style;
  $("label").textContent = shown.label;
  const spans = shown.pieces.map((piece) =>
    element("span", { className: `piece-${piece.kind}`, title: `${piece.attends}; ${piece.tokens} tokens` }, piece.text));
  $("prompt").replaceChildren(...spans);
  const truncated = shown.truncated.length ? ` Shortened to fit: ${shown.truncated.join("; ")}.` : "";
  $("tokens").textContent = `${shown.prefix_tokens} tokens that all ${shown.ranking.length} questions share, and the ` +
    `question of the first. A question ${shown.pieces.at(-1).attends}.${truncated}`;
}

function expectedIds() {
  return shown.expected.length ? shown.expected : shown.ranking.slice(0, EXPECTED).map((entry) => entry.item);
}

function showProfile() {
  const focused = document.activeElement.closest("#profile") ? document.activeElement.id : null;
  $("profile").replaceChildren(...shown.profile.map(({ column, text }) => {
    const field = element("input", { id: `profile-${column}`, value: text, autocomplete: "off" });
    field.addEventListener("change", () => {
      const others = (state.profile || []).filter(([name]) => name !== column);
      edit({ profile: [...others, [column, field.value]] });
    });
    return element("label", { className: "block" }, column + " ", field);
  }));
  if (focused) $(focused)?.focus();
}

function showEvents() {
  const focus = document.activeElement.closest("#events li")?.dataset.row;
  const focused = document.activeElement.tagName;
  $("dropped").hidden = !shown.dropped.length;
  $("dropped").textContent = `${shown.dropped.length} older events do not fit into the token budget and are not read.`;
  $("events").replaceChildren(...shown.events.map((event, index) => {
    const box = element("input", { type: "checkbox", checked: event.on });
    box.addEventListener("change", () => switchEvent(event.row, box.checked));
    const up = element("button", { type: "button", title: "earlier", disabled: index === 0 }, "↑");
    up.setAttribute("aria-label", `move earlier: ${event.text}`);
    const item = element("li", { className: event.on ? "" : "off" },
      element("span", { className: "handle", ariaHidden: "true" }, "⠿"), element("label", {}, box, event.text), up);
    item.dataset.row = event.row;
    up.addEventListener("click", () => move(item, -1));
    item.addEventListener("keydown", (key) => {
      const step = { ArrowUp: -1, ArrowDown: 1 }[key.key];
      if (!key.altKey || !step) return;
      key.preventDefault();
      move(item, step);
    });
    return item;
  }));
  $("events").querySelector(`li[data-row="${focus}"] ${focused}`)?.focus();
}

function switchEvent(row, on) {
  const off = new Set(shown.events.filter((event) => !event.on).map((event) => event.row));
  if (on) off.delete(row);
  else off.add(row);
  edit({ left_out: off.size || state.case !== undefined ? [...off] : null }); // a case may have events that are off
}

function move(item, step) {
  const neighbour = step < 0 ? item.previousElementSibling : item.nextElementSibling;
  if (!neighbour) return;
  const focused = document.activeElement;
  neighbour[step < 0 ? "before" : "after"](item);
  focused.focus(); // which moving takes away
  readOrder();
}

function readOrder() {
  const rows = [...$("events").children].map((item) => Number(item.dataset.row));
  edit({ history: [...shown.dropped.map((event) => event.row), ...rows] });
}

function showRanking(before) {
  const ranks = new Map(before.map((entry, index) => [entry.item, index]));
  let moved = 0;
  const rows = shown.ranking.map((entry, index) => {
    const was = ranks.get(entry.item);
    const up = was === undefined ? 0 : was - index;
    if (up) moved += 1;
    const arrow = up ? `${up > 0 ? "▲" : "▼"} ${Math.abs(up)}` : was === undefined ? "new" : "=";
    const why = element("button", { type: "button" }, "why");
    why.setAttribute("aria-expanded", "false");
    why.setAttribute("aria-label", `why ${entry.title}`);
    const change = element("td", { className: `number ${up > 0 ? "up" : up < 0 ? "down" : ""}` }, arrow);
    if (was !== undefined) change.title = `rank ${was + 1}, P ${before[was].probability.toFixed(3)}`;
    const row = element("tr", { className: up > 0 ? "moved-up" : up < 0 ? "moved-down" : "" },
      element("td", { className: "number" }, String(index + 1)), change,
      element("td", {}, entry.title + " ", element("span", { className: "hint" }, entry.item),
        entry.answer ? element("span", { className: "answer" }, ` answer: ${entry.answer}`) : ""),
      element("td", { className: "number", title: `log-odds ${entry.log_odds.toFixed(3)}` }, entry.probability.toFixed(3)),
      element("td", {}, why));
    row.dataset.item = entry.item;
    why.addEventListener("click", () => toggleWhy(row, why, entry));
    row.openWhy = () => openWhy(row, why, entry);
    return row;
  });
  $("ranking").tBodies[0].replaceChildren(...rows);
  for (const row of rows) if (opened.has(row.dataset.item)) row.openWhy();
  $("moved").textContent = `${moved} of ${rows.length} moved`;
}

function toggleWhy(row, button, entry) {
  if (!opened.delete(entry.item)) return openWhy(row, button, entry);
  row.nextSibling.remove();
  button.setAttribute("aria-expanded", "false");
}

async function openWhy(row, button, entry) {
  opened.add(entry.item);
  const cell = element("td", { colSpan: 5 }, "…");
  row.after(element("tr", { className: "why" }, cell));
  button.setAttribute("aria-expanded", "true");
  try {
    const reasons = await post("why", { edit: request(0), item: entry.item });
    const largest = Math.max(...reasons.effects.map((part) => Math.abs(part.effect || 0)), 1e-9);
    cell.replaceChildren(element("p", {}, reasons.summary), element("ul", {}, ...reasons.effects.map((part) => {
      const bar = element("div", { className: part.effect < 0 ? "bar down" : "bar" });
      bar.style.width = `${(100 * Math.abs(part.effect || 0)) / largest}%`;
      const effect = part.effect === null ? "none" : (part.effect > 0 ? "+" : "") + part.effect.toFixed(3);
      return element("li", {}, element("span", { className: "effect" }, effect), element("span", { className: "part" },
        element("span", { className: "kind" }, part.kind + " "), part.text), bar);
    })));
  } catch (error) {
    cell.textContent = error.message;
  }
}

function save(name, content, type) {
  const link = element("a", { href: URL.createObjectURL(new Blob([content], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const asText = (response) => response.text();
const start = { member: null, task: null, like: null, candidates: null };
const unedited = Object.fromEntries(EDITED.map((key) => [key, null]));
for (const id of Object.keys(start)) {
  // Another member or task begins anew: its texts and events are others.
  const others = { member: { ...unedited, case: null, typed_events: null }, task: { ...unedited, case: null } }[id] || {};
  $(id).addEventListener("change", () => {
    const value = id === "candidates" ? Number($(id).value) : $(id).value;
    edit({ ...others, [id]: value === "" ? null : value });
  });
}
$("case")?.addEventListener("change", () => {
  const chosen = $("case").value;
  edit({ ...start, ...unedited, typed_events: null, case: chosen === "" ? null : Number(chosen) });
});
$("typed-events").addEventListener("change", () => {
  const lines = $("typed-events").value.split("\n").filter((line) => line.trim());
  edit({ ...unedited, case: null, member: null, typed_events: lines.length ? lines : null });
});
$("style").addEventListener("change", () => edit({ style: $("style").value }));
for (const id of ["instruction", "note"]) {
  let timer;
  $(id).addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => edit({ [id]: $(id).value }), 500);
  });
}
$("compare")?.addEventListener("change", () => edit({ compare: $("compare").value === "model" ? "model" : null }));
$("pin").addEventListener("click", () => {
  pinned = { ...pinned, ranking: shown.ranking };
  showRanking(pinned.ranking);
});
function go(hash) {
  history.replaceState(null, "", hash || location.pathname);
  state = readAddress();
  document.activeElement?.blur();
  load();
}
$("undo").addEventListener("click", () => undone.length && go(undone.pop()));
$("reset").addEventListener("click", () => edit(unedited));
$("save-task").addEventListener("click", async () =>
  save(`${$("task").value}.yaml`, await post("task", request(0), asText), "application/yaml"));
$("save-prompt").addEventListener("click", async () =>
  save("prompt.json", await post("prompt", request(0), asText), "application/json"));
$("save-case").addEventListener("click", async () => {
  const expected = $("expected").value.split("\n").map((id) => id.trim()).filter(Boolean);
  try {
    const body = { edit: request(0), expected, comment: $("comment").value };
    save("case.jsonl", await post("case", body, asText), "application/json");
  } catch (error) {
    $("status").className = "warn";
    $("status").textContent = error.message;
  }
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("member").addEventListener("input", async () => {
  const response = await fetch(`members?like=${encodeURIComponent($("member").value)}`);
  $("members").replaceChildren(...(await response.json()).map((id) => element("option", { value: id })));
});
window.addEventListener("hashchange", () => { state = readAddress(); load(); });
new Sortable($("events"), {
  handle: ".handle", animation: 120, onEnd: ({ oldIndex, newIndex }) => oldIndex !== newIndex && readOrder(),
});
load();
