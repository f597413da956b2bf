/** Shows the kept renders on an AtlasVid Resume node: age, size, step, and a button to delete each. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const RESUME = "AtlasVidResume";
const HEIGHT = 130;
const GB = 1e9;
const REFRESH_MS = 200;
const SETTLED_MS = 1500; // after a prompt the server settles what becomes of its renders

const STYLE = `
.atlasvid-renders { font: 12px/1.4 sans-serif; color: var(--input-text, #ddd); overflow: auto;
  background: var(--comfy-input-bg, #222); border-radius: 6px; padding: 6px; box-sizing: border-box;
  contain: size; min-height: ${HEIGHT}px; } /* many renders scroll, they do not stretch the node */
.atlasvid-renders table { width: 100%; border-collapse: collapse; }
.atlasvid-renders td { padding: 1px 4px; vertical-align: top; white-space: nowrap; }
.atlasvid-renders td:first-child { width: 100%; white-space: normal; overflow-wrap: anywhere; }
.atlasvid-renders button { font: inherit; color: inherit; background: none; cursor: pointer;
  border: 1px solid currentColor; border-radius: 4px; padding: 0 5px; }
.atlasvid-renders .none, .atlasvid-renders .problem { margin: 4px; opacity: 0.8; }
.atlasvid-renders .problem { color: #ff6b6b; opacity: 1; }
`;

/** The lists of all open graphs. */
const views = new Set();

function element(tag, name, ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children);
  return made;
}

/** Seconds in one unit: 40 s, 5 min, 3 h, 2 d. */
function age(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

function size(bytes) {
  return bytes < 0.1 * GB ? `${Math.ceil(bytes / 1e6)} MB` : `${(bytes / GB).toFixed(1)} GB`;
}

/** Asks the server, with another method to change something first, and shows its answer everywhere. */
async function ask(path = "", method = "GET") {
  if (!views.size) return;
  let answer;
  try {
    answer = await (await api.fetchApi(`/atlasvid/renders${path}`, { method })).json();
  } catch {
    answer = { error: "The server did not answer.", renders: [] };
  }
  for (const view of views) view.show(answer);
}

let timer = 0;

/** Asks once, a moment after the last call. */
function refresh(delay = REFRESH_MS) {
  clearTimeout(timer);
  timer = setTimeout(ask, delay);
}

/** The list of kept renders on one node. */
class RenderList {
  constructor(node) {
    this.node = node;
    this.box = element("div", "atlasvid-renders", "…");
    this.widget = node.addDOMWidget("renders_view", "atlasvid-renders", this.box, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
      getValue: () => "",
      setValue: () => {},
    });
    this.widget.serialize = false; // neither in the workflow file nor in the prompt
  }

  show({ error, renders }) {
    const parts = renders.length
      ? [element("table", "", ...renders.map((render) => this.row(render)))]
      : [element("div", "none", "No renders are kept.")];
    if (error) parts.unshift(element("div", "problem", error));
    this.box.replaceChildren(...parts);
  }

  row(render) {
    const button = element("button", "", "delete");
    button.disabled = render.in_use;
    button.title = render.in_use ? "This render is being made." : "Delete the kept steps of this render.";
    button.onclick = () => ask(`/${render.id}`, "DELETE");
    const done = render.finished ? "finished" : `step ${render.step} of ${render.steps}`;
    const cells = [render.name, done, size(render.bytes), age(render.age), button];
    return element("tr", "", ...cells.map((cell) => element("td", "", cell)));
  }
}

function addRenderList(node) {
  const view = new RenderList(node);
  node.atlasvidRenders = view;
  views.add(view);
  const { onRemoved } = node;
  node.onRemoved = function (...given) {
    onRemoved?.apply(this, given);
    views.delete(view);
  };
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, 340), Math.max(height, node.size[1])]);
  refresh();
}

app.registerExtension({
  name: "AtlasVid.Renders",
  setup() {
    document.head.append(element("style", "", STYLE));
    api.addEventListener("executing", () => refresh());
    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
      api.addEventListener(end, () => refresh(SETTLED_MS));
  },
  nodeCreated(node) {
    if (node.comfyClass === RESUME) addRenderList(node);
  },
});
