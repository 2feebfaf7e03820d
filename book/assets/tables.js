/* Tables that can be searched and sorted: those of class "sortable", or in a container of that class. */
"use strict";
(() => {
  const { element, labelled, remember } = book;

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
      const chosen = { [key("find")]: find.value, [key("sort")]: sorted };
      selects.forEach((select, at) => select && (chosen[key(titles[at])] = select.value));
      remember(chosen);
    }
    place.classList.add("sortable");
    const controls = element("div", { class: "controls" }, labelled("Find", find),
      ...selects.map((select, at) => select && labelled(titles[at], select)).filter(Boolean), count);
    place.prepend(controls);
    const keys = [key("find"), key("sort"), ...titles.map(key)];
    const restore = (state) => {
      find.value = state.get(key("find")) || "";
      sorted = state.get(key("sort")) || "";
      selects.forEach((select, at) => select && (select.value = state.get(key(titles[at])) || ""));
      show();
    };
    return { box: place, keys, show: restore, knows: (state) => keys.some((name) => state.has(name)) };
  }

  book.each("div.sortable", sortable);
  book.each("table.sortable", (table) => sortable(table.parentElement));
})();
