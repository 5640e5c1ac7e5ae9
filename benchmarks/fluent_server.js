// The Forward server of @fluent-org/logger; counts the records it gets, and says their number on standard error when it
// is to end. With "write", it also writes each on standard output, as a line of JSON.
// node fluent_server.js MODULES PATH count|write
const { FluentServer } = require(process.argv[2] + "/@fluent-org/logger");

let records = 0;

class Counting extends FluentServer {
  onEntry(tag, time, record) {
    records += 1;
    if (process.argv[4] === "write") process.stdout.write(JSON.stringify({ tag, time, record }) + "\n");
  }
}

process.on("SIGTERM", () => {
  console.error(records);
  process.exit(0);
});
new Counting({ listenOptions: { path: process.argv[3] } }).listen();
