/* Figures that a reader can touch, from the JSON that stands in the page (report/interactive.py), and tables that can be
   searched and sorted. What is chosen stands in the address behind "#", so that a view can be cited. */
"use strict";
(() => {
  const element = (tag, attributes = {}, ...inside) => {
    const made = document.createElement(tag);
    for (const name in attributes) made.setAttribute(name, attributes[name]);
    made.append(...inside);
    return made;
  };
  const drawn = (tag, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const name in attributes) made.setAttribute(name, attributes[name]);
    return made;
  };
  const labelled = (text, control) => element("label", {}, text + " ", control);
  const state = () => new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
  const remember = (chosen) => {
    const all = state();
    for (const name in chosen) chosen[name] ? all.set(name, chosen[name]) : all.delete(name);
    history.replaceState(null, "", all.size ? "#" + all : location.pathname + location.search);
  };

  /* --- the map of sites --- */

  const number = (hundredths) => (Math.abs(hundredths) / 100).toFixed(2);
  const signed = (hundredths) => (hundredths < 0 ? "\u2212" : "") + number(hundredths);
  const OTHER = { rises: "falls", falls: "rises" };

  function siteMap(place) {
    const data = JSON.parse(place.querySelector("script").textContent);
    const columns = data.layers.length;
    const names = data.lines.flatMap((line) =>
      data.layers.map((layer) => (isNaN(line) ? `${line} ${layer}` : `${layer}.${line}`)));
    const kind = (index) => {
      const line = data.lines[Math.floor(index / columns)];
      return { attn: "attention module", mlp: "MLP" }[line] || "attention head";
    };
    let act = 0, pinned = -1;
    const part = () => data.shown[act];

    const choices = element("fieldset", {}, element("legend", {}, "Each site's activation is"));
    data.shown.forEach((one, index) => {
      const radio = element("input", { type: "radio", name: "site-map-act", value: index });
      radio.onchange = () => { act = index; colour(); pin(pinned); };
      choices.append(element("label", {}, radio, " " + one.name));
    });
    const grid = element("table", { role: "grid", "aria-label": "Effect of each site on logit_diff: heads and modules by layer" });
    grid.style.minWidth = `${3.4 + columns * 1.1}rem`;
    if (data.lines.length > 20) grid.classList.add("dense");
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
    const pairs = element("details", { class: "pairs" }, count, element("div", { class: "frame" },
      element("table", {}, element("thead", {}, head), list)));

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
        `. Over all sites together, this is ${one.sure[index] ? "" : "not "}significant.`);
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
    const choose = (index) => {
      pin(index);
      remember({ site: names[index], act: act ? String(act) : "" });
    };
    choices.addEventListener("change", () => remember({ site: names[pinned], act: act ? String(act) : "" }));
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

    const box = element("div", { class: "interactive site-map" }, choices, element("div", { class: "frame" }, grid), scale, told,
      dots, pairs);
    const twin = document.getElementById(place.dataset.twin);
    if (twin) {
      twin.classList.add("touched");
      twin.prepend(box);
      place.remove();
    } else place.replaceWith(box);
    const first = Math.max(0, names.indexOf(data.marked[0]));
    const restore = () => {
      const chosen = state(), index = names.indexOf(chosen.get("site"));
      act = data.shown[chosen.get("act")] ? +chosen.get("act") : 0;
      choices.querySelectorAll("input")[act].checked = true;
      colour();
      pin(index < 0 ? first : index);
      const frame = grid.parentElement, cell = cells[pinned];
      frame.scrollLeft = cell.offsetLeft - frame.clientWidth / 2;
      if (index >= 0) box.scrollIntoView();
    };
    restore();
    addEventListener("hashchange", () => state().has("site") && restore());
  }

  /* --- tables that can be searched and sorted --- */

  function sortable(place) {
    const table = place.querySelector("table"), body = table.tBodies[0], rows = [...body.rows];
    const heads = [...table.tHead.rows[0].cells], titles = heads.map((cell) => cell.textContent.trim());
    const key = (name) => `${table.id || titles[0]}.${name}`;
    const text = (row, column) => row.cells[column].textContent.trim();
    const find = element("input", { type: "search" }), count = element("output");
    const selects = titles.map((title, column) => {
      const values = [...new Set(rows.map((row) => text(row, column)))].sort();
      if (values.length < 2 || values.length > 6) return null;
      const select = element("select", {}, element("option", { value: "" }, "any"));
      select.append(...values.map((value) => element("option", { value }, value || "none")));
      select.onchange = change;
      return select;
    });
    find.oninput = change;
    let sorted = "";
    heads.forEach((cell, column) => {
      const button = element("button", { type: "button" }, titles[column]);
      button.onclick = () => { sorted = sorted === String(column) ? `-${column}` : String(column); change(); };
      cell.replaceChildren(button);
    });

    function show() {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      const column = Math.abs(sorted), down = sorted.startsWith("-") ? -1 : 1;
      const compared = new Intl.Collator("en", { numeric: true });
      body.append(...(sorted ? [...rows].sort((a, b) => down * compared.compare(text(a, column), text(b, column))) : rows));
      heads.forEach((cell, at) => at === column && sorted
        ? cell.setAttribute("aria-sort", down < 0 ? "descending" : "ascending") : cell.removeAttribute("aria-sort"));
      let shown = 0;
      rows.forEach((row) => {
        row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word)) ||
          selects.some((select, at) => select && select.value && text(row, at) !== select.value);
        shown += !row.hidden;
      });
      count.textContent = `${shown} of ${rows.length} shown`;
    }
    function change() {
      show();
      const chosen = { [key("find")]: find.value, [key("sort")]: sorted };
      selects.forEach((select, at) => select && (chosen[key(titles[at])] = select.value));
      remember(chosen);
    }
    place.classList.add("sortable");
    const controls = element("div", { class: "controls" }, labelled("Find", find),
      ...selects.map((select, at) => select && labelled(titles[at], select)).filter(Boolean), count);
    place.prepend(controls);
    const chosen = state();
    find.value = chosen.get(key("find")) || "";
    sorted = chosen.get(key("sort")) || "";
    selects.forEach((select, at) => select && (select.value = chosen.get(key(titles[at])) || ""));
    if ([...chosen.keys()].some((name) => name.startsWith(key("")))) place.scrollIntoView();
    show();
  }

  const start = () => {
    document.querySelectorAll("div.site-map").forEach(siteMap);
    document.querySelectorAll("div.sortable").forEach(sortable);
    document.querySelectorAll("table.sortable").forEach((table) => sortable(table.parentElement));
  };
  document.readyState === "loading" ? addEventListener("DOMContentLoaded", start) : start();
})();
