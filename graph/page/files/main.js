// The page: connect the chat, the graph and the panel with the server's feed.

import { Chat } from "./chat.js";
import { byId, make } from "./dom.js";
import { GraphView } from "./graph.js";
import { Refused, ask, events, json, pause, useKey } from "./net.js";
import { rate } from "./numbers.js";
import { Panel } from "./panel.js";
import { Training } from "./training.js";

const AGAIN_MS = 1000, SLOWER = 1;

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
        if (error instanceof Refused && error.status === 401) await this.askKey();
        else { this.link("wait", "no server"); await pause(AGAIN_MS); }
      }
    }
  }

  askKey() {
    const dialog = byId("key-dialog");
    dialog.showModal();
    return new Promise((done) => dialog.addEventListener("close", () => { useKey(byId("key").value); done(); }, { once: true }));
  }

  use(model) {
    this.model = model;
    this.chat.model = this.chats.get(model) ? model : null;
    document.querySelector(".chat").hidden = !this.chat.model;
    byId("training").hidden = Boolean(this.chat.model);
    byId("send").disabled = byId("text").disabled = !this.chat.model;
    this.panel.clear();
    this.feed?.abort();
    this.watch(this.feed = new AbortController());
  }

  link(state, words) {
    byId("link").dataset.state = state;
    byId("link").textContent = words;
  }

  async watch(feed) {
    while (!feed.signal.aborted) {
      try {
        const answer = await ask(`/page/feed?model=${encodeURIComponent(this.model)}`, { signal: feed.signal });
        for await (const event of events(answer)) {
          if (event.event === "graph") this.view.show(this.graph = JSON.parse(event.data));
          else if (event.event === "frame") this.update(JSON.parse(event.data));
          else if (event.event === "over") this.link("over", JSON.parse(event.data).why);
        }
      } catch (error) {
        if (feed.signal.aborted) return;
        this.link("wait", error instanceof Refused ? error.message : "reconnecting");
      }
      await pause(AGAIN_MS);
    }
  }

  update(frame) {
    this.frame = frame;
    if (document.hidden) return;
    const began = performance.now();
    this.view.update(frame);
    this.figures(frame);
    this.happened(frame.trace?.events ?? []);
    if (frame.training) this.training.update(frame.training);
    performance.measure("frame", { start: began });
  }

  figures(frame) {
    this.link("live", "live");
    const gateway = frame.trace?.actors?.["gateway.0"];
    set("f-rate", gateway ? rate(gateway.tokens_s) : "0");
    set("f-open", frame.open ?? frame.sessions);
    set("f-waiting", frame.waiting ?? 0);
    set("f-recoveries", frame.recoveries ?? 0);
    const token = frame.trace?.token;
    if (frame.trace_error) set("journey", frame.trace_error);
    else if (token) {
      const slower = 190 / Math.max(token.ms, 1e-3);
      const speed = slower > SLOWER ? `${rate(slower)} times slower` : `${rate(1 / slower)} times faster`;
      set("journey", `Session ${token.session}, position ${token.position}: ${token.ms.toFixed(1)} ms, shown ${speed}`);
    }
  }

  happened(events) {
    const newest = events.at(-1);
    const mark = newest ? `${newest.at} ${events.length}` : "";
    if (mark === this.newest) return;
    this.newest = mark;
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
  let chosen = localStorage.getItem("ranvier-theme");
  if (toggle) {
    const now = chosen ?? (dark ? "dark" : "light");
    localStorage.setItem("ranvier-theme", chosen = now === "dark" ? "light" : "dark");
  }
  if (chosen) document.documentElement.dataset.theme = chosen;
}

new Page().begin();
