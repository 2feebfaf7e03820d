/* A circuit as a graph: a lane of sites for each role, layers from the top, a line for each path that was measured
   (report/interactive.py, circuit_graph). A site that is pinned lights its paths; a threshold says which are shown. */
"use strict";
(() => {
  const { element, drawn, framed, number, signed, elsewhere } = book;
  const ROW = 27, TOP = 34, LISTED = 12, WIDEST = 13;

  function circuitGraph(data, did) {
    const [FROM, TO, EFFECT, LOW, HIGH, SURE] = [0, 1, 2, 3, 4, 5];
    const narrowest = 84 * Math.max(4, data.lanes.length);
    const site = (node) => data.nodes[node][0].split(" at ")[0];
    const named = (node) => (/\d/.test(site(node)) ? site(node) : "");
    const largest = Math.max(1, ...data.edges.map((edge) => Math.abs(edge[EFFECT])));
    let least = data.least, pinned = "", width = 0;

    const slider = element("input", { type: "range", min: 0, max: 100, step: 1 }), count = element("output");
    const svg = drawn("svg", { class: "graph", role: "group", "aria-label": "Paths between the sites of the circuit, by role and layer" });
    const frame = element("div", { class: "frame" }, svg);
    const told = element("p", { class: "told", "aria-live": "polite" });
    const list = element("tbody"), caption = element("caption");
    const head = element("tr", {}, ...["from", "to", "effect (logits)", data.tested ? `${data.level} interval` : `range over quads (${data.quads})`,
      ...(data.tested ? ["significant"] : [])].map((text) => element("th", { scope: "col" }, text)));
    const table = framed("The strongest paths", element("table", { class: "edges" }, caption, element("thead", {}, head), list));
    const untested = data.edges.length ? `Too few quads (${data.quads}) for intervals, so that no path is tested. `
      : "No path between these sites was measured. ";
    const note = element("p", { class: "note" }, "Blue: the path raises logit_diff; orange: it lowers it. A line is as wide as the " +
      `root of its effect. ` + (data.tested ? `Intervals hold for all paths at one token together; dashed: not significant. `
        : untested) + (data.kept ? "Pale sites are in neither circuit; paths lead to and from those that step 06 followed. " : "") +
      (data.hidden ? `Of the circuit over all tokens, ${data.hidden} sites further down the order of attribution are not drawn. ` : "") +
      "A click, tap or Enter pins a site.");

    /* The slider moves in squares, so that small thresholds, where most paths are, have room. */
    const toSlider = (threshold) => 100 * Math.sqrt(Math.min(1, threshold / largest));
    slider.oninput = () => { least = Math.round(largest * (slider.value / 100) ** 2); paint(); };
    slider.onchange = () => did({ min: (least / 100).toFixed(2) });

    const ends = (edge) => [edge[FROM], edge[TO]];
    const about = (edge, node) => node !== "" && ends(edge).some((end) => site(end) === node);
    const ofEdge = (edge) => `${data.nodes[edge[FROM]][0]} \u2192 ${data.nodes[edge[TO]][0]}: ${signed(edge[EFFECT])} logits ` +
      (edge[LOW] === null ? "(no interval)" : data.tested ? `[${signed(edge[LOW])}, ${signed(edge[HIGH])}]`
        : `(${signed(edge[LOW])} to ${signed(edge[HIGH])} over quads)`) +
      (data.tested ? `, ${edge[SURE] ? "" : "not "}significant` : "");

    const across = (lane) => 78 + ((width - 128) * lane) / Math.max(1, data.lanes.length - 1);
    function place() {
      width = Math.max(narrowest, frame.clientWidth || 680);
      const height = TOP + data.layers.length * ROW + 6;
      svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
      svg.style.cssText = `width:${width}px;height:${height}px`;
      return data.nodes.map(([, lane, row]) => [across(lane), TOP + 14 + row * ROW]);
    }
    function line([x, y], [u, v]) {
      if (x !== u) return `M${x + 28} ${y}C${(x + u) / 2} ${y} ${(x + u) / 2} ${v} ${u - 28} ${v}`;
      const out = Math.min(x + 40 + 0.28 * Math.abs(v - y), x + 28 + (width - x - 34) / 0.75);  // no bend leaves the picture
      return `M${x + 28} ${y}C${out} ${y} ${out} ${v} ${x + 28} ${v}`;
    }
    const write = (x, y, text, name) => svg.append(drawn("text", { x, y, class: name }, text));

    const marks = [];  // what lights and dims: [of what sites, part of the picture]
    function draw() {
      const places = place();
      svg.replaceChildren();
      marks.length = 0;
      data.layers.forEach((layer, row) => layer && write(2, TOP + 18 + row * ROW, layer, "layer"));
      write(2, 25, "layer", "layer");
      data.lanes.forEach((heading, lane) => {
        // two lines, so that lanes can be narrow
        (heading.match(/\S.{0,10}(?=\s|$)/g) || []).forEach((part, at) => write(across(lane), 12 + 13 * at, part, "lane"));
      });
      const shown = data.edges.filter((edge) => Math.abs(edge[EFFECT]) >= least)
        .sort((one, two) => Math.abs(one[EFFECT]) - Math.abs(two[EFFECT]));
      for (const edge of shown) {
        const d = line(places[edge[FROM]], places[edge[TO]]), title = drawn("title", {}, ofEdge(edge));
        const look = data.tested && !edge[SURE] ? "unsure" : edge[EFFECT] < 0 ? "against" : "for";
        const path = drawn("path", { d, class: look, "stroke-width": Math.max(1, WIDEST * Math.sqrt(Math.abs(edge[EFFECT]) / largest)) });
        const wide = drawn("path", { d, class: "wide" }, title);  // so that a thin line can be hit
        const group = drawn("g", { class: "edge" }, path, wide);
        group.onclick = () => { told.textContent = ofEdge(edge); };
        marks.push([edge, group]);
        svg.append(group);
      }
      data.nodes.forEach(([name], node) => {
        const [x, y] = places[node], own = named(node);
        const pale = data.kept && own && !data.kept.includes(node) ? " pale" : "";
        const group = drawn("g", { class: "node" + pale, tabindex: 0, role: own ? "button" : "img", "aria-label": name },
          drawn("rect", { x: x - 27, y: y - 11, width: 54, height: 22, rx: 5 }), drawn("text", { x, y: y + 4, class: "axis" }, site(node)));
        const toggle = () => own && did({ site: own === pinned ? "" : own });
        group.onclick = toggle;
        group.onkeydown = (event) => {
          if (event.key !== "Enter" && event.key !== " ") return;
          event.preventDefault();
          toggle();
          const again = [...svg.querySelectorAll(".node")][node];
          if (again) again.focus();
        };
        group.onmouseenter = group.onfocus = () => light(site(node));
        group.onmouseleave = group.onblur = () => light(pinned);
        marks.push([[node, node], group]);
        svg.append(group);
      });
    }
    function light(which) {
      const known = data.nodes.some((_, node) => site(node) === which);
      for (const [of, part] of marks) {
        const near = about(of, which);
        part.classList.toggle("dim", known && !near && part.classList.contains("edge"));
        part.classList.toggle("on", known && near);
        if (part.getAttribute("role") === "button") part.setAttribute("aria-pressed", pinned !== "" && about(of, pinned));
      }
    }
    function tell() {
      const known = data.nodes.some((_, node) => site(node) === pinned);
      const own = data.edges.filter((edge) => about(edge, pinned)), shown = own.filter((edge) => Math.abs(edge[EFFECT]) >= least);
      const also = data.notes[pinned] ? ` ${data.notes[pinned]}.` : data.kept && known ? " in neither circuit." : "";
      told.replaceChildren();
      if (pinned === "") told.append("No site is pinned.");
      else if (!known) told.append(element("strong", {}, pinned), `:${also} No path to or from it was measured here.`, ...elsewhere(data.links, pinned));
      else told.append(element("strong", {}, pinned), `:${also} Of the paths to or from it, ${own.length} measured, ` +
        `${shown.length} at the threshold or above.`, ...elsewhere(data.links, pinned));
    }
    function listEdges() {
      const near = data.edges.filter((edge) => about(edge, pinned)), all = near.length ? near : data.edges;
      const shown = all.filter((edge) => Math.abs(edge[EFFECT]) >= least).sort((one, two) => Math.abs(two[EFFECT]) - Math.abs(one[EFFECT]));
      caption.textContent = `Paths shown${near.length ? ` to or from ${pinned}` : ""}: ${shown.length}` +
        (shown.length > LISTED ? `, here the ${LISTED} strongest` : "");
      list.replaceChildren(...shown.slice(0, LISTED).map((edge) => element("tr", {}, ...[...ends(edge).map((end) => data.nodes[end][0]),
        signed(edge[EFFECT]), edge[LOW] === null ? "none" : `${signed(edge[LOW])} to ${signed(edge[HIGH])}`,
        ...(data.tested ? [edge[SURE] ? "yes" : "no"] : [])].map((text) => element("td", {}, text)))));
    }
    function paint() {
      draw();
      const shown = data.edges.filter((edge) => Math.abs(edge[EFFECT]) >= least).length;
      slider.setAttribute("aria-valuetext", `${number(least)} logits`);
      count.textContent = `${number(least)} logits or more: ${shown} of ${data.edges.length}`;
      light(pinned);
      tell();
      listEdges();
    }
    const show = (state) => {
      const asked = parseFloat(state.get("min"));
      least = asked >= 0 ? Math.round(100 * asked) : data.least;
      slider.value = toSlider(least);
      pinned = state.get("site") || "";
      paint();
    };
    new ResizeObserver(() => Math.max(narrowest, frame.clientWidth) !== width && paint()).observe(frame);
    const box = element("div", { class: "interactive circuit-graph" },
      element("p", {}, element("label", {}, "Show paths of at least ", slider), " ", count), frame, note, told, table);
    const knows = (state) => state.has("min") || data.nodes.some((_, node) => named(node) && named(node) === state.get("site"));
    return { box, show, keys: ["site", "min"], knows };
  }

  book.figure("circuit-graph", circuitGraph);
})();
