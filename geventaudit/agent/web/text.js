// Text from outside, and JSON without loss.

const INVISIBLE = /[\p{Cc}\p{Cf}\p{Cn}\p{Co}\p{Cs}\p{Zl}\p{Zp}]/gu;

/** Return text with escapes for all characters that are not plainly visible. */
export function visible(text) {
  return String(text).replace(INVISIBLE, (character) => {
    const code = character.codePointAt(0).toString(16);
    return code.length > 4 ? `\\u{${code}}` : `\\u${code.padStart(4, "0")}`;
  });
}

/** A number that JavaScript cannot hold, as it was written. */
class Exact {
  constructor(source) {
    this.source = source;
  }

  toString() {
    return this.source;
  }
}

/** Parse JSON. A number that would be rounded becomes an object whose text is the number, where the browser can. */
export function parse(text) {
  return JSON.parse(text, (key, value, context) => {
    if (typeof value === "number" && context !== undefined && String(value) !== context.source) {
      return new Exact(context.source);
    }
    return value;
  });
}

/** Return a line of JSON with line breaks and indents. All else stays as it is: numbers are not rounded. */
export function indented(line) {
  const parts = [];
  let depth = 0;
  // A text, a bracket with all that is empty in it, a mark, or a run of anything else.
  for (const [part] of line.matchAll(/"(?:[^"\\]|\\.)*"|\[\s*\]|\{\s*\}|[[\]{},:]|[^\s[\]{},:"]+/g)) {
    if (part === "{" || part === "[") {
      depth += 1;
      parts.push(part, "\n", "  ".repeat(depth));
    } else if (part === "}" || part === "]") {
      depth -= 1;
      parts.push("\n", "  ".repeat(depth), part);
    } else if (part === ",") {
      parts.push(",\n", "  ".repeat(depth));
    } else {
      parts.push(part === ":" ? ": " : part);
    }
  }
  return parts.join("");
}

/** Yield the path and the text of each value in a parsed value that is neither a list nor a map. */
export function* leaves(value, path = "") {
  if (value === null || typeof value !== "object" || value instanceof Exact) {
    yield [path, value === "" ? "" : String(value)];
    return;
  }
  const entries = Array.isArray(value) ? value.map((each, index) => [`[${index}]`, each]) : Object.entries(value);
  if (entries.length === 0) {
    yield [path, ""];
  }
  for (const [key, each] of entries) {
    yield* leaves(each, Array.isArray(value) ? path + key : path ? `${path}.${key}` : key);
  }
}

export function time(seconds) {
  const moment = new Date(seconds * 1000);
  return Number.isNaN(moment.getTime()) ? `@${seconds}` : moment.toISOString().slice(11, 23);
}

export function dateAndTime(seconds) {
  const moment = new Date(seconds * 1000);
  return Number.isNaN(moment.getTime()) ? `@${seconds}` : moment.toISOString().replace("T", " ").replace("Z", " UTC");
}

export function bytes(count) {
  return count === 1 ? "1 byte" : `${whole(count)} bytes`;
}

export function whole(count) {
  return count.toLocaleString("en-US");
}

/** Make an element. Its children are elements, or text that stays text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}
