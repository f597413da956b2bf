/** Draws a plan as SVG: frames to scale, and windows and proxy frames over time. */

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 360;
const FRAME_HEIGHT = 130;
const MOST_TICKS = 180; // closer ones would be one bar
const COLOURS = { target: "#a1309b", proxy: "#5a9e5a", even: "#c9a0dc", odd: "#e0b050", text: "#bbb" };

function svg(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

function label(x, y, text, anchor = "start") {
  return svg("text", { x, y, fill: COLOURS.text, "font-size": 10, "text-anchor": anchor }, text);
}

function line(x1, y1, x2, y2, stroke, more = {}) {
  return svg("line", { x1, y1, x2, y2, stroke, "stroke-width": 0.7, ...more });
}

/** Target frame with its windows (even blocks drawn through, odd ones dashed) and the proxy. */
function frames({ target, proxy, windows }) {
  const scale = Math.min((WIDTH - 20) / target.width, FRAME_HEIGHT / target.height);
  const group = svg("g", { transform: `translate(${(WIDTH - target.width * scale) / 2}, 16)` });
  const [width, height] = [target.width * scale, target.height * scale];
  const frame = { x: 0, y: 0, width, height, fill: "none", stroke: COLOURS.target };
  group.append(svg("rect", { ...frame, class: "target" }));
  for (const [parity, colour] of [[0, COLOURS.even], [1, COLOURS.odd]]) {
    const dashes = parity ? { "stroke-dasharray": "2 3" } : {};
    for (const x of windows.columns[parity].slice(1, -1).map((cut) => cut * scale))
      group.append(line(x, 0, x, height, colour, { ...dashes, class: "window" }));
    for (const y of windows.rows[parity].slice(1, -1).map((cut) => cut * scale))
      group.append(line(0, y, width, y, colour, { ...dashes, class: "window" }));
  }
  group.append(
    svg("rect", {
      x: 0,
      y: height - proxy.height * scale,
      width: proxy.width * scale,
      height: proxy.height * scale,
      fill: COLOURS.proxy,
      "fill-opacity": 0.75,
      class: "proxy",
    }),
    label(0, -5, `${target.width} x ${target.height}`),
    label(width, -5, `proxy ${proxy.width} x ${proxy.height}`, "end"),
  );
  return [group, 16 + height];
}

/** The clip from left to right: a bar of the target cut into windows, ticks of the proxy's frames. */
function timeline({ target, proxy, windows }, top) {
  const span = WIDTH - 20;
  const group = svg("g", { transform: `translate(10, ${top})` });
  const bar = { x: 0, y: 0, width: span, height: 12, fill: COLOURS.target, "fill-opacity": 0.35 };
  group.append(svg("rect", bar));
  for (const [parity, colour] of [[0, COLOURS.even], [1, COLOURS.odd]])
    for (const cut of windows.frames[parity].slice(1, -1)) {
      const x = (cut / windows.latent_frames) * span;
      group.append(line(x, parity * 6, x, parity * 6 + 6, colour, { class: "cut" }));
    }
  const step = span / Math.max(1, proxy.frames - 1);
  for (let i = 0; i < proxy.frames; i += Math.ceil(proxy.frames / MOST_TICKS))
    group.append(line(i * step, 15, i * step, 21, COLOURS.proxy, { "stroke-width": 1 }));
  group.append(
    label(0, 33, `${target.frames} frames, ${target.seconds.toFixed(1)} s at ${target.fps} fps`),
    label(span, 33, `proxy: ${proxy.frames}, every ${ordinal(proxy.stride)}`, "end"),
  );
  return group;
}

function ordinal(n) {
  return { 1: "frame", 2: "2nd", 3: "3rd" }[n] ?? `${n}th`;
}

/** The picture of a plan as the server describes it. */
export function drawPlan(plan) {
  const [picture, bottom] = frames(plan);
  const height = bottom + 48;
  const root = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, class: "atlasvid-picture" });
  root.append(picture, timeline(plan, bottom + 10));
  return root;
}
