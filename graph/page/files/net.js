// Speak to the server: JSON, and server-sent events over fetch, which can carry a key.

export class Refused extends Error {
  constructor(status, message, code = "") { super(message); Object.assign(this, { status, code }); }
}

export class Silence extends Error {}

const SILENCE_MS = 8000;

// The browser's store, or nothing where it is switched off.
export function store(kind) {
  try { return window[kind]; } catch { return null; }
}

let key = store("sessionStorage")?.getItem("ranvier-key") ?? "";

export function useKey(given) {
  key = given.replace(/[^\x21-\x7e]/g, ""); // what a header can carry
  store("sessionStorage")?.setItem("ranvier-key", key);
}

export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  if (options.body) headers["content-type"] = "application/json";
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) {
    const { error } = await answer.json().catch(() => ({})); // a proxy's page is no JSON; then the status says it
    throw new Refused(answer.status, error?.message ?? `${answer.status} ${answer.statusText}`, error?.code);
  }
  return answer;
}

export async function json(path, body) {
  return (await ask(path, body ? { method: "POST", body: JSON.stringify(body) } : {})).json();
}

// Yield {id, event, data} of each event in an answer. The server says something each second, if only a comment: after a longer
// silence the connection is lost, whatever the system believes.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", found = {};
  try {
    for (;;) {
      const { value, done } = await within(reader.read());
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (found.data !== undefined) yield found;
          found = {};
          continue;
        }
        const colon = line.indexOf(":");
        if (colon > 0) found[line.slice(0, colon)] = line.slice(colon + 1).replace(/^ /, "");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function within(reading) {
  let timer;
  const late = new Promise((_, fail) => { timer = setTimeout(() => fail(new Silence("the connection is silent")), SILENCE_MS); });
  return Promise.race([reading, late]).finally(() => clearTimeout(timer));
}

export const pause = (ms) => new Promise((done) => setTimeout(done, ms));
