// Turn Markdown into elements. What a model writes is never parsed as HTML, and no picture is fetched.

import { make } from "./dom.js";

const HEADING = /^(#{1,6})\s+(.*?)\s*#*$/, DEEPEST = 24;

// Return the blocks of a text: each a string of lines that belong together. A fence that is open goes to the end.
export function blocks(text) {
  const found = [];
  let lines = [], fence = "";
  const end = () => { if (lines.length) found.push(lines.join("\n")); lines = []; };
  for (const line of text.split("\n")) {
    const mark = /^\s{0,3}(```+|~~~+)/.exec(line)?.[1];
    if (fence) {
      lines.push(line);
      if (mark && mark[0] === fence[0] && mark.length >= fence.length && line.trim() === mark) { fence = ""; end(); }
    } else if (mark) {
      end();
      fence = mark;
      lines.push(line);
    } else if (HEADING.test(line)) {
      end();
      found.push(line);
    } else if (!line.trim()) end();
    else lines.push(line);
  }
  end();
  return found;
}

// Show a text in an element, and make again only the blocks that changed.
export function show(element, text) {
  const wanted = blocks(text);
  const had = element.blocks ?? [];
  if (!had.length) element.replaceChildren();
  for (let at = 0; at < Math.max(wanted.length, had.length); at++) {
    if (at >= wanted.length) element.lastElementChild.remove();
    else if (at >= had.length) element.append(block(wanted[at], 0));
    else if (wanted[at] !== had[at]) element.children[at].replaceWith(block(wanted[at], 0));
  }
  element.blocks = wanted;
}

function block(source, depth) {
  const lines = source.split("\n");
  const fence = /^\s{0,3}(```+|~~~+)\s*([^`]*)$/.exec(lines[0]);
  if (fence) {
    const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence[1]);
    const code = lines.slice(1, closed ? -1 : undefined).join("\n");
    return make("pre", { "data-language": fence[2].trim() || false, tabindex: 0 }, make("code", {}, code));
  }
  const heading = HEADING.exec(source);
  if (heading) return make(`h${Math.min(6, heading[1].length + 2)}`, {}, inline(heading[2]));
  if (depth > DEEPEST) return make("p", {}, source);
  if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(source)) return make("hr");
  if (lines.every((line) => /^\s*>/.test(line))) {
    return make("blockquote", {}, blocks(lines.map((line) => line.replace(/^\s*> ?/, "")).join("\n")).map((inner) => block(inner, depth + 1)));
  }
  if (lines.length > 1 && lines[0].includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[1])) return table(lines);
  const first = ITEM.exec(lines[0]);
  if (first) return list(lines, depth);
  const starts = lines.findIndex((line) => ITEM.test(line));
  if (starts > 0) return make("div", {}, make("p", {}, text(lines.slice(0, starts))), list(lines.slice(starts), depth));
  return make("p", {}, text(lines));
}

const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;

function list(lines, depth) {
  const [, indent, mark] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent.length + 1) items.push([found[3]]);
    else items.at(-1).push(line);
  }
  const made = items.map(([head, ...rest]) => {
    const starts = rest.findIndex((line) => ITEM.test(line));
    const own = starts < 0 ? rest : rest.slice(0, starts);
    const inner = starts < 0 ? null : depth > DEEPEST ? rest.slice(starts).join("\n") : list(rest.slice(starts), depth + 1);
    return make("li", {}, text([head, ...own]), inner);
  });
  const number = parseInt(mark, 10);
  return Number.isNaN(number) ? make("ul", {}, made) : make("ol", { start: number === 1 ? false : number }, made);
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => inline(cell.trim()));
  const row = (kind) => (line) => make("tr", {}, cells(line).map((cell) => make(kind, {}, cell)));
  return make("table", {}, make("thead", {}, row("th")(lines[0])), make("tbody", {}, lines.slice(2).map(row("td"))));
}

function text(lines) {
  return lines.flatMap((line, at) => {
    const made = inline(line.trim());
    return at < lines.length - 1 ? [...made, / {2}$|\\$/.test(line) ? make("br") : " "] : made;
  });
}

const INLINE = [
  [/^`+/, null],
  [/^\*\*(?=\S)([^]*?\S)\*\*/, (found) => make("strong", {}, inline(found[1]))],
  [/^__(?=\S)([^]*?\S)__(?!\w)/, (found) => make("strong", {}, inline(found[1]))],
  [/^\*(?=[^\s*])([^*]*[^\s*])\*/, (found) => make("em", {}, inline(found[1]))],
  [/^_(?=[^\s_])([^_]*[^\s_])_(?!\w)/, (found) => make("em", {}, inline(found[1]))],
  [/^~~(?=\S)([^]*?\S)~~/, (found) => make("s", {}, inline(found[1]))],
  [/^!?\[([^\[\]]{0,999})\]\(\s{0,9}<?([^\s()<>]{1,1999})>?(?:\s[^()]{0,999})?\)/, (found) => link(found[1], found[2])],
  [/^<(https?:\/\/[^\s<>]+)>/, (found) => link(found[1], found[1])],
];

function inline(source) {
  const made = [];
  let plain = "", before = "";
  const end = () => { if (plain) made.push(plain); plain = ""; };
  for (let at = 0; at < source.length;) {
    const rest = source.slice(at);
    const starts = "`*_~[!<".includes(rest[0]) && !(rest[0] === "_" && /\w/.test(before));
    const taken = starts ? special(rest) : null;
    if (taken) {
      end();
      made.push(taken.element);
      before = source[at + taken.length - 1];
      at += taken.length;
      continue;
    }
    const escaped = rest[0] === "\\" && /[\\`*_{}\[\]()#+\-.!|~<>]/.test(rest[1] ?? "");
    plain += escaped ? rest[1] : rest[0];
    before = rest[0];
    at += escaped ? 2 : 1;
  }
  end();
  return made;
}

function special(rest) {
  const ticks = /^`+/.exec(rest)?.[0];
  if (ticks) {
    const ends = rest.indexOf(ticks, ticks.length);
    if (ends < 0) return null;
    return { element: make("code", {}, rest.slice(ticks.length, ends)), length: ends + ticks.length };
  }
  for (const [form, element] of INLINE.slice(1)) {
    const found = form.exec(rest);
    if (found) return { element: element(found), length: found[0].length };
  }
  return null;
}

function link(words, address) {
  if (!/^https?:\/\//i.test(address)) return document.createTextNode(`${words} (${address})`);
  return make("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, words || address);
}
