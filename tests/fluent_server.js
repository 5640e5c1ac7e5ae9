// The Forward server of @fluent-org/logger, as an independent receiver: a JSON line on standard output for each entry.
// node fluent_server.js MODULES '{"listenOptions": {"path": ...}}'
const { FluentServer } = require(process.argv[2] + "/@fluent-org/logger");

class Printing extends FluentServer {
  onEntry(tag, time, record) {
    const plain = (key, value) => (typeof value === "bigint" ? value.toString() : value);
    process.stdout.write(JSON.stringify({ tag, time, record }, plain) + "\n");
  }
}

const server = new Printing(JSON.parse(process.argv[3]));
server.listen().then(() => process.stdout.write(JSON.stringify({ port: server.port || null }) + "\n"));
