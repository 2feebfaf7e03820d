/* The slice, site by site: what sets of sites were measured to bring back and to cost together, in both halves
   (report/interactive.py, slice_builder). A set that was not measured is said not to be; nothing is added up. */
"use strict";
(() => {
  const { element, drawn, framed, signed, elsewhere } = book;
  const HIGH = 200, TOP = 24, LEFT = 40, LEAST = 300;
  const written = (span) => signed(span[0]) + (span[1] === null ? "" : ` [${signed(span[1])}, ${signed(span[2])}]`);
  const told = (count) => (count === 1 ? "first site" : `first ${count} sites`);
  const among = (names) => (names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`);

  function sliceBuilder(data, did) {
    const total = data.order.length, halves = Object.keys(data.curves);
    const half = halves.at(-1), of = (name) => (halves.length > 1 ? ` (${name} half)` : "");
    const inHalves = (spoken) => halves.slice().reverse().map((name) => spoken(name) + of(name)).join("; ");
    const inOrder = (set) => [...set].sort((a, b) => a - b);
    let chosen = new Set(), pinned = "", width = 0;

    const svg = drawn("svg", { class: "growth", role: "img", "aria-label": "Joint recovery and joint damage as sites are added in order" });
    const frame = element("div", { class: "frame" }, svg);
    const say = element("div", { class: "told", "aria-live": "polite" });
    const chips = data.order.map((name, index) => {
      const chip = element("button", { type: "button", class: "chip" }, name);
      chip.onclick = () => toggle(index);
      return chip;
    });
    const button = (text, act) => {
      const made = element("button", { type: "button" }, text);
      made.onclick = act;
      return made;
    };
    const next = () => data.order.findIndex((_, index) => !chosen.has(index));
    const more = button("Add the next", () => next() >= 0 && toggle(next()));
    const less = button("Take out the last", () => chosen.size && toggle(Math.max(...chosen)));
    const slice = button(`The critical slice (${data.size})`, () => choose(new Set(Array(data.size).keys()), ""));
    const none = button("None", () => choose(new Set(), ""));
    const note = element("p", { class: "note" }, "Shares of the gap between clean and corrupt prompts. Blue: joint recovery (clean values put into the " +
      "corrupt run); orange: joint damage (corrupt values put into the clean run)" +
      (halves.length > 1 ? `; full lines: ${half} half, pale: ${halves[0]} half` : "") +
      (data.sums[0][1] === null ? ". There are too few quads for intervals" : "; brackets and bands: intervals") + `. Level line: ${signed(data.share)}, the share asked for; ` +
      `upright line: the critical slice${data.reached ? "" : ", which does not reach it"}. A click on the curve takes as many sites.`);

    const write = (set) => {
      const sites = inOrder(set);
      return sites.length && sites.at(-1) === sites.length - 1 ? String(sites.length) : sites.map((index) => data.order[index]).join(",") || "0";
    };
    const read = (text) => {
      if (text === null) return new Set(Array(data.size).keys());
      if (/^\d+$/.test(text)) return new Set(Array(Math.min(total, +text)).keys());
      return new Set(text.split(",").map((name) => data.order.indexOf(name)).filter((index) => index >= 0));
    };
    const choose = (set, site) => did({ set: write(set), ...(site ? { site } : {}) });
    function toggle(index) {
      const set = new Set(chosen);
      if (!set.delete(index)) set.add(index);
      choose(set, data.order[index]);
    }

    /* How many sites from the first on a set has all of, and, where it has no others, that it is one that was measured. */
    const run = (set) => {
      let count = 0;
      while (set.has(count)) count += 1;
      return count;
    };
    const spans = (count, name) => `joint recovery ${written(data.curves[name].recovery[count - 1])}, ` +
      `joint damage ${written(data.curves[name].damage[count - 1])}`;
    const line = (...parts) => say.append(element("p", {}, ...parts));
    const strong = (text) => element("strong", {}, text);
    const twos = () => data.twos.filter(([one, other]) => chosen.has(one) && chosen.has(other));
    const ofTwo = ([one, other, ...span]) => `${data.order[one]} with ${data.order[other]} ${written(span)}`;

    function tell() {
      const count = run(chosen), size = chosen.size, names = inOrder(chosen).map((index) => data.order[index]);
      say.replaceChildren();
      if (!size) line("No site is put back: choose some.");
      else if (count === size) {
        line(strong(`The ${told(size)} in order`), `: ${inHalves((name) => spans(size, name))}.` +
          (size > 1 ? ` One by one they recover ${written(data.sums[size - 1])} in all${of(half)}.` : ""));
      } else if (size === 1) {
        const [index] = chosen;
        line(strong(`${names[0]} alone`), `: recovery ${inHalves((name) => written(data.alone[name][index]))}. ` +
          "Its damage alone was not measured in this way.");
      } else if (size === 2 && twos().length) {
        line(strong(among(names)), `: joint recovery ${written(twos()[0].slice(2))}${of(half)}. Their joint damage was not measured` +
          (halves.length > 1 ? `, nor was the ${halves[0]} half.` : "."));
      } else {
        const around = Math.max(...chosen) + 1;
        line(strong(`${among(names)} together were not measured.`), ` What was${of(half)}:`);
        if (count) line(`Inside this set, the ${told(count)} in order: ${spans(count, half)}.`);
        if (twos().length) line(`Inside this set, two by two, joint recovery: ${twos().slice(0, 6).map(ofTwo).join("; ")}` +
          (twos().length > 6 ? `; and ${twos().length - 6} more.` : "."));
        line(`Each alone, recovery: ${inOrder(chosen).map((index) => `${data.order[index]} ${signed(data.alone[half][index][0])}`).join(", ")}. ` +
          "How much of this they share is not known, so it is not added up.");
        line(`Around this set, the ${told(around)} in order: ${spans(around, half)}.`);
      }
      if (!pinned) return;
      const place = data.order.indexOf(pinned);
      line(strong(pinned), place < 0 ? `, pinned, is not among the ${total} sites in this order.` : `, pinned, is number ${place + 1} in the order.`,
        ...elsewhere(data.links, pinned));
    }

    function draw() {
      width = Math.max(LEAST, frame.clientWidth || 680);
      svg.setAttribute("viewBox", `0 0 ${width} ${HIGH + 40}`);
      svg.style.cssText = `width:${width}px;height:${HIGH + 40}px`;
      svg.replaceChildren();
      const all = halves.flatMap((half) => Object.values(data.curves[half]).flat(2)).filter((value) => value !== null);
      const low = Math.min(0, ...all), top = Math.max(100, ...all), count = run(chosen);
      const x = (sites) => LEFT + ((width - LEFT - 16) * sites) / total, y = (value) => TOP + ((HIGH - TOP) * (top - value)) / (top - low);
      const put = (tag, attributes, ...inside) => svg.appendChild(drawn(tag, attributes, ...inside));
      for (let value = Math.ceil(low / 50) * 50; value <= top; value += 50) {
        put("line", { x1: LEFT, x2: width - 16, y1: y(value), y2: y(value), class: value ? "tick" : "zero" });
        put("text", { x: LEFT - 6, y: y(value) + 4, class: "end" }, (value / 100).toFixed(1).replace("-", "\u2212"));
      }
      put("line", { x1: LEFT, x2: width - 16, y1: y(data.share), y2: y(data.share), class: "asked" });
      put("line", { x1: x(data.size), x2: x(data.size), y1: TOP, y2: HIGH, class: "asked" });
      const every = Math.ceil((total * 26) / (width - LEFT));
      for (let sites = every; sites <= total; sites += every) put("text", { x: x(sites), y: HIGH + 16, class: "axis" }, String(sites));
      put("text", { x: (LEFT + width) / 2, y: HIGH + 34, class: "axis" }, "sites, in order of discovery recovery");
      halves.forEach((half, index) => ["recovery", "damage"].forEach((quantity) => {
        const own = [[0, null, null], ...data.curves[half][quantity]], pale = index < halves.length - 1 ? " pale" : "";
        const points = own.map(([value], sites) => `${x(sites)},${y(value)}`);
        const sure = own.map((span, sites) => [...span, sites]).filter((span) => span[1] !== null);
        if (!pale && sure.length) put("polygon", { class: `band ${quantity}`, points: [...sure.map((span) => `${x(span[3])},${y(span[1])}`),
          ...sure.reverse().map((span) => `${x(span[3])},${y(span[2])}`)].join(" ") });
        put("polyline", { class: `curve ${quantity}${pale}`, points: points.join(" ") });
        if (!pale) put("text", { class: "end", x: width - 18, y: y(own.at(-1)[0]) + (quantity === "damage" ? 18 : -9) }, quantity);
        if (!pale && count && count === chosen.size) put("circle", { class: quantity, cx: x(count), cy: y(own[count][0]), r: quantity === "damage" ? 4 : 6 });
      }));
      svg.onclick = (event) => {
        const sites = Math.round(((event.clientX - svg.getBoundingClientRect().left - LEFT) / (width - LEFT - 16)) * total);
        choose(new Set(Array(Math.max(0, Math.min(total, sites))).keys()), "");
      };
    }
    const rows = element("tbody"), columns = ["sites", "added", ...halves.slice().reverse().flatMap((half) => [`alone, ${half}`,
      `joint recovery, ${half}`, `joint damage, ${half}`])];
    const table = element("details", { class: "pairs" }, element("summary", {}, "Step by step"), framed("Step by step", element("table", {},
      element("thead", {}, element("tr", {}, ...columns.map((text) => element("th", { scope: "col" }, text)))), rows)));
    rows.append(...data.order.map((name, index) => element("tr", {}, ...[String(index + 1), name, ...halves.slice().reverse().flatMap((half) =>
      [data.alone[half][index], data.curves[half].recovery[index], data.curves[half].damage[index]].map(written))]
      .map((text) => element("td", {}, text)))));

    const show = (state) => {
      chosen = read(state.get("set"));
      pinned = state.get("site") || "";
      chips.forEach((chip, index) => {
        chip.setAttribute("aria-pressed", chosen.has(index));
        chip.classList.toggle("lit", data.order[index] === pinned);
      });
      draw();
      tell();
    };
    new ResizeObserver(() => Math.max(LEAST, frame.clientWidth) !== width && draw()).observe(frame);
    const box = element("div", { class: "interactive slice-builder" }, element("div", { class: "chips", role: "group", "aria-label":
      "Sites in order of discovery recovery: those pressed are replaced together" }, ...chips),
      element("div", { class: "chips" }, more, less, slice, none), say, frame, note, table);
    return { box, show, keys: ["site", "set"], knows: (state) => state.has("set") || data.order.includes(state.get("site")) };
  }

  book.figure("slice-builder", sliceBuilder);
})();
