/** Reads from the graph what the server needs to know about a plan. */

const ATTENTION = "AtlasVidHierarchicalAttention";
const STREAMED = "AtlasVidDecodeToVideo";
const RESUME = "AtlasVidResume";
const MODEL_NAMES = ["unet_name", "ckpt_name", "gguf_name", "model_name"];

function values(node) {
  return Object.fromEntries((node.widgets ?? []).map((widget) => [widget.name, widget.value]));
}

/** The node that an input is linked to, through reroutes. */
function origin(node, input) {
  const slot = node.inputs?.findIndex((each) => each.name === input) ?? -1;
  return slot < 0 ? null : node.getInputNode(slot);
}

/** Nodes linked to an output of the given type. */
function targets(node, type) {
  return (node.outputs ?? []).flatMap((output, slot) =>
    output.type === type ? (node.getOutputNodes(slot) ?? []) : [],
  );
}

/** Where a model comes from: a loader's file, or the name of the node that makes it. */
function modelSource(plan) {
  const seen = new Set();
  let node = origin(plan, "model");
  while (node && !seen.has(node)) {
    seen.add(node);
    const given = values(node);
    const name = MODEL_NAMES.find((each) => each in given);
    if (name) return given[name];
    const before = origin(node, "model");
    if (!before) return node.comfyClass ?? node.type;
    node = before;
  }
  return "";
}

/** How many steps a sampler makes; 0 where the node is none. */
function stepsOf(sampler) {
  const given = values(sampler);
  if (!("steps" in given)) return 0;
  const last = Math.min(given.steps, given.end_at_step ?? given.steps);
  return Math.max(0, last - (given.start_at_step ?? 0));
}

/** How often the samplers among the nodes evaluate the model; 0 where there is none. */
function evaluations(nodes) {
  const each = (node) => stepsOf(node) * (values(node).cfg === 1 ? 1 : 2);
  return nodes.reduce((sum, node) => sum + each(node), 0);
}

/** Whether the model of a sampler comes through AtlasVid Resume, which keeps every step. */
function isKept(sampler) {
  const seen = new Set();
  for (let node = origin(sampler, "model"); node && !seen.has(node); node = origin(node, "model")) {
    if (node.comfyClass === RESUME) return true;
    seen.add(node);
  }
  return false;
}

/** Steps whose answers are kept on the disk. */
function keptSteps(samplers) {
  return samplers.filter(isKept).reduce((sum, node) => sum + stepsOf(node), 0);
}

/** Samplers that an output of this type reaches through nodes that pass it on. */
function samplersBehind(node, type, seen = new Set()) {
  return targets(node, type).flatMap((next) => {
    if (seen.has(next)) return [];
    seen.add(next);
    return "steps" in values(next) ? [next] : samplersBehind(next, type, seen);
  });
}

/** Samplers in a row: those that go on from another's latent. */
function withFollowers(samplers) {
  const found = new Set(samplers);
  for (const sampler of found)
    for (const next of targets(sampler, "LATENT"))
      if ("start_at_step" in values(next)) found.add(next);
  return [...found];
}

/** The query of GET /atlasvid/plan: the node's values, and how the graph samples. */
export function planQuery(plan) {
  const given = values(plan);
  delete given.plan_view;
  const query = { ...given, model: modelSource(plan) };
  if (plan.atlasvidShape && plan.atlasvidModel === query.model) query.shape = plan.atlasvidShape;

  const attention = targets(plan, "ATLASVID_PLAN").filter((node) => node.comfyClass === ATTENTION);
  if (attention.length) {
    const chosen = values(attention[0]);
    for (const name of ["overlap", "guide_noise", "guide_margin"]) query[name] = chosen[name];
    for (const [name, value] of Object.entries(chosen))
      if (name.startsWith("window")) query[name] = value;
    const loras = ["guide_lora", "target_lora"].filter((name) => origin(attention[0], name));
    query.guide_lora = loras.length ? 1 : 0;
    const samplers = new Set(attention.flatMap((node) => samplersBehind(node, "MODEL")));
    const detail = evaluations([...samplers]);
    if (detail) {
      query.detail_evaluations = detail;
      // None where an existing video takes the proxy's place.
      const before = [...samplersBehind(plan, "LATENT")].filter((node) => !samplers.has(node));
      const proxy = withFollowers(before);
      query.proxy_evaluations = evaluations(proxy);
      query.kept_proxy_steps = keptSteps(proxy);
      query.kept_detail_steps = keptSteps([...samplers]);
    }
  }
  const kinds = plan.graph.nodes.map((node) => node.comfyClass ?? "");
  query.streamed = kinds.includes(STREAMED) || !kinds.some((kind) => kind.startsWith("VAEDecode")) ? 1 : 0;
  return query;
}
