// The client of @fluent-org/logger, sending to our agent. It exits when everything was acknowledged.
// node fluent_client.js MODULES OPTIONS TAG RECORD COUNT
const { FluentClient } = require(process.argv[2] + "/@fluent-org/logger");

const client = new FluentClient(null, JSON.parse(process.argv[3]));
const record = JSON.parse(process.argv[5]);
const sent = [];
for (let n = 0; n < Number(process.argv[6]); n++) {
  sent.push(client.emit(process.argv[4], { ...record, CustomData: { n } }));
}
Promise.all(sent).then(
  () => process.exit(0),
  (error) => {
    console.error(String(error));
    process.exit(1);
  },
);
