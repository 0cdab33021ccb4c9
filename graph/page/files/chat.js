// The chat: messages, branches, and the answer that is being written.

import { answer } from "./answer.js";
import { byId, make } from "./dom.js";
import { show } from "./markdown.js";
import { ms, rate } from "./numbers.js";
import { Strip } from "./strip.js";
import { Talks } from "./talks.js";

const TOP = 4, NEAR_END = 40;
const SETTINGS = ["temperature", "top_p", "max_tokens", "seed"];
const SURE = [0.9, 0.5, 0.1];

export class Chat {
  constructor(choose) {
    this.talks = new Talks(() => this.list());
    this.choose = choose;
    this.model = null;
    this.running = null;
    this.box = byId("messages");
    byId("composer").addEventListener("submit", (event) => { event.preventDefault(); this.running ? this.stop() : this.send(); });
    byId("text").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); if (!this.running) this.send(); }
    });
    byId("new-talk").addEventListener("click", () => { this.stop(); this.talks.begin(); this.all(); byId("text").focus(); });
    addEventListener("pagehide", () => this.talks.save());
    byId("drop-talk").addEventListener("click", () => {
      if (this.talks.path().length && !confirm(`Delete “${this.talks.current.title}”?`)) return;
      this.stop();
      this.talks.drop();
      this.all();
    });
    byId("talks").addEventListener("change", (event) => { this.stop(); this.talks.choose(event.target.value); this.all(); });
    byId("settings-button").addEventListener("click", (event) => {
      const open = byId("settings").hidden;
      byId("settings").hidden = !open;
      event.currentTarget.setAttribute("aria-expanded", open);
    });
    for (const name of ["system", ...SETTINGS]) byId(`s-${name}`).addEventListener("input", () => this.keepSettings());
    byId("settings").addEventListener("submit", (event) => event.preventDefault());
    this.all();
  }

  keepSettings() {
    const own = this.talks.current.settings = {};
    for (const name of ["system", ...SETTINGS]) {
      const value = byId(`s-${name}`).value;
      if (value.trim() !== "") own[name] = name === "system" ? value : Number(value);
    }
    this.talks.save();
  }

  list() {
    const { all, current } = this.talks;
    byId("talks").replaceChildren(...all.map((talk) => make("option", { value: talk.id, selected: talk === current }, talk.title)));
  }

  // Show the conversation that is chosen.
  all() {
    const { current } = this.talks;
    for (const name of ["system", ...SETTINGS]) byId(`s-${name}`).value = current.settings[name] ?? "";
    this.list();
    const shown = this.talks.path().map((message) => this.element(message));
    this.box.replaceChildren(...(shown.length ? shown : [make("div", { class: "empty" }, make("strong", {}, "Ask, and watch it think"),
      "Each token travels through the actors on the right. Click one in the answer to see where its time went.")]));
    this.box.scrollTop = this.box.scrollHeight;
    this.save();
  }

  save(talk) {
    this.talks.save(talk);
    if (!this.running) byId("progress").textContent = this.talks.full ? "not kept: full" : "";
  }

  // The element that shows a message now, if one does.
  shown(message) {
    return this.box.querySelector(`[data-id="${message.id}"]`);
  }

  element(message) {
    const branches = this.talks.branches(message);
    const at = branches.indexOf(message);
    const go = (to) => () => { this.stop(); this.talks.go(branches[to]); this.all(); };
    const body = make("div", { class: "body" });
    const user = message.role === "user";
    const made = make("article", { class: "message", "data-role": message.role, "data-id": message.id },
      make("header", {}, make("span", { class: "name" }, user ? "You" : "Answer"),
        branches.length > 1 ? [
          make("button", { type: "button", disabled: at === 0, "aria-label": "Branch before", onclick: go(at - 1) }, "‹"),
          make("span", {}, `${at + 1}/${branches.length}`),
          make("button", { type: "button", disabled: at === branches.length - 1, "aria-label": "Branch after", onclick: go(at + 1) }, "›"),
        ] : null,
        user ? [
          this.running || this.talks.current.leaf !== message.id ? null : make("button", { type: "button", onclick: () => this.run() }, "Answer it"),
          make("button", { type: "button", onclick: () => this.edit(message, made) }, "Edit"),
        ] : make("button", { type: "button", onclick: () => this.regenerate(message) }, "Regenerate")),
      body);
    if (user) body.append(make("p", {}, ...message.text.split("\n").flatMap((line, n) => (n ? [make("br"), line] : [line]))));
    else write(body, message.text);
    if (!user && this.running?.message === message) made.setAttribute("aria-busy", "true");
    if (message.error) made.append(make("p", { class: "error" }, message.error));
    if (message.stats) made.append(this.under(message, made, body));
    return made;
  }

  // Show under an answer how fast it came, and its tokens.
  under(message, made, body) {
    const { stats, live } = message;
    const line = make("div", { class: "under" },
      make("span", {}, `${rate(stats.speed)} tokens/s`), make("span", {}, `first token after ${ms(stats.first)}`),
      make("span", {}, `${stats.tokens} tokens${stats.finish === "length" ? ", cut at the limit" : ""}`));
    const all = make("div", {}, line);
    if (!live?.tokens.length) return all;
    const strip = live.strip = new Strip(live.tokens, (at) => this.pick(message, at));
    let words = null;
    line.append(make("button", { type: "button", "aria-pressed": "false", onclick: (event) => {
      const open = !words;
      event.currentTarget.setAttribute("aria-pressed", open);
      if (open) made.insertBefore(words = this.tokens(message), all); else { words.remove(); words = null; }
      body.hidden = open;
    } }, "Tokens"));
    all.append(strip.element);
    return all;
  }

  tokens(message) {
    const { live } = message;
    return make("div", { class: "tokens" }, live.buttons = live.tokens.map((token, at) => {
      const sure = SURE.findIndex((least) => Math.exp(token.logprob) >= least);
      return make("button", { type: "button", "data-sure": sure < 0 ? 3 : sure || false, "aria-pressed": at === live.strip.chosen,
        "aria-label": `Token ${at + 1}, ${JSON.stringify(token.token)}`, onclick: () => this.pick(message, at) }, token.token);
    }));
  }

  pick(message, at) {
    const { live } = message;
    live.strip.mark(at);
    live.buttons?.forEach((button, place) => button.setAttribute("aria-pressed", place === at));
    this.choose({ kind: "token", model: message.model, request: live.request, at, token: live.tokens[at], count: live.tokens.length,
      go: (to) => this.pick(message, to) });
  }

  edit(message, made) {
    const text = make("textarea", { rows: Math.min(12, message.text.split("\n").length + 1), "aria-label": "The message" });
    text.value = message.text;
    const send = () => {
      if (!text.value.trim()) return;
      this.stop();
      this.talks.add(message.parent, "user", text.value);
      this.all();
      this.run();
    };
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
      if (event.key === "Escape") this.all();
    });
    made.replaceChildren(text, make("div", { class: "under" }, make("button", { type: "button", onclick: send }, "Send as a new branch"),
      make("button", { type: "button", onclick: () => this.all() }, "Leave it")));
    text.focus();
  }

  regenerate(message) {
    this.stop();
    this.talks.current.leaf = message.parent;
    this.all();
    this.run();
  }

  send() {
    const text = byId("text").value.trim();
    if (!text || !this.model) return;
    byId("text").value = "";
    this.talks.add(this.talks.current.leaf, "user", text);
    this.all();
    this.run();
  }

  stop() {
    this.running?.abort();
    this.running = null;
    byId("send").textContent = "Send";
  }

  async run() {
    const talk = this.talks.current, { system, ...sampling } = talk.settings;
    const asked = answered(this.talks.path()).map(({ role, text }) => ({ role, content: text }));
    const message = this.talks.add(talk.leaf, "assistant", "");
    message.model = this.model;
    const live = Object.defineProperty(message, "live", { value: { tokens: [], request: null } }).live; // not kept with the text
    const running = this.running = Object.assign(new AbortController(), { message });
    this.all();
    byId("send").textContent = "Stop";
    const began = performance.now();
    let first = 0, last = began, drawn = false, usage = null, finish = "stopped";
    const progress = (words) => { if (this.running === running) byId("progress").textContent = words; };
    const following = (change) => {
      const follows = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < NEAR_END;
      change();
      if (follows) this.box.scrollTop = this.box.scrollHeight;
    };
    const redraw = () => {
      drawn = false;
      const body = this.shown(message)?.querySelector(".body");
      if (body) following(() => write(body, message.text));
    };
    progress("reading");
    try {
      const request = { model: this.model, messages: [...(system ? [{ role: "system", content: system }] : []), ...asked], ...sampling,
        stream: true, stream_options: { include_usage: true }, logprobs: true, top_logprobs: TOP };
      for await (const piece of answer(request, live, running.signal)) {
        if (piece.lost) progress("lost, resuming");
        if (piece.usage) usage = piece.usage;
        if (piece.finish) finish = piece.finish;
        if (piece.text === undefined) continue;
        const now = performance.now();
        first ||= now;
        piece.tokens.forEach((token, n) => live.tokens.push({ ...token, gap: n ? 0 : now - last }));
        last = now;
        message.text += piece.text;
        progress(speed(live.tokens.length, first, now));
        if (!drawn) { drawn = true; requestAnimationFrame(redraw); }
      }
    } catch (error) {
      if (!running.signal.aborted) message.error = error.message;
    }
    const tokens = usage?.completion_tokens ?? live.tokens.length;
    if (first) message.stats = { first: first - began, speed: last > first ? 1e3 * (tokens - 1) / (last - first) : null, tokens, finish };
    if (this.running === running) this.stop();
    this.save(talk);
    const shown = this.shown(message);
    if (shown) following(() => shown.replaceWith(this.element(message)));
  }
}

// The messages that a model is given: without questions that got no answer, except the last.
function answered(path) {
  return path.filter((message, at) => (message.role === "user" ? at === path.length - 1 || path[at + 1].text : message.text));
}

// Show Markdown. Whatever it is, it is shown: what cannot be laid out is shown as it stands.
function write(body, text) {
  try { show(body, text); } catch (error) {
    console.warn(error);
    body.blocks = null;
    body.replaceChildren(make("pre", {}, text));
  }
}

const speed = (tokens, first, now) => (tokens > 1 && now > first ? `${rate(1e3 * (tokens - 1) / (now - first))} tok/s` : "");
