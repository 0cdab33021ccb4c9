// Ask for an answer, and take it up again where its connection was lost.

import { Refused, ask, events, pause } from "./net.js";

const PAUSE_MS = 500, PATIENCE_MS = 60000, BUSY = [429, 503];

// Yield {text, tokens}, {usage}, {finish}, {lost} and {back} until the answer is complete. `live.request` gets the request's id.
export async function* answer(body, live, signal) {
  let reply = await ask("/v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal });
  live.request = reply.headers.get("x-request-id");
  let last = -1, lostAt = 0;
  for (;;) {
    try {
      for await (const event of events(reply)) {
        if (lostAt) { lostAt = 0; yield { back: true }; }
        if (event.data === "[DONE]") return;
        if (event.id !== undefined) last = Number(event.id);
        const chunk = JSON.parse(event.data);
        // an error without a number is the server's farewell: the next server has the rest
        if (chunk.error && event.id === undefined) break;
        if (chunk.error) throw new Refused(500, chunk.error.message);
        yield* pieces(chunk);
      }
    } catch (error) {
      if (error instanceof Refused || signal.aborted) throw error;
    }
    if (!lostAt) { lostAt = performance.now(); yield { lost: true }; }
    else if (performance.now() - lostAt > PATIENCE_MS) throw new Refused(0, "the server did not come back in time");
    reply = await again(live.request, last, lostAt, signal);
  }
}

function* pieces(chunk) {
  if (chunk.usage) yield { usage: chunk.usage };
  for (const choice of chunk.choices) {
    const tokens = choice.logprobs?.content ?? [];
    if (choice.delta.content || tokens.length) yield { text: choice.delta.content ?? "", tokens };
    if (choice.finish_reason) yield { finish: choice.finish_reason };
  }
}

async function again(request, last, lostAt, signal) {
  for (;;) {
    await pause(PAUSE_MS);
    try {
      return await ask(`/v1/streams/${request}`, { headers: { "last-event-id": String(last) }, signal });
    } catch (error) {
      if (signal.aborted || (error instanceof Refused && !BUSY.includes(error.status))) throw error;
      if (performance.now() - lostAt > PATIENCE_MS) throw new Refused(0, "the server did not come back in time");
    }
  }
}
