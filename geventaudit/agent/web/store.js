// The messages that are kept, and those of them that the filters let through. Both oldest first.

/** Make a message of two lines of JSON: its circumstances and its content. */
export function messageOf(about, line) {
  const meta = JSON.parse(about);
  const content = JSON.parse(line);
  const record = content.Record ?? {};
  const message = {
    ...meta,
    line,
    stamp: content.Time,
    type: content.Type ?? content.Tag,
    result: "",
    operation: "",
    caller: "",
    target: "",
  };
  if (meta.kind === "record") {
    message.result = record.OperationResult;
    message.operation = record.OperationName;
    message.caller = Object.values(record.CallerIdentities)
      .flatMap((identities) => identities.map((each) => each.Identity))
      .concat(record.CallerIpAddress)
      .join(", ");
    message.target = Object.entries(record.TargetResources)
      .map(([kind, targets]) => [kind, ...targets.map((each) => each.Name)].join(" "))
      .join(", ");
  } else if (meta.kind === "refused") {
    const name = record.OperationName;
    message.result = "Refused";
    message.operation = typeof name === "string" ? name : "";
    message.target = content.Reasons.map(([path, reason]) => (path ? `${path}: ${reason}` : reason)).join("; ");
  } else if (meta.kind === "heartbeat") {
    message.target = content.Destination;
  }
  return message;
}

export class Store {
  constructor() {
    this.kept = [];
    this.shown = [];
    this.filters = {};
    this.twins = new Map(); // messages by their line: those with the same line are duplicates
  }

  /** Add a message. Return true if the filters let it through. */
  add(message) {
    this.kept.push(message);
    const twins = this.twins.get(message.line);
    if (twins === undefined) {
      this.twins.set(message.line, [message]);
    } else {
      twins.push(message);
    }
    const passes = this.passes(message);
    if (passes) {
      this.shown.push(message);
    }
    return passes;
  }

  /** Forget the messages before a number. Return how many of those that are shown went. */
  forgetBefore(first) {
    const gone = countBefore(this.kept, first);
    for (const message of this.kept.splice(0, gone)) {
      const twins = this.twins.get(message.line);
      twins.shift();
      if (twins.length === 0) {
        this.twins.delete(message.line);
      }
    }
    const hidden = countBefore(this.shown, first);
    this.shown.splice(0, hidden);
    return hidden;
  }

  duplicatesOf(message) {
    return (this.twins.get(message.line) ?? []).filter((each) => each !== message);
  }

  filterBy(filters) {
    this.filters = filters;
    this.shown = this.kept.filter((each) => this.passes(each));
  }

  passes(message) {
    const { text, type, result, operation, caller, target } = this.filters;
    return (
      (!type || message.type === type) &&
      (!result || message.result === result) &&
      contains(message.operation, operation) &&
      contains(message.caller, caller) &&
      contains(message.target, target) &&
      (contains(message.line, text) || contains(message.line, text && JSON.stringify(text).slice(1, -1)))
    );
  }
}

function contains(text, part) {
  return !part || text.toLowerCase().includes(part.toLowerCase());
}

function countBefore(messages, first) {
  let count = 0;
  while (count < messages.length && messages[count].number < first) {
    count += 1;
  }
  return count;
}
