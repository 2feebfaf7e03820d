/* A grid of sites, lines x layers, in which keys, a mouse and a finger find their way; the figures that have one colour it
   and say what is in it. */
"use strict";
(() => {
  const { element, signed } = book;

  /* `tell(index)` is called for the site that is looked at, `choose(index)` for one that is picked. */
  book.grid = ({ layers, lines, marked = [], label, tell, choose }) => {
    const columns = layers.length, cells = [];
    const names = lines.flatMap((line) => layers.map((layer) => (isNaN(line) ? `${line} ${layer}` : `${layer}.${line}`)));
    const table = element("table", { role: "grid", "aria-label": label });
    table.style.minWidth = `${3.4 + columns * 1.1}rem`;
    if (lines.length > 20) table.classList.add("dense");
    lines.forEach((line) => {
      const row = table.insertRow();
      row.append(element("th", { scope: "row" }, line));
      layers.forEach(() => {
        const cell = element("td", { role: "gridcell", tabindex: -1 });
        cell.dataset.index = cells.length;
        if (marked.includes(names[cells.length])) cell.classList.add("marked");
        cells.push(row.appendChild(cell));
      });
    });
    const every = Math.ceil(columns / 10), foot = table.insertRow();
    foot.append(element("th", { scope: "row" }, "layer"));
    layers.forEach((layer, index) => foot.append(
      element("th", { scope: "col", "aria-label": `layer ${layer}` }, index % every ? "" : String(layer))));

    /* Values in hundredths, null where there is none; full colour from `full` on; a dot where `sure`. */
    const colour = (values, full, sure = []) => cells.forEach((cell, index) => {
      const value = values[index];
      const strength = value === null ? 0 : Math.min(1, Math.abs(value) / 100 / (full || 1));
      cell.style.setProperty("--strength", strength.toFixed(3));
      cell.className = cell.classList.contains("marked") ? "marked" : "";
      cell.classList.add(value === null ? "unknown" : value < 0 ? "against" : "for");
      cell.classList.toggle("strong", strength > 0.65);
      cell.classList.toggle("full", strength > 0.95);
      cell.textContent = sure[index] ? "\u2022" : "";
      cell.setAttribute("aria-label", `${names[index]}: ${value === null ? "not measured" : signed(value) + " logits"}`);
    });

    let pinned = 0;
    const box = element("div", { class: "frame" }, table);
    const pin = (index) => {
      pinned = index;
      cells.forEach((cell, at) => {
        cell.tabIndex = at === index ? 0 : -1;
        cell.setAttribute("aria-selected", at === index);
      });
      const left = cells[index].offsetLeft;
      if (left < box.scrollLeft + 60 || left > box.scrollLeft + box.clientWidth - 20) box.scrollLeft = left - box.clientWidth / 2;
      tell(index);
    };
    const at = (event) => event.target.dataset && event.target.dataset.index;
    table.onclick = (event) => at(event) && choose(+at(event));
    for (const kind of ["mouseover", "focusin"]) table.addEventListener(kind, (event) => at(event) && tell(+at(event)));
    table.onmouseleave = () => tell(pinned);
    table.onkeydown = (event) => {
      if (!at(event)) return;
      const index = +at(event), column = index % columns;
      const to = { ArrowLeft: column ? index - 1 : index, ArrowRight: column < columns - 1 ? index + 1 : index,
        ArrowUp: index - columns, ArrowDown: index + columns, Home: index - column, End: index - column + columns - 1 }[event.key];
      if (event.key === "Enter" || event.key === " ") choose(index);
      else if (to === undefined) return;
      else if (cells[to]) cells[to].focus();
      event.preventDefault();
    };
    return { box, names, pin, colour };
  };
})();
