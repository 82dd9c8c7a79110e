// The page: which report is shown, what is chosen, where the tooltip is.

class Page {
  constructor(reports) {
    this.reports = reports;
    this.panes = ["before", "after"].map((id) => new Pane(document.getElementById(id), this));
    this.panel = document.getElementById("panel");
    this.tooltip = document.getElementById("tooltip");
    const part = document.getElementById("part");
    part.append(...Object.keys(reports).map((path) => el("option", { value: path }, path || "all")));
    part.closest("label").hidden = Object.keys(reports).length < 2;
    part.addEventListener("change", () => this.load(part.value));
    theme(document.getElementById("theme"));
    splitter(document.getElementById("splitter"), document.getElementById("main"));
    this.load("");
  }

  load(path) {
    const report = this.reports[path];
    this.report = report;
    this.chosen = null; // {region}, {node} or {group}
    report.regions.forEach((region, number) => (region.number = number));
    this.nodes = new Map([...report.nodes.after, ...report.nodes.before].map((node) => [node.name, node]));
    const [name, ...rest] = report.headline.split(": ");
    document.getElementById("model").textContent = name;
    document.getElementById("headline").textContent = rest.join(": ");
    const drawn = Boolean(report.drawings.before);
    document.getElementById("main").classList.toggle("bare", !drawn);
    document.getElementById("hint").hidden = !drawn;
    if (drawn) for (const pane of this.panes) pane.load(report.drawings[pane.root.id]);
    this.open("overview");
  }

  // --- tabs --------------------------------------------------------------------------------------
  get tabs() {
    const { report } = this;
    return {
      overview: ["Overview", () => overview(report, this)],
      selection: ["Selected", () => this.selection()],
      rewrites: [`Rewrites ${report.rules.length}`, () => rewrites(report, this)],
      misses: [`Near misses ${report.near_misses.length}`, () => nearMisses(report, this)],
      code: ["Code", () => codeTab(report)],
    };
  }

  open(tab) {
    const bar = document.querySelector(".tabs");
    const { tabs } = this;
    const buttons = Object.entries(tabs).map(([name, [words]]) => {
      const selected = name === tab;
      const state = { role: "tab", id: `tab-${name}`, "aria-selected": String(selected), "aria-controls": "panel" };
      return el("button", { type: "button", tabindex: selected ? 0 : -1, ...state, onclick: () => this.open(name) }, words);
    });
    const focused = bar.contains(document.activeElement);
    bar.replaceChildren(...buttons);
    bar.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const names = Object.keys(tabs);
      this.open(names[(names.indexOf(tab) + step + names.length) % names.length]);
    };
    if (focused) bar.querySelector("[aria-selected=true]").focus();
    this.panel.setAttribute("aria-labelledby", `tab-${tab}`);
    this.panel.replaceChildren(...tabs[tab][1]());
    this.panel.scrollTop = 0;
  }

  selection() {
    const { chosen, report } = this;
    if (!chosen) return [el("p", { class: "muted" }, "Nothing is selected: click a box, or move to one with the arrow keys and press Enter.")];
    if (chosen.region !== undefined) return regionDetails(report.regions[chosen.region], report);
    if (chosen.group) return groupDetails(chosen.group, this);
    return nodeDetails(this.node(chosen.node), report, this);
  }

  // --- choosing ----------------------------------------------------------------------------------
  choose(pane, box) {
    if (box.region !== null) this.chosen = { region: box.region };
    else if (box.kind === "group") this.chosen = { group: box };
    else this.chosen = { node: box.name };
    this.chose(pane);
  }

  chooseRegion(region) {
    this.chosen = { region };
    this.chose(null);
  }

  chooseNode(name) {
    const { region } = this.node(name);
    for (const pane of this.drawnPanes()) pane.expand(name);
    this.chosen = region === null ? { node: name } : { region };
    this.chose(null);
  }

  chose(from) {
    for (const pane of this.drawnPanes()) {
      pane.mark();
      if (pane !== from) pane.reveal([...pane.boxes.values()].filter((box) => this.isChosen(box)));
    }
    this.tooltip.hidden = true; // what it says is in the panel now
    this.open("selection");
  }

  isChosen(box) {
    const { chosen } = this;
    if (!chosen) return false;
    if (chosen.region !== undefined) return box.region === chosen.region;
    return chosen.group ? box.name === chosen.group.name : box.members.includes(chosen.node);
  }

  drawnPanes() {
    return this.report.drawings.before ? this.panes : [];
  }

  node(name) {
    return this.nodes.get(name);
  }

  readers(name) {
    const all = [...this.report.nodes.before, ...this.report.nodes.after];
    return [...new Set(all.filter((node) => node.reads.includes(name)).map((node) => node.name))];
  }

  place(label) {
    const found = this.report.nodes.before.find((node) => node.label === label || node.name === label);
    if (!found) return el("code", {}, label);
    return el("button", { type: "button", class: "link", onclick: () => this.chooseNode(found.name) }, label);
  }

  // --- hovering ----------------------------------------------------------------------------------
  words(box) {
    const region = box.region === null ? "" : `, region ${box.region + 1}`;
    return `${[box.title, ...box.lines].join(", ")}${region}`;
  }

  hover(pane, box, event) {
    pane.near(box, true);
    if (box.region !== null) for (const each of this.panes) each.light(box.region);
    this.tooltip.replaceChildren(...this.hint(box));
    this.tooltip.hidden = false;
    const place = event ? { left: event.clientX, bottom: event.clientY } : box.element.getBoundingClientRect();
    this.put(place.left, place.bottom);
  }

  follow(event) {
    if (!this.tooltip.hidden) this.put(event.clientX, event.clientY);
  }

  put(x, y) {
    const { offsetWidth: width, offsetHeight: height } = this.tooltip;
    const panel = document.querySelector("aside").getBoundingClientRect().left;
    const right = x < panel ? panel : innerWidth; // the panel is not covered
    this.tooltip.style.left = `${Math.max(4, Math.min(x + 14, right - width - 8))}px`;
    this.tooltip.style.top = `${y + 16 + height > innerHeight ? Math.max(4, y - height - 14) : y + 16}px`;
  }

  leave(pane, box) {
    pane.near(box, false);
    for (const each of this.drawnPanes()) each.light(null);
    this.tooltip.hidden = true;
  }

  hint(box) {
    const muted = (words) => el("span", { class: "muted" }, words);
    if (box.kind === "group") return [el("b", {}, box.title), muted(box.lines.join(", ")), muted("in no region")];
    if (box.kind === "region") {
      const region = this.report.regions[box.region];
      return [el("b", {}, `region ${box.region + 1}: ${region.anchor}`), el("code", {}, region.chain.join(" > ")), muted(region.summary)];
    }
    const node = this.node(box.name);
    const size = node.bytes ? `, ${bytes(node.bytes)}` : "";
    const parts = [el("b", {}, [node.spelling, node.label].filter((w, i, all) => w && all.indexOf(w) === i).join(" \u00b7 "))];
    if (node.value) parts.push(el("code", {}, node.value), size);
    parts.push(...node.weights.map(([name, type]) => muted(`${name}: ${type}`)));
    if (box.region !== null) parts.push(muted(`in region ${box.region + 1}`));
    else if (node.reason) parts.push(muted(node.reason));
    return parts;
  }
}

// --- colours and widths ------------------------------------------------------------------------------
function theme(button) {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const choices = ["auto", "light", "dark"];
  let chosen = "auto";
  try {
    chosen = choices.find((choice) => choice === localStorage.getItem("fxfuse-theme")) || "auto";
  } catch {} // a page without storage
  const apply = () => {
    document.documentElement.dataset.theme = chosen === "auto" ? (dark.matches ? "dark" : "light") : chosen;
    button.textContent = `colours: ${chosen}`;
  };
  button.addEventListener("click", () => {
    chosen = choices[(choices.indexOf(chosen) + 1) % choices.length];
    try {
      localStorage.setItem("fxfuse-theme", chosen);
    } catch {} // it lasts as long as the page
    apply();
  });
  dark.addEventListener("change", apply);
  apply();
}

function splitter(handle, main) {
  const set = (width) => main.style.setProperty("--panel", `${Math.min(innerWidth - 500, Math.max(300, width))}px`);
  const width = () => main.querySelector("aside").offsetWidth;
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    handle.onpointermove = (move) => set(main.getBoundingClientRect().right - 12 - move.clientX);
  });
  handle.addEventListener("pointerup", () => (handle.onpointermove = null));
  handle.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: 30, ArrowRight: -30 }[event.key];
    if (step) set(width() + step);
  });
}

const page = new Page(JSON.parse(document.getElementById("data").textContent));
