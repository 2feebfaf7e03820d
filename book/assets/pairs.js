/* One pair of prompts at a time: its tokens, its candidates, its layers and its sites (report/pairs.py). */
"use strict";
(() => {
  const { element, labelled, signed, number } = book;
  const SIDES = ["clean", "corrupt"];
  const listed = (names) => names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
  const table = (heads, rows) => element("div", { class: "frame" }, element("table", { class: "plain" },
    element("thead", {}, element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)))), element("tbody", {}, ...rows)));
  const cells = (...parts) => element("tr", {}, ...parts.map((part, at) => at ? element("td", {}, part) : element("th", { scope: "row" }, part)));
  const ROLE = { last: "the last token", names: "the names", between: "the tokens between", rest: "all other tokens",
    swapped: "the names that differ", all: "every token" };
  const role = (name) => ROLE[name] || name.replace(/^name_(.)$/, (_, slot) => `name ${slot.toUpperCase()}`);
  const ACTS = { denoise: "put back: clean values into the corrupt prompt", noise: "taken out: corrupt values into the clean prompt" };

  function explorer(data, did) {
    const pairs = data.pairs.map(([id, half, answer, other, clean, corrupt, first, second], at) => ({ id, half, at,
      answers: [answer, other], names: [clean, corrupt], diffs: [first, second], gap: first - second,
      text: `${listed(clean)} (${answer}) against ${listed(corrupt)} (${other})` }));
    const find = element("input", { type: "search", size: 18 }), count = element("output");
    const select = element("select", { size: 5, "aria-label": "Pairs of prompts" });
    /* Where no pair is asked for: the first of those of which most was measured. */
    const known = ({ at }) => [data.curves, data.map, data.looks].reduce((sum, part) =>
      sum + ((part && part.values[at]) || []).filter((value) => value !== null).length, 0);
    const first = pairs.reduce((best, pair) => (known(pair) > known(best) ? pair : best), pairs[0]);
    let now = first, site = "", act = "denoise", lacking = "";

    /* What a part shows, or why it shows nothing. */
    const place = (title) => {
      const inside = element("div"), box = element("section", {}, element("h2", {}, title), inside);
      return { box, say: (text) => inside.replaceChildren(element("p", { class: "note" }, text)), put: (...parts) => inside.replaceChildren(...parts) };
    };
    const prompt = place("The two prompts"), answers = place("The candidates"), layers = place("Layer by layer");
    const sites = place("Every site"), looks = place("Where the leading heads look");

    function fill() {
      const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = pairs.filter((pair) => words.every((word) => `${pair.id} ${pair.text}`.toLowerCase().includes(word)));
      select.replaceChildren(...found.map((pair) => element("option", { value: pair.id }, pair.text)));
      select.value = now.id;
      count.textContent = (lacking ? `Pair ${lacking} is not on this page, another one is shown. ` : "") + `${found.length} of ${pairs.length} pairs` + (pairs.length < data.all
        ? ` (of ${data.all} that there are, those of which most was measured, then of largest gap)` : "");
    }

    /* How much of the pinned head's attention goes to a name; null where that was not stored. */
    const share = (head, name) => {
      const own = data.looks && data.looks.values[now.at], row = data.looks ? data.looks.heads.indexOf(head) : -1;
      return own && (row >= 0 || head === "even") ? own[(row + 1) * data.looks.onto.length + name] : null;
    };

    function prompts() {
      const lines = SIDES.map((side, number) => {
        const line = element("p", { class: "prompt" }, element("b", {}, side), " ");
        if (data.words) {
          const { around, own } = data.words;
          around.forEach((texts, slot) => {
            line.append(...texts.map((text) => element("span", { class: "token" }, text || "\u25aa")));
            const looked = side === "clean" && site ? share(site, slot) : null;
            const name = (own[now.at][side][slot] || []).map((text) => {
              const token = element("span", { class: "token name" }, text);
              if (looked !== null) token.style.setProperty("--looked", (looked / 100).toFixed(2));
              return token;
            });
            line.append(...name);
          });
        } else line.append(listed(now.names[number]));
        line.append(" ", element("span", { class: "answer" }, now.answers[number]));
        return line;
      });
      prompt.put(...lines, element("p", {}, `logit_diff, the lead of "${now.answers[0]}" over "${now.answers[1]}", is ` +
        `${signed(now.diffs[0])} logits in the clean prompt and ${signed(now.diffs[1])} in the corrupt one: a gap of ` +
        `${signed(now.gap)}. This pair is of the ${now.half} half.`),
        ...(data.words ? [] : [element("p", { class: "note" }, "The tokens are not among the stored results: the names stand alone.")]));
    }

    function candidates() {
      const both = data.logits && SIDES.map((side) => data.logits[side][now.at]);
      if (!both || both.some((values) => !values)) return answers.say("Steps 02 to 04 hold no plain run of this pair.");
      const low = Math.min(...both.flat()), high = Math.max(...both.flat());
      const bar = (value, name) => {
        const cell = element("span", { class: `bar ${now.answers.indexOf(name) === 0 ? "for" : now.answers.includes(name) ? "against" : ""}` }, signed(value));
        cell.style.setProperty("--part", `${(100 * (value - low)) / (high - low || 1)}%`);
        return cell;
      };
      const order = data.logits.names.map((name, at) => [name, both[0][at], both[1][at]]).sort((one, two) => two[1] - one[1]);
      answers.put(table(["candidate", "logit, clean prompt", "logit, corrupt prompt"],
        order.map(([name, first, second]) => cells(name, bar(first, name), bar(second, name)))),
        element("p", { class: "note" }, "Blue: the clean prompt's answer; orange: the corrupt one's. Bars begin at the lowest of these logits."));
    }

    const told = element("p", { class: "told short", "aria-live": "polite" });
    function curves() {
      const own = data.curves && data.curves.values[now.at];
      if (!own) return layers.say("Step 02 has not swept the layers in this pair.");
      const size = data.curves.layers.length, lines = [], none = [];
      data.curves.shown.forEach(([direction, position], curve) => {
        const points = data.curves.layers.map((layer, at) => [layer, own[curve * size + at]]);
        if (direction !== act) return;
        if (points.some((point) => point[1] !== null)) lines.push({ name: role(position), points });
        else none.push(role(position));
      });
      const radios = element("fieldset", {}, element("legend", {}, "The residual stream after each layer is"));
      for (const direction of new Set(data.curves.shown.map((curve) => curve[0]))) {
        const radio = element("input", { type: "radio", name: "pair-act", value: direction });
        radio.checked = direction === act;
        radios.append(element("label", {}, radio, " " + ACTS[direction]));
      }
      radios.onchange = (event) => {
        did({ act: event.target.value === "noise" ? "1" : "" });
        layers.box.querySelector("input:checked").focus();
      };
      const verb = act === "denoise" ? "rises" : "falls";
      const at = (layer) => Math.max(0, data.curves.layers.indexOf(layer));
      told.textContent = book.HOW;
      const drawing = book.plot({ lines, label: `Change of logit_diff by layer, ${listed(now.names[0])}`, xlabel: "layer",
        ylabel: `logit_diff ${verb} by (logits)`, level: { name: "the gap", y: now.gap },
        tell: (line, point) => told.replaceChildren(`${line.name}, layer ${data.curves.layers[at(point[0])]}: logit_diff ${verb} by `,
          element("strong", {}, `${signed(point[1])} logits`), now.gap ? `, ${signed((100 * point[1]) / now.gap)} of the gap.` : "."),
        choose: () => {} });
      const left = data.curves.left.filter((curve) => curve[0] === act).map((curve) => role(curve[1]));
      const notes = [[none, "Not swept in this pair: ", "."], [left, "The page has no room for ", ": coarse_sweep.parquet has them."]];
      layers.put(radios, drawing.box, told, ...notes.filter(([those]) => those.length)
        .map(([those, before, after]) => element("p", { class: "note" }, before + listed(those) + after)));
    }

    const about = element("p", { class: "told short", "aria-live": "polite" });
    const values = () => {  // of all cells of the grid, null where the page has none
      const own = data.map.values[now.at], out = own && Array(data.map.layers.length * data.map.lines.length).fill(null);
      if (own) data.map.places.forEach((cell, at) => { out[cell] = own[at]; });
      return out;
    };
    const tell = (index) => {
      const value = values() && values()[index];
      about.replaceChildren(element("strong", {}, grid.names[index]), ": ");
      if (value === null || value === undefined) {
        about.append(data.map.places.length < data.map.all ? "not among the sites that the page has room for." : "not measured in this pair.");
      } else {
        about.append(`its clean value, put back at the last token, ${value < 0 ? "lowers" : "raises"} logit_diff in this pair by `,
          element("strong", {}, `${number(value)} logits`), now.gap ? `, ${signed((100 * value) / now.gap)} of its gap.` : ".",
          ...book.elsewhere(data.links, grid.names[index]));
      }
    };
    const grid = data.map && book.grid({ ...data.map, label: "Effect of each site in this pair: heads and modules by layer",
      tell, choose: (index) => did({ site: grid.names[index] }) });
    const note = element("p", { class: "note" });
    function map() {
      if (!grid || !values()) return sites.say("Step 04 has not swept the sites in this pair.");
      const own = values().filter((value) => value !== null).map(Math.abs).sort((a, b) => b - a);
      const full = (own[Math.floor(own.length / 100)] || 100) / 100;
      grid.colour(values(), full);
      note.textContent = `Blue: logit_diff rises; orange: it falls; full colour from ${full.toFixed(2)} logits on. ` +
        (data.map.places.length < data.map.all ? `Of ${data.map.all} sites the page has the ${data.map.places.length} of largest mean effect. ` : "") +
        "Arrow keys move, Enter or a click pins. One pair has no interval.";
      if (!grid.box.parentElement) sites.put(grid.box, note, about);  // once, so that it keeps the focus
    }

    function attention() {
      const own = data.looks && data.looks.values[now.at];
      if (!own) return looks.say("Step 06 has stored no attention in this pair's clean prompt.");
      const onto = data.looks.onto.map((name, slot) => now.names[0][slot] || role(name));
      const row = (head, name) => {
        const made = cells(name, ...onto.map((_, slot) => {
          const value = share(head, slot), bar = element("span", { class: "bar for" }, value === null ? "" : number(value));
          bar.style.setProperty("--part", `${value || 0}%`);
          return bar;
        }));
        if (head === site) made.classList.add("lit");
        return made;
      };
      looks.put(element("p", {}, "Share of each head's attention from the last token of the clean prompt to the tokens of a name."),
        table(["head", ...onto], [...data.looks.heads.map((head) => row(head, head)), row("even", "even attention")]));
    }

    select.onchange = () => did({ pair: select.value });
    find.oninput = fill;
    const box = element("div", { class: "interactive pair-explorer" }, element("div", { class: "controls" },
      labelled("Find a name", find), count), select, ...[prompt, answers, layers, sites, looks].map((part) => part.box));
    const show = (state) => {
      const asked = state.get("pair"), found = pairs.find((pair) => pair.id === asked);
      now = found || first;
      lacking = (!found && asked) || "";
      site = state.get("site") || "";
      act = state.get("act") === "1" ? "noise" : "denoise";
      fill();
      prompts();
      candidates();
      curves();
      map();
      attention();
      const leading = grid && values() ? values().map((value) => Math.abs(value)).reduce((best, value, at, all) => value > all[best] ? at : best, 0) : 0;
      if (grid && values()) grid.pin(grid.names.includes(site) ? grid.names.indexOf(site) : leading);
    };
    const knows = (state) => state.has("pair");
    return { box, show, keys: ["pair", "site", "act"], knows };
  }

  book.figure("pair-explorer", explorer);
})();
