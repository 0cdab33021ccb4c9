// Keep conversations in the browser. Each is a tree: an edit or another answer is a further branch.

const STORE = "ranvier-talks", MOST = 50;

const newId = () => crypto.getRandomValues(new Uint32Array(2)).join("");

export class Talks {
  constructor() {
    try { this.all = JSON.parse(localStorage.getItem(STORE)) ?? []; } catch { this.all = []; }
    if (!Array.isArray(this.all) || !this.all.every((talk) => talk?.id && talk.messages)) this.all = [];
    this.current = this.all[0] ?? this.begin();
  }

  begin() {
    this.current = { id: newId(), title: "New conversation", messages: {}, leaf: null, settings: this.current?.settings ?? {} };
    this.all.unshift(this.current);
    return this.current;
  }

  choose(id) {
    this.current = this.all.find((talk) => talk.id === id) ?? this.current;
  }

  drop() {
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

  save() {
    this.all.length = Math.min(this.all.length, MOST);
    const kept = (name, value) => (name === "live" ? undefined : value);
    while (this.all.length) {
      try { return localStorage.setItem(STORE, JSON.stringify(this.all, kept)); } catch {
        if (this.all.length === 1) return; // one conversation that is larger than the browser's store lives until the page is closed
        this.all.splice(this.all.lastIndexOf(this.all.findLast((talk) => talk !== this.current)), 1);
      }
    }
  }
}
