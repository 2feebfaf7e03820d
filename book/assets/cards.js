/* Cards: what is known of one neuron or feature each, folded up to its first line (report/interactive.py, cards). */
"use strict";
(() => {
  const { element, labelled, signed } = book;

  /* Values in hundredths as bars from zero, with their intervals in figures. */
  function bars({ name, rows }) {
    const all = rows.flatMap((row) => row.slice(1)).filter((value) => typeof value === "number");
    const low = Math.min(0, ...all), reach = Math.max(0, ...all) - low || 1, place = (value) => (100 * (value - low)) / reach;
    const body = rows.map(([what, value, from, to]) => {
      const bar = element("span", { class: "from-zero" }), known = typeof from === "number";
      bar.style.setProperty("--from", `${place(Math.min(0, value))}%`);
      bar.style.setProperty("--to", `${place(Math.max(0, value))}%`);
      const said = value === null ? "not measured" : signed(value) + (known ? ` [${signed(from)}, ${signed(to)}]` : "");
      return element("tr", {}, element("th", { scope: "row" }, what), element("td", {}, bar), element("td", {}, said));
    });
    return element("table", { class: "plain" }, element("caption", {}, name), element("tbody", {}, ...body));
  }
  const fact = ([name, said]) => [element("dt", {}, name), element("dd", {}, ...(Array.isArray(said)
    ? [element("ul", {}, ...said.map((one) => element("li", {}, one)))] : [said]))];

  function cards(data, did) {
    const find = element("input", { type: "search", size: 14 }), count = element("output");
    const each = data.cards.map((card) => {
      const inside = element("div", {}, ...card.bars.map(bars), element("dl", {}, ...card.facts.flatMap(fact)));
      const box = element("details", { class: "about" }, element("summary", {}, element("strong", {}, card.name), ` ${card.gist}`), inside);
      box.querySelector("summary").onclick = () => did({ [data.key]: box.open ? "" : card.name });
      return { ...card, box, text: box.textContent.toLowerCase() };
    });
    find.oninput = () => {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      for (const card of each) card.box.hidden = !words.every((word) => card.text.includes(word));
      count.textContent = `${each.filter((card) => !card.box.hidden).length} of ${each.length}`;
    };
    find.oninput();
    const box = element("div", { class: "interactive cards" },
      element("div", { class: "controls" }, labelled("Find a word or name", find), count),
      element("div", { class: "pack" }, ...each.map((card) => card.box)));
    const named = (state) => each.find((card) => card.name === state.get(data.key));
    const show = (state) => { const card = named(state); if (card && !card.box.open) setTimeout(() => { card.box.open = true; }); };
    return { box, show, keys: [data.key], knows: (state) => !!named(state) };
  }

  book.figure("cards", cards);
})();
