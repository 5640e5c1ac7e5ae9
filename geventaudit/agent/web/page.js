// The page: events of the agent in, actions out. Texts of records only ever become text nodes.

import { Chart } from "./chart.js";
import { Detail } from "./detail.js";
import { List } from "./list.js";
import { messageOf, Store } from "./store.js";
import { bytes, element, time, visible, whole } from "./text.js";

const RETRY_MILLISECONDS = 2000;
const DRAW_MILLISECONDS = 100;
const FILTERS = ["text", "type", "result", "operation", "caller", "target"];

const by = (id) => document.getElementById(id);
const store = new Store();
const detail = new Detail(by("detail-title"), by("detail-content"), by("close"), go);
const list = new List(by("list"), by("rows"), open, reveal);
const chart = new Chart(by("chart"), by("legend"));
list.duplicatesOf = (message) => store.duplicatesOf(message);

let run = null;
let state = null;
let missed = 0; // messages that were dropped before this page could take them
let paused = null; // the messages that were shown when the page was paused
let waiting = 0; // messages that arrived since
let added = 0; // shown messages since the last drawing
let removed = 0;
let drawing = null;
let secondsBehind = 0; // the clock of the agent, less that of this page

// -- events -----------------------------------------------------------------------------------------------------------

function listen() {
  const events = new EventSource("/events");
  events.addEventListener("run", (event) => {
    if (run !== null && run !== event.data) {
      missed = 0;
      forget(Infinity);
    }
    run = event.data;
    say("connection", "Live", "live");
  });
  events.addEventListener("messages", (event) => {
    const lines = event.data.split("\n");
    const [missedNow, first] = lines[0].split(" ").map(Number);
    missed += missedNow;
    for (let index = 1; index < lines.length; index += 2) {
      const passes = store.add(messageOf(lines[index], lines[index + 1]));
      added += passes;
      waiting += passes && paused !== null;
    }
    forget(first);
    drawSoon();
  });
  events.addEventListener("state", (event) => {
    state = JSON.parse(event.data);
    chart.update(state.seconds);
    secondsBehind = state.now - Date.now() / 1000;
    forget(state.first);
    drawState();
    drawSoon();
  });
  events.addEventListener("error", () => {
    say("connection", "The agent does not answer; trying again", "lost");
    if (events.readyState === EventSource.CLOSED) {
      setTimeout(listen, RETRY_MILLISECONDS);
    }
  });
}

function forget(first) {
  removed += store.forgetBefore(first);
}

function say(id, text, kind = "") {
  const place = by(id);
  if (place.textContent !== text) {
    place.textContent = text;
  }
  place.dataset.kind = kind;
}

// -- drawing ----------------------------------------------------------------------------------------------------------

function drawSoon() {
  drawing ??= setTimeout(() => requestAnimationFrame(draw), DRAW_MILLISECONDS);
}

function draw() {
  drawing = null;
  if (paused === null) {
    list.show(store.shown, added, removed);
  }
  added = removed = 0;
  if (detail.message !== null) {
    detail.refresh(store.duplicatesOf(detail.message));
  }
  drawSummary();
}

function drawSummary() {
  const parts = [`${whole(store.shown.length)} of ${whole(store.kept.length)} kept messages shown`];
  if (state?.dropped > 0) {
    parts.push(`the oldest ${whole(state.dropped)} were dropped: ${whole(store.kept.length)} are kept`);
  }
  if (missed > 0) {
    parts.push(`${whole(missed)} of them came faster than this page could take them`);
  }
  if (paused !== null) {
    parts.push(`paused, ${whole(waiting)} more since`);
  }
  say("summary", `${parts.join("; ")}.`);
  by("empty").hidden = store.kept.length > 0;
}

function drawState() {
  say("address", `Agent on ${visible(state.address)}`);
  toggle("reading", state.reading, "Stop reading", "Read again");
  toggle("acknowledging", state.acknowledging, "Refuse acks", "Acknowledge again");
  toggle("running", state.running, "Stop listening", "Listen again");
  by("hang-up").disabled = by("restart").disabled = !state.running;
  const counts = state.counts;
  say(
    "counts",
    `${whole(counts.connections)} connections so far, ${whole(counts.open_connections)} open; ${whole(counts.frames)} frames, ` +
      `${bytes(counts.bytes)}; ${whole(counts.messages)} messages, ${whole(counts.heartbeats)} of them heartbeats; ` +
      `${whole(counts.refused)} refused; ${whole(counts.acks)} acks.`,
  );
  by("links-rows").replaceChildren(...state.links.toReversed().map(rowOf));
  chart.draw(Math.floor(state.now));
}

function toggle(id, isOn, on, off) {
  const button = by(id);
  button.dataset.state = isOn ? "on" : "off";
  if (button.textContent !== (isOn ? on : off)) {
    button.textContent = isOn ? on : off;
  }
}

function rowOf(link) {
  const isOpen = link.closed === null;
  const texts = [
    link.number,
    link.peer,
    isOpen ? `open since ${time(link.opened)}` : `closed ${time(link.closed)}: ${link.reason}`,
    whole(link.frames),
    whole(link.messages),
    whole(link.refused),
    whole(link.bytes),
    link.heartbeat === null ? "none" : time(link.heartbeat),
  ];
  const cells = texts.map((text, index) =>
    element("td", index >= 3 && index <= 6 ? { class: "number" } : {}, element("bdi", {}, visible(text))),
  );
  return element("tr", { class: isOpen ? "open" : "closed" }, ...cells);
}

// -- actions ----------------------------------------------------------------------------------------------------------

async function act(name, done) {
  try {
    const answer = await fetch(`/actions/${name}`, { method: "POST" });
    say("trouble", answer.ok ? done : `Not done: ${visible(await answer.text())}`, answer.ok ? "" : "lost");
  } catch {
    say("trouble", "Not done: the agent does not answer", "lost");
  }
}

const DONE = {
  "stop-reading": "The agent reads nothing. Services write until their sockets are full; then records wait on their queues.",
  "resume-reading": "The agent reads again.",
  "stop-acknowledging": "The agent acknowledges nothing. Services that wait for acks keep their records, and send them again.",
  "resume-acknowledging": "The agent acknowledges what arrives from now on.",
  stop: "The agent does not listen. Services try to connect again and again.",
  start: "The agent listens again.",
  "hang-up": "The agent has closed all connections.",
  restart: "The agent has restarted.",
  clear: "The kept messages are cleared.",
};

for (const id of ["reading", "acknowledging", "running"]) {
  by(id).addEventListener("click", (event) => {
    const name = event.target.dataset[event.target.dataset.state];
    act(name, DONE[name]);
  });
}
for (const id of ["hang-up", "restart", "clear"]) {
  by(id).addEventListener("click", () => act(id, DONE[id]));
}

// -- the list and the record ------------------------------------------------------------------------------------------

function open(message) {
  detail.show(message, store.duplicatesOf(message));
  document.body.dataset.open = "";
}

/** Bring the record into view where it stands below the list. */
function reveal() {
  if (matchMedia("(max-width: 60rem)").matches) {
    by("detail").scrollIntoView();
  }
}

/** Show a message that may be far away in the list, or hidden by a filter. */
function go(message) {
  list.choose(message);
  const index = list.messages.indexOf(message);
  if (index >= 0) {
    list.reveal(list.rowOf(index));
  }
}

function close() {
  delete document.body.dataset.open;
  list.choose(null);
  detail.clear();
  by("list").focus();
}

function pause() {
  paused = paused === null ? [...store.shown] : null;
  waiting = 0;
  by("pause").setAttribute("aria-pressed", paused !== null);
  by("pause").textContent = paused === null ? "Pause" : "Go on";
  list.show(paused ?? store.shown, 0, 0);
  drawSummary();
}

function filter() {
  store.filterBy(Object.fromEntries(FILTERS.map((name) => [name, by(name).value])));
  paused = paused === null ? null : [...store.shown];
  list.box.scrollTop = 0;
  list.show(paused ?? store.shown, 0, 0);
  if (!list.newestFirst) {
    list.setOrder(false);
  }
  drawSummary();
}

function download() {
  const shown = paused ?? store.shown;
  const file = new Blob(shown.map((message) => `${message.line}\n`), { type: "application/jsonl" });
  const link = element("a", { href: URL.createObjectURL(file), download: "records.jsonl" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const KEYS = {
  ArrowDown: () => list.move(1),
  ArrowUp: () => list.move(-1),
  j: () => list.move(1),
  k: () => list.move(-1),
  PageDown: () => list.move(10),
  PageUp: () => list.move(-10),
  Home: () => list.move(-Infinity),
  End: () => list.move(Infinity),
  Enter: () => detail.message !== null && by("detail").focus(),
  Escape: close,
  p: pause,
  "/": () => by("text").focus(),
};

by("list").addEventListener("keydown", (event) => {
  if (!event.ctrlKey && !event.metaKey && !event.altKey && Object.hasOwn(KEYS, event.key)) {
    event.preventDefault();
    KEYS[event.key]();
  }
});
by("detail").addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    close();
  }
});
for (const name of FILTERS) {
  by(name).addEventListener(by(name).tagName === "SELECT" ? "change" : "input", filter);
}
by("reset").addEventListener("click", () => {
  FILTERS.forEach((name) => (by(name).value = ""));
  filter();
});
by("order").addEventListener("change", (event) => list.setOrder(event.target.value === "newest"));
by("pause").addEventListener("click", pause);
by("download").addEventListener("click", download);
by("close").addEventListener("click", close);
// The chart moves on while nothing arrives.
setInterval(() => state !== null && chart.draw(Math.floor(Date.now() / 1000 + secondsBehind)), 1000);
listen();
