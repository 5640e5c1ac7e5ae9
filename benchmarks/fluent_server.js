// The Forward server of @fluent-org/logger; counts the records it gets, and prints their number when it is to end.
// node fluent_server.js MODULES PATH
const { FluentServer } = require(process.argv[2] + "/@fluent-org/logger");

let records = 0;

class Counting extends FluentServer {
  onEntry() {
    records += 1;
  }
}

process.on("SIGTERM", () => {
  console.log(records);
  process.exit(0);
});
new Counting({ listenOptions: { path: process.argv[3] } }).listen();
