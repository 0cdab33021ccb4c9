// The panel of details: an edge's histograms, a token's critical path, an actor's steps and log.

import { byId, draw, make, say } from "./dom.js";
import { json, pause } from "./net.js";
import { bytes, ms, rate, share, time } from "./numbers.js";

const AGAIN_MS = 1000, PER_OCTAVE = 8, OCTAVES = 26; // of histogram.py; 2^26 µs are over a minute
const PARTS = {
  serialise: "tapped, encoded, handed to the wire", credit: "waited for the receiver's credit", wire: "on the wire",
  join: "waited for other inputs of its step", queue: "waited for its step", compute: "the step",
};

export class Panel {
  constructor(page) {
    this.page = page;
    this.element = byId("panel");
    this.shown = null;
    this.clear();
    setInterval(() => { if (this.shown?.again && !document.hidden) this.shown.again(); }, AGAIN_MS);
  }

  clear() {
    this.show({ what: null }, "Details", make("p", { class: "note" }, "Choose an actor, an edge, or a token of an answer."));
  }

  show(shown, title, ...content) {
    this.shown = shown;
    this.page.picked?.(shown.what);
    const close = shown.what ? make("button", { type: "button", "aria-label": "Close the details", onclick: () => this.clear() }, "Close") : null;
    const head = make("h2", { tabindex: -1 }, title, close);
    this.element.replaceChildren(head, ...content.filter(Boolean));
    this.element.scrollTop = 0;
    if (shown.what?.byKeyboard) head.focus();
  }

  path(name, query) {
    return `/page/${name}?${new URLSearchParams({ model: this.page.model, ...query })}`;
  }

  // Show what stays, and below it a box that is filled now, and again each second. What cannot be had is said.
  filled(what, title, stays, fill, again = true) {
    const box = make("div");
    let busy = false;
    const update = async () => {
      if (busy) return;
      busy = true;
      try { await fill(box); } catch (error) { box.replaceChildren(make("p", { class: "note" }, error.message)); }
      busy = false;
    };
    this.show({ what, again: again ? update : null }, title, ...stays, box);
    return update();
  }

  // Buttons that do harm, with a line for what was done.
  faults(label, buttons) {
    if (!this.page.faults) return null;
    const said = make("p", { class: "note", role: "status" });
    const press = async (fault) => {
      try { said.textContent = (await json("/page/faults", { model: this.page.model, ...fault })).done; } catch (error) { said.textContent = error.message; }
    };
    return make("div", {}, make("div", { class: "buttons" }, label, buttons.map(([words, fault]) =>
      make("button", { type: "button", class: "danger", onclick: () => press(fault) }, words))), said);
  }

  edge(what) {
    const { edge } = what;
    const cut = edge.wire === "tcp" ? this.faults(null, [["Cut for 3 s", { what: "cut", source: edge.source, target: edge.target }]]) : null;
    const rows = make("tbody");
    const note = make("p", { class: "note" });
    const table = make("table", { "aria-label": "Latency by part" }, make("thead", {}, make("tr", {},
      make("th", {}, "part"), make("th", {}, "1 µs to a minute"), ["p50", "p95", "p99"].map((name) => make("th", { class: "number" }, name)))), rows);
    return this.filled(what, edge.name, [note, cut], async (box) => {
      const found = await json(this.path("edge", { edge: edge.edge }));
      note.textContent = `${edge.tensor} over ${edge.wire}, ${edge.codec}, ${edge.credits} messages of credit; `
        + `${found.parts.wire?.messages ?? 0} messages watched so far`;
      rows.replaceChildren(...Object.entries(PARTS).map(([part, words]) => {
        const figures = found.parts[part];
        return make("tr", { "data-part": part, "data-messages": figures?.messages ?? 0 },
          make("th", { scope: "row", title: words }, part), make("td", {}, figures ? histogram(figures.buckets, `${part}: ${words}`) : ""),
          ["p50_us", "p95_us", "p99_us"].map((name) => make("td", { class: "number" }, time(figures?.[name]))));
      }));
      if (table.parentNode !== box) box.replaceChildren(table);
    });
  }

  actor(what) {
    const { name, actor } = what;
    if (!actor) return this.why(what);
    const of = (frame) => (frame?.hosts ?? []).filter((host) => host.label.slice(0, host.label.lastIndexOf(".")) === name);
    const note = make("p", { class: "note" }, `${actor.kind} on ${actor.device}, ${actor.threads ?? "–"} threads, `
      + `${bytes(actor.weight_bytes)} of weights${actor.host ? `, in the process ${actor.host}` : ""}`);
    const buttons = of(this.page.frame).map(({ label }) => this.faults(`${label}:`, [["Kill", { what: "kill", actor: label }],
      ["Stop", { what: "stop", actor: label }], ["Continue", { what: "continue", actor: label }], ["Slow", { what: "slow", actor: label }]]));
    const log = document.createTextNode("");
    const logs = make("details", { hidden: true }, make("summary", {}, "Log"), make("pre", { tabindex: 0 }, log));
    return this.filled(what, name, [note, ...buttons, logs], async (box) => {
      const { frame } = this.page, hosts = of(frame);
      const details = await Promise.all(hosts.map((host) => json(this.path("actor", { actor: host.label }))));
      const written = details.map((each) => each.log).filter(Boolean).join("\n");
      say(log, written);
      logs.hidden = !written;
      box.replaceChildren(...hosts.map((host, at) => this.host(host, details[at].steps, frame)));
    });
  }

  host(host, last, frame) {
    const rates = frame.trace?.actors?.[host.label];
    const resident = frame.trace?.resident_bytes?.[host.pid];
    return make("div", {}, make("p", {}, `${host.label}: ${host.spare ? "spare" : host.state}, process ${host.pid ?? "–"}, ${bytes(resident)} resident, `
      + `queue ${host.queued}${rates ? `, ${rate(rates.steps_s)} steps/s of ${rate(rates.batch)} tokens` : ""}${host.lost ? `. Lost: ${host.lost}` : ""}`),
    last.length ? [make("p", { class: "note" }, `Its last ${last.length} steps, up to ${ms(Math.max(...last.map((step) => step.ms)))} long`),
      steps(last)] : null);
  }

  token(what) {
    const { token, at, count } = what;
    const others = token.top_logprobs ?? [];
    const head = make("p", {}, `Chosen with ${share(Math.exp(token.logprob))}. `,
      others.length ? `Likeliest: ${others.map((other) => `${JSON.stringify(other.token)} ${share(Math.exp(other.logprob))}`).join(", ")}` : "");
    const moves = make("div", { class: "buttons" }, make("button", { type: "button", disabled: at === 0, onclick: () => what.go(at - 1) }, "Token before"),
      make("button", { type: "button", disabled: at === count - 1, onclick: () => what.go(at + 1) }, "Token after"));
    return this.filled(what, `Token ${at + 1}: ${JSON.stringify(token.token)}`, [head, moves], async (box) => {
      const found = await this.written(() => json(this.path("token", { model: what.model, request: what.request, token: at })));
      box.replaceChildren(make("p", { class: "note" }, `${ms(found.ms)} after the token before it, by what it waited for. In a terminal: `,
        make("code", {}, `ranvier trace RUN --why ${found.session} --position ${found.position}`)),
      sharesOf(found), causes(found.causes));
    }, false);
  }

  // A token's records are written up to half a second after it came.
  async written(question) {
    for (let tries = 0; ; tries++) {
      try { return await question(); } catch (error) { if (tries === 5 || error.code !== "not_written_yet") throw error; }
      await pause(300);
    }
  }

  why(what = { kind: "why" }) {
    return this.filled(what, "Who waits for whom", [], async (box) => {
      box.replaceChildren(make("pre", { tabindex: 0 }, (await json(this.path("why", {}))).text));
    }, false);
  }
}

function histogram(buckets, words) {
  const bars = new Array(OCTAVES * 2).fill(0);
  for (const [bucket, count] of buckets) bars[Math.min(bars.length - 1, Math.floor(bucket / (PER_OCTAVE / 2)))] += count;
  const most = Math.max(...bars, 1);
  return draw("svg", { class: "bars", viewBox: `0 0 ${bars.length} 30`, preserveAspectRatio: "none", role: "img", "aria-label": words },
    bars.map((count, at) => count && draw("rect", { x: at, width: 0.86, y: 30 - Math.max(1.5, 28 * count / most), height: Math.max(1.5, 28 * count / most) })).filter(Boolean));
}

function steps(all) {
  const most = Math.max(...all.map((step) => step.ms));
  return draw("svg", { class: "bars steps", viewBox: `0 0 ${all.length} 30`, preserveAspectRatio: "none", role: "img", "aria-label": "Durations of the last steps" },
    all.map((step, at) => draw("rect", { x: at, width: 0.86, y: 30 - 28 * step.ms / most, height: 28 * step.ms / most },
      draw("title", {}, `${ms(step.ms)}, ${step.tokens} tokens of ${step.rows} sessions`))));
}

function sharesOf(found) {
  const svg = draw("svg", { class: "share", viewBox: "0 0 1000 22", preserveAspectRatio: "none", role: "img",
    "aria-label": found.causes.slice(0, 3).map((cause) => `${cause.cause} at ${cause.where} ${share(cause.share)}`).join(", ") });
  for (const part of found.path) {
    svg.append(draw("rect", { class: `c-${part.cause}`, x: 1000 * part.at_ms / found.ms, width: Math.max(0.5, 1000 * part.ms / found.ms), height: 22 },
      draw("title", {}, `${part.cause} at ${part.where}: ${ms(part.ms)}`)));
  }
  return svg;
}

function causes(all) {
  return make("table", { "aria-label": "Causes" }, make("tbody", {}, all.map((cause) => make("tr", { "data-cause": cause.cause, "data-where": cause.where, "data-ms": cause.ms },
    make("td", { class: "number" }, ms(cause.ms)), make("td", { class: "number" }, share(cause.share)),
    make("td", {}, draw("svg", { class: "swatch", viewBox: "0 0 11 11", "aria-hidden": "true" }, draw("rect", { class: `c-${cause.cause}`, width: 11, height: 11, rx: 2 }))),
    make("td", {}, cause.where), make("td", {}, `${cause.cause}: ${cause.words}`)))));
}
