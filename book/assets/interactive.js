/* What the figures that a reader can touch have in common. Each kind has a file of its own beside this one, which draws
   the JSON that stands in the page (report/interactive.py), and nothing is fetched.

   There is one state for all views of a page, and it stands in the address behind "#", so that a view can be cited, and
   so that links within the book carry it on:
     site  the pinned site ("21.6", "mlp 3"): every view that knows it, and every table with such a column, lights it
     at    the figure or place that the page opens at ("top": at its beginning)
   Other keys are one view's own. */
"use strict";
const book = (() => {
  const given = (made, attributes, inside) => {
    for (const name in attributes) made.setAttribute(name, attributes[name]);
    made.append(...inside);
    return made;
  };
  const element = (tag, attributes = {}, ...inside) => given(document.createElement(tag), attributes, inside);
  const drawn = (tag, attributes = {}, ...inside) =>
    given(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, inside);
  const labelled = (text, control) => element("label", {}, text + " ", control);
  /* What may be wider than the screen scrolls in a frame, also by keyboard. */
  const framed = (label, content) => element("div", { class: "frame", tabindex: 0, role: "region", "aria-label": label }, content);
  /* Numbers come as hundredths. */
  const number = (hundredths) => (Math.abs(hundredths) / 100).toFixed(2);
  const signed = (hundredths) => (hundredths < 0 && number(hundredths) !== "0.00" ? "\u2212" : "") + number(hundredths);

  /* --- the state --- */

  const views = [];
  let state = new URLSearchParams();
  const read = () => {
    if (location.hash.includes("=")) state = new URLSearchParams(location.hash.slice(1));
  };
  const tell = () => {
    for (const view of views) {
      const now = JSON.stringify(view.keys.map((key) => state.get(key)));
      try { if (now !== view.seen) view.show(state); } catch (error) { console.error(error); }  // an address of another book
      view.seen = now;
    }
    light(state.get("site"));
  };
  /* Write what a reader has chosen into the address ("" takes a key out), and tell every view. */
  const remember = (chosen) => {
    for (const key in chosen) chosen[key] ? state.set(key, chosen[key]) : state.delete(key);
    history.replaceState(null, "", String(state) ? "#" + state : location.pathname + location.search);
    tell();
  };
  const open = () => {
    const at = state.get("at"), view = views.find((one) => (at ? one.id === at : one.knows(state)));
    const place = view ? view.box : at && document.getElementById(at);
    for (let part = place; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
    if (place) place.scrollIntoView();
  };

  /* A kind of figure. `draw(data, act)` gives {box, keys, show(state), knows(state)}: what stands in the page, the keys of
     the state that it goes by, and whether it has something to show for them. `act(chosen)` is for what a reader does. */
  const figure = (kind, draw) => each(`div.${kind}[data-twin]`, (place) => {
    const id = place.dataset.twin, twin = document.getElementById(id);
    const view = draw(JSON.parse(place.querySelector("script").textContent), (chosen) => remember({ ...chosen, at: id }));
    if (twin) {
      twin.classList.add("touched");
      twin.prepend(view.box);
      place.remove();
    } else place.replaceWith(view.box);
    return { ...view, id };
  });
  /* Any other view: `make(place)` gives the same of every place in the page that a selector finds. */
  const makers = [];
  const each = (selector, make) => makers.push([selector, make]);

  /* --- between pages --- */

  const SITE = /^(\d+\.\d+|(mlp|attn) \d+)(?=$| at | \()/;
  const asked = () => {
    const query = new URLSearchParams(location.search).get("q") || "";
    return /search\.html$/.test(location.pathname) && SITE.test(query.trim()) ? query.trim() : "";
  };
  /* A link to another page takes the pinned site along; one that was found by a site's name opens at that site. */
  function carry(event) {
    const link = event.target.closest && event.target.closest("a[href]"), found = asked(), site = found || state.get("site");
    if (!link || !site || link.host !== location.host || !/\.html$/.test(link.pathname) || link.hash.includes("=")) return;
    if (link.pathname === location.pathname) return;
    const at = decodeURIComponent(link.hash.slice(1)) || "top";
    link.hash = new URLSearchParams(found ? { site } : { site, at });
  }
  /* Links to other views of a site, [text, page, figure] each, as far as this page or this book has them; `more` of the
     state goes along. */
  const linked = (page) => document.querySelector(`nav a[href*="${page}.html"]`);
  const elsewhere = (links, site, more = {}) => (links || []).flatMap(([text, page, figure]) => {
    const there = document.getElementById(figure) ? location : linked(page);
    if (!there) return [];
    const href = there.href.split("#")[0] + "#" + new URLSearchParams({ ...more, site, at: figure });
    return [" ", element("a", { href }, text)];
  });
  /* Whoever searches for a site finds it, also where no page singles it out. */
  each("#search-results", (place) => {
    const map = asked() && linked("_sufficiency");
    if (map) {
      const href = map.href.split("#")[0] + "#" + new URLSearchParams({ site: asked() });
      place.before(element("p", {}, element("a", { href, id: "map-link" }, `Site ${asked()} in the map of all sites`)));
    }
    return { box: place, keys: [], show: () => {}, knows: () => false };
  });
  let columns = null;
  function light(site) {
    columns = columns || [...document.querySelectorAll("table")].flatMap((table) => {
      const heads = table.tHead ? [...table.tHead.rows].at(-1).cells : [];
      const named = [...heads].flatMap((cell, at) => (/^(site|head|sender|node|source|target)/.test(cell.textContent.trim()) ? [at] : []));
      return named.length ? [...table.tBodies].flatMap((body) => [...body.rows]).flatMap((row) =>
        named.map((at) => row.cells[at]).filter((cell) => cell && SITE.test(cell.textContent.trim()))) : [];
    });
    for (const cell of columns) cell.classList.toggle("lit", !!site && SITE.exec(cell.textContent.trim())[1] === site);
  }

  /* What scrolls sideways, such as a wide table on a phone, can be reached and scrolled by keyboard. */
  const reachable = () => {
    for (const part of document.querySelectorAll(".bd-article figure, .bd-article div, .bd-article pre, .bd-article span"))
      if (part.scrollWidth > part.clientWidth && /auto|scroll/.test(getComputedStyle(part).overflowX)) part.tabIndex = 0;
  };

  const start = () => {
    read();
    for (const [selector, make] of makers) document.querySelectorAll(selector).forEach((place) => {
      try { views.push(make(place)); } catch (error) { console.error(selector, error); }  // its twin stays
    });
    tell();
    open();
    reachable();
    addEventListener("resize", reachable);
    addEventListener("toggle", reachable, true);
    addEventListener("hashchange", () => { read(); tell(); open(); });
    // figures scroll on a phone (superset.css), also by keyboard
    if (matchMedia("(max-width: 600px)").matches) document.querySelectorAll("figure").forEach((part) => { part.tabIndex = 0; });
    for (const way of ["click", "auxclick"]) document.addEventListener(way, carry, true);
  };
  document.readyState === "loading" ? addEventListener("DOMContentLoaded", start) : setTimeout(start);
  return { element, drawn, labelled, framed, number, signed, remember, figure, each, elsewhere };
})();
