// Draw the graph once, and then only change what differs: figures of actors and edges, and the way of the newest token.

import { draw, mark, pressable, say } from "./dom.js";
import { HEIGHT, WIDTH, layout } from "./layout.js";
import { bytes, rate, share, time } from "./numbers.js";

const LIT_MS = 190;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

export class GraphView {
  constructor(box, pick) {
    this.box = box;
    this.pick = pick;
    this.nodes = new Map();
    this.edges = new Map();
    this.lit = [];
    this.playing = [];
  }

  show(graph) {
    this.graph = graph;
    this.nodes.clear();
    this.edges.clear();
    const placed = layout(graph);
    const svg = draw("svg", { viewBox: `0 0 ${placed.width} ${placed.height}`, role: "group", "aria-label": `Graph ${graph.name}` });
    svg.append(draw("defs", {}, draw("marker", {
      id: "arrow", viewBox: "0 0 8 8", refX: 4, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto-start-reverse",
    }, draw("path", { d: "M0 0L8 4L0 8z", class: "arrow" }))));
    for (const edge of placed.edges) svg.append(this.edge(edge));
    for (const node of placed.nodes.values()) svg.append(this.node(node, graph.actors[node.name]));
    // a large graph is scrolled rather than made too small to read
    svg.style.minWidth = `${Math.round(placed.width * 0.62)}px`;
    svg.style.minHeight = `${Math.round(placed.height * 0.62)}px`;
    this.box.replaceChildren(svg);
  }

  edge(edge) {
    const words = document.createTextNode("");
    const spark = draw("path", { class: "spark", d: edge.path, pathLength: 100, "stroke-dasharray": "14 200", "stroke-dashoffset": 14 });
    const group = draw("g", { class: "edge", role: "button", tabindex: 0, "aria-label": `Edge ${edge.name}`, "data-edge": edge.name, "data-idle": true },
      draw("title", {}, `${edge.name}: ${edge.tensor}, ${edge.wire}`),
      draw("path", { class: "line", d: edge.path, "marker-end": "url(#arrow)", "stroke-dasharray": edge.back ? "5 4" : false }),
      spark, draw("path", { class: "hit", d: edge.path }),
      draw("text", { x: edge.label.x, y: edge.label.y, "text-anchor": edge.label.anchor }, words));
    pressable(group, () => this.pick({ kind: "edge", edge }));
    this.edges.set(edge.edge, { group, words, spark, edge });
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
    const halo = draw("rect", { class: "halo", x: x - 3, y: y - 3, width: WIDTH + 6, height: HEIGHT + 6, rx: 13 });
    const group = draw("g", { class: "node", role: "button", tabindex: 0, "data-actor": name, "data-state": actor ? "starting" : "running" },
      draw("rect", { class: "card", x, y, width: WIDTH, height: HEIGHT, rx: 10 }), halo,
      draw("circle", { cx: x + 16, cy: y + 17, r: 4.5 }),
      draw("text", { class: "name", x: x + 27, y: y + 21.5 }, name), " ",
      draw("text", { class: "end", x: x + WIDTH - 12, y: y + 21 }, texts.state), " ",
      draw("text", { x: x + 12, y: y + 38 }, what), " ",
      draw("text", { class: "end", x: x + WIDTH - 12, y: y + 38 }, texts.rate), " ",
      draw("text", { x: x + 12, y: y + 54 }, texts.queue), " ",
      draw("text", { class: "end", x: x + WIDTH - 12, y: y + 54 }, texts.cache),
      actor ? [draw("rect", { class: "track", x: x + 12, y: y + 61, width: half, height: 4, rx: 2 }), busy,
        draw("rect", { class: "track", x: x + 22 + half, y: y + 61, width: half, height: 4, rx: 2 }), cache] : []);
    pressable(group, () => this.pick({ kind: "actor", name, actor }));
    this.nodes.set(name, { group, texts, busy, cache, halo, half, actor, what });
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
      else this.updateGateway(node, frame, rates);
    }
    for (const edge of frame.trace?.edges ?? []) this.updateEdge(edge);
    this.light(frame.trace?.token);
  }

  updateActor(name, node, hosts, rates, frame) {
    const own = hosts.map((host) => rates[host.label]).filter(Boolean);
    const sum = (figure, of) => of.reduce((total, each) => total + figure(each), 0);
    const busy = own.length ? sum((each) => each.busy, own) / hosts.length : 0;
    const capacity = sum((host) => host.capacity_tokens ?? 0, hosts);
    const cache = capacity ? sum((host) => frame.held_tokens[host.label] ?? 0, hosts) / capacity : null;
    const state = hosts.find((host) => host.state !== "running")?.state ?? (hosts.length ? "running" : "starting");
    const restarts = sum((host) => host.epoch - 1, hosts);
    const stepping = Math.max(0, ...hosts.map((host) => host.stepping_s));
    mark(node.group, "data-state", state);
    say(node.texts.state, state === "running" ? `${share(busy)} busy` : state);
    say(node.texts.rate, own.length ? `${rate(sum((each) => each.tokens_s, own))} tok/s` : "");
    const queued = `queue ${sum((host) => host.queued, hosts)}`;
    say(node.texts.queue, stepping > 0.5 ? `in one step for ${stepping.toFixed(1)} s` : restarts ? `${queued} · restarts ${restarts}` : queued);
    say(node.texts.cache, cache === null ? "" : `KV ${share(cache)}`);
    mark(node.busy, "width", Math.round(node.half * busy));
    mark(node.cache, "width", Math.round(node.half * (cache ?? 0)));
    nameOf(node, name);
  }

  updateGateway(node, frame, rates) {
    say(node.texts.state, `${frame.sessions} sessions`);
    say(node.texts.rate, rates["gateway.0"] ? `${rate(rates["gateway.0"].tokens_s)} tok/s` : "");
    say(node.texts.queue, frame.waiting === undefined ? "" : `waiting ${frame.waiting}`);
    nameOf(node, "gateway");
  }

  updateEdge(figures) {
    const own = this.edges.get(figures.edge);
    if (!own) return;
    say(own.words, `${time(figures.p50_us)} · p99 ${time(figures.p99_us)} · ${rate(figures.messages_s)}/s · ${bytes(figures.bytes_s)}/s`);
    mark(own.group, "data-idle", null);
    mark(own.group, "data-waits", figures.waited > 0.1);
    mark(own.group, "aria-label", `Edge ${own.edge.name}: ${own.words.data}${figures.waited > 0.1 ? `, ${share(figures.waited)} waited for credit` : ""}`);
  }

  // Show the way of a token once, slowed down, in the proportions of its times.
  light(token) {
    if (!token || (this.shown && this.shown.session === token.session && this.shown.position === token.position)) return;
    this.shown = token;
    for (const each of this.lit) each.classList.remove("lit");
    for (const each of this.playing) each.cancel();
    this.lit = [];
    this.playing = [];
    const slow = LIT_MS / Math.max(token.ms, 1e-3);
    const names = new Map([...this.edges.values()].map((each) => [each.edge.name, each]));
    for (const part of token.path) {
      const edge = names.get(part.where);
      const node = edge ? null : this.nodes.get(part.where.replace(/\.\d+$/, ""));
      if (edge && part.cause !== "wire") continue;
      if (!edge && !(node && part.cause === "compute")) continue;
      if (calm.matches) {
        this.lit.push(edge ? edge.group : node.group);
        continue;
      }
      const timing = { delay: part.at_ms * slow, duration: Math.max(part.ms * slow, 45) };
      this.playing.push(edge
        ? edge.spark.animate([{ strokeDashoffset: 14, opacity: 1 }, { strokeDashoffset: -100, opacity: 1 }], timing)
        : node.halo.animate([{ opacity: 1 }, { opacity: 0.9, offset: 0.8 }, { opacity: 0 }], { ...timing, duration: timing.duration + 60 }));
    }
    for (const each of this.lit) each.classList.add("lit");
    return slow;
  }

  mark(picked) {
    for (const [name, node] of this.nodes) mark(node.group, "data-picked", picked?.kind === "actor" && picked.name === name);
    for (const [number, edge] of this.edges) mark(edge.group, "data-picked", picked?.kind === "edge" && picked.edge.edge === number);
  }
}

// What can be read is in what a screen reader says, in the same order.
function nameOf({ group, texts, what }, name) {
  mark(group, "aria-label", `${name} ${texts.state.data} ${what} ${texts.rate.data} ${texts.queue.data} ${texts.cache.data}`);
}

function describe(actor) {
  const layers = actor.layers ? ` ${actor.layers[0]}–${actor.layers[1]}` : "";
  return [`${actor.kind}${layers}`, actor.device, actor.host ? `in ${actor.host}` : null, actor.replicas > 1 ? `× ${actor.replicas}` : null]
    .filter(Boolean).join(" · ");
}
