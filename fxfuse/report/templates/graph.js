// A drawing that is moved and zoomed: boxes and lines as Python laid them out.

const READABLE = 0.82, LARGEST = 4, MARGIN = 18, CORNER = 7, LINE_HEIGHT = 16;

class Pane {
  constructor(root, page) {
    this.root = root;
    this.page = page; // chooses, lights and describes boxes
    this.canvas = root.querySelector(".canvas");
    this.collapse = root.querySelector(".collapse");
    this.collapse.addEventListener("change", () => this.show());
    root.querySelector(".in").addEventListener("click", () => this.zoom(1.3));
    root.querySelector(".out").addEventListener("click", () => this.zoom(1 / 1.3));
    root.querySelector(".fit").addEventListener("click", () => this.fit());
    new ResizeObserver(() => this.resized()).observe(this.canvas);
  }

  load(drawing) {
    this.drawing = drawing;
    const worth = drawing.collapsed.boxes.length < drawing.whole.boxes.length;
    this.collapse.closest("label").hidden = !worth;
    this.collapse.checked = worth && drawing.whole.boxes.length > 24;
    this.show();
  }

  get shown() {
    return this.collapse.checked ? this.drawing.collapsed : this.drawing.whole;
  }

  // --- drawing -----------------------------------------------------------------------------------
  show() {
    const { boxes, lines, hulls } = this.shown;
    const id = this.root.id;
    this.svg = svg("svg", { "aria-label": `${this.root.getAttribute("aria-label")}: arrow keys move, Enter selects` });
    this.svg.append(svg("defs", {}, arrow(`${id}-arrow`, "arrow"), arrow(`${id}-hot`, "arrow hot")));
    this.world = svg("g", {});
    this.boxes = new Map(boxes.map((box) => [box.name, { ...box, lines: box.lines, near: [] }]));
    this.world.append(...hulls.map(drawnHull));
    for (const line of lines) {
      const path = svg("path", { class: "line", d: curve(line.points), "marker-end": `url(#${id}-arrow)` });
      this.boxes.get(line.from).near.push(path);
      this.boxes.get(line.to).near.push(path);
      this.world.append(path);
    }
    for (const box of this.boxes.values()) {
      box.element = this.drawnBox(box);
      this.world.append(box.element);
    }
    this.svg.append(this.world);
    this.listen();
    this.canvas.replaceChildren(this.svg);
    const operators = boxes.filter((box) => box.kind === "operator" || box.kind === "region").length;
    const groups = boxes.filter((box) => box.kind === "group");
    const hidden = sum(groups.map((box) => box.members.length));
    const nodes = operators + hidden;
    const count = this.root.querySelector(".count");
    count.title = count.textContent = `${plural(nodes, "operator")}${hidden ? `, ${hidden} collapsed` : ""}`;
    this.roving = boxes.length ? this.boxes.get(boxes[0].name) : null;
    if (this.roving) this.roving.element.setAttribute("tabindex", 0);
    this.begin();
    this.mark();
    this.reveal([...this.boxes.values()].filter((box) => this.page.isChosen(box)));
  }

  drawnBox(box) {
    const coloured = box.region !== null;
    const group = svg("g", {
      class: `box ${box.kind}${coloured ? ` coloured ${colour(box.region)}` : ""}`,
      transform: `translate(${box.x} ${box.y})`,
      tabindex: -1,
      role: "button",
      "aria-label": this.page.words(box),
    });
    const round = box.kind === "input" || box.kind === "output" ? box.height / 2 : CORNER;
    group.append(svg("rect", { class: "body", width: box.width, height: box.height, rx: round }));
    if (coloured) group.append(svg("rect", { class: "stripe", x: 1, y: 6, width: 4, height: box.height - 12, rx: 2 }));
    [box.title, ...box.lines].forEach((text, i) => {
      const line = { class: i ? null : "title", x: box.width / 2, y: 20.3 + i * LINE_HEIGHT, "text-anchor": "middle" };
      if (box.kind === "region") Object.assign(line, { x: 14, "text-anchor": "start" });
      group.append(svg("text", line, text));
    });
    group.addEventListener("click", () => this.moved || this.page.choose(this, box));
    group.addEventListener("pointerenter", (event) => this.page.hover(this, box, event));
    group.addEventListener("pointermove", (event) => this.page.follow(event));
    group.addEventListener("pointerleave", () => this.page.leave(this, box));
    group.addEventListener("focus", () => this.page.hover(this, box, null));
    group.addEventListener("blur", () => this.page.leave(this, box));
    return group;
  }

  near(box, on) {
    for (const path of box.near) {
      path.classList.toggle("near", on);
      path.setAttribute("marker-end", `url(#${this.root.id}-${on ? "hot" : "arrow"})`);
    }
  }

  light(region) {
    for (const box of this.boxes.values()) {
      box.element.classList.toggle("lit", region !== null && box.region === region);
    }
  }

  mark() {
    for (const box of this.boxes.values()) box.element.classList.toggle("chosen", this.page.isChosen(box));
  }

  // --- finding -----------------------------------------------------------------------------------
  boxOf(node) {
    for (const box of this.boxes.values()) if (box.members.includes(node)) return box;
    return null;
  }

  expand(node) {
    if (this.collapse.checked && this.boxOf(node)?.kind === "group") {
      this.collapse.checked = false;
      this.show();
    }
  }

  reveal(boxes) {
    if (!boxes.length) return;
    const left = Math.min(...boxes.map((b) => b.x)), right = Math.max(...boxes.map((b) => b.x + b.width));
    const top = Math.min(...boxes.map((b) => b.y)), bottom = Math.max(...boxes.map((b) => b.y + b.height));
    const { width, height } = this.size();
    const at = ([x, y]) => [x * this.scale + this.x, y * this.scale + this.y];
    const [[x0, y0], [x1, y1]] = [at([left, top]), at([right, bottom])];
    if (this.scale >= READABLE && x0 >= 0 && y0 >= 0 && x1 <= width && y1 <= height) return;
    this.scale = Math.max(this.scale, READABLE);
    this.centre((left + right) / 2, (top + bottom) / 2);
  }

  // --- moving and zooming ------------------------------------------------------------------------
  size() {
    return { width: this.canvas.clientWidth || 1, height: this.canvas.clientHeight || 1 };
  }

  whole() {
    const { width, height } = this.size();
    const { width: w, height: h } = this.shown;
    return Math.min((width - 2 * MARGIN) / (w || 1), (height - 2 * MARGIN) / (h || 1), 1.25);
  }

  begin() {
    // all of it where that can be read, else what comes first, or the first region
    const { width: w, height: h, boxes } = this.shown;
    const { width, height } = this.size();
    this.touched = false;
    const whole = this.whole();
    this.scale = whole >= 0.75 * READABLE ? whole : READABLE;
    const first = boxes.find((box) => box.region !== null) || boxes[0];
    if (!first) return this.apply();
    const left = Math.min(first.x, boxes[0].x), right = Math.max(first.x + first.width, boxes[0].x + boxes[0].width);
    this.centre(w * this.scale <= width - 2 * MARGIN ? w / 2 : (left + right) / 2, h / 2);
    if (h * this.scale > height - 2 * MARGIN) {
      const above = first.y * this.scale;
      this.y = above < height * 0.7 ? MARGIN : height * 0.35 - above;
      this.y = Math.max(this.y, height - MARGIN - h * this.scale);
      this.apply();
    }
  }

  fit() {
    this.scale = this.whole();
    this.centre(this.shown.width / 2, this.shown.height / 2);
  }

  centre(x, y) {
    const { width, height } = this.size();
    [this.x, this.y] = [width / 2 - x * this.scale, height / 2 - y * this.scale];
    this.apply();
  }

  zoom(factor, at) {
    const { width, height } = this.size();
    const [px, py] = at || [width / 2, height / 2];
    const next = Math.min(LARGEST, Math.max(Math.min(this.whole(), READABLE) / 2, this.scale * factor));
    this.x = px - ((px - this.x) * next) / this.scale;
    this.y = py - ((py - this.y) * next) / this.scale;
    this.scale = next;
    this.touched = true;
    this.apply();
  }

  apply() {
    this.world.setAttribute("transform", `translate(${this.x} ${this.y}) scale(${this.scale})`);
  }

  resized() {
    if (this.drawing && !this.touched) this.begin();
  }

  listen() {
    this.svg.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
    this.svg.addEventListener("keydown", (event) => this.key(event));
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      this.moved = false;
      this.from = { x: event.clientX - this.x, y: event.clientY - this.y, startX: event.clientX, startY: event.clientY };
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (!this.from) return;
      const far = Math.hypot(event.clientX - this.from.startX, event.clientY - this.from.startY) > 4;
      if (far && !this.moved) {
        this.moved = this.touched = true; // from here on it is no click
        this.svg.setPointerCapture(event.pointerId);
        this.svg.classList.add("moving");
      }
      if (!this.moved) return;
      [this.x, this.y] = [event.clientX - this.from.x, event.clientY - this.from.y];
      this.apply();
    });
    for (const end of ["pointerup", "pointercancel"]) {
      this.svg.addEventListener(end, () => {
        this.from = null;
        this.svg.classList.remove("moving");
      });
    }
  }

  wheel(event) {
    const stacked = matchMedia("(max-width: 1000px)").matches;
    if (stacked && !event.ctrlKey) return; // the page scrolls
    event.preventDefault();
    const box = this.canvas.getBoundingClientRect();
    const lines = event.deltaMode === 1 ? 16 : 1;
    this.zoom(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0016)), [event.clientX - box.left, event.clientY - box.top]);
  }

  key(event) {
    const actions = { "+": () => this.zoom(1.3), "=": () => this.zoom(1.3), "-": () => this.zoom(1 / 1.3), 0: () => this.fit() };
    const ways = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (actions[event.key]) actions[event.key]();
    else if (ways[event.key]) this.step(...ways[event.key]);
    else if ((event.key === "Enter" || event.key === " ") && this.roving) this.page.choose(this, this.roving);
    else return;
    event.preventDefault();
  }

  step(right, down) {
    // the next box in that direction: what lies off the way counts twice
    const from = this.roving;
    const centre = (box) => [box.x + box.width / 2, box.y + box.height / 2];
    const [x, y] = centre(from);
    let best = null, least = Infinity;
    for (const box of this.boxes.values()) {
      const [dx, dy] = [centre(box)[0] - x, centre(box)[1] - y];
      const along = dx * right + dy * down, off = Math.abs(dx * down) + Math.abs(dy * right);
      if (along > 1 && along + 2 * off < least) [best, least] = [box, along + 2 * off];
    }
    if (!best) return;
    from.element.setAttribute("tabindex", -1);
    best.element.setAttribute("tabindex", 0);
    this.roving = best;
    this.touched = true;
    this.reveal([best]);
    best.element.focus({ preventScroll: true });
  }
}

function arrow(id, kind) {
  const shape = svg("path", { class: kind, d: "M0 0 L8 4 L0 8 z" });
  const size = { markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse" };
  return svg("marker", { id, viewBox: "0 0 8 8", refX: 7, refY: 4, orient: "auto", ...size }, shape);
}

function drawnHull(hull) {
  const around = 9;
  const place = { x: hull.x - around, y: hull.y - around, width: hull.width + 2 * around, height: hull.height + 2 * around };
  return svg("rect", { class: `hull ${colour(hull.region)}`, rx: 12, ...place });
}

function curve(points) {
  // down out of a box, straight past other layers, down into a box
  let [x, y] = points, path = `M${x} ${y}`;
  for (let i = 2; i < points.length; i += 2) {
    const [nx, ny] = [points[i], points[i + 1]];
    const middle = (y + ny) / 2;
    path += Math.abs(nx - x) < 0.5 ? `L${nx} ${ny}` : `C${x} ${middle} ${nx} ${middle} ${nx} ${ny}`;
    [x, y] = [nx, ny];
  }
  return path;
}
