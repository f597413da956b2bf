/** Shows the plan of an AtlasVid Plan node: a picture to scale, and what it will cost. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { drawPlan } from "./plan_picture.js";
import { planQuery } from "./plan_query.js";

const PLAN = "AtlasVidPlan";
const DELAY_MS = 150;
const MEASURING_MS = 2000; // between questions while the server measures the machine
const HEIGHT = 470;

const STYLE = `
.atlasvid-plan { font: 12px/1.4 sans-serif; color: var(--input-text, #ddd); overflow: auto;
  background: var(--comfy-input-bg, #222); border-radius: 6px; padding: 8px; box-sizing: border-box; }
.atlasvid-plan svg { width: 100%; display: block; }
.atlasvid-plan table { width: 100%; border-collapse: collapse; }
.atlasvid-plan td { padding: 1px 4px; vertical-align: top; }
.atlasvid-plan td:first-child { opacity: 0.7; white-space: nowrap; }
.atlasvid-plan .problem { color: #ff6b6b; font-weight: 600; margin: 4px; }
.atlasvid-plan .note { opacity: 0.8; margin: 4px; }
.atlasvid-plan pre { white-space: pre-wrap; margin: 4px; opacity: 0.8; font: inherit; }
.atlasvid-plan.will-not-fit { box-shadow: inset 0 0 0 2px #ff6b6b; }
`;

/** The plan widgets of all open graphs and subgraphs. */
const views = new Set();

/** An element with a class and children (nodes or text). */
function element(tag, name, ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children);
  return made;
}

/** The list of costs. */
function table(rows) {
  const lines = rows.map(([label, value]) =>
    element("tr", "", element("td", "", label), element("td", "", value)),
  );
  return element("table", "", ...lines);
}

/** The plan widget of one node: asks the server after every change and draws the answer. */
class PlanWidget {
  constructor(node) {
    this.node = node;
    this.box = element("div", "atlasvid-plan", "…");
    this.executed = "";
    this.asked = "";
    this.timer = 0;
    this.widget = node.addDOMWidget("plan_view", "atlasvid-plan", this.box, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
      getValue: () => "",
      setValue: () => {},
    });
    this.widget.serialize = false; // neither in the workflow file nor in the prompt
  }

  /** Draws anew once nothing has changed for a moment. */
  refresh() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.draw(), DELAY_MS);
  }

  async draw() {
    if (!this.node.graph) return; // removed meanwhile
    const query = new URLSearchParams(planQuery(this.node)).toString();
    if (query === this.asked) return;
    this.asked = query;
    let plan;
    try {
      plan = await (await api.fetchApi(`/atlasvid/plan?${query}`)).json();
    } catch {
      this.asked = "";
      plan = { error: "The server did not answer." };
    }
    if (query !== this.asked && this.asked) return; // a later question is under way
    this.show(plan);
    if (plan.measured === false) {
      this.asked = "";
      this.timer = setTimeout(() => this.draw(), MEASURING_MS);
    }
  }

  show(plan) {
    this.plan = plan;
    this.box.classList.toggle("will-not-fit", Boolean(plan.error) || plan.fits === false);
    const parts = plan.error
      ? [element("div", "problem", plan.error)]
      : [
          ...plan.problems.map((text) => element("div", "problem", text)),
          drawPlan(plan),
          table(plan.rows),
          ...plan.notes.map((text) => element("div", "note", text)),
        ];
    if (this.executed) parts.push(element("pre", "", this.executed));
    this.box.replaceChildren(...parts);
  }

  /** What the node said when it ran: the plan in words and the shape of the real model. */
  onExecuted(output) {
    this.executed = (output.text ?? []).join("\n");
    this.node.atlasvidShape = output.model_shape?.[0];
    this.node.atlasvidModel = planQuery(this.node).model;
    this.asked = "";
    this.refresh();
  }
}

function addPlanWidget(node) {
  const view = new PlanWidget(node);
  node.atlasvidPlan = view;
  views.add(view);
  for (const widget of node.widgets) {
    const callback = widget.callback;
    widget.callback = function (...given) {
      view.refresh();
      return callback?.apply(this, given);
    };
  }
  const { onExecuted, onConnectionsChange, onRemoved } = node;
  node.onRemoved = function (...given) {
    onRemoved?.apply(this, given);
    views.delete(view);
  };
  node.onExecuted = function (output) {
    onExecuted?.call(this, output);
    view.onExecuted(output);
  };
  node.onConnectionsChange = function (...given) {
    onConnectionsChange?.apply(this, given);
    view.refresh();
  };
  const [width, height] = node.computeSize();
  node.setSize([Math.max(width, 380), Math.max(height, node.size[1])]);
  view.refresh();
}

app.registerExtension({
  name: "AtlasVid",
  setup() {
    document.head.append(element("style", "", STYLE));
    // Values elsewhere (the window, the steps) change the cost too.
    api.addEventListener("graphChanged", () => {
      for (const view of views) view.refresh();
    });
  },
  nodeCreated(node) {
    if (node.comfyClass === PLAN) addPlanWidget(node);
  },
  loadedGraphNode(node) {
    node.atlasvidPlan?.refresh();
  },
});
