// The page: connect the chat, the graph and the panel with the server's feed.

import { Chat } from "./chat.js";
import { byId, make, mark } from "./dom.js";
import { GraphView } from "./graph.js";
import { Refused, ask, events, json, pause, store, useKey } from "./net.js";
import { rate, share } from "./numbers.js";
import { Panel } from "./panel.js";
import { Training } from "./training.js";

const AGAIN_MS = 1000, OVER_MS = 5000, WINDOW_MS = 4000;

class Page {
  constructor() {
    this.model = null;
    this.faults = false;
    this.frame = null;
    this.view = new GraphView(byId("graph"), (what) => this.open(what));
    this.panel = new Panel(this);
    this.training = new Training(byId("training"));
    this.chat = new Chat((what) => this.open(what));
    this.feed = null;
    this.counted = [];
    document.addEventListener("visibilitychange", () => { // a page that nobody sees costs nothing
      this.feed?.abort();
      if (!document.hidden && this.model !== null) this.watch(this.feed = new AbortController());
    });
    byId("model").addEventListener("change", (event) => this.use(event.target.value));
    byId("why").addEventListener("click", () => this.open({ kind: "why" }));
    byId("theme").addEventListener("click", () => theme(true));
    for (const button of document.querySelectorAll("[data-show]")) button.addEventListener("click", () => this.pane(button.dataset.show));
    theme(false);
  }

  pane(name) {
    document.body.dataset.pane = name;
    for (const button of document.querySelectorAll("[data-show]")) button.setAttribute("aria-pressed", button.dataset.show === name);
  }

  open(what) {
    if (what.kind === "token" && matchMedia("(max-width: 860px)").matches) this.pane("graph");
    this.panel[what.kind](what);
  }

  picked(what) { this.view.mark(what); }

  async begin() {
    const known = await this.models();
    this.faults = known.faults;
    byId("model").replaceChildren(...known.models.map((model) => make("option", { value: model.name }, model.name)));
    this.chats = new Map(known.models.map((model) => [model.name, model.chats]));
    this.use(known.models[0].name);
  }

  async models() {
    for (;;) {
      try { return await json("/page/models"); } catch (error) {
        if (error instanceof Refused && error.status === 401) await this.askKey(error.message);
        else { this.link("wait", "no server"); await pause(AGAIN_MS); }
      }
    }
  }

  askKey(why) {
    const dialog = byId("key-dialog");
    byId("key-why").textContent = why;
    if (!dialog.open) dialog.showModal();
    return new Promise((done) => dialog.addEventListener("close", () => { useKey(byId("key").value); done(); }, { once: true }));
  }

  use(model) {
    this.model = model;
    this.chat.model = this.chats.get(model) ? model : null;
    document.querySelector(".chat").hidden = !this.chat.model;
    byId("training").hidden = true;
    document.querySelector("main").toggleAttribute("data-alone", !this.chat.model);
    if (!this.chat.model) this.pane("graph");
    byId("model").closest(".pick").toggleAttribute("data-one", this.chats.size === 1);
    this.counted = [];
    this.graph = null;
    byId("send").disabled = byId("text").disabled = !this.chat.model;
    this.panel.clear();
    this.feed?.abort();
    this.watch(this.feed = new AbortController());
  }

  link(state, words) {
    mark(byId("link"), "data-state", state);
    set("link", words);
  }

  async watch(feed) {
    while (!feed.signal.aborted) {
      try {
        const answer = await ask(`/page/feed?model=${encodeURIComponent(this.model)}`, { signal: feed.signal });
        for await (const event of events(answer)) {
          if (event.event === "graph") this.show(JSON.parse(event.data));
          else if (event.event === "frame") this.update(JSON.parse(event.data));
          else if (event.event === "over") {
            this.link("over", JSON.parse(event.data).why);
            await pause(OVER_MS);
          }
        }
      } catch (error) {
        if (feed.signal.aborted) return;
        if (error instanceof Refused && error.status === 401) await this.askKey(error.message);
        this.link("wait", error instanceof Refused ? error.message : "reconnecting");
        document.body.removeAttribute("data-loading");
      }
      await pause(AGAIN_MS);
    }
  }

  show(graph) {
    const same = this.graph && this.graph.run === graph.run && this.graph.name === graph.name;
    this.graph = graph;
    if (!same) this.view.show(graph);
  }

  update(frame) {
    this.frame = frame;
    document.body.removeAttribute("data-loading");
    this.count(frame);
    this.view.update(frame);
    this.figures(frame);
    if (frame.trace) this.happened(frame.trace.events);
    if (frame.training) {
      byId("training").hidden = false;
      document.querySelector("main").removeAttribute("data-alone");
      this.training.update(frame.training);
    }
  }

  // Tokens per second of the last seconds, from what the run has delivered: a token with log-probabilities is two messages.
  count(frame) {
    if (frame.tokens === undefined) return;
    const now = performance.now();
    this.counted.push([now, frame.tokens]);
    while (this.counted.length > 2 && this.counted[0][0] < now - WINDOW_MS) this.counted.shift();
    const [began, before] = this.counted[0];
    frame.tokens_s = now > began ? 1e3 * (frame.tokens - before) / (now - began) : 0;
  }

  figures(frame) {
    this.link("live", "live");
    set("f-rate", frame.tokens_s === undefined ? "–" : rate(frame.tokens_s));
    set("f-open", frame.open ?? frame.sessions);
    set("f-waiting", frame.waiting ?? 0);
    set("f-recoveries", frame.recoveries ?? 0);
    const token = frame.trace?.token;
    if (frame.trace_error) set("journey", frame.trace_error);
    else if (token) {
      const slower = 190 / Math.max(token.ms, 1e-3);
      const speed = slower > 1 ? `${rate(slower)} times slower` : `${rate(1 / slower)} times faster`;
      set("journey", `Session ${token.session}, position ${token.position}: ${token.ms.toFixed(1)} ms, shown ${speed}${frame.trace.sample < 1 ? `; figures of ${share(frame.trace.sample)} of the sessions` : ""}`);
    }
  }

  happened(events) {
    const newest = events.at(-1);
    const known = newest ? `${newest.at} ${events.length}` : "";
    if (known === this.newest) return;
    this.newest = known;
    byId("events-title").textContent = newest ? sentence(newest) : "Nothing has happened to the run";
    byId("events-list").replaceChildren(...events.toReversed().map((event) =>
      make("li", {}, make("time", {}, new Date(event.at).toLocaleTimeString()), sentence(event))));
  }
}

function sentence(event) {
  const after = event.seconds ? ` after ${event.seconds.toFixed(2)} s` : "";
  return `${event.actor ? `${event.actor} ` : ""}${event.event}${after}${event.words ? `: ${event.words}` : ""}`;
}

function set(id, value) {
  const element = byId(id), text = String(value);
  if (element.textContent !== text) element.textContent = text;
}

function theme(toggle) {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  let chosen = store("localStorage")?.getItem("ranvier-theme") ?? null;
  if (toggle) {
    const now = chosen ?? (dark ? "dark" : "light");
    chosen = now === "dark" ? "light" : "dark";
    store("localStorage")?.setItem("ranvier-theme", chosen);
  }
  if (chosen) document.documentElement.dataset.theme = chosen;
}

new Page().begin();
