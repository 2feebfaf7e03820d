/* Curves with intervals, to be read point by point (report/interactive.py, curves), by themselves or in another figure. */
"use strict";
(() => {
  const { element, drawn, signed } = book;
  const WIDE = 440, HIGH = 190, LEFT = 34, RIGHT = 432, TOP = 8, BOTTOM = 150;
  const SHAPES = [ // markers around 0, 0: who does not see a colour sees a shape
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0", "M-3.5-3.5h7v7h-7z", "M0-5L5 0L0 5L-5 0z", "M0-5L4.5 3.5h-9z", "M0 5L4.5-3.5h-9z",
    "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z", "M-4-4L4 4M4-4L-4 4",
  ];

  /* Round numbers between two ends, some four of them. */
  function rounded(low, high) {
    const rough = (high - low) / 4 || 1, size = 10 ** Math.floor(Math.log10(rough));
    const step = size * [1, 2, 2.5, 5, 10].find((times) => times * size >= rough);
    const first = Math.ceil(low / step - 1e-9), count = Math.floor(high / step + 1e-9) - first;
    return [...Array(count + 1).keys()].map((at) => +((first + at) * step).toPrecision(6));
  }
  const minus = (value) => String(value).replace("-", "\u2212");

  /* One panel. `lines` are {name, points: [x, y, low, high] each, hundredths but for x; bare: without points to be read,
     behind the others}.
     `ticks` name whole numbers on the axis; `level` is {name, y}. `tell(line, point)` is called for what is looked at,
     `choose(line, point)` for what is pinned. Gives {box, pin(name, x)}. */
  function plot({ lines, label, xlabel, ylabel, ticks, level, tell, choose }) {
    const all = lines.flatMap((line) => line.points), xs = all.map((point) => point[0]);
    const ys = all.flatMap((point) => point.slice(1)).filter((value) => value !== null && value !== undefined);
    const ends = [Math.min, Math.max].map((most) => most(0, ...ys, level ? level.y : 0));
    const [left, right] = ticks ? [-0.4, ticks.length - 0.6] : [Math.min(...xs), Math.max(...xs)];
    const across = (x) => LEFT + 8 + ((RIGHT - LEFT - 16) * (x - left)) / (right - left || 1);
    const down = (y) => BOTTOM - 4 - ((BOTTOM - TOP - 8) * (y - ends[0])) / (ends[1] - ends[0] || 1);
    const svg = drawn("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "group", class: "curves", "aria-label": label });
    const write = (x, y, text, name) => svg.append(drawn("text", { x, y, class: name }, text));
    for (const y of rounded(ends[0] / 100, ends[1] / 100)) {
      svg.append(drawn("line", { x1: LEFT, x2: RIGHT, y1: down(100 * y), y2: down(100 * y), class: y ? "tick" : "zero" }));
      write(LEFT - 4, down(100 * y) + 4, minus(y), "end");
    }
    if (level) {
      const y = down(level.y);
      svg.append(drawn("line", { x1: LEFT, x2: RIGHT, y1: y, y2: y, class: "level" }));
    }
    const own = [...new Set(xs)], few = own.length < 9 ? own : rounded(left, right);
    const marks = ticks ? ticks.map((text, at) => [at, text]) : few.map((x) => [x, minus(x)]);
    for (const [x, text] of marks) write(across(x), BOTTOM + 14, text, "axis");
    write((LEFT + RIGHT) / 2, HIGH - 8, xlabel, "axis");

    const points = [];
    const read = lines.filter((line) => !line.bare), apart = ticks ? 0.4 / Math.max(3, read.length) : 0;
    const named = (line, index) => `line line${index % 7}` + (line.bare ? ` bare bare${index - read.length}` : "");
    const groups = lines.map((line, index) => {
      const group = drawn("g", { class: named(line, index) });
      const at = (x) => across(x + (line.bare ? 0 : apart * (read.indexOf(line) - (read.length - 1) / 2)));
      const known = line.points.filter((point) => point[1] !== null);
      const way = known.map(([x, y], n) => `${n ? "L" : "M"}${at(x)} ${down(y)}`).join("");
      if (!ticks || line.bare) group.append(drawn("path", { d: way, class: "way" })); // named places are no sequence
      for (const [x, y, low, high] of known) {
        if (typeof low === "number" && typeof high === "number") {
          group.append(drawn("line", { x1: at(x), x2: at(x), y1: down(low), y2: down(high), class: "span" }));
        }
        if (line.bare) continue;
        const open = low === null ? " open" : "", name = `${line.name}, ${ticks ? ticks[x] : minus(x)}: ${signed(y)}`;
        const place = { transform: `translate(${at(x)} ${down(y)})`, d: SHAPES[index % 7] };
        const mark = drawn("path", { ...place, class: `mark${open}`, role: "img", tabindex: -1, "aria-label": name });
        points.push({ mark, group, line, point: [x, y, low, high], x: at(x), y: down(y) });
        group.append(mark);
      }
      svg.append(group);
      return group;
    });
    const sample = (part) => drawn("svg", { viewBox: "-12 -7 24 14", class: "sample", "aria-hidden": "true" }, part);
    const legend = element("ul", { class: "legend" }, ...lines.map((line, index) => element("li", {},
      sample(drawn("g", { class: named(line, index) },
          ...(ticks && !line.bare ? [] : [drawn("path", { d: "M-11 0H11", class: "way" })]),
          ...(line.bare ? [] : [drawn("path", { d: SHAPES[index % 7], class: "mark" })]))), line.name)),
      ...(level ? [element("li", {}, sample(drawn("line", { x1: -11, x2: 11, y1: 0, y2: 0, class: "level" })), level.name)] : []));

    let pinned = null;
    const look = (one) => {
      for (const group of groups) group.classList.toggle("dim", !!one && lines.length > 3 && group !== one.group);
      for (const other of points) other.mark.classList.toggle("at", other === one);
      if (one) tell(one.line, one.point);
    };
    const nearest = (event) => {
      const frame = svg.getBoundingClientRect(), scale = WIDE / frame.width;
      const x = (event.clientX - frame.left) * scale, y = (event.clientY - frame.top) * scale;
      const away = (one) => Math.hypot(one.x - x, (one.y - y) / 2);
      return points.reduce((best, one) => (!best || away(one) < away(best) ? one : best), null);
    };
    const settle = (one) => {
      pinned = one;
      for (const other of points) other.mark.setAttribute("tabindex", other === (one || points[0]) ? 0 : -1);
    };
    svg.onpointermove = (event) => look(nearest(event));
    svg.onpointerleave = () => look(pinned);
    svg.onclick = (event) => { const one = nearest(event); if (one) choose(one.line, one.point); };
    svg.addEventListener("focusin", (event) => look(points.find((one) => one.mark === event.target) || pinned));
    svg.onkeydown = (event) => {
      const now = points.find((one) => one.mark === event.target);
      if (!now) return;
      const own = points.filter((one) => one.line === now.line), at = own.indexOf(now);
      const beside = (step) => {
        const line = read[read.indexOf(now.line) + step];
        return points.filter((one) => one.line === line)
          .reduce((best, one) => (!best || Math.abs(one.x - now.x) < Math.abs(best.x - now.x) ? one : best), null);
      };
      const moves = { ArrowLeft: () => own[at - 1], ArrowRight: () => own[at + 1], Home: () => own[0], End: () => own.at(-1),
        ArrowUp: () => beside(-1), ArrowDown: () => beside(1) };
      if (event.key === "Enter" || event.key === " ") choose(now.line, now.point);
      else if (!moves[event.key]) return;
      else {
        const to = moves[event.key]();
        if (to) to.mark.focus();
      }
      event.preventDefault();
    };
    settle(null);
    const pin = (name, x) => {
      settle(points.find((one) => one.line.name === name && String(one.point[0]) === x) || null);
      look(pinned);
      return !!pinned;
    };
    return { box: element("div", {}, element("p", { class: "note" }, ylabel), svg, legend), legend, pin };
  }

  /* An estimate in words: hundredths to text, with its interval. */
  const estimate = ([, y, low, high]) =>
    `${signed(y)}` + (typeof low === "number" ? ` [${signed(low)}, ${signed(high)}]` : low === null ? " (no interval: too few)" : "");

  /* A figure of one or more panels; its point that is pinned stands in the address under `data.key`. */
  function curves(data, did) {
    const told = element("p", { class: "told", "aria-live": "polite" });
    const tell = (panel) => (line, point) => {
      const where = panel.ticks ? panel.ticks[point[0]] : `${panel.xlabel} ${minus(point[0])}`;
      told.replaceChildren((panel.name ? `${panel.name}; ` : "") + `${line.name}, ${where}: `,
        element("strong", {}, estimate(point)), ` ${panel.unit}`);
    };
    const parts = data.panels.map((panel, number) => plot({ ...panel, label: panel.name || panel.ylabel, tell: tell(panel),
      choose: (line, point) => did({ [data.key]: `${number},${point[0]},${line.name}` }) }));
    const named = (panel) => JSON.stringify(panel.lines.map((line) => line.name));
    data.panels.slice(1).forEach((panel, at) => named(panel) === named(data.panels[at]) && parts[at].legend.remove());
    const shown = data.panels.flatMap((panel, number) =>
      [...(panel.name ? [element("p", { class: "panel" }, panel.name)] : []), parts[number].box]);
    const box = element("div", { class: "interactive curves" }, ...shown, told);
    const chosen = (state) => {
      const [, panel, x, name] = /^(\d+),([^,]*),(.*)$/.exec(state.get(data.key) || "") || [];
      return { panel: +panel, x, name };
    };
    const show = (state) => {
      const { panel, x, name } = chosen(state);
      told.textContent = `${book.HOW} Enter or a click pins it.`;
      parts.forEach((part, number) => number !== panel && part.pin());
      if (parts[panel]) parts[panel].pin(name, x);
    };
    return { box, show, keys: [data.key], knows: (state) => !!parts[chosen(state).panel] };
  }

  book.HOW = "Each point can be read: by the mouse, a finger, or the arrow keys.";
  book.plot = plot;
  book.figure("curves", curves);
})();
