// A list of any length. Only the rows that can be seen are in the document.

import { element, time, visible } from "./text.js";

const SPARE_ROWS = 4;

export class List {
  /** onChoose is called with the message that was chosen, onClick after that if it was clicked. */
  constructor(box, rows, onChoose, onClick) {
    this.box = box;
    this.rows = rows;
    this.onChoose = onChoose;
    this.onClick = onClick;
    this.messages = [];
    this.newestFirst = true;
    this.chosen = null;
    this.duplicatesOf = () => [];
    this.pool = [];
    box.addEventListener("scroll", () => this.draw());
    box.addEventListener("click", (event) => {
      const row = event.target.closest("[role=option]");
      if (row !== null) {
        this.choose(this.messages[Number(row.dataset.index)]);
        this.onClick();
      }
    });
    new ResizeObserver(() => this.draw()).observe(box);
  }

  get rowHeight() {
    return parseFloat(getComputedStyle(this.box).getPropertyValue("--row"));
  }

  get isAtEnd() {
    return this.box.scrollTop + this.box.clientHeight >= this.box.scrollHeight - this.rowHeight;
  }

  /** Show messages, oldest first. The rows that can be seen keep their place, unless the list follows the newest. */
  show(messages, added, removed) {
    const follows = this.newestFirst ? this.box.scrollTop === 0 : this.isAtEnd;
    const moved = this.newestFirst ? added : -removed;
    this.messages = messages;
    this.rows.style.height = `${messages.length * this.rowHeight}px`;
    if (!follows) {
      this.box.scrollTop += moved * this.rowHeight;
    } else if (!this.newestFirst) {
      this.box.scrollTop = this.box.scrollHeight;
    }
    this.draw();
  }

  setOrder(newestFirst) {
    this.newestFirst = newestFirst;
    this.draw();
    this.box.scrollTop = newestFirst ? 0 : this.box.scrollHeight;
    this.draw();
  }

  /** Choose the message that is so many rows below the chosen one. */
  move(by) {
    if (this.messages.length === 0) {
      return;
    }
    const now = this.chosen === null ? -1 : this.messages.indexOf(this.chosen);
    const row = (now < 0 ? -1 : this.rowOf(now)) + by;
    const index = this.rowOf(Math.max(0, Math.min(row, this.messages.length - 1)));
    this.choose(this.messages[index]);
    this.reveal(this.rowOf(index));
  }

  choose(message) {
    this.chosen = message ?? null;
    this.draw();
    if (this.chosen !== null) {
      this.onChoose(this.chosen);
    }
  }

  reveal(row) {
    const top = row * this.rowHeight;
    const bottom = top + this.rowHeight;
    if (top < this.box.scrollTop) {
      this.box.scrollTop = top;
    } else if (bottom > this.box.scrollTop + this.box.clientHeight) {
      this.box.scrollTop = bottom - this.box.clientHeight;
    }
    this.draw();
  }

  /** Return the row of an index, and the index of a row. */
  rowOf(index) {
    return this.newestFirst ? this.messages.length - 1 - index : index;
  }

  draw() {
    const height = this.rowHeight;
    const first = Math.max(0, Math.floor(this.box.scrollTop / height) - SPARE_ROWS);
    const most = Math.ceil(this.box.clientHeight / height) + 2 * SPARE_ROWS;
    const count = Math.max(0, Math.min(most, this.messages.length - first));
    while (this.pool.length < count) {
      const row = newRow();
      this.pool.push(row);
      this.rows.append(row.element);
    }
    let active = "";
    this.pool.forEach((row, place) => {
      row.element.hidden = place >= count;
      if (place >= count) {
        return;
      }
      const position = first + place;
      const message = this.messages[this.rowOf(position)];
      row.element.style.transform = `translateY(${position * height}px)`;
      row.element.dataset.index = this.rowOf(position);
      row.element.setAttribute("aria-posinset", position + 1);
      row.element.setAttribute("aria-setsize", this.messages.length);
      row.element.setAttribute("aria-selected", message === this.chosen);
      fill(row, message, this.duplicatesOf(message).length);
      if (message === this.chosen) {
        active = row.element.id;
      }
    });
    if (active) {
      this.box.setAttribute("aria-activedescendant", active);
    } else {
      this.box.removeAttribute("aria-activedescendant");
    }
  }
}

let rowsMade = 0;

function newRow() {
  const cells = ["time", "type", "result", "operation", "caller", "target"].map((name) => element("bdi", { class: name }));
  rowsMade += 1;
  const made = element("div", { role: "option", id: `row-${rowsMade}`, class: "row" }, ...cells);
  return { element: made, cells, message: null, duplicates: 0 };
}

const RESULTS = { UnknownOperationResult: "Unknown" };

function fill(row, message, duplicates) {
  if (row.message === message && row.duplicates === duplicates) {
    return;
  }
  row.message = message;
  row.duplicates = duplicates;
  row.element.dataset.result = message.result || message.kind;
  const again = duplicates > 0 ? ` ×${duplicates + 1}` : "";
  const texts = [
    time(message.arrived),
    message.type,
    (RESULTS[message.result] ?? message.result) + again,
    message.operation || (message.kind === "refused" ? "" : message.kind),
    message.caller,
    message.target,
  ];
  row.cells.forEach((cell, index) => {
    cell.textContent = visible(texts[index].slice(0, 300));
  });
}
