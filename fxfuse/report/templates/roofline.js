// The roofline of the machine, and where the steps of a region lie: operations per byte against operations per second.

function roofline(account, region, machine) {
  const parts = account.parts.filter((part) => part.macs && part.seconds);
  const points = parts.map((part) => point(part, part.what, ""));
  if (account.before.macs) points.push(point(account.before, "before, at best", "before"));
  if (!points.length) return null;
  const peak = 2 * machine.half_rate;
  const left = 40, right = 440, top = 12, bottom = 190;
  const low = Math.min(0, ...points.map((p) => Math.floor(Math.log10(p.intensity))));
  const high = Math.max(4, ...points.map((p) => Math.ceil(Math.log10(p.intensity))));
  const least = Math.max(0, Math.min(11, ...points.map((p) => Math.floor(Math.log10(p.rate)))));
  const x = (value) => left + ((Math.log10(value) - low) / (high - low)) * (right - left);
  const y = (value) => bottom - ((Math.log10(value) - least) / (15.2 - least)) * (bottom - top);

  const drawn = svg("svg", { class: `roofline ${colour(region)}`, viewBox: "0 0 460 226", role: "img" });
  const described = points.map((p) => `${p.name}: ${digits(p.intensity)} FLOP/B, ${operations(p.rate)}/s`).join("; ");
  drawn.append(svg("title", {}, `Roofline of an ${machine.name}. ${described}`));
  for (let power = low; power <= high; power++) {
    drawn.append(svg("line", { class: "grid", x1: x(10 ** power), x2: x(10 ** power), y1: top, y2: bottom }));
    drawn.append(svg("text", { x: x(10 ** power), y: bottom + 15, "text-anchor": "middle" }, String(10 ** power)));
  }
  for (let power = least; power <= 15; power++) {
    const unit = ["", "k", "M", "G", "T", "P"][Math.floor(power / 3)];
    const name = `${10 ** (power % 3)}${unit}`;
    drawn.append(svg("line", { class: "grid", x1: left, x2: right, y1: y(10 ** power), y2: y(10 ** power) }));
    drawn.append(svg("text", { x: left - 5, y: y(10 ** power) + 4, "text-anchor": "end" }, name));
  }
  const ridge = peak / machine.bandwidth;
  const start = Math.max(10 ** low, 10 ** least / machine.bandwidth);
  const roof = [[start, start * machine.bandwidth], [ridge, peak], [10 ** high, peak]];
  drawn.append(svg("polyline", { class: "roof", points: roof.map(([a, b]) => `${x(a)},${y(b)}`).join(" ") }));
  drawn.append(svg("text", { x: (left + right) / 2, y: bottom + 32, "text-anchor": "middle" }, "FLOP per byte"));
  drawn.append(svg("text", { x: left + 4, y: top + 9 }, "FLOP/s"));
  for (const p of points) {
    const dot = svg("circle", { class: `dot ${p.kind}`, cx: x(p.intensity), cy: y(p.rate), r: 5.5 });
    dot.append(svg("title", {}, `${p.name}: ${digits(p.intensity)} FLOP/B, ${operations(p.rate)}/s`));
    drawn.append(dot);
  }
  return drawn;
}

function point(part, name, kind) {
  const seconds = kind === "before" ? part.floor : part.seconds;
  return { name, kind, intensity: (2 * part.macs) / (part.read + part.written), rate: (2 * part.macs) / seconds };
}
