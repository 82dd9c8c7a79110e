// What the panel says: an overview, a region, a node, a group; rewrites, near misses, code.

const list = (items) => el("ul", {}, items.map((item) => el("li", {}, item)));
const badge = (region) => el("span", { class: `badge ${colour(region)}` }, String(region + 1));
const heading = (words) => el("h4", {}, words);

function figure(value, words, good) {
  return el("div", { class: `figure${good ? " good" : ""}` }, el("b", {}, value), el("span", {}, words));
}

// --- traffic ---------------------------------------------------------------------------------------
function traffic(regions) {
  const known = regions.filter((region) => region.account);
  const before = sum(known.map((region) => region.account.before.read + region.account.before.written));
  const after = sum(known.map((region) => region.account.bytes));
  const most = Math.max(before, after, 1);
  const row = (kind, amount) =>
    known.map((region) => {
      const hint = `region ${region.number + 1}: ${bytes(amount(region))}`;
      return el("i", { class: colour(region.number), style: `width: ${(100 * amount(region)) / most}%`, title: hint });
    });
  const track = (kind, amount) => el("div", { class: `track ${kind}` }, row(kind, amount));
  return el(
    "div",
    { class: "traffic", role: "img", "aria-label": `Memory traffic: ${bytes(before)} before, ${bytes(after)} after` },
    el("span", { class: "name" }, "before"),
    track("before", (region) => region.account.before.read + region.account.before.written),
    el("span", { class: "value" }, bytes(before)),
    el("span", { class: "name" }, "after"),
    track("after", (region) => region.account.bytes),
    el("span", { class: "value" }, bytes(after)),
  );
}

// --- overview --------------------------------------------------------------------------------------
function overview(report, page) {
  const known = report.regions.filter((region) => region.account);
  const parts = [];
  if (known.length) {
    const saved = sum(known.map((region) => region.account.saved));
    const before = sum(known.map((region) => region.account.before.read + region.account.before.written));
    const operators = sum(report.regions.map((region) => region.operators.length));
    const kernels = sum(known.map((region) => region.account.kernels));
    parts.push(
      el(
        "div",
        { class: "figures" },
        kernels
          ? figure(plural(kernels, "kernel"), `for ${plural(operators, "operator")}`)
          : figure("torch", `runs ${plural(operators, "operator")}`),
        figure(duration(sum(known.map((region) => region.account.seconds))), "estimated, in the regions"),
        figure(change(saved, bytes), `memory traffic, ${change((100 * saved) / before, (part) => `${part.toFixed(0)} %`)}`, saved > 0),
      ),
      heading("Memory traffic of the regions"),
      traffic(known),
      assumptions(report.machine),
    );
  }
  if (report.regions.length) {
    const marks = "In the drawing: \u25a0 a kernel of ours, \u25aa a small helper, \u25a1 torch's operators.";
    parts.push(heading("Regions"), el("p", { class: "muted small" }, marks));
  }
  parts.push(...report.regions.map((region) => card(region, page)));
  if (!report.regions.length) parts.push(el("p", { class: "notice" }, report.headline));
  const staying = Object.entries(report.staying);
  if (staying.length) {
    const chips = staying.map(([what, count]) => el("span", { class: "chip" }, count > 1 ? `${count} ${what}` : what));
    parts.push(heading("Stays in torch"), el("div", { class: "chips" }, chips));
  }
  if (report.notes.length) parts.push(heading("Notes"), list(report.notes));
  parts.push(el("p", { class: "muted small" }, `fxfuse ${report.fxfuse}`));
  return parts;
}

function change(saved, words) {
  return `${saved > 0 ? "\u2212" : saved < 0 ? "+" : "\u00b1"}${words(Math.abs(saved))}`;
}

function assumptions(machine) {
  const rates = `${digits(machine.bandwidth / 1e12)} TB/s, ${digits((2 * machine.half_rate) / 1e12)} TFLOP/s`;
  const words = `Estimated, not measured: an ${machine.name} (${rates}), no gradients, contiguous inputs. Before: every operator by itself.`;
  return el("p", { class: "muted small" }, words);
}

function card(region, page) {
  return el(
    "button",
    { type: "button", class: `card ${colour(region.number)}`, onclick: () => page.chooseRegion(region.number) },
    badge(region.number),
    el("b", { class: "mono" }, breakable(region.anchor)),
    el("span", { class: "chain mono" }, region.chain.join(" > ")),
    el("span", { class: "muted small" }, region.summary),
    region.refusal ? el("span", { class: "muted small" }, region.refusal) : null,
  );
}

// --- a region --------------------------------------------------------------------------------------
function regionDetails(region, report) {
  const { account } = region;
  const parts = [
    el("h3", {}, badge(region.number), el("span", {}, breakable(region.anchor))),
    el("p", { class: "mono" }, region.chain.join(" > ")),
    el("p", {}, region.summary),
  ];
  if (region.refusal) parts.push(el("p", { class: "notice small" }, region.refusal));
  if (account) {
    parts.push(heading("Plan on an H100"), planTable(account), ...account.parts.flatMap((part) => partFacts(part)));
    parts.push(heading("Memory traffic"), traffic([region]));
    const roof = roofline(account, region.number, report.machine);
    if (roof) parts.push(heading("Roofline"), roof, legend(region.number));
  } else {
    parts.push(el("p", { class: "muted small" }, region.plan));
  }
  if (region.rules.length) {
    const identity = Object.fromEntries(report.rules.map((rule) => [rule.rule, rule.identity]));
    const rule = (name) => [el("b", {}, name), el("br"), el("code", {}, identity[name.replace(/^\d+x /, "")] || "")];
    parts.push(heading("Rewrites"), list(region.rules.map(rule)));
  }
  if (region.ended.length) {
    parts.push(heading("Ends"), list(region.ended.map((end) => [el("code", {}, end.node), `: ${end.reason}`])));
  }
  const sources = account ? account.parts.filter((part) => part.source) : [];
  if (sources.length) {
    const words = "What is compiled. The algorithms are in the headers, fxfuse/kernels/cuh/.";
    parts.push(heading("CUDA C++"), el("p", { class: "muted small" }, words), ...sources.map(kernelSource));
  }
  parts.push(heading("Program"));
  const { original, rewritten } = region.programs;
  parts.push(source(rewritten || original, "python", "The program that runs"));
  if (rewritten) {
    parts.push(el("details", {}, el("summary", {}, "as the model wrote it"), source(original, "python", "The model's program")));
  }
  return parts;
}

function kernelSource(part, i) {
  const code = source(part.source, "cuda", `Source: ${part.what}`);
  return el("details", { open: i === 0 }, el("summary", { class: "mono" }, part.what), code);
}

function legend(region) {
  const dot = (kind) => svg("svg", { class: `roofline ${colour(region)}`, viewBox: "0 0 12 12", style: "width: 12px; display: inline" }, svg("circle", { class: `dot ${kind}`, cx: 6, cy: 6, r: 5 }));
  return el("p", { class: "muted small" }, dot(""), " the plan, est.   ", dot("before"), " the model's operators, at best");
}

function planTable(account) {
  const makers = { kernel: "a kernel", helper: "a helper", torch: "torch" };
  const row = (part) =>
    el(
      "tr",
      {},
      el("td", { class: "words" }, el("span", { class: "mono" }, part.what), el("span", { class: "muted" }, ` by ${makers[part.by]}`)),
      el("td", {}, String(part.launches)),
      el("td", { title: `${bytes(part.read)} read, ${bytes(part.written)} written` }, bytes(part.read + part.written)),
      el("td", {}, part.macs ? operations(2 * part.macs) : "-"),
      el("td", { title: `at least ${duration(part.floor)}` }, duration(part.seconds)),
    );
  const head = ["step", "launches", "traffic", "products", "est."].map((words) => el("th", { scope: "col" }, words));
  const total = [account.launches, bytes(account.bytes), account.macs ? operations(2 * account.macs) : "-"];
  const foot = el("tr", {}, ["all", ...total, duration(account.seconds)].map((words) => el("td", {}, String(words))));
  const least = `No implementation takes less than ${duration(account.floor)}: inputs read once, outputs written once, or the products.`;
  const table = el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, account.parts.map(row)), el("tfoot", {}, foot));
  return el("div", {}, el("div", { class: "scroll" }, table), el("p", { class: "muted small" }, least));
}

function partFacts(part) {
  const facts = part.facts.map((fact) => [fact.name, fact.value]);
  for (const [kernel, uses] of Object.entries(part.resources)) {
    const spills = uses.spill_stores + uses.spill_loads;
    const words = `${uses.registers} per thread${spills ? `, ${spills} bytes of spills` : ", no spills"}; ${uses.shared} B static shared memory`;
    facts.push([`registers, ${kernel}`, words]);
  }
  if (!facts.length) return [];
  const known = Object.keys(part.resources).length > 0;
  if (part.source && !known) facts.push(["registers", "known once it is compiled: to_html(..., registers=True)"]);
  const rows = facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
  const words = part.facts.length > 1 ? "tiles, memory, registers" : "layout, registers";
  return [el("details", {}, el("summary", {}, el("span", { class: "mono" }, part.what), `: ${words}`), el("dl", {}, rows))];
}

// --- nodes -----------------------------------------------------------------------------------------
function nodeDetails(node, report, page) {
  const rows = [["name", node.name], ["returns", node.value || "no tensor"]];
  if (node.bytes) rows.push(["bytes", bytes(node.bytes)]);
  for (const [name, type] of node.weights) rows.push([name, type]);
  const jump = (name) => el("button", { type: "button", class: "link", onclick: () => page.chooseNode(name) }, name);
  const parts = [
    el("h3", {}, node.spelling || node.label),
    el("p", { class: "mono muted" }, breakable(node.label)),
    el("dl", {}, rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", { class: "mono" }, value)])),
  ];
  if (node.reason) parts.push(heading("In no region"), el("p", {}, node.reason));
  const misses = report.near_misses.filter((miss) => miss.node === node.label || miss.node === node.name);
  if (misses.length) parts.push(heading("Near misses"), list(misses.map((miss) => [el("b", {}, miss.rule), `: ${miss.reason}`])));
  const readers = page.readers(node.name);
  if (node.reads.length) parts.push(heading("Reads"), list(node.reads.map(jump)));
  if (readers.length) parts.push(heading("Is read by"), list(readers.map(jump)));
  return parts;
}

function groupDetails(box, page) {
  const nodes = box.members.map((name) => page.node(name)).filter(Boolean);
  const item = (node) => [
    el("button", { type: "button", class: "link", onclick: () => page.chooseNode(node.name) }, node.label),
    ` ${node.spelling === node.label ? "" : node.spelling} `,
    el("span", { class: "muted mono" }, node.value),
  ];
  const words = "Operators that are in no region, and that as many regions come before.";
  return [
    el("h3", {}, box.title),
    el("p", { class: "muted" }, words),
    el("p", {}, el("button", { type: "button", onclick: () => page.chooseNode(box.members[0]) }, "show them one by one")),
    list(nodes.map(item)),
  ];
}

// --- the other tabs --------------------------------------------------------------------------------
function rewrites(report, page) {
  if (!report.rules.length) return [el("p", { class: "muted" }, "No rule fired.")];
  return report.rules.flatMap((rule) => [
    el("h3", {}, rule.rule),
    el("p", {}, el("code", {}, rule.identity)),
    el("p", { class: "muted small" }, "at ", ...rule.nodes.flatMap((node, i) => [i ? ", " : "", page.place(node)])),
  ]);
}

function nearMisses(report, page) {
  if (!report.near_misses.length) return [el("p", { class: "muted" }, "None: no rule was refused.")];
  const rules = [...new Set(report.near_misses.map((miss) => miss.rule))];
  return rules.flatMap((rule) => {
    const own = report.near_misses.filter((miss) => miss.rule === rule);
    return [el("h3", {}, rule), list(own.map((miss) => [page.place(miss.node), `: ${miss.reason}`]))];
  });
}

function codeTab(report) {
  if (!report.captured) return [el("p", { class: "muted" }, "There is no captured graph.")];
  const { before, after } = report.code;
  return [heading("Before"), source(before, "python", "The graph before"), heading("After"), source(after, "python", "The graph after")];
}
