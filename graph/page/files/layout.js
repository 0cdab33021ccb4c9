// Place the layers of a graph: downwards, and in further columns, up and down in turn, if there are many.

export const WIDTH = 232, HEIGHT = 72;
const GAP_X = 36, GAP_Y = 44, ROWS = 7, BETWEEN = 230, MARGIN = 392, AROUND = 176, BESIDE = 12, LINE = 16;

export function layout(graph) {
  const nodes = new Map();
  let left = MARGIN;
  const columns = [];
  for (let at = 0; at < graph.layers.length; at += ROWS) columns.push(graph.layers.slice(at, at + ROWS));
  columns.forEach((layers, column) => {
    const wide = Math.max(...layers.map((layer) => layer.length * (WIDTH + GAP_X) - GAP_X));
    layers.forEach((layer, row) => {
      const y = (column % 2 ? ROWS - 1 - row : row) * (HEIGHT + GAP_Y);
      const own = layer.length * (WIDTH + GAP_X) - GAP_X;
      layer.forEach((name, place) => nodes.set(name, {
        name, column, x: left + (wide - own) / 2 + place * (WIDTH + GAP_X), y: y + 14, layer: at(graph, name),
      }));
    });
    left += wide + BETWEEN;
  });
  const bottom = Math.max(...[...nodes.values()].map((node) => node.y)) + HEIGHT + 22;
  const there = graph.edges.filter((edge) => nodes.has(edge.source) && nodes.has(edge.target));
  const pairs = new Map();
  for (const edge of there) {
    const pair = `${edge.source} ${edge.target}`;
    pairs.has(pair) ? pairs.get(pair).push(edge) : pairs.set(pair, [edge]);
  }
  const around = new Map();
  const edges = [];
  for (const [pair, own] of pairs) {
    own.forEach((edge, at) => edges.push({ ...edge, ...way(nodes.get(edge.source), nodes.get(edge.target), at, own.length, pair, around) }));
  }
  return { nodes, edges, width: left - BETWEEN + MARGIN, height: bottom };
}

const at = (graph, name) => graph.layers.findIndex((layer) => layer.includes(name));

function way(from, to, beside, count, pair, around) {
  const shift = beside * BESIDE;
  if (to.layer === from.layer + 1 && from.column === to.column) {
    const down = to.y > from.y;
    const x1 = from.x + WIDTH / 2 + shift, x2 = to.x + WIDTH / 2 + shift;
    const y1 = down ? from.y + HEIGHT : from.y, y2 = down ? to.y - 6 : to.y + HEIGHT + 6, middle = (y1 + y2) / 2;
    return { path: `M${x1} ${y1}C${x1} ${middle} ${x2} ${middle} ${x2} ${y2}`,
      label: { x: (x1 + x2) / 2 + 10 + BESIDE * (count - 1 - beside), y: middle + 4 + LINE * (beside - (count - 1) / 2), anchor: "start" } };
  }
  if (to.layer === from.layer + 1) {
    const x1 = from.x + WIDTH, x2 = to.x - 6, y1 = from.y + HEIGHT / 2 + shift, y2 = to.y + HEIGHT / 2 + shift, middle = (x1 + x2) / 2;
    return { path: `M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`,
      label: { x: middle, y: Math.min(y1, y2) - 9 - LINE * beside, anchor: "middle" } };
  }
  // an edge that skips layers, or comes back, goes around, beyond the words beside the others: left and right in turn
  if (!around.has(pair)) around.set(pair, { right: around.size % 2 === 0, out: AROUND + 46 * (around.size >> 1) });
  const { right, out } = around.get(pair);
  const y1 = from.y + HEIGHT / 2 + 6 + shift / 2, y2 = to.y + HEIGHT / 2 - 6 - shift / 2, edge = right ? WIDTH : 0, sign = right ? 1 : -1;
  const x1 = from.x + edge, x2 = to.x + edge + 6 * sign;
  const far = (beside) => (right ? Math.max(x1, x2) : Math.min(x1, x2)) + sign * (out + 1.4 * BESIDE * beside);
  return { path: `M${x1} ${y1}C${far(beside)} ${y1} ${far(beside)} ${y2} ${x2} ${y2}`,
    label: { x: (x1 + x2) / 8 + far(count - 1) * 0.75 + 7 * sign, y: (y1 + y2) / 2 + 4 + LINE * (beside - (count - 1) / 2), anchor: right ? "start" : "end" } };
}
