/* The map of sites: what each does when it is put back or taken out, and in which pairs (report/interactive.py, site_map). */
"use strict";
(() => {
  const { element, drawn, framed, labelled, number, signed, elsewhere } = book;
  const OTHER = { rises: "falls", falls: "rises" };

  function siteMap(data, did) {
    const columns = data.layers.length;
    const names = data.lines.flatMap((line) =>
      data.layers.map((layer) => (isNaN(line) ? `${line} ${layer}` : `${layer}.${line}`)));
    const kind = (index) => {
      const line = data.lines[Math.floor(index / columns)];
      return { attn: "attention module", mlp: "MLP" }[line] || "attention head";
    };
    const first = Math.max(0, names.indexOf(data.marked[0]));
    let act = -1, pinned = -1;
    const part = () => data.shown[act];

    const choices = element("fieldset", {}, element("legend", {}, "Each site's activation is"));
    data.shown.forEach((one, index) => {
      const radio = element("input", { type: "radio", name: "site-map-act", value: index });
      choices.append(element("label", {}, radio, " " + one.name));
    });
    const grid = element("table", { role: "grid", "aria-label": "Effect of each site on logit_diff: heads and modules by layer" });
    grid.style.minWidth = `${3.4 + columns * 1.1}rem`;
    if (data.lines.length > 20) grid.classList.add("dense");
    const find = element("input", { type: "search", size: 9, placeholder: names[first] });
    const cells = [];
    data.lines.forEach((line) => {
      const row = grid.insertRow();
      row.append(element("th", { scope: "row" }, line));
      data.layers.forEach(() => {
        const cell = element("td", { role: "gridcell", tabindex: -1 });
        cell.dataset.index = cells.length;
        if (data.marked.includes(names[cells.length])) cell.classList.add("marked");
        cells.push(row.appendChild(cell));
      });
    });
    const every = Math.ceil(columns / 10), foot = grid.insertRow();
    foot.append(element("th", { scope: "row" }, "layer"));
    data.layers.forEach((layer, index) => foot.append(
      element("th", { scope: "col", "aria-label": `layer ${layer}` }, index % every ? "" : String(layer))));
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
      cells.forEach((cell, index) => {
        const value = estimate[index];
        const strength = value === null ? 0 : Math.min(1, Math.abs(value) / 100 / (full || 1));
        cell.style.setProperty("--strength", strength.toFixed(3));
        cell.className = cell.classList.contains("marked") ? "marked" : "";
        cell.classList.add(value === null ? "unknown" : value < 0 ? "against" : "for");
        cell.classList.toggle("strong", strength > 0.65);
        cell.classList.toggle("full", strength > 0.95);
        cell.textContent = sure[index] ? "\u2022" : "";
        cell.setAttribute("aria-label", `${names[index]}: ${value === null ? "not measured" : signed(value) + " logits"}`);
      });
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
      list.replaceChildren(...shown.map(([value, clean, corrupt, half, gap]) => element("tr", {},
        ...[clean, corrupt, half, signed(value), gap ? signed((100 * value) / gap) : ""].map((text) => element("td", {}, text)))));
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

    function pin(index) {
      pinned = index;
      cells.forEach((cell, at) => {
        cell.tabIndex = at === index ? 0 : -1;
        cell.setAttribute("aria-selected", at === index);
      });
      tell(index);
      eachPair(index);
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
    const at = (event) => event.target.dataset && event.target.dataset.index;
    grid.onclick = (event) => at(event) && choose(+at(event));
    for (const kind of ["mouseover", "focusin"]) grid.addEventListener(kind, (event) => at(event) && tell(+at(event)));
    grid.onmouseleave = () => tell(pinned);
    grid.onkeydown = (event) => {
      if (!at(event)) return;
      const index = +at(event), column = index % columns;
      const to = { ArrowLeft: column ? index - 1 : index, ArrowRight: column < columns - 1 ? index + 1 : index,
        ArrowUp: index - columns, ArrowDown: index + columns, Home: index - column, End: index - column + columns - 1 }[event.key];
      if (event.key === "Enter" || event.key === " ") choose(index);
      else if (to === undefined) return;
      else if (cells[to]) cells[to].focus();
      event.preventDefault();
    };

    const box = element("div", { class: "interactive site-map" }, choices, labelled("Find a site", find),
      element("div", { class: "frame" }, grid), scale, told, dots, pairs);
    const show = (state) => {
      const index = names.indexOf(state.get("site")), chosen = data.shown[state.get("act")] ? +state.get("act") : 0;
      if (chosen !== act) {
        act = chosen;
        choices.querySelectorAll("input")[act].checked = true;
        colour();
      }
      pin(index < 0 ? first : index);
      const frame = grid.parentElement, left = cells[pinned].offsetLeft;
      if (left < frame.scrollLeft + 60 || left > frame.scrollLeft + frame.clientWidth - 20) {
        frame.scrollLeft = left - frame.clientWidth / 2;
      }
    };
    return { box, show, keys: ["site", "act"], knows: (state) => names.includes(state.get("site")) };
  }

  book.figure("site-map", siteMap);
})();
