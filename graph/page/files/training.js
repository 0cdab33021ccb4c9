// A training: its losses so far, and its schedule with the costs that were measured.

import { draw, make } from "./dom.js";
import { fixed, share, time } from "./numbers.js";

const WIDTH = 600, HIGH = 150, ROW = 26, LABEL = 84;
const KINDS = { F: ["forward", "forward"], B: ["backward", "backward"], I: ["backward", "gradients of inputs"], W: ["backward", "gradients of weights"], U: ["update", "update"] };

export class Training {
  constructor(box) {
    this.box = box;
  }

  update(training) {
    const known = `${training.step} ${training.validation?.length} ${training.schedule?.measured}`;
    if (known === this.known) return;
    this.known = known;
    this.box.replaceChildren(
      make("h2", {}, "Losses"),
      make("p", {}, training.step === undefined ? "No step has ended yet." : `Step ${training.step} of ${training.steps}: loss ${fixed(training.loss, 4)}, `
        + `gradients’ norm ${fixed(training.norm, 3)}, ${fixed(training.seconds, 2)} s`
        + `${training.validation_loss === undefined ? "" : `; validation ${fixed(training.validation_loss, 4)}`}`),
      losses(training),
      ...(training.schedule ? [make("h2", {}, `Schedule: ${training.schedule.name}`),
        make("p", {}, `Waiting is ${share(training.schedule.bubble)} of the time with these costs; ${share(training.schedule.measured)} was measured.`),
        schedule(training.schedule)] : []));
  }
}

function losses(training) {
  const points = training.losses ?? [], held = training.validation ?? [];
  const all = [...points, ...held].map((point) => point[1]).filter(Number.isFinite);
  const most = Math.max(...all, 1e-9), least = Math.min(...all, most);
  const last = Math.max(training.steps ?? 1, 1);
  const place = ([step, loss]) => `${(WIDTH * step / last).toFixed(1)},${(HIGH - 8 - (HIGH - 26) * (loss - least) / Math.max(most - least, 1e-9)).toFixed(1)}`;
  const line = (points, kind) => draw("polyline", { points: points.filter((point) => Number.isFinite(point[1])).map(place).join(" "), class: kind });
  return draw("svg", { class: "loss", viewBox: `0 0 ${WIDTH} ${HIGH}`, role: "img", "aria-label": `Losses from ${most.toFixed(3)} to ${least.toFixed(3)}` },
    line(points, "steps"), line(held, "held"), draw("text", { x: 4, y: 12 }, most.toFixed(3)), draw("text", { x: 4, y: HIGH - 1 }, least.toFixed(3)));
}

function schedule({ stages, actions }) {
  const ends = Math.max(...actions.map((action) => action[2]), 1e-9);
  const scale = (WIDTH - LABEL) / ends;
  const svg = draw("svg", { class: "schedule", viewBox: `0 0 ${WIDTH} ${stages.length * ROW + 16}`, role: "img", "aria-label": `One round of ${stages.length} stages takes ${time(ends)}` });
  stages.forEach((name, at) => svg.append(draw("text", { class: "label", x: 0, y: at * ROW + 17 }, name)));
  for (const [stage, began, ended, kind, batch] of actions) {
    const [style, words] = KINDS[kind] ?? ["update", kind];
    const width = Math.max(0.5, (ended - began) * scale - 0.6);
    svg.append(draw("rect", { class: style, x: LABEL + began * scale, y: stage * ROW + 3, width, height: ROW - 6, rx: 2 },
      draw("title", {}, `${stages[stage]}: ${words}${batch >= 0 ? ` of micro-batch ${batch}` : ""}, ${time(ended - began)}`)));
    if (batch >= 0 && width > 9) svg.append(draw("text", { x: LABEL + began * scale + width / 2, y: stage * ROW + 17, "text-anchor": "middle" }, String(batch)));
  }
  svg.append(draw("text", { class: "label", x: LABEL, y: stages.length * ROW + 13 }, "0"),
    draw("text", { class: "label", x: WIDTH, y: stages.length * ROW + 13, "text-anchor": "end" }, time(ends)));
  return svg;
}
