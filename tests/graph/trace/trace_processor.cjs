// Perfetto's own trace processor, as its page runs it (WebAssembly in a worker), behind a unix socket: bytes that come go into
// its RPC interface, what it answers goes back. Arguments: the folder of the page's files, the socket's path.
const fs = require("fs");
const net = require("net");
const path = require("path");
const vm = require("vm");

const [folder, socketPath] = process.argv.slice(2);

class XMLHttpRequest {
  open(_method, url) { this.url = url; }
  send() {
    this.status = 200;
    const bytes = fs.readFileSync(path.join(folder, path.basename(this.url)));
    this.response = new Uint8Array(bytes).buffer;
    if (this.onload) setImmediate(() => this.onload());
  }
}

function WorkerGlobalScope() {}
const worker = {
  XMLHttpRequest, WorkerGlobalScope, TextDecoder, TextEncoder, performance, URL, setTimeout, clearTimeout,
  crypto: require("crypto").webcrypto,
  importScripts() { throw new Error("no scripts"); },
  location: { href: "file:///engine_bundle.js" },
  console: { log() {}, debug() {}, info() {}, warn: console.error, error: console.error },
};
worker.self = worker;
vm.createContext(worker);
vm.runInContext(fs.readFileSync(path.join(folder, "engine_bundle.js"), "utf8"), worker);
const Bytes = vm.runInContext("Uint8Array", worker);

const port = { postMessage: (bytes) => connection.write(Buffer.from(bytes)) };
let connection = null;
worker.onmessage({ data: port });

const server = net.createServer((socket) => {
  connection = socket;
  let last = Promise.resolve();
  socket.on("data", (bytes) => { last = last.then(() => port.onmessage({ data: new Bytes(bytes) })); });
  socket.on("close", () => process.exit(0));
});
server.listen(socketPath, () => console.log("ready"));
