/* The map of sites: what each does when it is put back or taken out, and in which pairs (report/interactive.py, site_map). */
"use strict";
(() => {
  const { element, drawn, framed, labelled, number, signed, elsewhere } = book;
  const OTHER = { rises: "falls", falls: "rises" };

  function siteMap(data, did) {
    const kind = (index) => {
      const line = data.lines[Math.floor(index / data.layers.length)];
      return { attn: "attention module", mlp: "MLP" }[line] || "attention head";
    };
    let act = -1, pinned = -1;
    const part = () => data.shown[act];

    const choices = element("fieldset", {}, element("legend", {}, "Each site's activation is"));
    data.shown.forEach((one, index) => {
      const radio = element("input", { type: "radio", name: "site-map-act", value: index });
      choices.append(element("label", {}, radio, " " + one.name));
    });
    const { box: frame, names, pin, colour: paint } = book.grid({ layers: data.layers, lines: data.lines, marked: data.marked,
      label: "Effect of each site on logit_diff: heads and modules by layer", tell, choose: (index) => choose(index) });
    const first = Math.max(0, names.indexOf(data.marked[0]));
    const find = element("input", { type: "search", size: 9, placeholder: names[first] });
    const scale = element("p", { class: "note" });
    const told = element("p", { class: "told", "aria-live": "polite" });
    const dots = drawn("svg", { viewBox: "0 0 440 64", role: "img" });
    const list = element("tbody"), count = element("summary");
    const head = element("tr", {}, ...["clean prompt", "corrupt prompt", "half", "effect (logits)", "share of its gap"]
      .map((text) => element("th", { scope: "col" }, text)));
    const pairs = element("details", { class: "pairs" }, count,
      framed("Pairs", element("table", {}, element("thead", {}, head), list)));

    function colour() {
      const { estimate, sure, full, verb } = part();
      paint(estimate, full, sure);
      scale.textContent = `Blue: logit_diff ${verb}; orange: it ${OTHER[verb]}; full colour from ${full.toFixed(2)} logits on. ` +
        `Brackets: ${data.level} intervals that hold for all sites together; a dot: significant by them, and by the test. ` +
        "Framed: the critical slice. Arrow keys move, Enter or a click pins.";
    }

    function tell(index) {
      const one = part(), value = one.estimate[index];
      told.replaceChildren(element("strong", {}, names[index]), `, ${kind(index)}` +
        (data.marked.includes(names[index]) ? " of the critical slice" : "") + ": ");
      if (value === null) return told.append("not measured.");
      const low = one.low[index], high = one.high[index], sign = value < 0 ? -1 : 1;
      const ends = low === null ? " (no interval: too few quads)" :
        ` [${[low * sign, high * sign].sort((a, b) => a - b).map(signed).join(", ")}]`;
      const other = one.discovery ? one.discovery[index] : null;
      const share = one.share[index] === null ? "" : `, ${signed(one.share[index])} of the gap`;
      const verb = number(value) === "0.00" ? "changes" : value < 0 ? OTHER[one.verb] : one.verb;
      told.append(`${one.name}, logit_diff ${verb} by `, element("strong", {}, `${number(value)} logits`),
        `${ends}${share}` + (other === null ? "" : " on the confirmation half; on the discovery half it " +
          `${number(other) === "0.00" ? "changes" : other < 0 ? OTHER[one.verb] : one.verb} by ${number(other)}`) +
        `. Over all sites together, this is ${one.sure[index] ? "" : "not "}significant.`, ...elsewhere(data.links, names[index]));
    }

    function eachPair(index) {
      const values = act === 0 ? data.effects[names[index]] : undefined;
      pairs.hidden = !values;
      dots.style.display = values ? "" : "none";
      if (!values) return;
      const shown = values.map((value, pair) => [value, ...data.pairs[pair]]).filter((row) => row[0] !== null)
        .sort((one, two) => one[0] - two[0]);
      count.textContent = `${names[index]} in each of ${shown.length} pairs, the least effect first`;
      list.replaceChildren(...shown.map(([value, clean, corrupt, half, gap, pair]) => {
        const link = elsewhere([[clean, "pairs", "fig-pairs"]], names[index], { pair }), share = gap ? signed((100 * value) / gap) : "";
        return element("tr", {}, element("td", {}, ...(link.length ? link : [clean])),
          ...[corrupt, half, signed(value), share].map((text) => element("td", {}, text)));
      }));
      const reach = Math.max(1, ...shown.map((row) => Math.ceil(Math.abs(row[0]) / 100)));
      const across = (value) => 172 + (150 * value) / reach;
      dots.replaceChildren();
      dots.setAttribute("aria-label", `${names[index]}: its effect in single pairs, from ${signed(shown[0][0])} to ` +
        `${signed(shown.at(-1)[0])} logits`);
      const write = (x, y, text, name) => {
        const made = drawn("text", { x, y, class: name });
        made.textContent = text;
        dots.append(made);
      };
      for (const tick of [-reach, -reach / 2, 0, reach / 2, reach]) {
        dots.append(drawn("line", { x1: across(tick), x2: across(tick), y1: 4, y2: 46, class: tick ? "tick" : "zero" }));
        write(across(tick), 60, String(tick).replace("-", "\u2212"), "axis");
      }
      const halves = [...new Set(shown.map((row) => row[3]))].sort();
      halves.forEach((half, line) => write(340, 18 + 22 * line, half, `half${line}`));
      for (const [value, clean, corrupt, half] of shown) {
        const line = halves.indexOf(half);
        const dot = drawn("circle", { cx: across(value / 100), cy: 14 + 22 * line, r: 4, class: `half${line}` });
        const title = drawn("title", {});
        title.textContent = `${clean} against ${corrupt}: ${signed(value)} logits`;
        dot.append(title);
        dots.append(dot);
      }
    }

    const remember = (chosen) => did({ site: names[pinned], act: act ? String(act) : "", ...chosen });
    const choose = (index) => remember({ site: names[index] });
    choices.onchange = (event) => remember({ act: +event.target.value ? event.target.value : "" });
    find.onchange = () => {
      const index = names.indexOf(find.value.trim().toLowerCase().replace(/^(mlp|attn)\s*/, "$1 "));
      if (index >= 0) choose(index);
      else if (find.value) told.textContent = `There is no site "${find.value}" here: heads are called layer.head, as ` +
        `${names[first]}, modules ${names.at(-1)}.`;
    };
    const box = element("div", { class: "interactive site-map" }, choices, labelled("Find a site", find),
      frame, scale, told, dots, pairs);
    const show = (state) => {
      const index = names.indexOf(state.get("site")), chosen = data.shown[state.get("act")] ? +state.get("act") : 0;
      if (chosen !== act) {
        act = chosen;
        choices.querySelectorAll("input")[act].checked = true;
        colour();
      }
      pinned = index < 0 ? first : index;
      pin(pinned);
      eachPair(pinned);
    };
    return { box, show, keys: ["site", "act"], knows: (state) => names.includes(state.get("site")) };
  }

  book.figure("site-map", siteMap);
})();
