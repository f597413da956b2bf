/** Reads from the graph what the server needs to know about a plan. */

const ATTENTION = "AtlasVidHierarchicalAttention";
const STREAMED = "AtlasVidDecodeToVideo";
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

/** How often the samplers among the nodes evaluate the model; 0 where there is none. */
function evaluations(nodes) {
  let count = 0;
  for (const given of nodes.map(values).filter((each) => "steps" in each)) {
    const last = Math.min(given.steps, given.end_at_step ?? given.steps);
    count += Math.max(0, last - (given.start_at_step ?? 0)) * (given.cfg === 1 ? 1 : 2);
  }
  return count;
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
      const proxy = [...samplersBehind(plan, "LATENT")].filter((node) => !samplers.has(node));
      query.proxy_evaluations = evaluations(withFollowers(proxy));
    }
  }
  const kinds = plan.graph.nodes.map((node) => node.comfyClass ?? "");
  query.streamed = kinds.includes(STREAMED) || !kinds.some((kind) => kind.startsWith("VAEDecode")) ? 1 : 0;
  return query;
}
