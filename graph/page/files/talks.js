// Keep conversations in the browser, each under a key of its own. A conversation is a tree: an edit or another answer is a branch.

import { store } from "./net.js";

const PREFIX = "ranvier-talk-";

const newId = () => crypto.getRandomValues(new Uint32Array(2)).join("");

export class Talks {
  constructor(changed) {
    this.kept = store("localStorage");
    this.all = this.read();
    this.current = this.all[0] ?? this.begin();
    this.full = false;
    addEventListener("storage", (event) => { // another tab
      if (event.key && !event.key.startsWith(PREFIX)) return;
      const others = this.read().filter((talk) => talk.id !== this.current.id);
      this.all = [this.current, ...others].sort((a, b) => b.at - a.at);
      changed();
    });
  }

  read() {
    const found = [];
    for (const key of Object.keys(this.kept ?? {})) {
      if (!key.startsWith(PREFIX)) continue;
      let talk = null;
      try { talk = JSON.parse(this.kept.getItem(key)); } catch { /* not ours */ }
      if (talk?.id && talk.messages && talk.settings) found.push(talk);
    }
    return found.sort((a, b) => b.at - a.at);
  }

  begin() {
    this.current = { id: newId(), at: Date.now(), title: "New conversation", messages: {}, leaf: null, settings: this.current?.settings ?? {} };
    this.all.unshift(this.current);
    return this.current;
  }

  choose(id) {
    this.current = this.all.find((talk) => talk.id === id) ?? this.current;
  }

  drop() {
    this.kept?.removeItem(PREFIX + this.current.id);
    this.all = this.all.filter((talk) => talk !== this.current);
    this.current = this.all[0] ?? this.begin();
  }

  add(parent, role, text) {
    const message = { id: newId(), parent, role, text, at: Date.now() };
    this.current.messages[message.id] = message;
    this.current.leaf = message.id;
    if (Object.keys(this.current.messages).length === 1) this.current.title = text.slice(0, 60);
    return message;
  }

  // The messages from the first to the leaf.
  path(leaf = this.current.leaf) {
    const found = [];
    for (let message = this.current.messages[leaf]; message; message = this.current.messages[message.parent]) found.unshift(message);
    return found;
  }

  branches(message) {
    return Object.values(this.current.messages).filter((each) => each.parent === message.parent).sort((a, b) => a.at - b.at);
  }

  // Go to a branch: to its newest end.
  go(message) {
    let leaf = message;
    for (;;) {
      const children = Object.values(this.current.messages).filter((each) => each.parent === leaf.id);
      if (!children.length) break;
      leaf = children.reduce((newest, each) => (each.at > newest.at ? each : newest));
    }
    this.current.leaf = leaf.id;
  }

  // Keep the conversation. `full` says whether the browser's store has no room for it: then it lives until the page is closed.
  save(talk = this.current) {
    if (!Object.keys(talk.messages).length && !Object.keys(talk.settings).length) return;
    try {
      this.kept?.setItem(PREFIX + talk.id, JSON.stringify(talk));
      this.full = false;
    } catch { this.full = true; }
  }
}
