// Draw the graph once, and then only change what differs: figures of actors and edges, and the way of the newest token.

import { draw, mark, pressable, say } from "./dom.js";
import { HEIGHT, WIDTH, layout } from "./layout.js";
import { bytes, rate, share, time } from "./numbers.js";

const LIT_MS = 190, LEAST_MS = 50;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class GraphView {
  constructor(box, pick) {
    this.box = box;
    this.pick = pick;
    this.nodes = new Map();
    this.edges = new Map();
    this.journey = null;
  }

  show(graph) {
    this.graph = graph;
    this.nodes.clear();
    this.edges.clear();
    this.named = new Map();
    const placed = layout(graph);
    const svg = draw("svg", { viewBox: `0 0 ${placed.width} ${placed.height}`, role: "group", "aria-label": `Graph ${graph.name}` });
    svg.append(draw("defs", {}, draw("marker", {
      id: "arrow", viewBox: "0 0 8 8", refX: 4, refY: 4, markerUnits: "userSpaceOnUse", markerWidth: 9, markerHeight: 9, orient: "auto-start-reverse",
    }, draw("path", { d: "M0 0L8 4L0 8z", class: "arrow" }))));
    for (const edge of placed.edges) svg.append(this.edge(edge));
    for (const node of placed.nodes.values()) svg.append(this.node(node, graph.actors[node.name]));
    // a large graph is scrolled rather than made too small to read
    svg.style.minWidth = `${Math.round(placed.width * 0.62)}px`;
    svg.style.minHeight = `${Math.round(placed.height * 0.62)}px`;
    this.box.replaceChildren(svg);
  }

  edge(edge) {
    const words = document.createTextNode(""), id = `edge-${edge.edge}`;
    // its name is what can be read, without a script that keeps a copy
    const group = draw("g", { class: "edge", role: "button", tabindex: 0, "aria-labelledby": `${id} ${id}-words`, "data-edge": edge.name, "data-idle": true },
      draw("title", { id }, `Edge ${edge.name}: ${edge.tensor}, ${edge.wire}`),
      draw("path", { class: "line", d: edge.path, "marker-end": "url(#arrow)", "stroke-dasharray": edge.back ? "5 4" : false }),
      draw("path", { class: "hit", d: edge.path }),
      draw("text", { id: `${id}-words`, x: edge.label.x, y: edge.label.y, "text-anchor": edge.label.anchor }, words));
    pressable(group, (event) => this.pick({ kind: "edge", edge, byKeyboard: event.type === "keydown" }));
    this.edges.set(edge.edge, { group, words, edge });
    this.named.set(edge.name, group);
    return group;
  }

  node(place, actor) {
    const texts = { state: "", rate: "", queue: "", cache: "" };
    for (const name in texts) texts[name] = document.createTextNode("");
    const { x, y, name } = place;
    const half = WIDTH / 2 - 17;
    const busy = draw("rect", { class: "busy", x: x + 12, y: y + 61, width: 0, height: 4, rx: 2 });
    const cache = draw("rect", { class: "cache", x: x + 22 + half, y: y + 61, width: 0, height: 4, rx: 2 });
    const what = actor ? describe(actor) : "requests enter here";
    const ids = ["name", "state", "what", "rate", "queue", "cache"].map((part) => `${name}-${part}`);
    const group = draw("g", { class: "node", role: "button", tabindex: 0, "aria-labelledby": ids.join(" "), "data-actor": name, "data-state": actor ? "starting" : "running" },
      draw("rect", { class: "card", x, y, width: WIDTH, height: HEIGHT, rx: 10 }),
      draw("rect", { class: "halo", x: x - 3, y: y - 3, width: WIDTH + 6, height: HEIGHT + 6, rx: 13 }),
      draw("circle", { cx: x + 16, cy: y + 17, r: 4.5 }),
      draw("text", { id: ids[0], class: "name", x: x + 27, y: y + 21.5 }, name), " ",
      draw("text", { id: ids[1], class: "end", x: x + WIDTH - 12, y: y + 21 }, texts.state), " ",
      draw("text", { id: ids[2], x: x + 12, y: y + 38 }, what), " ",
      draw("text", { id: ids[3], class: "end", x: x + WIDTH - 12, y: y + 38 }, texts.rate), " ",
      draw("text", { id: ids[4], x: x + 12, y: y + 54 }, texts.queue), " ",
      draw("text", { id: ids[5], class: "end", x: x + WIDTH - 12, y: y + 54 }, texts.cache),
      actor ? [draw("rect", { class: "track", x: x + 12, y: y + 61, width: half, height: 4, rx: 2 }), busy,
        draw("rect", { class: "track", x: x + 22 + half, y: y + 61, width: half, height: 4, rx: 2 }), cache] : []);
    pressable(group, (event) => this.pick({ kind: "actor", name, actor, byKeyboard: event.type === "keydown" }));
    this.nodes.set(name, { group, texts, busy, cache, half, actor });
    return group;
  }

  update(frame) {
    const rates = frame.trace?.actors ?? {};
    const byActor = new Map();
    for (const host of frame.hosts) {
      if (host.spare) continue;
      const name = host.label.slice(0, host.label.lastIndexOf("."));
      byActor.has(name) ? byActor.get(name).push(host) : byActor.set(name, [host]);
    }
    for (const [name, node] of this.nodes) {
      if (node.actor) this.updateActor(name, node, byActor.get(name) ?? [], rates, frame);
      else this.updateGateway(node, frame);
    }
    for (const edge of frame.trace?.edges ?? []) this.updateEdge(edge, frame.trace.sample);
    this.light(frame.trace?.token);
  }

  updateActor(name, node, hosts, rates, frame) {
    const own = hosts.map((host) => rates[host.label]).filter(Boolean);
    const sum = (figure, of) => of.reduce((total, each) => total + figure(each), 0);
    const busy = own.length ? sum((each) => each.busy, own) / hosts.length : 0;
    const capacity = sum((host) => host.capacity_tokens ?? 0, hosts);
    const cache = capacity ? sum((host) => frame.held_tokens[host.label] ?? 0, hosts) / capacity : null;
    const state = hosts.find((host) => host.state !== "running")?.state ?? (hosts.length ? "running" : "starting");
    const restarts = frame.restarts?.[name] ?? 0;
    const stepping = Math.max(0, ...hosts.map((host) => host.stepping_s));
    mark(node.group, "data-state", state);
    say(node.texts.state, state === "running" ? `${share(busy)} busy` : state);
    say(node.texts.rate, own.length ? `${rate(sum((each) => each.tokens_s, own))} tok/s` : "");
    const queued = `queue ${sum((host) => host.queued, hosts)}`;
    say(node.texts.queue, stepping > 0.5 ? `in one step for ${stepping.toFixed(1)} s` : restarts ? `${queued} · restarts ${restarts}` : queued);
    say(node.texts.cache, cache === null ? "" : `KV ${share(cache)}`);
    mark(node.busy, "width", Math.round(node.half * busy));
    mark(node.cache, "width", Math.round(node.half * (cache ?? 0)));
  }

  updateGateway(node, frame) {
    say(node.texts.state, frame.sessions === 1 ? "1 session" : `${frame.sessions} sessions`);
    say(node.texts.rate, frame.tokens_s === undefined ? "" : `${rate(frame.tokens_s)} tok/s`);
    say(node.texts.queue, frame.waiting === undefined ? "" : `waiting ${frame.waiting}`);
  }

  updateEdge(figures, sample) {
    const own = this.edges.get(figures.edge);
    if (!own) return;
    mark(own.group, "data-idle", !figures.messages_s);
    mark(own.group, "data-waits", figures.waited > 0.1);
    if (!figures.messages_s) {
      say(own.words, "");
      return;
    }
    say(own.words, `${time(figures.p50_us)} · p99 ${time(figures.p99_us)} · ${rate(figures.messages_s / sample)}/s · ${bytes(figures.bytes_s / sample)}/s`);
  }

  // Show the way of a token once, slowed down, in the proportions of its times: what works at a moment is lit.
  light(token) {
    if (!token || (this.shown?.session === token.session && this.shown.position === token.position)) return;
    this.shown = token;
    this.journey?.end();
    const slow = LIT_MS / Math.max(token.ms, 1e-3);
    const marks = [];
    for (const part of token.path) {
      const edge = this.named.get(part.where);
      const group = edge ?? this.nodes.get(part.where.slice(0, part.where.lastIndexOf(".")))?.group;
      if (!group || part.cause !== (edge ? "wire" : "compute")) continue;
      const began = part.at_ms * slow;
      marks.push([began, group, true], [Math.max(began + part.ms * slow, began + LEAST_MS), group, false]);
    }
    this.journey = new Journey(marks.sort((a, b) => a[0] - b[0]));
  }

  mark(picked) {
    for (const [name, node] of this.nodes) mark(node.group, "data-picked", picked?.kind === "actor" && picked.name === name);
    for (const [number, edge] of this.edges) mark(edge.group, "data-picked", picked?.kind === "edge" && picked.edge.edge === number);
  }
}

class Journey {
  constructor(marks) {
    this.marks = marks;
    this.at = 0;
    this.began = performance.now();
    this.step = this.step.bind(this);
    if (calm.matches) this.go(LIT_MS / 2); else requestAnimationFrame(this.step);
  }

  step(now) {
    this.go(now - this.began);
    if (this.at < this.marks.length) this.next = requestAnimationFrame(this.step);
  }

  go(spent) {
    for (; this.at < this.marks.length && this.marks[this.at][0] <= spent; this.at++) {
      const [, group, lit] = this.marks[this.at];
      group.classList.toggle("lit", lit);
    }
  }

  end() {
    cancelAnimationFrame(this.next);
    for (const [, group] of this.marks) group.classList.remove("lit");
  }
}

function describe(actor) {
  const layers = actor.layers ? ` ${actor.layers[0]}–${actor.layers[1]}` : "";
  return [`${actor.kind}${layers}`, actor.device, actor.host ? `in ${actor.host}` : null, actor.replicas > 1 ? `× ${actor.replicas}` : null]
    .filter(Boolean).join(" · ");
}
