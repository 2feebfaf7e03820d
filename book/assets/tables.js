/* Tables that can be searched and sorted: those of class "sortable", or in a container of that class. Long ones show their
   first rows, until all are asked for; paper has all of them. */
"use strict";
(() => {
  const { element, labelled, remember } = book;

  const FIRST = 12, TALL = 700, SHORT = 420; // rows; pixels of a table that is folded, and that are left of it
  const more = (count, all) => {
    const button = element("button", { type: "button", class: "more" }, `Show all ${count} rows`);
    button.onclick = all;
    return button;
  };

  /* A table of a notebook: what is beyond a screen of it is folded. */
  function long(table) {
    const rows = [...table.tBodies].flatMap((body) => [...body.rows]), top = table.getBoundingClientRect();
    const rest = rows.filter((row) => row.getBoundingClientRect().bottom - top.top > SHORT);
    if (top.height > TALL && rest.length > 2) {
      rest.forEach((row) => row.classList.add("rest"));
      const button = more(rows.length, () => { rest.forEach((row) => row.classList.remove("rest")); button.remove(); });
      table.after(button);
    }
    return { box: table, keys: [], show: () => {}, knows: () => false };
  }

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
      let found = 0;
      for (const row of body.rows) {
        row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word)) ||
          selects.some((select, at) => select && select.value && text(row, at) !== select.value);
        found += !row.hidden;
        row.classList.toggle("rest", !whole && found > FIRST);
      }
      button.hidden = whole || found <= FIRST;
      button.textContent = `Show all ${found} rows`;
      count.textContent = `${found} of ${rows.length} found`;
    }
    function change() {
      const chosen = { [key("find")]: find.value, [key("sort")]: sorted };
      selects.forEach((select, at) => select && (chosen[key(titles[at])] = select.value));
      remember(chosen);
    }
    let whole = rows.length < 2 * FIRST;
    const button = more(rows.length, () => { whole = true; show(); });
    place.classList.add("sortable");
    place.append(button);
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
  book.each("table.dataframe:not(.sortable)", (table) => long(table));
  book.each("table.sortable", (table) => sortable(table.parentElement));
})();
