// Speak to the server: JSON, and server-sent events over fetch, which can carry a key.

export class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

let key = sessionStorage.getItem("ranvier-key") ?? "";

export function useKey(given) {
  key = given;
  sessionStorage.setItem("ranvier-key", given);
}

export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  if (options.body) headers["content-type"] = "application/json";
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) {
    let message = `${answer.status} ${answer.statusText}`;
    try { message = (await answer.json()).error.message; } catch { /* the status says it */ }
    throw new Refused(answer.status, message);
  }
  return answer;
}

export async function json(path, body) {
  return (await ask(path, body ? { method: "POST", body: JSON.stringify(body) } : {})).json();
}

// Yield {id, event, data} of each event in an answer.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", found = {};
  try {
    for (;;) {
      const { value, done } = await reader.read();
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

export const pause = (ms) => new Promise((done) => setTimeout(done, ms));
