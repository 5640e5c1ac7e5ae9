// One message in full.

import { bytes, dateAndTime, element, indented, leaves, parse, visible } from "./text.js";

const MOST_FIELDS = 500;
const MOST_CHARACTERS = 100_000;
const LONGEST_BREAKABLE = 200;

export class Detail {
  /** onGo is called with a message that was clicked. */
  constructor(title, content, close, onGo) {
    this.title = title;
    this.content = content;
    this.close = close;
    this.onGo = onGo;
    this.message = null;
    this.twins = 0;
  }

  show(message, duplicates) {
    this.message = message;
    this.twins = duplicates.length;
    this.close.hidden = false;
    const content = parse(message.line);
    this.title.textContent = visible(message.operation || (message.kind === "refused" ? "A refused message" : message.type));
    this.content.replaceChildren(
      ...(message.kind === "refused" ? reasonsOf(content) : []),
      this.circumstancesOf(message, duplicates),
      ...fieldsOf(content),
      ...jsonOf(message.line),
    );
  }

  /** Bring the duplicates up to date. */
  refresh(duplicates) {
    if (duplicates.length !== this.twins) {
      this.twins = duplicates.length;
      this.content.querySelector(".duplicates").replaceChildren(...this.linksTo(duplicates));
    }
  }

  clear() {
    this.message = null;
    this.close.hidden = true;
    this.title.textContent = "No record chosen";
    const hint = "Choose a record in the list to see it in full.";
    this.content.replaceChildren(element("p", { class: "muted" }, hint));
  }

  circumstancesOf(message, duplicates) {
    const pairs = [
      ["Number", `${message.number}`],
      ["Arrived", dateAndTime(message.arrived)],
      ["Stamp", dateAndTime(message.stamp)],
      ["Connection", `${message.connection}`],
      ["Frame", message.frame === message.size ? bytes(message.frame) : `${bytes(message.frame)}, of which this message ${bytes(message.size)}`],
      ["Duplicates", element("span", { class: "duplicates" }, ...this.linksTo(duplicates))],
    ];
    return element("dl", {}, ...pairs.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
  }

  linksTo(duplicates) {
    if (duplicates.length === 0) {
      return ["none among those kept"];
    }
    const links = duplicates.slice(0, 20).map((each) => {
      const link = element("button", { type: "button", class: "link" }, `number ${each.number} (connection ${each.connection})`);
      link.addEventListener("click", () => this.onGo(each));
      return link;
    });
    const more = duplicates.length > links.length ? ` and ${duplicates.length - links.length} more` : "";
    return [`${duplicates.length} with the same content and stamp: `, ...links.flatMap((each, index) => (index ? [", ", each] : [each])), more];
  }
}

/** Return the text of a path in parts, with a place for a line break before each key, index and word. */
function breakable(path) {
  const text = visible(path);
  const parts = text.length > LONGEST_BREAKABLE ? [text] : text.split(/(?=[.[])|(?<=[a-z])(?=[A-Z])/);
  return parts.flatMap((part, index) => (index ? [element("wbr"), part] : [part]));
}

function reasonsOf(content) {
  const rows = content.Reasons.map(([path, reason]) =>
    element("tr", {}, element("th", { scope: "row" }, element("bdi", {}, ...breakable(path || "(message)"))), element("td", {}, element("bdi", {}, visible(reason)))),
  );
  return [element("h3", { class: "refused" }, "Refused, because"), element("table", { class: "fields reasons" }, element("tbody", {}, ...rows))];
}

/** Yield the fields of a message and of its record. */
function* fieldsIn(rest, record) {
  yield* leaves(rest);
  yield* leaves(record);
}

function fieldsOf(content) {
  const { Reasons: _, Record: record = {}, ...rest } = content;
  const rows = [];
  for (const [path, value] of fieldsIn(rest, record)) {
    if (rows.length >= MOST_FIELDS) {
      rows.push(element("tr", {}, element("th", { scope: "row" }, "…"), element("td", {}, "More fields are in the JSON below.")));
      break;
    }
    const shown = value === "" ? element("span", { class: "muted" }, "empty") : element("bdi", {}, visible(value));
    rows.push(element("tr", {}, element("th", { scope: "row" }, element("bdi", {}, ...breakable(path))), element("td", {}, shown)));
  }
  return [element("h3", {}, "Fields"), element("table", { class: "fields" }, element("tbody", {}, ...rows))];
}

function jsonOf(line) {
  const text = indented(line);
  const copy = element("button", { type: "button", id: "copy" }, "Copy JSON");
  const said = element("span", { role: "status" });
  copy.addEventListener("click", async () => {
    said.textContent = (await copied(text)) ? "Copied" : "The browser did not let the page copy: select the text";
  });
  const shown = text.length > MOST_CHARACTERS ? `${text.slice(0, MOST_CHARACTERS)}\n… ${text.length - MOST_CHARACTERS} more characters: copy or download them` : text;
  return [
    element("div", { class: "bar" }, element("h3", {}, "JSON"), copy, said),
    element("pre", { tabindex: "0", role: "region", "aria-label": "The record as JSON" }, shown),
  ];
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without a secure context there is no clipboard, but the old command.
    const area = element("textarea", { class: "hidden", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}
