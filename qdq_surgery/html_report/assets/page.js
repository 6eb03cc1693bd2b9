"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const all = (what, where = document) => [...where.querySelectorAll(what)];
  const { cards, figures } = JSON.parse($("data").textContent);
  const root = document.documentElement;
  const drawn = new Map(); // promises of documents
  const ready = new Map(); // views, of those that are kept

  // Figures. Each is drawn when it is first seen, and painted again when light becomes dark.

  function paint(doc) {
    const style = getComputedStyle(root);
    const ink = style.getPropertyValue("--ink").trim();
    const soft = style.getPropertyValue("--soft").trim();
    const line = style.getPropertyValue("--line").trim();
    const colors = {
      axis_label_text_color: soft, major_label_text_color: ink, axis_line_color: soft, major_tick_line_color: soft,
      minor_tick_line_color: null, grid_line_color: line, group_text_color: soft, separator_line_color: line,
    };
    for (const model of doc.all_models ?? doc._all_models.values()) {
      for (const [name, color] of Object.entries(colors)) {
        if (name in model.properties) model[name] = color;
      }
    }
  }

  const placeOf = (name) => document.querySelector(`[data-plot="${name}"]`) ?? $(name);

  async function draw(name, place) {
    if (!drawn.has(name)) {
      drawn.set(name, Bokeh.embed.embed_item(figures[name], place).then((views) => {
        const view = [...views][0] ?? views.roots?.[0];
        const doc = view.model.document;
        ready.set(name, view);
        paint(doc);
        return doc;
      }));
    }
    return drawn.get(name);
  }

  async function drawSection(place) {
    const name = place.dataset.plot;
    const fresh = !drawn.has(name);
    const doc = await draw(name, place);
    const cells = fresh ? doc.get_model_by_name(`${name}-cells`) : null;
    if (cells) {
      cells.selected.properties.indices.change.connect(() => {
        const [at] = cells.selected.indices;
        const card = at === undefined ? -1 : [...cells.data.card][at];
        if (card >= 0) open(card, place);
      });
    }
    place.dataset.drawn = "yes";
  }

  // The panel of a quantizer.

  let opener = null;

  function text(tag, words) {
    const made = document.createElement(tag);
    made.textContent = words;
    return made;
  }

  function open(at, from) {
    const card = cards[at];
    const held = from?.closest("main") ? from : null;
    const was = held?.getBoundingClientRect().top;
    opener = from ?? opener;
    all(".q.chosen").forEach((each) => each.classList.remove("chosen"));
    all(`.q[data-q="${at}"]`).forEach((each) => each.classList.add("chosen"));
    $("panel").hidden = false;
    document.querySelector(".columns").classList.add("shown");
    $("panel-title").textContent = card.name;
    $("facts").replaceChildren(...card.facts.flatMap(([label, words]) => [text("dt", label), text("dd", words)]));
    layers(card, at);
    histogram(card);
    if (held) scrollBy(0, held.getBoundingClientRect().top - was); // the page has become narrower
    if (from) $("panel-title").focus({ preventScroll: true });
  }

  function layers(card, at) {
    const same = cards.map((each, place) => [each, place]).filter(([each]) => each.site === card.site);
    $("layers").hidden = same.length < 2;
    $("layers").replaceChildren(...same.map(([each, place]) => {
      const button = text("button", String(each.layer));
      button.type = "button";
      button.setAttribute("aria-label", `layer ${each.layer}`);
      button.setAttribute("aria-pressed", String(place === at));
      button.addEventListener("click", () => {
        open(place);
        all("#layers button[aria-pressed=true]")[0]?.focus();
      });
      return button;
    }));
  }

  async function histogram({ name, bars, figures: found }) {
    $("values").hidden = bars?.what !== "values";
    $("channels").hidden = bars?.what !== "channels";
    $("caption").textContent = bars ? caption(bars, found) : "No histogram: nothing that this quantizer sees was collected.";
    barsTable(bars);
    if (!bars) return;
    const place = $(bars.what);
    const doc = await draw(bars.what, place);
    const { width, counts, mark } = bars;
    const kept = counts.map((count, at) => [at * width, (at + 1) * width, count]).filter((bar) => bar[2] > 0);
    const top = Math.max(...counts, 1);
    const find = (what) => doc.get_model_by_name(what);
    const [plot] = doc.roots();
    find("bars").data = { left: kept.map((bar) => bar[0]), right: kept.map((bar) => bar[1]), top: kept.map((bar) => bar[2]) };
    plot.x_range.setv({ start: 0, end: Math.max(counts.length * width, mark ?? 0) * 1.04 });
    plot.y_range.setv({ end: top * (bars.what === "values" ? 2 : 1.08) });
    find("range").setv({ visible: mark !== null, location: mark ?? 0 });
    find("beyond").setv({ visible: mark !== null, left: mark ?? 0 });
    Object.assign(place.dataset, { card: name, bars: kept.length, range: mark ?? "" });
  }

  // The bars again, as rows of a table, for whoever does not see them or has no mouse to point at them.

  function barsTable(bars) {
    $("bars").hidden = !bars;
    const kept = (bars?.counts ?? []).map((count, at) => [at * bars.width, (at + 1) * bars.width, count]);
    $("bars").querySelector("tbody").replaceChildren(...kept.filter((bar) => bar[2] > 0).map(([low, high, count]) => {
      const row = document.createElement("tr");
      const head = text("th", `${low.toPrecision(4)} to ${high.toPrecision(4)}`);
      head.scope = "row";
      const cell = text("td", count.toLocaleString("en"));
      cell.className = "right";
      row.append(head, cell);
      return row;
    }));
  }

  function caption({ what, words, mark }, { largest, clipped }) {
    const said = words[0].toUpperCase() + words.slice(1);
    const up = largest === null || what !== "values" ? "" : ` up to ${largest.toPrecision(5)}`;
    const range = mark === null ? "" : `; the red line is the range ${mark.toPrecision(5)}`;
    const scaled = mark === null || what === "values" ? "" : ", and channels beyond it have a scale";
    const share = clipped ? `${Number((100 * clipped).toPrecision(3))} % are` : "nothing is";
    const beyond = clipped === null || mark === null ? "" : `, and ${share} beyond it`;
    return `${said}${up}${range}${scaled}${beyond}.`;
  }

  function close() {
    $("panel").hidden = true;
    document.querySelector(".columns").classList.remove("shown");
    all(".q.chosen").forEach((each) => each.classList.remove("chosen"));
    opener?.focus?.();
    opener = null;
  }

  // Search: lines of blocks and rows of the table that have all the words.

  let before = null;

  function filter() {
    const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const [rule, role] = [$("rule").value, $("role").value];
    const asked = words.length > 0 || rule !== "" || role !== "";
    const fits = (each) => {
      const { find = "", rule: own, role: kind } = each.dataset;
      const said = `${find} ${each.textContent.toLowerCase()}`;
      return words.every((word) => said.includes(word)) && (!rule || own === rule) && (!role || kind === role);
    };
    const rows = all("#cards tbody tr");
    rows.forEach((row) => { row.hidden = asked && !fits(row); });
    all("#blocks .row").forEach((row) => { row.hidden = asked && !fits(row); });
    blocks(asked);
    const count = rows.filter((row) => !row.hidden).length;
    $("found").textContent = asked ? `${count} of ${rows.length} quantizers` : `${rows.length} quantizers`;
  }

  function blocks(asked) {
    const every = all("#blocks details");
    if (asked && before === null) before = every.map((each) => each.open);
    every.forEach((each, at) => {
      const found = each.querySelector(".row:not([hidden])") !== null;
      each.hidden = asked && !found;
      if (asked) each.open = found;
      else if (before !== null) each.open = before[at];
    });
    all("#blocks .rows").forEach((each) => { each.hidden = asked && !each.querySelector(".row:not([hidden])"); });
    if (!asked) before = null;
  }

  // The table of quantizers, in the order of a column.

  function sort(button) {
    const heads = all("#cards thead th");
    const head = button.closest("th");
    const at = heads.indexOf(head);
    const numbers = head.classList.contains("right");
    const down = head.getAttribute("aria-sort") === (numbers ? "none" : "ascending");
    heads.forEach((each) => each.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => {
      const cell = row.children[at];
      if (!numbers) return cell.textContent;
      return cell.dataset.v === "" ? -Infinity : Number(cell.dataset.v);
    };
    const order = new Intl.Collator("en", { numeric: true }).compare;
    const compare = (one, other) => (numbers ? key(one) - key(other) : order(key(one), key(other)));
    const body = document.querySelector("#cards tbody");
    const rows = all("tr", body).sort((one, other) => (down ? -compare(one, other) : compare(one, other)));
    body.replaceChildren(...rows);
  }

  // Light and dark.

  const darkness = matchMedia("(prefers-color-scheme: dark)");

  function theme(dark) {
    root.dataset.theme = dark ? "dark" : "light";
    $("theme").textContent = dark ? "light" : "dark";
    $("theme").setAttribute("aria-label", `change to ${dark ? "light" : "dark"}`);
    ready.forEach((view, name) => {
      paint(view.model.document);
      view.repaint(); // at once: paper does not wait for the next frame
      placeOf(name).dataset.painted = root.dataset.theme;
    });
  }

  // Paper: light, whatever was changed is open, and then all is as it was.

  let paper = null;
  addEventListener("beforeprint", () => {
    if (paper) return;
    const folded = all("details:not([open])").filter((each) => each.matches(".long, .changed, :has(.changed)"));
    paper = { folded, dark: root.dataset.theme === "dark" };
    folded.forEach((each) => { each.open = true; });
    if (paper.dark) theme(false);
  });
  addEventListener("afterprint", () => {
    if (!paper) return;
    paper.folded.forEach((each) => { each.open = false; });
    if (paper.dark) theme(true);
    paper = null;
  });

  async function onPaper() {
    await Promise.all(drawn.values());
    print();
  }

  // A figure's table: Tab comes to one of its cells, arrows go from cell to cell, Home and End along the row.

  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

  function walk(event) {
    const cell = event.target.closest?.(".twin td");
    if (!cell || !(event.key in steps || event.key === "Home" || event.key === "End")) return;
    event.preventDefault();
    const rows = all("tbody tr", cell.closest("table"));
    const cells = (row) => all("td", row);
    let [row, at] = [rows.indexOf(cell.parentElement), cells(cell.parentElement).indexOf(cell)];
    const [down, right] = steps[event.key] ?? [0, event.key === "Home" ? 1 : -1];
    if (!(event.key in steps)) at = event.key === "Home" ? -1 : cells(rows[row]).length;
    let found;
    do { // over cells that are empty
      [row, at] = [row + down, at + right];
      found = rows[row] && cells(rows[row])[at];
    } while (found && !found.firstElementChild);
    if (!found) return;
    cell.firstElementChild.tabIndex = -1;
    found.firstElementChild.tabIndex = 0;
    found.firstElementChild.focus();
  }

  // Who does what.

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.q !== undefined) open(Number(button.dataset.q), button);
    if (button.dataset.sort !== undefined) sort(button);
    if (button.dataset.figure !== undefined) tab(button);
  });

  function tab(button) {
    const section = button.closest("section");
    all(".tab", section).forEach((each) => each.setAttribute("aria-pressed", String(each === button)));
    all(".plot, .twin", section).forEach((each) => {
      each.hidden = (each.dataset.plot ?? each.dataset.twin) !== button.dataset.figure;
    });
    drawSection(section.querySelector(".plot:not([hidden])"));
  }

  document.addEventListener("keydown", (event) => {
    const typing = event.target.matches?.("input, select, textarea");
    if (event.key === "Escape" && !$("panel").hidden) close();
    walk(event);
    if (event.key === "/" && !typing) {
      event.preventDefault();
      $("find").focus();
    }
  });
  $("close").addEventListener("click", close);
  $("print").addEventListener("click", onPaper);
  $("theme").addEventListener("click", () => theme(root.dataset.theme !== "dark"));
  $("filter").addEventListener("input", filter);
  $("filter").addEventListener("submit", (event) => event.preventDefault());
  $("filter").addEventListener("reset", () => setTimeout(filter));
  $("unfold")?.addEventListener("click", () => all("#blocks details").forEach((each) => { each.open = true; }));
  $("fold")?.addEventListener("click", () => all("#blocks details").forEach((each) => { each.open = false; }));
  darkness.addEventListener("change", () => paper ?? theme(darkness.matches));
  theme(darkness.matches);
  filter();
  const idle = window.requestIdleCallback ?? setTimeout;
  addEventListener("load", () => idle(() => all("[data-plot]:not([hidden])").forEach(drawSection)));
})();
