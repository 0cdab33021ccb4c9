// Draw the time between the tokens of an answer: a bar for each token. A click, or the arrow keys, choose one.

import { make } from "./dom.js";
import { ms } from "./numbers.js";

const LEAST_WIDTH = 2, SCALE_MS = 4;

export class Strip {
  constructor(tokens, choose) {
    this.tokens = tokens;
    this.choose = choose;
    this.chosen = -1;
    this.element = make("canvas", {
      class: "strip", role: "slider", tabindex: 0, "aria-label": "Time of each token", "aria-valuemin": 1,
      "aria-valuemax": tokens.length, "aria-valuenow": 1, "aria-valuetext": this.words(0), title: "Time before each token; click one",
    });
    this.element.addEventListener("click", (event) => this.pick(Math.floor(event.offsetX / this.element.clientWidth * tokens.length)));
    this.element.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageDown: 10, PageUp: -10 }[event.key];
      const to = event.key === "Home" ? 0 : event.key === "End" ? tokens.length - 1 : step ? this.chosen + step : null;
      if (to === null) return;
      event.preventDefault();
      this.pick(to);
    });
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  words(at) {
    const token = this.tokens[at];
    return token ? `token ${at + 1}, ${JSON.stringify(token.token)}, ${ms(token.gap)}` : "";
  }

  pick(at) {
    this.mark(Math.max(0, Math.min(this.tokens.length - 1, at)));
    this.choose(this.chosen);
  }

  mark(at) {
    this.chosen = at;
    this.element.setAttribute("aria-valuenow", at + 1);
    this.element.setAttribute("aria-valuetext", this.words(at));
    this.draw();
  }

  draw() {
    const { element, tokens } = this;
    const scale = devicePixelRatio || 1, wide = element.clientWidth, high = element.clientHeight;
    if (!wide) return;
    element.width = wide * scale;
    element.height = high * scale;
    const context = element.getContext("2d");
    context.scale(scale, scale);
    const style = getComputedStyle(element);
    const gaps = tokens.map((token) => token.gap);
    const most = Math.log1p(Math.max(...gaps, 1) / SCALE_MS);
    const step = wide / tokens.length;
    gaps.forEach((gap, at) => {
      const tall = Math.max(2, (high - 4) * Math.log1p(gap / SCALE_MS) / most);
      context.fillStyle = style.getPropertyValue(at === this.chosen ? "--glow" : "--busy");
      context.fillRect(at * step, high - tall, Math.max(step - (step > 4 ? 1 : 0), Math.min(LEAST_WIDTH, step)), tall);
    });
  }
}
